"""What is measured: the cases, the operations, who provides them, and whether they are right.

Every case is taken from a model that uses PReLU; the shapes are those it trains with.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import prelu_gpu
from prelu_gpu.plan import Plan, gpu_rules, plan, view

PASSES = {"forward": 2, "backward": 3}
"""The operations, and how often each must go over memory of the size of x: read x, write y; read
x and y's gradient, write x's gradient. Slopes are thousands of times smaller and not counted."""

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

CHECKED_ELEMENTS = 2**24
"""Elements that are compared in float64 at a time: 128 MiB for each temporary."""


class Inputs(NamedTuple):
    """One set of inputs; x and weight are leaves that require a gradient."""

    x: Tensor
    weight: Tensor
    grad_y: Tensor


@dataclass(frozen=True)
class Case:
    """A tensor and its slopes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    slope: str = "channel"
    """"channel" for a slope each, "shared" for one."""
    slope_dtype: torch.dtype | None = None
    """None for the tensor's own."""
    layout: str = "contiguous"

    @property
    def shape_name(self) -> str:
        """The shape in one word."""
        return "x".join(map(str, self.shape))

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the slopes."""
        return self.slope_dtype or self.dtype

    @property
    def channel_dim(self) -> int | None:
        """The dimension the slope varies over; None for a shared one."""
        return None if self.slope == "shared" else 1

    @property
    def nbytes(self) -> int:
        """Bytes of x."""
        return math.prod(self.shape) * self.dtype.itemsize

    def bytes_moved(self, op: str) -> int:
        """The least that `op` must read and write."""
        return PASSES[op] * self.nbytes

    def inputs(self, device: torch.device) -> Inputs:
        """A new set of random inputs."""

        def normal() -> Tensor:
            memory_format = LAYOUTS[self.layout]
            empty = torch.empty(
                self.shape, dtype=self.dtype, device=device, memory_format=memory_format
            )
            return empty.normal_()

        slopes = 1 if self.channel_dim is None else self.shape[self.channel_dim]
        weight = torch.empty(slopes, dtype=self.weight_dtype, device=device).uniform_(0, 0.5)
        return Inputs(normal().requires_grad_(), weight.requires_grad_(), normal())

    def plan(self, op: str, multiprocessors: int) -> Plan:
        """The launch of prelu_gpu's kernel for `op` on a GPU of so many multiprocessors."""
        x = torch.empty(self.shape, device="meta", memory_format=LAYOUTS[self.layout])
        layout = view(x.shape, x.stride(), self.channel_dim)
        rules = gpu_rules(multiprocessors, self.dtype.itemsize, op == "backward")
        return plan(layout, self.dtype.itemsize, rules)


CASES = (
    Case("monai-unet", (2, 32, 96, 96, 96), torch.float32, slope="shared"),
    Case("iresnet", (128, 64, 112, 112), torch.float16, slope_dtype=torch.float32),
    Case("real-esrgan", (8, 64, 360, 640), torch.bfloat16, layout="channels_last"),
    Case("iresnet-7x7", (256, 512, 7, 7), torch.float16),
    Case("graph-infomax", (100000, 512), torch.float32),
    Case("conv-tasnet", (8, 512, 4000), torch.bfloat16, slope="shared"),
)

Call = Callable[[int], object]
"""Runs one operation on the input set of that number and returns what it allocated."""

Provider = Callable[[str, list[Inputs]], Call]
"""Prepares an operation for some input sets."""


def provide_prelu_gpu(op: str, sets: list[Inputs]) -> Call:
    """This package."""
    return _differentiable(prelu_gpu.prelu, op, sets)


def provide_eager(op: str, sets: list[Inputs]) -> Call:
    """PyTorch's operator. It refuses mixed dtypes: there the slope is cast, as autocast does."""
    return _differentiable(lambda x, weight: F.prelu(x, weight.to(x.dtype)), op, sets)


def provide_copy(op: str, sets: list[Inputs]) -> Call:
    """The roof: a copy that moves the bytes of `op`, half of them read and half written."""
    pairs = []
    for x, _, grad_y in sets:
        # A copy of x moves two of a forward's two passes; a backward's three are 1.5 copies.
        source = x.detach()
        if op == "backward":
            source = torch.cat([source.flatten(), grad_y.flatten()[: x.numel() // 2]])
        pairs.append((torch.empty_like(source), source))

    def call(number: int) -> Tensor:
        target, source = pairs[number]
        return target.copy_(source)

    return call


PROVIDERS: dict[str, Provider] = {
    "prelu_gpu": provide_prelu_gpu,
    "eager": provide_eager,
    "copy": provide_copy,
}


def _differentiable(prelu: Callable[[Tensor, Tensor], Tensor], op: str, sets: list[Inputs]) -> Call:
    if op == "forward":
        return lambda number: prelu(sets[number].x, sets[number].weight)
    # The graphs are kept, so that a timed backward holds nothing of the forward.
    outputs = [prelu(inputs.x, inputs.weight) for inputs in sets]

    def backward(number: int) -> tuple[Tensor, ...]:
        x, weight, grad_y = sets[number]
        return torch.autograd.grad(outputs[number], (x, weight), grad_y, retain_graph=True)

    return backward


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
    y = prelu_gpu.prelu(x, weight)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad_y)

    with torch.no_grad():
        expected = F.prelu(x.to(weight.dtype), weight).to(x.dtype)
        wrong_y = _count(_bits(y) != _bits(expected))
        del expected
        wrong_grad_x, wrong_grad_weight = _check_gradients(inputs, grad_x, grad_weight)
    return [
        f"{what}: {wrong} of {tensor.numel()} elements are wrong"
        for what, wrong, tensor in (
            ("forward", wrong_y, y),
            ("input gradient", wrong_grad_x, grad_x),
            ("slope gradient", wrong_grad_weight, grad_weight),
        )
        if wrong
    ]


def _check_gradients(inputs: Inputs, grad_x: Tensor, grad_weight: Tensor) -> tuple[int, int]:
    """How many elements of the gradients are wrong; some rows of x at a time."""
    rows = max(1, CHECKED_ELEMENTS // (grad_x.numel() // grad_x.shape[0]))
    slopes = inputs.weight.double().reshape(-1, *[1] * (grad_x.dim() - 2))
    sums, squares = torch.zeros_like(slopes), torch.zeros_like(slopes)
    wrong_grad_x = 0
    for parts in zip(*(t.split(rows) for t in (inputs.x, inputs.grad_y, grad_x)), strict=True):
        x, grad_y, actual = (part.double() for part in parts)
        expected = torch.where(x > 0, grad_y, slopes * grad_y)
        wrong_grad_x += _count_apart(actual, expected, _rounding(expected, grad_x.dtype))
        products = torch.where(x > 0, 0.0, grad_y * x)
        sums += products.sum_to_size(slopes.shape)
        squares += products.square().sum_to_size(slopes.shape)

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
