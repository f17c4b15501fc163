"""The rule table: which tiles suit a device. Nothing is tuned while a program runs."""

import contextlib
import enum
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from .backend import INTERPRETED

VECTOR_BYTES = 16
"""One thread's widest access to memory."""

NARROW_BYTES = 4
"""One thread's access to memory off the grid of those: a warp's fills a line of the cache."""

UNBOUNDED = 2**63 - 1


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


class Tile(NamedTuple):
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


class NormPrograms(NamedTuple):
    """Programs of a norm's launches over columns beyond which work is split no further."""

    moments: int
    forward: int
    sums: int
    """Of the backward's sums."""
    gradient: int
    """Of the input gradient without sums."""
    frozen: int
    """Of both in one launch, where statistics are given."""


NORM_PLACES = {
    False: NormPrograms(moments=7, forward=10, sums=7, gradient=8, frozen=6),
    True: NormPrograms(moments=7, forward=8, sums=4, gradient=5, frozen=4),
}
"""Programs that a multiprocessor holds by their registers, whether elements are of 16 bits: one
wave, which reads a channel's coefficients once for many rows (test_machine_code.py). More would
hold the moments, and leave more of them to be merged."""


class Rules(NamedTuple):
    """What decides a plan besides the tensor: one row of the rule table."""

    plane: Tile
    column: Tile
    column_rows: int
    """Rows that columns must have where rows are longer than a warp's access."""
    partials: int
    """Partial sums beyond which columns are split no further."""
    norm: NormPrograms = NormPrograms(1, 1, 1, 1, 1)
    plane_fill: float = 0.75
    """Share of a plane tile that a row must fill for rows not to be folded into columns."""
    finish: int = 0
    """Partial sums of planes up to which their last programs add them up, without a launch."""
    atomic: bool = False
    """Add slope gradients atomically, in no fixed order, rather than in two stages. No row of the
    table does, until a GPU has measured it."""
    kind: Kind | None = None
    """Force this kind of tile, for tests and benchmarks."""


Table = Callable[[torch.device, int, bool], Rules]
"""The row for a device, bytes of an element, and whether it is the backward."""


def gpu_rules(multiprocessors: int, itemsize: int, backward: bool, warp_size: int = 32) -> Rules:
    """The rule table's row for a GPU: arithmetic and machine code, until a GPU has measured it.

    Two 128-bit accesses a thread, four in a 16-bit forward, or as many as a forward's column tile
    has rows, keep 48 to 160 KiB in flight on a multiprocessor of sm_90, by the registers that its
    kernels take (benchmarks/machine_code.py). Plane programs are many waves, which even out their
    ends. A thread reads the slopes of a forward's column tile once for all rows of the tile: with
    eight rows, read and written, slopes are a sixteenth of its accesses. In 16 bits more than four
    rows spill registers where slopes or addresses take many: an eighth.
    Column programs of a backward leave partial sums, kept to 2**18: narrow tiles of many rows, and
    one wave of programs. The 65536 registers of a multiprocessor hold eight programs with 64 a lane
    and six with 80; the kernels take up to 56 and, in 16 bits, 80 (test_machine_code.py). With
    eight rows or more these sums, written and read, add under a tenth to the traffic. That last
    programs add up 2**14 plane sums, 64 KiB, at most, is a guess.
    """
    access = 4 * warp_size * VECTOR_BYTES
    size = access * (4 if itemsize == 2 and not backward else 2)
    if backward:
        places = (6 if itemsize == 2 else 8) * multiprocessors
        column = Tile(size, num_warps=4, programs=places, rows=8)
    else:
        rows = 4 if itemsize == 2 else 8
        column = Tile(rows * access, num_warps=4, programs=64 * multiprocessors, rows=rows)
    return Rules(
        plane=Tile(size, num_warps=4, programs=64 * multiprocessors),
        column=column,
        column_rows=8,
        partials=2**18 if backward else UNBOUNDED,
        norm=NormPrograms(*(multiprocessors * places for places in NORM_PLACES[itemsize == 2])),
        finish=2**14,
    )


def interpreter_rules(itemsize: int) -> Rules:
    """The rule table's row for Triton's interpreter, whose cost is per program, not per element."""
    # Triton's largest tile.
    tile = Tile(size=2**20 * itemsize, num_warps=1, programs=1)
    return Rules(plane=tile, column=tile, column_rows=1, partials=UNBOUNDED)


@functools.cache
def _table(device: torch.device, itemsize: int, backward: bool) -> Rules:
    if INTERPRETED:
        return interpreter_rules(itemsize)
    properties = torch.get_device_module(device).get_device_properties(device)
    if device.type == "xpu":
        row = gpu_rules(properties.gpu_subslice_count, itemsize, backward)
        # The last program's barrier and counter are shown sound on NVIDIA and AMD only.
        return row._replace(finish=0)
    return gpu_rules(
        properties.multi_processor_count, itemsize, backward, warp_size=properties.warp_size
    )


_in_use: Table = _table


def rules_for(device: torch.device, itemsize: int, backward: bool) -> Rules:
    """The rule table's row for elements of `itemsize` bytes on `device`."""
    return _in_use(device, itemsize, backward)


@contextlib.contextmanager
def using_rules(table: Table) -> Iterator[None]:
    """Another rule table for a block, in the whole process: for tests, tuning and inspection."""
    global _in_use
    before, _in_use = _in_use, table
    try:
        yield
    finally:
        _in_use = before
