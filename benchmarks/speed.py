"""Times prelu_gpu's operators on a GPU beside PyTorch's, torch.compile, XLA and a copy.

    python -m benchmarks --core --results DIR         times the cases that tell most
    python -m benchmarks --results DIR --minutes 7    times all, most telling first, or goes on
    python -m benchmarks --case iresnet --op step     times some; --case takes a group too
    python -m benchmarks --require-gpu                only says whether there is a GPU to time on

Each case is checked just before it is timed. A case with wrong results is not timed; the run goes
on with the others and ends with exit status 1. All cases are timed by the providers that do not
compile, then by those that do. Without a GPU nothing is timed: what can be known without one is
printed.
"""

import argparse
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.cases import (
    CASES,
    CORE,
    DEVICE_BYTES,
    DTYPES,
    GROUPS,
    PASSES,
    Case,
    Inputs,
    check,
    is_in,
)
from benchmarks.host import host_table
from benchmarks.outlook import print_outlook
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
)
from benchmarks.providers import COMPILERS, PROVIDERS, WAITS, ProviderError, jax_obstacle, serves
from benchmarks.results import describe_run, open_results
from benchmarks.timing import ROUNDS, Call, Device, Gpu, Measurement, count_sets, measure

QUICK_ROUNDS = 5
REPLAYED_BYTES = 2**20
"""Size of x below which device times are those of CUDA-graph replays."""


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


@dataclass(frozen=True)
class Work:
    """One operation of a case, and by whom it is still to be timed."""

    case: Case
    op: str
    providers: tuple[str, ...]

    @property
    def title(self) -> str:
        """What tells it from the others."""
        return f"{self.case.name} {self.case.dtype_name} {self.op}"


def main(arguments: Sequence[str]) -> None:
    """Runs the program."""
    options = parse(arguments)
    obstacle = find_obstacle()
    if options.require_gpu:
        if obstacle:
            raise ProgramError(obstacle)
        print(f"benchmarks: {describe_run(torch.cuda.get_device_name())}")
        return

    console = open_console(200)
    if obstacle:
        console.print(f"Nothing is timed: {obstacle}", soft_wrap=True)
        print_outlook(options.cases, console)
        return
    settings = Settings(
        ops=options.op,
        providers=options.provider,
        rounds=QUICK_ROUNDS if options.quick else ROUNDS,
        folder=options.results,
        suffix="-quick" if options.quick else "-core" if options.core else "",
    )
    benchmark(Gpu(), options.cases, settings, Deadline(options.minutes), console)
    console.print(host_table())


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line; the cases it selects are `cases`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time prelu_gpu beside PyTorch, torch.compile, XLA and a copy.",
        epilog="python -m benchmarks {training,tune,report} --help tells of these.",
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
    add_run_arguments(parser, "<gpu>.csv")
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
    options.cases = [
        case
        for case in (CORE if options.core or options.quick else CASES)
        if case.dtype_name in options.dtype
        and (not options.case or any(is_in(case, name) for name in options.case))
    ]
    if not options.cases:
        parser.error("no case is all of what --case, --dtype, --core and --quick ask for: drop one")
    return options


def benchmark(
    device: Device, cases: Sequence[Case], settings: Settings, deadline: Deadline, console: Console
) -> None:
    """Checks the cases, times them and reports.

    Raises:
        ProgramError: a results file that cannot be written or continued; at the end, cases that
            were computed wrong and so not timed.
    """
    run = describe_run(device.name)
    console.print(str(run), soft_wrap=True)
    if "jax" in settings.providers and (obstacle := jax_obstacle(device.device)):
        console.print(f"JAX is not timed: {obstacle}", soft_wrap=True)
        others = [name for name in settings.providers if name != "jax"]
        settings = dataclasses.replace(settings, providers=others)
    file = open_results(settings.folder, settings.suffix, run, Row)
    works = list(remaining(cases, settings, file.rows if file else []))
    left = len(works)
    table = results_table(settings.rounds)
    eager: dict[tuple[Case, str], Measurement | None] = {}
    wrong: list[str] = []

    torch.manual_seed(0)
    with device.stream(), progress_bars(console) as progress:
        for work, measured, notices in time_works(
            device, works, settings.rounds, deadline, progress
        ):
            left -= 1
            if not measured:
                notices = [notice for notice in notices if notice not in wrong]
                wrong += notices
            # It is measured before what is compiled.
            compared = eager.setdefault((work.case, work.op), measured.get("eager"))
            add_rows(table, work, measured, compared)
            for name in work.providers:
                if file and name in measured:
                    file.write(make_row(work.case, work.op, name, measured))
            for notice in notices:
                console.print(notice, soft_wrap=True, highlight=False, markup=False)
                if file:
                    file.note(notice)
    console.print(table)
    if left:
        console.print(
            f"The minutes given are over: {left} of {len(works)} operations are not timed. "
            "With --results the same command goes on.",
            soft_wrap=True,
        )
    if file:
        console.print(f"Results: {file.path}", soft_wrap=True)
    if wrong:
        raise ProgramError("\n".join(["wrong results; these cases are not timed:", *wrong]))


def remaining(
    cases: Sequence[Case], settings: Settings, rows: Sequence[Mapping[str, str]]
) -> Iterator[Work]:
    """What is to be timed and has no row yet; what compiles comes last, as it takes longest."""
    columns = ("case", "dtype", "slope_dtype", "op", "provider")
    finished = {tuple(row[column] for column in columns) for row in rows}
    for compiling, case in itertools.product((False, True), cases):
        key = case.name, case.dtype_name, case.slope_dtype_name
        for op in (op for op in settings.ops if op in case.ops):
            providers = tuple(
                name
                for name in settings.providers
                if (name in COMPILERS) == compiling
                and serves(name, case)
                and (*key, op, name) not in finished
            )
            if providers:
                yield Work(case, op, providers)


def mistakes_of(case: Case, device: Device) -> list[str]:
    """What is computed wrong in a case, in words."""
    try:
        mistakes = check(case, device.device)
    except Exception as error:  # whatever a compiler raises
        mistakes = [first_line(error)]
    dtypes = dict.fromkeys((case.dtype_name, case.slope_dtype_name))
    return [f"{case.name} ({', slope '.join(dtypes)}): {mistake}" for mistake in mistakes]


def time_works(
    device: Device, works: Sequence[Work], rounds: int, deadline: Deadline, progress: Progress
) -> Iterator[tuple[Work, dict[str, Measurement], list[str]]]:
    """Times operations, as many as there is time for; with each, what was unusual about it.

    A case is checked before its first timing. If its results are wrong, nothing is measured, and
    the mistakes are what was unusual.
    """
    task = progress.add_task("timing", total=len(works) * rounds)
    advance = partial(progress.update, task, advance=1, refresh=True)
    case: Case | None = None
    sets: list[Inputs] = []
    mistakes: dict[Case, list[str]] = {}
    with contextlib.suppress(TimeUpError):
        for work in works:
            with deadline.piece():
                if work.case != case:
                    case, sets = work.case, []  # the last one's memory is free before the next's
                    if case not in mistakes:
                        progress.update(task, description=f"checking {case.name}", refresh=True)
                        mistakes[case] = mistakes_of(case, device)
                if mistakes[case]:
                    progress.update(task, advance=rounds)
                    yield work, {}, mistakes[case]
                    continue
                if not sets:
                    count = count_sets(device, case.nbytes)
                    sets = [case.inputs(device.device) for _ in range(count)]
                    if "compile" in work.providers:
                        torch.compiler.reset()  # or it would give up after some shapes
                progress.update(task, description=f"timing {work.title}", refresh=True)
                measured, notices = time_work(device, work, sets, rounds, advance)
                yield work, measured, [f"{work.title}, {notice}" for notice in notices]


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
    return make_table(
        ["case", "x", "slope", "op", "provider"],
        [
            "device us",
            "IQR us",
            "call us",
            "GB/s",
            "% of copy",
            "x eager",
            "extra MiB",
        ],
        title=f"Caches cold from 1 MiB on, providers in turn, medians of {rounds} rounds; IQR is "
        "the spread of the device time",
        caption="eager: torch.nn.functional's prelu, or leaky_relu where the slope is a number; "
        "compile: the same under torch.compile, a float32 slope beside a half-precision input cast "
        "as autocast does; inference: the modules without grad. copy: moves as many bytes as the "
        "operation. x eager: by device time where x has 16 MiB or more, else by call "
        "time. Device times of x below 1 MiB are of CUDA-graph replays. jax: whole calls alone, "
        "PReLU of contiguous tensors alone.",
    )


def add_rows(
    table: Table, work: Work, measured: Mapping[str, Measurement], eager: Measurement | None
) -> None:
    """Adds one operation of one case; slower than eager is red."""
    case = work.case
    for name, one in measured.items():
        row = make_row(case, work.op, name, measured)
        x_eager = speedup(case, eager, one)
        table.add_row(
            case.name,
            f"{row.dtype} {row.shape}",
            f"{row.slope}, {row.slope_dtype}",
            work.op,
            name,
            number(row.device_us, 1),
            number(one.spread_us, 1),
            number(row.call_us, 1),
            number(row.gbps, 0),
            number(row.pct_copy, 1),
            number(x_eager, 2),
            number(row.extra_bytes and row.extra_bytes / 2**20, 2),
            style="red" if x_eager is not None and x_eager < 1 else None,
        )
    table.add_section()
