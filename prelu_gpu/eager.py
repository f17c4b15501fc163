"""The family in PyTorch's own operators: for devices without kernels, and as the reference.

In float64 this is the oracle of the tests. Arguments are taken as checked (checks.py).
"""

from typing import Any

import torch
from torch import Tensor
from torch.jit import is_tracing  # type: ignore[attr-defined]
from torch.nn import functional as F

from .backend import is_exporting


def prelu(input: Tensor, weight: Tensor, channel_dim: int | None) -> Tensor:
    """PReLU: input where input > 0, else weight * input.

    Args:
        input: any shape.
        weight: one slope, or one for each channel, or slopes of the input's rank that broadcast;
            in the input's dtype, or beside a half-precision input float32, as the arithmetic then.
        channel_dim: the dimension of the channels; None for a shared slope and for broadcasting.
    """
    if is_exporting() or is_tracing():  # type: ignore[no-untyped-call]
        # The dimensions that the slope varies over.
        varying = [d for d, size in enumerate(weight.shape) if size != 1]
        varying = varying if channel_dim is None else [channel_dim]
        if varying not in ([], [1]) and torch.onnx.is_in_onnx_export():
            return _onnx_prelu(input, weight, channel_dim)
        if weight.dim() > 1:
            return _prelu_by_channels(input, weight, varying)
    if channel_dim not in (None, 1):
        return prelu(input.movedim(channel_dim, 1), weight, 1).movedim(1, channel_dim)
    if weight.dim() < 2 and (
        input.dtype == weight.dtype
        # A cast of our own would hold, too, where the exported program runs without autocast.
        or (is_exporting() and _is_autocast(input))
    ):
        return torch.prelu(input, weight)
    if is_tracing() and torch.onnx.is_in_onnx_export():  # type: ignore[no-untyped-call]
        # ONNX's exporter of traces knows no other operator.
        return torch.prelu(input.to(weight.dtype), weight).to(input.dtype)
    # Not on autocast's list, which would round a float32 slope.
    slopes = _slopes(input, weight, channel_dim)
    y: Tensor = torch.ops.aten._prelu_kernel(input.to(weight.dtype), slopes)
    return y.to(input.dtype)


def _prelu_by_channels(input: Tensor, weight: Tensor, varying: list[int]) -> Tensor:
    """PReLU of slopes of the input's rank, all of them along dimension 1.

    For graphs that are recorded: ONNX's converters take slopes along other dimensions as if they
    were along that one.
    """
    if len(varying) < 2:
        return prelu(input, weight.flatten(), varying[0] if varying else None)
    first, last = varying[0], varying[-1]
    if first == 0:
        return prelu(input.unsqueeze(0), weight.unsqueeze(0), None).squeeze(0)
    sizes = input.shape[first : last + 1]
    slopes = weight.expand(*[-1] * first, *sizes, *[-1] * (input.dim() - last - 1)).flatten()
    return prelu(input.flatten(first, last), slopes, first).reshape(input.shape)


def _onnx_prelu(input: Tensor, weight: Tensor, channel_dim: int | None) -> Tensor:
    """PReLU as ONNX's own operator, whose slopes broadcast over the last dimensions.

    For torch.onnx.export, and slopes that PyTorch's operators would have to move to dimension 1.
    """
    x, slopes = input, weight
    if channel_dim is not None and channel_dim != x.dim() - 1:
        slopes = slopes.view(-1, *[1] * (x.dim() - 1 - channel_dim))
    if slopes.dtype is torch.float32 and _is_autocast(x):
        # As autocast casts the arguments of PyTorch's operator.
        dtype = torch.get_autocast_dtype(x.device.type)
        x, slopes = x.to(dtype), slopes.to(dtype)
    if x.dtype is not slopes.dtype:
        return _onnx_node(x.to(slopes.dtype), slopes).to(x.dtype)
    return _onnx_node(x, slopes)


def _onnx_node(x: Tensor, slopes: Tensor) -> Tensor:
    if is_tracing():  # type: ignore[no-untyped-call]
        y: Tensor = _OnnxPReLU.apply(x, slopes)  # type: ignore[no-untyped-call]
        return y
    y = torch.onnx.ops.symbolic("PRelu", (x, slopes), dtype=x.dtype, shape=x.shape)
    # On the device and in the memory layout of x, which what follows may depend on.
    return torch.empty_like(x).copy_(y)


class _OnnxPReLU(torch.autograd.Function):
    """ONNX's operator in traces, which PyTorch's older exporter records."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slopes: Tensor) -> Tensor:
        """Computes what the operator does, for what is traced next."""
        y: Tensor = torch.ops.aten._prelu_kernel(x, slopes)
        return y

    @staticmethod
    def symbolic(graph: Any, x: Any, slopes: Any) -> Any:
        """The node of the ONNX graph."""
        return graph.op("PRelu", x, slopes)


def _is_autocast(input: Tensor) -> bool:
    # Asked first: some devices, as meta, have no autocast to ask about.
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(input.device.type)


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
