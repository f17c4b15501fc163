"""The bar for speed and memory, and what was measured against it."""

import statistics
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.cases import DEVICE_BYTES
from benchmarks.measured import MIB, Results, Setting

ROOF_BYTES = 64 * MIB
"""Size of x from which the copy is the bar."""
NOISE = 0.97
"""A speed-up that counts as 1."""
DIGITS = {"% of the copy": 1, "x": 3, " MiB": 2}
"""Digits of a figure, by its unit."""


class Value(NamedTuple):
    """One figure that has a bar, and what it was made of."""

    setting: Setting
    figure: float
    numbers: str = ""


@dataclass(frozen=True)
class Line:
    """One line of the bar: a figure that every setting must reach, or their geometric mean."""

    what: str
    unit: str
    bar: float
    values: list[Value]
    mean: bool = False
    ceiling: bool = False
    """The figure must not exceed the bar, rather than reach it."""
    tolerance: float = 1.0
    """Factor of the bar that still counts, for noise."""

    def holds(self, figure: float) -> bool:
        """Whether a figure meets the bar."""
        return figure <= self.bar if self.ceiling else figure >= self.bar * self.tolerance

    @property
    def below(self) -> list[Value]:
        """The settings that miss the bar; none where only the mean has one."""
        return [] if self.mean else [value for value in self.values if not self.holds(value.figure)]

    @property
    def asked(self) -> str:
        """The bar in words."""
        return f"at {'most' if self.ceiling else 'least'} {self.bar:g}{self.unit}"

    def written(self, figure: float) -> str:
        """A figure with its unit."""
        return f"{figure:.{DIGITS[self.unit]}f}{self.unit}"

    @property
    def figure(self) -> float:
        """The mean, or the worst figure."""
        figures = [value.figure for value in self.values]
        if self.mean:
            return statistics.geometric_mean(figures)
        return max(figures) if self.ceiling else min(figures)

    @property
    def measured(self) -> str:
        """That figure in words."""
        if not self.values:
            return "no rows for this line"
        which = "mean" if self.mean else "the worst"
        return f"{self.written(self.figure)}, {which} of {len(self.values)}"

    @property
    def verdict(self) -> str:
        """Whether the bar is met; what was not measured is not."""
        if not self.values:
            return "not measured"
        if self.holds(self.figure):
            return "met"
        return "not met" if self.mean else f"{len(self.below)} below"


def bar(results: Results) -> list[Line]:
    """The bar, and what was measured against it."""
    lines = [roof_line(results, op) for op in ("forward", "backward")]
    for other, means in (
        ("eager", {"float32": 1.6, "half precision": 2.0}),
        ("compile", {"all dtypes": 1.3}),
    ):
        speedups = speedup_values(results, other)
        # A curve's points are sizes, as many as one likes: they have no say in a mean.
        cases = [value for value in speedups if not value.setting.is_curve]
        for dtypes, least in means.items():
            values = [value for value in cases if dtypes in ("all dtypes", group(value.setting))]
            what = f"forward + backward against {other}, {dtypes}"
            lines.append(Line(what, "x", least, values, mean=True))
        what = f"forward + backward against {other}, every case and size"
        lines.append(Line(what, "x", 1, speedups, tolerance=NOISE))
    return [*lines, inference_line(results), memory_line(results)]


def roof_line(results: Results, op: str) -> Line:
    """One pass over large tensors, against the copy."""
    values = []
    for setting in results.figures:
        pct = results.pct_copy(setting, op)
        if setting.nbytes >= ROOF_BYTES and pct is not None:
            times = {name: results.time_us(setting, op, name) for name in ("prelu_gpu", "copy")}
            values.append(Value(setting, pct, in_words(times)))
    return Line(f"{op}, x of 64 MiB and more", "% of the copy", 95, values)


def group(setting: Setting) -> str:
    """The dtypes that share a bar."""
    return "half precision" if setting.itemsize == 2 else setting.dtype


def speedup_values(results: Results, other: str) -> list[Value]:
    """Forward and backward together against another provider, in every setting that has both."""
    values = []
    for setting in results.figures:
        times = results.step_times(setting, other)
        if times:
            ours, theirs = times
            clock = "device" if setting.nbytes >= DEVICE_BYTES else "call"
            text = f"{in_words({'prelu_gpu': ours, other: theirs})}, {clock}"
            values.append(Value(setting, theirs / ours, text))
    return values


def inference_line(results: Results) -> Line:
    """The module without gradients, at any size: whole calls."""
    values = []
    for setting, ops in results.figures.items():
        figures = ops.get("inference", {})
        if "prelu_gpu" in figures and "eager" in figures:
            times = {name: figures[name].call_us for name in ("prelu_gpu", "eager")}
            text = f"{in_words(times)}, call"
            values.append(Value(setting, times["eager"] / times["prelu_gpu"], text))
    return Line("inference against eager, whole call, any size", "x", 0.95, values)


def memory_line(results: Results) -> Line:
    """What a backward holds beside the gradients."""
    values = [
        Value(setting, extra)
        for setting in results.figures
        if (extra := results.extra_mib(setting, "prelu_gpu")) is not None
    ]
    return Line("memory of the backward beside the gradients", " MiB", 1, values, ceiling=True)


def in_words(times: dict[str, float | None]) -> str:
    """Providers' times, as far as there are any."""
    return ", ".join(f"{name} {us:.1f} us" for name, us in times.items() if us is not None)
