"""Kernels for long rows of one slope each: a tile lies in one row, so its slope is a scalar.

The data is `outer` x `channels` rows of `inner` elements; a shared slope makes it one single row.
A row is read and written in aligned vectors of V elements (128 bits). Where `inner` is no multiple
of V (EDGES), rows begin and end anywhere: the body runs between the row's first and last aligned
offset, and one masked access takes the up to 2 * (V - 1) elements outside it.

Program (outer_split, channel, tile_split) walks the rows outer_split, outer_split + outer_splits,
... of its channel, and in each of them the tiles tile_split, tile_split + tile_splits, ...
"""

import triton
import triton.language as tl

from .formula import prelu, prelu_grad_weight, prelu_grad_x


@triton.jit
def program():
    """This program's (outer_split, channel, tile_split), widened before anything multiplies them.

    The grid is (channels, tile_splits, outer_splits): only its first axis has room for any number.
    """
    return (
        tl.program_id(2).to(tl.int64),
        tl.program_id(0).to(tl.int64),
        tl.program_id(1).to(tl.int64),
    )


@triton.jit
def row_bounds(n, channel, channels, inner, V: tl.constexpr):
    """A row's first element, first aligned offset, last aligned offset and end."""
    start = (tl.cast(n, tl.int64) * channels + channel) * inner
    end = start + inner
    # The product with the constant V tells the compiler of the alignment.
    return start, (start + V - 1) // V * V, end // V * V, end


@triton.jit
def edge_offsets(start, body_start, body_end, end, V: tl.constexpr):
    """Offsets and mask, in 2 * V lanes, of a row's elements before and after its aligned body."""
    lane = tl.arange(0, 2 * V)
    before = start + lane
    # A row that ends before its first aligned offset lies in `before` whole.
    after = tl.maximum(body_end, body_start) + lane - V
    offsets = tl.where(lane < V, before, after)
    return offsets, (offsets < end) & ((lane >= V) | (before < body_start))


@triton.jit
def plane_forward(
    x_ptr,
    weight_ptr,
    negative_slope,
    y_ptr,
    outer,
    channels,
    inner,
    COMPUTE: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGES: tl.constexpr,
):
    """Reads x once, writes y once. Where weight_ptr is None, `negative_slope` is the slope."""
    outer_split, channel, tile_split = program()
    tile_splits = tl.num_programs(1).to(tl.int64)
    if weight_ptr is None:
        weight = tl.full((), negative_slope, COMPUTE)
    else:
        weight = tl.load(weight_ptr + channel).to(COMPUTE)

    for n in range(outer_split, outer, tl.num_programs(2)):
        start, body_start, body_end, end = row_bounds(n, channel, channels, inner, V)
        for tile in range(body_start + tile_split * BLOCK, body_end, tile_splits * BLOCK):
            offsets = tile + tl.arange(0, BLOCK)
            mask = offsets < body_end
            x = tl.load(x_ptr + offsets, mask).to(COMPUTE)
            tl.store(y_ptr + offsets, prelu(x, weight), mask)
        if EDGES:
            if tile_split == 0:
                offsets, mask = edge_offsets(start, body_start, body_end, end, V)
                x = tl.load(x_ptr + offsets, mask).to(COMPUTE)
                tl.store(y_ptr + offsets, prelu(x, weight), mask)


@triton.jit
def plane_backward(
    grad_y_ptr,
    x_ptr,
    weight_ptr,
    negative_slope,
    grad_x_ptr,
    grad_weight_ptr,
    outer,
    channels,
    inner,
    COMPUTE: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGES: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """Reads grad_y and x once, writes grad_x once; either gradient's pointer may be None.

    grad_weight_ptr is a table of partial sums, (outer_splits * tile_splits, channels), of which
    every program writes one; with ATOMIC it is the zero-filled sums, (channels,).
    """
    outer_split, channel, tile_split = program()
    tile_splits = tl.num_programs(1).to(tl.int64)
    if weight_ptr is None:
        weight = tl.full((), negative_slope, COMPUTE)
    else:
        weight = tl.load(weight_ptr + channel).to(COMPUTE)
    body_sum = tl.zeros((BLOCK,), COMPUTE)
    edge_sum = tl.zeros((2 * V,), COMPUTE)

    for n in range(outer_split, outer, tl.num_programs(2)):
        start, body_start, body_end, end = row_bounds(n, channel, channels, inner, V)
        for tile in range(body_start + tile_split * BLOCK, body_end, tile_splits * BLOCK):
            offsets = tile + tl.arange(0, BLOCK)
            mask = offsets < body_end
            x = tl.load(x_ptr + offsets, mask, 0.0).to(COMPUTE)
            grad_y = tl.load(grad_y_ptr + offsets, mask, 0.0).to(COMPUTE)
            if grad_x_ptr is not None:
                tl.store(grad_x_ptr + offsets, prelu_grad_x(grad_y, x, weight), mask)
            if grad_weight_ptr is not None:
                body_sum += prelu_grad_weight(grad_y, x)
        if EDGES:
            if tile_split == 0:
                offsets, mask = edge_offsets(start, body_start, body_end, end, V)
                x = tl.load(x_ptr + offsets, mask, 0.0).to(COMPUTE)
                grad_y = tl.load(grad_y_ptr + offsets, mask, 0.0).to(COMPUTE)
                if grad_x_ptr is not None:
                    tl.store(grad_x_ptr + offsets, prelu_grad_x(grad_y, x, weight), mask)
                if grad_weight_ptr is not None:
                    edge_sum += prelu_grad_weight(grad_y, x)

    if grad_weight_ptr is not None:
        total = tl.sum(body_sum)
        if EDGES:
            total += tl.sum(edge_sum)
        if ATOMIC:
            tl.atomic_add(grad_weight_ptr + channel, total, sem="relaxed")
        else:
            split = outer_split * tile_splits + tile_split
            tl.store(grad_weight_ptr + split * channels + channel, total)
