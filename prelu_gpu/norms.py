"""A norm with PReLU or Leaky ReLU behind it, as functions: the kernels or PyTorch's operators."""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ._torch import any_autocast
from .autograd import apply_norm_prelu
from .backend import WITHOUT_TRITON
from .checks import HALF, refuse_scripting
from .functional import autocast_dtype, leaky_relu, prelu
from .layout import Norm
from .norm_checks import check_slope, check_vectors, suits_kernels
from .recorded import is_traced
from .route import Route, as_plain, is_small, route

if WITHOUT_TRITON is None:
    from . import launch_norm


def batch_norm_prelu(
    input: Tensor,
    slope: Tensor | float,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""Batch normalisation, then PReLU or Leaky ReLU, without storing the norm's output.

    .. math:: \text{PReLU}\left(\frac{x - \text{E}[x]}{\sqrt{\text{Var}[x] + \epsilon}}
        \cdot \gamma + \beta\right), \quad \text{PReLU}(z) = \max(0, z) + w \min(0, z)

    from *Batch Normalization* (Ioffe & Szegedy, 2015, arXiv:1502.03167) and *Delving Deep into
    Rectifiers* (He et al., 2015, arXiv:1502.01852). It means ``prelu(F.batch_norm(...), slope)``,
    computes in float32 and rounds once, and gives the gradients of input, slope, weight and bias.
    The graph saves the input and a table of a few numbers for each channel.

    The kernels serve float16, bfloat16 and float32 inputs of two to five dimensions from
    :func:`prelu_gpu.kernel_threshold` on. PyTorch's operators serve all other calls: on devices
    without kernels, in transforms, graphs that are recorded or compiled, and second derivatives.

    Under autocast the result is in autocast's dtype if ``slope`` is a tensor, as torch.prelu's is;
    statistics are those of the input as it is given. Leaky ReLU is not cast.

    Args:
        input: shape ``(N, C, *)``, float16, bfloat16, float32 or float64, any memory layout.
        slope: one slope, shape ``()`` or ``(1,)``, or one for each channel, shape ``(C,)``, of the
            input's dtype, or float32 beside a float16 or bfloat16 input: PReLU. Or a number: Leaky
            ReLU, and with 0 ReLU.
        running_mean: shape ``(C,)``; updated if `training`, else the mean to subtract.
        running_var: the same for the variance. In training both may be None.
        weight: the factor :math:`\gamma` of each channel, shape ``(C,)``, or None for 1.
        bias: the summand :math:`\beta` of each channel, shape ``(C,)``, or None for 0. These and
            the running statistics are of one dtype: the input's, or float32 beside a float16 or
            bfloat16 input.
        training: normalise by the statistics of this batch and not by the running ones.
        momentum: how much of a new running statistic is this batch's.
        eps: what is added to the variance.

    Returns:
        Shape ``(N, C, *)``, the input's dtype, or autocast's, and for a dense input its layout.

    Raises:
        ValueError: one value per channel in training, one running statistic without the other, an
            `eps` that is negative, or 0 in training.
        RuntimeError: statistics or parameters of wrong sizes, dtypes or devices, none in
            evaluation, and for `slope` and `input` those of :func:`prelu_gpu.prelu`. The words are
            PyTorch's, and no running statistic has changed.
        TypeError: an argument of another type.
    """
    given = (input, slope, running_mean, running_var, weight, bias)
    if has_torch_function_variadic(*given):
        y: Tensor = handle_torch_function(
            batch_norm_prelu, given, *given, training=training, momentum=momentum, eps=eps
        )
        return y
    x, slope, running_mean, running_var, weight, bias = map(_plain, given)
    slope = _checked_slope("batch_norm_prelu", x, slope)
    vectors = {"running_mean": running_mean, "running_var": running_var}
    check_vectors("batch_norm_prelu", x, **vectors, weight=weight, bias=bias)
    norm, running = Norm(training, False, eps), (running_mean, running_var)
    if _kernels_serve(x, slope, weight, bias, *running, norm, momentum):
        return _by_kernels(x, slope, weight, bias, *running, norm, momentum)
    z = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return _activation(z, slope)


def instance_norm_prelu(
    input: Tensor,
    slope: Tensor | float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""Instance normalisation, then PReLU or Leaky ReLU, without storing the norm's output.

    As :func:`prelu_gpu.batch_norm_prelu` in training, with the statistics of each channel of each
    sample: *Instance Normalization* (Ulyanov et al., 2016, arXiv:1607.08022). It means
    ``prelu(F.instance_norm(...), slope)``. The kernels keep the memory layout of a dense input
    whose samples follow one another, and copy another one to be contiguous; F.instance_norm, where
    it serves, makes every input contiguous.

    Args:
        input: shape ``(N, C, *)`` of three dimensions or more, float16, bfloat16, float32 or
            float64, any memory layout.
        slope: as :func:`prelu_gpu.batch_norm_prelu`'s.
        weight: the factor of each channel, shape ``(C,)``, or None for 1.
        bias: the summand of each channel, shape ``(C,)``, or None for 0. Both are of one dtype: the
            input's, or float32 beside a float16 or bfloat16 input.
        eps: what is added to the variance.

    Returns:
        Shape ``(N, C, *)``, the input's dtype, or autocast's.

    Raises:
        ValueError: one value per channel of a sample.
        RuntimeError: parameters of wrong sizes, dtypes or devices, in PyTorch's words, which count
            them for all samples; and for `slope` and `input` those of :func:`prelu_gpu.prelu`.
        TypeError: an argument of another type.
    """
    given = (input, slope, weight, bias)
    if has_torch_function_variadic(*given):
        y: Tensor = handle_torch_function(instance_norm_prelu, given, *given, eps=eps)
        return y
    x, slope, weight, bias = map(_plain, given)
    slope = _checked_slope("instance_norm_prelu", x, slope)
    check_vectors("instance_norm_prelu", x, weight=weight, bias=bias)
    norm = Norm(True, True, eps)
    if _kernels_serve(x, slope, weight, bias, None, None, norm, 0.0):
        return _by_kernels(x, slope, weight, bias, None, None, norm, 0.0)
    return _activation(F.instance_norm(x, weight=weight, bias=bias, eps=eps), slope)


batch_norm_prelu.__prepare_scriptable__ = refuse_scripting  # type: ignore[attr-defined]
instance_norm_prelu.__prepare_scriptable__ = refuse_scripting  # type: ignore[attr-defined]


def _plain(value: Any) -> Any:
    return as_plain(value) if isinstance(value, Tensor) else value


def _checked_slope(function: str, x: Tensor, slope: Any) -> Tensor | float:
    """Checks the input and the slope, before a norm changes running statistics.

    Autocast casts slopes for torch.prelu, so it has half-precision ones beside every input. They
    are exact in float32, which suits every input, too.
    """
    if isinstance(slope, Tensor) and slope.dtype in HALF and _autocast_dtype(x) is not None:
        slope = slope.float()
    if not is_traced():
        return check_slope(function, x, slope)
    with warnings.catch_warnings():
        # The tracer warns of every shape that a check looks at.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return check_slope(function, x, slope)


def _kernels_serve(x: Tensor, *arguments: Any) -> bool:
    """Whether the kernels serve a call; what does not suit them is PyTorch's to serve or refuse."""
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    return route(x, *tensors) is Route.KERNELS and not is_small(x) and suits_kernels(x, *arguments)


def _by_kernels(x: Tensor, slope: Tensor | float, *others: Any) -> Tensor:
    """The arguments are those of `launch_norm.norm_prelu_forward`, but for the dtype."""
    casts = isinstance(slope, Tensor)
    arguments = x, slope, *others, (_autocast_dtype(x) or x.dtype) if casts else x.dtype
    y: Tensor
    if torch.is_grad_enabled() and any(
        value.requires_grad for value in arguments if isinstance(value, Tensor)
    ):
        y = apply_norm_prelu(*arguments)
    else:
        y, _ = launch_norm.norm_prelu_forward(*arguments)
    return y


def _activation(z: Tensor, slope: Tensor | float) -> Tensor:
    return prelu(z, slope) if isinstance(slope, Tensor) else leaky_relu(z, slope)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives torch.prelu's result, if it is on and casts x."""
    casts = any_autocast() and x.dtype in (torch.float32, *HALF)
    return autocast_dtype(x) if casts else None
