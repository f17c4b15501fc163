"""Draws PReLU and Leaky ReLU with their gradients, and max(x, 2x), which is not PReLU.

Every curve is an output of prelu_gpu, or what autograd made of it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from prelu_gpu import leaky_relu, prelu

X = torch.arange(-200, 201) / 100  # 0 is one of them
INK, GREY = "#222222", "#666666"


def slope(a: float) -> Callable[[Tensor], Tensor]:
    """PReLU with the slope a."""
    return lambda x: prelu(x, torch.tensor(a))


# Function, name, colour, style, and where the name stands in either panel.
CURVES = (
    (slope(-0.5), "PReLU, a = \N{MINUS SIGN}0.5", "#AA3377", "-", (-1.95, 1.06), (-1.95, -0.43)),
    (leaky_relu, "Leaky ReLU, a = 0.01", "#0072B2", "-", (-1.95, 0.06), (-1.95, -0.16)),
    (slope(0.25), "PReLU, a = 0.25", "#D55E00", "-", (-1.95, -0.7), (-1.95, 0.32)),
    (slope(2.0), "PReLU, a = 2", "#117733", "-", (-0.84, -1.9), (-1.95, 2.07)),
    (lambda x: x.maximum(2 * x), "max(x, 2x)", GREY, "--", (-0.13, 1.9), (0.75, 2.07)),
)


Folder = Annotated[Path, typer.Option(metavar="DIR", help="Folder for functions.png.")]


def main(out: Folder = Path("out")) -> None:
    """Draws PReLU, Leaky ReLU, their gradients, and max(x, 2x), which is not PReLU."""
    picture = out / "functions.png"
    try:
        out.mkdir(parents=True, exist_ok=True)
        draw().savefig(picture, dpi=100)
    except OSError as error:
        raise typer.BadParameter(
            f"{picture} cannot be written ({error.strerror}); give another folder",
            param_hint="--out",
        ) from None
    typer.echo(f"Picture: {picture}")


@rc_context({"font.size": 13, "xtick.major.pad": 9, "ytick.major.pad": 7})
def draw() -> Figure:
    """The functions on the left, their gradients on the right."""
    figure = Figure(figsize=(12, 6.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    functions, gradients = panels = figure.subplots(1, 2)
    functions.set_title("PReLU(x) = x where x > 0, else a · x", fontsize=16, pad=14)
    gradients.set_title("Their gradients by x, and by a (dotted)", fontsize=16, pad=14)
    for axes in panels:
        ticks = range(-2, 3)
        axes.set(xlim=(-2, 2), ylim=(-2, 2.25), xticks=ticks, yticks=ticks, aspect="equal")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelcolor=GREY)
        axes.grid(color="#e6e6e6")
        axes.set_axisbelow(True)

    for function, label, color, style, *places in CURVES:
        x = X.clone().requires_grad_()
        y = function(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        right = INK if style == "-" else color  # the same for every slope
        for axes, heights, place in zip(panels, (y.detach(), grad), places, strict=True):
            for side, shade in ((X < 0, color), (X > 0, right)):
                line = {"color": shade, "linewidth": 2.5, "label": label}
                axes.plot(X[side], heights[side], style, **line)
            axes.text(*place, label, color=color)
        dot = {"color": color, "markersize": 8, "zorder": 3, "label": label}
        gradients.plot(X[X == 0], grad[X == 0], "o", **dot)
    # At each x a channel with a slope of its own.
    slopes = torch.full_like(X, 0.25, requires_grad=True)
    (by_a,) = torch.autograd.grad(prelu(X.unsqueeze(0), slopes).sum(), slopes)
    gradients.plot(X, by_a, ":", color=INK, linewidth=2.5, label="by a")
    functions.text(0.98, 0.72, "x, for every a", color=INK)
    gradients.text(0.75, 1.07, "1, for every a", color=INK)
    gradients.text(0.1, 1.45, "at x = 0: 1.5", color=GREY)
    gradients.text(0.1, 0.2, "at x = 0: a", color=INK)
    gradients.text(-1.2, -1.45, "by a: x where x ≤ 0, else 0", color=INK)
    return figure
