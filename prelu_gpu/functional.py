"""The family as functions: checks, then the kernels or PyTorch's operators."""

import math
import warnings

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import functional as F
from torch.overrides import (
    handle_torch_function,
    has_torch_function_unary,
    has_torch_function_variadic,
)

from . import eager
from .autograd import CompiledPReLUFunction, LeakyReLUFunction, PReLUFunction
from .backend import (
    INTERPRETED,
    PLAIN_TYPES,
    WITHOUT_TRITON,
    Backend,
    as_plain,
    backend,
    is_distributed,
    is_exporting,
    is_plain,
    is_sharded,
    watchers,
)
from .checks import (
    BESIDE_DENSE,
    DTYPES,
    FLOAT32_MAX,
    HALF,
    check_memory,
    check_negative_slope,
    check_prelu,
    check_tensor,
    refuse_scripting,
)
from .ops import kernels
from .plan import SMALL, dense_stride, is_dense

if WITHOUT_TRITON is None:
    from . import launch


EAGER_BELOW = 0 if INTERPRETED else SMALL
"""Elements of an input below which PyTorch's operator serves, where it means the same; a slope
gradient in half precision it rounds in every product."""


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
    if (
        _is_small(input)
        and type(weight) in PLAIN_TYPES
        and input.dtype is weight.dtype
        and input.device == weight.device
        and weight.layout is torch.strided
        and weight.dim() == 1
        and type(dim) is int
        and (weight.numel() == 1 or (dim == 1 < input.dim() and weight.shape[0] == input.shape[1]))
        and not (weight.dtype in HALF and weight.requires_grad and torch.is_grad_enabled())
        and not torch._C._is_any_autocast_enabled()
    ):
        check_memory(input, weight)
        return torch.prelu(input, weight)
    if has_torch_function_variadic(input, weight):
        return handle_torch_function(prelu, (input, weight), input, weight, dim=dim)
    check_tensor("prelu", "input", 1, input, BESIDE_DENSE["prelu"])
    check_tensor("prelu", "weight", 2, weight, BESIDE_DENSE["prelu"])
    x = input
    if type(x) not in PLAIN_TYPES or type(weight) not in PLAIN_TYPES:
        x, weight = as_plain(x), as_plain(weight)
    served = _is_served(x, weight)
    x, weight = _autocast(x, weight, served)
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        with warnings.catch_warnings():
            # The tracer's, of every shape that a check looks at.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            return eager.prelu(x, weight, check_prelu(x, weight, dim))
    channel_dim = check_prelu(x, weight, dim)
    if is_dynamo_compiling() and _may_compile(x, weight):
        compiled: Tensor = CompiledPReLUFunction.apply(x, weight, channel_dim)  # type: ignore[no-untyped-call]
        return compiled
    if not served:
        return eager.prelu(x, weight, channel_dim)
    if weight.dim() > 1 and weight.numel() != 1:
        return _prelu_broadcast(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        y: Tensor = PReLUFunction.apply(x, weight, channel_dim)  # type: ignore[no-untyped-call]
    else:
        y = kernels(x).prelu_forward(x, weight, channel_dim)
    return y


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
        _is_small(input)
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
    slope = check_negative_slope(input, negative_slope)
    if not _is_served(input):
        return eager.leaky_relu(input, slope, inplace)
    if inplace and (watchers() or not _may_write(input)):
        return eager.leaky_relu(input, slope, inplace)
    if torch.is_grad_enabled() and input.requires_grad:
        y: Tensor = LeakyReLUFunction.apply(input, slope, inplace)  # type: ignore[no-untyped-call]
    elif inplace:
        # Where a graph has saved the input, its backward must learn of the change.
        torch.autograd.graph.increment_version(input)
        y = launch.leaky_relu_forward_(input, slope)
    else:
        y = kernels(input).leaky_relu_forward(input, slope)
    return y


prelu.__prepare_scriptable__ = refuse_scripting  # type: ignore[attr-defined]
leaky_relu.__prepare_scriptable__ = refuse_scripting  # type: ignore[attr-defined]


def _is_small(x: Tensor) -> bool:
    """Whether x is so small that the host's time decides, and PyTorch's operator has the least.

    Never where a graph is recorded, which would hold for other sizes: sizes are no plain numbers
    then, but to Dynamo, which has its own sign.
    """
    if is_dynamo_compiling() or type(x) not in PLAIN_TYPES:
        return False
    size = x.numel()
    return (
        type(size) is int
        and size < EAGER_BELOW
        and x.dtype in DTYPES
        and x.layout is torch.strided
        and not x.is_nested
    )


def _is_served(*tensors: Tensor) -> bool:
    """Whether a call is for the kernels, or for our operators, which find them for shards.

    Checks that there is memory to read, before anything else does.
    """
    if not is_plain(*tensors):
        return is_distributed(*tensors)
    check_memory(*tensors)
    x = tensors[0]
    return (
        backend(x.device) is not Backend.EAGER and x.layout is torch.strided and not x.is_quantized
    )


def _may_compile(x: Tensor, weight: Tensor) -> bool:
    """Whether a call that is compiled takes our backward: not where PyTorch's operators must show.

    Exported programs run where nothing of this library is, and transforms batch what they know.
    """
    return (
        not is_exporting()
        and not torch._C._are_functorch_transforms_active()
        and (
            backend(x.device) is not Backend.EAGER
            if {type(x), type(weight)} <= PLAIN_TYPES
            else is_sharded(x, weight)
        )
        and (weight.dim() < 2 or weight.numel() == 1)
    )


def _may_write(x: Tensor) -> bool:
    """Whether a kernel may write into x; where not, PyTorch's operator does, or says why not.

    It refuses leaves, some views and inference tensors, and reaches through slices.
    """
    return (
        type(x) in PLAIN_TYPES
        and is_dense(x.shape, x.stride())
        and not x.is_neg()
        and (torch.is_inference_mode_enabled() or not x.is_inference())
        and not (torch.is_grad_enabled() and x.requires_grad and (x.is_leaf or x._is_view()))
    )


def _prelu_broadcast(x: Tensor, weight: Tensor) -> Tensor:
    """PReLU of slopes of x's rank: as slopes along one dimension, by views.

    The dimensions that the slope varies over become one where they lie together in memory. Others
    between them take the slope along too: a copy of it that is so much larger, and its gradient
    summed once more.
    """
    strides = dense_stride(x.shape, x.stride())
    order = sorted(range(x.dim()), key=strides.__getitem__, reverse=True)  # outermost first
    x, weight = x.permute(order), weight.permute(order)
    varying = [d for d, size in enumerate(weight.shape) if size != 1]
    first, last = varying[0], varying[-1]
    shape = x.shape[first : last + 1]
    if math.prod(shape) != weight.numel():
        # Summed in float32 and rounded once, as every slope gradient.
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        weight = weight.expand(*[-1] * first, *shape, *[-1] * (x.dim() - last - 1))
    # A dimension in front: an input of one dimension has one channel.
    merged = x.flatten(first, last).unsqueeze(0)
    y = prelu(merged, weight.flatten(), dim=first + 1).view(x.shape)
    return y.permute([order.index(d) for d in range(x.dim())])


def _autocast(x: Tensor, weight: Tensor, served: bool) -> tuple[Tensor, Tensor]:
    """The arguments as autocast wants them: prelu is on its lower-precision list.

    Kernels read a float32 slope as it is. Beside one PyTorch's operator would compute in float32,
    and save such a copy of the input for the backward: it gets the slope that autocast gives it.
    """
    if not torch._C._is_any_autocast_enabled():
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
    keeps = (served or is_dynamo_compiling()) and backend(x.device) is not Backend.EAGER
    if weight.dtype in HALF or (weight.dtype is torch.float32 and not keeps):
        weight = weight.to(dtype)
    return x, weight
