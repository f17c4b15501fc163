"""The family as functions: checks, then the kernels or PyTorch's operators."""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import functional as F
from torch.overrides import (
    handle_torch_function,
    has_torch_function_unary,
    has_torch_function_variadic,
)

from . import composed, recorded
from ._torch import any_autocast, is_exporting, is_view
from .autograd import SERVED_BY, CompiledPReLUFunction, LeakyReLUFunction, PReLUFunction
from .backend import WITHOUT_TRITON, has_kernels
from .broadcast import in_memory_order
from .checks import (
    BESIDE_DENSE,
    FLOAT32_MAX,
    HALF,
    check_memory,
    check_tensor,
    checked_channel_dim,
    checked_negative_slope,
    refuse_scripting,
)
from .layout import is_dense
from .route import PLAIN_TYPES, Route, as_plain, is_small, pytorch_gives_the_same, route

if WITHOUT_TRITON is None:
    from . import launch


def prelu(input: Tensor, weight: Tensor, *, dim: int = 1) -> Tensor:
    r"""Parametric ReLU: ``input`` where it is positive, else ``weight * input``.

    .. math:: \text{PReLU}(x) = \max(0, x) + w \min(0, x)

    from *Delving Deep into Rectifiers* (He et al., 2015, arXiv:1502.01852). Bit for bit the forward
    of :func:`torch.nn.functional.prelu`; the backward makes both gradients in one pass and sums the
    slope's in float32 (float64 for float64) before its one rounding. On a GPU, inputs of less than
    2**22 elements go to PyTorch's own operator where it means the same: a call is quicker so.

    Under autocast the input is cast as PyTorch casts it. A kernel takes a float32 slope as it is;
    PyTorch rounds it first, and so do these calls where PyTorch's operators serve them: on devices
    without kernels, under transforms, tracing and forward-mode AD, and in exported programs.

    The kernels read dense tensors and most slices where they lie. Others, such as crops of
    pictures, are copied by the forward, and again by the backward: the graph saves the input.

    Args:
        input: shape ``(*)``, float16, bfloat16, float32 or float64, any memory layout.
        weight: one slope, shape ``()`` or ``(1,)``; or one for each channel, shape ``(C,)``; or
            slopes of the input's rank, two or more, that broadcast over it. In the input's dtype,
            or float32 beside a float16 or bfloat16 input. Inputs in MKL-DNN's layout and quantised
            ones, beside quantised slopes, take what torch.prelu takes, and its operator computes.
        dim: the dimension of the channels, where there is more than one slope. An input of fewer
            than two dimensions has one channel.

    Returns:
        Shape ``(*)``, with the input's dtype and, where the input is dense, its memory layout.

    Raises:
        RuntimeError: dtypes that do not go together, a number of slopes that is not the number of
            channels, a weight of another rank or that does not broadcast, tensors on different
            devices, integer, complex, sparse or nested tensors, dense slopes beside a quantised
            input, a storage that was resized to nothing.
        IndexError: ``dim`` out of range, where there is more than one slope.
        TypeError: an argument that is not a tensor, a ``dim`` that is not an integer.
    """
    if pytorch_gives_the_same(input, weight, dim):
        check_memory(input, weight)
        return torch.prelu(input, weight)
    if has_torch_function_variadic(input, weight):
        return handle_torch_function(prelu, (input, weight), input, weight, dim=dim)
    check_tensor("prelu", "input", 1, input, BESIDE_DENSE["prelu"])
    check_tensor("prelu", "weight", 2, weight, BESIDE_DENSE["prelu"])
    x = input
    if type(x) not in PLAIN_TYPES or type(weight) not in PLAIN_TYPES:
        x, weight = as_plain(x), as_plain(weight)
    way = route(x, weight)
    x, weight = _autocast(x, weight, way)
    if way is Route.COMPOSED and recorded.is_recording():
        return _record(x, weight, dim)
    channel_dim = checked_channel_dim(x, weight, dim)
    broadcasts = weight.dim() > 1 and weight.numel() != 1
    if way is Route.COMPOSED or (way is Route.COMPILED and broadcasts):
        return composed.prelu_forward(x, weight, channel_dim)
    if way is Route.COMPILED:
        y: Tensor = CompiledPReLUFunction.apply(x, weight, channel_dim)  # type: ignore[no-untyped-call]
        return y
    served_by = SERVED_BY[way]
    if broadcasts:
        return in_memory_order(functools.partial(_prelu_by_kernels, served_by), x, weight)
    return _prelu_by_kernels(served_by, x, weight, channel_dim)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    r"""Leaky ReLU: ``input`` where it is positive, else ``negative_slope * input``.

    .. math:: \text{LeakyReLU}(x) = \max(0, x) + \text{negative\_slope} \cdot \min(0, x)

    from *Rectifier Nonlinearities Improve Neural Network Acoustic Models* (Maas et al., 2013).
    Bit for bit :func:`torch.nn.functional.leaky_relu`, which serves small inputs itself.

    Slices that the kernels cannot read where they lie, such as crops of pictures, are copied by the
    forward, and again by the backward: the graph saves the input.

    Args:
        input: shape ``(*)``, float16, bfloat16, float32 or float64, any memory layout. Quantised
            inputs are computed by PyTorch's operator, and jagged ones where it takes them: PyTorch
            2.13's does, 2.11's does not.
        negative_slope: the slope, exact in float64, else as float32.
        inplace: write the result into ``input`` and save it, not the input, for the backward, which
            then refuses a negative slope, as PyTorch's does.

    Returns:
        Shape ``(*)``, with the input's dtype and, where it is dense, its memory layout; ``input``
        itself if ``inplace``.

    Raises:
        RuntimeError: integer, complex or sparse input, an MKL-DNN or strided nested one, one that
            is quantised by channel, a jagged one that PyTorch does not take; a slope beyond
            float32's range for an input that is not float64; in place, what PyTorch refuses to
            write: a leaf that requires grad, memory that overlaps itself.
        TypeError: an input that is not a tensor, a slope that is not a number.
    """
    if (
        is_small(input)
        and isinstance(negative_slope, (float, int))
        and -FLOAT32_MAX <= negative_slope <= FLOAT32_MAX
    ):
        check_memory(input)
        return F.leaky_relu(input, float(negative_slope), inplace)
    if has_torch_function_unary(input):
        return handle_torch_function(
            leaky_relu, (input,), input, negative_slope=negative_slope, inplace=inplace
        )
    check_tensor("leaky_relu", "input", 1, input, BESIDE_DENSE["leaky_relu"])
    slope = checked_negative_slope(input, negative_slope)
    way = route(input)
    if way in (Route.COMPOSED, Route.COMPILED):
        return composed.leaky_relu_forward(input, slope, inplace)
    if inplace and (way is Route.DISPATCHED or not _may_write(input)):
        return composed.leaky_relu_forward(input, slope, inplace)
    y: Tensor
    if torch.is_grad_enabled() and input.requires_grad:
        served_by = SERVED_BY[way]
        y = LeakyReLUFunction.apply(input, slope, inplace, served_by)  # type: ignore[no-untyped-call]
    elif inplace:
        # Where a graph has saved the input, its backward must learn of the change.
        torch.autograd.graph.increment_version(input)
        y = launch.leaky_relu_forward_(input, slope)
    else:
        y = SERVED_BY[way].leaky_relu_forward(input, slope)
    return y


prelu.__prepare_scriptable__ = refuse_scripting  # type: ignore[attr-defined]
leaky_relu.__prepare_scriptable__ = refuse_scripting  # type: ignore[attr-defined]


def _record(x: Tensor, weight: Tensor, dim: int) -> Tensor:
    """PReLU into a graph of torch.export or torch.jit.trace."""
    if not recorded.is_traced():
        return recorded.prelu(x, weight, checked_channel_dim(x, weight, dim))
    with warnings.catch_warnings():
        # The tracer's, of every shape that a check looks at.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return recorded.prelu(x, weight, checked_channel_dim(x, weight, dim))


def _prelu_by_kernels(served_by: Any, x: Tensor, weight: Tensor, channel_dim: int | None) -> Tensor:
    y: Tensor
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        y = PReLUFunction.apply(x, weight, channel_dim, served_by)  # type: ignore[no-untyped-call]
    else:
        y = served_by.prelu_forward(x, weight, channel_dim)
    return y


def _may_write(x: Tensor) -> bool:
    """Whether a kernel may write into x; where not, PyTorch's operator does, or says why not.

    It refuses leaves, some views and inference tensors, and reaches through slices.
    """
    return (
        type(x) in PLAIN_TYPES
        and is_dense(x.shape, x.stride())
        and not x.is_neg()
        and (torch.is_inference_mode_enabled() or not x.is_inference())
        and not (torch.is_grad_enabled() and x.requires_grad and (x.is_leaf or is_view(x)))
    )


def _autocast(x: Tensor, weight: Tensor, way: Route) -> tuple[Tensor, Tensor]:
    """The arguments as autocast wants them: prelu is on its lower-precision list.

    Kernels read a float32 slope as it is. Beside one PyTorch's operator would compute in float32,
    and save such a copy of the input for the backward: it gets the slope that autocast gives it.
    """
    if not any_autocast():
        return x, weight
    device_type = x.device.type
    # What is compiled is on a device that has it, and Dynamo before torch 2.13 cannot ask.
    if not (is_dynamo_compiling() or torch.amp.is_autocast_available(device_type)):
        return x, weight
    if not torch.is_autocast_enabled(device_type):
        return x, weight
    if is_exporting() and weight.dtype is torch.float32:
        return x, weight  # for PyTorch's operator, which is cast where the program runs
    dtype = torch.get_autocast_dtype(device_type)
    if x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = x.to(dtype)
    keeps = way is not Route.COMPOSED and has_kernels(x.device)
    if weight.dtype in HALF or (weight.dtype is torch.float32 and not keeps):
        weight = weight.to(dtype)
    return x, weight
