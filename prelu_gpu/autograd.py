"""The family as autograd functions around the kernels."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import eager, ops
from .backend import WITHOUT_TRITON, is_batched, is_distributed, is_plain
from .checks import check_memory
from .ops import kernels

if TYPE_CHECKING or WITHOUT_TRITON is None:
    from . import launch


class PReLUFunction(torch.autograd.Function):
    """PReLU with one backward pass for both gradients; saves the input and the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, channel_dim: int | None) -> Tensor:
        """Runs the forward kernel."""
        ctx.save_for_backward(x, weight)
        ctx.channel_dim = channel_dim
        y: Tensor = kernels(x).prelu_forward(x, weight, channel_dim)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Runs the backward kernel for the gradients that are needed."""
        x, weight = ctx.saved_tensors
        served_by = kernels(x) if _by_kernel(grad_y, x, weight) else eager
        needs = ctx.needs_input_grad[:2]
        return *served_by.prelu_backward(grad_y, x, weight, ctx.channel_dim, needs), None


class CompiledPReLUFunction(torch.autograd.Function):
    """PReLU for torch.compile: a forward that the compiler fuses, and one kernel backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, channel_dim: int | None) -> Tensor:
        """PyTorch's operators."""
        ctx.save_for_backward(x, weight)
        ctx.channel_dim = channel_dim
        return eager.prelu(x, weight, channel_dim)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """The backward kernel, as an operator."""
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        return *ops.prelu_backward(grad_y, x, weight, ctx.channel_dim, needs), None


class LeakyReLUFunction(torch.autograd.Function):
    """Leaky ReLU; saves the input, or in place the output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, negative_slope: float, inplace: bool) -> Tensor:
        """Runs the forward kernel."""
        ctx.negative_slope, ctx.inplace = negative_slope, inplace
        if inplace:
            ctx.mark_dirty(x)
            y = launch.leaky_relu_forward_(x, negative_slope)
        else:
            y = kernels(x).leaky_relu_forward(x, negative_slope)
        ctx.save_for_backward(y if inplace else x)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        """Runs the backward kernel."""
        (saved,) = ctx.saved_tensors
        # PyTorch's operator has the error for a negative slope in place.
        refused = ctx.inplace and not ctx.negative_slope >= 0
        if _by_kernel(grad_y, saved) and not refused:
            return kernels(saved).leaky_relu_backward(grad_y, saved, ctx.negative_slope), None, None
        return (
            eager.leaky_relu_backward(grad_y, saved, ctx.negative_slope, ctx.inplace),
            None,
            None,
        )


def _by_kernel(grad_y: Tensor, *saved: Tensor) -> bool:
    """Whether the backward may be a kernel's.

    With create_graph=True the gradients must be differentiable, and batched gradients have no
    memory of their own: PyTorch's operators.
    """
    if is_batched(grad_y):
        return False
    if is_plain(grad_y, *saved):
        check_memory(grad_y, *saved)
    elif not is_distributed(grad_y, *saved):
        return False
    return not torch.is_grad_enabled()
