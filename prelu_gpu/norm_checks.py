"""Every check of a norm's arguments, before anything is launched or changed."""

import numbers
from typing import Any

import torch
from torch import Tensor

from .checks import (
    HALF,
    check_tensor,
    checked_channel_dim,
    checked_negative_slope,
    dtype_name,
)
from .layout import Norm

CHANNELS_LIMIT = 2**28
"""Most channels of a table whose offsets are numbered in 32 bits."""


def check_slope(function: str, x: Tensor, slope: Any) -> Tensor | float:
    """Checks the input and the slope, and gives the slope: a tensor, or else a float."""
    check_tensor(function, "input", 1, x)
    if isinstance(slope, Tensor):
        check_tensor(function, "slope", 2, slope)
        checked_channel_dim(x, slope, 1)
        return slope
    if not isinstance(slope, (float, numbers.Real)):
        raise TypeError(
            f"{function}(): argument 'slope' (position 2) must be Tensor or Number, "
            f"not {type(slope).__name__}"
        )
    return checked_negative_slope(x, float(slope))


def check_vectors(function: str, x: Tensor, **vectors: Any) -> None:
    """Checks devices and dtypes of running statistics and parameters, any of which may be None.

    PyTorch's norms have the errors for all else. These they find late: they look at the bias when
    running statistics are updated already.
    """
    allowed = (x.dtype, torch.float32) if x.dtype in HALF else (x.dtype,)
    for name, given in vectors.items():
        if not isinstance(given, Tensor):
            continue
        if given.device != x.device:
            raise RuntimeError(
                f"{function}: Expected all tensors to be on the same device, but got input on "
                f"{x.device} and {name} on {given.device}. Move one with .to(device)."
            )
        if given.dtype not in allowed:
            raise RuntimeError(
                f"{function}: expected scalar type {dtype_name(allowed[0])} but found "
                f"{dtype_name(given.dtype)} for {name}. {', '.join(vectors)} have one dtype, "
                "the input's or float32 beside a half-precision input: cast with .to(dtype)."
            )
        allowed = (given.dtype,)


def suits_kernels(
    x: Tensor,
    slope: Tensor | float,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm: Norm,
    momentum: float,
) -> bool:
    """Whether the kernels take arguments that have passed the checks above.

    They take what PyTorch's norms take, but for rarities. PyTorch's operators serve those, and
    raise the errors for what nobody takes.
    """
    if torch.is_grad_enabled() and any(
        t.is_inference() for t in (x, slope, weight, bias) if isinstance(t, Tensor)
    ):
        return False  # autograd refuses to save them, and would after a launch
    if not 2 <= x.dim() <= 5 or (running_mean is None) is not (running_var is None):
        return False
    if running_mean is None and not norm.training:
        return False
    for vector in (running_mean, running_var, weight, bias):
        if vector is not None and not _is_vector(vector, x):
            return False
    if isinstance(slope, Tensor) and (slope.dim() > 1 or slope.is_neg()):
        return False
    return (
        (x.dtype is torch.float32 or x.dtype in HALF)
        and x.numel() > 0
        and x.shape[1] * (x.shape[0] if norm.instances else 1) <= CHANNELS_LIMIT
        and not x.is_neg()
        and isinstance(norm.eps, (float, int))
        and norm.eps > 0
        and isinstance(momentum, (float, int))
        and isinstance(norm.training, bool)
        and (not norm.training or _values_per_statistic(x, norm.instances) > 1)
        and not (running_mean is not None and running_mean.requires_grad)
        and not (running_var is not None and running_var.requires_grad)
    )


def _values_per_statistic(x: Tensor, instances: bool) -> int:
    return x.numel() // (x.shape[1] * (x.shape[0] if instances else 1))


def _is_vector(tensor: Tensor, x: Tensor) -> bool:
    """Whether a tensor is as kernels read one number a channel."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and tensor.dim() == 1
        and tensor.shape[0] == x.shape[1]
        and tensor.is_contiguous()
        and not tensor.is_neg()
    )
