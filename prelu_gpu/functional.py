"""The family as functions: checks, then the kernels or PyTorch's operators."""

import functools
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
from .autograd import SERVED_BY, CompiledPReLUFunction, apply_leaky_relu, apply_prelu
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
from .route import PLAIN_TYPES, Route, as_plain, is_small, pytorch_is_quicker, route

if WITHOUT_TRITON is None:
    from . import launch


def prelu(input: Tensor, weight: Tensor, *, dim: int = 1) -> Tensor:
    r"""Parametric ReLU: ``input`` where it is positive, else ``weight * input``.

    .. math:: \text{PReLU}(x) = \max(0, x) + w \min(0, x)

    from *Delving Deep into Rectifiers* (He et al., 2015, arXiv:1502.01852). The forward is bit for
    bit that of :func:`torch.nn.functional.prelu`. The backward computes both gradients in one pass;
    it sums the slope gradient in float32 (float64 for float64) and rounds it once.

    On a GPU, PyTorch's operator serves small inputs where it is quicker, because host overhead
    dominates there: below some 19 MB on an H100, outside of autocast. Its results are identical,
    but that in half precision it rounds every product of the slope gradient;
    :func:`prelu_gpu.kernel_threshold` changes the size, and with 0 the kernels always serve.

    Under autocast the input is cast as PyTorch casts it. The kernels read a float32 slope
    unrounded. PyTorch's operators, which serve devices without kernels, transforms, tracing,
    forward-mode AD and exported programs, get the slope rounded, as they do without this library.

    The kernels read dense tensors and most slices without a copy. Other slices, such as crops of
    pictures, are copied by the forward and again by the backward, since the graph saves the input
    itself.

    Args:
        input: shape ``(*)``, float16, bfloat16, float32 or float64, any memory layout. PyTorch's
            operator serves inputs in MKL-DNN's layout, and quantised inputs with quantised slopes.
        weight: one slope, shape ``()`` or ``(1,)``; one for each channel, shape ``(C,)``; or slopes
            of the input's rank, two or more, that broadcast over it. Of the input's dtype, or
            float32 beside a float16 or bfloat16 input.
        dim: the dimension of the channels, if there is more than one slope. An input of fewer than
            two dimensions has one channel.

    Returns:
        Shape ``(*)``, the input's dtype and, for a dense input, its memory layout.

    Raises:
        RuntimeError: dtypes that do not match, a number of slopes that is not the number of
            channels, a weight of another rank or that does not broadcast, tensors on different
            devices, integer, complex, sparse or nested tensors, dense slopes beside a quantised
            input, a tensor whose storage was resized to nothing.
        IndexError: ``dim`` is out of range and there is more than one slope.
        TypeError: an argument is not a tensor, or ``dim`` is not an integer.
    """
    if pytorch_is_quicker(input, weight, dim):
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
    if any_autocast():
        x, weight = _autocast(x, weight, way)
    if way is Route.COMPOSED and recorded.is_recording():
        return recorded.prelu(x, weight, dim)
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

    from *Rectifier Nonlinearities Improve Neural Network Acoustic Models* (Maas et al., 2013). The
    results are bit for bit those of :func:`torch.nn.functional.leaky_relu`, which serves inputs
    below :func:`prelu_gpu.kernel_threshold` itself.

    Slices that the kernels cannot read directly, such as crops of pictures, are copied by the
    forward and again by the backward, since the graph saves the input itself.

    Args:
        input: shape ``(*)``, float16, bfloat16, float32 or float64, any memory layout. PyTorch's
            operator serves quantised inputs, and jagged ones where it takes them: PyTorch 2.13's
            does, 2.11's does not.
        negative_slope: the slope; exact for float64 inputs, else rounded to float32.
        inplace: write the result into ``input`` and save it instead of the input. The backward then
            refuses a negative slope, as PyTorch's does.

    Returns:
        Shape ``(*)``, the input's dtype and, for a dense input, its memory layout; ``input`` itself
        if ``inplace``.

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
        y = apply_leaky_relu(input, slope, inplace, served_by)
    elif inplace:
        # A graph that has saved the input must notice the change in its backward.
        torch.autograd.graph.increment_version(input)
        y = launch.leaky_relu_forward_(input, slope)
    else:
        y = SERVED_BY[way].leaky_relu_forward(input, slope)
    return y


prelu.__prepare_scriptable__ = refuse_scripting  # type: ignore[attr-defined]
leaky_relu.__prepare_scriptable__ = refuse_scripting  # type: ignore[attr-defined]


def _prelu_by_kernels(served_by: Any, x: Tensor, weight: Tensor, channel_dim: int | None) -> Tensor:
    y: Tensor
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        y = apply_prelu(x, weight, channel_dim, served_by)
    else:
        y = served_by.prelu_forward(x, weight, channel_dim)
    return y


def _may_write(x: Tensor) -> bool:
    """Whether a kernel may write into x.

    If not, PyTorch's operator writes or refuses: it refuses leaves, some views and inference
    tensors, and it can write through slices.
    """
    return (
        type(x) in PLAIN_TYPES
        and is_dense(x.shape, x.stride())
        and not x.is_neg()
        and (torch.is_inference_mode_enabled() or not x.is_inference())
        and not (torch.is_grad_enabled() and x.requires_grad and (x.is_leaf or is_view(x)))
    )


def _autocast(x: Tensor, weight: Tensor, way: Route) -> tuple[Tensor, Tensor]:
    """The arguments as autocast, which is on, casts them: prelu is on its lower-precision list.

    The kernels read a float32 slope unrounded. PyTorch's operator would compute in float32 beside
    one, and save a float32 copy of the input: it gets the slope cast.
    """
    dtype = autocast_dtype(x)
    if dtype is None:
        return x, weight
    if is_exporting() and weight.dtype is torch.float32:
        return x, weight  # autocast casts for PyTorch's operator where the program runs
    if x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = x.to(dtype)
    keeps = way is not Route.COMPOSED and has_kernels(x.device)
    if weight.dtype in HALF or (weight.dtype is torch.float32 and not keeps):
        weight = weight.to(dtype)
    return x, weight


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast casts to on x's device; None where it is off."""
    device_type = x.device.type
    # Compiled code runs on devices that have autocast, and Dynamo before torch 2.13 cannot ask.
    if not (is_dynamo_compiling() or torch.amp.is_autocast_available(device_type)):
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
