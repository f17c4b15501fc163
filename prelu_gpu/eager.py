"""The family in PyTorch's own operators: for devices without kernels, and as the reference.

In float64 this is the oracle of the tests. Arguments are taken as checked (checks.py).
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def prelu(input: Tensor, weight: Tensor, channel_dim: int | None) -> Tensor:
    """PReLU: input where input > 0, else weight * input.

    Args:
        input: any shape.
        weight: one slope, or one for each channel, or slopes of the input's rank that broadcast;
            in the input's dtype, or beside a half-precision input float32, as the arithmetic then.
        channel_dim: the dimension of the channels; None for a shared slope and for broadcasting.
    """
    if weight.dim() > 1 or input.dtype != weight.dtype:
        # Not on autocast's list, which would round a float32 slope.
        slopes = _slopes(input, weight, channel_dim)
        y: Tensor = torch.ops.aten._prelu_kernel(input.to(weight.dtype), slopes)
        return y.to(input.dtype)
    if channel_dim in (None, 1):
        return torch.prelu(input, weight)
    return torch.prelu(input.movedim(channel_dim, 1), weight).movedim(1, channel_dim)


def prelu_backward(
    grad_y: Tensor,
    input: Tensor,
    weight: Tensor,
    channel_dim: int | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input and of the weight that can be differentiated again."""
    slopes = _slopes(input, weight, channel_dim)
    x, wide_grad_y = input.to(weight.dtype), grad_y.to(weight.dtype)
    grad_x, shares = torch.ops.aten._prelu_kernel_backward(wide_grad_y, x, slopes)
    grad_weight = shares.sum_to_size(slopes.shape).reshape(weight.shape)
    return grad_x.to(input.dtype) if needs[0] else None, grad_weight if needs[1] else None


def _slopes(input: Tensor, weight: Tensor, channel_dim: int | None) -> Tensor:
    """The slopes in a shape that broadcasts over the input."""
    if channel_dim is not None:
        return weight.view([-1 if d == channel_dim else 1 for d in range(input.dim())])
    # In the input's rank: the batching rules of vmap need it.
    return weight.reshape([1] * input.dim()) if weight.numel() == 1 else weight


def leaky_relu(input: Tensor, negative_slope: float, inplace: bool) -> Tensor:
    """Leaky ReLU: input where input > 0, else negative_slope * input."""
    return F.leaky_relu(input, negative_slope, inplace)


def leaky_relu_backward(
    grad_y: Tensor, saved: Tensor, negative_slope: float, saved_output: bool
) -> Tensor:
    """Gradient of the input that can be differentiated again; `saved` is the input or output."""
    grad_x: Tensor = torch.ops.aten.leaky_relu_backward(grad_y, saved, negative_slope, saved_output)
    return grad_x
