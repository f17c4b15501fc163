"""Mutation check: breaks the kernels' source, one change at a time, and runs the tests on each.

    python tests/tools/mutations.py --out out/mutations.csv

A mutant that no test turns red has survived: a test is missing, or the change has no effect that a
test could see, which equivalent_mutants.txt says why. The kernels run in Triton's interpreter, and
no file of the checkout is touched: each job has a copy, in which every run is a forked process.
"""

import argparse
import contextlib
import csv
import dataclasses
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from mutants import Mutant, mutants_of
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).parents[2]
EQUIVALENT = ROOT / "tests" / "tools" / "equivalent_mutants.txt"
LEFT_OUT = shutil.ignore_patterns(
    *(".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info"),
    *("out", "build", "dist"),
)

# The tests of the kernels' results come first, EACH parameters of each; survivors meet all tests.
QUICK_TESTS = (
    *("test_backward.py", "test_forward.py", "test_strides.py"),
    *("test_counters.py", "test_property.py", "test_guards.py"),
)
EACH = 6
START_LIMIT, QUICK_LIMIT, LIMIT = 60, 60, 240


@dataclasses.dataclass(frozen=True)
class Stage:
    """Tests that run together."""

    tests: Sequence[str]
    limit: int
    """Seconds for each test."""
    mixed: bool = False
    """One test of each function first, then the next, up to EACH; else all in their order."""


class Watch:
    """Pytest plugin: says which test runs, and limits its time."""

    def __init__(self, checkout: Path, path: str, stage: Stage) -> None:
        self.checkout, self.path, self.stage = checkout, path, stage

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Where tests are mixed, those of another file's kind of tile come last."""
        loaded = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
        changed = (self.checkout / self.path).resolve()
        if items and changed not in {Path(file).resolve() for file in loaded if file}:
            raise pytest.UsageError(f"the tests do not import {changed}")
        if not self.stage.mixed:
            return
        files = {file.stem.upper() for file in changed.parent.glob("*.py")}
        turns: Counter[tuple[bool, str]] = Counter()
        order = {}
        for item in items:
            own = changed.stem.upper() in item.name
            turn = own, item.nodeid.partition("[")[0]
            order[item] = not own and any(file in item.name for file in files), turns[turn]
            turns[turn] += 1
        items[:] = sorted((item for item in items if order[item][1] < EACH), key=order.__getitem__)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """The alarm, which nothing handles, ends the process."""
        signal.alarm(self.stage.limit)
        (self.checkout / "running").write_text(nodeid)


def run_pytest(checkout: Path, path: str, stage: Stage) -> None:
    """Runs tests of a copy; in a process of its own, which it ends."""
    os.setsid()
    signal.alarm(START_LIMIT)
    log = os.open(checkout / "log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(checkout)
    sys.path.insert(0, str(checkout))
    # Files of one length, changed within a second, have one bytecode.
    sys.dont_write_bytecode = True
    os.environ.update(PYTHONPATH=str(checkout), PYTHONDONTWRITEBYTECODE="1")
    options = ["-x", "-p", "no:cacheprovider", "--rootdir", str(checkout)]
    if stage.mixed:
        settings.register_profile(
            "few", max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate]
        )
        options += ["--hypothesis-profile", "few"]
    # Hypothesis is imported already.
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    code = pytest.main([*stage.tests, *options], plugins=[Watch(checkout, path, stage)])
    sys.stdout.flush()
    os._exit(code)


def outcome(checkout: Path, path: str, stage: Stage) -> tuple[str, str]:
    """Runs tests of a copy; gives survived, killed or timeout, and the last test."""
    running = checkout / "running"
    running.write_text("import")
    arguments = (checkout, path, stage)
    process = multiprocessing.get_context("forkserver").Process(target=run_pytest, args=arguments)
    process.start()
    try:
        process.join()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.exitcode == 0:
        return "survived", ""
    if process.exitcode in (3, 4, 5):
        raise RuntimeError(f"pytest failed:\n{(checkout / 'log').read_text()[-2000:]}")
    return "timeout" if process.exitcode == -signal.SIGALRM else "killed", running.read_text()


def run(
    root: Path, work: Sequence[tuple[Mutant, Sequence[Stage]]], jobs: int
) -> Iterator[tuple[str, str, float]]:
    """Runs each mutant of a file in root through its stages, up to the one that it does not pass.

    Gives (outcome, the test that went red, seconds), in the order given.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        checkouts: queue.Queue[Path] = queue.Queue()
        for job in range(jobs):
            copy = Path(folder) / str(job)
            checkouts.put(shutil.copytree(root, copy, symlinks=True, ignore=LEFT_OUT))

        def attempt(mutant: Mutant, stages: Sequence[Stage]) -> tuple[str, str, float]:
            checkout, start = checkouts.get(), time.monotonic()
            file, result = checkout / mutant.path, ("survived", "")
            original = file.read_text()
            file.write_text(mutant.source)
            try:
                for stage in stages:
                    if result[0] == "survived":
                        result = outcome(checkout, mutant.path, stage)
            finally:
                file.write_text(original)
                checkouts.put(checkout)
            return *result, time.monotonic() - start

        yield from pool.map(attempt, *zip(*work, strict=True))


def reasons(file: Path) -> dict[str, str]:
    """Why survivors are equivalent, by key: a reason's line, and below it its keys, indented."""
    found, reason = {}, ""
    for line in file.read_text().splitlines() if file.exists() else []:
        if line.startswith("    "):
            found[line.strip()] = reason
        elif line:
            reason = line
    return found


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/mutations.csv"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--only", metavar="FILE", help="as column.py")
    parser.add_argument("--function", help="as column_forward")
    parser.add_argument("--list", action="store_true", help="show the mutants, run nothing")
    parser.add_argument("--quick", action="store_true", help="the tests of results only")
    args = parser.parse_args()

    console = Console(soft_wrap=True, markup=False, highlight=False)
    every = [
        mutant
        for file in sorted((ROOT / "kernels").glob("*.py"))
        for mutant in mutants_of(f"kernels/{file.name}", file.read_text())
    ]

    def chosen(key: str) -> bool:
        path, function = key.split(":")[:2]
        return (not args.only or path == f"kernels/{args.only}") and (
            not args.function or function == args.function
        )

    mutants = [mutant for mutant in every if chosen(mutant.key)]
    if args.list or not mutants:
        for mutant in mutants:
            console.print(f"{mutant.path}:{mutant.line}: {mutant.function}: {mutant.change}")
        console.print(f"{len(mutants)} mutants")
        return 0 if mutants else 2

    # For the children: kernels are interpreted, and libraries are imported once.
    os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    preload = ["numpy", "torch", "triton.language", "pytest", "hypothesis", "rich.progress"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    tests = {str(file.relative_to(ROOT)) for file in (ROOT / "tests").glob("*/test_*.py")}
    quick = [test for test in (f"tests/kernels/{name}" for name in QUICK_TESTS) if test in tests]
    everything = sorted(tests - {"tests/tools/test_mutations.py"})
    stages = [Stage(quick, QUICK_LIMIT, mixed=True), Stage(everything, LIMIT)]
    stages = stages[:1] if args.quick else stages

    console.print("The tests without a change must pass.")
    whole = dataclasses.replace(mutants[0], source=(ROOT / mutants[0].path).read_text())
    for result, test, _ in run(ROOT, [(whole, [stage]) for stage in stages], args.jobs):
        if result != "survived":
            console.print(f"{result}: {test}")
            return 2

    known = reasons(EQUIVALENT)
    # No test can see what has a reason: a few try.
    work = [(mutant, stages[:1] if mutant.key in known else stages) for mutant in mutants]
    results = zip(mutants, run(ROOT, work, args.jobs), strict=True)
    counts, survived, unexplained = Counter(), set(), []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        table = csv.writer(file)
        columns = "place", "function", "line", "change", "outcome", "test", "seconds", "reason"
        table.writerow(columns)
        for mutant, (result, test, seconds) in track(results, total=len(work), console=console):
            counts[result] += 1
            reason = ""
            if result == "survived":
                survived.add(mutant.key)
                reason = known.get(mutant.key, "")
                if not reason:
                    unexplained.append(mutant)
            place = f"{mutant.path}:{mutant.line}"
            row = (place, mutant.function, mutant.text, mutant.change, result, test)
            table.writerow((*row, f"{seconds:.1f}", reason))
            file.flush()

    console.print(", ".join(f"{count} {result}" for result, count in sorted(counts.items())))
    for mutant in unexplained:
        console.print(f"survived without a reason, line {mutant.line}:\n    {mutant.key}")
    for key in filter(chosen, known):
        if key not in survived:
            gone = key not in {mutant.key for mutant in every}
            console.print(f"reason without a {'mutant' if gone else 'survivor'}:\n    {key}")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
