"""The family as autograd functions around the kernels."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import composed, ops
from ._torch import is_batched, single_level_apply
from .backend import WITHOUT_TRITON
from .layout import Norm
from .route import Route, route

SERVED_BY: dict[Route, Any] = {Route.DISPATCHED: ops, Route.COMPOSED: composed}
"""The modules whose functions compute, by route."""

if WITHOUT_TRITON is None:
    from . import launch, launch_norm

    SERVED_BY[Route.KERNELS] = launch


class PReLUFunction(torch.autograd.Function):
    """PReLU with one backward pass for both gradients; saves the input and the weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, channel_dim: int | None, served_by: ModuleType
    ) -> Tensor:
        """Runs the forward kernel, by a module of SERVED_BY."""
        ctx.save_for_backward(x, weight)
        ctx.channel_dim = channel_dim
        y: Tensor = served_by.prelu_forward(x, weight, channel_dim)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Runs the backward kernel for the gradients that are needed."""
        x, weight = ctx.saved_tensors
        served_by = SERVED_BY[_backward_route(grad_y, x, weight)]
        needs = ctx.needs_input_grad[:2]
        return *served_by.prelu_backward(grad_y, x, weight, ctx.channel_dim, needs), None, None


apply_prelu = single_level_apply(PReLUFunction)


class CompiledPReLUFunction(torch.autograd.Function):
    """PReLU for torch.compile: a forward that the compiler fuses, and one kernel backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, channel_dim: int | None) -> Tensor:
        """PyTorch's operators."""
        ctx.save_for_backward(x, weight)
        ctx.channel_dim = channel_dim
        return composed.prelu_forward(x, weight, channel_dim)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """The backward kernel, as an operator."""
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        return *ops.prelu_backward(grad_y, x, weight, ctx.channel_dim, needs), None


class LeakyReLUFunction(torch.autograd.Function):
    """Leaky ReLU; saves the input, or in place the output."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, negative_slope: float, inplace: bool, served_by: ModuleType
    ) -> Tensor:
        """Runs the forward kernel, by a module of SERVED_BY; in place by `launch` alone."""
        ctx.negative_slope, ctx.inplace = negative_slope, inplace
        if inplace:
            ctx.mark_dirty(x)
            y = launch.leaky_relu_forward_(x, negative_slope)
        else:
            y = served_by.leaky_relu_forward(x, negative_slope)
        ctx.save_for_backward(y if inplace else x)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None, None]:
        """Runs the backward kernel."""
        (saved,) = ctx.saved_tensors
        way = _backward_route(grad_y, saved)
        # PyTorch's operator has the error for a negative slope in place.
        refused = ctx.inplace and not ctx.negative_slope >= 0
        if way is Route.COMPOSED or refused:
            grad_x = composed.leaky_relu_backward(grad_y, saved, ctx.negative_slope, ctx.inplace)
        else:
            grad_x = SERVED_BY[way].leaky_relu_backward(grad_y, saved, ctx.negative_slope)
        return grad_x, None, None, None


apply_leaky_relu = single_level_apply(LeakyReLUFunction)


class NormPReLUFunction(torch.autograd.Function):
    """A norm with PReLU or Leaky ReLU; saves the input, the parameters and a table per channel.

    Running statistics are updated without autograd's notice, as PyTorch's norms do it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        slope: Tensor | float,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        norm: Norm,
        momentum: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """Runs the forward kernels."""
        y: Tensor
        y, table = launch_norm.norm_prelu_forward(
            x, slope, weight, bias, running_mean, running_var, norm, momentum, dtype
        )
        ctx.number, ctx.norm = None if isinstance(slope, Tensor) else slope, norm
        ctx.save_for_backward(x, table, slope if ctx.number is None else None, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Runs the backward kernels for the gradients that are needed."""
        x, table, slope, weight, bias = ctx.saved_tensors
        way = _backward_route(grad_y, *(t for t in (x, slope, weight, bias) if t is not None))
        slope = ctx.number if slope is None else slope
        arguments = x, table, slope, weight, bias, ctx.norm, ctx.needs_input_grad[:4]
        if way is Route.KERNELS:
            gradients = launch_norm.norm_prelu_backward(grad_y, *arguments)
        else:
            gradients = composed.norm_prelu_backward(grad_y, *arguments)
        return *gradients, None, None, None, None, None


apply_norm_prelu = single_level_apply(NormPReLUFunction)


def _backward_route(grad_y: Tensor, *saved: Tensor) -> Route:
    """The route of a backward whose forward was a kernel's.

    PyTorch's operators serve where the gradients must be differentiable, as with create_graph=True,
    where they are batched and have no memory of their own, and where the backward is compiled.
    """
    # Dynamo cannot trace this question.
    if not is_dynamo_compiling() and is_batched(grad_y):
        return Route.COMPOSED
    way = route(grad_y, *saved)
    return Route.COMPOSED if way is Route.COMPILED or torch.is_grad_enabled() else way
