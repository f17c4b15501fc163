"""The family composed of PyTorch's own operators, where no kernel serves.

Arguments are taken as checked (checks.py).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ._torch import prelu_kernel, prelu_kernel_backward
from .layout import TABLE, Norm


def prelu_forward(x: Tensor, weight: Tensor, channel_dim: int | None) -> Tensor:
    """PReLU: x where x > 0, else weight * x.

    Args:
        x: any shape.
        weight: one slope, or one for each channel, or slopes of the input's rank that broadcast;
            in the input's dtype, or float32 beside a half-precision input: so is the arithmetic.
        channel_dim: the dimension of the channels; None for a shared slope and for broadcasting.
    """
    if channel_dim not in (None, 1):
        return prelu_forward(x.movedim(channel_dim, 1), weight, 1).movedim(1, channel_dim)
    if weight.dim() < 2 and x.dtype == weight.dtype:
        return torch.prelu(x, weight)
    # torch.prelu does not broadcast, and autocast would round a float32 slope.
    y: Tensor = prelu_kernel(x.to(weight.dtype), _by_channel(x, weight, channel_dim))
    return y.to(x.dtype)


def prelu_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    channel_dim: int | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input and of the weight that can be differentiated again."""
    slopes = _by_channel(x, weight, channel_dim)
    wide_x, wide_grad_y = x.to(weight.dtype), grad_y.to(weight.dtype)
    grad_x, shares = prelu_kernel_backward(wide_grad_y, wide_x, slopes)
    grad_weight = shares.sum_to_size(slopes.shape).reshape(weight.shape)
    return grad_x.to(x.dtype) if needs[0] else None, grad_weight if needs[1] else None


def leaky_relu_forward(x: Tensor, negative_slope: float, inplace: bool = False) -> Tensor:
    """Leaky ReLU: x where x > 0, else negative_slope * x."""
    return F.leaky_relu(x, negative_slope, inplace)


def leaky_relu_backward(
    grad_y: Tensor, saved: Tensor, negative_slope: float, saved_output: bool = False
) -> Tensor:
    """Gradient of the input that can be differentiated again; `saved` is the input or output."""
    grad_x: Tensor = torch.ops.aten.leaky_relu_backward(grad_y, saved, negative_slope, saved_output)
    return grad_x


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
    """Gradients of x, slope, weight and bias that can be differentiated again.

    All in float32, as the kernels compute. Statistics of x are computed once more, to be
    differentiated. Frozen ones come from the table: running statistics may have changed since.
    """
    wide, grad_y = x.float(), grad_y.float()
    others = [d for d in range(x.dim()) if d != 1]
    averaged = others[1:] if norm.instances else others
    if norm.training:
        var, mean = torch.var_mean(wide, averaged, correction=0, keepdim=True)
        rstd = (var + norm.eps).rsqrt()
    else:
        mean, rstd = (_by_channel(x, table[TABLE.index(row)], 1) for row in ("mean", "rstd"))
    scale = 1.0 if weight is None else _by_channel(x, weight.float(), 1)
    shift = 0.0 if bias is None else _by_channel(x, bias.float(), 1)
    normed = (wide - mean) * rstd
    z = normed * scale + shift

    grad_slope = None
    if isinstance(slope, Tensor):
        grad_z, grad_slope = prelu_backward(grad_y, z, slope.float(), 1, (True, True))
        assert grad_z is not None
    else:
        grad_z = leaky_relu_backward(grad_y, z, slope)
    grad_weight, grad_bias = (grad_z * normed).sum(others), grad_z.sum(others)
    grad_x = grad_z * scale
    if norm.training:
        share = (grad_x * normed).mean(averaged, keepdim=True)
        grad_x = grad_x - grad_x.mean(averaged, keepdim=True) - normed * share
    return (
        (grad_x * rstd).to(x.dtype) if needs[0] else None,
        _like(grad_slope, slope) if needs[1] else None,
        _like(grad_weight, weight) if needs[2] else None,
        _like(grad_bias, bias) if needs[3] else None,
    )


def _like(gradient: Tensor | None, parameter: Tensor | float | None) -> Tensor | None:
    """A gradient in its parameter's dtype."""
    if gradient is None or not isinstance(parameter, Tensor):
        return None
    return gradient.to(parameter.dtype)


def _by_channel(x: Tensor, weight: Tensor, channel_dim: int | None) -> Tensor:
    """Numbers of channels in a shape that broadcasts over the input."""
    if channel_dim is not None:
        return weight.view([-1 if d == channel_dim else 1 for d in range(x.dim())])
    # In the input's rank: the batching rules of vmap need it.
    return weight.reshape([1] * x.dim()) if weight.numel() == 1 else weight
