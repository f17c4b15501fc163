"""Kernels for short rows, or slopes that change with every element: tiles of columns.

The data is a matrix of `rows` x `columns`: `fold` outer positions of channels * inner elements make
one row, so that rows fill their tiles and are multiples of V elements, which are 128 bits unless
there are too few outer positions for that. The `remainder` elements after the last whole row are a
masked epilogue (REMAINDER), without alignment.

Program (block, row_split) owns BLOCK columns: it loads their slopes once and walks down the rows,
ROWS at a time, in steps of all row splits together, without a division in the loop.
"""

import triton
import triton.language as tl

from .formula import backward_tile, forward_tile


@triton.jit
def columns_of_program(vectors, V: tl.constexpr, BLOCK: tl.constexpr):
    """This program's columns, and which of them exist.

    A row's length comes in vectors, so that the compiler knows it as a multiple of V.
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return column, column < vectors * V


@triton.jit
def tile_offsets(first_row, rows, vectors, column, exists, V: tl.constexpr, ROWS: tl.constexpr):
    """Offsets and mask of the tile that begins at first_row."""
    row = first_row + tl.arange(0, ROWS)
    offsets = (row.to(tl.int64) * vectors * V)[:, None] + column[None, :]
    return offsets, (row < rows)[:, None] & exists[None, :]


@triton.jit
def remainder_offsets(rows, vectors, remainder, column, V: tl.constexpr):
    """Offsets and mask of the elements after the last whole row."""
    return tl.cast(rows, tl.int64) * vectors * V + column, column < remainder


@triton.jit
def column_forward(
    x_ptr,
    weight_ptr,
    y_ptr,
    rows,
    vectors,
    remainder,
    channels,
    inner,
    COMPUTE: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REMAINDER: tl.constexpr,
):
    """Reads x once, writes y once."""
    row_split, row_splits = tl.program_id(1), tl.num_programs(1)
    column, exists = columns_of_program(vectors, V, BLOCK)
    weight = tl.load(weight_ptr + column // inner % channels, exists).to(COMPUTE)

    for first_row in range(row_split * ROWS, rows, row_splits * ROWS):
        offsets, mask = tile_offsets(first_row, rows, vectors, column, exists, V, ROWS)
        forward_tile(x_ptr, weight[None, :], y_ptr, offsets, mask, COMPUTE)

    if REMAINDER:
        if row_split == row_splits - 1:
            offsets, mask = remainder_offsets(rows, vectors, remainder, column, V)
            forward_tile(x_ptr, weight, y_ptr, offsets, mask, COMPUTE)


@triton.jit
def column_backward(
    grad_y_ptr,
    x_ptr,
    weight_ptr,
    grad_x_ptr,
    grad_weight_ptr,
    rows,
    vectors,
    remainder,
    channels,
    inner,
    COMPUTE: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REMAINDER: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """Reads grad_y and x once, writes grad_x once; either gradient's pointer may be None.

    grad_weight_ptr is a table of partial sums, (row_splits, columns), of which every program writes
    a run; with ATOMIC it is the zero-filled sums, (channels,).
    """
    row_split, row_splits = tl.program_id(1), tl.num_programs(1)
    column, exists = columns_of_program(vectors, V, BLOCK)
    channel = column // inner % channels
    weight = tl.load(weight_ptr + channel, exists).to(COMPUTE)
    # A thread adds up the two vectors that it holds of a tile: half the accumulators.
    HELD: tl.constexpr = 2 if ROWS > 1 else 1
    tile_sums = tl.zeros((ROWS // HELD, BLOCK), COMPUTE)
    remainder_sums = tl.zeros((BLOCK,), COMPUTE)

    for first_row in range(row_split * ROWS, rows, row_splits * ROWS):
        offsets, mask = tile_offsets(first_row, rows, vectors, column, exists, V, ROWS)
        shares = backward_tile(
            grad_y_ptr, x_ptr, weight[None, :], grad_x_ptr, offsets, mask, COMPUTE
        )
        tile_sums += tl.sum(tl.reshape(shares, (HELD, ROWS // HELD, BLOCK)), axis=0)

    if REMAINDER:
        if row_split == row_splits - 1:
            offsets, mask = remainder_offsets(rows, vectors, remainder, column, V)
            remainder_sums += backward_tile(
                grad_y_ptr, x_ptr, weight, grad_x_ptr, offsets, mask, COMPUTE
            )

    if grad_weight_ptr is not None:
        grad_weight = tl.sum(tile_sums, axis=0)
        if REMAINDER:
            grad_weight += remainder_sums
        if ATOMIC:
            tl.atomic_add(grad_weight_ptr + channel, grad_weight, exists, sem="relaxed")
        else:
            partials = row_split.to(tl.int64) * vectors * V + column
            tl.store(grad_weight_ptr + partials, grad_weight, exists)
