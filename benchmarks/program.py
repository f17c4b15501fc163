"""What the command-line programs share: options, errors, the end of their time, tables."""

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from prelu_gpu.backend import Backend, backend, reason


class ProgramError(Exception):
    """What ends a program with exit status 1; its text is the error message."""


class TimeUpError(Exception):
    """The time that was given is not enough for what comes next."""


class Deadline:
    """The end of a program's time.

    Args:
        minutes: from now.
        clock: seconds.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + 60 * minutes
        self._longest = 0.0

    def check(self, seconds: float = 0.0) -> None:
        """Raises TimeUpError where so many seconds are not left."""
        if self._clock() + seconds > self._end:
            raise TimeUpError

    @contextlib.contextmanager
    def piece(self) -> Iterator[None]:
        """Encloses one of several pieces of work.

        Raises:
            TimeUpError: before one that would not end in time if it took as long as the longest.
        """
        start = self._clock()
        if start + self._longest > self._end:
            raise TimeUpError
        yield
        self._longest = max(self._longest, self._clock() - start)


def find_obstacle() -> str | None:
    """Why nothing can be timed here."""
    if not torch.cuda.is_available():
        return "there is no GPU here (torch.cuda.is_available() is False)."
    if backend(torch.device("cuda")) is not Backend.TRITON:
        return f"the kernels do not run on the GPU ({reason(torch.device('cuda'))})."
    return None


def refuse_wrong(mistakes: Sequence[str]) -> None:
    """Raises ProgramError where a check of the results found mistakes."""
    if mistakes:
        raise ProgramError("\n".join(["wrong results, so nothing is timed.", *mistakes]))


def add_run_arguments(parser: argparse.ArgumentParser, file_name: str) -> None:
    """Adds --minutes and --results to the options of a program that can be continued."""
    parser.add_argument(
        "--minutes",
        type=positive,
        metavar="M",
        default=math.inf,
        help="stop before so many are over; with --results the same command goes on",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help=f"write DIR/{file_name}, row by row; one of the same commit is continued",
    )


def positive(text: str) -> float:
    """An argument's type: a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; give a number above 0")
    return number


def first_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def open_console(width: int = 140) -> Console:
    """The terminal, or a file or pipe in which tables are so many characters wide."""
    return Console(width=None if sys.stdout.isatty() else width)


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


def make_table(
    text: Sequence[str], numbers: Sequence[str] = (), title: str = "", caption: str = ""
) -> Table:
    """An empty table with columns of text, then of numbers."""
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD)
    for column in text:
        table.add_column(column)
    for column in numbers:
        table.add_column(column, justify="right")
    return table


def number(value: float | None, digits: int) -> str:
    """A number in a table; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"
