"""Checks and times variants of a row of the rule table, on tensors that rules tell apart."""

import contextlib
import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.cases import Case, check
from benchmarks.descent import SAME, Field, Gain, Gains, Row
from benchmarks.program import Deadline, first_line, refuse_wrong
from benchmarks.providers import provide_prelu_gpu
from benchmarks.timing import Device, Measurement, count_sets, measure, spread
from prelu_gpu.backend import WITHOUT_TRITON
from prelu_gpu.plan import Rules

if WITHOUT_TRITON is None:
    from prelu_gpu import launch

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
