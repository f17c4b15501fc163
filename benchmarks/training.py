"""Times training steps of whole networks with torch.nn.PReLU and with prelu_gpu, on a GPU.

    python -m benchmarks.training --results DIR   all networks, also into DIR/<gpu>-training.csv
    python -m benchmarks.training --quick         fewer steps, nothing compiled

A step is forward, loss, backward and optimizer, on one batch that stays on the GPU. First every
network takes a step with either module from the same state: where loss or gradients disagree, no
time is printed and the exit status is 1. Compiled networks are not compared so: Inductor rounds
elsewhere. Without a GPU nothing is timed: sizes are printed.
"""

import argparse
import copy
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

import prelu_gpu
from benchmarks.__main__ import fail, find_obstacle
from benchmarks.cases import LAYOUTS
from benchmarks.networks import (
    ConvTasNet,
    CosineClassifier,
    IResNet,
    UNet,
    arcface_loss,
    dice_loss,
    si_snr_loss,
)
from benchmarks.photos import downscale
from benchmarks.results import ResultsFile, describe_run, progress_bars, slug
from benchmarks.srgan import Generator

WARM_UP = 5
STEPS = 30
QUICK_STEPS = 8
COMPILING_S = 90.0
"""Seconds that must be left where a compilation begins: a guess."""

FIRST_SCALE = 2.0**16
"""Where GradScaler starts."""

CHANCE = 3
"""How many times as far apart as two runs of one network a third run may be."""

IDENTITIES = 10_000

Providers = dict[str, Callable[[nn.Module], nn.Module]]
"""By name, what makes a network run as it is measured."""

EAGER: Providers = {
    "nn.PReLU": lambda model: model,
    "prelu_gpu": prelu_gpu.accelerate,
}
COMPILED: Providers = {
    "nn.PReLU compile": torch.compile,
    "prelu_gpu compile": lambda model: torch.compile(prelu_gpu.accelerate(model)),
}


@dataclass(frozen=True)
class Workload:
    """A network and how it is trained.

    Attributes:
        network: its name.
        batch: examples in a step.
        layout: of the network and its input.
        dtype: float16 for float32 weights under autocast, with a GradScaler.
        build: makes the network, its weights from the global generator.
        draw: makes a batch of random inputs and targets on a device.
        loss: of the network's output and the target.
        optimizer: over its parameters.
    """

    network: str
    batch: int
    layout: str
    dtype: torch.dtype
    build: Callable[[], nn.Module]
    draw: Callable[[int, torch.device], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

    @property
    def title(self) -> str:
        """What tells it from the others."""
        return f"{self.network}, {self.layout}"

    @property
    def dtype_name(self) -> str:
        """The dtype without its module."""
        return str(self.dtype).removeprefix("torch.")


def draw_faces(
    batch: int, device: torch.device, size: int = 112, identities: int = IDENTITIES
) -> tuple[Tensor, Tensor]:
    """Pictures (batch, 3, size, size) and identities (batch,)."""
    return (
        torch.randn(batch, 3, size, size, device=device),
        torch.randint(identities, (batch,), device=device),
    )


def draw_volumes(batch: int, device: torch.device, side: int = 192) -> tuple[Tensor, Tensor]:
    """Volumes (batch, 1, side, side, side), and dark and bright voxels as (batch, 2, ...)."""
    volumes = torch.randn(batch, 1, side, side, side, device=device)
    return volumes, torch.cat([volumes <= 0, volumes > 0], 1).float()


def draw_mixtures(batch: int, device: torch.device, samples: int = 32_000) -> tuple[Tensor, Tensor]:
    """Four seconds of two voices at 8 kHz: their sum (batch, samples), and (batch, 2, samples)."""
    voices = torch.randn(batch, 2, samples, device=device)
    return voices.sum(1), voices


def draw_pictures(batch: int, device: torch.device, size: int = 192) -> tuple[Tensor, Tensor]:
    """Pictures (batch, 3, size, size): of half that size, and themselves."""
    pictures = torch.rand(batch, 3, size, size, device=device)
    return downscale(pictures), pictures


IRESNET = Workload(
    "iresnet50",
    batch=128,
    layout="contiguous",
    dtype=torch.float16,
    build=lambda: nn.Sequential(IResNet(), CosineClassifier(512, IDENTITIES)),
    draw=draw_faces,
    loss=arcface_loss,
    optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=5e-4),
)
UNET = Workload(
    "unet3d",
    batch=2,
    layout="contiguous",
    dtype=torch.float32,
    build=UNet,
    draw=draw_volumes,
    loss=dice_loss,
    optimizer=partial(torch.optim.Adam, lr=1e-3),
)
CONV_TASNET = Workload(
    "conv-tasnet",
    batch=8,
    layout="contiguous",
    dtype=torch.float32,
    build=ConvTasNet,
    draw=draw_mixtures,
    loss=si_snr_loss,
    optimizer=partial(torch.optim.Adam, lr=1e-3),
)
SRGAN = Workload(
    "srgan",
    batch=16,
    layout="contiguous",
    dtype=torch.float32,
    build=lambda: Generator(64),
    draw=draw_pictures,
    loss=F.l1_loss,
    optimizer=partial(torch.optim.Adam, lr=2e-3),
)
WORKLOADS = (IRESNET, UNET, replace(IRESNET, layout="channels_last"), CONV_TASNET, SRGAN)
"""The most telling first: a run may be cut off."""


@dataclass(frozen=True)
class Row:
    """One line of the results file after the columns of Run; None where nothing was measured.

    Attributes:
        step_us: the median of the steps' times.
        iqr_us: their interquartile range.
        steps: how many were timed.
        peak_bytes: see Device.peak_bytes.
        speedup: nn.PReLU's median, not compiled, over this one.
    """

    network: str
    batch: int
    layout: str
    dtype: str
    provider: str
    step_us: float | None = None
    iqr_us: float | None = None
    steps: int = 0
    peak_bytes: int | None = None
    speedup: float | None = None


class OutOfTimeError(Exception):
    """The minutes that were given are nearly over."""


class Deadline:
    """The end of a run.

    Args:
        minutes: from now; None for no end.
        clock: seconds.
    """

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = math.inf if minutes is None else clock() + 60 * minutes

    def check(self, seconds: float = 0.0) -> None:
        """Raises OutOfTimeError where so many seconds are not left."""
        if self._clock() + seconds >= self._end:
            raise OutOfTimeError


class Device(Protocol):
    """What a measurement needs of a device; tests bring their own."""

    device: torch.device
    name: str

    def step_us(self, step: Callable[[], object]) -> float:
        """Time of one step, the host's part included."""

    def peak_bytes(self, step: Callable[[], object]) -> int:
        """Most memory held at once during a step, above what is held before it.

        Held before it are weights, optimizer state and the batch, but no gradients: the peak is of
        activations, gradients and workspaces.
        """


class Gpu:
    """The current CUDA device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.name: str = torch.cuda.get_device_name(self.device)
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def step_us(self, step: Callable[[], object]) -> float:
        """Time between events around a step that an idle device is given."""
        torch.cuda.synchronize()
        self._start.record()
        step()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e3

    def peak_bytes(self, step: Callable[[], object]) -> int:
        """The caching allocator's peak; cuDNN's workspaces are in it."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before


class Training:
    """A network in training on one batch."""

    def __init__(
        self,
        workload: Workload,
        model: nn.Module,
        batch: tuple[Tensor, Tensor],
        scale: float = FIRST_SCALE,
    ) -> None:
        self._workload = workload
        self._model = model
        self._input, self._target = batch
        self._half = workload.dtype is not torch.float32
        self._optimizer = workload.optimizer(model.parameters())
        self._scaler = torch.amp.GradScaler(
            self._input.device.type, init_scale=scale, enabled=self._half
        )

    def backward(self) -> Tensor:
        """Forward, loss and backward; the parameters get their scaled gradients."""
        device_type = self._input.device.type
        with torch.autocast(device_type, self._workload.dtype, enabled=self._half):
            loss = self._workload.loss(self._model(self._input), self._target)
        self._scaler.scale(loss).backward()
        return loss.detach()

    def step(self) -> Tensor:
        """One step of training, which leaves no gradients; gives the loss before it."""
        loss = self.backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        return loss


def build(workload: Workload, device: torch.device) -> nn.Module:
    """The network as all its trainings start, always the same.

    Its slopes differ, so that one taken for another shows, and are bfloat16 numbers, which float16
    has too: autocast rounds nn.PReLU's slopes and not prelu_gpu's, and these stay the same.
    """
    torch.manual_seed(0)
    with device:
        model = workload.build()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.PReLU):
                module.weight.uniform_(0.05, 0.5).copy_(module.weight.bfloat16())
    return model.to(memory_format=LAYOUTS[workload.layout])


def draw(workload: Workload, device: torch.device) -> tuple[Tensor, Tensor]:
    """The batch of all its trainings, always the same."""
    torch.manual_seed(1)
    examples, target = workload.draw(workload.batch, device)
    return examples.to(memory_format=LAYOUTS[workload.layout]), target


@dataclass
class Gradients:
    """What a backward left: the loss, and every parameter's gradient, both as scaled.

    Attributes:
        rounding: what rounding may change of the slopes' gradients, by name.
    """

    loss: Tensor
    by_name: dict[str, Tensor]
    rounding: dict[str, Tensor] = field(default_factory=dict)


def differentiate(
    workload: Workload, model: nn.Module, batch: tuple[Tensor, Tensor], scale: float
) -> Gradients:
    """One backward of a network as it stands."""
    rounding = watch_slopes(model)
    loss = Training(workload, model, batch, scale).backward()
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return Gradients(loss, gradients, rounding)


def watch_slopes(model: nn.Module) -> dict[str, Tensor]:
    """Fills the dictionary with slope_rounding of every PReLU as the model's backward comes by."""
    rounding: dict[str, Tensor] = {}

    def watch(name: str, module: nn.PReLU) -> None:
        def forward(module: nn.Module, inputs: tuple[Tensor], y: Tensor) -> None:
            x = inputs[0].detach().to(y.dtype)

            def backward(grad_y: Tensor) -> None:
                rounding[name] = slope_rounding(x, grad_y, module.weight)

            y.register_hook(backward)

        module.register_forward_hook(forward)

    for name, module in model.named_modules():
        if isinstance(module, nn.PReLU):
            watch(f"{name}.weight", module)
    return rounding


def slope_rounding(x: Tensor, grad_y: Tensor, slopes: Tensor) -> Tensor:
    """How far two computations of the slopes' gradient may be apart; shaped as the slopes.

    nn.PReLU rounds every product grad_y * x to their dtype, and the sum once more. The roundings of
    the products are independent, each of a standard deviation of 0.29 eps of the product: 2 eps of
    the root of the sum of squares is seven times that of the sum. Products that underflow lose at
    most the smallest subnormal number, all to the same side. Adding up in float32, in any order,
    costs about eps of the sum of magnitudes.
    """
    info = torch.finfo(x.dtype)
    products = torch.where(x > 0, 0.0, grad_y.float() * x.float())
    others = [d for d in range(x.dim()) if slopes.numel() == 1 or d != 1]
    adding = torch.finfo(torch.float32).eps * products.abs()
    return (
        2 * info.eps * products.square().sum(others).sqrt()
        + info.eps * products.sum(others).abs()
        + (adding + info.eps * info.smallest_normal).sum(others)
    ).view_as(slopes)


class Verdict(NamedTuple):
    """What is wrong, in words, and the loss scale that kept everything finite."""

    mistakes: list[str]
    scale: float


def check(workload: Workload, device: torch.device) -> Verdict:
    """Compares one step of a network with prelu_gpu to the same with nn.PReLU.

    PReLU's output and input gradient are nn.PReLU's bit for bit, so with cuDNN's deterministic
    algorithms only the slopes' gradients should differ. Where something else is not deterministic,
    a second step with nn.PReLU shows by how much. Beside that, loss and gradients may be off by the
    epsilon of the dtype, gradients in norm: in half precision a small element of a gradient carries
    the rounding of large ones that cancel.
    """
    model = build(workload, device)
    batch = draw(workload, device)

    def gradients(variant: Callable[[nn.Module], nn.Module], scale: float) -> Gradients:
        return differentiate(workload, variant(copy.deepcopy(model)), batch, scale)

    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        expected, scale = find_scale(lambda scale: gradients(EAGER["nn.PReLU"], scale))
        if not is_finite(expected):
            return Verdict(["nn.PReLU's own loss or gradients are not finite"], scale)
        again = gradients(EAGER["nn.PReLU"], scale)
        actual = gradients(EAGER["prelu_gpu"], scale)
    eps = torch.finfo(workload.dtype).eps
    return Verdict(list(compare(actual, expected, again, eps)), scale)


def find_scale(gradients: Callable[[float], Gradients]) -> tuple[Gradients, float]:
    """The gradients at the first loss scale that keeps them finite, as GradScaler finds it."""
    scale = FIRST_SCALE
    while not is_finite(result := gradients(scale)) and scale > 1:
        scale /= 2
    return result, scale


def is_finite(gradients: Gradients) -> bool:
    """Whether no number overflowed."""
    return all(
        bool(tensor.isfinite().all()) for tensor in (gradients.loss, *gradients.by_name.values())
    )


def compare(actual: Gradients, expected: Gradients, again: Gradients, eps: float) -> Iterator[str]:
    """The mistakes of `actual`; `expected` and `again` are two runs of what it should be."""

    def is_wrong(actual: Tensor, expected: Tensor, again: Tensor, rounding: Tensor) -> bool:
        limit = rounding.norm() + CHANCE * (again - expected).norm()
        return not bool((actual - expected).norm() <= limit)  # NaN is wrong

    if is_wrong(actual.loss, expected.loss, again.loss, eps * expected.loss):
        yield f"the loss is {actual.loss.item()}, with nn.PReLU {expected.loss.item()}"
    wrong = [
        name
        for name, gradient in expected.by_name.items()
        if name not in actual.by_name
        or is_wrong(
            actual.by_name[name],
            gradient,
            again.by_name[name],
            expected.rounding.get(name, eps * gradient),
        )
    ]
    if wrong:
        yield (
            f"{len(wrong)} of {len(expected.by_name)} parameters have wrong gradients, "
            f"{wrong[0]} is the first"
        )


@dataclass(frozen=True)
class Plan:
    """What a run times: every network by the providers of each stage, stage after stage.

    Attributes:
        workloads: the networks.
        stages: providers that are timed in turn.
        steps: to time.
        suffix: what follows the GPU's name in the file's.
    """

    workloads: Sequence[Workload]
    stages: Sequence[Providers] = (EAGER, COMPILED)
    steps: int = STEPS
    suffix: str = "-training"


class Job(NamedTuple):
    """A network and the providers to time it with."""

    workload: Workload
    providers: Providers

    @property
    def title(self) -> str:
        """What tells it from the others."""
        return f"{self.workload.title}, {' and '.join(self.providers)}"


@dataclass
class Timing:
    """A provider's samples, or why there are none.

    Attributes:
        samples: the time of every step in us.
        peak_bytes: see Device.peak_bytes.
        error: in one line.
    """

    samples: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    error: str | None = None

    @property
    def step_us(self) -> float:
        """Median time of a step."""
        return statistics.median(self.samples)

    @property
    def iqr_us(self) -> float:
        """Interquartile range of the times."""
        lower, _, upper = statistics.quantiles(self.samples, n=4)
        return upper - lower


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit status."""
    options = parse(arguments)
    deadline = Deadline(options.minutes)
    workloads = [w for w in WORKLOADS if not options.network or w.network in options.network]
    console = Console(width=None if sys.stdout.isatty() else 140)
    obstacle = find_obstacle()
    if obstacle:
        console.print(f"Nothing is timed: {obstacle}", soft_wrap=True)
        console.print(sizes_table(workloads))
        return 0
    # As training scripts do whose shapes stay the same.
    torch.backends.cudnn.benchmark = True
    plan = Plan(workloads)
    if options.quick:
        plan = Plan(workloads, (EAGER,), QUICK_STEPS, "-training-quick")
    return benchmark(Gpu(), plan, deadline, options.results, console)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description="Time training steps with torch.nn.PReLU and with prelu_gpu.",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="write DIR/<gpu>-training.csv, row by row; one of the same commit is continued",
    )
    names = list(dict.fromkeys(workload.network for workload in WORKLOADS))
    parser.add_argument(
        "--network",
        nargs="+",
        choices=names,
        metavar="NAME",
        help=f"only these: {', '.join(names)}",
    )
    parser.add_argument(
        "--minutes",
        type=positive,
        metavar="M",
        help="stop before so many are over; with --results the same command goes on",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_STEPS} steps of each instead of {STEPS}, and no torch.compile",
    )
    return parser.parse_args(arguments)


def positive(text: str) -> float:
    """An argument's type: a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; give a number above 0")
    return number


def benchmark(
    device: Device, plan: Plan, deadline: Deadline, folder: Path | None, console: Console
) -> int:
    """Checks the networks, times them and reports; gives the exit status."""
    run = describe_run(device)
    console.print(
        f"{run.gpu}, driver {run.driver}, torch {run.torch}, triton {run.triton}, "
        f"prelu_gpu at {run.commit}"
    )
    file = None
    if folder:
        try:
            file = ResultsFile(folder, slug(run.gpu) + plan.suffix, run, Row)
        except OSError as error:
            return fail(f"--results {folder}: {error.strerror}; give a folder that can be written.")
        except ValueError as error:
            return fail(f"--results {folder}: {error}")
    jobs = remaining(plan, file.rows if file else [])

    try:
        verdicts = check_jobs(device, jobs, deadline, console)
    except OutOfTimeError:
        return fail("--minutes: too few to check the networks, so nothing is timed; give more.")
    except torch.OutOfMemoryError as error:
        return fail(f"{first_line(error)} Choose smaller networks with --network.")
    wrong = [
        f"{title}: {mistake}" for title, verdict in verdicts.items() for mistake in verdict.mistakes
    ]
    if wrong:
        return fail("\n".join(["wrong results, so nothing is timed.", *wrong]))

    table = results_table(plan.steps)
    left = time_jobs(device, jobs, verdicts, plan.steps, deadline, file, table, console)
    console.print(table)
    if left:
        console.print(
            f"The minutes given are over. Not timed: {'; '.join(job.title for job in left)}. "
            "With --results the same command goes on.",
            soft_wrap=True,
        )
    if file:
        console.print(f"Results: {file.path}", soft_wrap=True)
    return 0


def remaining(plan: Plan, rows: Sequence[Mapping[str, str]]) -> list[Job]:
    """What is to be timed and has no rows yet."""
    finished = {(row["network"], row["layout"], row["provider"]) for row in rows}
    return [
        Job(workload, providers)
        for providers in plan.stages
        for workload in plan.workloads
        if not finished.issuperset((workload.network, workload.layout, name) for name in providers)
    ]


def check_jobs(
    device: Device, jobs: Sequence[Job], deadline: Deadline, console: Console
) -> dict[str, Verdict]:
    """The verdict on every network, by its title."""
    workloads = {job.workload.title: job.workload for job in jobs}
    verdicts = {}
    with progress_bars(console) as progress:
        for title, workload in progress.track(workloads.items(), description="checking"):
            deadline.check()
            verdicts[title] = check(workload, device.device)
            free_memory()
    return verdicts


def time_jobs(
    device: Device,
    jobs: Sequence[Job],
    verdicts: Mapping[str, Verdict],
    steps: int,
    deadline: Deadline,
    file: ResultsFile | None,
    table: Table,
    console: Console,
) -> Sequence[Job]:
    """Times everything, with rows for the file and the table; gives what there was no time for."""
    eager_us = {
        f"{row['network']}, {row['layout']}": float(row["step_us"])
        for row in (file.rows if file else [])
        if row["provider"] == "nn.PReLU" and row["step_us"]
    }
    with progress_bars(console) as progress:
        task = progress.add_task("timing", total=len(jobs) * steps)

        def advance() -> None:
            progress.update(task, advance=1, refresh=True)

        for number, job in enumerate(jobs):
            title = job.workload.title
            progress.update(task, description=f"timing {job.title}", refresh=True)
            try:
                timings = time_job(device, job, verdicts[title].scale, steps, deadline, advance)
            except OutOfTimeError:
                return jobs[number:]
            finally:
                free_memory()
            for provider, timing in timings.items():
                if provider == "nn.PReLU" and not timing.error:
                    eager_us[title] = timing.step_us
                row = make_row(job.workload, provider, timing, eager_us.get(title))
                add_row(table, row, timing.error)
                if file:
                    file.write(row)
                    if timing.error:
                        file.note(f"{title}, {provider} failed: {timing.error}")
            table.add_section()
    return []


def time_job(
    device: Device,
    job: Job,
    scale: float,
    steps: int,
    deadline: Deadline,
    advance: Callable[[], object],
) -> dict[str, Timing]:
    """Times a network with several providers, a step of each in every round."""
    workload, providers = job
    if providers is COMPILED:
        # Else dynamo takes the shapes of one network after the other for dynamic ones.
        torch.compiler.reset()
    model = build(workload, device.device)
    batch = draw(workload, device.device)
    trainings: dict[str, Training] = {}
    timings: dict[str, Timing] = {}
    for name, provide in providers.items():
        deadline.check(COMPILING_S if providers is COMPILED else 0)
        timings[name] = Timing()
        try:
            training = Training(workload, provide(copy.deepcopy(model)), batch, scale)
            for _ in range(WARM_UP):
                training.step()
                deadline.check()
            timings[name].peak_bytes = device.peak_bytes(training.step)
            trainings[name] = training
        except OutOfTimeError:
            raise
        except Exception as error:  # compilers raise of all kinds
            timings[name].error = first_line(error)
    for _ in range(steps):
        for name, training in trainings.items():
            timings[name].samples.append(device.step_us(training.step))
            deadline.check()
        advance()
    return timings


def free_memory() -> None:
    """Gives back what dropped networks held, some of it in cycles."""
    gc.collect()
    torch.cuda.empty_cache()


def first_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def make_row(workload: Workload, provider: str, timing: Timing, eager_us: float | None) -> Row:
    """A provider's timing as a line of the results file."""
    row = Row(workload.network, workload.batch, workload.layout, workload.dtype_name, provider)
    if timing.error:
        return row
    return replace(
        row,
        step_us=round(timing.step_us, 1),
        iqr_us=round(timing.iqr_us, 1),
        steps=len(timing.samples),
        peak_bytes=timing.peak_bytes,
        speedup=round(eager_us / timing.step_us, 3) if eager_us else None,
    )


def results_table(steps: int) -> Table:
    """The empty table of a run."""
    table = Table(
        title=f"Medians of {steps} training steps, providers in turn, IQR their spread",
        caption="Peak: most memory held at once in a step (activations, gradients, workspaces), "
        "above weights, optimizer state and batch.",
        box=box.SIMPLE_HEAD,
    )
    for column in ("network", "batch", "layout", "dtype"):
        table.add_column(column)
    table.add_column("provider", overflow="fold")
    for column in ("step ms", "IQR ms", "peak GiB", "x nn.PReLU"):
        table.add_column(column, justify="right")
    return table


def add_row(table: Table, row: Row, error: str | None) -> None:
    """Adds a provider's row; slower than nn.PReLU is red, and so is what failed."""
    what = (row.network, str(row.batch), row.layout, row.dtype)
    if error:
        table.add_row(*what, escape(f"{row.provider} failed: {error}"), style="red")
        return
    table.add_row(
        *what,
        row.provider,
        f"{row.step_us / 1e3:.2f}",
        f"{row.iqr_us / 1e3:.2f}",
        f"{row.peak_bytes / 2**30:.2f}",
        f"{row.speedup:.2f}" if row.speedup else "",
        style="red" if row.speedup and row.speedup < 1 else None,
    )


def sizes_table(workloads: Sequence[Workload]) -> Table:
    """How large the networks are."""
    table = Table(title="Networks, with what their PReLUs read in a step", box=box.SIMPLE_HEAD)
    for column in ("network", "batch", "layout", "dtype"):
        table.add_column(column)
    for column in ("parameters", "PReLUs", "MB of their inputs"):
        table.add_column(column, justify="right")
    for workload in workloads:
        parameters, prelus, nbytes = sizes(workload)
        table.add_row(
            workload.network,
            str(workload.batch),
            workload.layout,
            workload.dtype_name,
            f"{parameters:,}",
            str(prelus),
            f"{nbytes / 1e6:.1f}",
        )
    return table


def sizes(workload: Workload) -> tuple[int, int, int]:
    """Parameters, PReLU modules, and the bytes of those modules' inputs in one step."""
    meta = torch.device("meta")
    model = build(workload, meta)
    prelus = [module for module in model.modules() if isinstance(module, nn.PReLU)]
    elements = []
    for prelu in prelus:
        prelu.register_forward_pre_hook(lambda _, inputs: elements.append(inputs[0].numel()))
    model(draw(workload, meta)[0])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters, len(prelus), sum(elements) * workload.dtype.itemsize


if __name__ == "__main__":
    sys.exit(main())
