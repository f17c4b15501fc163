"""Sweeps the rule table of prelu_gpu/plan.py on the GPU at hand, and prints a proposed one.

    python -m benchmarks tune                  for seven minutes
    python -m benchmarks tune --minutes 20     for longer
    python -m benchmarks tune --results DIR    also writes every timing into DIR/<gpu>-tune.csv

Coordinate descent from the row as it is, one field at a time, for each element size and direction.
Every variant is checked before it is timed, and timed in turn with the row as it is, caches cold.
Nothing is changed: a person edits the table. Without a GPU the space is printed.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cases import H100_MULTIPROCESSORS, Case
from benchmarks.descent import (
    ROWS,
    SAME,
    SWEEPS,
    Field,
    Gains,
    Row,
    descend,
    fields,
    in_turn,
    overall,
)
from benchmarks.program import (
    Deadline,
    find_obstacle,
    make_table,
    open_console,
    positive,
    progress_bars,
)
from benchmarks.results import describe_run, open_results
from benchmarks.timing import Device, Gpu
from benchmarks.variants import VIEWS, Bench, Timing
from prelu_gpu.backend import WITHOUT_TRITON
from prelu_gpu.plan import Rules, gpu_rules

if WITHOUT_TRITON is None:
    from prelu_gpu import launch


def main(arguments: Sequence[str]) -> None:
    """Runs the program."""
    options = parse(arguments)
    console = open_console()
    obstacle = find_obstacle()
    if obstacle:
        console.print(f"Nothing is timed: {obstacle}", soft_wrap=True)
        console.print(space_table())
        return
    gpu = Gpu()
    run = describe_run(gpu.name)
    console.print(str(run), soft_wrap=True)
    file = open_results(options.results, "-tune", run, Timing)
    record = file.write if file else lambda timing: None
    multiprocessors = torch.cuda.get_device_properties(gpu.device).multi_processor_count
    torch.manual_seed(0)
    with gpu.stream():
        sweep(gpu, multiprocessors, Deadline(options.minutes), record, console)
    if file:
        console.print(f"Results: {file.path}", soft_wrap=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks tune",
        description="Sweep the rule table on the GPU at hand and print a proposed one.",
    )
    parser.add_argument(
        "--minutes", type=positive, metavar="M", default=7.0, help="most time to take (default: 7)"
    )
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="write DIR/<gpu>-tune.csv, row by row"
    )
    return parser.parse_args(arguments)


def sweep(
    device: Device,
    multiprocessors: int,
    deadline: Deadline,
    record: Callable[[Timing], None],
    console: Console,
    views: Mapping[str, Case] = VIEWS,
) -> None:
    """Sweeps all rows and prints the proposed table.

    Raises:
        ProgramError: a row as it is fails its check.
    """
    presents = {row: launch.rules(device.device, *row) for row in ROWS}
    swept = {row: fields(multiprocessors, row.backward) for row in ROWS}
    benches = {
        row: Bench(device, row, presents[row], swept[row], deadline, record, views) for row in ROWS
    }
    searches = {row: descend(presents[row], swept[row], benches[row].evaluate) for row in ROWS}
    found: dict[Row, tuple[Rules, Gains]] = {}
    steps, total = 0, sum(1 + SWEEPS * len(swept[row]) for row in ROWS)
    with progress_bars(console) as progress:
        task = progress.add_task("sweeping", total=total)
        for steps, (row, variant, gains) in enumerate(in_turn(searches), start=1):
            found[row] = variant, gains
            description = f"{row.title}: {overall(gains):.3f}x"
            progress.update(task, completed=steps, description=description, refresh=True)
    if steps < total:
        console.print(f"The time is up: {steps} of {total} steps are done.")
    console.print(proposed_table(presents, found, swept))
    console.print(gains_table(presents, found, list(views)))


def proposed_table(
    presents: Mapping[Row, Rules],
    found: Mapping[Row, tuple[Rules, Gains]],
    swept: Mapping[Row, Sequence[Field]],
) -> Table:
    """Each row as it is, and the best one found."""
    paths = list(dict.fromkeys(field.path for row in swept for field in swept[row]))
    table = make_table(
        ["row", "", *(path.replace(".", "\n") for path in paths)],
        title="Rule table: sizes in bytes, programs by multiprocessor",
    )
    for row, (best, _) in found.items():
        by_path = {field.path: field for field in swept[row]}
        for title, variant in (("as it is", presents[row]), ("proposed", best)):
            cells = [by_path[path].written(variant) if path in by_path else "" for path in paths]
            if title == "proposed" and best == presents[row]:
                title, cells = "keep", []
            table.add_row(row.title, title, *cells)
        table.add_section()
    return table


def gains_table(
    presents: Mapping[Row, Rules],
    found: Mapping[Row, tuple[Rules, Gains]],
    views: Sequence[str],
) -> Table:
    """What each proposed row gains on each view."""
    title = "Gain of the proposed row, and its interquartile range"
    table = make_table(["row", "", *views], title=title)
    for row, (best, gains) in found.items():
        if best == presents[row]:
            table.add_row(row.title, "keep: no gain beyond the spread")
            continue
        cells = ("=" if g == SAME else f"{g.factor:.3f} ({g.spread:.3f})" for g in gains.values())
        table.add_row(row.title, f"{overall(gains):.3f}x", *cells)
    return table


def space_table() -> Table:
    """What would be swept on an H100."""
    table = make_table(
        ["row", "field", "as it is", "values"],
        ["variants"],
        title=f"What would be swept, on an H100 ({H100_MULTIPROCESSORS} multiprocessors); sizes in "
        "bytes, programs by multiprocessor",
        caption="variants: rows tried in the first pass",
    )
    for row in ROWS:
        present = gpu_rules(H100_MULTIPROCESSORS, *row)
        total = 0
        for field in fields(H100_MULTIPROCESSORS, row.backward):
            count = len(field.alternatives(present))
            total += count
            table.add_row(
                row.title,
                field.path,
                field.written(present),
                ", ".join(f"{value:g}" for value in field.values),
                str(count),
            )
        table.add_row("", "", "", "", str(total))
        table.add_section()
    return table
