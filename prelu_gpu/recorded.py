"""Recording a call: torch.export, torch.jit.trace, torch.fx and ONNX.

Recorded graphs run where this library is not installed, so they hold PyTorch's or ONNX's operators.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy, Tracer

from . import composed
from ._torch import any_autocast, has_forward_hooks, is_exporting, prelu_kernel
from .broadcast import along_one_dimension
from .checks import checked_channel_dim

Module = TypeVar("Module", bound=nn.Module)


def is_recording() -> bool:
    """Whether torch.export or torch.jit.trace records a call."""
    return is_exporting() or is_traced()


def is_traced() -> bool:
    """Whether torch.jit.trace records; Dynamo can ask, too."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def prelu(x: Tensor, weight: Tensor, dim: int) -> Tensor:
    """`prelu_gpu.prelu` into the graph that is recorded."""
    if not is_traced():
        return _prelu(x, weight, checked_channel_dim(x, weight, dim))
    with warnings.catch_warnings():
        # The tracer warns of every shape that a check looks at.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return _prelu(x, weight, checked_channel_dim(x, weight, dim))


def _prelu(x: Tensor, weight: Tensor, channel_dim: int | None) -> Tensor:
    """`composed.prelu_forward` by operators that converters understand.

    ONNX's converters take slopes along other dimensions than 1 as if they were along that one.
    """
    varying = [d for d, size in enumerate(weight.shape) if size != 1]
    if channel_dim is not None:
        varying = [channel_dim]
    if varying not in ([], [1]) and torch.onnx.is_in_onnx_export():
        return _onnx_prelu(x, weight, channel_dim)
    if weight.dim() > 1:
        return along_one_dimension(_prelu, x, weight)
    if channel_dim not in (None, 1):
        return _prelu(x.movedim(channel_dim, 1), weight, 1).movedim(1, channel_dim)
    if is_exporting() and _is_autocast(x):
        # A cast of our own would hold, too, where the program runs without autocast.
        return torch.prelu(x, weight)
    if x.dtype is not weight.dtype and is_traced() and torch.onnx.is_in_onnx_export():
        # ONNX's exporter of traces knows no other operator.
        return torch.prelu(x.to(weight.dtype), weight).to(x.dtype)
    return composed.prelu_forward(x, weight, channel_dim)


def _is_autocast(x: Tensor) -> bool:
    return any_autocast() and torch.is_autocast_enabled(x.device.type)


def _onnx_prelu(x: Tensor, weight: Tensor, channel_dim: int | None) -> Tensor:
    """PReLU as ONNX's own operator, whose slopes broadcast over the last dimensions.

    For torch.onnx.export, and slopes that PyTorch's operators would have to move to dimension 1.
    """
    slopes = weight
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
    if is_traced():
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
        y: Tensor = prelu_kernel(x, slopes)
        return y

    @staticmethod
    def symbolic(graph: Any, x: Any, slopes: Any) -> Any:
        """The node of the ONNX graph."""
        return graph.op("PRelu", x, slopes)


def leaf_of_fx(forward: Callable[[Module, Tensor], Tensor]) -> Callable[[Module, Tensor], Tensor]:
    """Makes torch.fx record a call of a module, as of torch.nn's: a decorator of its forward.

    What looks for modules in a graph finds it then. Not where the module is the root of the graph,
    nor with hooks: they have run by now, and would run again.
    """

    @functools.wraps(forward)
    def forward_or_node(self: Module, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            tracer: Any = input.tracer
            is_leaf = tracer.root is not self if isinstance(tracer, Tracer) else False
            if is_leaf and not has_forward_hooks(self):
                path = tracer.path_of_module(self)
                return tracer.create_proxy("call_module", path, (input,), {})
        return forward(self, input)

    return forward_or_node
