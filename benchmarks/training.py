"""Times training steps of whole networks with torch.nn.PReLU and with prelu_gpu, on a GPU."""

import contextlib
import copy
import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

import prelu_gpu
from benchmarks import gate
from benchmarks.cases import dtype_name
from benchmarks.program import (
    Deadline,
    Minutes,
    ResultsFolder,
    TimeUpError,
    find_obstacle,
    first_line,
    make_table,
    number,
    one_of,
    open_console,
    progress_bars,
    refuse_wrong,
)
from benchmarks.results import describe_run, open_results
from benchmarks.timing import Gpu, Measurement
from benchmarks.workloads import WORKLOADS, Training, Workload

NAMES = tuple(dict.fromkeys(workload.network for workload in WORKLOADS))
WARM_UP = 5
COMPILING_S = 300.0
"""Seconds that must be left where two networks are to be compiled: a guess."""

Providers = Mapping[str, Callable[[nn.Module], nn.Module]]
"""By name, what makes a network run as it is to be timed."""

EAGER: Providers = {"nn.PReLU": lambda model: model, "prelu_gpu": prelu_gpu.accelerate}
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


def main(
    network: Annotated[
        list[str] | None,
        typer.Option(
            callback=one_of(NAMES),
            metavar="NAME",
            help=f"Only this one of {', '.join(NAMES)}; may be repeated.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="8 steps of each instead of 30, and no torch.compile.")
    ] = False,
    minutes: Minutes = math.inf,
    results: ResultsFolder = None,
) -> None:
    """Times training steps of whole networks with torch.nn.PReLU and with prelu_gpu, on a GPU.

    A step is forward, loss, backward and optimizer, on one batch that stays on the GPU. First a
    network takes a backward with either module from the same state: where loss or gradients differ
    by more than rounding explains, no time is printed and the exit status is 1. Compiled networks
    are not compared so: Inductor rounds elsewhere.
    """
    console = open_console()
    obstacle = find_obstacle()
    if obstacle:
        console.print(f"Nothing is timed: {obstacle}", soft_wrap=True)
        return
    torch.backends.cudnn.benchmark = True  # as training scripts do whose shapes stay the same
    chosen = [workload for workload in WORKLOADS if not network or workload.network in network]
    stages, steps = ((EAGER,), 8) if quick else ((EAGER, COMPILED), 30)
    jobs = [(workload, stage) for stage in stages for workload in chosen]
    suffix = "-training-quick" if quick else "-training"
    benchmark(Gpu(), jobs, steps, Deadline(minutes), console, results, suffix)


def benchmark(
    device: Gpu,
    jobs: Sequence[tuple[Workload, Providers]],
    steps: int,
    deadline: Deadline,
    console: Console,
    folder: Path | None = None,
    suffix: str = "-training",
) -> None:
    """Checks and times what the results file does not have yet, and reports.

    Raises:
        typer.Exit: a network is trained wrong.
    """
    run = describe_run(device.name)
    console.print(str(run), soft_wrap=True)
    file = open_results(folder, suffix, run, Row)
    rows = file.rows if file else []
    finished = {(row["network"], row["layout"], row["provider"]) for row in rows}
    left = [
        (workload, providers)
        for workload, providers in jobs
        if any((workload.network, workload.layout, name) not in finished for name in providers)
    ]
    eager_us = {
        (row["network"], row["layout"]): float(row["step_us"])
        for row in rows
        if row["provider"] == "nn.PReLU" and row["step_us"]
    }
    table = make_table(
        ["network", "batch", "layout", "dtype", "provider"],
        ["step ms", "IQR ms", "peak GiB", "x nn.PReLU"],
        title=f"Medians of {steps} training steps, providers in turn, IQR their spread",
        caption="Peak: most memory held at once in a step (activations, gradients, workspaces), "
        "above weights, optimizer state and batch.",
    )
    with progress_bars(console) as progress, contextlib.suppress(TimeUpError):
        for workload, providers in progress.track(list(left), description="timing"):
            key = workload.network, workload.layout
            with deadline.piece(COMPILING_S if providers is COMPILED else 0):
                refuse_wrong(find_mistakes(workload, device.device))
                measured = time_steps(device, workload, providers, steps)
            for name, one in measured.items():
                if name == "nn.PReLU" and one.call_samples:
                    eager_us[key] = one.call_us
                row = make_row(workload, name, one, eager_us.get(key))
                add_row(table, row, one.notice)
                if file:
                    file.write(row)
                if file and one.notice:
                    file.note(f"{workload.title}, {name} failed: {one.notice}")
            table.add_section()
            left.remove((workload, providers))
    console.print(table)
    if left:
        unfinished = "; ".join(f"{work.title}, {' and '.join(names)}" for work, names in left)
        console.print(
            f"The minutes given are over. Not timed: {unfinished}. "
            "With --results the same command goes on.",
            soft_wrap=True,
        )
    if file:
        console.print(f"Results: {file.path}", soft_wrap=True)


def find_mistakes(workload: Workload, device: torch.device) -> list[str]:
    """How a backward with prelu_gpu differs from one with nn.PReLU beyond rounding."""
    free_memory()
    model, batch = workload.start(device)
    differences = gate.compare(
        model, lambda network: Training(workload, network, batch).backward(), workload.dtype
    )
    wrong = [difference for difference in differences if difference.is_wrong]
    return [f"{workload.title}, {wrong[0]}, and {len(wrong) - 1} more"] if wrong else []


def time_steps(
    device: Gpu, workload: Workload, providers: Providers, steps: int
) -> dict[str, Measurement]:
    """Times a network with several providers, a step of each in every round.

    A provider that fails has no samples, and says why in its notice.
    """
    if providers is COMPILED:
        # Else dynamo takes the shapes of one network after the other for dynamic ones.
        torch.compiler.reset()
    free_memory()
    model, batch = workload.start(device.device)
    trainings, measured = {}, {}
    for name, provide in providers.items():
        measured[name] = Measurement()
        try:
            training = Training(workload, provide(copy.deepcopy(model)), batch)
            for _ in range(WARM_UP):
                training.step()
            # Weights, optimizer state and batch are there, and no gradients.
            measured[name].extra_bytes = device.extra_bytes(training.step)
            trainings[name] = training
        except Exception as error:  # compilers raise of all kinds
            measured[name].notice = first_line(error)
    for _ in range(steps):
        for name, training in trainings.items():
            measured[name].call_samples.append(device.call_us(training.step))
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
        dtype=dtype_name(workload.dtype),
        provider=provider,
        step_us=step_us and round(step_us, 1),
        iqr_us=step_us and round(one.spread_us, 1),
        steps=len(one.call_samples),
        peak_bytes=one.extra_bytes,
        speedup=step_us and eager_us and round(eager_us / step_us, 3),
    )


def add_row(table: Table, row: Row, error: str | None) -> None:
    """Adds a provider's row; slower than nn.PReLU is red, and so is what failed."""
    cells = [row.network, str(row.batch), row.layout, row.dtype, row.provider]
    if error:
        cells[-1] += escape(f" failed: {error}")
    else:
        cells += [
            number(row.step_us / 1e3, 2),
            number(row.iqr_us / 1e3, 2),
            number(row.peak_bytes / 2**30, 2),
            number(row.speedup, 2),
        ]
    table.add_row(*cells, style="red" if error or (row.speedup or 1) < 1 else None)
