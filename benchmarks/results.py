"""The facts of a run, and the file of its results."""

import csv
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.program import ProgramError

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Run:
    """What all rows of one run share."""

    date: str
    commit: str
    gpu: str
    driver: str
    torch: str
    triton: str

    @property
    def is_of_a_commit(self) -> bool:
        """Whether its rows can be traced to a state of the code."""
        return self.commit != UNKNOWN and not self.commit.endswith("-dirty")

    def __str__(self) -> str:
        return (
            f"{self.gpu}, driver {self.driver}, torch {self.torch}, triton {self.triton}, "
            f"prelu_gpu at {self.commit}, {self.date[:10]}"
        )


class ResultsFile:
    """A CSV file that is complete up to the last row written, whenever the run is cut off.

    A file that is there is continued where it came from the same run but for the date: figures of
    two states of the code in one file would be compared.
    """

    def __init__(self, folder: Path, suffix: str, run: Run, row_type: type) -> None:
        """Opens DIR/<gpu><suffix>.csv for rows of the dataclass `row_type`.

        Raises:
            OSError: the folder cannot be written.
            ValueError: the file has another run's results.
        """
        gpu = slug(run.gpu)
        self.path = folder / f"{gpu}{suffix}.csv"
        self._notices = folder / f"{gpu}-notices.txt"
        self._run = run
        self._columns = columns(row_type)
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, str]] = []
        """What the file held when it was opened."""
        if self.path.exists():
            self.rows = self._read()
        else:
            self._write("w", self._columns)

    def write(self, row: Any) -> None:
        """Adds a row."""
        self._write("a", (*astuple(self._run), *astuple(row)))

    def note(self, notice: str) -> None:
        """Adds a line to DIR/<gpu>-notices.txt: what a row does not tell, or why there is none."""
        with self._notices.open("a") as file:
            file.write(f"{notice}\n")

    def _read(self) -> list[dict[str, str]]:
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        advice = "move it away, or give another folder."
        if reader.fieldnames != self._columns:
            raise ValueError(f"{self.path} has other columns than this program's; {advice}")
        if not self._run.is_of_a_commit:
            raise ValueError(
                f"{self.path} is there, and this checkout ({self._run.commit}) is no commit to "
                f"continue it with: commit, set PRELU_GPU_COMMIT, or {advice}"
            )
        for column in [field.name for field in fields(Run) if field.name != "date"]:
            for row in rows:
                if row[column] != getattr(self._run, column):
                    raise ValueError(
                        f"{self.path} has results of {column} {row[column]}, and this is "
                        f"{getattr(self._run, column)}; {advice}"
                    )
        return rows

    def _write(self, mode: str, values: Sequence[object]) -> None:
        with self.path.open(mode, newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(values)


def columns(row_type: type) -> list[str]:
    """The columns of a file whose rows are the dataclass `row_type`: those of Run come first."""
    return [field.name for part in (Run, row_type) for field in fields(part)]


def open_results(folder: Path | None, suffix: str, run: Run, row_type: type) -> ResultsFile | None:
    """Opens DIR/<gpu><suffix>.csv, if there is to be one.

    Raises:
        ProgramError: it cannot be written, or has another run's results.
    """
    if folder is None:
        return None
    try:
        return ResultsFile(folder, suffix, run, row_type)
    except OSError as error:
        advice = "give a folder that can be written."
        raise ProgramError(f"--results {folder}: {error.strerror}; {advice}") from error
    except ValueError as error:
        raise ProgramError(f"--results {folder}: {error}") from error


def describe_run(gpu: str) -> Run:
    """The facts that make a figure comparable; `gpu` is its name.

    The commit is PRELU_GPU_COMMIT, else what git says of this checkout. Where neither is there,
    a warning goes to stderr, and the rows say "unknown".
    """
    import triton  # not on every platform where these programs print their plans

    run = Run(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=os.environ.get("PRELU_GPU_COMMIT")
        or ask("git", "describe", "--always", "--dirty", "--exclude=*"),
        gpu=gpu,
        driver=ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        torch=torch.__version__,
        triton=triton.__version__,
    )
    if not run.is_of_a_commit:
        print(
            f"benchmarks: WARNING: this checkout ({run.commit}) is no commit. Its results can be "
            "neither continued nor traced to their code: set PRELU_GPU_COMMIT to the commit.",
            file=sys.stderr,
        )
    return run


def ask(*command: str) -> str:
    """The first line another program prints, run from the checkout; "unknown" if it cannot."""
    checkout = Path(__file__).parents[1]
    # A checkout without history may lie within another repository, whose commit it is not.
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(checkout.parent)}
    try:
        answer = subprocess.run(
            command, cwd=checkout, env=env, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
    return next(iter(answer.stdout.splitlines()), UNKNOWN)


def slug(name: str) -> str:
    """A GPU's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
