"""Times prelu_gpu on a GPU beside torch.nn.PReLU and a copy that moves the same bytes.

    python -m benchmarks --results DIR    times all cases, also into DIR/<gpu>.csv
    python -m benchmarks --require-gpu    only says whether there is a GPU to time on

Every case is checked before anything is timed; where one is wrong, no speed is printed and the exit
status is 1. Without a GPU nothing is timed: the bytes to move and the launch plans are printed.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.cases import CASES, PASSES, PROVIDERS, Case, check
from benchmarks.timing import ROUNDS, Device, Gpu, Measurement, count_sets, measure
from prelu_gpu.backend import Backend, backend, reason

H100_MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Run:
    """What all rows of one run share."""

    date: str
    commit: str
    gpu: str
    driver: str
    torch: str
    triton: str


@dataclass(frozen=True)
class Row:
    """One line of the results file after the columns of Run."""

    case: str
    shape: str
    layout: str
    slope: str
    dtype: str
    slope_dtype: str
    op: str
    provider: str
    device_us: float
    call_us: float
    bytes: int
    gbps: float
    pct_copy: float
    extra_bytes: int


COLUMNS = [field.name for part in (Run, Row) for field in fields(part)]


class ResultsFile:
    """A CSV file that is complete up to the last row written, whenever the run is cut off."""

    def __init__(self, folder: Path, run: Run) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{slug(run.gpu)}.csv"
        self._run = run
        self._write("w", COLUMNS)

    def write(self, row: Row) -> None:
        """Adds a row."""
        self._write("a", (*astuple(self._run), *astuple(row)))

    def _write(self, mode: str, values: Sequence[object]) -> None:
        with self.path.open(mode, newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(values)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit status."""
    options = parse(arguments)
    obstacle = find_obstacle()
    if options.require_gpu:
        if obstacle:
            return fail(obstacle)
        print(f"benchmarks: {torch.cuda.get_device_name()}")
        return 0

    console = Console(width=None if sys.stdout.isatty() else 140)
    if obstacle:
        console.print(f"Nothing is timed: {obstacle}", soft_wrap=True)
        console.print(plan_table())
        return 0
    return benchmark(Gpu(), CASES, options.results, console)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time prelu_gpu beside torch.nn.PReLU and a copy that moves the same bytes.",
    )
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="write DIR/<gpu>.csv, row by row"
    )
    parser.add_argument(
        "--require-gpu",
        action="store_true",
        help="only say whether there is a GPU to time on, with exit status 1 if there is none",
    )
    return parser.parse_args(arguments)


def find_obstacle() -> str | None:
    """Why nothing can be timed here."""
    if not torch.cuda.is_available():
        return "there is no GPU here (torch.cuda.is_available() is False)."
    if backend(torch.device("cuda")) is not Backend.TRITON:
        return f"the kernels do not run on the GPU ({reason(torch.device('cuda'))})."
    return None


def fail(message: str) -> int:
    """Prints an error; gives the exit status."""
    print(f"benchmarks: {message}", file=sys.stderr)
    return 1


def benchmark(device: Device, cases: Sequence[Case], folder: Path | None, console: Console) -> int:
    """Checks the cases, times them and reports; gives the exit status."""
    run = describe_run(device)
    console.print(
        f"{run.gpu}, driver {run.driver}, torch {run.torch}, triton {run.triton}, "
        f"prelu_gpu at {run.commit}"
    )

    torch.manual_seed(0)
    wrong = check_cases(device, cases, console)
    if wrong:
        return fail("\n".join(["wrong results, so nothing is timed.", *wrong]))
    try:
        file = ResultsFile(folder, run) if folder else None
    except OSError as error:
        return fail(f"--results {folder}: {error.strerror}; give a folder that can be written.")
    console.print(time_cases(device, cases, file, console))
    if file:
        console.print(f"Results: {file.path}", soft_wrap=True)
    return 0


def check_cases(device: Device, cases: Sequence[Case], console: Console) -> list[str]:
    """What is wrong in which case."""
    with progress_bars(console) as progress:
        return [
            f"{case.name}: {mistake}"
            for case in progress.track(cases, description="checking")
            for mistake in check(case, device.device)
        ]


def progress_bars(console: Console) -> Progress:
    """The display of a run, drawn only between timings: a thread would disturb them."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,
    )


def time_cases(
    device: Device, cases: Sequence[Case], file: ResultsFile | None, console: Console
) -> Table:
    """Times every operation of every case, writes the rows; gives the table of all of them."""
    table = results_table()
    with progress_bars(console) as progress:
        task = progress.add_task("timing", total=len(cases) * len(PASSES) * ROUNDS)

        def advance() -> None:
            progress.update(task, advance=1, refresh=True)

        for case in cases:
            sets = [case.inputs(device.device) for _ in range(count_sets(device, case.nbytes))]
            for op in PASSES:
                progress.update(task, description=f"timing {case.name}, {op}")
                calls = {name: provide(op, sets) for name, provide in PROVIDERS.items()}
                measured = measure(device, calls, len(sets), advance)
                copy_us = measured["copy"].device_us
                rows = [make_row(case, op, name, m, copy_us) for name, m in measured.items()]
                if file:
                    for row in rows:
                        file.write(row)
                add_rows(table, rows, measured)
    return table


def make_row(case: Case, op: str, provider: str, measured: Measurement, copy_us: float) -> Row:
    """A provider's measurement as a line of the results file."""
    nbytes = case.bytes_moved(op)
    return Row(
        case=case.name,
        shape=case.shape_name,
        layout=case.layout,
        slope=case.slope,
        dtype=dtype_name(case.dtype),
        slope_dtype=dtype_name(case.weight_dtype),
        op=op,
        provider=provider,
        device_us=round(measured.device_us, 3),
        call_us=round(measured.call_us, 3),
        bytes=nbytes,
        gbps=round(nbytes / measured.device_us / 1e3, 1),
        pct_copy=round(100 * copy_us / measured.device_us, 1),
        extra_bytes=measured.extra_bytes,
    )


def results_table() -> Table:
    """The empty table of a run."""
    table = Table(
        title="Caches cold, providers in turn, medians of "
        f"{ROUNDS} rounds; IQR is the spread of the device time",
        caption="eager: torch.nn.functional.prelu, a float32 slope beside a half-precision input "
        "cast as autocast does. copy: moves as many bytes as the operation.",
        box=box.SIMPLE_HEAD,
    )
    for column in ("case", "x", "op", "provider"):
        table.add_column(column)
    for column in (
        "device us", "IQR us", "call us", "GB/s", "% of copy", "x eager", "extra MiB",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    return table


def add_rows(table: Table, rows: Sequence[Row], measured: dict[str, Measurement]) -> None:
    """Adds one operation of one case; slower than eager is red."""
    for row in rows:
        speedup = measured["eager"].device_us / measured[row.provider].device_us
        table.add_row(
            row.case,
            f"{row.dtype} {row.shape}",
            row.op,
            row.provider,
            f"{row.device_us:.1f}",
            f"{measured[row.provider].spread_us:.1f}",
            f"{row.call_us:.1f}",
            f"{row.gbps:.0f}",
            f"{row.pct_copy:.1f}",
            f"{speedup:.2f}",
            f"{row.extra_bytes / 2**20:.2f}",
            style="red" if speedup < 1 else None,
        )
    table.add_section()


def plan_table() -> Table:
    """What every case must move, and how it would be launched."""
    table = Table(
        title=f"Bytes to move, and plans for an H100 ({H100_MULTIPROCESSORS} multiprocessors)",
        box=box.SIMPLE_HEAD,
    )
    for column in ("case", "shape", "layout", "dtype", "slope", "op"):
        table.add_column(column)
    table.add_column("MB to move", justify="right")
    table.add_column("tile")
    table.add_column("grid", justify="right")
    for case in CASES:
        for op in PASSES:
            plan = case.plan(op, H100_MULTIPROCESSORS)
            table.add_row(
                case.name,
                case.shape_name,
                case.layout,
                dtype_name(case.dtype),
                f"{case.slope}, {dtype_name(case.weight_dtype)}",
                op,
                f"{case.bytes_moved(op) / 1e6:.1f}",
                plan.kind.value,
                " x ".join(map(str, plan.grid)),
            )
        table.add_section()
    return table


def describe_run(device: Device) -> Run:
    """The facts that make a figure comparable."""
    import triton  # not on every platform where this program prints its plans

    return Run(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=os.environ.get("PRELU_GPU_COMMIT")
        or ask("git", "describe", "--always", "--dirty", "--exclude=*"),
        gpu=device.name,
        driver=ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        torch=torch.__version__,
        triton=triton.__version__,
    )


def ask(*command: str) -> str:
    """The first line another program prints, run from the checkout; "unknown" if it cannot."""
    try:
        answer = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return next(iter(answer.stdout.splitlines()), "unknown")


def slug(name: str) -> str:
    """A GPU's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype without its module."""
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
