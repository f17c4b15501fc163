"""The kernels as operators of PyTorch's dispatcher: `torch.ops.prelu_gpu`.

For what must see each call there, as a dispatch mode; other calls save the time. Arguments are
those of launch.py. No operator has a derivative of its own: autograd.py calls them.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import eager
from .backend import WITHOUT_TRITON, Backend, backend

if TYPE_CHECKING or WITHOUT_TRITON is None:
    from . import launch

_LIBRARY: Any = torch.library.Library("prelu_gpu", "DEF")  # type: ignore[no-untyped-call]
_TAGS = (torch.Tag.pt2_compliant_tag,)


def _check(x: Tensor, weight: Tensor, channel_dim: int | None) -> None:
    slopes = 1 if channel_dim is None else x.shape[channel_dim]
    if weight.numel() != slopes:
        raise RuntimeError(
            f"torch.ops.prelu_gpu: got {weight.numel()} slopes for channel_dim={channel_dim} of an "
            f"input of shape {tuple(x.shape)}, which has {slopes}. prelu_gpu.prelu checks and "
            "broadcasts them."
        )


def _prelu(x: Tensor, weight: Tensor, channel_dim: int | None) -> Tensor:
    _check(x, weight, channel_dim)
    if backend(x.device) is Backend.EAGER:
        return eager.prelu(x, weight, channel_dim)
    return launch.prelu_forward(x, weight, channel_dim)


def _prelu_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, channel_dim: int | None, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    _check(x, weight, channel_dim)
    needed = needs[0], needs[1]
    if backend(x.device) is Backend.EAGER:
        return eager.prelu_backward(grad_y, x, weight, channel_dim, needed)
    return launch.prelu_backward(grad_y, x, weight, channel_dim, needed)


def _leaky_relu(x: Tensor, negative_slope: float) -> Tensor:
    if backend(x.device) is Backend.EAGER:
        return eager.leaky_relu(x, negative_slope, False)
    return launch.leaky_relu_forward(x, negative_slope)


def _leaky_relu_backward(grad_y: Tensor, saved: Tensor, negative_slope: float) -> Tensor:
    if backend(saved.device) is Backend.EAGER:
        return eager.leaky_relu_backward(grad_y, saved, negative_slope, False)
    return launch.leaky_relu_backward(grad_y, saved, negative_slope)


def _fake_prelu_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, channel_dim: int | None, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    return (
        torch.empty_like(x) if needs[0] else None,
        torch.empty_like(weight) if needs[1] else None,
    )


def _define(schema: str, implementation: Any, fake: Any) -> Any:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_TAGS)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"prelu_gpu::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.prelu_gpu, name).default


prelu_forward = _define(
    "prelu(Tensor input, Tensor weight, int? channel_dim) -> Tensor",
    _prelu,
    lambda x, weight, channel_dim: torch.empty_like(x),
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
    lambda grad_y, saved, negative_slope: torch.empty_like(saved),
)
