"""The second stage of the slope gradient: sums the partial sums, in a fixed order."""

import triton
import triton.language as tl


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
    total = tl.zeros((TERM_BLOCK, CHANNEL_BLOCK), partials_ptr.dtype.element_ty)
    for first in range(0, splits * inner, TERM_BLOCK):
        term = first + tl.arange(0, TERM_BLOCK)
        # The plan keeps columns, and so partials, within reach of 32-bit offsets.
        offsets = (term // inner * channels)[:, None] + channel[None, :]
        offsets = offsets * inner + (term % inner)[:, None]
        mask = (term < splits * inner)[:, None] & (channel < channels)[None, :]
        total += tl.load(partials_ptr + offsets, mask, 0.0)
    tl.store(grad_weight_ptr + channel, tl.sum(total, axis=0), channel < channels)
