"""Norms before PReLU: a channel's coefficients, its moments, and the launches that finish both.

A norm is z = (x - mean) * scale + shift with scale = weight * rstd, shift = bias and
rstd = 1 / sqrt(variance + eps). What a channel needs of it stands in rows of a float32 table:
MEAN, SCALE, SHIFT, SLOPE, RSTD and, for undoing an update, RUNNING_MEAN and RUNNING_VAR as they
were. A sample of an instance norm has channels of its own; its parameters are those of channel
modulo `parameters`.

With g' the gradient of z, and sums over a channel's `elements`, the backward is

    grad_bias = sum g'    grad_weight = rstd * sum g' (x - mean)
    grad_x = g' * scale + (x - mean) * slant + offset
    slant = -scale * rstd^2 / elements * sum g' (x - mean)    offset = -scale / elements * sum g'

(Ioffe and Szegedy, 2015, arXiv:1502.03167), where slant and offset are the correction for what x
has done to its statistics.
"""

import triton
import triton.language as tl

from .formula import load
from .partials import sum_by_last_program, sum_terms, term_offsets

MEAN = tl.constexpr(0)
SCALE = tl.constexpr(1)
SHIFT = tl.constexpr(2)
SLOPE = tl.constexpr(3)
RSTD = tl.constexpr(4)
RUNNING_MEAN = tl.constexpr(5)
RUNNING_VAR = tl.constexpr(6)


@triton.jit
def load_coefficients(table_ptr, correction_ptr, channel, channels):
    """The coefficients of formula.py; without a correction where its pointer is None."""
    coefficients = (
        tl.load(table_ptr + SLOPE * channels + channel),
        tl.load(table_ptr + SCALE * channels + channel),
        tl.load(table_ptr + SHIFT * channels + channel),
        tl.load(table_ptr + MEAN * channels + channel),
    )
    if correction_ptr is not None:
        slant = tl.load(correction_ptr + channel)
        offset = tl.load(correction_ptr + channels + channel)
        coefficients = coefficients + (slant, offset)
    return coefficients


@triton.jit
def moments_tile(
    x_ptr,
    grad_y_ptr,
    result_ptr,
    coefficients,
    offsets,
    mask,
    COMPUTE: tl.constexpr,
    EXPANDED: tl.constexpr,
):
    """A tile function: the sums of x - about and of its square, where coefficients are (about,)."""
    deviation = load(x_ptr + offsets, mask, COMPUTE) - coefficients[0]
    if mask is not None:
        deviation = tl.where(mask, deviation, 0.0)
    return (deviation, deviation * deviation)


@triton.jit
def median(a, b, c):
    """The median of three, which one outlier is not; not NaN but where two are."""
    return tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))


@triton.jit
def store_moments(moments_ptr, place, size, mask, count, about, total, square):
    """Writes a program's moments, four tables.

    How many elements, one of them (about), the mean less that, and the sum of squares about the
    mean. The two parts of the mean keep squares from cancelling between programs.
    """
    from_about = total / tl.maximum(count, 1.0)
    excess = total * from_about
    moments_ptr += place
    tl.store(moments_ptr, count, mask)
    tl.store(moments_ptr + size, about, mask)
    tl.store(moments_ptr + 2 * size, from_about, mask)
    # Rounding may leave less than nothing; NaN stays.
    tl.store(moments_ptr + 3 * size, tl.where(square < excess, 0.0, square - excess), mask)


@triton.jit
def merge_moments(
    moments_ptr,
    channel,
    splits,
    channels,
    inner,
    CHANNEL_BLOCK: tl.constexpr,
    TERM_BLOCK: tl.constexpr,
):
    """Mean and sum of squares about it, and the count, of the channels in a block (Chan et al.)."""
    COMPUTE: tl.constexpr = moments_ptr.dtype.element_ty
    size = tl.cast(splits, tl.int64) * channels * inner
    counts = tl.zeros((TERM_BLOCK, CHANNEL_BLOCK), COMPUTE)
    sums = tl.zeros((TERM_BLOCK, CHANNEL_BLOCK), COMPUTE)
    for first in range(0, splits * inner, TERM_BLOCK):
        offsets, mask = term_offsets(first, channel, splits, channels, inner, TERM_BLOCK)
        count = tl.load(moments_ptr + offsets, mask, 0.0)
        about = tl.load(moments_ptr + size + offsets, mask, 0.0)
        counts += count
        sums += count * (about + tl.load(moments_ptr + 2 * size + offsets, mask, 0.0))
    total = tl.sum(counts, axis=0)
    near = tl.div_rn(tl.sum(sums, axis=0), total)
    # Near the mean distances round little; how far the mean is from there comes out, too. The
    # partials are in the cache now.
    distances = tl.zeros((TERM_BLOCK, CHANNEL_BLOCK), COMPUTE)
    squares = tl.zeros((TERM_BLOCK, CHANNEL_BLOCK), COMPUTE)
    for first in range(0, splits * inner, TERM_BLOCK):
        offsets, mask = term_offsets(first, channel, splits, channels, inner, TERM_BLOCK)
        count = tl.load(moments_ptr + offsets, mask, 0.0)
        about = tl.load(moments_ptr + size + offsets, mask, 0.0)
        distance = about - near[None, :] + tl.load(moments_ptr + 2 * size + offsets, mask, 0.0)
        distances += count * distance
        squares += tl.load(moments_ptr + 3 * size + offsets, mask, 0.0)
        squares += count * distance * distance
    from_near = tl.div_rn(tl.sum(distances, axis=0), total)
    excess = total * from_near * from_near
    square = tl.sum(squares, axis=0)
    return near + from_near, tl.where(square < excess, 0.0, square - excess), total


@triton.jit
def finish_moments(
    table_out_ptr,
    partials_ptr,
    weight_ptr,
    bias_ptr,
    slope_ptr,
    negative_slope,
    mean_ptr,
    var_ptr,
    running_mean_ptr,
    running_var_ptr,
    momentum,
    eps,
    splits,
    channels,
    inner,
    parameters,
    slopes,
    CHANNEL_BLOCK: tl.constexpr,
    TERM_BLOCK: tl.constexpr,
):
    """Makes the table of the channels from partial moments, and updates the running statistics.

    Where partials_ptr is None, the channels' statistics are given. A program owns CHANNEL_BLOCK
    channels.
    """
    channel = tl.program_id(0) * CHANNEL_BLOCK + tl.arange(0, CHANNEL_BLOCK)
    exists = channel < channels
    parameter = channel % parameters
    row = table_out_ptr + channel
    if partials_ptr is None:
        mean = tl.load(mean_ptr + channel, exists, 0.0).to(tl.float32)
        variance = tl.load(var_ptr + channel, exists, 0.0).to(tl.float32)
    else:
        mean, squares, count = merge_moments(
            partials_ptr, channel, splits, channels, inner, CHANNEL_BLOCK, TERM_BLOCK
        )
        variance = tl.div_rn(squares, count)
        if running_mean_ptr is not None:
            running_mean = tl.load(running_mean_ptr + channel, exists, 0.0).to(tl.float32)
            running_var = tl.load(running_var_ptr + channel, exists, 0.0).to(tl.float32)
            tl.store(row + RUNNING_MEAN * channels, running_mean, exists)
            tl.store(row + RUNNING_VAR * channels, running_var, exists)
            running_mean = tl.fma(momentum, mean, (1.0 - momentum) * running_mean)
            unbiased = tl.div_rn(squares, count - 1.0)
            running_var = tl.fma(momentum, unbiased, (1.0 - momentum) * running_var)
            tl.store(running_mean_ptr + channel, running_mean, exists)
            tl.store(running_var_ptr + channel, running_var, exists)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    scale, shift = rstd, tl.zeros((CHANNEL_BLOCK,), tl.float32)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + parameter, exists, 0.0).to(tl.float32)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + parameter, exists, 0.0).to(tl.float32)
    slope = tl.full((CHANNEL_BLOCK,), negative_slope, tl.float32)
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + channel % slopes, exists, 0.0).to(tl.float32)
    tl.store(row + MEAN * channels, mean, exists)
    tl.store(row + SCALE * channels, scale, exists)
    tl.store(row + SHIFT * channels, shift, exists)
    tl.store(row + SLOPE * channels, slope, exists)
    tl.store(row + RSTD * channels, rstd, exists)


@triton.jit
def finish_gradients(
    partials_ptr,
    table_ptr,
    correction_out_ptr,
    channel_sums_ptr,
    grad_slope_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    slope_sums_ptr,
    counters_ptr,
    elements,
    splits,
    channels,
    inner,
    SUMS: tl.constexpr,
    SHARED: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    TERM_BLOCK: tl.constexpr,
):
    """Sums partial sums, SUMS tables, into grad_x's correction and the parameters' gradients.

    Of an instance norm in two launches: the first leaves the sums of each sample's channels in
    channel_sums_ptr, (SUMS, channels), which are the second one's partial sums, without a table.
    A program owns CHANNEL_BLOCK channels. SHARED: there is one slope; each of several programs
    leaves its sum in slope_sums_ptr, and the last one sums these, unless counters_ptr is None.
    """
    channel = tl.program_id(0) * CHANNEL_BLOCK + tl.arange(0, CHANNEL_BLOCK)
    exists = channel < channels
    totals = sum_terms(
        partials_ptr, channel, splits, channels, inner, SUMS, CHANNEL_BLOCK, TERM_BLOCK
    )
    grad_bias, grad_weight = totals[0], totals[1]
    if table_ptr is not None:
        rstd = tl.load(table_ptr + RSTD * channels + channel, exists, 0.0)
        grad_weight *= rstd
        if correction_out_ptr is not None:
            scale = tl.load(table_ptr + SCALE * channels + channel, exists, 0.0)
            slant = -scale * rstd * (grad_weight / elements)
            tl.store(correction_out_ptr + channel, slant, exists)
            tl.store(correction_out_ptr + channels + channel, -scale * grad_bias / elements, exists)
    if channel_sums_ptr is not None:
        tl.store(channel_sums_ptr + channel, grad_bias, exists)
        tl.store(channel_sums_ptr + channels + channel, grad_weight, exists)
        if SUMS == 3:
            tl.store(channel_sums_ptr + 2 * channels + channel, totals[2], exists)
    if grad_weight_ptr is not None:
        tl.store(grad_weight_ptr + channel, grad_weight, exists)
    if grad_bias_ptr is not None:
        tl.store(grad_bias_ptr + channel, grad_bias, exists)
    if grad_slope_ptr is not None:
        if SHARED:
            total = tl.sum(totals[2])
            if slope_sums_ptr is None:
                tl.store(grad_slope_ptr, total)
            else:
                tl.store(slope_sums_ptr + tl.program_id(0), total)
                if counters_ptr is not None:
                    sum_by_last_program(
                        slope_sums_ptr, grad_slope_ptr, counters_ptr, 0, tl.num_programs(0), 1, 1024
                    )
        else:
            tl.store(grad_slope_ptr + channel, totals[2], exists)
