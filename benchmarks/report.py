"""Makes README's table of speed, and the plots, from results files; lists what is below the bar.

python -m benchmarks report            reads benchmarks/results, writes README's table, draws
python -m benchmarks report PATH ...   reads these files or folders, draws beside them
python -m benchmarks report --check    only says whether README agrees; exit status 1 if not
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
import typer
from matplotlib import pyplot as plt
from rich.console import Console

from benchmarks.cases import CURVES, LEAKY, MODELS, PASSES
from benchmarks.program import fail, make_table, open_console
from benchmarks.providers import OURS
from benchmarks.results import Run

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- speed -->", "<!-- /speed -->"
NOT_MEASURED = (
    "Not measured yet: no results of a GPU are in `benchmarks/results`; `make gpu-check "
    "PYTHON=python3\nRESULTS=DIR` on a machine with one makes them, from the checkout, with "
    "nothing installed."
)
EXPLANATION = (
    "Device time for x of 16 MiB and more, whole-call time below; forward + backward: how many "
    "times as\nlong PyTorch's module takes, eager and compiled. Extra memory: what the backward "
    "holds beside the gradients."
)

MIB = 2**20
DEVICE_BYTES = 16 * MIB
"""Size of x from which device time counts; below it is the time of the whole call."""
ROOF_BYTES = 64 * MIB
"""Size of x from which the copy is the bar."""
NOISE = 0.97
"""A speed-up that counts as 1."""

SETTING = ["family", "case", "x", "dtype", "slope_dtype", "nbytes"]
"""What is measured: `x` says it in words, `nbytes` is its size."""
NETWORK = ["network", "batch", "layout", "dtype"]
RUN = [field.name for field in fields(Run)]
CASE = ["case", "shape", "layout", "slope", "dtype", "slope_dtype", "op", "provider"]
FIGURES = ["device_us", "call_us", "bytes", "pct_copy", "extra_bytes", "step_us", "peak_bytes"]
USED = [(c["case"], c["dtype"], c["slope_dtype"]) for c in (m.setting for m in MODELS + LEAKY)]
"""The cases that are taken from models, in the dtypes they are used in."""
CURVE_NAMES = {case.name for case in CURVES}


def main(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PATH", help="Files or folders; benchmarks/results if none."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; status 1 if the README disagrees.")
    ] = False,
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
            old = README.read_text(encoding="utf-8")
            new = with_block(old, block(gpus))
            if check and old != new:
                fail(f"{README}: its table is not what `python -m benchmarks report` makes.")
            if check:
                return
            README.write_text(new, encoding="utf-8")
        pictures = [path for stem, rows in gpus.items() for path in draw(stem, rows)]
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}; give files that can be read and written.")
    console = open_console()
    for rows in gpus.values():
        print_bar(rows, console)
    console.print("\n".join(map("Written: {}".format, pictures)) if gpus else NOT_MEASURED)


def read(paths: Sequence[Path]) -> dict[Path, pd.DataFrame]:
    """The rows of results files by GPU: the folder and <gpu>, what the names of its files begin with.

    Files of `tune` and of quick runs are no results.
    """
    files = [f for path in paths for f in (sorted(path.glob("*.csv")) if path.is_dir() else [path])]
    found: dict[Path, list[pd.DataFrame]] = {}
    # What a file before it holds is not taken from the core run.
    for path in sorted(files, key=lambda path: path.stem.endswith(("-core", "-training"))):
        if not path.stem.endswith(("-tune", "-quick")):
            stem = path.with_name(path.stem.removesuffix("-core").removesuffix("-training"))
            found.setdefault(stem, []).append(load(path))
    gpus = {stem: pd.concat(frames) for stem, frames in found.items()}
    for stem, rows in gpus.items():
        first = rows.groupby([*CASE[:-1], "network"], dropna=False)["path"].transform("first")
        gpus[stem] = rows[rows["path"] == first]
    return {stem: rows for stem, rows in gpus.items() if len(rows)}


def load(path: Path) -> pd.DataFrame:
    """A file's rows, with what follows from their columns."""
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    if not any({*RUN, *names} <= {*rows} for names in (CASE, NETWORK)):
        advice = "give files that `python -m benchmarks` wrote"
        raise typer.BadParameter(f"{path}: it has other columns; {advice}.")
    rows = rows.reindex(columns=[*RUN, *CASE, *NETWORK[:2], *FIGURES]).assign(path=path)
    rows[FIGURES] = rows[FIGURES].apply(pd.to_numeric, errors="coerce")
    layout = (" " + rows["layout"]).where(rows["layout"] != "contiguous", "")
    slope = (", slope " + rows["slope_dtype"]).where(rows["slope_dtype"] != rows["dtype"], "")
    rows["x"] = rows["shape"] + layout + ", " + rows["slope"] + ", " + rows["dtype"] + slope
    rows["family"] = np.where(rows["slope"] == "number", "Leaky ReLU", "PReLU")
    rows["nbytes"] = rows["bytes"] / rows["op"].map(PASSES)
    rows["us"] = rows["device_us"].where(rows["nbytes"] >= DEVICE_BYTES, rows["call_us"])
    rows["curve"] = rows["case"].isin(CURVE_NAMES)
    return rows


def pivot(rows: pd.DataFrame, figure: str, op: str, *providers: str) -> pd.DataFrame:
    """A figure of some providers, by setting."""
    rows = rows[rows["op"] == op].dropna(subset=figure)
    table = rows.pivot_table(figure, SETTING, "provider", aggfunc="last", sort=False)
    return table.reindex(columns=list(providers))


def steps(rows: pd.DataFrame, other: str) -> pd.DataFrame:
    """Times of prelu_gpu and of another, forward and backward together, and how they compare."""
    step, forward, backward = (
        pivot(rows, "us", op, OURS, other) for op in ("step", "forward", "backward")
    )
    both = pd.concat([step.dropna(), (forward + backward).dropna()])
    both = both[~both.index.duplicated()]
    return both.assign(figure=both[other] / both[OURS])


class Line(NamedTuple):
    """One line of the bar: a figure that every setting must reach."""

    what: str
    unit: str
    least: float
    values: pd.DataFrame
    """`figure` of each setting, beside the times that it was made of."""
    sign: int = 1
    """-1 where the figure must not exceed the bar, rather than reach it."""

    @property
    def below(self) -> pd.DataFrame:
        """The settings that miss the bar, worst first."""
        margin = self.sign * (self.values["figure"] - self.least)
        return self.values[margin < 0].iloc[margin[margin < 0].argsort()]

    @property
    def cells(self) -> list[str]:
        """The line in words: what, the bar, what was measured, the verdict."""
        asked = f"at {'least' if self.sign > 0 else 'most'} {self.least:g}{self.unit}"
        if self.values.empty:
            return [self.what, asked, "no rows for this line", "not measured"]
        worst = self.sign * (self.sign * self.values["figure"]).min()
        measured = f"{worst:.4g}{self.unit}, the worst of {len(self.values)}"
        return [
            self.what,
            asked,
            measured,
            f"{len(self.below)} below" if len(self.below) else "met",
        ]


def bar(all_rows: pd.DataFrame) -> Iterator[Line]:
    """The bar, and what was measured against it; PyTorch's Leaky ReLU leaves less to gain."""
    for family in ("PReLU", "Leaky ReLU"):
        rows = all_rows[all_rows["family"] == family]
        for op in ("forward", "backward"):
            values = pivot(rows, "us", op, OURS, "copy")
            values["figure"] = pivot(rows, "pct_copy", op, OURS)[OURS]
            large = values.index.get_level_values("nbytes") >= ROOF_BYTES
            what = f"{family} {op}, x of 64 MiB and more"
            yield Line(what, "% of the copy", 95, values[large].dropna(subset="figure"))
        for other, means in (
            ("eager", {"float32": 1.6, "float16": 2.0, "bfloat16": 2.0}),
            ("compile", {"float32": 1.3, "float16": 1.3, "bfloat16": 1.3}),
        ):
            values = steps(rows, other)
            what = f"{family} forward + backward against {other}"
            for dtype, least in means.items() if family == "PReLU" else ():
                yield Line(f"{what}, mean in {dtype}", "x", least, mean(values, dtype))
            yield Line(f"{what}, every case and size", "x", NOISE, values)
        calls = pivot(rows, "call_us", "inference", OURS, "eager").dropna()
        calls["figure"] = calls["eager"] / calls[OURS]
        yield Line(f"{family} inference against eager, whole call", "x", 0.95, calls)
        extra = pivot(rows, "extra_bytes", "backward", OURS).dropna() / MIB
        what = f"{family}: memory of the backward beside the gradients"
        yield Line(what, " MiB", 1, extra.rename(columns={OURS: "figure"}), sign=-1)


def mean(values: pd.DataFrame, dtype: str) -> pd.DataFrame:
    """The geometric mean of the cases in a dtype as one setting; curves are left out."""
    chosen = values[values.index.get_level_values("dtype") == dtype]
    chosen = chosen[~chosen.index.get_level_values("case").isin(CURVE_NAMES)]
    setting = pd.MultiIndex.from_tuples([("", f"mean of {len(chosen)}", dtype, *SETTING[3:])])
    return pd.DataFrame({"figure": np.exp(np.log(chosen["figure"]).mean())}, setting).dropna()


def print_bar(rows: pd.DataFrame, console: Console) -> None:
    """Prints the bar, and every row below it."""
    for source in sources(rows):
        console.print(source, soft_wrap=True, markup=False)
    lines = list(bar(rows))
    table = make_table(["line", "bar", "measured", ""])
    for line in lines:
        table.add_row(*line.cells, style=None if line.cells[-1] == "met" else "red")
    console.print(table)
    for line in lines:
        below = make_table(
            ["case", "x"],
            [name.replace("figure", line.unit) for name in line.values],
            title=f"Below the bar: {line.what}",
        )
        for setting, row in line.below.iterrows():
            below.add_row(*setting[1:3], *(f"{figure:.4g}" for figure in row))
        if below.row_count:
            console.print(below)


def sources(rows: pd.DataFrame) -> list[str]:
    """A GPU's files and runs; one that was taken up again has the date of its last part."""
    return [
        f"[{path.name}]({link(path)}): {Run(*last)}"
        for path, last in rows.groupby("path", sort=False)[RUN].last().iterrows()
    ]


def link(path: Path) -> str:
    """A path as the README links it."""
    return Path(os.path.relpath(path, README.parent)).as_posix()


def with_block(text: str, content: str) -> str:
    """A README with `content` between the markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        fail(f"{README}: no lines {BEGIN} and {END}; add them where the table belongs.")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def block(gpus: Mapping[Path, pd.DataFrame]) -> str:
    """What stands between README's markers."""
    parts = []
    for stem, rows in gpus.items():
        parts.append("\n".join(f"- {source}" for source in sources(rows)))
        if rows["case"].notna().any():
            parts += [EXPLANATION, *case_tables(rows)]
            cells = [line.cells for line in bar(rows)]
            parts.append(
                markdown(pd.DataFrame(cells, columns=["all cases", "bar", "measured", ""]))
            )
        parts += [f"![{title}]({link(path)})" for path, title in plots(stem, rows)]
        if rows["network"].notna().any():
            parts.append(training_table(rows[rows["network"].notna()]))
    return "\n\n".join(parts) or NOT_MEASURED


def case_tables(all_rows: pd.DataFrame) -> Iterator[str]:
    """The cases that are taken from models, PReLU's and Leaky ReLU's apart."""
    used = pd.MultiIndex.from_frame(all_rows[["case", "dtype", "slope_dtype"]]).isin(USED)
    for family, rows in all_rows[used].groupby("family", sort=False):
        table = rows[SETTING].drop_duplicates().set_index(SETTING, drop=False)[["case", "x"]]
        table = table.rename(columns={"case": str(family)})
        for op in ("forward", "backward"):
            table[f"{op}, % of copy"] = pivot(rows, "pct_copy", op, OURS)[OURS].round()
        for other in ("eager", "compile"):
            table[f"x {other}"] = steps(rows, other)["figure"].round(2)
        extra = pivot(rows, "extra_bytes", "backward", OURS, "eager") / MIB
        table["extra MiB"], table["eager's"] = extra[OURS].round(2), extra["eager"].round()
        yield markdown(table)


def training_table(rows: pd.DataFrame) -> str:
    """Whole training steps; x is nn.PReLU's time, not compiled, over the row's."""
    table = rows[[*NETWORK, "provider"]].assign(ms=rows["step_us"] / 1e3)
    eager = table["ms"].where(table["provider"] == "nn.PReLU")
    table["x"] = eager.groupby([rows[name] for name in NETWORK]).transform("max") / table["ms"]
    return markdown(table.assign(**{"peak MiB": rows["peak_bytes"] / MIB}).round(2))


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown; a dash where there is no figure."""
    return table.astype(object).where(table.notna(), "-").to_markdown(index=False)


def plots(stem: Path, rows: pd.DataFrame) -> list[tuple[Path, str]]:
    """The plots for which there are figures: their files and titles."""
    curves = "Speed of forward and backward against size, as a percentage of a copy's"
    speedups = "Forward and backward together, times as fast as PyTorch's module in eager mode"
    found = {"curves": curves} if rows["curve"].any() else {}
    if len(without_curves(rows)):
        found["speedup"] = speedups
    return [(stem.with_name(f"{stem.name}-{name}.png"), title) for name, title in found.items()]


def without_curves(rows: pd.DataFrame) -> pd.DataFrame:
    """Speed-ups against eager of every case except the curves', in all its dtypes."""
    values = steps(rows[~rows["curve"]], "eager").reset_index()
    worst = values.groupby(["family", "case"])["figure"].transform("min")
    return values.assign(slower=worst < NOISE)


def draw(stem: Path, rows: pd.DataFrame) -> list[Path]:
    """Draws a GPU's plots; gives their files."""
    found = plots(stem, rows)
    for path, title in found:
        grid = draw_curves(rows) if path.stem.endswith("-curves") else draw_speedups(rows)
        grid.figure.suptitle("\n".join([title, *sources(rows)]), y=1, va="bottom")
        grid.savefig(path, dpi=110)
        plt.close(grid.figure)
    return [path for path, _ in found]


def draw_curves(rows: pd.DataFrame) -> sns.FacetGrid:
    """Percentage of the copy by size: a row of panels for each kind of slope and dtype."""
    rows = rows[rows["curve"] & rows["op"].isin(["forward", "backward"])]
    rows = rows[rows["provider"] != "copy"].assign(MiB=rows["nbytes"] / MIB)
    rows["kind"] = rows["slope"] + " slope, " + rows["dtype"]
    grid = sns.relplot(
        rows, x="MiB", y="pct_copy", hue="provider", row="kind", col="op", kind="line", marker="o",
        height=2.6, aspect=2,
    )  # fmt: skip
    grid.refline(y=100).set(xscale="log", ylim=(0, None)).set_titles("{col_name}, {row_name}")
    return grid.set_axis_labels("size of x, MiB", "% of the copy")


def draw_speedups(rows: pd.DataFrame) -> sns.FacetGrid:
    """A bar for each case, its slowest dtype, orange below 1; dots for every dtype."""
    values = without_curves(rows)
    grid = sns.catplot(
        values, x="figure", y="case", hue="slower", row="family", kind="bar", estimator="min",
        errorbar=None, palette={False: "#0072B2", True: "#D55E00"}, dodge=False, legend=False,
        sharey=False, height=1 + 0.25 * values["case"].nunique(), aspect=1.5,
    )  # fmt: skip
    grid.map_dataframe(sns.stripplot, x="figure", y="case", color="#666666", size=3, jitter=False)
    return grid.refline(x=1).set_titles("{row_name}").set_axis_labels("times as fast", "")
