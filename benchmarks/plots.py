"""Draws the plots of a GPU's figures: speed against size, and the speed-up of every case."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.bar import NOISE, speedup_values
from benchmarks.measured import MIB, Results

INK, GREY, LIGHT = "#222222", "#666666", "#e6e6e6"
FASTER, SLOWER = "#0072B2", "#D55E00"
PROVIDER_COLORS = {"prelu_gpu": FASTER, "eager": SLOWER, "compile": "#117733", "jax": "#AA3377"}
CURVES_TITLE = "Speed of forward and backward against size, as a percentage of a copy's"
SPEEDUP_TITLE = "Forward and backward together, against torch.nn.PReLU in eager mode"


Panels = dict[tuple[str, str], dict[str, list[tuple[int, float]]]]
"""By panel (slope and dtype, operation) and provider: bytes of x and percentage of the copy."""


class Plot(NamedTuple):
    """A plot that a GPU's figures make."""

    title: str
    path: Path
    draw: Callable[[], Figure]


def plots(results: Results) -> list[Plot]:
    """The plots for which there are figures; their files lie beside the results."""
    panels, speedups = curves(results), case_speedups(results)
    found = []
    if panels:
        path = results.stem.with_name(f"{results.stem.name}-curves.png")
        found.append(Plot(CURVES_TITLE, path, partial(draw_curves, panels)))
    if speedups:
        path = results.stem.with_name(f"{results.stem.name}-speedup.png")
        found.append(Plot(SPEEDUP_TITLE, path, partial(draw_speedups, speedups)))
    return found


def draw(results: Results) -> list[Path]:
    """Draws a GPU's plots; gives their files."""
    drawn = plots(results)
    runs = dict.fromkeys(str(source.run) for source in results.sources)
    for plot in drawn:
        figure = plot.draw()
        figure.suptitle("\n".join([plot.title, *runs]), color=INK, fontsize=12)
        figure.savefig(plot.path, dpi=110)
    return [plot.path for plot in drawn]


def curves(results: Results) -> Panels:
    """The curves of every panel, by size."""
    panels: Panels = {}
    for setting in sorted(results.figures, key=lambda setting: setting.nbytes):
        for op in ("forward", "backward"):
            for provider in PROVIDER_COLORS:
                pct = results.pct_copy(setting, op, provider)
                if setting.is_curve and pct is not None:
                    panel = panels.setdefault((f"slope: {setting.slope}, {setting.dtypes}", op), {})
                    panel.setdefault(provider, []).append((setting.nbytes, pct))
    return panels


def draw_curves(panels: Panels) -> Figure:
    """A row of panels for each kind of slope and dtype, forward on the left."""
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


def draw_speedups(speedups: dict[str, list[float]]) -> Figure:
    """A bar for each case, the slower ones in a colour of their own."""
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
