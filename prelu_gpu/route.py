"""Who computes a call: decided here, once for each forward and once for each backward."""

import enum
import sys

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling

from . import threshold
from ._torch import (
    any_autocast,
    async_collective_tensor,
    dispatch_modes,
    has_no_dispatch,
    in_forward_ad,
    in_recording_mode,
    in_transform,
    is_exporting,
    is_functional,
    is_tracing,
    is_zero_tensor,
    without_class,
)
from .backend import has_kernels
from .checks import DTYPES, check_memory

PLAIN_TYPES: frozenset[type[Tensor]] = frozenset((Tensor, nn.Parameter, nn.Buffer))


class Route(enum.Enum):
    """Who computes a call."""

    KERNELS = "kernels"
    """The kernels, straight from here: nothing but plain execution sees the call."""
    DISPATCHED = "dispatched"
    """The kernels as operators of PyTorch's dispatcher, which a dispatch mode sees, or which brings
    them the shards of DTensors."""
    COMPILED = "compiled"
    """PyTorch's operators forward, which Inductor fuses, and the backward kernel as an operator."""
    COMPOSED = "composed"
    """PyTorch's operators. What exports, traces, transforms or wraps a call knows those; and they
    serve devices and layouts without kernels."""

    __hash__ = object.__hash__  # Enum's own is slow


def route(x: Tensor, *others: Tensor) -> Route:
    """The route of a call with these tensors; `x` names the device.

    Raises:
        RuntimeError: there is no memory behind a plain tensor.
    """
    if is_dynamo_compiling():
        # Dynamo cannot trace what follows. Exported programs run where this library is not.
        compiles = not is_exporting() and not in_transform()
        return Route.COMPILED if compiles and _compiles(x, *others) else Route.COMPOSED
    modes = dispatch_modes()
    if is_compiling() or in_transform() or in_forward_ad() or is_tracing():
        return Route.COMPOSED
    if modes and in_recording_mode():
        return Route.COMPOSED
    plain = filled = True
    try:
        for tensor in (x, *others):
            if type(tensor) not in PLAIN_TYPES:
                plain = False
            elif is_zero_tensor(tensor) or is_functional(tensor):
                return Route.COMPOSED
            elif tensor.untyped_storage().nbytes() == 0:
                filled = False
    except NotImplementedError:
        # No storage: a device's that has none, or a tensor that has left a transform.
        return Route.COMPOSED
    if not plain:
        return Route.DISPATCHED if is_sharded(x, *others) else Route.COMPOSED
    if not filled:
        check_memory(x, *others)
    if not has_kernels(x.device) or x.layout is not torch.strided or x.is_quantized:
        return Route.COMPOSED
    return Route.DISPATCHED if modes else Route.KERNELS


def _compiles(*tensors: Tensor) -> bool:
    if all(type(tensor) in PLAIN_TYPES for tensor in tensors):
        return has_kernels(tensors[0].device)
    return is_sharded(*tensors)


def is_sharded(*tensors: Tensor) -> bool:
    """Whether tensors are DTensors, or what a collective is still fetching beside plain ones.

    The latter comes out of layers such as RowwiseParallel. The dispatcher brings our operators the
    plain tensors inside of either.
    """
    given = {type(tensor) for tensor in tensors}
    if given <= PLAIN_TYPES or "torch.distributed.tensor" not in sys.modules:
        return False  # not imported without need: that is slow
    from torch.distributed.tensor import DTensor

    from . import sharding  # noqa: F401  how our operators act on shards

    return given <= {DTensor} or given <= PLAIN_TYPES | {async_collective_tensor()}


def is_small(x: Tensor) -> bool:
    """Whether PyTorch's operator would serve a dense input sooner than a kernel.

    Never where a graph is recorded, which will run with other sizes. Sizes are no plain numbers
    there, except to Dynamo, which says so itself.
    """
    if is_dynamo_compiling() or type(x) not in PLAIN_TYPES:
        return False
    if (
        type(x.numel()) is not int
        or x.dtype not in DTYPES
        or x.layout is not torch.strided
        or x.is_nested
    ):
        return False
    if threshold.elements is not None:
        return x.numel() < threshold.elements
    return x.nbytes < threshold.defaults[x.get_device()]


def pytorch_is_quicker(x: Tensor, weight: Tensor, dim: int) -> bool:
    """Whether torch.prelu is quicker and means the same.

    It takes slopes of the input's dtype, one or one for each channel along dimension 1. Under
    autocast it also casts them, and is not quicker.
    """
    return (
        is_small(x)
        and type(weight) in PLAIN_TYPES
        and x.dtype is weight.dtype
        and x.device == weight.device
        and weight.layout is torch.strided
        and weight.dim() == 1
        and type(dim) is int
        and (weight.numel() == 1 or (dim == 1 < x.dim() and weight.shape[0] == x.shape[1]))
        and not any_autocast()
    )


def as_plain(tensor: Tensor) -> Tensor:
    """The same tensor without its class, where that only adds to torch functions.

    Classes of data pipelines, which carry metadata, do so. Their functions have run by now, and
    would run again in each call on the way to a kernel.
    """
    if type(tensor) in PLAIN_TYPES or is_compiling() or not has_no_dispatch(type(tensor)):
        return tensor
    return without_class(tensor)
