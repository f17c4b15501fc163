"""Times prelu_gpu's operators on a GPU beside PyTorch's, torch.compile and a copy.

    python -m benchmarks speed --core --results DIR         the cases that tell most
    python -m benchmarks speed --results DIR --minutes 7    all, most telling first, or goes on
    python -m benchmarks speed --case iresnet --op step     some; --case takes a group too

Correct first, then timed: a speed is never reported of wrong results.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console

from benchmarks import program
from benchmarks.cases import CASES, CORE, DTYPES, GROUPS, PASSES, Case, Inputs, is_in
from benchmarks.program import Deadline, Minutes, ResultsFolder, choice, make_table
from benchmarks.providers import OURS, PROVIDERS, UNFUSED
from benchmarks.results import ResultsFile, describe_run, open_results
from benchmarks.timing import ROUNDS, Gpu, Measurement, count_sets, measure
from prelu_gpu.rules import gpu_rules

QUICK_ROUNDS = 5
REPLAYED_BYTES = 2**20
"""Size of x below which device times are those of CUDA-graph replays."""

NAMES = (*GROUPS, *dict.fromkeys(case.name for case in CASES))
CORE_HELP = f"The {len(CORE)} cases that tell most, one dtype each, into <gpu>-core.csv."
QUICK_HELP = f"These in {QUICK_ROUNDS} rounds, not {ROUNDS}, into <gpu>-quick.csv."
REQUIRE_HELP = "Only say whether there is a GPU to time on; status 1 if not."


@dataclass(frozen=True)
class Row:
    """One line of the results file after the columns of Run."""

    case: str
    shape: str
    layout: str
    slope: str
    dtype: str
    slope_dtype: str
    norm: str
    op: str
    provider: str
    device_us: float | None
    call_us: float
    bytes: int
    gbps: float | None
    pct_copy: float | None
    extra_bytes: int | None


class Work(NamedTuple):
    """One operation of a case, and by whom it is still to be timed."""

    case: Case
    op: str
    providers: tuple[str, ...]

    @property
    def title(self) -> str:
        """What tells it from the others."""
        return f"{self.case.title} {self.op}"


def main(
    case: Annotated[list[str] | None, choice(NAMES, f"A case, or {', '.join(GROUPS)}.")] = None,
    dtype: Annotated[list[str] | None, choice(DTYPES, f"Of x: {', '.join(DTYPES)}.")] = None,
    op: Annotated[list[str] | None, choice(PASSES, f"{', '.join(PASSES)}.")] = None,
    provider: Annotated[list[str] | None, choice(PROVIDERS, f"{', '.join(PROVIDERS)}.")] = None,
    core: Annotated[bool, typer.Option("--core", help=CORE_HELP)] = False,
    quick: Annotated[bool, typer.Option("--quick", help=QUICK_HELP)] = False,
    minutes: Minutes = math.inf,
    results: ResultsFolder = None,
    require_gpu: Annotated[bool, typer.Option("--require-gpu", help=REQUIRE_HELP)] = False,
) -> None:
    """Times the operators beside PyTorch's, torch.compile and a copy.

    Options that take a NAME may be repeated; without them everything is timed, into <gpu>.csv,
    compilers last. Each case is checked just before it is timed. A case with wrong results is not
    timed: the run goes on with the others and ends with status 1, as it does where a provider
    fails. Without a GPU nothing is timed: the bytes to move and the launches are printed.
    """
    obstacle = program.find_obstacle()
    if require_gpu:
        if obstacle:
            program.fail(obstacle)
        print(f"benchmarks: {describe_run(torch.cuda.get_device_name())}")
        return
    cases = [
        one
        for one in (CORE if core or quick else CASES)
        if (not dtype or one.setting["dtype"] in dtype)
        and (not case or any(is_in(one, name) for name in case))
    ]
    if not cases:
        raise typer.BadParameter("no case is all that --case, --dtype, --core and --quick ask for.")
    console = program.open_console(200)
    if obstacle:
        console.print(f"Nothing is timed: {obstacle}", soft_wrap=True)
        print_plans(cases, console)
        return
    gpu, deadline = Gpu(), Deadline(minutes)
    run = describe_run(gpu.name)
    console.print(str(run), soft_wrap=True)
    file = open_results(results, "-quick" if quick else "-core" if core else "", run, Row)
    works = list(remaining(cases, op or PASSES, provider or PROVIDERS, file.rows if file else ()))
    benchmark(gpu, works, file, deadline, console, QUICK_ROUNDS if quick else ROUNDS)


def remaining(
    cases: Sequence[Case],
    ops: Sequence[str],
    providers: Sequence[str],
    rows: Sequence[Mapping[str, str]],
) -> Iterator[Work]:
    """What is to be timed and has no row yet; what compiles comes last, as it takes longest."""
    columns = ("case", "dtype", "slope_dtype", "op", "provider")
    finished = {tuple(row[column] for column in columns) for row in rows}
    for compiling, case in itertools.product((False, True), cases):
        key = [case.setting[column] for column in columns[:3]]
        for op in (op for op in ops if op in case.ops):
            left = tuple(
                name
                for name in providers
                if (name == "compile") == compiling
                and (*key, op, name) not in finished
                and (case.norm or name != UNFUSED)
            )
            if left:
                yield Work(case, op, left)


class Bench:
    """Checks and times operations; keeps the input sets of one case."""

    def __init__(self, device: Gpu, rounds: int) -> None:
        self._device = device
        self._rounds = rounds
        self._case: Case | None = None
        self._sets: list[Inputs] = []
        self.mistakes: dict[Case, list[str]] = {}
        """What is computed wrong in each case so far, in words."""

    def time(self, work: Work, advance: Callable[[], object]) -> dict[str, Measurement]:
        """An operation by its providers and by the copy; nothing where the case is wrong."""
        case, op, names = work
        if case != self._case:
            self._case, self._sets = case, []  # the last one's memory is free before the next's
        if case not in self.mistakes:
            self.mistakes[case] = case.mistakes(self._device.device)
        if self.mistakes[case]:
            return {}
        if not self._sets:
            sets = range(count_sets(self._device, case.nbytes))
            self._sets = [case.inputs(self._device.device) for _ in sets]
        providers = {
            name: partial(PROVIDERS[name], case, op, self._sets)
            for name in dict.fromkeys((*names, "copy"))
        }
        # Without grad the inference alone, and whole batches of it: switching costs a call's time.
        with torch.set_grad_enabled(op != "inference"):
            return measure(
                self._device,
                providers,
                len(self._sets),
                rounds=self._rounds,
                replay=case.nbytes < REPLAYED_BYTES,
                advance=advance,
                may_fail=set(providers) - {OURS},
            )


def benchmark(
    device: Gpu,
    works: Sequence[Work],
    file: ResultsFile | None,
    deadline: Deadline,
    console: Console,
    rounds: int = ROUNDS,
) -> None:
    """Checks the cases, times them and reports.

    Raises:
        typer.Exit: at the end, with status 1: a case was computed wrong, and so not timed, or a
            provider failed.
    """
    torch.manual_seed(0)
    bench, left = Bench(device, rounds), len(works)
    faults: dict[str, None] = {}

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    def notice(text: str, fault: bool) -> None:
        if text not in faults:
            say(text)
            if file:
                file.note(text)
        faults.update({text: None} if fault else {})

    say(f"Medians of {rounds} rounds, providers in turn, caches cold from 1 MiB of x on:")
    with (
        device.stream(),
        program.progress_bars(console) as progress,
        contextlib.suppress(program.TimeUpError),
    ):
        task = progress.add_task("timing", total=left * rounds)
        for work in works:
            progress.update(task, description=work.title, refresh=True)
            with deadline.piece():
                measured = bench.time(work, partial(progress.update, task, advance=1, refresh=True))
            left -= 1
            progress.update(task, completed=(len(works) - left) * rounds)
            for mistake in bench.mistakes[work.case]:
                notice(f"{work.case.title} is wrong and not timed: {mistake}", fault=True)
            for name, one in measured.items():
                if one.notice:
                    notice(f"{work.title}, {name}: {one.notice}", fault=not one.call_samples)
                if one.call_samples:
                    row = make_row(work, name, measured)
                    times = f"{row.device_us:.1f} us (IQR {one.spread_us:.1f}), {row.gbps} GB/s"
                    say(f"{work.title}, {name}: {times}; whole call {row.call_us:.1f} us")
                    if file and name in work.providers:
                        file.write(row)
    if left:
        say(
            f"The minutes given are over: {left} of {len(works)} operations are not timed. "
            "With --results the same command goes on."
        )
    if file:
        say(f"Results: {file.path}; `python -m benchmarks report` compares them.")
    if faults:
        program.fail("not everything is timed:", *faults)


def make_row(work: Work, provider: str, measured: Mapping[str, Measurement]) -> Row:
    """A provider's measurement as a line of the results file."""
    one, nbytes = measured[provider], work.case.bytes_moved(work.op)
    device_us, copy_us = one.device_us, measured["copy"].device_us
    return Row(
        **work.case.setting,
        op=work.op,
        provider=provider,
        device_us=device_us and round(device_us, 3),
        call_us=round(one.call_us, 3),
        bytes=nbytes,
        gbps=device_us and round(nbytes / device_us / 1e3, 1),
        pct_copy=device_us and copy_us and round(100 * copy_us / device_us, 1),
        extra_bytes=one.extra_bytes,
    )


def print_plans(cases: Sequence[Case], console: Console) -> None:
    """What every case must move, in the first of its dtypes, and how it would be launched."""
    table = make_table(["case", "x", "kernel"], [f"{op} MB" for op in PASSES])
    first = {case.name: case for case in reversed(cases)}
    for case in sorted(first.values(), key=cases.index):
        plan = case.plan("forward", gpu_rules(132, case.dtype.itemsize, backward=False))
        megabytes = (f"{case.bytes_moved(op) / 1e6:.1f}" for op in PASSES)
        x = f"{case.setting['dtype']} {case.setting['shape']}"
        table.add_row(case.name, x, plan.kind.value, *megabytes)
    console.print(table)
