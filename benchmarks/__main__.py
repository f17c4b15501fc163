"""Times prelu_gpu on a GPU beside torch.nn.PReLU, torch.compile, XLA and a copy of the same bytes.

    python -m benchmarks --core --results DIR         times the cases that tell most
    python -m benchmarks --results DIR --minutes 7    times all, most telling first, or goes on
    python -m benchmarks --case iresnet --op step     times some; --case takes a group too
    python -m benchmarks --require-gpu                only says whether there is a GPU to time on
    python -m benchmarks report                       makes tables and plots of the results
    python -m benchmarks tune                         proposes a table of launch rules

Every case is checked before anything is timed; where one is wrong, no speed is printed and the exit
status is 1. Without a GPU nothing is timed: the bytes to move, the launch plans, the kernels'
machine code and the host's cost of a call are printed.
"""

import argparse
import dataclasses
import importlib
import itertools
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.cases import CASES, CORE, DTYPES, GROUPS, PASSES, Case, Inputs, check, is_in
from benchmarks.providers import PROVIDERS, WAITS, ProviderError, jax_obstacle, serves
from benchmarks.results import ResultsFile, describe_run, progress_bars, slug
from benchmarks.timing import ROUNDS, Call, Device, Gpu, Measurement, count_sets, measure
from prelu_gpu.backend import Backend, backend, reason
from prelu_gpu.plan import gpu_rules

SUBCOMMANDS = ("report", "tune")
H100_MULTIPROCESSORS = 132
QUICK_ROUNDS = 5
REPLAYED_BYTES = 2**20
"""Size of x below which device times are those of CUDA-graph replays."""
DEVICE_BYTES = 2**24
"""Size of x from which providers are compared by device time; below it by whole-call time."""
MACHINE_CODE_CASES = ("flat", "plane", "column-channels-last", "odd-plane")


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
    device_us: float | None
    call_us: float
    bytes: int
    gbps: float | None
    pct_copy: float | None
    extra_bytes: int | None


@dataclass(frozen=True)
class Settings:
    """How a run is made."""

    ops: Sequence[str] = tuple(PASSES)
    providers: Sequence[str] = tuple(PROVIDERS)
    rounds: int = ROUNDS
    folder: Path | None = None
    """Where the results file goes."""
    suffix: str = ""
    """What follows the GPU's name in the file's."""
    minutes: float = math.inf


@dataclass(frozen=True)
class Work:
    """One operation of a case, and by whom it is still to be timed."""

    case: Case
    op: str
    providers: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in SUBCOMMANDS:
        module = importlib.import_module(f"benchmarks.{arguments[0]}")
        status: int = module.main(arguments[1:])
        return status
    options = parse(arguments)
    obstacle = find_obstacle()
    if options.require_gpu:
        if obstacle:
            return fail(obstacle)
        print(f"benchmarks: {torch.cuda.get_device_name()}")
        return 0

    console = Console(width=None if sys.stdout.isatty() else 200)
    if obstacle:
        console.print(f"Nothing is timed: {obstacle}", soft_wrap=True)
        describe(options.cases, console)
        return 0
    settings = Settings(
        ops=options.op,
        providers=options.provider,
        rounds=QUICK_ROUNDS if options.quick else ROUNDS,
        folder=options.results,
        suffix="-quick" if options.quick else "-core" if options.core else "",
        minutes=options.minutes,
    )
    return benchmark(Gpu(), options.cases, settings, console)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line; the cases it selects are `cases`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time prelu_gpu beside torch.nn.PReLU, torch.compile, XLA and a copy.",
        epilog="python -m benchmarks {report,tune} --help tells of these two.",
    )
    add = parser.add_argument
    add("--case", nargs="+", metavar="NAME", default=[], help=f"cases, or {', '.join(GROUPS)}")
    add("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of x")
    add("--op", nargs="+", choices=PASSES, default=list(PASSES))
    add("--provider", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    add(
        "--core",
        action="store_true",
        help=f"the {len(CORE)} cases that tell most, one dtype each, into DIR/<gpu>-core.csv",
    )
    add(
        "--quick",
        action="store_true",
        help=f"these in {QUICK_ROUNDS} rounds instead of {ROUNDS}, into DIR/<gpu>-quick.csv",
    )
    add(
        "--minutes",
        type=float,
        metavar="M",
        default=math.inf,
        help="stop before so many are over; with --results the same command goes on",
    )
    add(
        "--results",
        type=Path,
        metavar="DIR",
        help="write DIR/<gpu>.csv, row by row; one of the same commit is continued",
    )
    add(
        "--require-gpu",
        action="store_true",
        help="only say whether there is a GPU to time on, with exit status 1 if there is none",
    )
    options = parser.parse_args(arguments)

    names = {case.name: None for case in CASES}
    for name in options.case:
        if name not in names and name not in GROUPS:
            parser.error(
                f"--case {name}: give a group ({', '.join(GROUPS)}) or a case ({', '.join(names)})"
            )
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes:g}: give a number above 0")
    options.cases = [
        case
        for case in (CORE if options.core or options.quick else CASES)
        if case.dtype_name in options.dtype
        and (not options.case or any(is_in(case, name) for name in options.case))
    ]
    if not options.cases:
        parser.error("no case is all of what --case, --dtype, --core and --quick ask for: drop one")
    return options


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


def benchmark(device: Device, cases: Sequence[Case], settings: Settings, console: Console) -> int:
    """Checks the cases, times them and reports; gives the exit status."""
    deadline = time.monotonic() + 60 * settings.minutes
    run = describe_run(device)
    console.print(
        f"{run.gpu}, driver {run.driver}, torch {run.torch}, triton {run.triton}, "
        f"prelu_gpu at {run.commit}"
    )
    if "jax" in settings.providers and (obstacle := jax_obstacle(device.device)):
        console.print(f"JAX is not timed: {obstacle}", soft_wrap=True)
        others = [name for name in settings.providers if name != "jax"]
        settings = dataclasses.replace(settings, providers=others)
    folder, file = settings.folder, None
    if folder:
        try:
            file = ResultsFile(folder, slug(run.gpu) + settings.suffix, run, Row)
        except OSError as error:
            return fail(f"--results {folder}: {error.strerror}; give a folder that can be written.")
        except ValueError as error:
            return fail(f"--results {folder}: {error}")
    works = list(remaining(cases, settings, file.rows if file else []))

    torch.manual_seed(0)
    with device.stream():
        wrong = check_cases(device, list(dict.fromkeys(work.case for work in works)), console)
        if wrong:
            return fail("\n".join(["wrong results, so nothing is timed.", *wrong]))
        table, notices, left = time_works(device, works, settings, file, deadline, console)
    console.print(table)
    for notice in notices:
        console.print(notice, soft_wrap=True, highlight=False)
    if left:
        console.print(
            f"Stopped before {settings.minutes:g} minutes were over: {left} of {len(works)} "
            "operations are not timed. With --results the same command goes on.",
            soft_wrap=True,
        )
    if file:
        console.print(f"Results: {file.path}", soft_wrap=True)
    return 0


def remaining(
    cases: Sequence[Case], settings: Settings, rows: Sequence[Mapping[str, str]]
) -> Iterator[Work]:
    """What is to be timed and has no row yet."""
    columns = ("case", "dtype", "slope_dtype", "op", "provider")
    finished = {tuple(row[column] for column in columns) for row in rows}
    for case in cases:
        key = case.name, case.dtype_name, case.slope_dtype_name
        for op in settings.ops:
            providers = tuple(
                name
                for name in settings.providers
                if serves(name, case) and (*key, op, name) not in finished
            )
            if providers:
                yield Work(case, op, providers)


def check_cases(device: Device, cases: Sequence[Case], console: Console) -> list[str]:
    """What is wrong in which case."""
    with progress_bars(console) as progress:
        return [
            f"{case.name} ({case.dtype_name}): {mistake}"
            for case in progress.track(cases, description="checking")
            for mistake in check(case, device.device)
        ]


def time_works(
    device: Device,
    works: Sequence[Work],
    settings: Settings,
    file: ResultsFile | None,
    deadline: float,
    console: Console,
) -> tuple[Table, list[str], int]:
    """Times operations and writes their rows.

    Returns:
        The table of all rows; what was unusual; how many operations there was no time for.
    """
    table = results_table(settings.rounds)
    notices: list[str] = []
    longest = 0.0
    case: Case | None = None
    sets: list[Inputs] = []
    with progress_bars(console) as progress:
        task = progress.add_task("timing", total=len(works) * settings.rounds)

        def advance() -> None:
            progress.update(task, advance=1, refresh=True)

        for number, work in enumerate(works):
            start = time.monotonic()
            if start + longest > deadline:
                return table, notices, len(works) - number
            if work.case != case:
                case, sets = work.case, []  # the memory of the last case is free before the next's
                sets = [case.inputs(device.device) for _ in range(count_sets(device, case.nbytes))]
                if "compile" in work.providers:
                    torch.compiler.reset()  # or it would give up after some shapes
            title = f"{case.name} {case.dtype_name} {work.op}"
            progress.update(task, description=f"timing {title}", refresh=True)
            measured, unusual = time_work(device, work, sets, settings.rounds, advance)
            add_rows(table, work, measured)
            unusual = [f"{title}, {notice}" for notice in unusual]
            notices += unusual
            if file:
                for name in work.providers:
                    if name in measured:
                        file.write(make_row(case, work.op, name, measured))
                for notice in unusual:
                    file.note(notice)
            longest = max(longest, time.monotonic() - start)
    return table, notices, 0


def time_work(
    device: Device,
    work: Work,
    sets: list[Inputs],
    rounds: int,
    advance: Callable[[], object],
) -> tuple[dict[str, Measurement], list[str]]:
    """Measures one operation by its providers and by the copy; and what was unusual, in words."""
    calls: dict[str, Call] = {}
    notices = []
    # Without grad the inference alone, and whole batches of it: switching costs as much as a call.
    with torch.set_grad_enabled(work.op != "inference"):
        for name in dict.fromkeys((*work.providers, "copy")):
            try:
                calls[name] = PROVIDERS[name](work.case, work.op, sets)
            except ProviderError as error:
                notices.append(f"{name} is not timed: {error}")
        measured = measure(
            device,
            calls,
            len(sets),
            advance,
            rounds=rounds,
            replay=work.case.nbytes < REPLAYED_BYTES,
            waits=WAITS,
        )
    notices += [f"{name}: {m.notice}" for name, m in measured.items() if m.notice]
    return measured, notices


def make_row(case: Case, op: str, provider: str, measured: Mapping[str, Measurement]) -> Row:
    """A provider's measurement as a line of the results file."""
    one, nbytes = measured[provider], case.bytes_moved(op)
    device_us, copy_us = one.device_us, measured["copy"].device_us
    return Row(
        case=case.name,
        shape=case.shape_name,
        layout=case.layout,
        slope=case.slope,
        dtype=case.dtype_name,
        slope_dtype=case.slope_dtype_name,
        op=op,
        provider=provider,
        device_us=device_us and round(device_us, 3),
        call_us=round(one.call_us, 3),
        bytes=nbytes,
        gbps=device_us and round(nbytes / device_us / 1e3, 1),
        pct_copy=device_us and copy_us and round(100 * copy_us / device_us, 1),
        extra_bytes=one.extra_bytes,
    )


def speedup(case: Case, over: Measurement | None, one: Measurement) -> float | None:
    """How many times as fast as another provider, by the time that counts at this size."""
    if over is None:
        return None
    if case.nbytes >= DEVICE_BYTES and over.device_us and one.device_us:
        return over.device_us / one.device_us
    return over.call_us / one.call_us


def results_table(rounds: int) -> Table:
    """The empty table of a run."""
    table = Table(
        title=f"Caches cold from 1 MiB on, providers in turn, medians of {rounds} rounds; IQR is "
        "the spread of the device time",
        caption="eager: torch.nn.functional.prelu, compile: the same under torch.compile, a "
        "float32 slope beside a half-precision input cast as autocast does; inference: the modules "
        "without grad. copy: moves as many bytes as the operation. x eager, x compile: by device "
        "time where x has 16 MiB or more, else by call time. Device times of x below 1 MiB are of "
        "CUDA-graph replays. jax: whole calls alone, contiguous tensors alone.",
        box=box.SIMPLE_HEAD,
    )
    for column in ("case", "x", "slope", "op", "provider"):
        table.add_column(column)
    for column in (
        "device us", "IQR us", "call us", "GB/s", "% of copy", "x eager", "x compile", "extra MiB",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    return table


def add_rows(table: Table, work: Work, measured: Mapping[str, Measurement]) -> None:
    """Adds one operation of one case; slower than eager is red."""
    case = work.case
    for name, one in measured.items():
        row = make_row(case, work.op, name, measured)
        x_eager = speedup(case, measured.get("eager"), one)
        table.add_row(
            case.name,
            f"{row.dtype} {row.shape}",
            f"{row.slope}, {row.slope_dtype}",
            work.op,
            name,
            figure(row.device_us, 1),
            figure(one.spread_us, 1),
            figure(row.call_us, 1),
            figure(row.gbps, 0),
            figure(row.pct_copy, 1),
            figure(x_eager, 2),
            figure(speedup(case, measured.get("compile"), one), 2),
            figure(row.extra_bytes and row.extra_bytes / 2**20, 2),
            style="red" if x_eager is not None and x_eager < 1 else None,
        )
    table.add_section()


def figure(value: float | None, digits: int) -> str:
    """A number in a table; nothing where there is none."""
    return "" if value is None else f"{value:.{digits}f}"


def describe(cases: Sequence[Case], console: Console) -> None:
    """Prints what can be known of the speed without a GPU."""
    from benchmarks.host import host_table  # nothing that a GPU's run needs

    console.print(plan_table(cases))
    console.print("Machine code for an H100, by python -m benchmarks.machine_code:")
    console.print(machine_code(), soft_wrap=True, highlight=False, markup=False)
    console.print(host_table())


def plan_table(cases: Sequence[Case]) -> Table:
    """What every case must move, in the first of its dtypes, and how it would be launched."""
    table = Table(
        title=f"Bytes to move, and plans for an H100 ({H100_MULTIPROCESSORS} multiprocessors)",
        box=box.SIMPLE_HEAD,
    )
    for column in ("case", "shape", "layout", "dtype", "slope"):
        table.add_column(column)
    for op in PASSES:
        table.add_column(f"{op} MB", justify="right")
    for op in ("forward", "backward"):
        table.add_column(f"{op} tile")
        table.add_column("grid", justify="right")
    first = {case.name: case for case in reversed(cases)}
    for case in sorted(first.values(), key=cases.index):
        plans = (
            case.plan(op, gpu_rules(H100_MULTIPROCESSORS, case.dtype.itemsize, op == "backward"))
            for op in ("forward", "backward")
        )
        table.add_row(
            case.name,
            case.shape_name,
            case.layout,
            case.dtype_name,
            f"{case.slope}, {case.slope_dtype_name}",
            *(f"{case.bytes_moved(op) / 1e6:.1f}" for op in PASSES),
            *itertools.chain.from_iterable(
                (plan.kind.value, " x ".join(map(str, plan.grid))) for plan in plans
            ),
        )
    return table


def machine_code() -> str:
    """The table of the kernels' machine code, or why there is none.

    By another process: kernels that this one interprets cannot be compiled in it.
    """
    command = ("benchmarks.machine_code", "--target", "sm_90", "--case", *MACHINE_CODE_CASES)
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=Path(__file__).parents[1],
        env={name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        lines = done.stderr.split("\n")
        return f"not made: {next(filter(str.strip, reversed(lines)), 'no reason given')}"
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
