"""PReLU of slopes that broadcast, as PReLU of slopes along one dimension."""

from collections.abc import Callable

import torch
from torch import Tensor

from .layout import dense_stride

PReLUAlong = Callable[[Tensor, Tensor, int | None], Tensor]
"""PReLU of an input and slopes along a dimension; None where there is one slope."""


def along_one_dimension(prelu: PReLUAlong, x: Tensor, weight: Tensor) -> Tensor:
    """PReLU of slopes of x's rank, which broadcast.

    All dimensions from the first to the last that they vary over become one. Slopes are repeated
    along a dimension between these that they do not vary over.
    """
    varying = [d for d, size in enumerate(weight.shape) if size != 1]
    if not varying:
        return prelu(x, weight.flatten(), None)
    first, last = varying[0], varying[-1]
    if first == last:
        return prelu(x, weight.flatten(), first)
    sizes = x.shape[first : last + 1]
    slopes = weight.expand(*[-1] * first, *sizes, *[-1] * (x.dim() - last - 1)).flatten()
    merged = x.flatten(first, last)
    if first == 0:
        # A dimension in front: an input of one dimension has one channel.
        return prelu(merged.unsqueeze(0), slopes, 1).reshape(x.shape)
    return prelu(merged, slopes, first).reshape(x.shape)


def in_memory_order(prelu: PReLUAlong, x: Tensor, weight: Tensor) -> Tensor:
    """The same for kernels, without a copy of x where the dimensions lie together in memory.

    Repeated slopes are a copy that is so much larger, and their gradient is summed once more: in
    float32, and rounded once, as every slope gradient.
    """
    strides = dense_stride(x.shape, x.stride())
    order = sorted(range(x.dim()), key=strides.__getitem__, reverse=True)  # outermost first
    x, weight = x.permute(order), weight.permute(order)
    varying = [d for d, size in enumerate(weight.shape) if size != 1]
    if any(weight.shape[d] != x.shape[d] for d in range(varying[0], varying[-1] + 1)):
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    y = along_one_dimension(prelu, x, weight)
    return y.permute([order.index(d) for d in range(x.dim())])
