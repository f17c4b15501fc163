"""Reads results files: what is known of every GPU, by case, operation and provider."""

import csv
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

from benchmarks import speed, training
from benchmarks.cases import CURVES, DEVICE_BYTES, DTYPES
from benchmarks.results import Run, columns

MIB = 2**20
CURVE_NAMES = {case.name for case in CURVES}
CASE_COLUMNS = columns(speed.Row)
TRAINING_COLUMNS = columns(training.Row)


class Setting(NamedTuple):
    """What is measured, in the words of the results file."""

    case: str
    shape: str
    layout: str
    slope: str
    dtype: str
    slope_dtype: str

    @property
    def itemsize(self) -> int:
        """Bytes of an element of x."""
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of x."""
        return math.prod(map(int, self.shape.split("x"))) * self.itemsize

    @property
    def is_curve(self) -> bool:
        """Whether it is a point of a curve over sizes."""
        return self.case in CURVE_NAMES

    @property
    def dtypes(self) -> str:
        """The dtype, and the slope's where it is another."""
        return self.dtype + (f", slope {self.slope_dtype}" * (self.slope_dtype != self.dtype))

    @property
    def x(self) -> str:
        """Everything but the name of the case."""
        layout = f" {self.layout}" * (self.layout != "contiguous")
        return f"{self.shape}{layout}, {self.slope}, {self.dtypes}"


class Figures(NamedTuple):
    """One provider's line of the results file; None where it has no such figure."""

    device_us: float | None
    call_us: float
    pct_copy: float | None
    extra_bytes: float | None


class Step(NamedTuple):
    """One provider's line of a training file; None where nothing was measured."""

    step_us: float | None = None
    peak_bytes: float | None = None


class Source(NamedTuple):
    """The file of one run, and what made its figures."""

    path: Path
    run: Run


@dataclass
class Results:
    """What is known of one GPU."""

    stem: Path
    """The folder and <gpu>: what the names of its files begin with."""
    sources: list[Source] = field(default_factory=list)
    figures: dict[Setting, dict[str, dict[str, Figures]]] = field(default_factory=dict)
    """By setting, operation and provider."""
    training: dict[tuple[str, ...], dict[str, Step]] = field(default_factory=dict)
    """By (network, batch, layout, dtype) and provider."""

    def time_us(self, setting: Setting, op: str, provider: str) -> float | None:
        """The time that counts at this size."""
        figures = self.figures[setting].get(op, {}).get(provider)
        if figures is None:
            return None
        return figures.device_us if setting.nbytes >= DEVICE_BYTES else figures.call_us

    def step_times(self, setting: Setting, other: str) -> tuple[float, float] | None:
        """Times of prelu_gpu and of another provider, forward and backward together."""
        for ops in (("step",), ("forward", "backward")):
            ours = [self.time_us(setting, op, "prelu_gpu") for op in ops]
            theirs = [self.time_us(setting, op, other) for op in ops]
            if None not in ours + theirs:
                return sum(filter(None, ours)), sum(filter(None, theirs))
        return None

    def speedup(self, setting: Setting, other: str) -> float | None:
        """How many times as long another provider takes, forward and backward together."""
        times = self.step_times(setting, other)
        return times[1] / times[0] if times else None

    def pct_copy(self, setting: Setting, op: str, provider: str = "prelu_gpu") -> float | None:
        """Speed as a percentage of the copy's."""
        figures = self.figures[setting].get(op, {}).get(provider)
        return figures.pct_copy if figures else None

    def extra_mib(self, setting: Setting, provider: str) -> float | None:
        """MiB that a backward holds beside the gradients."""
        figures = self.figures[setting].get("backward", {}).get(provider)
        return quotient(figures.extra_bytes, MIB) if figures else None


def find(folder: Path) -> list[Path]:
    """The results files of a folder, but those of `tune` and of quick runs."""
    return sorted(p for p in folder.glob("*.csv") if not p.stem.endswith(("-tune", "-quick")))


def read(paths: Iterable[Path]) -> list[Results]:
    """Reads results files, those of one GPU together.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is no results file.
    """
    found: dict[Path, Results] = {}
    # What a file before it holds is not taken from the core run.
    for path in sorted(paths, key=lambda path: path.stem.endswith(("-core", "-training"))):
        stem = path.with_name(path.stem.removesuffix("-core").removesuffix("-training"))
        results = found.setdefault(stem, Results(stem))
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows, names = list(reader), reader.fieldnames or []
        try:
            added = add(results, rows, names)
        except ValueError as error:
            advice = "give files that `python -m benchmarks` wrote"
            raise ValueError(f"{path}: {error}; {advice}.") from error
        if added:
            # A run that was taken up again has the date of its last part.
            run = Run(*(rows[-1][name] for name in CASE_COLUMNS[: len(fields(Run))]))
            results.sources.append(Source(path, run))
    return [results for results in found.values() if results.sources]


def add(results: Results, rows: Sequence[dict[str, str]], names: Sequence[str]) -> bool:
    """Adds a file's rows, whose columns are `names`; whether there was anything new."""
    if any(None in row.values() for row in rows):
        raise ValueError("a line with too few columns")
    if names == TRAINING_COLUMNS:
        return add_training(results, rows)
    if names == CASE_COLUMNS:
        return add_figures(results, rows)
    raise ValueError("it has other columns")


def add_figures(results: Results, rows: Sequence[dict[str, str]]) -> bool:
    """Adds the operations that are not there yet, with all providers; whether there were any."""
    operations: dict[tuple[Setting, str], dict[str, Figures]] = {}
    for row in rows:
        setting = Setting(*(row[name] for name in Setting._fields))
        if setting.dtype not in DTYPES or not re.fullmatch(r"\d+(x\d+)*", setting.shape):
            raise ValueError(f"x is {setting.dtype} {setting.shape}")
        operations.setdefault((setting, row["op"]), {})[row["provider"]] = Figures(
            parsed(row["device_us"]),
            float(row["call_us"]),
            parsed(row["pct_copy"]),
            parsed(row["extra_bytes"]),
        )
    new = [key for key in operations if key[1] not in results.figures.get(key[0], {})]
    for setting, op in new:
        results.figures.setdefault(setting, {})[op] = operations[setting, op]
    return bool(new)


def add_training(results: Results, rows: Sequence[dict[str, str]]) -> bool:
    """Adds the training steps of networks; whether there were any."""
    for row in rows:
        network = row["network"], row["batch"], row["layout"], row["dtype"]
        step = Step(parsed(row["step_us"]), parsed(row["peak_bytes"]))
        results.training.setdefault(network, {})[row["provider"]] = step
    return bool(rows)


def parsed(text: str) -> float | None:
    """A figure of a results file; None for an empty field."""
    return float(text) if text else None


def quotient(figure: float | None, by: float | None) -> float | None:
    """A quotient, where there are both figures."""
    return None if figure is None or by is None else figure / by
