"""From tensors to results: plans, makes the copies that a plan names, allocates, launches.

Arguments are taken as checked (checks.py), non-differentiable, on a device with kernels.
"""

import functools
import math

import torch
import triton.language as tl
from torch import Tensor

from .backend import INTERPRETED
from .kernels.column import column_backward, column_forward
from .kernels.partials import sum_partials
from .kernels.plane import plane_backward, plane_forward
from .layout import dense_stride, make_view
from .plan import Plan, make_plan, make_sum_plan
from .rules import VECTOR_BYTES, Kind, Rules, rules_for
from .run import Call, bind, counters, run

_KERNELS = {
    (False, False): plane_forward,
    (False, True): plane_backward,
    (True, False): column_forward,
    (True, True): column_backward,
}
"""By whether tiles are columns, and whether it is the backward."""


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


def _leaky_relu(x: Tensor, negative_slope: float, y: Tensor) -> Tensor:
    if x.numel() > 0:
        _forward(x, *_fixed_slope(negative_slope, x), y, None)
    return y


def _forward(
    x: Tensor, weight: Tensor | None, negative_slope: float, y: Tensor, channel_dim: int | None
) -> None:
    if x.is_neg():
        x = x.resolve_neg()
    row = rules_for(x.device, x.itemsize, False)
    on_grid = (x.data_ptr() % VECTOR_BYTES == 0,)
    planned, call = plan_call(row, channel_dim, x.dtype, x.shape, x.stride(), None, on_grid)
    x = _copy(x, y) if planned.view.copies else x
    run(call, {"x_ptr": x, "weight_ptr": weight, "negative_slope": negative_slope, "y_ptr": y})


def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    negative_slope: float,
    channel_dim: int | None,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    if grad_y.is_neg() or x.is_neg():
        grad_y, x = grad_y.resolve_neg(), x.resolve_neg()
    row = rules_for(x.device, x.itemsize, True)
    if row.atomic and torch.are_deterministic_algorithms_enabled():
        row = row._replace(atomic=False)
    on_grid = x.data_ptr() % VECTOR_BYTES == 0, grad_y.data_ptr() % VECTOR_BYTES == 0
    strides = x.stride(), grad_y.stride()
    planned, call = plan_call(row, channel_dim, x.dtype, x.shape, *strides, on_grid)
    grad_x = torch.empty_like(x) if needs_x else None
    if planned.view.copies:
        grad_y = _copy(grad_y, x) if "grad_y" in planned.view.copies else grad_y
        x = _copy(x, x) if "x" in planned.view.copies else x

    # Where the kernel adds its sums, or leaves partial ones, or writes the gradient itself.
    sums = counts = grad_weight = None
    if needs_weight:
        assert weight is not None
        if planned.atomic:
            sums = torch.zeros_like(weight, dtype=_sum_dtype(x))
        elif planned.direct:
            sums = grad_weight = torch.empty_like(weight)
        else:
            sums = torch.empty(planned.partial_sums, dtype=_sum_dtype(x), device=x.device)
            grad_weight = torch.empty_like(weight)
            counts = counters(x.device, weight.numel()) if planned.finish else None

    values = {
        "grad_y_ptr": grad_y,
        "x_ptr": x,
        "weight_ptr": weight,
        "negative_slope": negative_slope,
        "grad_x_ptr": grad_x,
        "sums_ptr": sums,
    }
    if planned.kind is not Kind.COLUMN:
        values["counters_ptr"] = counts
        values["grad_weight_ptr"] = grad_weight if planned.finish else None
    run(call, values)

    if planned.atomic and sums is not None and weight is not None:
        grad_weight = sums.to(weight.dtype)
    elif needs_weight and not planned.direct and not planned.finish:
        call = _sum_call(planned.partials)
        run(call, {"partials_ptr": sums, "grad_weight_ptr": grad_weight})
    return grad_x, grad_weight


@functools.lru_cache(maxsize=4096)
def plan_call(
    rules: Rules,
    channel_dim: int | None,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    x_stride: tuple[int, ...],
    grad_y_stride: tuple[int, ...] | None = None,
    on_grid: tuple[bool, ...] = (),
) -> tuple[Plan, Call]:
    """The plan and the call of a forward, or with an output gradient of a backward.

    `on_grid`: whether x and grad_y begin on the grid of the widest accesses, or ().
    """
    view = make_view(shape, dense_stride(shape, x_stride), channel_dim, x_stride, grad_y_stride)
    off_grid = tuple(name for name, on in zip(view.inputs, on_grid, strict=False) if not on)
    planned = make_plan(view._replace(off_grid=off_grid), dtype.itemsize, rules)
    call = bind(
        _KERNELS[planned.kind is Kind.COLUMN, grad_y_stride is not None],
        planned,
        COMPUTE=tl.float64 if dtype == torch.float64 else tl.float32,
    )
    return planned, call


@functools.lru_cache(maxsize=4096)
def _sum_call(partials: tuple[int, int, int]) -> Call:
    return bind(sum_partials, make_sum_plan(partials, INTERPRETED))


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _copy(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in the memory layout of a result that is made from `like`."""
    return torch.empty_like(like).copy_(tensor)


def _slopes(weight: Tensor) -> Tensor:
    return (weight.resolve_neg() if weight.is_neg() else weight).contiguous()


def _fixed_slope(negative_slope: float, x: Tensor) -> tuple[Tensor | None, float]:
    """The slope of `leaky_relu` as the kernels' weight, or as their number.

    A number is a float32 in a kernel, and Triton's constants lose the sign of -0.0.
    """
    minus_zero = negative_slope == 0 and math.copysign(1, negative_slope) < 0
    if x.dtype == torch.float64 or minus_zero:
        return torch.full((1,), negative_slope, dtype=x.dtype, device=x.device), 0.0
    return None, negative_slope
