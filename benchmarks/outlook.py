"""What can be known of the speed without a GPU: bytes, plans, machine code, the host's cost."""

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.cases import H100_MULTIPROCESSORS, PASSES, Case
from benchmarks.host import host_table
from benchmarks.program import make_table
from prelu_gpu.plan import SMALL, gpu_rules

MACHINE_CODE_CASES = ("flat", "plane", "column-channels-last", "odd-plane")


def print_outlook(cases: Sequence[Case], console: Console) -> None:
    """Prints all of it."""
    console.print(plan_table(cases))
    console.print("Machine code for an H100, by python -m benchmarks.machine_code:")
    console.print(machine_code(), soft_wrap=True, highlight=False, markup=False)
    console.print(host_table())


def plan_table(cases: Sequence[Case]) -> Table:
    """What every case must move, in the first of its dtypes, and how it would be launched."""
    table = make_table(
        ["case", "shape", "layout", "dtype", "slope"],
        [f"{op} MB" for op in PASSES],
        title=f"Bytes to move, and plans for an H100 ({H100_MULTIPROCESSORS} multiprocessors)",
        caption=f"Inputs of less than {SMALL:,} elements are served by PyTorch's operator where it "
        "means the same; their plans are for where it does not.",
    )
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
