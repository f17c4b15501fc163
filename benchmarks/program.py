"""What the programs share: options, ends, the minutes given, tables."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from prelu_gpu.backend import Backend, backend_of, reason

Minutes = Annotated[
    float,
    typer.Option(
        min=0,
        metavar="M",
        show_default=False,
        help="Stop before so many are over; with --results the same command goes on.",
    ),
]
ResultsFolder = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Write a file there, row by row; one of the same commit is continued."
    ),
]


def one_of(allowed: Collection[str]) -> Callable[[list[str] | None], list[str] | None]:
    """An option's callback that refuses other values."""

    def check(values: list[str] | None) -> list[str] | None:
        for value in values or ():
            if value not in allowed:
                raise typer.BadParameter(f"{value!r} is not among {', '.join(allowed)}.")
        return values

    return check


def choice(allowed: Collection[str], help: str) -> Any:
    """An option that may be repeated, each time with one of the allowed values."""
    return typer.Option(metavar="NAME", callback=one_of(allowed), help=help, show_default=False)


def fail(*lines: str) -> NoReturn:
    """Ends the program with status 1 and a message."""
    print("benchmarks:", "\n".join(lines), file=sys.stderr)
    raise typer.Exit(1)


def refuse_wrong(mistakes: Sequence[str]) -> None:
    """Ends the program where a check of the results found mistakes."""
    if mistakes:
        fail("wrong results, so nothing is timed.", *mistakes)


def find_obstacle() -> str | None:
    """Why nothing can be timed here."""
    if not torch.cuda.is_available():
        return "there is no GPU here (torch.cuda.is_available() is False)."
    if backend_of(torch.device("cuda")) is not Backend.TRITON:
        return f"the kernels do not run on the GPU ({reason(torch.device('cuda'))})."
    return None


class TimeUpError(Exception):
    """The time that was given is not enough for what comes next."""


class Deadline:
    """The end of a program's time.

    Args:
        minutes: from now.
        clock: seconds.
    """

    def __init__(
        self, minutes: float = math.inf, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._end = clock() + 60 * minutes
        self._longest = 0.0

    @contextlib.contextmanager
    def piece(self, seconds: float = 0.0) -> Iterator[None]:
        """Encloses one of several pieces of work, which takes so many seconds or more.

        Raises:
            TimeUpError: before one that would not end in time if it took as long as the longest.
        """
        start = self._clock()
        if start + max(seconds, self._longest) > self._end:
            raise TimeUpError
        yield
        self._longest = max(self._longest, self._clock() - start)


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
