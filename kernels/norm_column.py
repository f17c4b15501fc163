"""Norms with PReLU over tiles of columns: column.py's walk, with norm.py's tables.

Samples that have channels of their own, as an instance norm's, lie `sample_vectors` vectors of V
elements apart and are the third axis of the grid; None where all outer positions share channels.
"""

import triton
import triton.language as tl

from .column import columns_of_program, rows_of_program, walk_columns
from .formula import backward_tile, forward_tile, load
from .norm import (
    load_coefficients,
    median,
    moments_tile,
    store_moments,
)


@triton.jit
def sample_start(ptr, sample_vectors, V: tl.constexpr):
    """Where this program's sample begins; samples have channels of their own."""
    if sample_vectors is not None:
        ptr += tl.program_id(2).to(tl.int64) * sample_vectors * V
    return ptr


@triton.jit
def channels_of_samples(channel, channels, sample_vectors):
    """This program's channels among those of all samples, and the number of these."""
    if sample_vectors is not None:
        channel += tl.program_id(2) * channels
        channels *= tl.num_programs(2)
    return channel, channels


@triton.jit
def column_norm_forward(
    x_ptr,
    table_ptr,
    y_ptr,
    rows,
    vectors,
    remainder,
    channels,
    inner,
    x_outer_gap,
    sample_vectors,
    COMPUTE: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REMAINDER: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Reads x once, writes y once: PReLU behind a norm, whose table is norm.py's."""
    column, _ = columns_of_program(vectors, V, BLOCK)
    channel, all_channels = channels_of_samples(
        column // inner % channels, channels, sample_vectors
    )
    coefficients = load_coefficients(table_ptr, None, channel, all_channels)
    x_ptr = sample_start(x_ptr, sample_vectors, V)
    y_ptr = sample_start(y_ptr, sample_vectors, V)
    walk_columns(
        forward_tile,
        0,
        x_ptr,
        None,
        y_ptr,
        coefficients,
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
def column_norm_backward(
    grad_y_ptr,
    x_ptr,
    table_ptr,
    correction_ptr,
    grad_x_ptr,
    sums_ptr,
    rows,
    vectors,
    remainder,
    channels,
    inner,
    grad_y_outer_gap,
    x_outer_gap,
    sample_vectors,
    COMPUTE: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REMAINDER: tl.constexpr,
    NARROW: tl.constexpr,
    EXPANDED: tl.constexpr,
    FOLDS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Reads grad_y and x once, writes grad_x once; grad_x_ptr may be None.

    EXPANDED: grad_y is one number.
    sums_ptr is SUMS tables of partial sums, as partial_places says.
    """
    column, exists = columns_of_program(vectors, V, BLOCK)
    channel, all_channels = channels_of_samples(
        column // inner % channels, channels, sample_vectors
    )
    coefficients = load_coefficients(table_ptr, correction_ptr, channel, all_channels)
    grad_y_ptr = sample_start(grad_y_ptr, sample_vectors, V)
    x_ptr = sample_start(x_ptr, sample_vectors, V)
    if grad_x_ptr is not None:
        grad_x_ptr = sample_start(grad_x_ptr, sample_vectors, V)
    totals = walk_columns(
        backward_tile,
        SUMS,
        x_ptr,
        grad_y_ptr,
        grad_x_ptr,
        coefficients,
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
    if SUMS > 0:
        places, size, mask = partial_places(
            column, exists, vectors, channels, inner, sample_vectors, V, BLOCK, FOLDS
        )
        for i in tl.static_range(SUMS):
            tl.store(sums_ptr + i * size + places, sum_folds(totals[i], BLOCK, FOLDS), mask)


@triton.jit
def column_moments(
    x_ptr,
    moments_ptr,
    rows,
    vectors,
    remainder,
    channels,
    inner,
    x_outer_gap,
    sample_vectors,
    COMPUTE: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REMAINDER: tl.constexpr,
    NARROW: tl.constexpr,
    FOLDS: tl.constexpr,
):
    """Reads x once; leaves four tables of moments, as partial_places says."""
    row_split, row_splits = rows_of_program()
    column, exists = columns_of_program(vectors, V, BLOCK)
    x_ptr = sample_start(x_ptr, sample_vectors, V)
    first_row = row_split * ROWS
    about = median_of_rows(x_ptr, first_row, rows, vectors, x_outer_gap, column, exists, COMPUTE, V)
    known = sum_folds(exists.to(COMPUTE), BLOCK, FOLDS)
    about = sum_folds(about, BLOCK, FOLDS) / tl.maximum(known, 1.0)
    about_columns = about
    if FOLDS > 1:
        about_columns = tl.broadcast_to(about[None, :], (FOLDS, BLOCK // FOLDS))
        about_columns = tl.reshape(about_columns, (BLOCK,))
    totals = walk_columns(
        moments_tile,
        2,
        x_ptr,
        None,
        None,
        (about_columns,),
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
    step = row_splits.to(tl.int64) * ROWS
    left = rows - first_row
    count = (left // step * ROWS + tl.minimum(left % step, ROWS)).to(COMPUTE) * exists.to(COMPUTE)
    if REMAINDER:
        if row_split == row_splits - 1:
            count += (column < remainder).to(COMPUTE)
    places, size, mask = partial_places(
        column, exists, vectors, channels, inner, sample_vectors, V, BLOCK, FOLDS
    )
    count = sum_folds(count, BLOCK, FOLDS)
    total, square = sum_folds(totals[0], BLOCK, FOLDS), sum_folds(totals[1], BLOCK, FOLDS)
    store_moments(moments_ptr, places, size, mask, count, about, total, square)


@triton.jit
def median_of_rows(
    x_ptr,
    first_row,
    rows,
    vectors,
    outer_gap,
    column,
    exists,
    COMPUTE: tl.constexpr,
    V: tl.constexpr,
):
    """The median of three rows' elements in each column."""
    step = tl.cast(vectors, tl.int64) * V
    if outer_gap is not None:
        step += tl.cast(outer_gap, tl.int64) * V
    x_ptr += column
    a = load(x_ptr + first_row * step, exists, COMPUTE)
    b = load(x_ptr + tl.minimum(first_row + 1, rows - 1) * step, exists, COMPUTE)
    c = load(x_ptr + tl.minimum(first_row + 2, rows - 1) * step, exists, COMPUTE)
    return median(a, b, c)


@triton.jit
def sum_folds(columns, BLOCK: tl.constexpr, FOLDS: tl.constexpr):
    """Sums the FOLDS outer positions that a program's columns hold of each element of a row."""
    if FOLDS > 1:
        columns = tl.sum(tl.reshape(columns, (FOLDS, BLOCK // FOLDS)), axis=0)
    return columns


@triton.jit
def partial_places(
    column,
    exists,
    vectors,
    channels,
    inner,
    sample_vectors,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLDS: tl.constexpr,
):
    """Where this program's sums lie in a table, the table's size, and which of the sums exist.

    A table is (splits, samples * channels, inner). Its splits are those of the rows by the outer
    positions in a row or, where programs have summed FOLDS of these, by the blocks of columns.
    """
    row_split, row_splits = rows_of_program()
    row = channels * inner
    if FOLDS > 1:
        place = tl.arange(0, BLOCK // FOLDS)
        split = row_split * tl.num_programs(0) + tl.program_id(0)
        splits = row_splits.to(tl.int64) * tl.num_programs(0)
        mask = place < row  # all of them
    else:
        place = column % row
        split = row_split * (vectors * V // row) + column // row
        splits = row_splits.to(tl.int64) * (vectors * V // row)
        mask = exists
    if sample_vectors is not None:
        split = split * tl.num_programs(2) + tl.program_id(2)
        splits *= tl.num_programs(2)
    return split * row + place, splits * row, mask
