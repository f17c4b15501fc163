"""Checks the contract of the machine code (tests/test_machine_code.py) with several Tritons.

    python -m benchmarks.machine_code_matrix                     3.6.0, 3.7.1, 3.8.0 and 3.9.0
    python -m benchmarks.machine_code_matrix --triton 3.8.0
    MACHINE_CODE=full python -m benchmarks.machine_code_matrix   every kernel: minutes a version

Each version is installed into a folder of its own, which stands before the environment's packages
on Python's path: everything else is what is installed already, PyTorch too, which makes only
tensors without memory here. Pip fetches what is not there yet.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]


class Outcome(NamedTuple):
    """What the contract's tests say of one version of Triton."""

    version: str
    checks: int
    failures: tuple[str, ...]
    """The names of the tests that failed."""


def install(version: str, folder: Path) -> None:
    """Installs Triton alone, unless the folder has it."""
    if not (folder / f"triton-{version}.dist-info").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        if subprocess.run([*pip, "--target", folder, f"triton=={version}"]).returncode:
            raise SystemExit(f"triton {version}: pip does not install it; choose another version")


def check(version: str, folder: Path) -> Outcome:
    """Runs the contract's tests with the Triton in a folder; their output lies beside it."""
    results, output = (folder.parent / f"{folder.name}.{end}" for end in ("xml", "txt"))
    results.unlink(missing_ok=True)
    path = os.pathsep.join(map(str, (folder, ROOT)))
    pytest = [sys.executable, "-m", "pytest", "--tb=line", f"--junitxml={results}"]
    with output.open("w") as file:
        subprocess.run(
            [*pytest, "tests/test_machine_code.py"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    cases = ElementTree.parse(results).findall(".//testcase") if results.exists() else []
    outcomes = {case.attrib["name"]: {part.tag for part in case} for case in cases}
    ran = [name for name, tags in outcomes.items() if "skipped" not in tags]
    if not ran:
        raise SystemExit(f"triton {version}: the tests did not run, see {output}")
    failures = tuple(name for name in ran if outcomes[name] & {"failure", "error"})
    return Outcome(version, len(ran), failures)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; its exit status is 1 where a check failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.machine_code_matrix",
        description="The contract of the machine code, with several versions of Triton.",
    )
    parser.add_argument("--triton", nargs="+", default=["3.6.0", "3.7.1", "3.8.0", "3.9.0"])
    parser.add_argument("--out", type=Path, default=Path("out/triton"), help="where they go")
    options = parser.parse_args(arguments)

    console = Console(stderr=True)
    folders = {version: options.out.resolve() / f"triton-{version}" for version in options.triton}
    for version, folder in folders.items():
        with console.status(f"installing triton {version}"):
            install(version, folder)
    outcomes = []
    for version, folder in folders.items():
        with console.status(f"compiling with triton {version}"):
            outcomes.append(check(version, folder))

    table = Table("triton", "checks", "failures")
    for outcome in outcomes:
        table.add_row(outcome.version, str(outcome.checks), str(len(outcome.failures)))
    Console().print(table)
    for outcome in outcomes:
        for name in outcome.failures:
            print(f"triton {outcome.version}: {name}")
    if any(outcome.failures for outcome in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
