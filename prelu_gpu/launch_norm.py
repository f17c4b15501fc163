"""From tensors to results of a norm with PReLU: plans, copies, allocations and launches.

Arguments are taken as checked (norms.py), non-differentiable, on a device with kernels, not empty.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .backend import INTERPRETED
from .kernels.norm import finish_gradients, finish_moments
from .kernels.norm_column import column_moments, column_norm_backward, column_norm_forward
from .kernels.norm_plane import plane_moments, plane_norm_backward, plane_norm_forward
from .kernels.partials import sum_partials
from .layout import TABLE, Norm, batch_layout, instance_layout
from .plan import Plan, make_sum_plan
from .plan_norm import make_finish_plan, make_norm_plan
from .rules import VECTOR_BYTES, Kind, Rules, rules_for
from .run import Call, bind, counters, run


class _Walk(NamedTuple):
    """A launch over x, for tensors that lie in memory in one way."""

    plan: Plan
    stride: tuple[int, ...]
    """Of the results."""
    call: Call


_KERNELS = {
    "moments": (plane_moments, column_moments),
    "forward": (plane_norm_forward, column_norm_forward),
    "sums": (plane_norm_backward, column_norm_backward),
    "gradient": (plane_norm_backward, column_norm_backward),
    "frozen": (plane_norm_backward, column_norm_backward),
}
"""Over planes and over columns, by the launch's name in rules.NormPrograms."""

_GRADIENTS = (
    *("grad_slope_ptr", "grad_weight_ptr", "grad_bias_ptr"),
    *("slope_sums_ptr", "counters_ptr"),
)
"""Where finish_gradients leaves the parameters' gradients."""


def norm_prelu_forward(
    x: Tensor,
    slope: Tensor | float,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm: Norm,
    momentum: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Y of a norm and PReLU, of a dtype, and the table of channels that the backward needs.

    Running statistics are updated where the norm is training; if a launch fails, they are as
    before.
    """
    memory = _memory(norm, x)
    walk = _walk("forward", 0, *memory)
    y = _result(x, walk.stride, dtype)
    if walk.plan.view.copies:
        x = _result(x, walk.stride, x.dtype).copy_(x)
    partials, moments = (1, walk.plan.partials[1], 1), None
    if norm.training:
        first = _walk("moments", 0, *memory)
        partials = first.plan.partials
        moments = torch.empty((4, *partials), dtype=torch.float32, device=x.device)
        run(first.call, {"x_ptr": x, "moments_ptr": moments})
    updates = norm.training and running_mean is not None
    # The last rows keep running statistics as they were.
    rows = len(TABLE) if updates else TABLE.index("running_mean")
    table = torch.empty((rows, partials[1]), dtype=torch.float32, device=x.device)
    learned, number = (slope, 0.0) if isinstance(slope, Tensor) else (None, float(slope))
    slopes = 1 if learned is None else learned.numel()
    finish = _finish_moments(partials, x.shape[1], slopes)
    values = {
        "table_out_ptr": table,
        "partials_ptr": moments,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "slope_ptr": learned if learned is None else learned.contiguous(),
        "negative_slope": number,
        "mean_ptr": None if norm.training else running_mean,
        "var_ptr": None if norm.training else running_var,
        "running_mean_ptr": running_mean if updates else None,
        "running_var_ptr": running_var if updates else None,
        "momentum": float(momentum),
        "eps": float(norm.eps),
    }
    run(finish, values)
    try:
        run(walk.call, {"x_ptr": x, "table_ptr": table, "y_ptr": y})
    except BaseException:
        if updates:
            assert running_mean is not None
            assert running_var is not None
            running_mean.copy_(table[TABLE.index("running_mean")])
            running_var.copy_(table[TABLE.index("running_var")])
        raise
    return y, table


def norm_prelu_backward(
    grad_y: Tensor,
    x: Tensor,
    table: Tensor,
    slope: Tensor | float,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, the slope, the weight and the bias; None for one that is not needed."""
    if grad_y.is_neg():
        grad_y = grad_y.resolve_neg()
    needs_x, needs_slope, needs_weight, needs_bias = needs
    corrects = norm.training and needs_x
    count = 3 if needs_slope else 2 if needs_weight or needs_bias or corrects else 0
    memory = _memory(norm, x, grad_y)
    first = "sums" if norm.training else "frozen" if count else "gradient"
    walk = _walk(first, count, *memory)
    copies = walk.plan.view.copies
    grad_x = _result(x, walk.stride, x.dtype) if needs_x else None
    if "grad_y" in copies:
        grad_y = _result(x, walk.stride, grad_y.dtype).copy_(grad_y)
    if "x" in copies:
        x = _result(x, walk.stride, x.dtype).copy_(x)
    values = {"grad_y_ptr": grad_y, "x_ptr": x, "table_ptr": table, "correction_ptr": None}
    sums = None
    if count:
        sums = torch.empty((count, *walk.plan.partials), dtype=torch.float32, device=x.device)
    if count or not norm.training:
        # Where statistics are given, this makes grad_x, too.
        result = None if norm.training else grad_x
        run(walk.call, {**values, "grad_x_ptr": result, "sums_ptr": sums})
    grads: list[Tensor | None] = [None, None, None]
    if sums is not None:
        correction = torch.empty_like(table[:2]) if corrects else None
        grads = _finish(sums, table, (slope, weight, bias), needs[1:], x, correction)
    if corrects:
        values["correction_ptr"] = correction
        last = _walk("gradient", 0, *memory)
        run(last.call, {**values, "grad_x_ptr": grad_x, "sums_ptr": None})
    return grad_x, grads[0], grads[1], grads[2]


def _finish(
    sums: Tensor,
    table: Tensor,
    parameters: tuple[Tensor | float | None, ...],
    needs: tuple[bool, ...],
    x: Tensor,
    correction: Tensor | None,
) -> list[Tensor | None]:
    """The gradients of the slope, the weight and the bias, and the correction of that of x."""
    grads = [
        torch.empty_like(parameter, memory_format=torch.contiguous_format)
        if needed and isinstance(parameter, Tensor)
        else None
        for parameter, needed in zip(parameters, needs, strict=True)
    ]
    count, *partials = sums.shape
    channels, all_channels = x.shape[1], table.shape[1]
    values = {
        "partials_ptr": sums,
        "table_ptr": table,
        "correction_out_ptr": correction,
        "channel_sums_ptr": None,
        **dict.fromkeys(_GRADIENTS),
        "elements": float(x.numel() // all_channels),
    }
    if all_channels > channels:
        # The parameters are those of all samples, whose channels are summed first.
        if any(needs):
            sums = torch.empty((count, all_channels), dtype=torch.float32, device=x.device)
            values["channel_sums_ptr"] = sums
        run(_finish_gradients(tuple(partials), count, False), values)
        if not any(needs):
            return grads
        values |= {"partials_ptr": sums, "table_ptr": None}
        values |= {"correction_out_ptr": None, "channel_sums_ptr": None}
        partials = [all_channels // channels, channels, 1]
    grad_slope = grads[0]
    shared = grad_slope is not None and grad_slope.numel() < channels
    call = _finish_gradients(tuple(partials), count, shared)
    (programs,) = call.launch.grid
    slope_sums = counts = None
    if shared and programs > 1:
        slope_sums = torch.empty(programs, dtype=torch.float32, device=x.device)
        finish = rules_for(x.device, x.itemsize, True).finish
        counts = counters(x.device, 1) if finish else None
    values |= zip(_GRADIENTS, (*grads, slope_sums, counts), strict=True)
    run(call, values)
    if slope_sums is not None and counts is None:
        # Where the last program is not known to see the others' sums.
        call = _sum_slopes(programs)
        run(call, {"partials_ptr": slope_sums, "grad_weight_ptr": grad_slope})
    return grads


@functools.lru_cache(maxsize=8192)
def _walk(
    launch: str,
    sums: int,
    instances: bool,
    rules: Rules,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    on_grid: tuple[bool, ...],
) -> _Walk:
    layout = (instance_layout if instances else batch_layout)(shape, *strides)
    names = zip(layout.view.inputs, on_grid, strict=False)
    view = layout.view._replace(off_grid=tuple(name for name, on in names if not on))
    planned = make_norm_plan(view, dtype.itemsize, rules, launch)
    kernel = _KERNELS[launch][planned.kind is Kind.COLUMN]
    call = bind(kernel, planned, COMPUTE=tl.float32, SUMS=sums)
    return _Walk(planned, layout.stride, call)


@functools.lru_cache(maxsize=4096)
def _finish_moments(partials: tuple[int, int, int], parameters: int, slopes: int) -> Call:
    planned = make_finish_plan(partials, INTERPRETED)
    return bind(finish_moments, planned, parameters=parameters, slopes=slopes)


@functools.lru_cache(maxsize=4096)
def _finish_gradients(partials: tuple[int, int, int], sums: int, shared: bool) -> Call:
    planned = make_finish_plan(partials, INTERPRETED)
    return bind(finish_gradients, planned, SUMS=sums, SHARED=shared)


@functools.lru_cache(maxsize=4096)
def _sum_slopes(programs: int) -> Call:
    return bind(sum_partials, make_sum_plan((programs, 1, 1), INTERPRETED))


def _memory(norm: Norm, *tensors: Tensor) -> tuple[Any, ...]:
    """What decides a launch besides its name and its sums: the other arguments of `_walk`."""
    x = tensors[0]
    return (
        norm.instances,
        rules_for(x.device, x.itemsize, True),
        x.dtype,
        x.shape,
        tuple(t.stride() for t in tensors),
        tuple(t.data_ptr() % VECTOR_BYTES == 0 for t in tensors),
    )


def _result(x: Tensor, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(x.shape, stride, dtype=dtype, device=x.device)
