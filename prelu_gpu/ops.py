"""The kernels as operators of PyTorch's dispatcher: `torch.ops.prelu_gpu`.

Used when a dispatch mode must see every call, or when the dispatcher must unwrap the tensors; other
calls skip the dispatcher. No operator has a derivative of its own: autograd.py calls them.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import composed
from ._torch import untraced
from .backend import WITHOUT_TRITON, has_kernels
from .checks import check_memory, check_tensor, checked_channel_dim, checked_negative_slope

if TYPE_CHECKING or WITHOUT_TRITON is None:
    from . import launch

_LIBRARY: Any = torch.library.Library("prelu_gpu", "DEF")  # type: ignore[no-untyped-call]
_TAGS = (torch.Tag.pt2_compliant_tag,)


def _check(x: Tensor, weight: Tensor, channel_dim: int | None) -> int | None:
    """Checks arguments as `prelu_gpu.prelu`; gives the slope's dimension."""
    check_tensor("prelu", "input", 1, x)
    check_tensor("prelu", "weight", 2, weight)
    checked = checked_channel_dim(x, weight, 1 if channel_dim is None else channel_dim)
    if weight.numel() != 1 and (channel_dim is None or checked is None):
        raise RuntimeError(
            f"torch.ops.prelu_gpu: got {weight.numel()} slopes of shape {tuple(weight.shape)} for "
            f"channel_dim={channel_dim}. It takes one slope, or one for each channel along "
            "channel_dim; prelu_gpu.prelu broadcasts others."
        )
    return checked


def _check_gradient(grad_y: Tensor, x: Tensor) -> None:
    given, expected = ((tuple(t.shape), t.dtype, str(t.device)) for t in (grad_y, x))
    if given != expected:
        raise RuntimeError(
            f"torch.ops.prelu_gpu: got grad_y of {given} beside an input of {expected}: shape, "
            "dtype and device must be the same. Convert it with .to() or .expand()."
        )


def _prelu(x: Tensor, weight: Tensor, channel_dim: int | None) -> Tensor:
    channel_dim = _check(x, weight, channel_dim)
    check_memory(x, weight)
    if not has_kernels(x.device):
        return composed.prelu_forward(x, weight, channel_dim)
    return launch.prelu_forward(x, weight, channel_dim)


def _prelu_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, channel_dim: int | None, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    channel_dim = _check(x, weight, channel_dim)
    _check_gradient(grad_y, x)
    check_memory(grad_y, x, weight)
    needs_x, needs_weight = needs
    if not has_kernels(x.device):
        return composed.prelu_backward(grad_y, x, weight, channel_dim, (needs_x, needs_weight))
    return launch.prelu_backward(grad_y, x, weight, channel_dim, (needs_x, needs_weight))


def _leaky_relu(x: Tensor, negative_slope: float) -> Tensor:
    check_tensor("leaky_relu", "input", 1, x)
    checked_negative_slope(x, negative_slope)
    check_memory(x)
    if not has_kernels(x.device):
        return composed.leaky_relu_forward(x, negative_slope)
    return launch.leaky_relu_forward(x, negative_slope)


def _leaky_relu_backward(grad_y: Tensor, saved: Tensor, negative_slope: float) -> Tensor:
    check_tensor("leaky_relu", "input", 2, saved)
    checked_negative_slope(saved, negative_slope)
    _check_gradient(grad_y, saved)
    check_memory(grad_y, saved)
    if not has_kernels(saved.device):
        return composed.leaky_relu_backward(grad_y, saved, negative_slope)
    return launch.leaky_relu_backward(grad_y, saved, negative_slope)


def _fake_prelu(x: Tensor, weight: Tensor, channel_dim: int | None) -> Tensor:
    _check(x, weight, channel_dim)
    return torch.empty_like(x)


def _fake_prelu_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, channel_dim: int | None, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    _check(x, weight, channel_dim)
    _check_gradient(grad_y, x)
    return (
        torch.empty_like(x) if needs[0] else None,
        torch.empty_like(weight) if needs[1] else None,
    )


def _fake_leaky_relu_backward(grad_y: Tensor, saved: Tensor, negative_slope: float) -> Tensor:
    _check_gradient(grad_y, saved)
    return torch.empty_like(saved)


def _define(schema: str, implementation: Any, fake: Any) -> Any:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_TAGS)
    _LIBRARY.impl(name, untraced(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"prelu_gpu::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.prelu_gpu, name).default


prelu_forward = _define(
    "prelu(Tensor input, Tensor weight, int? channel_dim) -> Tensor",
    _prelu,
    _fake_prelu,
)
prelu_backward = _define(
    "prelu_backward(Tensor grad_y, Tensor input, Tensor weight, int? channel_dim, bool[2] needs)"
    " -> (Tensor, Tensor)",
    _prelu_backward,
    _fake_prelu_backward,
)
leaky_relu_forward = _define(
    "leaky_relu(Tensor input, float negative_slope) -> Tensor",
    _leaky_relu,
    lambda x, negative_slope: torch.empty_like(x),
)
leaky_relu_backward = _define(
    "leaky_relu_backward(Tensor grad_y, Tensor saved, float negative_slope) -> Tensor",
    _leaky_relu_backward,
    _fake_leaky_relu_backward,
)
