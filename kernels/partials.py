"""The second stage of the slope gradient: sums the partial sums, in a fixed order.

Either a launch of its own, or the last program of the first stage.
"""

import triton
import triton.language as tl

from .formula import add, zeros


@triton.jit
def sum_partials(
    partials_ptr,
    grad_weight_ptr,
    splits,
    channels,
    inner,
    CHANNEL_BLOCK: tl.constexpr,
    TERM_BLOCK: tl.constexpr,
):
    """Sums partials (splits, channels, inner) over splits and inner into grad_weight (channels,).

    A program owns CHANNEL_BLOCK channels. The sum is in the partials' type, rounded once.
    """
    channel = tl.program_id(0) * CHANNEL_BLOCK + tl.arange(0, CHANNEL_BLOCK)
    sum_channels(
        partials_ptr, grad_weight_ptr, channel, splits, channels, inner, CHANNEL_BLOCK, TERM_BLOCK
    )


@triton.jit
def sum_by_last_program(
    partials_ptr,
    grad_weight_ptr,
    counters_ptr,
    channel,
    splits,
    channels,
    TERM_BLOCK: tl.constexpr,
):
    """The last of a channel's `splits` programs sums the partials (splits, channels) of them all.

    Each program has stored its one; counters (channels,) are zeros before and after.
    """
    # Without the barrier nothing orders the program's store before its count.
    tl.debug_barrier()
    earlier = tl.atomic_add(counters_ptr + channel, 1, sem="acq_rel")
    if earlier == splits - 1:
        one_channel = (channel + tl.arange(0, 1)).to(tl.int32)
        sum_channels(partials_ptr, grad_weight_ptr, one_channel, splits, channels, 1, 1, TERM_BLOCK)
        tl.store(counters_ptr + channel, 0)


@triton.jit
def sum_channels(
    partials_ptr,
    grad_weight_ptr,
    channel,
    splits,
    channels,
    inner,
    CHANNEL_BLOCK: tl.constexpr,
    TERM_BLOCK: tl.constexpr,
):
    """Sums the partials of the channels in a block, TERM_BLOCK of each at a time."""
    totals = sum_terms(partials_ptr, channel, splits, channels, inner, 1, CHANNEL_BLOCK, TERM_BLOCK)
    tl.store(grad_weight_ptr + channel, totals[0], channel < channels)


@triton.jit
def sum_terms(
    partials_ptr,
    channel,
    splits,
    channels,
    inner,
    TABLES: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    TERM_BLOCK: tl.constexpr,
):
    """The sums of the channels in a block, over each of the tables that follow one another."""
    COMPUTE: tl.constexpr = partials_ptr.dtype.element_ty
    sums = zeros(TABLES, (TERM_BLOCK, CHANNEL_BLOCK), COMPUTE)
    for first in range(0, splits * inner, TERM_BLOCK):
        offsets, mask = term_offsets(first, channel, splits, channels, inner, TERM_BLOCK)
        terms = ()
        for table in tl.static_range(TABLES):
            size = tl.cast(splits, tl.int64) * channels * inner
            terms = terms + (tl.load(partials_ptr + table * size + offsets, mask, 0.0),)
        sums = add(sums, terms)
    totals = ()
    for table in tl.static_range(TABLES):
        totals = totals + (tl.sum(sums[table], axis=0),)
    return totals


@triton.jit
def term_offsets(first, channel, splits, channels, inner, TERM_BLOCK: tl.constexpr):
    """Offsets and mask of a block's terms in a table (splits, channels, inner)."""
    term = first + tl.arange(0, TERM_BLOCK)
    # The plan keeps columns, and so partials, within reach of 32-bit offsets.
    offsets = (term // inner * channels)[:, None] + channel[None, :]
    offsets = offsets * inner + (term % inner)[:, None]
    return offsets, (term < splits * inner)[:, None] & (channel < channels)[None, :]
