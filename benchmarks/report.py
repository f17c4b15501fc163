"""Makes README's table of speed, and the plots, from results files; lists what is below the bar.

    python -m benchmarks report            reads benchmarks/results, writes README's table, draws
    python -m benchmarks report PATH ...   reads these files or folders, draws beside them
    python -m benchmarks report --check    only says whether README agrees; exit status 1 if not

What is compared with what stands in figures.py.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
import typer
from matplotlib import pyplot as plt
from rich.console import Console

from benchmarks.cases import LEAKY, MODELS, NORMS
from benchmarks.figures import (
    CURVE_NAMES,
    MIB,
    NETWORK,
    NORM_FAMILIES,
    RUN,
    compare,
    pivot,
    read,
)
from benchmarks.program import fail, make_table, open_console
from benchmarks.providers import OURS, UNFUSED
from benchmarks.results import Run

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- speed -->", "<!-- /speed -->"
NOT_MEASURED = (
    "Not measured yet: no results of a GPU are in `benchmarks/results`; `make gpu-check "
    "PYTHON=python3\nRESULTS=DIR` on a machine with one makes them, from the checkout, with "
    "nothing installed."
)
EXPLANATION = """
Device time for x of 16 MiB and more, whole-call time below; x eager, x compile: how many times as
long PyTorch's module takes, forward and backward; x unfused, PyTorch's norm with prelu_gpu's PReLU.
Extra MiB: what a backward holds beside.
""".strip()

NOISE = 0.97
"""A speed-up that counts as 1."""

USED = [itemgetter("case", "dtype", "slope_dtype")(case.setting) for case in MODELS + LEAKY + NORMS]
"""The cases that are taken from models, in the dtypes they are used in."""
PATHS_HELP = "Files or folders; benchmarks/results if none."
CHECK_HELP = "Change nothing; status 1 if the README disagrees."


def main(
    paths: Annotated[list[Path] | None, typer.Argument(metavar="PATH", help=PATHS_HELP)] = None,
    check: Annotated[bool, typer.Option("--check", help=CHECK_HELP)] = False,
) -> None:
    """Makes README's table of speed and the plots, and lists what is below the bar.

    Files <gpu>.csv, <gpu>-core.csv and <gpu>-training.csv belong together. Where the first two hold
    the same operation of the same case, the first is used. The plots lie beside them. README.md is
    written, or checked, where no PATH is given.
    """
    if check and paths:
        raise typer.BadParameter("README.md is of benchmarks/results: give no PATH.")
    try:
        gpus = read(paths or [RESULTS])
        if not paths:
            write(gpus, check)
        if check:
            return
        pictures = [path for stem, rows in gpus.items() for path in draw(stem, rows)]
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}; give files that can be read and written.")
    console = open_console()
    for rows in gpus.values():
        print_bar(rows, console)
    console.print("\n".join(f"Written: {path}" for path in pictures) if gpus else NOT_MEASURED)


def write(gpus: Mapping[Path, pd.DataFrame], check: bool) -> None:
    """Writes, or checks, what stands between README's markers."""
    between = re.compile(f"(?<={BEGIN}\n).*(?=\n{END})", re.DOTALL)
    old = README.read_text(encoding="utf-8")
    new, count = between.subn(lambda _: block(gpus), old)
    if not count:
        fail(f"{README}: no lines {BEGIN} and {END}; add them where the table belongs.")
    if not check:
        README.write_text(new, encoding="utf-8")
    elif old != new:
        fail(f"{README}: its table is not what `python -m benchmarks report` makes.")


class Line(NamedTuple):
    """One line of the bar: figures that must reach it or, where it is a ceiling, keep below it."""

    what: str
    bar: float
    figures: "pd.Series[float]"
    made_of: Sequence[tuple[str, str]] = ()
    """The operations and providers whose times the figures come from."""
    ceiling: bool = False

    @property
    def below(self) -> "pd.Series[float]":
        """The figures that miss the bar, worst first."""
        missed = self.figures > self.bar if self.ceiling else self.figures < self.bar
        return self.figures[missed].sort_values(ascending=not self.ceiling)

    @property
    def cells(self) -> list[str]:
        """The line in words: what, the bar, what was measured, the verdict."""
        asked = f"at {'most' if self.ceiling else 'least'} {self.bar:g}"
        if self.figures.empty:
            return [self.what, asked, "no rows for this line", "not measured"]
        worst = self.figures.max() if self.ceiling else self.figures.min()
        verdict = f"{len(self.below)} below" if len(self.below) else "met"
        return [self.what, asked, f"{worst:.4g}, the worst of {len(self.figures)}", verdict]


def bar(rows: pd.DataFrame) -> Iterator[Line]:
    """The bar, and what was measured against it; each family's lines are of its own cases."""
    figures = compare(rows)
    level = figures.index.get_level_values
    # A norm's columns have a bar of their own.
    columns = level("family").isin(NORM_FAMILIES.values()) & level("x").str.contains(" channels_")
    large = (level("nbytes") >= 64 * MIB) & ~columns
    for family in ("PReLU", "Leaky ReLU", *NORM_FAMILIES.values()):
        ours = level("family") == family
        for what, least, chosen, op, other in (
            ("forward, % of copy", 95, large, "forward", "copy"),
            ("backward, % of copy", 95, large, "backward", "copy"),
            ("x eager", NOISE, True, "step", "eager"),
            ("x compile", NOISE, True, "step", "compile"),
            ("inference, x eager", 0.95, True, "inference", "eager"),
        ):
            reached = figures.loc[ours & chosen, what].dropna()
            yield Line(f"{family} {what}", least, reached, [(op, OURS), (op, other)])
        extra = figures.loc[ours, "extra MiB"].dropna()
        yield Line(f"{family} backward, extra MiB", 1, extra, ceiling=True)
    for names, what, least, op, other in (
        (["iresnet-norm", "iresnet-norm-cl"], "x eager", 1.6, "step", "eager"),
        (["iresnet-norm", "iresnet-norm-cl"], "x compile", 1.3, "step", "compile"),
        (["iresnet-norm", "iresnet-norm-cl"], "x unfused", 1.4, "step", UNFUSED),
        (["monai-norm"], "x eager", 1.8, "step", "eager"),
        (["iresnet-norm-cl", "monai-norm-cl"], "forward, % of copy", 90, "forward", "copy"),
        (["iresnet-norm-cl", "monai-norm-cl"], "backward, % of copy", 90, "backward", "copy"),
    ):
        reached = figures.loc[level("case").isin(names), what].dropna()
        yield Line(f"{' and '.join(names)} {what}", least, reached, [(op, OURS), (op, other)])
    # PyTorch's Leaky ReLU leaves less to gain.
    cases = (level("family") == "PReLU") & ~level("case").isin(CURVE_NAMES)
    for what, dtypes, least in (
        ("x eager", ["float32"], 1.6),
        ("x eager", ["float16", "bfloat16"], 2.0),
        ("x compile", ["float32", "float16", "bfloat16"], 1.3),
    ):
        chosen = figures.loc[cases & level("dtype").isin(dtypes), what].dropna()
        index = pd.MultiIndex.from_tuples([("PReLU", f"mean of {len(chosen)}", *[""] * 4)])
        mean = pd.Series(np.exp(np.log(chosen).mean()), index).dropna()
        yield Line(f"PReLU {what}, geometric mean in {', '.join(dtypes)}", least, mean)


def print_bar(rows: pd.DataFrame, console: Console) -> None:
    """Prints the bar, and every row below it with the times that it was made of."""
    for path, run in sources(rows).items():
        console.print(f"{path}: {run}", soft_wrap=True, markup=False)
    lines, device_us, call_us = list(bar(rows)), pivot(rows, "device_us"), pivot(rows, "call_us")
    table = make_table(["line", "at least, at most", "measured", ""])
    for line in lines:
        table.add_row(*line.cells, style=None if line.cells[-1] == "met" else "red")
    console.print(table)
    for line in (line for line in lines if len(line.below)):
        columns = [f"{provider} {us}" for _, provider in line.made_of for us in ("us", "call us")]
        below = make_table(["case", "x"], ["", *columns], title=f"Below the bar: {line.what}")
        for setting, figure in line.below.items():
            times = [t.loc[setting, of] for of in line.made_of for t in (device_us, call_us)]
            below.add_row(*setting[1:3], *(f"{number:.4g}" for number in (figure, *times)))
        console.print(below)


def sources(rows: pd.DataFrame) -> dict[Path, Run]:
    """A GPU's files and runs; one that was taken up again has the date of its last part."""
    last = rows.groupby("path", sort=False)[RUN].last()
    return {path: Run(*run) for path, run in last.iterrows()}


def _link(path: Path) -> str:
    return Path(os.path.relpath(path, README.parent)).as_posix()


def block(gpus: Mapping[Path, pd.DataFrame]) -> str:
    """What stands between README's markers."""
    parts = []
    for stem, rows in gpus.items():
        runs = sources(rows).items()
        parts.append("\n".join(f"- {run}: [{path.name}]({_link(path)})" for path, run in runs))
        if rows["case"].notna().any():
            cells = pd.DataFrame([line.cells for line in bar(rows)])
            cells.columns = ["all cases", "bar", "measured", ""]
            parts += [EXPLANATION, *case_tables(rows), markdown(cells)]
        parts += [f"![{title}]({_link(path)})" for path, title in plots(stem, rows).items()]
        if rows["network"].notna().any():
            parts.append(training_table(rows[rows["network"].notna()]))
    return "\n\n".join(parts) or NOT_MEASURED


def case_tables(rows: pd.DataFrame) -> Iterator[str]:
    """The cases that are taken from models, by family."""
    figures = compare(rows).reset_index()
    figures = figures[
        pd.MultiIndex.from_frame(figures[["case", "dtype", "slope_dtype"]]).isin(USED)
    ]
    for family, table in figures.groupby("family", sort=False):
        table = table.drop(columns=["family", "dtype", "slope_dtype", "nbytes"])
        if family not in NORM_FAMILIES.values():
            table = table.drop(columns="x unfused")
        yield markdown(table.rename(columns={"case": str(family)}).round(2))


def training_table(rows: pd.DataFrame) -> str:
    """Whole training steps; x is nn.PReLU's time, not compiled, over the row's."""
    table = rows[[*NETWORK, "provider"]].assign(ms=rows["step_us"] / 1e3)
    eager = table["ms"].where(table["provider"] == "nn.PReLU")
    table["x"] = eager.groupby([rows[name] for name in NETWORK]).transform("max") / table["ms"]
    return markdown(table.assign(**{"peak MiB": rows["peak_bytes"] / MIB}).round(2))


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown; a dash where there is no figure."""
    return table.astype(object).where(table.notna(), "-").to_markdown(index=False)


def plots(stem: Path, rows: pd.DataFrame) -> dict[Path, str]:
    """The titles of the plots for which there are figures, by their files."""
    curve, titles = rows["case"].isin(CURVE_NAMES), {}
    if rows.loc[curve, "pct_copy"].notna().any():
        titles["curves"] = "Speed against size, as a percentage of a copy's"
    if compare(rows[~curve])["x eager"].notna().any():
        titles["speedup"] = "Forward and backward, times as fast as PyTorch's module in eager mode"
    return {stem.with_name(f"{stem.name}-{name}.png"): title for name, title in titles.items()}


def draw(stem: Path, rows: pd.DataFrame) -> list[Path]:
    """Draws a GPU's plots; gives their files."""
    for path, title in plots(stem, rows).items():
        grid = draw_curves(rows) if path.stem.endswith("-curves") else draw_speedups(rows)
        runs = dict.fromkeys(map(str, sources(rows).values()))
        grid.figure.suptitle("\n".join([title, *runs]), y=1, va="bottom")
        grid.savefig(path, dpi=110)
        plt.close(grid.figure)
    return list(plots(stem, rows))


def draw_curves(rows: pd.DataFrame) -> sns.FacetGrid:
    """Percentage of the copy by size: a row of panels for each kind of slope and dtype."""
    rows = rows[rows["case"].isin(CURVE_NAMES) & rows["op"].isin(["forward", "backward"])]
    rows = rows[rows["provider"] != "copy"].assign(MiB=rows["nbytes"] / MIB)
    rows["slopes"] = rows["slope"] + " slope, " + rows["dtype"]
    style = {"hue": "provider", "kind": "line", "marker": "o", "height": 2.6, "aspect": 2}
    grid = sns.relplot(rows, x="MiB", y="pct_copy", row="slopes", col="op", **style)
    grid.refline(y=100).set(xscale="log", ylim=(0, None)).set_titles("{col_name}, {row_name}")
    return grid.set_axis_labels("size of x, MiB", "% of the copy")


def draw_speedups(rows: pd.DataFrame) -> sns.FacetGrid:
    """A bar for each case, its slowest dtype, orange below 1; dots for every dtype."""
    values = compare(rows[~rows["case"].isin(CURVE_NAMES)])["x eager"].dropna().reset_index()
    values["case"] = (values["family"] + " ").replace("PReLU ", "") + values["case"]
    values["slower"] = values.groupby("case")["x eager"].transform("min") < NOISE
    bars = {"hue": "slower", "palette": {False: "#0072B2", True: "#D55E00"}, "dodge": False}
    bars |= {"kind": "bar", "estimator": "min", "errorbar": None, "legend": False}
    height = 1 + values["case"].nunique() / 4
    grid = sns.catplot(values, x="x eager", y="case", **bars, height=height, aspect=8 / height)
    grid.map_dataframe(sns.stripplot, x="x eager", y="case", color="0.4", size=3, jitter=False)
    return grid.refline(x=1).set_axis_labels("times as fast", "")
