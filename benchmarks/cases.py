"""What is measured: the cases, their inputs, and whether prelu_gpu computes them right.

Groups: "model" and "leaky", tensors of networks that use PReLU or Leaky ReLU; "norm", a norm and
PReLU behind it; "curve", sizes from 2^10 to 2^28 elements; "awkward", what kernels find hard;
"core", the few that tell most.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import prelu_gpu
from benchmarks.program import first_line
from prelu_gpu import reference
from prelu_gpu.layout import batch_layout, instance_layout, make_view
from prelu_gpu.plan import Plan, make_plan
from prelu_gpu.plan_norm import make_norm_plan
from prelu_gpu.rules import VECTOR_BYTES, Rules

PASSES = {"forward": 2, "backward": 3, "inference": 2, "step": 5}
"""The operations, and how often each must go over memory of the size of x; a step is a forward and
a backward. Slopes are thousands of times smaller and not counted."""

NORM_PASSES = {
    "batch": {"forward": 3, "backward": 5, "inference": 2, "step": 8},
    "instance": {"forward": 3, "backward": 5, "inference": 3, "step": 8},
}
"""The same behind a norm: without its output, but with another look at x for each of its sums."""

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16

DTYPES = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16}
LAYOUTS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
NEGATIVE_SLOPE = 0.1
"""Of Leaky ReLU."""


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype without its module."""
    return str(dtype).removeprefix("torch.")


class Inputs(NamedTuple):
    """One set; x and weight are leaves. Leaky ReLU's weight is its number, for the reference."""

    x: Tensor
    weight: Tensor
    grad_y: Tensor


class NormTensors(NamedTuple):
    """What a norm has for each channel, in the order in which functions take it."""

    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Those that a backward gives gradients of."""
        return tuple(tensor for tensor in self[2:] if tensor is not None)


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
    norm: str = ""
    """What stands before PReLU: "batch" for a batch norm, whose inference is an evaluation, or
    "instance" for an instance norm without parameters, as MONAI has it."""

    @property
    def setting(self) -> dict[str, str]:
        """The case in the words of the results files."""
        return {
            "case": self.name,
            "shape": "x".join(map(str, self.shape)),
            "layout": self.layout,
            "slope": self.slope,
            "dtype": dtype_name(self.dtype),
            "slope_dtype": dtype_name(self.weight_dtype),
            "norm": self.norm,
        }

    @property
    def title(self) -> str:
        """What tells it from the others."""
        dtypes = dict.fromkeys((dtype_name(self.dtype), dtype_name(self.weight_dtype)))
        return f"{self.name} ({', slope '.join(dtypes)})"

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
    def ops(self) -> tuple[str, ...]:
        """The operations that are timed: x is a leaf, which only without grad is overwritten."""
        return ("inference",) if self.inplace else tuple(PASSES)

    @property
    def nbytes(self) -> int:
        """Bytes of x."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def passes(self) -> dict[str, int]:
        """How often each operation must go over memory of the size of x."""
        return NORM_PASSES.get(self.norm, PASSES)

    def bytes_moved(self, op: str) -> int:
        """The least that `op` must read and write."""
        return self.passes[op] * self.nbytes

    def inputs(self, device: torch.device) -> Inputs:
        """A new set of random inputs."""
        weight = torch.empty(self.slopes, dtype=self.weight_dtype, device=device)
        number = self.slope == "number"
        weight = weight.fill_(NEGATIVE_SLOPE) if number else weight.uniform_(0, 0.5)
        x, grad_y = self._empty(device)
        return Inputs(x.normal_().requires_grad_(), weight.requires_grad_(), grad_y.normal_())

    def norm_tensors(self, device: torch.device) -> NormTensors:
        """A new random batch norm; an instance norm has no tensors."""
        if self.norm != "batch":
            return NormTensors()
        like = torch.empty(4, self.shape[1], dtype=self.weight_dtype, device=device)
        running_mean, running_var, weight, bias = like.normal_().unbind()
        for factor in (running_var, weight):
            factor.uniform_(0.5, 1.5)
        return NormTensors(running_mean, running_var, *map(_leaf, (weight, bias)))

    def normalize(self, x: Tensor, norm: NormTensors, training: bool) -> Tensor:
        """The norm by PyTorch."""
        if self.norm == "instance":
            return F.instance_norm(x)
        return F.batch_norm(x, *norm, training)

    def norm_prelu(self, x: Tensor, weight: Tensor, norm: NormTensors, training: bool) -> Tensor:
        """The norm and PReLU by prelu_gpu."""
        if self.norm == "instance":
            return prelu_gpu.instance_norm_prelu(x, weight)
        return prelu_gpu.batch_norm_prelu(x, weight, *norm, training)

    def differentiated(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """What the backward gives gradients of."""
        return inputs[:1] if self.slope == "number" else inputs[:2]

    def plan(self, op: str, rules: Rules) -> Plan:
        """The launch of prelu_gpu's kernel for `op`."""
        x, grad_y = self._empty(torch.device("meta"))
        if self.norm:
            layout = instance_layout if self.norm == "instance" else batch_layout
            view = layout(self.shape, x.stride(), grad_y.stride()).view
            return make_norm_plan(view, self.dtype.itemsize, rules, op)
        grad_y_stride = grad_y.stride() if op == "backward" else None
        result_stride = torch.empty_like(x).stride()
        view = make_view(x.shape, result_stride, self.channel_dim, x.stride(), grad_y_stride)
        if x.data_ptr() % VECTOR_BYTES:
            view = view._replace(off_grid=("x",))
        return make_plan(view, self.dtype.itemsize, rules)

    def mistakes(self, device: torch.device) -> list[str]:
        """What prelu_gpu gets wrong, or why it fails, in words; empty if nothing."""
        x, weight, grad_y = inputs = self.inputs(device)
        if self.norm:
            try:
                return [*self._norm_mistakes(inputs)]
            except Exception as error:  # whatever a compiler raises
                return [first_line(error)]
        # Whole numbers, whose sums are exact: at 2^28 elements a tile that is missing would
        # otherwise be less than what rounding explains.
        for numbers in (x, grad_y):
            numbers.data.mul_(2).round_()
        # The results get this memory, so that an element left unwritten is NaN.
        poison = [torch.full_like(x, math.nan) for _ in range(2)]
        del poison
        try:
            y = self._activation(x, weight)
            gradients = torch.autograd.grad(y, self.differentiated(inputs), grad_y)
            results = zip(("grad_x", "grad_weight"), gradients, strict=False)
            with torch.no_grad():
                wrong = [
                    *reference.mistakes(
                        grad_y, x, weight, self.dim, y=y, whole_numbers=True, **dict(results)
                    )
                ]
                y = self._activation(x, weight)
                again = reference.mistakes(grad_y, x, weight, self.dim, y=y)
                return wrong + [f"without grad, {mistake}" for mistake in again]
        except Exception as error:  # whatever a compiler raises
            return [first_line(error)]

    def _norm_mistakes(self, inputs: Inputs) -> Iterator[str]:
        norm = self.norm_tensors(inputs.x.device)
        before = [tensor if tensor is None else tensor.clone() for tensor in norm[:2]]
        x, weight, grad_y = inputs
        instances = self.norm == "instance"

        def mistakes(
            training: bool, before: Sequence[Tensor | None], y: Tensor, *others: Tensor | None
        ) -> Iterator[str]:
            results = dict(zip(reference.NORM_RESULTS, (y, *others), strict=False))
            # Slopes are positive.
            exact = reference.norm_exact(
                *(~y.signbit(), grad_y, x, weight, norm.weight, norm.bias, *before),
                training=training or instances,
                instances=instances,
                eps=1e-5,
            )
            return reference.norm_mistakes(results, exact)

        # The results get this memory, so that an element left unwritten is NaN.
        poison = [torch.full_like(x, math.nan) for _ in range(2)]
        del poison
        y = self.norm_prelu(x, weight, norm, True)
        gradients = torch.autograd.grad(y, (x, weight, *norm.parameters), grad_y)
        none = () if norm.parameters else (None, None)
        yield from mistakes(True, before, y.detach(), *gradients, *none, *norm[:2])
        with torch.no_grad():
            y = self.norm_prelu(x, weight, norm, False)
        for mistake in mistakes(False, norm[:2], y):
            yield f"without grad, {mistake}"

    def _activation(self, x: Tensor, weight: Tensor) -> Tensor:
        """Y by prelu_gpu; in place, a copy of x that is overwritten."""
        if self.slope == "number":
            x = x.clone() if self.inplace else x
            return prelu_gpu.leaky_relu(x, NEGATIVE_SLOPE, self.inplace)
        return prelu_gpu.prelu(x, weight, dim=self.dim)

    def _empty(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Memory for x and for y's gradient."""

        def empty(*shape: int) -> Tensor:
            memory_format = LAYOUTS.get(self.layout, torch.contiguous_format)
            return torch.empty(shape, dtype=self.dtype, device=device, memory_format=memory_format)

        if self.layout == "sliced":
            whole = [size * (2 if d == self.dim else 1) for d, size in enumerate(self.shape)]
            return empty(*whole).chunk(2, self.dim)[1], empty(*self.shape)
        if self.layout == "offset":
            x, grad_y = (empty(math.prod(self.shape) + 1)[1:].view(self.shape) for _ in range(2))
            return x, grad_y
        return empty(*self.shape), empty(*self.shape)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


def in_dtypes(case: Case) -> Iterator[Case]:
    """The case in every dtype; a model's half-precision input beside float32 slopes, too."""
    for dtype in DTYPES.values():
        yield dataclasses.replace(case, dtype=dtype, slope_dtype=None)
    for dtype in (BFLOAT16, FLOAT16) if case.group == "model" else ():
        yield dataclasses.replace(case, dtype=dtype, slope_dtype=FLOAT32)


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


def _batch_norm(name: str, channels: int, side: int, layout: str = "contiguous") -> Case:
    shape = (128, channels, side, side)
    return Case(name, shape, FLOAT16, "channel", FLOAT32, layout, group="norm", norm="batch")


def _instance_norm(name: str, channels: int, side: int, layout: str = "contiguous") -> Case:
    shape = (2, channels, side, side, side)
    return Case(name, shape, FLOAT32, "shared", None, layout, group="norm", norm="instance")


NORMS = (
    # IResNet's under autocast.
    _batch_norm("iresnet-norm", 64, 112),
    _batch_norm("iresnet-norm-cl", 64, 112, "channels_last"),
    _batch_norm("iresnet-norm-56x56", 128, 56),
    _batch_norm("iresnet-norm-28x28", 256, 28),
    _batch_norm("iresnet-norm-14x14", 512, 14),
    _batch_norm("iresnet-norm-7x7", 512, 7),
    # MONAI's UNet.
    _instance_norm("monai-norm", 32, 96),
    _instance_norm("monai-norm-cl", 32, 96, "channels_last_3d"),
    _instance_norm("monai-norm-48", 32, 48),
    _instance_norm("monai-norm-24", 64, 24),
    _instance_norm("monai-norm-12", 128, 12),
    _instance_norm("monai-norm-6", 256, 6),
)

# Medical segmentation, object detection.
LEAKY = tuple(
    Case(name, shape, dtype, slope="number", group="leaky", inplace="in-place" in name)
    for name, shape, dtype in (
        ("nnu-net", (12, 32, 512, 512), FLOAT16),
        ("nnu-net-in-place", (12, 32, 512, 512), FLOAT16),
        ("yolo", (16, 64, 208, 208), FLOAT32),
        ("yolo-in-place", (16, 64, 208, 208), FLOAT32),
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


CORE = tuple(
    dataclasses.replace(case, dtype=dtype, slope_dtype=slope_dtype)
    for name, dtype, slope_dtype in (
        ("monai-unet", FLOAT32, None),
        ("iresnet", FLOAT16, FLOAT32),
        ("iresnet-norm", FLOAT16, FLOAT32),
        ("iresnet-norm-cl", FLOAT16, FLOAT32),
        ("monai-norm", FLOAT32, None),
        ("real-esrgan", BFLOAT16, None),
        ("iresnet-7x7", FLOAT16, None),
        ("graph-infomax", FLOAT32, None),
        ("conv-tasnet", BFLOAT16, None),
        ("iresnet", FLOAT32, None),
        ("iresnet-14x14", BFLOAT16, None),
        ("speechbrain-channel", BFLOAT16, None),
        ("planes-prime", FLOAT32, None),
        ("sliced", FLOAT16, None),
        ("mtcnn-pnet", FLOAT32, None),
        ("nnu-net", FLOAT16, None),
        ("nnu-net-in-place", FLOAT16, None),
    )
    for case in (*MODELS, *LEAKY, *NORMS, *AWKWARD)
    if case.name == name
)
"""The cases that tell most: every kind of tile and layout, every dtype, large and tiny."""

CASES = tuple(
    dict.fromkeys(
        itertools.chain(CORE, MODELS, NORMS, *map(in_dtypes, (*MODELS, *LEAKY, *CURVES, *AWKWARD)))
    )
)
"""All cases, all but norms in all dtypes, each once; the most telling first, for cut-off runs."""

GROUPS = ("core", "model", "norm", "leaky", "curve", "awkward")


def is_in(case: Case, name: str) -> bool:
    """Whether a case has that name, or is in the group of that name."""
    return case in CORE if name == "core" else name in (case.name, case.group)
