"""From tensors to kernel launches: plans, makes the copies that a plan names, allocates, launches.

Arguments are taken as checked (checks.py), non-differentiable, on a device with kernels.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

from .backend import INTERPRETED
from .kernels.column import column_backward, column_forward
from .kernels.partials import sum_partials
from .kernels.plane import plane_backward, plane_forward
from .plan import (
    Kind,
    Launch,
    Plan,
    Rules,
    dense_stride,
    gpu_rules,
    interpreter_rules,
    plan,
    sum_plan,
    view,
)

SEEN_TO_LAUNCH_DIRECTLY: frozenset[str] = frozenset()
"""Versions of Triton whose compiled kernels a GPU launched right without Triton's look-up, which
takes the host longer than a small kernel runs. Triton's debug and inspection knobs are those of a
kernel's first launch then."""

DIRECT_LAUNCH = triton.__version__ in SEEN_TO_LAUNCH_DIRECTLY and torch.version.cuda is not None

_INTERPRETER = threading.Lock()
if hasattr(os, "register_at_fork"):
    # A child has none of the threads that might hold it.
    os.register_at_fork(
        before=_INTERPRETER.acquire,
        after_in_parent=_INTERPRETER.release,
        after_in_child=_INTERPRETER.release,
    )

_COUNTERS: dict[tuple[torch.device, int], Tensor] = {}
_UNCHANGED = contextlib.nullcontext()
_KERNELS = {
    (False, False): plane_forward,
    (False, True): plane_backward,
    (True, False): column_forward,
    (True, True): column_backward,
}
"""By whether tiles are columns, and whether it is the backward."""


class Call(NamedTuple):
    """A launch with its kernel and all of the kernel's arguments but the tensors, in order."""

    kernel: Any
    launch: Launch
    arguments: tuple[Any, ...]
    compiled: dict[tuple[Any, ...], Any]
    """Compiled kernels by what Triton specialises the tensors on."""


def prelu_forward(x: Tensor, weight: Tensor, channel_dim: int | None) -> Tensor:
    """Y of PReLU, dense, in the strides that PyTorch gives it."""
    y = torch.empty_like(x)
    if x.numel() > 0:
        _forward(x, _slopes(weight), 0.0, y, channel_dim)
    return y


def leaky_relu_forward(x: Tensor, negative_slope: float) -> Tensor:
    """Y of Leaky ReLU, as `prelu_forward`."""
    return _leaky_relu(x, negative_slope, torch.empty_like(x))


def leaky_relu_forward_(x: Tensor, negative_slope: float) -> Tensor:
    """Y of Leaky ReLU, written into x, which is dense."""
    return _leaky_relu(x, negative_slope, x)


def prelu_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    channel_dim: int | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x, in the strides that PyTorch gives it, and of the weight.

    None for one that is not needed.
    """
    if x.numel() == 0:
        return (
            torch.empty_like(x) if needs[0] else None,
            torch.zeros_like(weight) if needs[1] else None,
        )
    return _backward(grad_y, x, _slopes(weight), 0.0, channel_dim, *needs)


def leaky_relu_backward(grad_y: Tensor, saved: Tensor, negative_slope: float) -> Tensor:
    """Gradient of x; `saved` is x or, for slopes >= 0, y: they are positive together."""
    if saved.numel() == 0:
        return torch.empty_like(saved)
    slope = _fixed_slope(negative_slope, saved)
    grad_x, _ = _backward(grad_y, saved, *slope, None, True, False)
    assert grad_x is not None
    return grad_x


def rules(device: torch.device, itemsize: int, backward: bool) -> Rules:
    """The rule table's row for elements of `itemsize` bytes on `device`."""
    if INTERPRETED:
        return interpreter_rules(itemsize)
    properties = torch.get_device_module(device).get_device_properties(device)
    if device.type == "xpu":
        row = gpu_rules(properties.gpu_subslice_count, itemsize, backward)
        # The last program's barrier and counter are shown sound on NVIDIA and AMD only.
        return dataclasses.replace(row, finish=0)
    return gpu_rules(
        properties.multi_processor_count, itemsize, backward, warp_size=properties.warp_size
    )


def _leaky_relu(x: Tensor, negative_slope: float, y: Tensor) -> Tensor:
    if x.numel() > 0:
        _forward(x, *_fixed_slope(negative_slope, x), y, None)
    return y


def _forward(
    x: Tensor, weight: Tensor | None, negative_slope: float, y: Tensor, channel_dim: int | None
) -> None:
    x = x.resolve_neg()
    planned, call = plan_call(rules, False, channel_dim, x.dtype, x.device, x.shape, x.stride())
    x = _copy(x, y) if planned.view.copies else x
    run(call, (x, weight, negative_slope), (y,))


def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    negative_slope: float,
    channel_dim: int | None,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    grad_y, x = grad_y.resolve_neg(), x.resolve_neg()
    grad_x = torch.empty_like(x) if needs_x else None
    deterministic = torch.are_deterministic_algorithms_enabled()
    planned, call = plan_call(
        rules, deterministic, channel_dim, x.dtype, x.device, x.shape, x.stride(), grad_y.stride()
    )
    if planned.view.copies:
        grad_y = _copy(grad_y, x) if "grad_y" in planned.view.copies else grad_y
        x = _copy(x, x) if "x" in planned.view.copies else x

    # Where the kernel adds its sums, or leaves partial ones, or writes the gradient itself.
    sums = counters = grad_weight = None
    if needs_weight:
        assert weight is not None
        sum_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if planned.atomic:
            sums = torch.zeros_like(weight, dtype=sum_dtype)
        elif planned.direct:
            sums = grad_weight = torch.empty_like(weight)
        else:
            sums = torch.empty(planned.partials, dtype=sum_dtype, device=x.device)
            grad_weight = torch.empty_like(weight)
            counters = _counters(x.device, weight.numel()) if planned.finish else None

    outputs: tuple[Tensor | None, ...] = (grad_x, sums)
    if planned.kind is not Kind.COLUMN:
        outputs = (*outputs, counters, grad_weight if planned.finish else None)
    run(call, (grad_y, x, weight, negative_slope), outputs)

    if planned.atomic and sums is not None and weight is not None:
        grad_weight = sums.to(weight.dtype)
    elif needs_weight and not planned.direct and not planned.finish:
        run(_sum_call(planned.partials), (sums,), (grad_weight,))
    return grad_x, grad_weight


@functools.lru_cache(maxsize=4096)
def plan_call(
    rules: Callable[[torch.device, int, bool], Rules],
    deterministic: bool,
    channel_dim: int | None,
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, ...],
    x_stride: tuple[int, ...],
    grad_y_stride: tuple[int, ...] | None = None,
) -> tuple[Plan, Call]:
    """The plan and the call of a forward, or with an output gradient of a backward.

    `rules` is an argument, so that other rules than the table's have plans of their own.
    """
    backward = grad_y_stride is not None
    row = rules(device, dtype.itemsize, backward)
    if deterministic:
        row = dataclasses.replace(row, atomic=False)
    layout = view(shape, dense_stride(shape, x_stride), channel_dim, x_stride, grad_y_stride)
    planned = plan(layout, dtype.itemsize, row)
    call = bind(
        _KERNELS[planned.kind is Kind.COLUMN, backward],
        planned,
        COMPUTE=tl.float64 if dtype == torch.float64 else tl.float32,
    )
    return planned, call


def bind(kernel: Any, launch: Launch, **constants: Any) -> Call:
    """The call of a launch; of the constants, a kernel takes what it has parameters for."""
    named = {**launch.sizes, **launch.constants, **constants}
    names = itertools.dropwhile(lambda name: name not in named, kernel.arg_names)
    return Call(kernel, launch, tuple(named[name] for name in names), {})


@functools.lru_cache(maxsize=4096)
def _sum_call(partials: tuple[int, int, int]) -> Call:
    return bind(sum_partials, sum_plan(partials, INTERPRETED))


def run(call: Call, inputs: tuple[Any, ...], outputs: tuple[Tensor | None, ...]) -> None:
    """Launches a kernel on the tensors' device; the one place that does."""
    if INTERPRETED:
        _interpret(call, inputs, outputs)
        return
    tensors = (*inputs, *outputs)
    device = inputs[0].device
    with _on(device):
        if not DIRECT_LAUNCH:
            _launch(call, tensors)
            return
        key = (device, *specialization(tensors))
        if key in call.compiled:
            compiled = call.compiled[key]
            compiled[(*call.launch.grid, 1, 1)[:3]](*tensors, *call.arguments)
            return
        compiled = _launch(call, tensors)
        # Not what a hook has kept from being compiled, or is still being compiled.
        if isinstance(compiled, CompiledKernel):
            call.compiled[key] = compiled


def _launch(call: Call, tensors: tuple[Any, ...]) -> Any:
    """Launches through Triton's look-up of what it has compiled; gives that."""
    kernel, launch = call.kernel, call.launch
    return kernel[launch.grid](*tensors, *call.arguments, num_warps=launch.num_warps)


def specialization(tensors: tuple[Any, ...]) -> list[object]:
    """What of a call's tensors decides which machine code Triton makes for it, on NVIDIA's GPUs."""
    return [
        (value.dtype, value.data_ptr() % 16 == 0) if isinstance(value, Tensor) else type(value)
        for value in tensors
    ]


def _interpret(call: Call, inputs: tuple[Any, ...], outputs: tuple[Tensor | None, ...]) -> None:
    """Runs an interpreted kernel, with bfloat16 brought in and out as float32.

    The interpreter truncates bfloat16 stores, where a GPU rounds to nearest even.
    """
    import numpy  # the interpreter's need, not a dependency of ours

    def staged(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.bfloat16:
            return value
        # What lies between the elements comes along: strides stay.
        strides = zip(value.shape, value.stride(), strict=True)
        memory = value.as_strided((1 + sum((size - 1) * step for size, step in strides),), (1,))
        return memory.float().as_strided(value.shape, value.stride())

    results = [staged(output) for output in outputs]
    # NumPy warns of infinities and NaN, which a GPU computes like other values. The interpreter
    # keeps the program it runs in global variables.
    with _INTERPRETER, numpy.errstate(all="ignore"):
        call.kernel[call.launch.grid](*map(staged, inputs), *results, *call.arguments)
    for output, result in zip(outputs, results, strict=True):
        if output is not None and output is not result:
            output.copy_(result)


def _copy(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in the memory layout of a result that is made from `like`."""
    return torch.empty_like(like).copy_(tensor)


def _counters(device: torch.device, channels: int) -> Tensor:
    """Zeros, one for each channel, that the kernel leaves as zeros.

    Launches on one stream follow each other, so a stream has one set of them. A CUDA graph, which
    may be replayed on any, has its own.
    """
    stream = 0
    if device.type == "cuda":
        with _on(device):
            if torch.cuda.is_current_stream_capturing():
                return torch.zeros(channels, dtype=torch.int32, device=device)
            stream = driver.active.get_current_stream(device.index)
    counters = _COUNTERS.get((device, stream))
    if counters is None or counters.numel() < channels:
        counters = torch.zeros(max(channels, 1024), dtype=torch.int32, device=device)
        _COUNTERS[device, stream] = counters
    return counters


def _slopes(weight: Tensor) -> Tensor:
    return weight.resolve_neg().contiguous()


def _fixed_slope(negative_slope: float, x: Tensor) -> tuple[Tensor | None, float]:
    """The slope of `leaky_relu` as the kernels' weight, or as their number.

    A number is a float32 in a kernel, and Triton's constants lose the sign of -0.0.
    """
    minus_zero = negative_slope == 0 and math.copysign(1, negative_slope) < 0
    if x.dtype == torch.float64 or minus_zero:
        return torch.full((1,), negative_slope, dtype=x.dtype, device=x.device), 0.0
    return None, negative_slope


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes `device` the current one, which it mostly is already."""
    module = _device_module(device.type)
    if module.current_device() == device.index:
        return _UNCHANGED
    context: contextlib.AbstractContextManager[Any] = module.device(device)
    return context


@functools.cache
def _device_module(device_type: str) -> Any:
    return torch.get_device_module(device_type)
