"""PReLU, alone and behind a norm, in plain PyTorch: formulas, gradients, and rounding's error.

Read this first. Everything else in this library computes the same faster; tests, benchmarks, demo
and self-check compare with what stands here.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

NORM_RESULTS = {
    "y": "output",
    "grad_x": "input gradient",
    "grad_slope": "slope gradient",
    "grad_weight": "weight gradient",
    "grad_bias": "bias gradient",
    "running_mean": "running mean",
    "running_var": "running variance",
}
"""What a norm with PReLU computes, in names and in words."""


def prelu(x: Tensor, weight: Tensor, dim: int = 1) -> Tensor:
    """PReLU of He et al. (2015, arXiv:1502.01852): x where x > 0, else weight * x.

    Args:
        x: any shape.
        weight: one slope, or one for each channel, or slopes of x's rank that broadcast.
        dim: the dimension of the channels.
    """
    return torch.where(x > 0, x, _by_channel(weight, x, dim) * x)


def prelu_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight, in their shapes."""
    slopes = _by_channel(weight, x, dim)
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
    shape = _by_channel(weight, x, dim).shape
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


def norm_prelu(
    x: Tensor,
    slope: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> Tensor:
    """PReLU behind the norm of Ioffe & Szegedy (2015, arXiv:1502.03167), over dimension 1.

    The mean and the variance are those of each channel; with those of each channel of each sample
    it is the norm of Ulyanov et al. (2016, arXiv:1607.08022). Both broadcast over x.
    """
    return prelu(_affine(_standard(x, mean, variance, eps), weight, bias), slope)


class Exact(NamedTuple):
    """A result in float64, and what it may become."""

    value: Tensor
    error: Tensor
    """How far arithmetic in float32 may take it, before it is rounded."""
    dtype: torch.dtype


@torch.enable_grad()
def norm_exact(
    positive: Tensor,
    grad_y: Tensor,
    x: Tensor,
    slope: Tensor | float,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool,
    instances: bool,
    eps: float,
    momentum: float = 0.1,
) -> dict[str, Exact]:
    """The results of a norm with PReLU that there are, by their names in NORM_RESULTS.

    Args:
        positive: where PReLU's computed argument is positive. Rounding may take a number next to 0
            to the other side of the kink, where gradients are others: the exact ones follow there.
            Of positive slopes, y tells: where its sign bit is not set.
        grad_y: the output gradient, of the output's dtype.
        x: the input.
        slope: one slope, or one for each channel, or a number, which has no gradient.
        weight: the factor of each channel, or None for 1.
        bias: the summand of each channel, or None for 0.
        running_mean: as it was before, or None.
        running_var: as it was before, or None.
        training: whether statistics are those of x, else the running ones.
        instances: whether each sample has its own.
        eps: what is added to the variance.
        momentum: how much of a new running statistic is this batch's.
    """
    given = grad_y, x, slope, weight, bias, running_mean, running_var
    ones = torch.ones(x.shape[1], dtype=torch.float64, device=x.device)
    weight, bias = ones if weight is None else weight, 0 * ones if bias is None else bias
    x, slope, weight, bias = (
        torch.as_tensor(leaf, device=x.device).detach().double().requires_grad_()
        for leaf in (x, slope, weight, bias)
    )
    grad_y = grad_y.double()
    running = [t.double() for t in (running_mean, running_var) if t is not None]
    if training:
        dims = [d for d in range(x.dim()) if d != 1 and not (instances and d == 0)]
        variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    else:
        mean, variance = (_by_channel(t, x, 1) for t in running)
    standard = _standard(x, mean, variance, eps)
    z = _affine(standard, weight, bias)
    near = z.abs() <= 1e-5 * z.abs().max()
    positive = torch.where(near, positive, z > 0)
    y = torch.where(positive, z, _by_channel(slope, x, 1) * z)
    grad_z, *gradients = torch.autograd.grad(y, (z, x, slope, weight, bias), grad_y)

    # z is a sum, too: next to 0 it is as exact as its terms.
    size = _affine(standard.abs(), weight.abs(), bias.abs())
    terms = torch.where(positive, 0.0, grad_y * size), grad_z * standard, grad_z
    sums = (
        each.abs().sum_to_size(_by_channel(leaf, x, 1).shape).view_as(leaf)
        for each, leaf in zip(terms, (slope, weight, bias), strict=True)
    )
    errors = [*(4e-6 * t.abs().max() for t in (y, gradients[0])), *(5e-6 * t for t in sums)]
    if running and training:
        summands = x.numel() / mean.numel()
        new = mean.flatten(), variance.flatten() * summands / (summands - 1)
        running = [torch.lerp(*pair, momentum) for pair in zip(running, new, strict=True)]
        errors += [torch.full_like(running[0], 1e-6), 1e-6 * running[1]]
    else:
        errors += [torch.zeros_like(t) for t in running]
    # Without running statistics these are fewer than the names.
    exact = zip(NORM_RESULTS, (y, *gradients, *running), errors, given, strict=False)
    return {
        name: Exact(value.detach(), error.detach(), like.dtype)
        for name, value, error, like in exact
        if isinstance(like, Tensor)
    }


def norm_mistakes(
    results: Mapping[str, Tensor | None], exact: Mapping[str, Exact]
) -> Iterator[str]:
    """What is wrong with computed results of a norm with PReLU, in words; None is not looked at.

    The output and the input gradient may be off by four roundings and 4e-6 of the largest; sums
    by one rounding and 5e-6 of the sum of their terms' sizes; running statistics by a rounding and
    1e-6, the variance of itself. In an evaluation these stay as they are.
    """
    for name, actual in results.items():
        if actual is not None:
            value, error, dtype = exact[name]
            roundings = 4 if name in ("y", "grad_x") else 1
            tolerance = roundings * _one_rounding(value.abs(), dtype) + error
            yield from _difference(NORM_RESULTS[name], actual, value, tolerance, dtype)


def _standard(x: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    return (x - mean) / (variance + eps).sqrt()


def _affine(standard: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return standard * _by_channel(weight, standard, 1) + _by_channel(bias, standard, 1)


def _by_channel(weight: Tensor, x: Tensor, dim: int) -> Tensor:
    """Slopes, or another number of each channel, in a shape that broadcasts over x."""
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
