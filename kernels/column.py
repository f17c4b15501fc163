"""Kernels for short rows, or slopes that change with every element: tiles of columns.

The data is a matrix of `rows` x `columns`: `fold` outer positions of channels * inner elements make
one row, so that rows fill their tiles and are multiples of V elements, which are 128 bits unless
there are too few outer positions for that. The `remainder` elements after the last whole row are a
masked epilogue (REMAINDER), without alignment. The rows of an input may have gaps between them,
`outer_gap` vectors of V elements; dense inputs have None, and only dense rows are folded. NARROW is
plane.py's.

Program (block, row_split) owns BLOCK columns: it loads their slopes once and walks down the rows,
ROWS at a time, in steps of all row splits together, without a division in the loop. `walk_columns`
does, for every kernel here.
"""

import triton
import triton.language as tl

from .formula import add, backward_tile, forward_tile, load_weight, zeros


@triton.jit
def rows_of_program():
    """This program's row split, and how many of them there are."""
    return tl.program_id(1).to(tl.int64), tl.num_programs(1)


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
def as_rows(values):
    """Vectors of columns, as rows that broadcast over a tile."""
    rows = ()
    for i in tl.static_range(len(values)):
        rows = rows + (values[i][None, :],)
    return rows


@triton.jit
def add_rows(sums, shares, HELD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Adds shares to sums, the HELD vectors that a thread holds of a tile first."""
    added = ()
    for i in tl.static_range(len(sums)):
        held = tl.reshape(shares[i], (HELD, ROWS // HELD, BLOCK))
        added = added + (sums[i] + tl.sum(held, axis=0),)
    return added


@triton.jit
def walk_columns(
    TILE: tl.constexpr,
    SUMS: tl.constexpr,
    x_ptr,
    grad_y_ptr,
    result_ptr,
    coefficients,
    rows,
    vectors,
    remainder,
    x_outer_gap,
    grad_y_outer_gap,
    COMPUTE: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REMAINDER: tl.constexpr,
    NARROW: tl.constexpr,
    EXPANDED: tl.constexpr,
):
    """Applies a tile function to all of this program's tiles; sums the first SUMS of its shares."""
    row_split, row_splits = rows_of_program()
    column, exists = columns_of_program(vectors, V, BLOCK)
    # A thread adds up the two vectors that it holds of a tile: half the accumulators.
    HELD: tl.constexpr = 2 if ROWS > 1 else 1
    tile_sums = zeros(SUMS, (ROWS // HELD, BLOCK), COMPUTE)
    remainder_sums = zeros(SUMS, (BLOCK,), COMPUTE)

    for first_row in range(row_split * ROWS, rows, row_splits * ROWS):
        row, offsets, mask = tile_offsets(first_row, rows, vectors, column, exists, V, ROWS, NARROW)
        x_rows = row_pointers(x_ptr, row, x_outer_gap, V)
        grad_y_rows = grad_y_ptr
        if grad_y_ptr is not None:
            grad_y_rows = row_pointers(grad_y_ptr, row, grad_y_outer_gap, V)
        shares = TILE(
            x_rows, grad_y_rows, result_ptr, as_rows(coefficients), offsets, mask, COMPUTE, EXPANDED
        )
        tile_sums = add_rows(tile_sums, shares, HELD, ROWS, BLOCK)

    if REMAINDER:
        if row_split == row_splits - 1:
            offsets, mask = remainder_offsets(rows, vectors, remainder, column, V)
            shares = TILE(
                x_ptr, grad_y_ptr, result_ptr, coefficients, offsets, mask, COMPUTE, EXPANDED
            )
            remainder_sums = add(remainder_sums, shares)

    totals = ()
    for i in tl.static_range(SUMS):
        total = tl.sum(tile_sums[i], axis=0)
        if REMAINDER:
            total += remainder_sums[i]
        totals = totals + (total,)
    return totals


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
    column, _ = columns_of_program(vectors, V, BLOCK)
    # In range for columns that do not exist, too.
    channel = column // inner % channels
    weight = load_weight(weight_ptr, negative_slope, channel, COMPUTE)
    walk_columns(
        forward_tile,
        0,
        x_ptr,
        None,
        y_ptr,
        (weight,),
        rows,
        vectors,
        remainder,
        x_outer_gap,
        None,
        COMPUTE,
        V,
        ROWS,
        BLOCK,
        REMAINDER,
        NARROW,
        False,
    )


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
    row_split, _ = rows_of_program()
    column, exists = columns_of_program(vectors, V, BLOCK)
    # In range for columns that do not exist, too.
    channel = column // inner % channels
    weight = load_weight(weight_ptr, negative_slope, channel, COMPUTE)
    SUMS: tl.constexpr = 0 if sums_ptr is None else 1
    totals = walk_columns(
        backward_tile,
        SUMS,
        x_ptr,
        grad_y_ptr,
        grad_x_ptr,
        (weight,),
        rows,
        vectors,
        remainder,
        x_outer_gap,
        grad_y_outer_gap,
        COMPUTE,
        V,
        ROWS,
        BLOCK,
        REMAINDER,
        NARROW,
        EXPANDED,
    )
    if sums_ptr is not None:
        if ATOMIC:
            tl.atomic_add(sums_ptr + channel, totals[0], exists, sem="relaxed")
        else:
            partials = row_split * vectors * V + column
            tl.store(sums_ptr + partials, totals[0], exists)
