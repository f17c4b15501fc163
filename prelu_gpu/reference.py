"""PReLU in plain PyTorch: the formula, its gradients, and the error that rounding explains.

Read this first. Everything else in this library computes the same faster; tests, benchmarks, demo
and self-check compare with what stands here.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def prelu(x: Tensor, weight: Tensor, dim: int = 1) -> Tensor:
    """PReLU of He et al. (2015, arXiv:1502.01852): x where x > 0, else weight * x.

    Args:
        x: any shape.
        weight: one slope, or one for each channel, or slopes of x's rank that broadcast.
        dim: the dimension of the channels.
    """
    return torch.where(x > 0, x, _slopes(weight, x, dim) * x)


def prelu_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight, in their shapes."""
    slopes = _slopes(weight, x, dim)
    grad_x = torch.where(x > 0, grad_y, slopes * grad_y)
    grad_weight = _products(grad_y, x).sum_to_size(slopes.shape).reshape(weight.shape)
    return grad_x, grad_weight


def rounding(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    dim: int = 1,
    products_in: torch.dtype | None = None,
) -> Tensor:
    """How far rounding may take a slope gradient from the exact one, in float64, shaped as weight.

    A sum S of n products of root mean square r, made in float32 (float64 for float64), is off by up
    to about eps * (n * r + sqrt(n) * S), even if it is made one by one: the worst order, where each
    addition rounds a partial sum of size up to S. It is rounded once more to the weight's dtype.

    Args:
        grad_y: the output gradient.
        x: the input.
        weight: the slopes.
        dim: the dimension of the channels.
        products_in: the dtype that each product is rounded to first, as PyTorch's operator rounds
            to half precision. These errors are independent, 0.29 eps of a product each: 2 eps of
            the root of the sum of squares is seven standard deviations. Products that underflow
            lose up to the smallest number, all toward 0.
    """
    shape = _slopes(weight, x, dim).shape
    products = _products(grad_y.double(), x.double())
    # Squares of numbers up to 1 do not overflow.
    largest = products.abs().max().item() if products.numel() else 0.0
    scale = largest if 0 < largest < math.inf else 1.0
    sums = products.sum_to_size(shape)
    root = scale * (products / scale).square().sum_to_size(shape).sqrt()
    summands = x.numel() / max(1, weight.numel())
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    error = torch.finfo(wide).eps * summands**0.5 * (root + sums.abs())
    if products_in is not None:
        info = torch.finfo(products_in)
        error = error + 2 * info.eps * root + summands * info.eps * info.smallest_normal
    total: Tensor = error + _one_rounding(sums.abs() + error, weight.dtype)
    return total.reshape(weight.shape)


def mistakes(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    dim: int = 1,
    *,
    y: Tensor | None = None,
    grad_x: Tensor | None = None,
    grad_weight: Tensor | None = None,
    products_in: torch.dtype | None = None,
    whole_numbers: bool = False,
) -> Iterator[str]:
    """What is wrong with computed results, in words; nothing if all of them are right.

    The output and the input gradient are one product in float32 (float64 for float64), rounded to
    the dtype of x: right are the same bits, or any NaN for NaN. The slope gradient may be off by
    :func:`rounding`, which takes `products_in`. With `whole_numbers`, x and grad_y are so small
    ones that every sum is exact: the slope gradient may be off by its own rounding alone.
    """
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    wide_grad_y, wide_x, wide_weight = (t.detach().to(wide) for t in (grad_y, x, weight))
    expected_grad_x, _ = prelu_backward(wide_grad_y, wide_x, wide_weight, dim)
    for what, actual, expected in (
        ("output", y, prelu(wide_x, wide_weight, dim)),
        ("input gradient", grad_x, expected_grad_x),
    ):
        if actual is not None:
            yield from _difference(what, actual, expected.to(x.dtype), None)
    if grad_weight is not None:
        exact = prelu_backward(grad_y.double(), x.double(), weight.double(), dim)[1].detach()
        if whole_numbers:
            error = _one_rounding(exact.abs(), weight.dtype)
        else:
            error = rounding(grad_y, x, weight, dim, products_in).detach()
        yield from _difference("slope gradient", grad_weight, exact, error, weight.dtype)


def _slopes(weight: Tensor, x: Tensor, dim: int) -> Tensor:
    """The slopes in a shape that broadcasts over x."""
    if weight.numel() == 1:
        return weight.reshape([1] * x.dim())
    if weight.dim() != 1:
        return weight
    return weight.view([-1 if d == dim % x.dim() else 1 for d in range(x.dim())])


def _products(grad_y: Tensor, x: Tensor) -> Tensor:
    """Each element's share of the slope gradient."""
    return torch.where(x > 0, 0.0, grad_y * x)


def _one_rounding(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between the numbers of a dtype, or a little more."""
    info = torch.finfo(dtype)
    return info.eps / 2 * exact.clamp(min=info.smallest_normal)


def _difference(
    what: str,
    actual: Tensor,
    expected: Tensor,
    tolerance: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Iterator[str]:
    """The mistake in a result. Without a tolerance, the same bits are right."""
    given = tuple(actual.shape), actual.dtype
    wanted = tuple(expected.shape), dtype or expected.dtype
    if given != wanted:
        yield f"{what}: {given} instead of {wanted}"
        return
    rounded = expected.to(actual.dtype)
    same = (actual == rounded) & (actual.signbit() == rounded.signbit())
    same |= actual.isnan() & expected.isnan()
    if tolerance is not None:
        near = (actual.double() - expected).abs() <= tolerance
        same |= (actual == rounded) | (near & expected.isfinite() & tolerance.isfinite())
    if not same.all():
        first = tuple(int(i) for i in (~same).nonzero()[0])
        yield (
            f"{what}: {int((~same).sum())} of {same.numel()} elements are wrong, the first at "
            f"{first}: {actual[first].item()} instead of {expected[first].item()}"
            + ("" if tolerance is None else f" +- {tolerance[first].item():.1e}")
        )
