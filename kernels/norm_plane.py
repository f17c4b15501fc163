"""Norms with PReLU over long rows of one channel each: plane.py's walk, with norm.py's tables."""

import triton
import triton.language as tl

from .formula import backward_tile, forward_tile
from .norm import load_coefficients, median, moments_tile, store_moments
from .plane import program, row_bounds, row_pointer, walk_rows


@triton.jit
def plane_norm_forward(
    x_ptr,
    table_ptr,
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
    """Reads x once, writes y once: PReLU behind a norm, whose table is norm.py's."""
    _, channel, _ = program()
    coefficients = load_coefficients(table_ptr, None, channel, channels)
    walk_rows(
        forward_tile,
        0,
        x_ptr,
        None,
        y_ptr,
        coefficients,
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
def plane_norm_backward(
    grad_y_ptr,
    x_ptr,
    table_ptr,
    correction_ptr,
    grad_x_ptr,
    sums_ptr,
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
    SUMS: tl.constexpr,
):
    """Reads grad_y and x once, writes grad_x once; grad_x_ptr may be None.

    EXPANDED: grad_y is one number a row, its gaps are strides in elements.
    sums_ptr is SUMS tables of partial sums, (outer_splits * tile_splits, channels).
    """
    _, channel, _ = program()
    coefficients = load_coefficients(table_ptr, correction_ptr, channel, channels)
    totals = walk_rows(
        backward_tile,
        SUMS,
        x_ptr,
        grad_y_ptr,
        grad_x_ptr,
        coefficients,
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
    place, size = partial_place(channels)
    for i in tl.static_range(SUMS):
        tl.store(sums_ptr + i * size + place, totals[i])


@triton.jit
def plane_moments(
    x_ptr,
    moments_ptr,
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
    """Reads x once; leaves four tables (outer_splits * tile_splits, channels) of moments."""
    outer_split, channel, tile_split = program()
    start, _, _, _, end = row_bounds(outer_split, channel, channels, inner, V, BLOCK)
    row = row_pointer(x_ptr, outer_split, channel, x_outer_gap, x_channel_gap, V)
    first = start + tile_split * BLOCK
    about = median(
        tl.load(row + first).to(COMPUTE),
        tl.load(row + tl.minimum(first + 1, end - 1)).to(COMPUTE),
        tl.load(row + tl.minimum(first + 2, end - 1)).to(COMPUTE),
    )
    totals = walk_rows(
        moments_tile,
        2,
        x_ptr,
        None,
        None,
        (about,),
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
    count = count_elements(outer, channels, inner, V, BLOCK, EDGES).to(COMPUTE)
    place, size = partial_place(channels)
    store_moments(moments_ptr, place, size, None, count, about, totals[0], totals[1])


@triton.jit
def partial_place(channels):
    """Where this program's sum lies in a table of partial sums, and the table's size."""
    outer_split, channel, tile_split = program()
    split = outer_split * tl.num_programs(1) + tile_split
    splits = tl.num_programs(2).to(tl.int64) * tl.num_programs(1)
    return split * channels + channel, splits * channels


@triton.jit
def count_elements(outer, channels, inner, V: tl.constexpr, BLOCK: tl.constexpr, EDGES):
    """How many elements this program walks over."""
    outer_split, channel, tile_split = program()
    longest = tl.cast(inner, tl.int64) // V * V
    if EDGES:
        # A row's body is as long, or a vector shorter; split 0 has what lies outside it.
        whole, shorter = count_in_body(longest, BLOCK), count_in_body(longest - V, BLOCK)
        count = outer_split * 0
        for n in range(outer_split, outer, tl.num_programs(2)):
            _, body_start, _, body_end, _ = row_bounds(n, channel, channels, inner, V, BLOCK)
            body = body_end - body_start
            count += tl.where(body == longest, whole, shorter)
            count += tl.where(tile_split == 0, inner - tl.maximum(body, 0), 0)
    else:
        rows = (outer - outer_split + tl.num_programs(2) - 1) // tl.num_programs(2)
        count = rows * count_in_body(longest, BLOCK)
    return count


@triton.jit
def count_in_body(length, BLOCK: tl.constexpr):
    """How many elements of a row's body of this length lie in this program's tiles."""
    step = tl.num_programs(1).to(tl.int64) * BLOCK
    left = tl.maximum(length - tl.program_id(1).to(tl.int64) * BLOCK, 0)
    return left // step * BLOCK + tl.minimum(left % step, BLOCK)
