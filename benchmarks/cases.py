"""What is measured: the cases, their inputs, and whether prelu_gpu computes them right.

Groups: "model", tensors of networks that use PReLU, in the layouts that they use; "leaky", of
networks that use Leaky ReLU; "curve", sizes from 2^10 to 2^28 elements; "awkward", what kernels
find hard. "core" are the few that tell most.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import prelu_gpu
from prelu_gpu.plan import Plan, Rules, plan, view

PASSES = {"forward": 2, "backward": 3, "inference": 2, "step": 5}
"""The operations, and how often each must go over memory of the size of x: read x, write y; read
x and y's gradient, write x's gradient; a step is a forward and a backward. Slopes are thousands of
times smaller and not counted."""

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

DEVICE_BYTES = 2**24
"""Size of x from which device time counts; below it is the time of the whole call."""

H100_MULTIPROCESSORS = 132

NEGATIVE_SLOPE = 0.1
"""Of Leaky ReLU."""

CHECKED_ELEMENTS = 2**24
"""Elements that are compared in float64 at a time: 128 MiB for each temporary."""


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype without its module."""
    return str(dtype).removeprefix("torch.")


class Inputs(NamedTuple):
    """One set of inputs; x and weight are leaves that require a gradient.

    Leaky ReLU's weight is its number, for the reference alone.
    """

    x: Tensor
    weight: Tensor
    grad_y: Tensor


@dataclass(frozen=True)
class Case:
    """A tensor and its slopes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    slope: str = "channel"
    """"channel" for a slope each, "shared" for one, "number" for Leaky ReLU."""
    slope_dtype: torch.dtype | None = None
    """None for the tensor's own."""
    layout: str = "contiguous"
    """"channels_last"; "sliced" for half of a chunk along the channels, its gradient dense;
    "offset" for dense memory that begins one element off the alignment."""
    dim: int = 1
    """The dimension of the channels."""
    group: str = "model"
    inplace: bool = False
    """Whether Leaky ReLU overwrites x."""

    @property
    def shape_name(self) -> str:
        """The shape in one word."""
        return "x".join(map(str, self.shape))

    @property
    def dtype_name(self) -> str:
        """The tensor's dtype without its module."""
        return dtype_name(self.dtype)

    @property
    def slope_dtype_name(self) -> str:
        """The slopes' dtype without its module."""
        return dtype_name(self.weight_dtype)

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the slopes; a number is a float32 in a kernel."""
        return FLOAT32 if self.slope == "number" else self.slope_dtype or self.dtype

    @property
    def channel_dim(self) -> int | None:
        """The dimension the slope varies over; None for one slope."""
        return self.dim % len(self.shape) if self.slope == "channel" else None

    @property
    def slopes(self) -> int:
        """Number of slopes."""
        return 1 if self.channel_dim is None else self.shape[self.channel_dim]

    @property
    def slope_shape(self) -> list[int]:
        """The slopes' shape as it broadcasts over x."""
        return [-1 if d == self.channel_dim else 1 for d in range(len(self.shape))]

    @property
    def ops(self) -> tuple[str, ...]:
        """The operations that are timed: x is a leaf, which only without grad is overwritten."""
        return ("inference",) if self.inplace else tuple(PASSES)

    @property
    def nbytes(self) -> int:
        """Bytes of x."""
        return math.prod(self.shape) * self.dtype.itemsize

    def bytes_moved(self, op: str) -> int:
        """The least that `op` must read and write."""
        return PASSES[op] * self.nbytes

    def inputs(self, device: torch.device) -> Inputs:
        """A new set of random inputs."""
        weight = torch.empty(self.slopes, dtype=self.weight_dtype, device=device)
        x, grad_y = self._empty(device)
        number = self.slope == "number"
        weight = weight.fill_(NEGATIVE_SLOPE) if number else weight.uniform_(0, 0.5)
        return Inputs(x.normal_().requires_grad_(), weight.requires_grad_(), grad_y.normal_())

    def differentiated(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """What the backward gives gradients of."""
        return inputs[:1] if self.slope == "number" else inputs[:2]

    def plan(self, op: str, rules: Rules) -> Plan:
        """The launch of prelu_gpu's kernel for `op`."""
        x, grad_y = self._empty(torch.device("meta"))
        grad_y_stride = grad_y.stride() if op == "backward" else None
        result_stride = torch.empty_like(x).stride()
        layout = view(x.shape, result_stride, self.channel_dim, x.stride(), grad_y_stride)
        return plan(layout, self.dtype.itemsize, rules)

    def _empty(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Memory for x and for y's gradient."""

        def empty(*shape: int, layout: str = "contiguous") -> Tensor:
            memory_format = LAYOUTS[layout]
            return torch.empty(shape, dtype=self.dtype, device=device, memory_format=memory_format)

        if self.layout == "sliced":
            whole = [size * (2 if d == self.dim else 1) for d, size in enumerate(self.shape)]
            return empty(*whole).chunk(2, self.dim)[1], empty(*self.shape)
        if self.layout == "offset":
            x, grad_y = (empty(math.prod(self.shape) + 1)[1:].view(self.shape) for _ in range(2))
            return x, grad_y
        return empty(*self.shape, layout=self.layout), empty(*self.shape, layout=self.layout)


def in_dtypes(case: Case, mixed: bool) -> Iterator[Case]:
    """The case in every dtype, with slopes of the same and, `mixed`, of float32."""
    for dtype in DTYPES.values():
        yield dataclasses.replace(case, dtype=dtype, slope_dtype=None)
    for dtype in (torch.bfloat16, torch.float16) if mixed else ():
        yield dataclasses.replace(case, dtype=dtype, slope_dtype=torch.float32)


def size_curve(slope: str) -> Iterator[Case]:
    """From 2^10 to 2^28 elements: a vector for a shared slope, else pictures of 64 channels."""
    for exponent in range(10, 29, 2):
        side = min(2 ** (exponent // 2 - 3), 64)
        pictures = (2**exponent // (64 * side**2), 64, side, side)
        shape = (2**exponent,) if slope == "shared" else pictures
        yield Case(f"{slope}-2^{exponent}", shape, slope=slope, group="curve")


MODELS = (
    # Face recognition, under autocast.
    Case("iresnet", (128, 64, 112, 112), FLOAT16, slope_dtype=FLOAT32),
    Case("iresnet-56x56", (128, 128, 56, 56), FLOAT16, slope_dtype=FLOAT32),
    Case("iresnet-28x28", (128, 256, 28, 28), FLOAT16, slope_dtype=FLOAT32),
    Case("iresnet-14x14", (128, 512, 14, 14), FLOAT16, slope_dtype=FLOAT32),
    Case("iresnet-7x7", (128, 512, 7, 7), FLOAT16),
    Case("iresnet-cl", (128, 64, 112, 112), FLOAT16, slope_dtype=FLOAT32, layout="channels_last"),
    # 3-D medical segmentation.
    Case("monai-unet", (2, 32, 96, 96, 96), FLOAT32, slope="shared"),
    Case("monai-unet-48", (2, 32, 48, 48, 48), FLOAT32, slope="shared"),
    Case("monai-unet-24", (2, 64, 24, 24, 24), FLOAT32, slope="shared"),
    Case("monai-unet-12", (2, 128, 12, 12, 12), FLOAT32, slope="shared"),
    Case("monai-unet-6", (2, 256, 6, 6, 6), FLOAT32, slope="shared"),
    Case("monai-vnet", (2, 16, 96, 96, 96), FLOAT32),
    Case("monai-vnet-6", (2, 256, 6, 6, 6), FLOAT32),
    # Speech separation: a slope for all, or for each feature, which SpeechBrain keeps last.
    Case("conv-tasnet", (8, 512, 4000), BFLOAT16, slope="shared"),
    Case("speechbrain", (8, 4000, 512), BFLOAT16, slope="shared", dim=-1),
    Case("speechbrain-channel", (8, 4000, 512), BFLOAT16, dim=-1),
    # Super-resolution and video.
    Case("srgan", (16, 64, 96, 96), FLOAT32, slope="shared"),
    Case("real-esrgan", (8, 64, 360, 640), BFLOAT16, layout="channels_last"),
    Case("real-esrgan-nchw", (8, 64, 360, 640), FLOAT16),
    Case("rife-32", (8, 32, 180, 320), FLOAT16),
    Case("rife-240", (8, 240, 45, 80), FLOAT16),
    Case("fsrcnn-56", (8, 56, 180, 320), FLOAT32),
    Case("fsrcnn-12", (8, 12, 180, 320), FLOAT32),
    # Face detection, whose layers are launches more than work.
    Case("mtcnn-pnet", (1, 10, 70, 70), FLOAT32),
    Case("mtcnn-rnet", (64, 28, 22, 22), FLOAT32),
    Case("mtcnn-onet", (16, 256), FLOAT32),
    # Graphs.
    Case("graph-infomax", (100_000, 512), FLOAT32),
)

LEAKY = tuple(
    dataclasses.replace(case, slope="number", group="leaky")
    for case in (
        # Medical segmentation, object detection.
        Case("nnu-net", (12, 32, 512, 512), FLOAT16),
        Case("nnu-net-in-place", (12, 32, 512, 512), FLOAT16, inplace=True),
        Case("yolo", (16, 64, 208, 208), FLOAT32),
        Case("yolo-in-place", (16, 64, 208, 208), FLOAT32, inplace=True),
    )
)

CURVES = (*size_curve("shared"), *size_curve("channel"))

AWKWARD = tuple(
    dataclasses.replace(case, group="awkward")
    for case in (
        Case("channels-90", (400_009, 90)),
        Case("channels-12", (32, 12, 320, 320), layout="channels_last"),
        Case("planes-7x7", (2048, 512, 7, 7)),
        Case("planes-1x1", (65_536, 512, 1, 1)),
        Case("planes-391", (512, 256, 17, 23)),
        Case("planes-prime", (8, 64, 383, 389)),
        Case("prime", (67_108_859,), slope="shared"),
        Case("one-picture", (1, 64, 1080, 1920)),
        Case("offset", (64, 64, 128, 128), layout="offset"),
        Case("offset-shared", (64, 64, 128, 128), slope="shared", layout="offset"),
        Case("sliced", (64, 64, 128, 128), layout="sliced"),
        Case("sliced-shared", (64, 64, 128, 128), slope="shared", layout="sliced"),
    )
)


def pick(name: str, dtype: torch.dtype, slope_dtype: torch.dtype | None = None) -> Case:
    """A case of that name in these dtypes."""
    (case,) = (case for case in (*MODELS, *LEAKY, *CURVES, *AWKWARD) if case.name == name)
    return dataclasses.replace(case, dtype=dtype, slope_dtype=slope_dtype)


CORE = (
    pick("monai-unet", FLOAT32),
    pick("iresnet", FLOAT16, FLOAT32),
    pick("real-esrgan", BFLOAT16),
    pick("iresnet-7x7", FLOAT16),
    pick("graph-infomax", FLOAT32),
    pick("conv-tasnet", BFLOAT16),
    pick("iresnet", FLOAT32),
    pick("iresnet-14x14", BFLOAT16),
    pick("speechbrain-channel", BFLOAT16),
    pick("planes-prime", FLOAT32),
    pick("sliced", FLOAT16),
    pick("mtcnn-pnet", FLOAT32),
    pick("nnu-net", FLOAT16),
    pick("nnu-net-in-place", FLOAT16),
)
"""The cases that tell most: every kind of tile and layout, every dtype, large and tiny."""

CASES = tuple(
    dict.fromkeys(
        itertools.chain(
            CORE,
            MODELS,
            *(in_dtypes(case, mixed=True) for case in MODELS),
            *(in_dtypes(case, mixed=False) for case in (*LEAKY, *CURVES, *AWKWARD)),
        )
    )
)
"""All cases in all dtypes, each once; the most telling first, for runs that are cut off."""

GROUPS = ("core", "model", "leaky", "curve", "awkward")


def is_in(case: Case, name: str) -> bool:
    """Whether a case has that name, or is in the group of that name."""
    return case in CORE if name == "core" else name in (case.name, case.group)


def check(case: Case, device: torch.device) -> list[str]:
    """What prelu_gpu gets wrong in a case, in words; empty if nothing.

    The forward is PyTorch's bit for bit, in the slope's dtype and rounded once. The gradients are
    compared with float64: the input's to one rounding, the slope's to its own rounding and to what
    summing in float32 may add: a sum of n products of root mean square r is off by about
    eps * r * n if it is made one by one, the worst order.
    """
    inputs = case.inputs(device)
    x, weight, grad_y = inputs
    # The results get this memory, so that an element left unwritten is NaN.
    poison = [torch.full_like(x, math.nan) for _ in range(2)]
    del poison
    y = _activation(case, x, weight)
    grad_x, *grad_weight = torch.autograd.grad(y, case.differentiated(inputs), grad_y)

    with torch.no_grad():
        expected = prelu_along(case.dim, x.to(weight.dtype), weight).to(x.dtype)
        wrong_y = _count(_bits(y) != _bits(expected))
        without_grad = _activation(case, x, weight)
        wrong_without_grad = _count(_bits(without_grad) != _bits(expected))
        del expected, without_grad
        wrong_grad_x, wrong_grad_weight = _check_gradients(case, inputs, grad_x, *grad_weight)
    return [
        f"{what}: {wrong} of {tensor.numel()} elements are wrong"
        for what, wrong, tensor in (
            ("forward", wrong_y, y),
            ("forward without grad", wrong_without_grad, y),
            ("input gradient", wrong_grad_x, grad_x),
            ("slope gradient", wrong_grad_weight, weight),
        )
        if wrong
    ]


def _activation(case: Case, x: Tensor, weight: Tensor) -> Tensor:
    """Y by prelu_gpu; in place, a copy of x that is overwritten."""
    if case.slope == "number":
        return prelu_gpu.leaky_relu(x.clone() if case.inplace else x, NEGATIVE_SLOPE, case.inplace)
    return prelu_gpu.prelu(x, weight, dim=case.dim)


def prelu_along(dim: int, x: Tensor, weight: Tensor) -> Tensor:
    """torch.nn.functional.prelu, whose channels are dimension 1, along another."""
    if weight.numel() == 1 or dim == 1:
        return F.prelu(x, weight)
    return F.prelu(x.movedim(dim, 1), weight).movedim(1, dim)


def _check_gradients(
    case: Case, inputs: Inputs, grad_x: Tensor, grad_weight: Tensor | None = None
) -> tuple[int, int]:
    """How many elements of the gradients are wrong; some rows of x at a time."""
    rows = max(1, CHECKED_ELEMENTS // (grad_x.numel() // grad_x.shape[0]))
    slopes = inputs.weight.double().view(case.slope_shape)
    sums, squares = torch.zeros_like(slopes), torch.zeros_like(slopes)
    wrong_grad_x = 0
    for parts in zip(*(t.split(rows) for t in (inputs.x, inputs.grad_y, grad_x)), strict=True):
        x, grad_y, actual = (part.double() for part in parts)
        expected = torch.where(x > 0, grad_y, slopes * grad_y)
        wrong_grad_x += _count_apart(actual, expected, _rounding(expected, grad_x.dtype))
        products = torch.where(x > 0, 0.0, grad_y * x)
        sums += products.sum_to_size(slopes.shape)
        squares += products.square().sum_to_size(slopes.shape)

    if grad_weight is None:
        return wrong_grad_x, 0
    summands = grad_x.numel() // grad_weight.numel()
    summing = torch.finfo(torch.float32).eps * (summands * squares).sqrt()
    tolerance = _rounding(sums, grad_weight.dtype) + summing
    actual = grad_weight.double().view_as(sums)
    return wrong_grad_x, _count_apart(actual, sums, tolerance)


def _rounding(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding to `dtype` may change: relative, and absolute among subnormal numbers."""
    info = torch.finfo(dtype)
    return info.eps * (exact.abs() + info.smallest_normal)


def _count_apart(actual: Tensor, expected: Tensor, tolerance: Tensor) -> int:
    # NaN is apart from everything.
    return _count(~((actual - expected).abs() <= tolerance))


def _count(mask: Tensor) -> int:
    return int(torch.count_nonzero(mask))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
