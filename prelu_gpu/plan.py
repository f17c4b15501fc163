"""From a view and the rule table's row to a launch: a pure function, the same on every run.

A plan is data: printable, and tested without a GPU.
"""

import functools
import math
from dataclasses import dataclass

from .layout import DENSE, View
from .rules import NARROW_BYTES, VECTOR_BYTES, Kind, Rules

GRID_LIMIT = 65535
"""Most programs along a grid's second and third axis."""

CHANNELS_LIMIT = 2**31 - 1
"""Most programs along a grid's first axis."""

COLUMNS_LIMIT = 2**30
"""Columns are numbered in 32 bits, the padding of the last tile included."""

SMALLEST_BLOCK = 2
"""The compiler of triton 3.6 fails an assertion on an unmasked access to a block of one element."""

FULL_TILE = 0.95
"""Share of a tile's columns that must hold data for a fold to be wide enough."""

ODD_PLANE_TILES = 8
"""Tiles that a row off the vector grid must have not to be folded: its two edges, one access more,
are a small share of it then."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch as data."""

    grid: tuple[int, ...]
    num_warps: int
    sizes: dict[str, int | None]
    """The kernel's run-time sizes and gaps, by parameter name; None for a gap that is not there."""
    constants: dict[str, int]
    """The kernel's compile-time constants, by parameter name."""


@dataclass(frozen=True)
class Plan(Launch):
    """The launch of a forward or backward kernel."""

    kind: Kind
    view: View
    """Its `copies` must be made before the launch."""
    partials: tuple[int, int, int]
    """Partial sums that the launch leaves, of each kind: (splits, channels, inner)."""
    atomic: bool
    finish: bool
    """Whether the last programs add up the partial sums."""

    @functools.cached_property
    def partial_sums(self) -> int:
        """How many partial slope gradients there are."""
        return math.prod(self.partials)

    @functools.cached_property
    def direct(self) -> bool:
        """Whether the partial sums are the slope gradient itself: no second stage."""
        splits, _, inner = self.partials
        return splits * inner == 1


def make_plan(view: View, itemsize: int, rules: Rules) -> Plan:
    """Plans one launch over a non-empty view of elements of `itemsize` bytes."""
    # Columns alone have samples within their channels.
    kind = rules.kind if view.samples == 1 else Kind.COLUMN
    kind = kind or choose_kind(view, itemsize, rules)
    if kind is Kind.COLUMN:
        return _column_plan(view.copied(*_not_columns(view)), itemsize, rules)
    return _plane_plan(kind, view, itemsize, rules)


def choose_kind(view: View, itemsize: int, rules: Rules) -> Kind:
    """The kind of tile that suits a view."""
    if view.outer == view.channels == 1:
        return Kind.FLAT
    vector = _vector(view, itemsize)
    plane, tiles = Kind.PLANE, rules.plane_fill
    if view.inner % vector:
        plane, tiles = Kind.ODD_PLANE, ODD_PLANE_TILES
    if view.inner * itemsize >= tiles * rules.plane.size:
        return plane
    fold, _, _ = _fold(view.copied(*_not_columns(view)), itemsize, rules)
    columns = fold * view.channels * view.inner
    if view.inner == 1 and columns < COLUMNS_LIMIT:
        return Kind.COLUMN
    worthwhile = view.outer >= rules.column_rows * fold or _is_short(view, vector)
    if worthwhile and columns <= rules.partials and columns < COLUMNS_LIMIT:
        return Kind.COLUMN
    return plane


def _plane_plan(kind: Kind, view: View, itemsize: int, rules: Rules) -> Plan:
    outer, channels, inner = view[:3]
    if channels > CHANNELS_LIMIT:
        raise RuntimeError(
            f"prelu_gpu: got {channels} slopes; up to {CHANNELS_LIMIT} have kernels. "
            "torch.prelu takes more."
        )
    vector = _vector(view, itemsize)
    # Lanes of 2 bytes are so many that their addresses would take all registers.
    halves = 2 if vector * itemsize < NARROW_BYTES else 1
    block = min(rules.plane.size // itemsize // halves, max(vector, block_of(inner)))
    tiles = ceil_div(inner, block)
    splits = rules.plane.programs // channels
    outer_splits = _even(outer, min(splits, GRID_LIMIT))
    tile_splits = _even(tiles, min(splits // outer_splits, GRID_LIMIT))
    partials = outer_splits * tile_splits * channels
    return Plan(
        kind=kind,
        view=view,
        grid=(channels, tile_splits, outer_splits),
        num_warps=rules.plane.warps_for(block * itemsize),
        partials=(outer_splits * tile_splits, channels, 1),
        atomic=rules.atomic,
        finish=channels < partials <= rules.finish and not rules.atomic,
        sizes={
            "outer": outer,
            "channels": channels,
            "inner": inner,
            **_gap_arguments(view, vector, "outer", "channel"),
        },
        constants={
            "V": vector,
            "BLOCK": block,
            "EDGES": inner % vector != 0,
            "NARROW": view.narrow,
            "EXPANDED": view.grad_y.expanded,
            "ATOMIC": rules.atomic,
        },
    )


def _column_plan(view: View, itemsize: int, rules: Rules) -> Plan:
    outer, channels, inner = view[:3]
    fold, vector, block = _fold(view, itemsize, rules)
    columns = fold * channels * inner
    if columns >= COLUMNS_LIMIT:
        raise ValueError(f"columns are numbered in 32 bits, got {columns} of them")
    rows, left = divmod(outer, fold)
    tile_rows = rules.column.rows
    if view.gaps:
        # Rows that cannot be folded: more of them fill a tile.
        tile_rows = max(tile_rows, rules.column.size // itemsize // block)
    steps = ceil_div(rows, tile_rows)
    blocks = ceil_div(columns, block)
    programs = rules.column.programs // view.samples
    splits = min(programs // blocks, rules.partials // (columns * view.samples), GRID_LIMIT)
    row_splits = _even(steps, splits)
    return Plan(
        kind=Kind.COLUMN,
        view=view,
        grid=(blocks, row_splits, view.samples) if view.samples > 1 else (blocks, row_splits),
        num_warps=rules.column.warps_for(block * tile_rows * itemsize),
        partials=(row_splits * fold, channels, inner),
        atomic=rules.atomic,
        finish=False,
        sizes={
            "rows": rows,
            "vectors": columns // vector,
            "remainder": left * channels * inner,
            "channels": channels,
            "inner": inner,
            **_gap_arguments(view, vector, "outer"),
        },
        constants={
            "V": vector,
            "ROWS": tile_rows,
            "BLOCK": block,
            "REMAINDER": left != 0,
            "NARROW": view.narrow,
            "EXPANDED": view.grad_y.expanded,
            "ATOMIC": rules.atomic,
        },
    )


def make_sum_plan(partials: tuple[int, int, int], interpreted: bool) -> Launch:
    """Plans the second stage, which sums partial slope gradients (splits, channels, inner).

    Eight channels are one 32-byte sector of memory; 1024 terms a tile are 8 a thread.
    """
    splits, channels, inner = partials
    tile, widest = (2**20, 2**10) if interpreted else (2**10, 8)
    channel_block = min(next_power_of_2(channels), widest)
    term_block = min(block_of(splits * inner), tile // channel_block)
    return sum_launch(partials, channel_block, term_block)


def sum_launch(partials: tuple[int, int, int], channel_block: int, term_block: int) -> Launch:
    """The launch of a second stage whose programs own so many channels."""
    splits, channels, inner = partials
    return Launch(
        grid=(ceil_div(channels, channel_block),),
        num_warps=4,
        sizes={"splits": splits, "channels": channels, "inner": inner},
        constants={"CHANNEL_BLOCK": channel_block, "TERM_BLOCK": term_block},
    )


def _not_columns(view: View) -> list[str]:
    """Inputs whose rows of columns have gaps within, or several numbers for the rows."""
    return [
        name
        for name, gaps in view.inputs.items()
        if gaps.channel != 0 or (gaps.expanded and gaps.outer != 0)
    ]


def _gap_arguments(view: View, vector: int, *axes: str) -> dict[str, int | None]:
    """The kernels' arguments for the gaps of inputs: in vectors, None where one is dense."""
    return {
        f"{name}_{axis}_gap": None
        if gaps == DENSE
        else getattr(gaps, axis) // (1 if gaps.expanded else vector)
        for name, gaps in view.inputs.items()
        for axis in axes
    }


def _vector(view: View, itemsize: int) -> int:
    """Elements of the widest access at which rows lie alike in all tensors."""
    widest = max(NARROW_BYTES, itemsize) if view.narrow else VECTOR_BYTES
    between = view.numel if view.samples > 1 else 0
    return math.gcd(widest // itemsize, view.gaps, between)


def _is_short(view: View, vector: int) -> bool:
    """Whether a row would leave lanes of a warp without a vector."""
    return view.inner < 32 * vector


def _fold(view: View, itemsize: int, rules: Rules) -> tuple[int, int, int]:
    """Outer positions that make one row of columns, elements of a vector, columns of a tile.

    The fewest positions that make whole vectors and fill their tiles. Vectors are narrower if
    `outer` holds too few positions for whole ones, or if whole ones would leave too many partial
    sums; not so for rows that are long enough to be read in whole vectors one by one. Rows with
    gaps are not folded.
    """
    row = view.channels * view.inner
    whole = _vector(view, itemsize)
    unfolded = math.gcd(row, whole)
    step = min(whole // unfolded, next_power_of_2(view.outer + 1) // 2)
    while step > 1 and step * row > rules.partials and _is_short(view, whole):
        step //= 2
    vector = step * unfolded
    block = min(rules.column.size // itemsize // rules.column.rows, block_of(view.outer * row))
    if view.gaps:
        return 1, unfolded, min(block, block_of(row))
    fold = view.outer // step * step
    # Rows of 1 / (1 - FULL_TILE) tiles are full whatever their length.
    for tiles in range(1, 21):
        narrow = ceil_div(math.ceil(FULL_TILE * tiles * block), row * step) * step
        if narrow >= fold:
            break
        if narrow * row <= tiles * block or tiles == 20:
            fold = narrow
            break
    return fold, vector, min(block, block_of(fold * row))


def _even(steps: int, splits: int) -> int:
    """The fewest splits, up to `splits`, whose longest walk is as short; at least one."""
    if steps <= 1 or splits <= 1:
        return 1
    return ceil_div(steps, ceil_div(steps, splits))


def block_of(n: int) -> int:
    """The smallest block that holds n elements."""
    return max(SMALLEST_BLOCK, next_power_of_2(n))


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is n or more."""
    return 1 << (n - 1).bit_length()
