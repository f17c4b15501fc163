"""Trains a super-resolution network twice, with nn.PReLU and with prelu_gpu, and compares them."""

import copy
import math
import os
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table
from torch import Tensor

# Triton reads it when the kernels are imported: without a GPU they are interpreted.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.accelerator.is_available() else "1")

import prelu_gpu
from benchmarks import gate
from benchmarks.photos import CROP, Photo, load_photos, random_crops
from benchmarks.program import fail, make_table, open_console, progress_bars
from benchmarks.srgan import SCALE, Generator, Training, backward, downscale, psnr, train, upscale
from prelu_gpu import backend

COMPARED_STEPS = 20
NEEDED_GAIN = 0.3
DETAIL = 80
STYLES = {
    "nn.PReLU": {"color": "tab:orange", "linewidth": 3},
    "prelu_gpu": {"color": "tab:blue", "linestyle": "--"},
}


def main(
    photos: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            exists=True,
            file_okay=False,
            readable=True,
            show_default="those in the scikit-image wheel",
            help="Folder of two or more PNG, JPEG, WebP, TIFF or BMP photographs. The last by name "
            "is held out of training to measure the result; larger ones are reduced to 1024 "
            "pixels a side.",
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", file_okay=False, writable=True, help="Folder for demo.png."),
    ] = Path("out"),
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Training steps.")] = 300,
    batch: Annotated[
        int, typer.Option(min=1, metavar="N", help="Crops of 48 x 48 pixels in a step.")
    ] = 8,
    channels: Annotated[
        int, typer.Option(min=1, metavar="N", help="Channels of the network.")
    ] = 16,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Seed of the weights and the crops.")
    ] = 0,
) -> None:
    """Trains a small x2 super-resolution network twice, with torch.nn.PReLU and with prelu_gpu.

    Both trainings start from the same weights and see the same crops. They have to agree up to
    rounding and to beat bicubic interpolation; if not, the exit status is 1.
    """
    *training_photos, held_out = load_photos(photos)
    device = find_device()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{error}; give another folder", param_hint="--out") from error
    console = open_console()
    names = ", ".join(photo.name for photo in training_photos)
    said = f"Photographs: {names}. Held out of training: {held_out.name}.\n"
    if device.type == "cpu":
        said += (
            "No GPU is used: the kernels of prelu_gpu run interpreted on the CPU, and everything "
            "on one thread. The times below are not GPU times."
        )
        torch.set_num_threads(1)  # small networks gain little from more, and their sums change
    console.print(said, markup=False, highlight=False)

    def crops() -> Iterator[Tensor]:
        for high in islice(random_crops(training_photos, batch, seed), steps):
            yield high.to(device)

    torch.manual_seed(seed)
    plain = Generator(channels).to(device)
    networks = {"nn.PReLU": plain, "prelu_gpu": prelu_gpu.accelerate(copy.deepcopy(plain))}
    reproducible = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    # Its pictures are small: on a GPU PyTorch's operator would serve most of them.
    with reproducible, prelu_gpu.kernel_threshold(0), progress_bars(console) as progress:
        first_step = partial(backward, high=next(crops()))
        gradients = max(
            gate.compare(plain, first_step, torch.float32), key=lambda d: (d.is_wrong, d.share)
        )
        trainings = {
            name: train(network, progress.track(crops(), steps, description=name), held_out.batch())
            for name, network in networks.items()
        }
    losses = compare_losses(trainings, batch * channels * CROP**2)

    target = held_out.batch()
    bicubic = upscale(downscale(target)).clamp(0, 1)
    console.print(make_report(held_out, psnr(bicubic, target), trainings, losses, gradients))
    picture = out / "demo.png"
    draw(held_out, bicubic, trainings).savefig(picture, dpi=120)
    console.print(f"Picture: {picture}", markup=False, highlight=False)

    failures = [
        f"nn.PReLU and prelu_gpu differ: {difference}"
        for difference in (losses, gradients)
        if difference.is_wrong
    ]
    needed = psnr(bicubic, target) + NEEDED_GAIN
    failures += [
        f"{name} reaches {training.psnr:.2f} dB, but {needed:.2f} dB are needed, {NEEDED_GAIN} dB "
        "more than bicubic interpolation; train for more --steps"
        for name, training in trainings.items()
        if not training.psnr >= needed
    ]
    if failures:
        fail(*failures)


def find_device() -> torch.device:
    """Where to train: on a GPU if there is one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    usable = accelerator is not None and accelerator.type in backend.KERNEL_DEVICES
    device = accelerator if usable else torch.device("cpu")
    if not backend.has_kernels(device):
        raise typer.BadParameter(
            f"the kernels cannot run ({backend.reason(device)}); use Linux with triton installed"
        )
    return device


def compare_losses(trainings: Mapping[str, Training], n: int) -> gate.Difference:
    """How far the first losses are apart, relative to the largest.

    Rounding explains sqrt(n) * eps for the n elements of the largest activation: the gradient of a
    shared slope sums n products of either sign, whose sizes add up to about sqrt(n) times their
    sum, and each may be off by eps. Adam hands such relative errors on to its steps, so to what the
    loss falls by.
    """
    expected, actual = (
        torch.tensor(training.losses[:COMPARED_STEPS]).double() for training in trainings.values()
    )
    distance = ((actual - expected).abs().max() / expected.max()).item()
    name = f"losses of the first {COMPARED_STEPS} steps"
    return gate.Difference(name, distance, math.sqrt(n) * torch.finfo(torch.float32).eps)


def make_report(
    photo: Photo,
    bicubic_psnr: float,
    trainings: Mapping[str, Training],
    losses: gate.Difference,
    gradients: gate.Difference,
) -> Table:
    """The figures as a table."""
    table = make_table(
        [""],
        ["bicubic", *trainings],
        title=f"x{SCALE} super-resolution, measured on {escape(photo.name)}",
        caption="Differences: how large, of how much rounding explains.",
    )
    results = trainings.values()
    table.add_row("PSNR, dB", f"{bicubic_psnr:.3f}", *(f"{r.psnr:.3f}" for r in results))
    times = (f"{r.step_seconds * 1e3:.1f} ms" for r in results)
    table.add_row("time per step, median", "", *times)
    peaks = [f"{r.peak_bytes / 2**20:.1f} MiB" for r in results if r.peak_bytes is not None]
    if peaks:
        table.add_row("peak memory", "", *peaks)
    for label, found in (
        (f"difference of losses, first {COMPARED_STEPS} steps", losses),
        ("difference of gradients, first step", gradients),
    ):
        table.add_row(label, "", "", f"{found.distance:.1e} of {found.explained:.1e}")
    return table


def draw(photo: Photo, bicubic: Tensor, trainings: Mapping[str, Training]) -> Figure:
    """The photograph's most detailed part, restored, above the losses of the two trainings."""
    target = photo.batch()
    ours = trainings["prelu_gpu"]
    panels = {
        f"input, 1/{SCALE} of the size": downscale(target),
        f"bicubic, {psnr(bicubic, target):.2f} dB": bicubic,
        f"network, {ours.psnr:.2f} dB": ours.output,
        "original": target,
    }
    figure = Figure(figsize=(12, 6), layout="constrained")
    title = f"{photo.name}, held out of training; PSNR of the whole photograph"
    figure.suptitle(title, parse_math=False)
    rows = figure.add_gridspec(2, len(panels), height_ratios=(3, 2))
    top, left, side = most_detailed(bicubic, target)
    for column, (title, pictures) in enumerate(panels.items()):
        axes = figure.add_subplot(rows[0, column])
        reduction = target.shape[-1] // pictures.shape[-1]
        y, x, pixels = top // reduction, left // reduction, side // reduction
        detail = pictures[0, :, y : y + pixels, x : x + pixels]
        axes.imshow(detail.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(title)
        axes.set_axis_off()

    axes = figure.add_subplot(rows[1, :])
    for name, training in trainings.items():
        # Relative to bicubic interpolation: some crops are far harder than others.
        losses = np.divide(training.losses, training.bicubic_losses)
        axes.plot(losses, label=name, **STYLES[name])
    axes.axhline(1, color="grey", linewidth=1, label="bicubic")
    axes.set(xlabel="step", ylabel="L1 loss, bicubic = 1")
    axes.margins(x=0.005)
    axes.legend()
    return figure


def most_detailed(bicubic: Tensor, target: Tensor) -> tuple[int, int, int]:
    """The top, left and side of the square that bicubic interpolation restores worst."""
    stride = 4 * SCALE
    side = min(DETAIL, *target.shape[2:])
    errors = (bicubic - target).square().mean(1, keepdim=True)
    errors = F.avg_pool2d(errors, side, stride)
    row, column = divmod(int(errors.argmax()), errors.shape[3])
    return row * stride, column * stride, side
