"""Sweeps the rule table of prelu_gpu/rules.py on the GPU at hand, and prints a proposed one.

    python -m benchmarks tune                  for seven minutes
    python -m benchmarks tune --results DIR    also writes every timing into DIR/<gpu>-tune.csv

Nothing is changed: a person edits the table.
"""

import contextlib
import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from rich.console import Console

from benchmarks import program
from benchmarks.cases import Case
from benchmarks.program import Deadline, Minutes, ResultsFolder, refuse_wrong
from benchmarks.providers import OURS, PROVIDERS
from benchmarks.results import describe_run, open_results
from benchmarks.timing import ROUNDS, Call, Gpu, count_sets, measure, summary
from prelu_gpu.rules import Rules, rules_for, using_rules

SWEEPS = 2
"""Over all fields: the second finds what a field gains beside the others' new values."""

ROWS = tuple(itertools.product((2, 4), (True, False)))
"""The rows of the table: bytes of an element, and whether it is the backward."""

VIEWS = (
    Case("flat", (64, 2**19), slope="shared"),
    Case("planes", (40, 64, 112, 112)),
    Case("planes of 28x28", (160, 256, 28, 28)),
    Case("odd planes", (4, 21000, 391)),
    Case("columns", (2**16, 512)),
    Case("columns of 7x7", (1280, 512, 7, 7)),
    Case("90 columns", (370_000, 90)),
)
"""What rules tell apart: 64 to 128 MiB of x, contiguous."""


def main(minutes: Minutes = 7.0, results: ResultsFolder = None) -> None:
    """Sweeps the table of launch rules on the GPU at hand, and prints a proposed one.

    From each row as it is, one field at a time, for seven minutes unless --minutes says more. Every
    variant is checked before it is timed, and timed in turn with the row as it is, caches cold.
    With --results every timing is written into <gpu>-tune.csv.
    """
    console, obstacle = program.open_console(), program.find_obstacle()
    if obstacle:
        console.print(f"Nothing is timed: {obstacle}", soft_wrap=True)
        return
    gpu, deadline = Gpu(), Deadline(minutes)
    run = describe_run(gpu.name)
    console.print(str(run), soft_wrap=True)
    file = open_results(results, "-tune", run, Timing)
    record = file.write if file else lambda timing: None
    count = torch.cuda.get_device_properties(gpu.device).multi_processor_count
    torch.manual_seed(0)
    with gpu.stream():
        searches = [
            Search(gpu, row, fields(count, row[1]), VIEWS, record, deadline) for row in ROWS
        ]
        sweep(searches, console)
    if file:
        console.print(f"Results: {file.path}", soft_wrap=True)


def sweep(searches: Sequence["Search"], console: Console) -> None:
    """Takes all searches a field further, and again, until they end or the time is up."""
    steps = itertools.zip_longest(*(search.run() for search in searches))
    with contextlib.suppress(program.TimeUpError, KeyboardInterrupt):
        for number, _ in enumerate(steps, start=1):
            proposals = (f"{search.title} {overall(search.gains):.3f}x" for search in searches)
            console.print(f"step {number}: {', '.join(proposals)}", highlight=False)
    table = program.make_table(
        ["row", "proposed"],
        ["gain", *searches[0].gains],
        title="Gain of the proposed rows, and its interquartile range; sizes in bytes",
    )
    for search in searches:
        gains = (f"{gain.factor:.3f} ({gain.spread:.3f})" for gain in search.gains.values())
        changes = search.changes(search.best) or "as it is: no gain beyond the spread"
        table.add_row(search.title, changes, f"{overall(search.gains):.3f}", *gains)
    console.print(table)


def fields(multiprocessors: int, backward: bool) -> dict[str, Sequence[Any]]:
    """What is swept, by path in Rules, the most telling first: sizes in bytes."""
    sizes = (2048, 4096, 8192, 16384, 32768)
    programs = [count * multiprocessors for count in (4, 8, 16, 32, 64, 128)]
    swept: dict[str, Sequence[Any]] = {
        "plane.size": sizes,
        "column.size": sizes,
        "column.rows": (1, 2, 4, 8, 16),
        "plane.num_warps": (2, 4, 8),
        "column.num_warps": (2, 4, 8),
        "column.programs": programs,
        "plane.programs": programs,
        "plane_fill": (0.125, 0.25, 0.5, 0.75, 1.5),
    }
    if backward:
        return swept | {"atomic": (False, True), "finish": (0, 2**12, 2**14, 2**16)}
    # A backward's columns are so few that a large tensor has rows enough for any of these.
    return swept | {"column_rows": (2, 4, 8, 16, 32)}


def replaced(record: Any, path: str, value: object) -> Any:
    """A named tuple in which the value at a dotted path is another."""
    name, _, rest = path.partition(".")
    return record._replace(
        **{name: replaced(getattr(record, name), rest, value) if rest else value}
    )


class Gain(NamedTuple):
    """How many times as fast as the row as it is, and that factor's spread over the rounds."""

    factor: float = 1.0
    spread: float = 0.0


Gains = Mapping[str, Gain]
"""A variant's gain on each view, by name."""


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


@dataclass(frozen=True)
class Timing:
    """One line of the results file after the columns of a run."""

    itemsize: int
    op: str
    view: str
    variant: str
    """Its fields that are not as they are."""
    device_us: float | None
    iqr_us: float | None
    gain: float | None
    gain_iqr: float | None
    mistake: str
    """Why it was not timed."""


class Search:
    """Coordinate descent from one row of the rule table, one field at a time.

    Args:
        device: where the variants run.
        row: bytes of an element, and whether it is the row of the backward.
        swept: the values to try, by path in Rules.
        views: cases that rules tell apart.
        record: called with every timing.
        deadline: the end of the time.
        rounds: how many samples of each time are taken.
    """

    def __init__(
        self,
        device: Gpu,
        row: tuple[int, bool],
        swept: Mapping[str, Sequence[Any]],
        views: Sequence[Case],
        record: Callable[[Timing], object],
        deadline: Deadline,
        rounds: int = ROUNDS,
    ) -> None:
        self._device, self._row, self._swept = device, row, swept
        self._record, self._deadline, self._rounds = record, deadline, rounds
        self._table = {row: rules_for(device.device, *row) for row in ROWS}
        self.op = "backward" if row[1] else "forward"
        self.present = self.best = self._table[row]
        self.gains: Gains = {case.name: Gain() for case in views}
        """Of the best row so far."""
        dtype = {2: torch.bfloat16, 4: torch.float32}[row[0]]
        self._views = [dataclasses.replace(case, dtype=dtype) for case in views]
        self._known: dict[tuple[str, str], Gain | None] = {}
        """By view and plan: a plan is timed once, whichever rules lead to it."""

    @property
    def title(self) -> str:
        """What tells it from the others."""
        return f"{self._row[0]} bytes, {self.op}"

    def run(self) -> Iterator[None]:
        """Improves the best row, a field at a time.

        Raises:
            TimeUpError: before anything that is not known would take too long.
            typer.Exit: the row as it is fails its check.
        """
        for _, (path, values) in itertools.product(range(SWEEPS), self._swept.items()):
            others = [value for value in values if value != attrgetter(path)(self.best)]
            variants = [replaced(self.best, path, value) for value in others]
            for variant, gains in zip(variants, self._evaluate(variants), strict=True):
                if gains and beats(gains, self.gains):
                    self.best, self.gains = variant, gains
            yield

    def changes(self, variant: Rules) -> str:
        """The fields of a variant that are not as they are."""
        values = {
            path: (attrgetter(path)(self.present), attrgetter(path)(variant))
            for path in self._swept
        }
        return ", ".join(f"{path} {a:g} -> {b:g}" for path, (a, b) in values.items() if a != b)

    def _evaluate(self, variants: Sequence[Rules]) -> list[Gains | None]:
        """The gains of each variant on all views; None where one of them is not right."""
        gains: dict[Rules, dict[str, Gain]] = {variant: {} for variant in variants}
        for case in self._views:
            self._known.setdefault(self._plan(case, self.present), Gain())
            new = {self._plan(case, variant): variant for variant in gains}
            new = {plan: variant for plan, variant in new.items() if plan not in self._known}
            if new:
                with self._deadline.piece():
                    timed = self._time(case, list(new.values()))
                self._known |= {plan: timed.get(variant) for plan, variant in new.items()}
            for variant in list(gains):
                gain = self._known[self._plan(case, variant)]
                if gain is None:
                    del gains[variant]
                else:
                    gains[variant][case.name] = gain
        return [gains.get(variant) for variant in variants]

    def _plan(self, case: Case, variant: Rules) -> tuple[str, str]:
        return case.name, repr(case.plan(self.op, variant))

    def _time(self, case: Case, variants: Sequence[Rules]) -> dict[Rules, Gain]:
        """Checks variants, and times the right ones in turn with the row as it is."""
        mistakes: dict[Rules, str] = {}
        for variant in (self.present, *variants):
            with self._using(variant):
                mistakes[variant] = "; ".join(case.mistakes(self._device.device))
        if mistakes[self.present]:
            refuse_wrong([f"{case.name}, {self.op}: {mistakes[self.present]}"])
        right = [variant for variant, mistake in mistakes.items() if not mistake]
        numbers = range(count_sets(self._device, case.nbytes))
        sets = [case.inputs(self._device.device) for _ in numbers]
        call = PROVIDERS[OURS](case, self.op, sets)
        calls = {str(v): partial(self._varied, v, call) for v in right}
        measured = measure(self._device, calls, len(sets), rounds=self._rounds)
        gains = {}
        for variant, mistake in mistakes.items():
            device_us = iqr_us = None
            if not mistake:
                one, present = measured[str(variant)], measured[str(self.present)]
                device_us, iqr_us = one.device_us, one.spread_us
                pairs = zip(present.device_samples, one.device_samples, strict=True)
                ratios = summary([before / after for before, after in pairs])
                gains[variant] = Gain(round(ratios.median, 4), round(ratios.iqr, 4))
            changes = self.changes(variant) or "as it is"
            times = (device_us, iqr_us, *gains.get(variant, (None, None)))
            self._record(Timing(self._row[0], self.op, case.name, changes, *times, mistake))
        return gains

    def _varied(self, variant: Rules, call: Call) -> Call:
        def varied(number: int) -> object:
            with self._using(variant):
                return call(number)

        return varied

    def _using(self, variant: Rules) -> contextlib.AbstractContextManager[None]:
        """Makes the library plan this row's launches by other rules."""
        table = {**self._table, self._row: variant}
        return using_rules(lambda device, itemsize, backward: table[itemsize, backward])
