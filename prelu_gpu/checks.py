"""Every check of the arguments, before anything is launched or changed.

The words are PyTorch's where it has some, followed by what to do.
"""

import math
import numbers
import operator
from collections.abc import Collection
from typing import NoReturn

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
DTYPES = frozenset((*HALF, torch.float32, torch.float64))
_MISMATCH = (
    "prelu: Mismatch of parameter numbers and input channel size. "
    "Found parameter numbers = {} and channel size = {}."
)
FLOAT32_MAX = torch.finfo(torch.float32).max

BESIDE_DENSE = {
    "prelu": ("torch._mkldnn", "quantized"),
    # PyTorch applies to jagged tensors what is tagged as pointwise: from torch 2.13 on.
    "leaky_relu": ("quantized", "jagged nested")
    if torch.Tag.pointwise in torch.ops.aten.leaky_relu.default.tags
    else ("quantized",),
}
"""Kinds of tensors that PyTorch's operator computes, beside the dense ones that kernels read."""

_PER_TENSOR = (torch.per_tensor_affine, torch.per_tensor_symmetric)


def checked_channel_dim(input: Tensor, weight: Tensor, dim: int) -> int | None:
    """Checks that tensors suit each other; gives the slope's dimension, None for a shared slope."""
    if input.device != weight.device:
        raise RuntimeError(
            "prelu: Expected all tensors to be on the same device, but got input on "
            f"{input.device} and weight on {weight.device}. Move one with .to(device)."
        )
    if type(dim) is not int:
        dim = checked_dim("prelu", dim)
    if (
        not (input.layout is weight.layout is torch.strided)
        or input.is_quantized
        or weight.is_quantized
    ):
        _check_as_torch_prelu(input, weight, dim)
    if input.dtype is not weight.dtype and not (
        input.dtype in HALF and weight.dtype is torch.float32
    ):
        raise RuntimeError(
            f"prelu: Type promoting not supported. Got {dtype_name(input.dtype)} and "
            f"{dtype_name(weight.dtype)}. The weight has the input's dtype, or float32 beside a "
            "half-precision input: cast one with .to(dtype)."
        )
    ndim, weight_ndim, slopes = input.dim(), weight.dim(), weight.numel()
    if weight_ndim == ndim > 1:
        _check_broadcast(input, weight)
        return None
    channel_dim = None
    if slopes != 1:
        if ndim < 2:
            _refuse_channels(input, slopes)
        channel_dim = _wrap_dim(dim, ndim)
        channels = input.shape[channel_dim]
        if channels != slopes:
            raise RuntimeError(
                f"{_MISMATCH.format(slopes, channels)} Channels are along dim {dim} of the input "
                f"of shape {tuple(input.shape)}; another one is chosen with dim=."
            )
    if weight_ndim > 1:
        raise RuntimeError(
            "prelu: Expected `weight` to be a scalar or 1D tensor, but got: "
            f"ndim = {weight_ndim}. Flatten it with .flatten(), or give it the input's rank, to "
            "broadcast."
        )
    return channel_dim


def checked_dim(function: str, dim: int) -> int:
    """Checks that `dim` is an integer, whether or not it is in range."""
    try:
        return operator.index(dim)
    except TypeError:
        raise TypeError(
            f"{function}(): argument 'dim' must be int, not {type(dim).__name__}"
        ) from None


def checked_negative_slope(input: Tensor, negative_slope: float | Tensor) -> float:
    """Checks the slope of `leaky_relu`, and gives it as a float."""
    if isinstance(negative_slope, Tensor) and negative_slope.dim() == 0:
        # A number to PyTorch, unless a gradient would be lost.
        negative_slope = negative_slope if negative_slope.requires_grad else negative_slope.item()
    if not isinstance(negative_slope, (float, numbers.Real)):
        hint = " Slopes in a tensor are prelu's." if isinstance(negative_slope, Tensor) else ""
        raise TypeError(
            "leaky_relu(): argument 'negative_slope' (position 2) must be Number, not "
            f"{type(negative_slope).__name__}.{hint}"
        )
    slope = float(negative_slope)
    if input.dtype != torch.float64 and FLOAT32_MAX < abs(slope) < math.inf:
        raise RuntimeError(
            "leaky_relu: value cannot be converted to type float without overflow. Got "
            f"negative_slope={slope}; up to {FLOAT32_MAX} is allowed, or more with float64 input."
        )
    return slope


def check_tensor(
    function: str, name: str, position: int, value: Tensor, beside_dense: Collection[str] = ()
) -> None:
    """Checks that an argument is a tensor of a kind that is served: dense, or of those named."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{function}(): argument '{name}' (position {position}) must be Tensor, "
            f"not {type(value).__name__}"
        )
    if value.layout is not torch.strided or value.is_nested or value.is_quantized:
        if _kind(value) not in beside_dense:
            _refuse_kind(function, name, value)
        if value.is_quantized:
            return  # of dtypes of its own
    if value.dtype not in DTYPES:
        raise RuntimeError(
            f"{function}: not implemented for '{dtype_name(value.dtype)}' {name}. "
            "Float, Double, Half and BFloat16 are: cast it with .to(dtype)."
        )


def refuse_scripting(*_: object) -> NoReturn:
    """Stops torch.jit.script, which calls this first, as a module's `__prepare_scriptable__`."""
    raise RuntimeError(
        "torch.jit.script compiles Python, and the kernels of prelu_gpu are not in it. Call "
        "prelu_gpu.restore(model) first, and torch.nn.functional's prelu and leaky_relu in "
        "functions; torch.jit.trace and torch.export take everything as it is."
    )


def check_memory(*tensors: Tensor) -> None:
    """Checks that there is memory behind tensors: a kernel would read other tensors' memory.

    FSDP, for one, resizes the storages of parameters to nothing while they are not in use.
    """
    for tensor in tensors:
        try:
            filled = tensor.untyped_storage().nbytes() > 0
        except NotImplementedError:
            continue  # a device whose tensors have no storages
        if not filled and tensor.numel() > 0:
            raise RuntimeError(
                "prelu_gpu: The tensor has a non-zero number of elements, but its data is not "
                f"allocated yet. Got one of shape {tuple(tensor.shape)} with a storage of 0 bytes. "
                "Resize the storage and fill it before this call; the backward needs it again."
            )


def _kind(tensor: Tensor) -> str:
    """What a tensor is, in PyTorch's words."""
    if tensor.is_quantized:
        return "quantized" if tensor.qscheme() in _PER_TENSOR else "per-channel quantized"
    if tensor.is_nested:
        return "jagged nested" if tensor.layout is torch.jagged else "nested"
    return "dense" if tensor.layout is torch.strided else str(tensor.layout)


def _refuse_kind(function: str, name: str, tensor: Tensor) -> NoReturn:
    if tensor.is_quantized:
        how = (
            ".dequantize(), or call prelu_gpu.restore(model) before the model is quantised: "
            "torch.ao replaces torch.nn's own modules"
        )
    else:
        how = ".to_padded_tensor(0.0)" if tensor.is_nested else ".to_dense()"
    raise RuntimeError(
        f"{function}: expected a dense {name}, got a {_kind(tensor)} tensor. "
        f"Convert it first with {how}."
    )


def _check_as_torch_prelu(input: Tensor, weight: Tensor, dim: int) -> None:
    """Checks arguments that are not all dense: torch.prelu's own, for its operator."""
    kind, slopes = _kind(input), weight.numel()
    if _kind(weight) not in (kind, "dense"):
        _refuse_kind("prelu", "weight", weight)
    if input.is_quantized and not weight.is_quantized:
        _refuse_kind("prelu", "input", input)
    if input.dtype is not weight.dtype or weight.dim() > 1 or (slopes != 1 and dim != 1):
        raise RuntimeError(
            f"prelu: expected slopes as torch.prelu takes them beside a {kind} input: of its dtype "
            f"{dtype_name(input.dtype)}, one, or one for each channel along dim 1. Got "
            f"{dtype_name(weight.dtype)} slopes of shape {tuple(weight.shape)} along dim {dim}. "
            "Convert the input first with "
            f"{'.dequantize()' if input.is_quantized else '.to_dense()'}, or the slopes."
        )


def _check_broadcast(input: Tensor, weight: Tensor) -> None:
    for dim, (channels, slopes) in enumerate(zip(input.shape, weight.shape, strict=True)):
        if slopes not in (1, channels):
            raise RuntimeError(
                f"prelu: The size of tensor weight ({slopes}) must match the size of tensor input "
                f"({channels}) at non-singleton dimension {dim}. A weight of the input's rank has "
                f"size 1 or the input's along each dimension; the input is {tuple(input.shape)}, "
                f"the weight {tuple(weight.shape)}."
            )


def _refuse_channels(input: Tensor, slopes: int) -> NoReturn:
    """Says why an input of fewer than two dimensions takes one slope."""
    if input.dim() == 0:
        raise RuntimeError(
            "prelu: Not allow zero-dim input tensor. "
            f"A weight of {slopes} slopes needs an input with a channel dimension."
        )
    raise RuntimeError(
        f"{_MISMATCH.format(slopes, 1)} An input of one dimension has one channel and takes one "
        "slope; .unsqueeze(0) makes its dimension that of the channels."
    )


def _wrap_dim(dim: int, ndim: int) -> int:
    if not -ndim <= dim < ndim:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-ndim}, {ndim - 1}], "
            f"but got {dim})"
        )
    return dim % ndim


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as PyTorch's messages call it."""
    return {
        torch.float16: "Half",
        torch.bfloat16: "BFloat16",
        torch.float32: "Float",
        torch.float64: "Double",
    }.get(dtype, str(dtype).removeprefix("torch."))
