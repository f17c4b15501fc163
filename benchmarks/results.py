"""The facts of a run, and the file of its results."""

import csv
import os
import re
import subprocess
import sys
from dataclasses import astuple, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import typer

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


def describe_run(gpu: str) -> Run:
    """The facts that make a figure comparable; `gpu` is its name.

    The commit is PRELU_GPU_COMMIT, else what git says of this checkout. Where neither is there,
    a warning goes to stderr, and the rows say "unknown".
    """
    import triton  # not on every platform where these programs say what they lack

    run = Run(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=os.environ.get("PRELU_GPU_COMMIT")
        or _ask("git", "describe", "--always", "--dirty", "--exclude=*"),
        gpu=gpu,
        driver=_ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
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


def _ask(*command: str) -> str:
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


class ResultsFile:
    """A CSV file that is complete up to the last row written, whenever the run is cut off.

    A file that is there is continued where it came from the same run except for the date: figures
    of two states of the code in one file would be compared.
    """

    def __init__(self, folder: Path, suffix: str, run: Run, row_type: type) -> None:
        gpu = re.sub(r"[^a-z0-9]+", "-", run.gpu.lower()).strip("-")
        self.path = folder / f"{gpu}{suffix}.csv"
        self._notices = folder / f"{gpu}-notices.txt"
        self._run = run
        self._columns = columns(row_type)
        self.rows: list[dict[str, str]] = []
        """What the file held when it was opened."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self.rows = self._read()
        else:
            self._append(self._columns)

    def write(self, row: Any) -> None:
        """Adds a row."""
        self._append((*astuple(self._run), *astuple(row)))

    def note(self, notice: str) -> None:
        """Adds a line to DIR/<gpu>-notices.txt: what a row does not tell, or why there is none."""
        with self._notices.open("a") as file:
            file.write(f"{notice}\n")

    def _read(self) -> list[dict[str, str]]:
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        if reader.fieldnames != self._columns:
            raise ValueError("it has other columns than this program's")
        if not self._run.is_of_a_commit:
            raise ValueError(f"this checkout ({self._run.commit}) is no commit to continue it with")
        for row in rows:
            for column in ("commit", "gpu", "driver", "torch", "triton"):
                if row[column] != (ours := getattr(self._run, column)):
                    raise ValueError(f"its {column} is {row[column]}, and this is {ours}")
        return rows

    def _append(self, values: Any) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(values)


def columns(row_type: type) -> list[str]:
    """The columns of a file whose rows are the dataclass `row_type`: those of Run come first."""
    return [field.name for part in (Run, row_type) for field in fields(part)]


def open_results(folder: Path | None, suffix: str, run: Run, row_type: type) -> ResultsFile | None:
    """Opens DIR/<gpu><suffix>.csv, if there is to be one.

    Raises:
        typer.BadParameter: it cannot be written, or has another run's results.
    """
    if folder is None:
        return None
    try:
        return ResultsFile(folder, suffix, run, row_type)
    except OSError as error:
        problem = f"{folder}: {error.strerror}; give a folder that can be written."
    except ValueError as error:
        problem = f"{folder} has a file that is not continued: {error}; give another folder."
    raise typer.BadParameter(problem, param_hint="--results")
