"""Sweeps the rule table of prelu_gpu/plan.py on the GPU at hand, and prints a proposed one.

    python -m benchmarks tune                  for seven minutes
    python -m benchmarks tune --minutes 20     for longer
    python -m benchmarks tune --results DIR    also writes every timing into DIR/<gpu>-tune.csv

Coordinate descent from the row as it is, one field at a time, for each element size and direction.
Every variant is checked before it is timed, and timed in turn with the row as it is, caches cold.
Nothing is changed: a person edits the table. Without a GPU the space is printed.
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import operator
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cases import H100_MULTIPROCESSORS, Case, check
from benchmarks.program import (
    Deadline,
    TimeUpError,
    find_obstacle,
    first_line,
    make_table,
    open_console,
    positive,
    progress_bars,
    refuse_wrong,
)
from benchmarks.providers import provide_prelu_gpu
from benchmarks.results import describe_run, open_results
from benchmarks.timing import Device, Gpu, Measurement, count_sets, measure, spread
from prelu_gpu.backend import WITHOUT_TRITON
from prelu_gpu.plan import Rules, gpu_rules

if WITHOUT_TRITON is None:
    from prelu_gpu import launch

PASSES = 2
"""Passes over all fields: the second finds what a field gains beside the others' new values."""

VIEWS = {
    "flat": Case("flat", (64, 2**19), slope="shared"),
    "planes": Case("planes", (40, 64, 112, 112)),
    "planes of 28x28": Case("planes of 28x28", (160, 256, 28, 28)),
    "odd planes": Case("odd planes", (4, 21000, 391)),
    "columns": Case("columns", (2**16, 512)),
    "columns of 7x7": Case("columns of 7x7", (1280, 512, 7, 7)),
    "90 columns": Case("90 columns", (370_000, 90)),
}
"""What rules tell apart: 64 to 128 MiB of x, contiguous."""


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
    passes: int = PASSES,
) -> Iterator[tuple[Rules, Gains]]:
    """Coordinate descent: yields the best row so far and its gains, at first and after each field.

    Args:
        present: the row to begin with.
        swept: its fields.
        evaluate: each row's gains over the present one; None where it failed its check, which
            the present one has not.
        passes: how often to go over all fields.
    """
    best = present
    (gains,) = evaluate([present])
    assert gains is not None
    yield best, gains
    for _ in range(passes):
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


@contextlib.contextmanager
def using(row: Row) -> Iterator[Callable[[Rules], None]]:
    """Gives a function that makes the library plan one row's launches by other rules."""
    before = launch.rules

    @functools.cache
    def others(rules: Rules) -> Callable[[torch.device, int, bool], Rules]:
        def varied(device: torch.device, itemsize: int, backward: bool) -> Rules:
            if (itemsize, backward) == row:
                return rules
            return before(device, itemsize, backward)

        return varied

    def use(rules: Rules) -> None:
        # What launch.py keeps of a call, it keeps by the function that gives the rules.
        launch.rules = others(rules)

    try:
        yield use
    finally:
        launch.rules = before


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


class Bench:
    """Checks and times variants of one row. A plan is timed once, whichever rules lead to it."""

    def __init__(
        self,
        device: Device,
        row: Row,
        present: Rules,
        swept: Sequence[Field],
        deadline: Deadline,
        record: Callable[[Timing], None],
        views: Mapping[str, Case] = VIEWS,
    ) -> None:
        self._device = device
        self._row = row
        self._present = present
        self._swept = swept
        self._deadline = deadline
        self._record = record
        self._cases = {
            name: dataclasses.replace(case, dtype=row.dtype) for name, case in views.items()
        }
        self._known: dict[tuple[str, str], Gain | None] = {}

    def evaluate(self, variants: Sequence[Rules]) -> list[Gains | None]:
        """The gains of each variant on all views; None where one of them is not right.

        Raises:
            TimeUpError: before anything that is not known would take too long.
            ProgramError: the row as it is fails its check.
        """
        gains: dict[Rules, dict[str, Gain]] = {variant: {} for variant in variants}
        for name, case in self._cases.items():
            plans = {variant: repr(case.plan(self._row.op, variant)) for variant in gains}
            new = {plan: v for v, plan in plans.items() if (name, plan) not in self._known}
            if new:
                with self._deadline.piece():
                    timed = self._time(name, list(new.values()))
                self._known |= {(name, plan): gain for plan, gain in zip(new, timed, strict=True)}
            for variant, plan in plans.items():
                gain = self._known[name, plan]
                if gain is None:
                    del gains[variant]
                else:
                    gains[variant][name] = gain
        return [gains.get(variant) for variant in variants]

    def _time(self, name: str, variants: Sequence[Rules]) -> list[Gain | None]:
        """Checks variants on a view and times the right ones, in turn with the row as it is."""
        case = self._cases[name]
        with using(self._row) as use:
            mistakes = {variant: self._check(case, use, variant) for variant in variants}
            if mistakes.get(self._present):
                refuse_wrong([f"{name}, {self._row.op}: {mistakes[self._present]}"])
            right = [v for v in variants if not mistakes[v] and v != self._present]
            measured = self._measure(case, use, [self._present, *right]) if right else {}

        gains = {v: gain_over(measured[self._present], measured[v]) for v in right}
        gains[self._present] = SAME
        for variant in (*measured, *(v for v in variants if mistakes[v])):
            timing = self._timing(
                name, variant, measured.get(variant), gains.get(variant), mistakes.get(variant, "")
            )
            self._record(timing)
        return [gains.get(variant) for variant in variants]

    def _measure(
        self, case: Case, use: Callable[[Rules], None], variants: Sequence[Rules]
    ) -> dict[Rules, Measurement]:
        """Times variants in turn, on input sets of their own."""
        device = self._device
        sets = [case.inputs(device.device) for _ in range(count_sets(device, case.nbytes))]
        call = provide_prelu_gpu(case, self._row.op, sets)

        def called(variant: Rules) -> Callable[[int], object]:
            def varied(number: int) -> object:
                use(variant)
                return call(number)

            return varied

        calls = {str(number): called(variant) for number, variant in enumerate(variants)}
        measured = measure(device, calls, len(sets), lambda: None)
        return dict(zip(variants, measured.values(), strict=True))

    def _check(self, case: Case, use: Callable[[Rules], None], variant: Rules) -> str:
        """What a variant gets wrong; nothing if it is right."""
        use(variant)
        try:
            return "; ".join(check(case, self._device.device))
        except Exception as error:  # whatever a compiler raises
            return first_line(error)

    def _timing(
        self,
        name: str,
        variant: Rules,
        measured: Measurement | None,
        gain: Gain | None,
        mistake: str,
    ) -> Timing:
        """A line of the results file."""
        changed = [
            f"{field.path} {field.get(variant)}"
            for field in self._swept
            if field.get(variant) != field.get(self._present)
        ]
        return Timing(
            itemsize=self._row.itemsize,
            op=self._row.op,
            view=name,
            variant=", ".join(changed) or "as it is",
            device_us=round(measured.device_us, 3) if measured else None,
            iqr_us=round(measured.spread_us, 3) if measured else None,
            gain=round(gain.factor, 4) if gain else None,
            gain_iqr=round(gain.spread, 4) if gain else None,
            mistake=mistake,
        )


def gain_over(present: Measurement, variant: Measurement) -> Gain:
    """The median of the rounds' ratios, and their interquartile range."""
    ratios = [
        before / after
        for before, after in zip(present.device_samples, variant.device_samples, strict=True)
    ]
    return Gain(statistics.median(ratios), spread(ratios))


def main(arguments: Sequence[str]) -> None:
    """Runs the program."""
    options = parse(arguments)
    console = open_console()
    obstacle = find_obstacle()
    if obstacle:
        console.print(f"Nothing is timed: {obstacle}", soft_wrap=True)
        console.print(space_table())
        return
    gpu = Gpu()
    run = describe_run(gpu.name)
    console.print(str(run), soft_wrap=True)
    file = open_results(options.results, "-tune", run, Timing)
    record = file.write if file else lambda timing: None
    multiprocessors = torch.cuda.get_device_properties(gpu.device).multi_processor_count
    torch.manual_seed(0)
    with gpu.stream():
        sweep(gpu, multiprocessors, Deadline(options.minutes), record, console)
    if file:
        console.print(f"Results: {file.path}", soft_wrap=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks tune",
        description="Sweep the rule table on the GPU at hand and print a proposed one.",
    )
    parser.add_argument(
        "--minutes", type=positive, metavar="M", default=7.0, help="most time to take (default: 7)"
    )
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="write DIR/<gpu>-tune.csv, row by row"
    )
    return parser.parse_args(arguments)


def sweep(
    device: Device,
    multiprocessors: int,
    deadline: Deadline,
    record: Callable[[Timing], None],
    console: Console,
    views: Mapping[str, Case] = VIEWS,
) -> None:
    """Sweeps all rows and prints the proposed table.

    Raises:
        ProgramError: a row as it is fails its check.
    """
    presents = {row: launch.rules(device.device, *row) for row in ROWS}
    swept = {row: fields(multiprocessors, row.backward) for row in ROWS}
    benches = {
        row: Bench(device, row, presents[row], swept[row], deadline, record, views) for row in ROWS
    }
    searches = {row: descend(presents[row], swept[row], benches[row].evaluate) for row in ROWS}
    found: dict[Row, tuple[Rules, Gains]] = {}
    steps, total = 0, sum(1 + PASSES * len(swept[row]) for row in ROWS)
    with progress_bars(console) as progress:
        task = progress.add_task("sweeping", total=total)
        for steps, (row, variant, gains) in enumerate(in_turn(searches), start=1):
            found[row] = variant, gains
            description = f"{row.title}: {overall(gains):.3f}x"
            progress.update(task, completed=steps, description=description, refresh=True)
    if steps < total:
        console.print(f"The time is up: {steps} of {total} steps are done.")
    console.print(proposed_table(presents, found, swept))
    console.print(gains_table(presents, found, list(views)))


def proposed_table(
    presents: Mapping[Row, Rules],
    found: Mapping[Row, tuple[Rules, Gains]],
    swept: Mapping[Row, Sequence[Field]],
) -> Table:
    """Each row as it is, and the best one found."""
    paths = list(dict.fromkeys(field.path for row in swept for field in swept[row]))
    table = make_table(
        ["row", "", *(path.replace(".", "\n") for path in paths)],
        title="Rule table: sizes in bytes, programs by multiprocessor",
    )
    for row, (best, _) in found.items():
        by_path = {field.path: field for field in swept[row]}
        for title, variant in (("as it is", presents[row]), ("proposed", best)):
            cells = [by_path[path].written(variant) if path in by_path else "" for path in paths]
            if title == "proposed" and best == presents[row]:
                title, cells = "keep", []
            table.add_row(row.title, title, *cells)
        table.add_section()
    return table


def gains_table(
    presents: Mapping[Row, Rules],
    found: Mapping[Row, tuple[Rules, Gains]],
    views: Sequence[str],
) -> Table:
    """What each proposed row gains on each view."""
    title = "Gain of the proposed row, and its interquartile range"
    table = make_table(["row", "", *views], title=title)
    for row, (best, gains) in found.items():
        if best == presents[row]:
            table.add_row(row.title, "keep: no gain beyond the spread")
            continue
        cells = ("=" if g == SAME else f"{g.factor:.3f} ({g.spread:.3f})" for g in gains.values())
        table.add_row(row.title, f"{overall(gains):.3f}x", *cells)
    return table


def space_table() -> Table:
    """What would be swept on an H100."""
    table = make_table(
        ["row", "field", "as it is", "values"],
        ["variants"],
        title=f"What would be swept, on an H100 ({H100_MULTIPROCESSORS} multiprocessors); sizes in "
        "bytes, programs by multiprocessor",
        caption="variants: rows tried in the first pass",
    )
    for row in ROWS:
        present = gpu_rules(H100_MULTIPROCESSORS, *row)
        total = 0
        for field in fields(H100_MULTIPROCESSORS, row.backward):
            count = len(field.alternatives(present))
            total += count
            table.add_row(
                row.title,
                field.path,
                field.written(present),
                ", ".join(f"{value:g}" for value in field.values),
                str(count),
            )
        table.add_row("", "", "", "", str(total))
        table.add_section()
    return table
