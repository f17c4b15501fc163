"""Trains one super-resolution network twice, with nn.PReLU and with prelu_gpu, and compares them.

    python -m benchmarks.demo                       on the photographs in the scikit-image wheel
    python -m benchmarks.demo --photos ~/Pictures   on your own

Both trainings start from the same weights and see the same crops. They have to agree up to
rounding and to beat bicubic interpolation; if not, the exit status is 1 (2 for unusable input).
"""

import argparse
import contextlib
import copy
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from benchmarks.photos import (
    CROP,
    SCALE,
    InputError,
    Photo,
    downscale,
    load_photos,
    psnr,
    random_crops,
    upscale,
)
from benchmarks.srgan import (
    AdversarialLosses,
    Discriminator,
    Generator,
    Training,
    train,
    train_adversarially,
)

COMPARED_STEPS = 20
NEEDED_GAIN = 0.3
DETAIL = 80


class Options(argparse.Namespace):
    """The command line."""

    photos: Path | None
    out: Path
    steps: int
    batch: int
    channels: int
    seed: int
    adversarial: bool
    adversarial_steps: int
    device: torch.device


@dataclass
class Adversarial:
    """What --adversarial made of a network: its losses, and the photograph held out."""

    losses: AdversarialLosses
    output: Tensor
    psnr: float


@dataclass
class Result:
    """One of the two networks: its training, and the photograph held out as it restores it."""

    name: str
    training: Training
    output: Tensor
    psnr: float
    adversarial: Adversarial | None = None


@dataclass
class Agreement:
    """How far two trainings are apart where only rounding may separate them.

    Attributes:
        losses: The largest difference of the losses in the first steps, relative to the largest.
        gradients: The largest difference of the first step's gradients, each parameter's relative
            to its largest.
        limit: What rounding explains of either.
    """

    losses: float
    gradients: float
    limit: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit status."""
    try:
        options = parse(arguments)
        photos = load_photos(options.photos)
        make_folder(options.out)
        prelu_gpu = import_prelu_gpu(options.device)
    except InputError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2

    console = Console()
    describe(console, photos, options.device)

    torch.manual_seed(options.seed)
    generator = Generator(options.channels).to(options.device)
    accelerated = prelu_gpu.accelerate(copy.deepcopy(generator))
    with reproducible(), progress_bars(console) as progress:
        reference = run("nn.PReLU", generator, nn.LeakyReLU, photos, options, progress)
        ours = run("prelu_gpu", accelerated, prelu_gpu.LeakyReLU, photos, options, progress)

    target = photos[-1].batch()
    bicubic = upscale(downscale(target)).clamp(0, 1)
    bicubic_psnr = psnr(bicubic, target)
    agreement = compare(reference.training, ours.training, options)
    console.print(report(photos[-1].name, bicubic_psnr, reference, ours, agreement))
    picture = options.out / "demo.png"
    draw(photos[-1], bicubic, reference, ours).savefig(picture, dpi=120)
    console.print(f"Picture: {picture}", markup=False, highlight=False)

    failures = find_failures(bicubic_psnr, reference, ours, agreement)
    for failure in failures:
        print(f"demo: {failure}", file=sys.stderr)
    return 1 if failures else 0


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage and leaving."""
        raise InputError(f"{message}; see --help")


def parse(arguments: Sequence[str] | None) -> Options:
    """Reads the command line."""
    parser = Parser(
        prog="python -m benchmarks.demo",
        description="Train a small x2 super-resolution network twice from one seed, with "
        "torch.nn.PReLU and with prelu_gpu, and compare the two.",
    )

    def add_number(flag: str, lowest: int, default: int, meaning: str) -> None:
        parser.add_argument(
            flag,
            type=whole_number(lowest),
            default=default,
            metavar="N",
            help=f"{meaning} (default: {default})",
        )

    parser.add_argument(
        "--photos",
        type=Path,
        metavar="DIR",
        help="folder of two or more PNG, JPEG, WebP, TIFF or BMP photographs (default: those in "
        "the scikit-image wheel); the last by name is held out of training to measure the result; "
        "larger ones are reduced to 1024 pixels a side",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("out"),
        help="folder for demo.png (default: out)",
    )
    add_number("--steps", 1, 300, "training steps")
    add_number("--batch", 1, 8, f"crops of {CROP} x {CROP} pixels in a step")
    add_number("--channels", 1, 16, "channels of the network")
    add_number("--seed", 0, 0, "seed of the weights and the crops")
    parser.add_argument(
        "--adversarial",
        action="store_true",
        help="go on as SRGAN does, against a discriminator of Leaky ReLU layers",
    )
    add_number("--adversarial-steps", 1, 100, "steps of --adversarial")
    devices = available_devices()
    parser.add_argument(
        "--device",
        choices=devices,
        default=devices[-1],
        help=f"where to train: %(choices)s (default: {devices[-1]})",
        metavar="DEVICE",
    )
    options = parser.parse_args(arguments, Options())
    options.device = torch.device(options.device)
    return options


def whole_number(lowest: int) -> Callable[[str], int]:
    """An argument's type: a whole number from `lowest` up."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = -1
        if not lowest <= number < 2**31:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not allowed; give a whole number from {lowest} up"
            )
        return number

    return convert


def available_devices() -> list[str]:
    """The devices here that kernels can run on, the preferred one last."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type not in ("cuda", "xpu"):
        return ["cpu"]
    numbered = [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    return ["cpu", *numbered, accelerator.type]


def make_folder(folder: Path) -> None:
    """Makes the folder of the results, before anything long is begun."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--out {folder}: no folder can be made there ({error.strerror}); give another"
        ) from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"--out {folder}: cannot be written to; give another folder")


def import_prelu_gpu(device: torch.device) -> ModuleType:
    """Imports prelu_gpu so that its kernels run on `device`."""
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when the kernels are imported
    import prelu_gpu
    from prelu_gpu import functional
    from prelu_gpu.backend import Backend, backend, reason

    if backend(device) is Backend.EAGER:
        raise InputError(
            f"--device {device}: the kernels cannot run ({reason(device)}); "
            "use Linux with triton installed"
        )
    # Its pictures are small: on a GPU PyTorch's operator would serve most of them.
    functional.EAGER_BELOW = 0
    return prelu_gpu


def describe(console: Console, photos: list[Photo], device: torch.device) -> None:
    """Says what is going to be done, and on what."""
    *names, held_out = (photo.name for photo in photos)
    lines = [f"Photographs: {', '.join(names)}. Held out of training: {held_out}."]
    if device.type == "cpu":
        lines.append(
            "No GPU is used: the kernels of prelu_gpu run interpreted on the CPU, and everything "
            "on one thread. The times below are not GPU times."
        )
    else:
        lines.append(f"Device: {torch.get_device_module(device).get_device_name(device)}.")
    console.print("\n".join(lines), markup=False, highlight=False)


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """Float32 throughout, and the same bits on every run.

    On a CPU one thread: networks this small gain little from more, and their sums change with it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            yield
    finally:
        torch.set_num_threads(threads)


def progress_bars(console: Console) -> Progress:
    """The display of the trainings as they run."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def run(
    name: str,
    generator: nn.Module,
    activation: type[nn.LeakyReLU],
    photos: list[Photo],
    options: Options,
    progress: Progress,
) -> Result:
    """Trains one network and has it restore the photograph that is held out."""
    *training_photos, held_out = photos
    target = held_out.batch()

    def batches(seed: int, steps: int, description: str) -> Iterator[Tensor]:
        crops = islice(random_crops(training_photos, options.batch, seed), steps)
        for batch in progress.track(crops, total=steps, description=description):
            yield batch.to(options.device)

    training = train(generator, batches(options.seed, options.steps, name), options.device)
    output = restore(generator, target, options.device)
    result = Result(name, training, output, psnr(output, target))
    if options.adversarial:
        torch.manual_seed(options.seed)
        discriminator = Discriminator(options.channels, activation).to(options.device)
        losses = train_adversarially(
            generator,
            discriminator,
            batches(options.seed + 1, options.adversarial_steps, f"{name}, adversarial"),
        )
        output = restore(generator, target, options.device)
        result.adversarial = Adversarial(losses, output, psnr(output, target))
    return result


@torch.no_grad()
def restore(generator: nn.Module, target: Tensor, device: torch.device) -> Tensor:
    """What the network makes of a photograph's halved copy, on the CPU."""
    output: Tensor = generator(downscale(target).to(device))
    return output.clamp(0, 1).cpu()


def compare(reference: Training, other: Training, options: Options) -> Agreement:
    """Measures how far two trainings of one network are apart.

    The limit is sqrt(n) * eps for the n elements of the largest activation. The gradient of a
    shared slope sums n products of either sign, whose sizes add up to about sqrt(n) times their
    sum, and each may be off by eps. Adam hands such relative errors on to its steps, so to what
    the loss falls by. But it divides a gradient by its own size, and so a slope gradient twice
    too large would not show in the losses: hence the first step's gradients too.
    """
    expected = torch.tensor(reference.losses[:COMPARED_STEPS], dtype=torch.float64)
    actual = torch.tensor(other.losses[:COMPARED_STEPS], dtype=torch.float64)
    # A sum may cancel further by chance, to nothing that matters for the loss.
    least = 1e-4 * reference.losses[0]
    gradients = [
        (other.gradients[name] - gradient).abs().max() / gradient.abs().max().clamp(min=least)
        for name, gradient in reference.gradients.items()
    ]
    n = options.batch * options.channels * CROP**2
    return Agreement(
        losses=((actual - expected).abs().max() / expected.max()).item(),
        gradients=torch.stack(gradients).max().item(),
        limit=math.sqrt(n) * torch.finfo(torch.float32).eps,
    )


def find_failures(
    bicubic_psnr: float, reference: Result, ours: Result, agreement: Agreement
) -> list[str]:
    """Says what is wrong with the trainings, one line each."""
    failures = [
        f"the {what} of nn.PReLU and prelu_gpu differ by {difference:.1e}, "
        f"but rounding explains at most {agreement.limit:.1e}"
        for what, difference in (
            (f"losses of the first {COMPARED_STEPS} steps", agreement.losses),
            ("gradients of the first step", agreement.gradients),
        )
        if not difference <= agreement.limit
    ]
    failures += [
        f"{result.name} reaches {result.psnr:.2f} dB and bicubic {bicubic_psnr:.2f} dB, "
        f"but {NEEDED_GAIN} dB more than bicubic are needed; train for more --steps"
        for result in (reference, ours)
        if not result.psnr - bicubic_psnr >= NEEDED_GAIN
    ]
    return failures


def report(
    photo: str, bicubic_psnr: float, reference: Result, ours: Result, agreement: Agreement
) -> Table:
    """The figures as a table."""
    table = Table(
        title=f"x{SCALE} super-resolution, measured on {escape(photo)}",
        caption="Differences are the largest, relative to the largest loss or gradient.",
    )
    table.add_column("")
    for name in ("bicubic", reference.name, ours.name):
        table.add_column(name, justify="right")

    def add(label: str, figure: Callable[[Result], str], bicubic: str = "") -> None:
        table.add_row(label, bicubic, figure(reference), figure(ours))

    add("PSNR, dB", lambda result: f"{result.psnr:.3f}", f"{bicubic_psnr:.3f}")
    add("time per step, median", lambda r: f"{statistics.median(r.training.seconds) * 1e3:.1f} ms")
    if ours.training.peak_bytes is not None:
        add("peak memory", lambda r: f"{(r.training.peak_bytes or 0) / 2**20:.1f} MiB")
    for label, number in (
        (f"difference of losses, first {COMPARED_STEPS} steps", agreement.losses),
        ("difference of gradients, first step", agreement.gradients),
        ("what rounding explains of either", agreement.limit),
    ):
        table.add_row(label, "", "", f"{number:.1e}")
    if reference.adversarial and ours.adversarial:
        table.add_section()
        table.add_row("after the adversarial steps")
        after: list[tuple[str, Callable[[Adversarial], str]]] = [
            ("  PSNR, dB", lambda a: f"{a.psnr:.3f}"),
            ("  content loss", lambda a: f"{a.losses.content:.4f}"),
            ("  adversarial loss", lambda a: f"{a.losses.adversarial:.4f}"),
            ("  discriminator loss", lambda a: f"{a.losses.discriminator:.4f}"),
        ]
        for label, figure in after:
            table.add_row(label, "", figure(reference.adversarial), figure(ours.adversarial))
    return table


def draw(photo: Photo, bicubic: Tensor, reference: Result, ours: Result) -> Figure:
    """The photograph's most detailed part, restored, above the losses of the two trainings."""
    target = photo.batch()
    panels = [
        (f"input, 1/{SCALE} of the size", downscale(target)),
        (f"bicubic, {psnr(bicubic, target):.2f} dB", bicubic),
        (f"network, {ours.psnr:.2f} dB", ours.output),
        ("original", target),
    ]
    if ours.adversarial:
        title = f"adversarial, {ours.adversarial.psnr:.2f} dB"
        panels.insert(3, (title, ours.adversarial.output))

    figure = Figure(figsize=(12, 6), layout="constrained")
    title = f"{photo.name}, held out of training; PSNR of the whole photograph"
    figure.suptitle(title, parse_math=False)
    rows = figure.add_gridspec(2, len(panels), height_ratios=(3, 2))
    top, left, side = most_detailed(bicubic, target)
    for column, (title, pictures) in enumerate(panels):
        axes = figure.add_subplot(rows[0, column])
        reduction = target.shape[-1] // pictures.shape[-1]
        y, x, pixels = top // reduction, left // reduction, side // reduction
        detail = pictures[0, :, y : y + pixels, x : x + pixels]
        axes.imshow(detail.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(title)
        axes.set_axis_off()

    axes = figure.add_subplot(rows[1, :])
    for result, style in (
        (reference, {"color": "tab:orange", "linewidth": 3}),
        (ours, {"color": "tab:blue", "linestyle": "--"}),
    ):
        axes.plot(relative_losses(result.training), label=result.name, **style)
    axes.axhline(1, color="grey", linewidth=1, label="bicubic")
    axes.set(xlabel="step", ylabel="L1 loss, bicubic = 1")
    axes.margins(x=0.005)
    axes.legend()
    return figure


def relative_losses(training: Training) -> list[float]:
    """The losses, divided by bicubic interpolation's: some crops are far harder than others."""
    return [
        loss / bicubic if bicubic > 0 else math.nan
        for loss, bicubic in zip(training.losses, training.bicubic_losses, strict=True)
    ]


def most_detailed(bicubic: Tensor, target: Tensor) -> tuple[int, int, int]:
    """The top, left and side of the square that bicubic interpolation restores worst."""
    stride = 4 * SCALE
    side = min(DETAIL, *target.shape[2:])
    errors = (bicubic - target).square().mean(1, keepdim=True)
    errors = F.avg_pool2d(errors, side, stride)
    row, column = divmod(int(errors.argmax()), errors.shape[3])
    return row * stride, column * stride, side


if __name__ == "__main__":
    sys.exit(main())
