"""Makes README's table of speed, and the plots, from results files; lists what is below the bar.

    python -m benchmarks report            reads benchmarks/results, writes README's table, draws
    python -m benchmarks report CSV ...    reads these files, draws beside them
    python -m benchmarks report --check    only says whether README agrees; exit status 1 if not

Files <gpu>.csv, <gpu>-core.csv and <gpu>-training.csv belong together. Where the first two hold the
same operation of the same case, the first is used.
"""

import argparse
import csv
import math
import os
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.cases import CURVES, MODELS

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- speed -->", "<!-- /speed -->"
NOT_MEASURED = (
    "Not measured yet: no results of a GPU are in `benchmarks/results`; `make gpu-check "
    "PYTHON=python3\nRESULTS=DIR` on a machine with one makes them, from the checkout, with "
    "nothing installed."
)

MIB = 2**20
DEVICE_BYTES = 16 * MIB
"""Size of x from which device time counts; below it is the time of the whole call."""
ROOF_BYTES = 64 * MIB
"""Size of x from which the copy is the bar."""
DIGITS = {"% of the copy": 1, "x": 3, " MiB": 2}
"""Digits of a figure, by its unit."""
NOISE = 0.97
"""A speed-up that counts as 1."""

RUN_COLUMNS = {"date", "commit", "gpu", "driver", "torch", "triton"}
CASE_COLUMNS = RUN_COLUMNS | {
    "case", "shape", "layout", "slope", "dtype", "slope_dtype", "op", "provider",
    "device_us", "call_us", "pct_copy", "extra_bytes",
}  # fmt: skip
TRAINING_COLUMNS = RUN_COLUMNS | {
    "network", "batch", "layout", "dtype", "provider", "step_us", "peak_bytes",
}  # fmt: skip
ITEMSIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

CURVE_NAMES = {case.name for case in CURVES}
MODEL_SETTINGS = {(case.name, case.dtype_name, case.slope_dtype_name) for case in MODELS}

INK, GREY, LIGHT = "#222222", "#666666", "#e6e6e6"
FASTER, SLOWER = "#0072B2", "#D55E00"
PROVIDER_COLORS = {"prelu_gpu": FASTER, "eager": SLOWER, "compile": "#117733", "jax": "#AA3377"}
CURVES_TITLE = "Speed of forward and backward against size, as a percentage of a copy's"
SPEEDUP_TITLE = "Forward and backward together, against torch.nn.PReLU in eager mode"


class Setting(NamedTuple):
    """What is measured, in the words of the results file."""

    case: str
    shape: str
    layout: str
    slope: str
    dtype: str
    slope_dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of x."""
        return math.prod(map(int, self.shape.split("x"))) * ITEMSIZES[self.dtype]

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


class Run(NamedTuple):
    """The file of one run, and what made its figures."""

    path: Path
    facts: dict[str, str]


@dataclass
class Results:
    """What is known of one GPU."""

    stem: Path
    """The folder and <gpu>: what the names of its files begin with."""
    runs: list[Run] = field(default_factory=list)
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
    def measured(self) -> str:
        """The mean, or the worst figure."""
        if not self.values:
            return "no rows for this line"
        figures = [value.figure for value in self.values]
        if self.mean:
            return f"{self.written(statistics.geometric_mean(figures))}, mean of {len(figures)}"
        worst = max(figures) if self.ceiling else min(figures)
        return f"{self.written(worst)}, the worst of {len(figures)}"

    @property
    def verdict(self) -> str:
        """Whether the bar is met; what was not measured is not."""
        if not self.values:
            return "not measured"
        if self.mean:
            mean = statistics.geometric_mean(value.figure for value in self.values)
            return "met" if self.holds(mean) else "not met"
        return f"{len(self.below)} below" if self.below else "met"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit status."""
    options = parse(arguments)
    try:
        all_results = read(options.csv or find(RESULTS))
        old = options.readme.read_text(encoding="utf-8")
        new = with_block(old, block(all_results, options.readme.parent), options.readme)
        if options.check:
            return check(old == new, options.readme)
        options.readme.write_text(new, encoding="utf-8")
        pictures = [path for results in all_results for path in draw(results)]
    except OSError as error:
        return fail(f"{error.filename}: {error.strerror}; give files that can be read and written.")
    except ValueError as error:
        return fail(str(error))

    console = Console(width=None if sys.stdout.isatty() else 140)
    if not all_results:
        console.print(NOT_MEASURED, soft_wrap=True, markup=False)
    for results in all_results:
        print_bar(results, console)
    for path in (options.readme, *pictures):
        console.print(f"Written: {path}", soft_wrap=True)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report",
        description="Make README's table of speed and the plots from results files, and list what "
        "is below the bar.",
    )
    parser.add_argument(
        "csv", nargs="*", type=Path, metavar="CSV", help="default: those of benchmarks/results"
    )
    parser.add_argument(
        "--readme", type=Path, default=README, metavar="README.md", help="default: the checkout's"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="change nothing; exit status 1 if the README's table is not what the files give",
    )
    return parser.parse_args(arguments)


def check(agrees: bool, readme: Path) -> int:
    """Says where the README disagrees; gives the exit status."""
    if agrees:
        return 0
    return fail(
        f"{readme}: its table is not what the results give; `python -m benchmarks report` makes it."
    )


def fail(message: str) -> int:
    """Prints an error; gives the exit status."""
    print(f"benchmarks report: {message}", file=sys.stderr)
    return 1


def find(folder: Path) -> list[Path]:
    """The results files of a folder, but those of `tune` and of quick runs."""
    return sorted(p for p in folder.glob("*.csv") if not p.stem.endswith(("-tune", "-quick")))


def read(paths: Iterable[Path]) -> list[Results]:
    """Reads results files, those of one GPU together."""
    found: dict[Path, Results] = {}
    # What a file before it holds is not taken from the core run.
    for path in sorted(paths, key=lambda path: path.stem.endswith(("-core", "-training"))):
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), set(reader.fieldnames or ())
        stem = path.with_name(path.stem.removesuffix("-core").removesuffix("-training"))
        results = found.setdefault(stem, Results(stem))
        try:
            if any(None in row.values() for row in rows):
                raise ValueError("a line with too few columns")
            if columns >= TRAINING_COLUMNS:
                added = add_training(results, rows)
            elif columns >= CASE_COLUMNS:
                added = add_figures(results, rows)
            else:
                raise ValueError(f"no column {min(CASE_COLUMNS - columns)}")
        except ValueError as error:
            advice = "give files that `python -m benchmarks` wrote"
            raise ValueError(f"{path}: {error}; {advice}.") from error
        if added:
            # A run that was taken up again has the date of its last part.
            results.runs.append(Run(path, {name: rows[-1][name] for name in RUN_COLUMNS}))
    return [results for results in found.values() if results.runs]


def add_figures(results: Results, rows: Sequence[dict[str, str]]) -> bool:
    """Adds the operations that are not there yet, with all providers; whether there were any."""
    operations: dict[tuple[Setting, str], dict[str, Figures]] = {}
    for row in rows:
        setting = Setting(*(row[name] for name in Setting._fields))
        if setting.dtype not in ITEMSIZES or not re.fullmatch(r"\d+(x\d+)*", setting.shape):
            raise ValueError(f"x is {setting.dtype} {setting.shape}")
        operations.setdefault((setting, row["op"]), {})[row["provider"]] = Figures(
            number(row["device_us"]),
            float(row["call_us"]),
            number(row["pct_copy"]),
            number(row["extra_bytes"]),
        )
    new = [key for key in operations if key[1] not in results.figures.get(key[0], {})]
    for setting, op in new:
        results.figures.setdefault(setting, {})[op] = operations[setting, op]
    return bool(new)


def add_training(results: Results, rows: Sequence[dict[str, str]]) -> bool:
    """Adds the training steps of networks; whether there were any."""
    for row in rows:
        network = row["network"], row["batch"], row["layout"], row["dtype"]
        step = Step(number(row["step_us"]), number(row["peak_bytes"]))
        results.training.setdefault(network, {})[row["provider"]] = step
    return bool(rows)


def number(text: str) -> float | None:
    """A figure of a results file; None for an empty field."""
    return float(text) if text else None


def bar(results: Results) -> list[Line]:
    """The bar, and what was measured against it."""
    large = [setting for setting in results.figures if setting.nbytes >= ROOF_BYTES]
    lines = [
        Line(
            f"{op}, x of 64 MiB and more",
            "% of the copy",
            95,
            [
                Value(setting, pct, in_words(results, setting, op, "copy"))
                for setting in large
                if (pct := results.pct_copy(setting, op)) is not None
            ],
        )
        for op in ("forward", "backward")
    ]
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


def group(setting: Setting) -> str:
    """The dtypes that share a bar."""
    return "half precision" if ITEMSIZES[setting.dtype] == 2 else setting.dtype


def speedup_values(results: Results, other: str) -> list[Value]:
    """Forward and backward together against another provider, in every setting that has both."""
    values = []
    for setting in results.figures:
        times = results.step_times(setting, other)
        if times:
            ours, theirs = times
            clock = "device" if setting.nbytes >= DEVICE_BYTES else "call"
            text = f"prelu_gpu {ours:.1f} us, {other} {theirs:.1f} us, {clock}"
            values.append(Value(setting, theirs / ours, text))
    return values


def in_words(results: Results, setting: Setting, op: str, other: str) -> str:
    """The times of prelu_gpu and of another provider, in words."""
    ours, theirs = (results.time_us(setting, op, name) for name in ("prelu_gpu", other))
    return ", ".join(
        f"{name} {us:.1f} us" for name, us in (("prelu_gpu", ours), (other, theirs)) if us
    )


def inference_line(results: Results) -> Line:
    """The module without gradients, at any size: whole calls."""
    values = []
    for setting, ops in results.figures.items():
        figures = ops.get("inference", {})
        if "prelu_gpu" in figures and "eager" in figures:
            ours, theirs = figures["prelu_gpu"].call_us, figures["eager"].call_us
            text = f"prelu_gpu {ours:.1f} us, eager {theirs:.1f} us, call"
            values.append(Value(setting, theirs / ours, text))
    return Line("inference against eager, whole call, any size", "x", 0.95, values)


def memory_line(results: Results) -> Line:
    """What a backward holds beside the gradients."""
    values = [
        Value(setting, extra)
        for setting in results.figures
        if (extra := results.extra_mib(setting, "prelu_gpu")) is not None
    ]
    return Line("memory of the backward beside the gradients", " MiB", 1, values, ceiling=True)


def print_bar(results: Results, console: Console) -> None:
    """Prints the bar, and every row below it."""
    for run in results.runs:
        console.print(f"{run.path}: {describe(run)}", soft_wrap=True, markup=False)
    lines = bar(results)
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("line", "bar", "measured", ""):
        table.add_column(column)
    for line in lines:
        style = None if line.verdict == "met" else "red"
        table.add_row(line.what, line.asked, line.measured, line.verdict, style=style)
    console.print(table)

    for line in lines:
        rows = Table(title=f"Below the bar: {line.what}", box=box.SIMPLE_HEAD, title_justify="left")
        for column in ("case", "x", line.unit.strip(), "numbers"):
            rows.add_column(column)
        for value in sorted(line.below, key=lambda value: value.figure, reverse=line.ceiling):
            setting, figure = value.setting, f"{value.figure:.{DIGITS[line.unit]}f}"
            rows.add_row(setting.case, setting.x, figure, value.numbers)
        if rows.row_count:
            console.print(rows)


def describe(run: Run) -> str:
    """What made a run's figures."""
    facts = run.facts
    return (
        f"{facts['gpu']}, driver {facts['driver']}, torch {facts['torch']}, triton "
        f"{facts['triton']}, prelu_gpu at {facts['commit']}, {facts['date'][:10]}"
    )


def with_block(text: str, content: str, readme: Path) -> str:
    """A README with `content` between the markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{readme}: no lines {BEGIN} and {END}; add them where the table belongs.")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def block(all_results: Sequence[Results], folder: Path) -> str:
    """What stands between README's markers; `folder` is what its links are relative to."""
    parts = [gpu_block(results, folder) for results in all_results]
    return "\n\n".join(parts) if parts else NOT_MEASURED


def gpu_block(results: Results, folder: Path) -> str:
    """One GPU's tables and plots."""
    runs = [f"{describe(run)}: [{run.path.name}]({link(run.path, folder)})" for run in results.runs]
    parts = ["\n".join(f"- {run}" for run in runs)]
    if results.figures:
        parts += [
            "Device time for x of 16 MiB and more, whole-call time below; forward + backward: how "
            "many times as\nlong torch.nn.PReLU takes, eager and compiled. Extra memory: what the "
            "backward holds beside the gradients.",
            case_table(results),
            bar_table(results),
        ]
        parts += [f"![{what}]({link(path, folder)})" for what, path in pictures(results).items()]
    if results.training:
        parts.append(training_table(results))
    return "\n\n".join(parts)


def link(path: Path, folder: Path) -> str:
    """A path as a README in `folder` links it."""
    return Path(os.path.relpath(path, folder)).as_posix()


def case_table(results: Results) -> str:
    """The cases that are taken from models, in the dtype they are used in."""
    rows = []
    for setting in results.figures:
        if (setting.case, setting.dtype, setting.slope_dtype) not in MODEL_SETTINGS:
            continue
        rows.append(
            [
                setting.case,
                setting.x,
                *(rounded(results.pct_copy(setting, op), 0) for op in ("forward", "backward")),
                *(rounded(results.speedup(setting, other), 2) for other in ("eager", "compile")),
                rounded(results.extra_mib(setting, "prelu_gpu"), 2),
                rounded(results.extra_mib(setting, "eager"), 0),
            ]
        )
    header = [
        "case", "x", "forward, % of copy", "backward, % of copy", "x eager", "x compile",
        "extra MiB", "eager's",
    ]  # fmt: skip
    return markdown(header, rows, text_columns=2)


def bar_table(results: Results) -> str:
    """The bar, and what was measured against it."""
    rows = [[line.what, line.asked, line.measured, line.verdict] for line in bar(results)]
    return markdown(["all cases", "bar", "measured", ""], rows, text_columns=4)


def training_table(results: Results) -> str:
    """Whole training steps, with nn.PReLU and with prelu_gpu."""
    rows = []
    for (network, batch, layout, dtype), providers in results.training.items():
        row = [network, f"{batch}, {layout}, {dtype}"]
        for mode in ("", " compile"):
            theirs, ours = (
                providers.get(name + mode, Step()) for name in ("nn.PReLU", "prelu_gpu")
            )
            row += [
                rounded(quotient(theirs.step_us, 1e3), 2),
                rounded(quotient(ours.step_us, 1e3), 2),
                rounded(quotient(theirs.step_us, ours.step_us), 2),
                rounded(quotient(theirs.peak_bytes, MIB), 0),
                rounded(quotient(ours.peak_bytes, MIB), 0),
            ]
        rows.append(row)
    header = ["training step", "batch"]
    for mode in ("", "compiled: "):
        header += [f"{mode}nn.PReLU, ms", "prelu_gpu, ms", "x", "peak MiB", "prelu_gpu"]
    return markdown(header, rows, text_columns=2)


def quotient(figure: float | None, by: float | None) -> float | None:
    """A quotient, where there are both figures."""
    return None if figure is None or by is None else figure / by


def rounded(figure: float | None, digits: int) -> str:
    """A figure in a table; a dash where there is none."""
    return "-" if figure is None else f"{figure:.{digits}f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int) -> str:
    """A table in Markdown; columns after the first ones are numbers."""
    ruler = ["---"] * text_columns + ["--:"] * (len(header) - text_columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ruler, *rows))


def pictures(results: Results) -> dict[str, Path]:
    """The plots that a GPU's figures make, by what they show."""
    paths = {}
    for what, name, data in (
        (CURVES_TITLE, "curves", curves(results)),
        (SPEEDUP_TITLE, "speedup", case_speedups(results)),
    ):
        if data:
            paths[what] = results.stem.with_name(f"{results.stem.name}-{name}.png")
    return paths


def draw(results: Results) -> list[Path]:
    """Draws a GPU's plots; gives their files."""
    drawn = pictures(results)
    for what, path in drawn.items():
        figure = {CURVES_TITLE: draw_curves, SPEEDUP_TITLE: draw_speedups}[what](results)
        runs = dict.fromkeys(map(describe, results.runs))
        figure.suptitle("\n".join([what, *runs]), color=INK, fontsize=12)
        figure.savefig(path, dpi=110)
    return list(drawn.values())


def curves(results: Results) -> dict[tuple[str, str], dict[str, list[tuple[int, float]]]]:
    """By panel and provider: bytes of x and percentage of the copy, by size."""
    panels: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for setting in sorted(results.figures, key=lambda setting: setting.nbytes):
        for op in ("forward", "backward"):
            for provider in PROVIDER_COLORS:
                pct = results.pct_copy(setting, op, provider)
                if setting.is_curve and pct is not None:
                    panel = panels.setdefault((f"slope: {setting.slope}, {setting.dtypes}", op), {})
                    panel.setdefault(provider, []).append((setting.nbytes, pct))
    return panels


def draw_curves(results: Results) -> Figure:
    """A row of panels for each kind of slope and dtype, forward on the left."""
    panels = curves(results)
    kinds = sorted({kind for kind, _ in panels})
    ops = [op for op in ("forward", "backward") if any(op == panel[1] for panel in panels)]
    figure = Figure(figsize=(5.5 * len(ops), 1.2 + 2.6 * len(kinds)), layout="constrained")
    grid = figure.subplots(len(kinds), len(ops), sharex=True, sharey=True, squeeze=False)
    for row, kind in zip(grid, kinds, strict=True):
        for axes, op in zip(row, ops, strict=True):
            clear(axes, f"{op}, {kind}")
            axes.axhline(100, color=GREY, linewidth=1)
            for provider, points in panels.get((kind, op), {}).items():
                sizes, percentages = zip(*points, strict=True)
                color = PROVIDER_COLORS[provider]
                axes.plot(sizes, percentages, "o-", color=color, markersize=4, label=provider)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda nbytes, _: size_name(nbytes))
    axes.set_ylim(bottom=0)
    for axes in grid[-1]:
        axes.set_xlabel("size of x", color=GREY, fontsize=9)
    for axes in grid[:, 0]:
        axes.set_ylabel("% of the copy", color=GREY, fontsize=9)
    lines = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()[1:]}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=4, frameon=False)
    return figure


def size_name(nbytes: float) -> str:
    """A number of bytes in the largest unit that it fills."""
    for unit, name in ((2**30, "GiB"), (MIB, "MiB"), (2**10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:g} {name}"
    return f"{nbytes:g} B"


def case_speedups(results: Results) -> dict[str, list[float]]:
    """Speed-ups against eager of every case but the curves', in all its dtypes."""
    speedups: dict[str, list[float]] = {}
    for value in speedup_values(results, "eager"):
        if not value.setting.is_curve:
            speedups.setdefault(value.setting.case, []).append(value.figure)
    return speedups


def draw_speedups(results: Results) -> Figure:
    """A bar for each case, the slower ones in a colour of their own."""
    speedups = case_speedups(results)
    worst = [min(figures) for figures in speedups.values()]
    places = range(len(worst))
    figure = Figure(figsize=(9, 1.4 + 0.26 * len(worst)), layout="constrained")
    axes = figure.subplots()
    clear(axes, f"bar: the dtype that gains least, dots: the others; orange: below {NOISE}")
    axes.grid(visible=False, axis="y")
    colors = [FASTER if speedup >= NOISE else SLOWER for speedup in worst]
    axes.barh(places, worst, height=0.7, color=colors)
    dots = [(f, place) for place, row in enumerate(speedups.values()) for f in sorted(row)[1:]]
    axes.scatter(*zip(*dots, strict=True) if dots else ([], []), s=12, color=GREY)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_yticks(
        places,
        [f"{case}  {low:.2f}" for case, low in zip(speedups, worst, strict=True)],
        fontsize=8,
    )
    axes.set_ylim(len(worst) - 0.4, -0.6)
    axes.set_xlabel("times as fast as torch.nn.PReLU", color=GREY, fontsize=9)
    return figure


def clear(axes: Axes, title: str) -> None:
    """Gives a panel its title and a light grid in place of a frame."""
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor=GREY, labelsize=8)
    axes.grid(color=LIGHT)
    axes.set_axisbelow(True)
