"""Draws the plots of a GPU's figures: speed against size, and the speed-up of every case."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.bar import NOISE, speedup_values
from benchmarks.measured import MIB, Results

INK, GREY, LIGHT = "#222222", "#666666", "#e6e6e6"
FASTER, SLOWER = "#0072B2", "#D55E00"
PROVIDER_COLORS = {"prelu_gpu": FASTER, "eager": SLOWER, "compile": "#117733", "jax": "#AA3377"}
CURVES_TITLE = "Speed of forward and backward against size, as a percentage of a copy's"
SPEEDUP_TITLE = "Forward and backward together, against torch.nn.PReLU in eager mode"


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
        runs = dict.fromkeys(str(source.run) for source in results.sources)
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
