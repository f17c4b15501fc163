"""Times training steps of whole networks with torch.nn.PReLU and with prelu_gpu, on a GPU.

    python -m benchmarks training --results DIR   all networks, also into DIR/<gpu>-training.csv
    python -m benchmarks training --quick         fewer steps, nothing compiled

A step is forward, loss, backward and optimizer, on one batch that stays on the GPU. First every
network takes a step with either module from the same state: where loss or gradients disagree, no
time is printed and the exit status is 1. Compiled networks are not compared so: Inductor rounds
elsewhere. Without a GPU nothing is timed: sizes are printed.
"""

import argparse
import contextlib
import copy
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import nn

import prelu_gpu
from benchmarks.gate import check
from benchmarks.program import (
    Deadline,
    ProgramError,
    TimeUpError,
    add_run_arguments,
    find_obstacle,
    first_line,
    make_table,
    number,
    open_console,
    progress_bars,
    refuse_wrong,
)
from benchmarks.results import describe_run, open_results
from benchmarks.timing import Device, Gpu, Measurement
from benchmarks.workloads import WORKLOADS, Training, Workload, build, draw

WARM_UP = 5
STEPS = 30
QUICK_STEPS = 8
COMPILING_S = 150.0
"""Seconds that must be left where a compilation begins: a guess."""

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
class Row:
    """One line of the results file after the columns of Run; None where nothing was measured."""

    network: str
    batch: int
    layout: str
    dtype: str
    provider: str
    step_us: float | None
    """The median of the steps' whole times."""
    iqr_us: float | None
    """Their interquartile range."""
    steps: int
    """How many were timed."""
    peak_bytes: int | None
    """Most memory held at once in a step, above weights, optimizer state and batch."""
    speedup: float | None
    """nn.PReLU's median, not compiled, over this one."""


@dataclass(frozen=True)
class Settings:
    """How a run is made."""

    workloads: Sequence[Workload]
    stages: Sequence[Providers]
    """Providers that are timed in turn: all networks by the first ones, then by the next."""
    steps: int
    folder: Path | None = None
    """Where the results file goes."""
    suffix: str = "-training"
    """What follows the GPU's name in the file's."""


class Job(NamedTuple):
    """A network and the providers to time it with."""

    workload: Workload
    providers: Providers

    @property
    def title(self) -> str:
        """What tells it from the others."""
        return f"{self.workload.title}, {' and '.join(self.providers)}"


def main(arguments: Sequence[str]) -> None:
    """Runs the program."""
    options = parse(arguments)
    workloads = [w for w in WORKLOADS if not options.network or w.network in options.network]
    console = open_console()
    obstacle = find_obstacle()
    if obstacle:
        console.print(f"Nothing is timed: {obstacle}", soft_wrap=True)
        console.print(sizes_table(workloads))
        return
    # As training scripts do whose shapes stay the same.
    torch.backends.cudnn.benchmark = True
    settings = Settings(
        workloads,
        stages=(EAGER,) if options.quick else (EAGER, COMPILED),
        steps=QUICK_STEPS if options.quick else STEPS,
        folder=options.results,
        suffix="-training-quick" if options.quick else "-training",
    )
    benchmark(Gpu(), settings, Deadline(options.minutes), console)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks training",
        description="Time training steps with torch.nn.PReLU and with prelu_gpu.",
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
        "--quick",
        action="store_true",
        help=f"{QUICK_STEPS} steps of each instead of {STEPS}, and no torch.compile",
    )
    add_run_arguments(parser, "<gpu>-training.csv")
    return parser.parse_args(arguments)


def benchmark(device: Device, settings: Settings, deadline: Deadline, console: Console) -> None:
    """Checks the networks, times them and reports.

    Raises:
        ProgramError: wrong results, no time or memory to check them, or a results file that cannot
            be written or continued.
    """
    run = describe_run(device.name)
    console.print(str(run), soft_wrap=True)
    file = open_results(settings.folder, settings.suffix, run, Row)
    rows = file.rows if file else []
    jobs = remaining(settings, rows)
    left = list(jobs)
    eager_us = {
        f"{row['network']}, {row['layout']}": float(row["step_us"])
        for row in rows
        if row["provider"] == "nn.PReLU" and row["step_us"]
    }
    table = results_table(settings.steps)
    with progress_bars(console) as progress:
        scales = check_networks(device, jobs, deadline, progress)
        for job, measured in time_jobs(device, jobs, scales, settings.steps, deadline, progress):
            left.remove(job)
            title = job.workload.title
            if "nn.PReLU" in measured and measured["nn.PReLU"].call_samples:
                eager_us[title] = measured["nn.PReLU"].call_us
            for provider, one in measured.items():
                row = make_row(job.workload, provider, one, eager_us.get(title))
                add_row(table, row, one.notice)
                if file:
                    file.write(row)
                if file and one.notice:
                    file.note(f"{title}, {provider} failed: {one.notice}")
            table.add_section()
    console.print(table)
    if left:
        console.print(
            f"The minutes given are over. Not timed: {'; '.join(job.title for job in left)}. "
            "With --results the same command goes on.",
            soft_wrap=True,
        )
    if file:
        console.print(f"Results: {file.path}", soft_wrap=True)


def remaining(settings: Settings, rows: Sequence[Mapping[str, str]]) -> list[Job]:
    """What is to be timed and has no rows yet."""
    finished = {(row["network"], row["layout"], row["provider"]) for row in rows}
    return [
        Job(workload, providers)
        for providers in settings.stages
        for workload in settings.workloads
        if not finished.issuperset((workload.network, workload.layout, name) for name in providers)
    ]


def check_networks(
    device: Device, jobs: Sequence[Job], deadline: Deadline, progress: Progress
) -> dict[str, float]:
    """The loss scale of every network, by its title.

    Raises:
        ProgramError: a network is trained wrong, or there is no time or memory to find out.
    """
    workloads = {job.workload.title: job.workload for job in jobs}
    scales, wrong = {}, []
    try:
        for title, workload in progress.track(workloads.items(), description="checking"):
            deadline.check()
            mistakes, scales[title] = check(workload, device.device)
            wrong += [f"{title}: {mistake}" for mistake in mistakes]
            free_memory()
    except TimeUpError as error:
        raise ProgramError(
            "--minutes: too few to check the networks, so nothing is timed; give more."
        ) from error
    except torch.OutOfMemoryError as error:
        raise ProgramError(
            f"{first_line(error)} Choose smaller networks with --network."
        ) from error
    refuse_wrong(wrong)
    return scales


def time_jobs(
    device: Device,
    jobs: Sequence[Job],
    scales: Mapping[str, float],
    steps: int,
    deadline: Deadline,
    progress: Progress,
) -> Iterator[tuple[Job, dict[str, Measurement]]]:
    """Times networks, as many as there is time for."""
    task = progress.add_task("timing", total=len(jobs) * steps)
    advance = partial(progress.update, task, advance=1, refresh=True)
    with contextlib.suppress(TimeUpError):
        for job in jobs:
            progress.update(task, description=f"timing {job.title}", refresh=True)
            measured = time_job(device, job, scales[job.workload.title], steps, deadline, advance)
            free_memory()
            yield job, measured


def time_job(
    device: Device,
    job: Job,
    scale: float,
    steps: int,
    deadline: Deadline,
    advance: Callable[[], object],
) -> dict[str, Measurement]:
    """Times a network with several providers, a step of each in every round.

    A provider that fails has no samples, and says why in its notice.
    """
    workload, providers = job
    if providers is COMPILED:
        # Else dynamo takes the shapes of one network after the other for dynamic ones.
        torch.compiler.reset()
    model = build(workload, device.device)
    batch = draw(workload, device.device)
    trainings: dict[str, Training] = {}
    measured: dict[str, Measurement] = {}
    for name, provide in providers.items():
        deadline.check(COMPILING_S if providers is COMPILED else 0)
        measured[name] = Measurement(extra_bytes=None)
        try:
            training = Training(workload, provide(copy.deepcopy(model)), batch, scale)
            for _ in range(WARM_UP):
                training.step()
                deadline.check()
            # Weights, optimizer state and batch are there, and no gradients.
            measured[name].extra_bytes = device.extra_bytes(training.step)
            trainings[name] = training
        except TimeUpError:
            raise
        except Exception as error:  # compilers raise of all kinds
            measured[name].notice = first_line(error)
    for _ in range(steps):
        for name, training in trainings.items():
            measured[name].call_samples.append(device.call_us(training.step))
            deadline.check()
        advance()
    return measured


def free_memory() -> None:
    """Gives back what dropped networks held, some of it in cycles."""
    gc.collect()
    torch.cuda.empty_cache()


def make_row(workload: Workload, provider: str, one: Measurement, eager_us: float | None) -> Row:
    """A provider's measurement as a line of the results file."""
    step_us = one.call_us if one.call_samples else None
    return Row(
        network=workload.network,
        batch=workload.batch,
        layout=workload.layout,
        dtype=workload.dtype_name,
        provider=provider,
        step_us=step_us and round(step_us, 1),
        iqr_us=step_us and round(one.spread_us, 1),
        steps=len(one.call_samples),
        peak_bytes=one.extra_bytes,
        speedup=step_us and eager_us and round(eager_us / step_us, 3),
    )


def results_table(steps: int) -> Table:
    """The empty table of a run."""
    return make_table(
        ["network", "batch", "layout", "dtype", "provider"],
        ["step ms", "IQR ms", "peak GiB", "x nn.PReLU"],
        title=f"Medians of {steps} training steps, providers in turn, IQR their spread",
        caption="Peak: most memory held at once in a step (activations, gradients, workspaces), "
        "above weights, optimizer state and batch.",
    )


def add_row(table: Table, row: Row, error: str | None) -> None:
    """Adds a provider's row; slower than nn.PReLU is red, and so is what failed."""
    what = (row.network, str(row.batch), row.layout, row.dtype)
    if error:
        table.add_row(*what, escape(f"{row.provider} failed: {error}"), style="red")
        return
    table.add_row(
        *what,
        row.provider,
        number(row.step_us / 1e3, 2),
        number(row.iqr_us / 1e3, 2),
        number(row.peak_bytes / 2**30, 2),
        number(row.speedup, 2),
        style="red" if row.speedup and row.speedup < 1 else None,
    )


def sizes_table(workloads: Sequence[Workload]) -> Table:
    """How large the networks are."""
    table = make_table(
        ["network", "batch", "layout", "dtype"],
        ["parameters", "PReLUs", "MB of their inputs"],
        title="Networks, with what their PReLUs read in a step",
    )
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
