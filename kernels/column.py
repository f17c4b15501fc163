"""Kernels for short rows, or slopes that change with every element: tiles of columns.

The data is a matrix of `rows` x `columns`: `fold` outer positions of channels * inner elements make
one row, so that rows fill their tiles and are multiples of V elements, which are 128 bits unless
there are too few outer positions for that. The `remainder` elements after the last whole row are a
masked epilogue (REMAINDER), without alignment. The rows of an input may have gaps between them,
`outer_gap` vectors of V elements; dense inputs have None, and only dense rows are folded. NARROW is
plane.py's.

Program (block, row_split) owns BLOCK columns: it loads their slopes once and walks down the rows,
ROWS at a time, in steps of all row splits together, without a division in the loop.
"""

import triton
import triton.language as tl

from .formula import backward_tile, forward_tile, load_weight


@triton.jit
def columns_of_program(vectors, V: tl.constexpr, BLOCK: tl.constexpr):
    """This program's columns, and which of them exist.

    A row's length comes in vectors, so that the compiler knows it as a multiple of V.
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return column, column < vectors * V


@triton.jit
def tile_offsets(
    first_row,
    rows,
    vectors,
    column,
    exists,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Rows, offsets and mask of the tile that begins at first_row."""
    row = first_row + tl.arange(0, ROWS)
    row_start = (row.to(tl.int64) * vectors * V)[:, None]
    offsets = row_start + column[None, :]
    if NARROW:
        offsets = tl.multiple_of(offsets, (1, V))
    return row, offsets, (row < rows)[:, None] & exists[None, :]


@triton.jit
def row_pointers(ptr, row, outer_gap, V: tl.constexpr):
    """What the dense offsets of a tile's rows are added to."""
    if outer_gap is not None:
        ptr += (row.to(tl.int64) * outer_gap * V)[:, None]
    return ptr


@triton.jit
def remainder_offsets(rows, vectors, remainder, column, V: tl.constexpr):
    """Offsets and mask of the elements after the last whole row."""
    return tl.cast(rows, tl.int64) * vectors * V + column, column < remainder


@triton.jit
def column_forward(
    x_ptr,
    weight_ptr,
    negative_slope,
    y_ptr,
    rows,
    vectors,
    remainder,
    channels,
    inner,
    x_outer_gap,
    COMPUTE: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REMAINDER: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Reads x once, writes y once."""
    row_split, row_splits = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    column, exists = columns_of_program(vectors, V, BLOCK)
    # In range for columns that do not exist, too.
    channel = column // inner % channels
    weight = load_weight(weight_ptr, negative_slope, channel, COMPUTE)

    for first_row in range(row_split * ROWS, rows, row_splits * ROWS):
        row, offsets, mask = tile_offsets(first_row, rows, vectors, column, exists, V, ROWS, NARROW)
        x_rows = row_pointers(x_ptr, row, x_outer_gap, V)
        forward_tile(x_rows, weight[None, :], y_ptr, offsets, mask, COMPUTE)

    if REMAINDER:
        if row_split == row_splits - 1:
            offsets, mask = remainder_offsets(rows, vectors, remainder, column, V)
            forward_tile(x_ptr, weight, y_ptr, offsets, mask, COMPUTE)


@triton.jit
def column_backward(
    grad_y_ptr,
    x_ptr,
    weight_ptr,
    negative_slope,
    grad_x_ptr,
    sums_ptr,
    rows,
    vectors,
    remainder,
    channels,
    inner,
    grad_y_outer_gap,
    x_outer_gap,
    COMPUTE: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REMAINDER: tl.constexpr,
    NARROW: tl.constexpr,
    EXPANDED: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """Reads grad_y and x once, writes grad_x once; grad_x_ptr or sums_ptr may be None.

    EXPANDED: grad_y is one number.
    sums_ptr is a table of partial sums, (row_splits, columns), of which every program writes
    a run; with ATOMIC it is the zero-filled sums, (channels,).
    """
    row_split, row_splits = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    column, exists = columns_of_program(vectors, V, BLOCK)
    # In range for columns that do not exist, too.
    channel = column // inner % channels
    weight = load_weight(weight_ptr, negative_slope, channel, COMPUTE)
    # A thread adds up the two vectors that it holds of a tile: half the accumulators.
    HELD: tl.constexpr = 2 if ROWS > 1 else 1
    tile_sums = tl.zeros((ROWS // HELD, BLOCK), COMPUTE)
    remainder_sums = tl.zeros((BLOCK,), COMPUTE)

    for first_row in range(row_split * ROWS, rows, row_splits * ROWS):
        row, offsets, mask = tile_offsets(first_row, rows, vectors, column, exists, V, ROWS, NARROW)
        x_rows = row_pointers(x_ptr, row, x_outer_gap, V)
        grad_y_rows = row_pointers(grad_y_ptr, row, grad_y_outer_gap, V)
        shares = backward_tile(
            grad_y_rows, x_rows, weight[None, :], grad_x_ptr, offsets, mask, COMPUTE, EXPANDED
        )
        tile_sums += tl.sum(tl.reshape(shares, (HELD, ROWS // HELD, BLOCK)), axis=0)

    if REMAINDER:
        if row_split == row_splits - 1:
            offsets, mask = remainder_offsets(rows, vectors, remainder, column, V)
            remainder_sums += backward_tile(
                grad_y_ptr, x_ptr, weight, grad_x_ptr, offsets, mask, COMPUTE, EXPANDED
            )

    if sums_ptr is not None:
        grad_weight = tl.sum(tile_sums, axis=0)
        if REMAINDER:
            grad_weight += remainder_sums
        if ATOMIC:
            tl.atomic_add(sums_ptr + channel, grad_weight, exists, sem="relaxed")
        else:
            partials = row_split * vectors * V + column
            tl.store(sums_ptr + partials, grad_weight, exists)
