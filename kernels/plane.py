"""Kernels for long rows of one slope each: a tile lies in one row, so its slope is a scalar.

The data is `outer` x `channels` rows of `inner` elements; a shared slope makes it one single row.
A row is read and written in aligned vectors of V elements (128 bits), in whole tiles and one masked
tail. Where `inner` is no multiple of V (EDGES), rows begin and end anywhere: the body runs between
the row's first and last aligned offset, and one masked access takes the up to 2 * (V - 1) elements
outside it.

An input may leave gaps between its rows: `outer_gap` elements more from one outer position to the
next than in dense memory, `channel_gap` from one channel to the next. Gaps come in vectors, so that
the compiler knows them as multiples of V; dense inputs have None. NARROW is for dense rows that
begin off the 16-byte grid in an input: no tensor is accessed in more than V elements at a time,
or that input's lanes would take one element each, as far apart as another's vectors are wide.

Program (outer_split, channel, tile_split) walks the rows outer_split, outer_split + outer_splits,
... of its channel, and in each of them the tiles tile_split, tile_split + tile_splits, ...
`walk_rows` does, for every kernel here.
"""

import triton
import triton.language as tl

from .formula import add, backward_tile, forward_tile, load_weight, zeros
from .partials import sum_by_last_program


@triton.jit
def program():
    """This program's (outer_split, channel, tile_split), widened before anything multiplies them.

    The grid is (channels, tile_splits, outer_splits): its first axis has room for 2**31 - 1.
    """
    return (
        tl.program_id(2).to(tl.int64),
        tl.program_id(0).to(tl.int64),
        tl.program_id(1).to(tl.int64),
    )


@triton.jit
def row_bounds(n, channel, channels, inner, V: tl.constexpr, BLOCK: tl.constexpr):
    """A row's start, its body's start, the end of its whole tiles, its body's end, and its end."""
    start = (tl.cast(n, tl.int64) * channels + channel) * inner
    end = start + inner
    # The product with the constant V tells the compiler of the alignment.
    body_start = (start + V - 1) // V * V
    body_end = end // V * V
    return start, body_start, body_start + (body_end - body_start) // BLOCK * BLOCK, body_end, end


@triton.jit
def tile_offsets(tile, V: tl.constexpr, BLOCK: tl.constexpr, NARROW: tl.constexpr):
    """Offsets of the tile that begins at `tile`."""
    offsets = tile + tl.arange(0, BLOCK)
    if NARROW:
        offsets = tl.multiple_of(offsets, V)
    return offsets


@triton.jit
def row_pointer(ptr, n, channel, outer_gap, channel_gap, V: tl.constexpr):
    """What a row's dense offsets are added to."""
    if outer_gap is not None:
        ptr += (tl.cast(n, tl.int64) * outer_gap + channel * channel_gap) * V
    return ptr


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
def add_vectors(sums, shares, V: tl.constexpr, BLOCK: tl.constexpr):
    """Adds shares to sums, each vector within its thread: one accumulator instead of V."""
    added = ()
    for i in tl.static_range(len(sums)):
        vectors = tl.reshape(shares[i], (BLOCK // V, V))
        added = added + (sums[i] + tl.sum(vectors, axis=1),)
    return added


@triton.jit
def walk_rows(
    TILE: tl.constexpr,
    SUMS: tl.constexpr,
    x_ptr,
    grad_y_ptr,
    result_ptr,
    coefficients,
    outer,
    channels,
    inner,
    x_outer_gap,
    x_channel_gap,
    grad_y_outer_gap,
    grad_y_channel_gap,
    COMPUTE: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGES: tl.constexpr,
    NARROW: tl.constexpr,
    EXPANDED: tl.constexpr,
):
    """Applies a tile function to all of this program's tiles; sums the first SUMS of its shares."""
    outer_split, channel, tile_split = program()
    tile_splits = tl.num_programs(1).to(tl.int64)
    body_sums = zeros(SUMS, (BLOCK // V,), COMPUTE)
    edge_sums = zeros(SUMS, (2 * V,), COMPUTE)

    for n in range(outer_split, outer, tl.num_programs(2)):
        start, body_start, tiles_end, body_end, end = row_bounds(
            n, channel, channels, inner, V, BLOCK
        )
        x_row = row_pointer(x_ptr, n, channel, x_outer_gap, x_channel_gap, V)
        grad_y_row = grad_y_ptr
        if grad_y_ptr is not None:
            grad_y_row = row_pointer(
                grad_y_ptr, n, channel, grad_y_outer_gap, grad_y_channel_gap, 1 if EXPANDED else V
            )
        next_tile = body_start + tile_split * BLOCK
        for tile in range(next_tile, tiles_end, tile_splits * BLOCK):
            offsets = tile_offsets(tile, V, BLOCK, NARROW)
            shares = TILE(
                x_row, grad_y_row, result_ptr, coefficients, offsets, None, COMPUTE, EXPANDED
            )
            body_sums = add_vectors(body_sums, shares, V, BLOCK)
            next_tile = tile + tile_splits * BLOCK
        if tiles_end < body_end:
            # Whose next tile the tail is: found without a division.
            if next_tile == tiles_end:
                offsets = tile_offsets(tiles_end, V, BLOCK, NARROW)
                mask = offsets < body_end
                shares = TILE(
                    x_row, grad_y_row, result_ptr, coefficients, offsets, mask, COMPUTE, EXPANDED
                )
                body_sums = add_vectors(body_sums, shares, V, BLOCK)
        if EDGES:
            if tile_split == 0:
                offsets, mask = edge_offsets(start, body_start, body_end, end, V)
                shares = TILE(
                    x_row, grad_y_row, result_ptr, coefficients, offsets, mask, COMPUTE, EXPANDED
                )
                edge_sums = add(edge_sums, shares)

    totals = ()
    for i in tl.static_range(SUMS):
        total = tl.sum(body_sums[i])
        if EDGES:
            total += tl.sum(edge_sums[i])
        totals = totals + (total,)
    return totals


@triton.jit
def plane_forward(
    x_ptr,
    weight_ptr,
    negative_slope,
    y_ptr,
    outer,
    channels,
    inner,
    x_outer_gap,
    x_channel_gap,
    COMPUTE: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGES: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Reads x once, writes y once."""
    _, channel, _ = program()
    weight = load_weight(weight_ptr, negative_slope, channel, COMPUTE)
    walk_rows(
        forward_tile,
        0,
        x_ptr,
        None,
        y_ptr,
        (weight,),
        outer,
        channels,
        inner,
        x_outer_gap,
        x_channel_gap,
        None,
        None,
        COMPUTE,
        V,
        BLOCK,
        EDGES,
        NARROW,
        False,
    )


@triton.jit
def plane_backward(
    grad_y_ptr,
    x_ptr,
    weight_ptr,
    negative_slope,
    grad_x_ptr,
    sums_ptr,
    counters_ptr,
    grad_weight_ptr,
    outer,
    channels,
    inner,
    grad_y_outer_gap,
    grad_y_channel_gap,
    x_outer_gap,
    x_channel_gap,
    COMPUTE: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGES: tl.constexpr,
    NARROW: tl.constexpr,
    EXPANDED: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """Reads grad_y and x once, writes grad_x once; grad_x_ptr or sums_ptr may be None.

    EXPANDED: grad_y is one number a row, its gaps are strides in elements.
    sums_ptr is a table of partial sums, (outer_splits * tile_splits, channels), of which every
    program writes one; with ATOMIC it is the zero-filled sums, (channels,). Unless counters_ptr is
    None, the last program of each channel sums the table into grad_weight_ptr, (channels,).
    """
    outer_split, channel, tile_split = program()
    weight = load_weight(weight_ptr, negative_slope, channel, COMPUTE)
    SUMS: tl.constexpr = 0 if sums_ptr is None else 1
    totals = walk_rows(
        backward_tile,
        SUMS,
        x_ptr,
        grad_y_ptr,
        grad_x_ptr,
        (weight,),
        outer,
        channels,
        inner,
        x_outer_gap,
        x_channel_gap,
        grad_y_outer_gap,
        grad_y_channel_gap,
        COMPUTE,
        V,
        BLOCK,
        EDGES,
        NARROW,
        EXPANDED,
    )
    if sums_ptr is not None:
        if ATOMIC:
            tl.atomic_add(sums_ptr + channel, totals[0], sem="relaxed")
        else:
            split = outer_split * tl.num_programs(1) + tile_split
            tl.store(sums_ptr + split * channels + channel, totals[0])
            if counters_ptr is not None:
                splits = tl.num_programs(1) * tl.num_programs(2)
                sum_by_last_program(
                    sums_ptr, grad_weight_ptr, counters_ptr, channel, splits, channels, BLOCK // V
                )
