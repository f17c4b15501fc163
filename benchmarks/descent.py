"""Coordinate descent over the rows of the rule table: one field at a time, from a row as it is."""

import contextlib
import dataclasses
import math
import operator
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from benchmarks.program import TimeUpError
from prelu_gpu.plan import Rules

SWEEPS = 2
"""Over all fields: the second finds what a field gains beside the others' new values."""


class Row(NamedTuple):
    """Which row of the rule table."""

    itemsize: int
    backward: bool

    @property
    def op(self) -> str:
        """The operation that the row is for."""
        return "backward" if self.backward else "forward"

    @property
    def title(self) -> str:
        """What tells it from the others."""
        return f"{self.itemsize} bytes, {self.op}"

    @property
    def dtype(self) -> torch.dtype:
        """A dtype of this size."""
        return {2: torch.bfloat16, 4: torch.float32}[self.itemsize]


ROWS = tuple(Row(itemsize, backward) for backward in (True, False) for itemsize in (2, 4))


class Gain(NamedTuple):
    """How many times as fast as the row as it is, and that factor's spread over the rounds."""

    factor: float
    spread: float


SAME = Gain(1.0, 0.0)
Gains = Mapping[str, Gain]
"""A variant's gain on each view."""


@dataclass(frozen=True)
class Field:
    """A field of Rules by its path, and the values to try."""

    path: str
    values: tuple[Any, ...]
    unit: int = 1
    """What a value is counted in."""

    def get(self, rules: Rules) -> Any:
        """The value in a row."""
        return operator.attrgetter(self.path)(rules)

    def alternatives(self, rules: Rules) -> list[Rules]:
        """The row with each other value of the field."""
        values = [value * self.unit for value in self.values]
        return [replaced(rules, self.path, value) for value in values if value != self.get(rules)]

    def written(self, rules: Rules) -> str:
        """The value in a row, in words."""
        return f"{self.get(rules) / self.unit:g}"


def replaced(record: Any, path: str, value: object) -> Any:
    """A dataclass in which the value at a dotted path is another."""
    name, _, rest = path.partition(".")
    value = replaced(getattr(record, name), rest, value) if rest else value
    return dataclasses.replace(record, **{name: value})


def fields(multiprocessors: int, backward: bool) -> list[Field]:
    """What is swept, the most telling first; sizes in bytes, programs by multiprocessor."""
    sizes = (2048, 4096, 8192, 16384, 32768)
    programs = (4, 8, 16, 32, 64, 128)
    swept = [
        Field("plane.size", sizes),
        Field("column.size", sizes),
        Field("column.rows", (1, 2, 4, 8, 16)),
        Field("plane.num_warps", (2, 4, 8)),
        Field("column.num_warps", (2, 4, 8)),
        Field("column.programs", programs, unit=multiprocessors),
        Field("plane.programs", programs, unit=multiprocessors),
    ]
    if backward:
        swept.append(Field("atomic", (False, True)))
        swept.append(Field("finish", (0, 2**12, 2**14, 2**16)))
    swept.append(Field("plane_fill", (0.125, 0.25, 0.5, 0.75, 1.5)))
    if not backward:
        # A backward's columns are so few that a large tensor has rows enough for any of these.
        swept.append(Field("column_rows", (2, 4, 8, 16, 32)))
    return swept


def descend(
    present: Rules,
    swept: Sequence[Field],
    evaluate: Callable[[Sequence[Rules]], list[Gains | None]],
    sweeps: int = SWEEPS,
) -> Iterator[tuple[Rules, Gains]]:
    """Coordinate descent: yields the best row so far and its gains, at first and after each field.

    Args:
        present: the row to begin with.
        swept: its fields.
        evaluate: each row's gains over the present one; None where it failed its check, which
            the present one has not.
        sweeps: how often to go over all fields.
    """
    best = present
    (gains,) = evaluate([present])
    assert gains is not None
    yield best, gains
    for _ in range(sweeps):
        for field in swept:
            candidates = field.alternatives(best)
            sound = [
                (candidate, found)
                for candidate, found in zip(candidates, evaluate(candidates), strict=True)
                if found is not None and beats(found, gains)
            ]
            best, gains = max(sound, key=lambda pair: overall(pair[1]), default=(best, gains))
            yield best, gains


def overall(gains: Gains) -> float:
    """The geometric mean of a variant's gains."""
    return statistics.geometric_mean(gain.factor for gain in gains.values())


def beats(gains: Gains, others: Gains) -> bool:
    """Whether a variant is faster than another by more than the spread, where they differ."""
    views = [view for view in gains if gains[view] != others[view]]
    if not views:
        return False
    gain = statistics.fmean(math.log(gains[v].factor / others[v].factor) for v in views)
    noise = statistics.fmean(max(gains[v].spread, others[v].spread) for v in views)
    return math.exp(gain) > 1 + noise


def in_turn(
    searches: Mapping[Row, Iterator[tuple[Rules, Gains]]],
) -> Iterator[tuple[Row, Rules, Gains]]:
    """Advances all searches by a field, and again, until they end or the time is up."""
    going = dict(searches)
    with contextlib.suppress(TimeUpError, KeyboardInterrupt):
        while going:
            for row, search in list(going.items()):
                step = next(search, None)
                if step is None:
                    del going[row]
                else:
                    yield row, *step
