"""From a tensor's layout to a launch: a pure function, the same on every run, printable.

The operation is elementwise, so it runs over memory and not over dimensions: a dense tensor of any
layout is seen as (outer, channels, inner), and a small table of rules picks the tiles. Nothing is
tuned while a program runs.
"""

import enum
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

VECTOR_BYTES = 16
"""One thread's widest access to memory."""

GRID_LIMIT = 65535
"""Most programs along a grid's second and third axis."""

CHANNELS_LIMIT = 2**31 - 1
"""Most programs along a grid's first axis."""

COLUMNS_LIMIT = 2**30
"""Columns are numbered in 32 bits, the padding of the last tile included."""

SMALLEST_BLOCK = 2
"""The compiler of triton 3.6 fails an assertion on an unmasked access to a block of one element."""

UNBOUNDED = 2**63 - 1

FULL_TILE = 0.95
"""Share of a tile's columns that must hold data for a fold to be wide enough."""

SMALL = 2**22
"""Elements below which a call of PyTorch's operator ends before one of a kernel, by arithmetic: a
launch through Triton takes the host about 17 microseconds, and so long does PyTorch's forward, at
some 2.6 TB/s, take an H100 for 2**22 elements of float32."""


ODD_PLANE_TILES = 8
"""Tiles that a row off the vector grid must have not to be folded: its two edges, one access more,
are a small share of it then."""


class Kind(enum.Enum):
    """How tiles lie over the data."""

    FLAT = "flat"
    """One slope: the data is one row."""
    PLANE = "plane"
    """Long aligned rows: a tile lies in one row and has one slope."""
    COLUMN = "column"
    """Short rows: a tile is a run of columns with a slope each, walked down the rows."""
    ODD_PLANE = "odd plane"
    """Long rows that begin and end off the vector grid: an aligned body and masked edges."""


class Gaps(NamedTuple):
    """What lies between the rows of an input, in elements, beside the rows of dense memory."""

    outer: int = 0
    """More from one outer position to the next."""
    channel: int = 0
    """More from one channel to the next."""
    expanded: bool = False
    """A row is one number, as in a gradient that `sum` makes; the gaps are then the strides."""


DENSE = Gaps()


class View(NamedTuple):
    """A result's memory in order: element (n, c, i) has slope c; and how inputs lie beside it."""

    outer: int
    channels: int
    inner: int
    x: Gaps = DENSE
    grad_y: Gaps = DENSE
    copies: tuple[str, ...] = ()
    """Inputs that lie in no such way: this pass copies them into the result's layout."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.outer * self.channels * self.inner

    @property
    def inputs(self) -> dict[str, Gaps]:
        """The gaps of each input."""
        return {"x": self.x, "grad_y": self.grad_y}

    @property
    def gaps(self) -> int:
        """The greatest common divisor of all gaps; 0 where there are none."""
        dense_rows = [gaps for gaps in self.inputs.values() if not gaps.expanded]
        return math.gcd(*(gap for gaps in dense_rows for gap in (gaps.outer, gaps.channel)))

    def copied(self, *names: str) -> "View":
        """The same view with inputs copied."""
        x = DENSE if "x" in names else self.x
        grad_y = DENSE if "grad_y" in names else self.grad_y
        return self._replace(x=x, grad_y=grad_y, copies=self.copies + names)


@functools.lru_cache(maxsize=4096)
def is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether a tensor's elements fill their memory without gaps or overlaps, in any order."""
    expected = 1
    for size, step in sorted(
        ((size, step) for size, step in zip(shape, stride, strict=True) if size != 1),
        key=lambda pair: pair[1],
    ):
        if step != expected:
            return False
        expected *= size
    return True


def dense_stride(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """Strides that PyTorch gives the result of an elementwise operation on a tensor.

    Its own if it is dense, else dense ones in their order, by the sort of PyTorch's TensorIterator:
    of equal strides the smaller size is the inner, and those of 0 are passed over.
    """
    if 0 in shape or is_dense(shape, stride):
        return stride
    order = list(reversed(range(len(shape))))  # innermost first
    for last in range(1, len(order)):
        place = last
        for other in reversed(range(last)):
            inner, outer = ((stride[order[i]], shape[order[i]]) for i in (other, place))
            if 0 in (inner[0], outer[0]):
                continue
            if inner > outer:
                order[other], order[place] = order[place], order[other]
                place = other
            elif inner[0] < outer[0]:
                break
    dense, step = [0] * len(shape), 1
    for d in order:
        dense[d] = step
        step *= shape[d]
    return tuple(dense)


def same_layout(shape: tuple[int, ...], stride: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two tensors of one shape lie alike in memory; a dimension of size 1 has no say."""
    return all(size == 1 or a == b for size, a, b in zip(shape, stride, other, strict=True))


def view(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    channel_dim: int | None,
    x: tuple[int, ...] | None = None,
    grad_y: tuple[int, ...] | None = None,
) -> View:
    """The view of a dense, non-empty result, and of what it is made from.

    Args:
        shape: the tensors' shape.
        stride: the result's strides in elements, dense, in any order.
        channel_dim: the dimension the slope varies over; None for one shared slope.
        x: strides of the input; None for the result's.
        grad_y: strides of the output gradient; None for the result's.
    """
    if channel_dim is not None and shape[channel_dim] == 1:
        channel_dim = None
    inputs = {
        name: strides
        for name, strides in (("x", x), ("grad_y", grad_y))
        if strides is not None and not same_layout(shape, stride, strides)
    }
    # An output gradient is copied rather than the input, and both only where neither fits alone.
    for copies in ((), ("grad_y",), ("x",), ("x", "grad_y")):
        if all(name in inputs for name in copies):
            rest = {name: inputs[name] for name in inputs if name not in copies}
            joint = _joint_view(shape, stride, channel_dim, rest)
            if joint is not None:
                return joint._replace(copies=copies)
    raise ValueError(f"a tensor of shape {shape} and strides {stride} is not dense")


def _joint_view(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    channel_dim: int | None,
    inputs: dict[str, tuple[int, ...]],
) -> View | None:
    """The view in which all tensors are rows of elements, outer x channels of them, if any."""
    tensors = [stride, *inputs.values()]
    # Runs of dimensions that every tensor walks like one: (size, strides), outermost first.
    runs: list[tuple[int, list[int]]] = []
    channel_run = None
    for d in sorted(range(len(shape)), key=stride.__getitem__, reverse=True):
        steps = [strides[d] for strides in tensors]
        if shape[d] == 1:
            continue
        if d == channel_dim:
            channel_run = len(runs)
        elif runs and channel_run != len(runs) - 1:
            size, outer_steps = runs[-1]
            if outer_steps == [shape[d] * step for step in steps]:
                runs[-1] = size * shape[d], steps
                continue
        runs.append((shape[d], steps))

    nothing = 1, [0] * len(tensors)
    if channel_run is None:
        before, channel, after = runs[:-1], nothing, runs[-1:]
    else:
        before, after = runs[:channel_run], runs[channel_run + 1 :]
        channel = runs[channel_run]
    if len(before) > 1 or len(after) > 1:
        return None
    outer, channels, inner = (*before, nothing)[0], channel, (*after, nothing)[0]
    result = View(outer[0], channels[0], inner[0])
    found = {}
    for tensor, name in enumerate(inputs, 1):
        gaps = _gaps(result, outer[1][tensor], channels[1][tensor], inner[1][tensor])
        if gaps is None or (gaps.expanded and name == "x"):
            return None
        found[name] = gaps
    return result._replace(x=found.get("x", DENSE), grad_y=found.get("grad_y", DENSE))


def _gaps(view: View, outer: int, channel: int, inner: int) -> Gaps | None:
    """The gaps of an input of these strides, if its rows are elements in order or one number."""
    innermost = inner if view.inner > 1 else channel if view.channels > 1 else outer
    if innermost == 0:
        return Gaps(outer, channel, expanded=True)
    if innermost != 1:
        return None
    return Gaps(
        outer - view.channels * view.inner if view.outer > 1 else 0,
        channel - view.inner if view.channels > 1 else 0,
    )


@dataclass(frozen=True)
class Tile:
    """What one program reads at a time."""

    size: int
    """Bytes of x."""
    num_warps: int
    programs: int
    """Programs beyond which work is split no further."""
    rows: int = 1
    """Rows of a column tile; the rest of its size is columns."""

    def warps_for(self, size: int) -> int:
        """Warps of a tile that is smaller: fewer, rather than threads without a whole vector."""
        return max(1, min(self.num_warps, 2 * self.num_warps * size // self.size))


@dataclass(frozen=True)
class Rules:
    """What decides a plan besides the tensor: one row of the rule table."""

    plane: Tile
    column: Tile
    column_rows: int
    """Rows that columns must have where rows are longer than a warp's access."""
    partials: int
    """Partial sums beyond which columns are split no further."""
    plane_fill: float = 0.75
    """Share of a plane tile that a row must fill for rows not to be folded into columns."""
    finish: int = 0
    """Partial sums of planes up to which their last programs add them up, without a launch."""
    atomic: bool = False
    """Add slope gradients atomically, in no fixed order, rather than in two stages."""
    kind: Kind | None = None
    """Force this kind of tile, for tests and benchmarks."""


def gpu_rules(multiprocessors: int, itemsize: int, backward: bool, warp_size: int = 32) -> Rules:
    """The rule table's row for a GPU: arithmetic and machine code, until a GPU has measured it.

    Two 128-bit accesses a thread, four in a 16-bit forward, keep 48 to 128 KiB in flight on a
    multiprocessor of sm_90, by the registers that its kernels take (benchmarks/machine_code.py).
    Plane programs are many waves, which even out their ends. Column programs leave partial sums,
    kept to 2**18: narrow tiles of many rows, and eight programs a multiprocessor, about what its
    registers hold at once. With eight rows or more these sums, written and read, add under a tenth
    to the traffic. That last programs add up 2**14 plane sums, 64 KiB, at most, is a guess.
    """
    vectors = 4 if itemsize == 2 and not backward else 2
    size = vectors * 4 * warp_size * VECTOR_BYTES
    if backward:
        column = Tile(size, num_warps=4, programs=8 * multiprocessors, rows=8)
    else:
        rows = 4 if itemsize == 2 else 1
        column = Tile(size, num_warps=4, programs=64 * multiprocessors, rows=rows)
    return Rules(
        plane=Tile(size, num_warps=4, programs=64 * multiprocessors),
        column=column,
        column_rows=8,
        partials=2**18 if backward else UNBOUNDED,
        finish=2**14,
    )


def interpreter_rules(itemsize: int) -> Rules:
    """The rule table's row for Triton's interpreter, whose cost is per program, not per element."""
    # Triton's largest tile.
    tile = Tile(size=2**20 * itemsize, num_warps=1, programs=1)
    return Rules(plane=tile, column=tile, column_rows=1, partials=UNBOUNDED)


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
    """Partial slope gradients that the launch leaves: (splits, channels, inner)."""
    atomic: bool
    finish: bool
    """Whether the last programs add up the partial sums."""

    @property
    def direct(self) -> bool:
        """Whether the partial sums are the slope gradient itself: no second stage."""
        splits, _, inner = self.partials
        return splits * inner == 1


def plan(view: View, itemsize: int, rules: Rules) -> Plan:
    """Plans one launch over a non-empty view of elements of `itemsize` bytes."""
    kind = rules.kind or choose_kind(view, itemsize, rules)
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
    block = min(rules.plane.size // itemsize, max(vector, _block(inner)))
    tiles = _ceil_div(inner, block)
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
    steps = _ceil_div(rows, tile_rows)
    blocks = _ceil_div(columns, block)
    splits = min(rules.column.programs // blocks, rules.partials // columns, GRID_LIMIT)
    row_splits = _even(steps, splits)
    return Plan(
        kind=Kind.COLUMN,
        view=view,
        grid=(blocks, row_splits),
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
            "EXPANDED": view.grad_y.expanded,
            "ATOMIC": rules.atomic,
        },
    )


def sum_plan(partials: tuple[int, int, int], interpreted: bool) -> Launch:
    """Plans the second stage, which sums partial slope gradients (splits, channels, inner).

    Eight channels are one 32-byte sector of memory; 1024 terms a tile are 8 a thread.
    """
    splits, channels, inner = partials
    tile, widest = (2**20, 2**10) if interpreted else (2**10, 8)
    channel_block = min(_next_power_of_2(channels), widest)
    term_block = min(_block(splits * inner), tile // channel_block)
    return Launch(
        grid=(_ceil_div(channels, channel_block),),
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
    return math.gcd(VECTOR_BYTES // itemsize, view.gaps)


def _is_short(view: View, vector: int) -> bool:
    """Whether a row would leave lanes of a warp without a vector."""
    return view.inner < 32 * vector


def _fold(view: View, itemsize: int, rules: Rules) -> tuple[int, int, int]:
    """Outer positions that make one row of columns, elements of a vector, columns of a tile.

    The fewest positions that make whole vectors and fill their tiles. Vectors are narrower where
    `outer` holds too few for whole ones, or their partial sums were too many, though not for rows
    long enough to be read in whole vectors one by one. Rows with gaps are not folded.
    """
    row = view.channels * view.inner
    whole = _vector(view, itemsize)
    unfolded = math.gcd(row, whole)
    step = min(whole // unfolded, _next_power_of_2(view.outer + 1) // 2)
    while step > 1 and step * row > rules.partials and _is_short(view, whole):
        step //= 2
    vector = step * unfolded
    block = min(rules.column.size // itemsize // rules.column.rows, _block(view.outer * row))
    if view.gaps:
        return 1, unfolded, min(block, _block(row))
    fold = view.outer // step * step
    # Rows of 1 / (1 - FULL_TILE) tiles are full whatever their length.
    for tiles in range(1, 21):
        narrow = _ceil_div(math.ceil(FULL_TILE * tiles * block), row * step) * step
        if narrow >= fold:
            break
        if narrow * row <= tiles * block or tiles == 20:
            fold = narrow
            break
    return fold, vector, min(block, _block(fold * row))


def _even(steps: int, splits: int) -> int:
    """The fewest splits, up to `splits`, whose longest walk is as short; at least one."""
    if steps <= 1 or splits <= 1:
        return 1
    return _ceil_div(steps, _ceil_div(steps, splits))


def _block(n: int) -> int:
    """The smallest block that holds n elements."""
    return max(SMALLEST_BLOCK, _next_power_of_2(n))


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
