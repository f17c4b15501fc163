"""What is measured: the cases, their inputs, and whether prelu_gpu computes them right.

Groups: "model" and "leaky", tensors of networks that use PReLU or Leaky ReLU; "curve", sizes from
2^10 to 2^28 elements; "awkward", what kernels find hard; "core", the few that tell most.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import prelu_gpu
from benchmarks.program import first_line
from prelu_gpu import reference
from prelu_gpu.layout import make_view
from prelu_gpu.plan import Plan, make_plan
from prelu_gpu.rules import VECTOR_BYTES, Rules

PASSES = {"forward": 2, "backward": 3, "inference": 2, "step": 5}
"""The operations, and how often each must go over memory of the size of x; a step is a forward and
a backward. Slopes are thousands of times smaller and not counted."""

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
    def setting(self) -> dict[str, str]:
        """The case in the words of the results files."""
        return {
            "case": self.name,
            "shape": "x".join(map(str, self.shape)),
            "layout": self.layout,
            "slope": self.slope,
            "dtype": dtype_name(self.dtype),
            "slope_dtype": dtype_name(self.weight_dtype),
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

    def bytes_moved(self, op: str) -> int:
        """The least that `op` must read and write."""
        return PASSES[op] * self.nbytes

    def inputs(self, device: torch.device) -> Inputs:
        """A new set of random inputs."""
        weight = torch.empty(self.slopes, dtype=self.weight_dtype, device=device)
        number = self.slope == "number"
        weight = weight.fill_(NEGATIVE_SLOPE) if number else weight.uniform_(0, 0.5)
        x, grad_y = self._empty(device)
        return Inputs(x.normal_().requires_grad_(), weight.requires_grad_(), grad_y.normal_())

    def differentiated(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """What the backward gives gradients of."""
        return inputs[:1] if self.slope == "number" else inputs[:2]

    def plan(self, op: str, rules: Rules) -> Plan:
        """The launch of prelu_gpu's kernel for `op`."""
        x, grad_y = self._empty(torch.device("meta"))
        grad_y_stride = grad_y.stride() if op == "backward" else None
        result_stride = torch.empty_like(x).stride()
        view = make_view(x.shape, result_stride, self.channel_dim, x.stride(), grad_y_stride)
        if x.data_ptr() % VECTOR_BYTES:
            view = view._replace(off_grid=("x",))
        return make_plan(view, self.dtype.itemsize, rules)

    def mistakes(self, device: torch.device) -> list[str]:
        """What prelu_gpu gets wrong, or why it fails, in words; empty if nothing."""
        x, weight, grad_y = inputs = self.inputs(device)
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
    for case in (*MODELS, *LEAKY, *AWKWARD)
    if case.name == name
)
"""The cases that tell most: every kind of tile and layout, every dtype, large and tiny."""

CASES = tuple(
    dict.fromkeys(
        itertools.chain(CORE, MODELS, *map(in_dtypes, (*MODELS, *LEAKY, *CURVES, *AWKWARD)))
    )
)
"""All cases in all dtypes, each once; the most telling first, for runs that are cut off."""

GROUPS = ("core", "model", "leaky", "curve", "awkward")


def is_in(case: Case, name: str) -> bool:
    """Whether a case has that name, or is in the group of that name."""
    return case in CORE if name == "core" else name in (case.name, case.group)
