"""Kernels for short rows, or slopes that change with every element: tiles of columns.

The data is a matrix of `rows` x `columns`: `fold` outer positions of channels * inner elements make
one row, so that rows are multiples of V elements (128 bits) and fill their tiles. The `remainder`
elements after the last whole row are a masked epilogue (REMAINDER), without alignment.

Program (row_split, block) owns BLOCK columns: it loads their slopes once and walks down the rows,
ROWS at a time, in steps of all row splits together, without a division in the loop.
"""

import triton
import triton.language as tl

from .formula import prelu, prelu_grad_weight, prelu_grad_x


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
        x = tl.load(x_ptr + offsets, mask).to(COMPUTE)
        tl.store(y_ptr + offsets, prelu(x, weight[None, :]), mask)

    if REMAINDER:
        if row_split == row_splits - 1:
            offsets = tl.cast(rows, tl.int64) * vectors * V + column
            mask = column < remainder
            x = tl.load(x_ptr + offsets, mask).to(COMPUTE)
            tl.store(y_ptr + offsets, prelu(x, weight), mask)


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
    tile_sums = tl.zeros((ROWS, BLOCK), COMPUTE)
    remainder_sums = tl.zeros((BLOCK,), COMPUTE)

    for first_row in range(row_split * ROWS, rows, row_splits * ROWS):
        offsets, mask = tile_offsets(first_row, rows, vectors, column, exists, V, ROWS)
        x = tl.load(x_ptr + offsets, mask, 0.0).to(COMPUTE)
        grad_y = tl.load(grad_y_ptr + offsets, mask, 0.0).to(COMPUTE)
        if grad_x_ptr is not None:
            tl.store(grad_x_ptr + offsets, prelu_grad_x(grad_y, x, weight[None, :]), mask)
        if grad_weight_ptr is not None:
            tile_sums += prelu_grad_weight(grad_y, x)

    if REMAINDER:
        if row_split == row_splits - 1:
            offsets = tl.cast(rows, tl.int64) * vectors * V + column
            mask = column < remainder
            x = tl.load(x_ptr + offsets, mask, 0.0).to(COMPUTE)
            grad_y = tl.load(grad_y_ptr + offsets, mask, 0.0).to(COMPUTE)
            if grad_x_ptr is not None:
                tl.store(grad_x_ptr + offsets, prelu_grad_x(grad_y, x, weight), mask)
            if grad_weight_ptr is not None:
                remainder_sums += prelu_grad_weight(grad_y, x)

    if grad_weight_ptr is not None:
        grad_weight = tl.sum(tile_sums, axis=0)
        if REMAINDER:
            grad_weight += remainder_sums
        if ATOMIC:
            tl.atomic_add(grad_weight_ptr + channel, grad_weight, exists, sem="relaxed")
        else:
            partials = row_split.to(tl.int64) * vectors * V + column
            tl.store(grad_weight_ptr + partials, grad_weight, exists)
