"""From tensors to kernel launches: allocates the results, plans, launches.

Arguments are taken as checked (checks.py), non-differentiable, on a device with kernels.
"""

import contextlib
import dataclasses
import functools
import threading
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .backend import INTERPRETED
from .kernels.column import column_backward, column_forward
from .kernels.partials import sum_partials
from .kernels.plane import plane_backward, plane_forward
from .plan import (
    Kind,
    Launch,
    Plan,
    Rules,
    gpu_rules,
    interpreter_rules,
    is_dense,
    plan,
    same_layout,
    sum_plan,
    view,
)

_INTERPRETER = threading.Lock()


def prelu_forward(x: Tensor, weight: Tensor, channel_dim: int | None) -> Tensor:
    """Y of PReLU, dense and laid out as x."""
    if x.numel() == 0:
        return torch.empty_like(x)
    x = _dense(x)
    y = torch.empty_like(x)
    _forward(x, _slopes(weight), 0.0, y, channel_dim)
    return y


def leaky_relu_forward(x: Tensor, negative_slope: float, inplace: bool) -> Tensor:
    """Y of Leaky ReLU, dense and laid out as x; `inplace` writes it into x, which is dense."""
    if x.numel() == 0:
        return x if inplace else torch.empty_like(x)
    x = _dense(x)
    y = x if inplace else torch.empty_like(x)
    _forward(x, None, negative_slope, y, None)
    return y


def prelu_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    channel_dim: int | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x, laid out as it, and of the weight; None for one that is not needed."""
    if x.numel() == 0:
        return (
            torch.empty_like(x) if needs[0] else None,
            torch.zeros_like(weight) if needs[1] else None,
        )
    x = _dense(x)
    return _backward(grad_y, x, _slopes(weight), 0.0, channel_dim, *needs)


def leaky_relu_backward(grad_y: Tensor, saved: Tensor, negative_slope: float) -> Tensor:
    """Gradient of x; `saved` is x or, for slopes >= 0, y: they are positive together."""
    if saved.numel() == 0:
        return torch.empty_like(saved)
    grad_x, _ = _backward(grad_y, _dense(saved), None, negative_slope, None, True, False)
    assert grad_x is not None
    return grad_x


def rules(device: torch.device, itemsize: int, backward: bool) -> Rules:
    """The rule table's row for elements of `itemsize` bytes on `device`."""
    if INTERPRETED:
        return interpreter_rules(itemsize)
    row = _gpu_rules(device, itemsize, backward)
    if row.atomic and torch.are_deterministic_algorithms_enabled():
        return dataclasses.replace(row, atomic=False)
    return row


@functools.cache
def _gpu_rules(device: torch.device, itemsize: int, backward: bool) -> Rules:
    properties = torch.get_device_module(device).get_device_properties(device)
    if device.type == "xpu":
        return gpu_rules(properties.gpu_subslice_count, itemsize, backward)
    return gpu_rules(
        properties.multi_processor_count, itemsize, backward, warp_size=properties.warp_size
    )


def _forward(
    x: Tensor, weight: Tensor | None, negative_slope: float, y: Tensor, channel_dim: int | None
) -> None:
    launch = _plan(x, channel_dim, backward=False)
    if launch.kind is Kind.COLUMN:
        run(column_forward, launch, (x, weight), (y,), COMPUTE=_compute(x))
    else:
        slope = _slope(negative_slope, x)
        run(plane_forward, launch, (x, weight, slope), (y,), COMPUTE=_compute(x))


def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    negative_slope: float,
    channel_dim: int | None,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    grad_y = grad_y.resolve_neg()
    if not same_layout(x.shape, x.stride(), grad_y.stride()):
        grad_y = torch.empty_like(x).copy_(grad_y)
    launch = _plan(x, channel_dim, backward=True)
    grad_x = torch.empty_like(x) if needs_x else None
    # Where the kernel adds its sums, or leaves partial ones, or writes the gradient itself.
    sums: Tensor | None = None
    if needs_weight:
        assert weight is not None
        sum_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if launch.atomic:
            sums = torch.zeros_like(weight, dtype=sum_dtype)
        elif launch.direct:
            sums = torch.empty_like(weight)
        else:
            sums = torch.empty(launch.partials, dtype=sum_dtype, device=x.device)

    constants = {"COMPUTE": _compute(x), "ATOMIC": launch.atomic}
    if launch.kind is Kind.COLUMN:
        run(column_backward, launch, (grad_y, x, weight), (grad_x, sums), **constants)
    else:
        slope = _slope(negative_slope, x)
        run(plane_backward, launch, (grad_y, x, weight, slope), (grad_x, sums), **constants)

    if sums is None or weight is None:
        return grad_x, None
    if launch.atomic:
        return grad_x, sums.to(weight.dtype)
    if launch.direct:
        return grad_x, sums
    grad_weight = torch.empty_like(weight)
    run(sum_partials, sum_plan(launch.partials, INTERPRETED), (sums,), (grad_weight,))
    return grad_x, grad_weight


def run(
    kernel: Any,
    launch: Launch,
    inputs: tuple[Any, ...],
    outputs: tuple[Tensor | None, ...],
    **constants: Any,
) -> None:
    """Launches `kernel` on the tensors' device; the one place that does."""
    if INTERPRETED:
        _interpret(kernel, launch, inputs, outputs, **constants)
        return
    with _on(inputs[0].device):
        kernel[launch.grid](
            *inputs,
            *outputs,
            **launch.sizes,
            **launch.constants,
            **constants,
            num_warps=launch.num_warps,
        )


def _interpret(
    kernel: Any,
    launch: Launch,
    inputs: tuple[Any, ...],
    outputs: tuple[Tensor | None, ...],
    **constants: Any,
) -> None:
    """Runs an interpreted kernel, with bfloat16 brought in and out as float32.

    The interpreter truncates bfloat16 stores, where a GPU rounds to nearest even.
    """
    import numpy  # the interpreter's need, not a dependency of ours

    def staged(value: Any) -> Any:
        is_bfloat16 = isinstance(value, Tensor) and value.dtype == torch.bfloat16
        return value.float() if is_bfloat16 else value

    results = [staged(output) for output in outputs]
    # NumPy warns of infinities and NaN, which a GPU computes like other values. The interpreter
    # keeps the program it runs in global variables.
    with _INTERPRETER, numpy.errstate(all="ignore"):
        kernel[launch.grid](
            *map(staged, inputs), *results, **launch.sizes, **launch.constants, **constants
        )
    for output, result in zip(outputs, results, strict=True):
        if output is not None and output is not result:
            output.copy_(result)


def _plan(x: Tensor, channel_dim: int | None, backward: bool) -> Plan:
    itemsize = x.element_size()
    layout = view(x.shape, x.stride(), channel_dim)
    return plan(layout, itemsize, rules(x.device, itemsize, backward))


def _dense(x: Tensor) -> Tensor:
    """`x` itself, or one dense copy of it where elements overlap or leave gaps.

    A tensor with the negative bit, as the imaginary part of a conjugate, is copied too: its memory
    holds the other sign.
    """
    x = x.resolve_neg()
    return x if is_dense(x.shape, x.stride()) else x.clone()


def _slopes(weight: Tensor) -> Tensor:
    return weight.resolve_neg().contiguous()


def _compute(x: Tensor) -> Any:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _slope(negative_slope: float, x: Tensor) -> Any:
    """A fixed slope as kernel argument: a run-time float is a float32 on a GPU."""
    return tl.constexpr(negative_slope) if x.dtype == torch.float64 else negative_slope


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    context: contextlib.AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return context
