"""The machine code that a GPU would run, made and read where there is none."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton compiles the kernels; it is not installed")
if sys.platform != "linux":
    pytest.skip("Triton makes machine code on Linux only", allow_module_level=True)

TARGETS = ("sm_90", "gfx942")
KINDS = {
    "flat": "flat",
    "flat-prime": "flat",
    "plane": "plane",
    "column-7x7": "column",
    "column-channels-last": "column",
    "column-folded": "column",
    "odd-plane": "odd plane",
    "sliced-plane": "plane",
    "sliced-flat": "plane",
    "sliced-column": "column",
}
OPS = ("forward", "backward")
DTYPES = ("float32", "bfloat16")


def compiled(*command):
    """What a Python process prints that compiles: interpreted kernels cannot be compiled here."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=Path(__file__).parents[1],
        env={name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def reports():
    command = ["-m", "benchmarks.machine_code", "--json", "--case", *KINDS]
    command += ["--target", *TARGETS, "--op", *OPS, "--dtype", *DTYPES]
    return {
        (one["target"], one["case"], one["op"], one["dtype"]): one
        for one in json.loads(compiled(*command))
    }


@pytest.fixture(params=itertools.product(TARGETS, KINDS, OPS, DTYPES), ids=" ".join)
def report(reports, request):
    return reports[request.param]


def test_the_tile_is_of_the_kind_the_case_stands_for(report):
    assert report["kind"] == KINDS[report["case"]]


def test_hot_loops_access_128_bits_at_a_time(report):
    assert report["loops"]
    for loop in report["loops"]:
        assert {*loop["load_bits"], *loop["store_bits"]} == {128}


def test_hot_loops_load_every_input_and_store_every_output(report):
    loads_per_store = 1 if report["op"] == "forward" else 2
    for loop in report["loops"]:
        assert len(loop["load_bits"]) == loads_per_store * len(loop["store_bits"])


def test_nothing_spills(report):
    assert report["spilled_bytes"] == 0


def test_a_barrier_stands_between_a_programs_partial_sum_and_its_count():
    """Without it, nothing makes the sum visible to the last program before the count is.

    In Triton's own code: below it, a barrier of the reduction may happen to stand there.
    """
    code = compiled(
        "-c",
        "from benchmarks.machine_code import *\n"
        "f32 = torch.float32\n"
        "case = GPUS['sm_90'], CASES['plane'], Op.BACKWARD, f32, f32\n"
        "plan, kernel = compile_launch(*case)\n"
        "assert plan.finish\n"
        "print(kernel.asm['ttgir'])",
    )
    steps = re.findall(r"tt\.store|\w+\.barrier|tt\.atomic_rmw add, acq_rel, gpu", code)
    count = steps.index("tt.atomic_rmw add, acq_rel, gpu")
    assert steps[count - 2] == "tt.store"
    assert steps[count - 1].endswith(".barrier")
