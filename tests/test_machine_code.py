"""The machine code that a GPU would run, made and read where there is none.

MACHINE_CODE=full compiles every kernel of every target, minutes on two cores, not a covering set.
"""

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

# All kernels are compiled once, not by each of pytest's processes.
pytestmark = pytest.mark.xdist_group("machine code")

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
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
DTYPES = (
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("bfloat16", "float32"),
    ("float16", "float32"),
)
"""Dtypes of x and of the slope."""

FEWER_LOADS = {
    ("sm_80", "flat", "forward", 16): 3,
    ("sm_80", "flat", "backward", 16): 2,
    ("sm_80", "plane", "forward", 16): 2,
    ("sm_80", "plane", "backward", 16): 2,
    ("sm_80", "odd plane", "forward", 16): 2,
    ("sm_80", "odd plane", "backward", 16): 2,
    ("sm_80", "column", "forward", 16): 2,
    ("sm_80", "column", "backward", 16): 2,
    ("sm_80", "column", "backward", 32): 3,
    ("sm_90", "flat", "backward", 16): 3,
    ("sm_90", "plane", "forward", 16): 2,
    ("sm_90", "plane", "backward", 16): 2,
    ("sm_90", "column", "forward", 16): 2,
    ("sm_90", "column", "backward", 16): 2,
    ("sm_90", "column", "backward", 32): 3,
    ("sm_90", "column", "frozen", 16): 2,
    ("sm_90", "column", "slope", 16): 2,
    ("sm_90", "column", "slope", 32): 2,
    ("sm_100", "plane", "forward", 16): 2,
    ("sm_100", "plane", "backward", 16): 2,
    ("sm_100", "odd plane", "forward", 16): 2,
    ("sm_100", "column", "forward", 16): 2,
    ("sm_100", "column", "backward", 16): 2,
    ("sm_100", "column", "backward", 32): 3,
}
"""Loads of four that stand before the first use, by target, tile, operation and bits of x.

In the code that Triton hands to NVIDIA's assembler all four do. The assembler moves some behind the
arithmetic of the first, though its registers would do: mostly where 16 bits are unpacked, where
slopes differ between a lane's elements, and on sm_80, which has no bfloat16 arithmetic. Which ones
changes with its version; these are the fewest that triton 3.6, 3.7 and 3.9 leave.
"""


MORE_INSTRUCTIONS = {("sm_100", "column", "backward", 16): 14.0}
"""Instructions per element, where not less than half of the budget: 13.2 here. Slopes and sums are
each element's own. Over it are folded columns by triton 3.6, and sliced ones with float32 slopes by
3.6 and 3.7."""

SPILLED_BYTES = {("sm_80", "sliced-column", "forward", "float16", "float16"): 8}
"""By triton 3.9 alone."""


def covering_kernels():
    """Every target with every case and operation, in two of the dtypes, which move on by one."""
    for (t, target), (c, case), (o, op) in itertools.product(
        *map(enumerate, (TARGETS, KINDS, OPS))
    ):
        for step in (0, 2):
            yield (target, case, op, *DTYPES[(t + c + o + step) % len(DTYPES)])


def all_kernels():
    for target, case, op, dtypes in itertools.product(TARGETS, KINDS, OPS, DTYPES):
        yield (target, case, op, *dtypes)


def partial_backwards():
    """The gradient of x alone, or of the slope alone."""
    cases = "flat", "column-channels-last", "odd-plane"
    for case, op, dtypes in itertools.product(cases, ("frozen", "slope"), DTYPES[:2]):
        yield ("sm_90", case, op, *dtypes)


FULL = os.environ.get("MACHINE_CODE") == "full"
KERNELS = [*(all_kernels() if FULL else covering_kernels()), *partial_backwards()]


def compiled(program, data=""):
    """What a Python program prints that compiles: interpreted kernels cannot be compiled here."""
    done = subprocess.run(
        [sys.executable, "-c", "from benchmarks.machine_code import *\n" + program],
        cwd=Path(__file__).parents[1],
        env={name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"},
        input=data,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def reports():
    program = "import sys\nprint(to_json(reports([Kernel(*k) for k in json.load(sys.stdin)])))"
    return {
        tuple(one["kernel"].values()): one
        for one in json.loads(compiled(program, json.dumps(KERNELS)))
    }


@pytest.fixture(params=KERNELS, ids=" ".join)
def report(reports, request):
    return reports[request.param]


def test_the_covering_set_has_every_pair():
    kernels = list(covering_kernels())
    assert set(kernels) < set(all_kernels())
    targets, cases, ops, *dtypes = zip(*kernels, strict=True)
    dtypes = list(zip(*dtypes, strict=True))
    kinds = [KINDS[case] for case in cases]
    assert set(zip(targets, cases, ops, strict=True)) == set(itertools.product(TARGETS, KINDS, OPS))
    assert set(zip(targets, dtypes, strict=True)) == set(itertools.product(TARGETS, DTYPES))
    assert set(zip(kinds, ops, dtypes, strict=True)) == set(
        itertools.product(KINDS.values(), OPS, DTYPES)
    )


def test_the_tile_is_of_the_kind_the_case_stands_for(report):
    assert report["kind"] == KINDS[report["kernel"]["case"]]


def test_hot_loops_access_128_bits_at_a_time(report):
    assert report["vector_bits"] == 128
    assert report["loops"]
    for loop in report["loops"]:
        assert {*loop["load_bits"], *loop["store_bits"]} == {128}


def test_hot_loops_load_every_input_of_a_tile_and_store_every_output(report):
    stores_per_tile = {"forward": 1, "backward": 1 / 2, "frozen": 1 / 2, "slope": 0}
    for loop in report["loops"]:
        assert len(loop["load_bits"]) == report["tile_loads"]
        stores = stores_per_tile[report["kernel"]["op"]] * report["tile_loads"]
        assert len(loop["store_bits"]) == stores


def tile_of(report):
    """What exceptions go by: target, tile, operation and bits of x."""
    kernel = report["kernel"]
    bits = 32 if kernel["dtype"] == "float32" else 16
    return kernel["target"], report["kind"], kernel["op"], bits


def test_hot_loops_load_a_tile_before_they_use_it(report):
    for loop in report["loops"]:
        assert loop["loads_in_flight"] >= FEWER_LOADS.get(tile_of(report), report["tile_loads"])


def test_nothing_spills(report):
    allowed = SPILLED_BYTES.get(tuple(report["kernel"].values()), 0)
    assert report["spilled_bytes"] <= allowed


def test_loops_divide_by_nothing_that_is_unknown_until_run_time(report):
    assert report["divisions"] == []


def test_instructions_take_less_than_half_of_the_time_of_memory(report):
    for loop in report["loops"]:
        limit = MORE_INSTRUCTIONS.get(tile_of(report), report["issue_budget"] / 2)
        assert loop["instructions"] / loop["elements"] < limit


def test_divisions_are_found_in_loops_only_and_not_by_constants():
    code = compiled(
        "print(list(loop_divisions('''\n"
        "  tt.func public @kernel(%n: i32) {\n"
        "    %c8 = arith.constant 8 : i32\n"
        "    %a = arith.divsi %n, %n : i32\n"
        "    scf.for %i = %c8 to %n step %c8  : i32 {\n"
        "      scf.if %b {\n"
        "        %d = arith.remui %i, %n : i32\n"
        "      } else {\n"
        "        %e = arith.divsi %i, %c8 : i32\n"
        "      }\n"
        "      %f = arith.ceildivsi %i, %n : i32\n"
        "    }\n"
        "    %g = scf.while (%h = %n) : (i32) -> i32 {\n"
        "      %j = arith.divui %h, %n : i32\n"
        "    } do {\n"
        "      %k = arith.remsi %h, %n : i32\n"
        "    }\n"
        "    %l = arith.remsi %n, %n : i32\n"
        "  }\n"
        "''')))"
    )
    assert code.split("'")[1::2] == [
        f"arith.{name}" for name in ("remui", "ceildivsi", "divui", "remsi")
    ]


def test_a_barrier_stands_between_a_programs_partial_sum_and_its_count():
    """Without it, nothing makes the sum visible to the last program before the count is.

    In Triton's own code: below it, a barrier of the reduction may happen to stand there.
    """
    code = compiled(
        "kernel = Kernel('sm_90', 'plane', 'backward', 'float32', 'float32')\n"
        "plan, kernel = compile_launch(kernel)\n"
        "assert plan.finish\n"
        "print(kernel.asm['ttgir'])"
    )
    steps = re.findall(r"tt\.store|\w+\.barrier|tt\.atomic_rmw add, acq_rel, gpu", code)
    count = steps.index("tt.atomic_rmw add, acq_rel, gpu")
    assert steps[count - 2] == "tt.store"
    assert steps[count - 1].endswith(".barrier")
