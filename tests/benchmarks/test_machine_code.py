"""The machine code that a GPU would run, made and read where there is none.

MACHINE_CODE=full compiles every kernel of every target, minutes on two cores, not a covering set.
"""

import itertools
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from support import run_program

pytest.importorskip("triton", reason="Triton compiles the kernels; it is not installed")
pytest.importorskip("rich")
pytest.importorskip("typer")
if sys.platform != "linux":
    pytest.skip("Triton makes machine code on Linux only", allow_module_level=True)

import triton

from benchmarks import machine_code
from prelu_gpu.rules import gpu_rules

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
ONE_INPUT = ("forward", "leaky-forward", "leaky-in-place")
"""Operations that read one tensor of x's size; the others read two."""
DTYPES = (
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("bfloat16", "float32"),
    ("float16", "float32"),
)
"""Dtypes of x and of the slope."""

PINNED = "3.7.1"
"""The triton of constraints.txt. For it the exceptions below are exact: what does better than they
say fails like what does worse."""

FEWER_LOADS = {
    ("sm_80", "flat", "backward", 16): (3, "flat", "float16", "float32"),
    ("sm_80", "plane", "forward", 16): (3, "plane", "bfloat16", "float32"),
    ("sm_80", "plane", "backward", 16): (2, "plane", "bfloat16", "bfloat16"),
    ("sm_80", "plane", "leaky-forward", 16): (3, "sliced-flat", "bfloat16", "bfloat16"),
    ("sm_80", "odd plane", "forward", 16): (2, "odd-plane", "bfloat16", "bfloat16"),
    ("sm_80", "column", "forward", 16): (2, "column-7x7", "bfloat16", "bfloat16"),
    ("sm_80", "column", "forward", 32): (6, "column-folded", "float32", "float32"),
    ("sm_80", "column", "backward", 16): (2, "column-7x7", "bfloat16", "bfloat16"),
    ("sm_80", "column", "backward", 32): (3, "sliced-column", "float32", "float32"),
    ("sm_80", "column", "leaky-forward", 16): (2, "sliced-column", "bfloat16", "bfloat16"),
    ("sm_80", "column", "leaky-backward", 16): (2, "sliced-column", "bfloat16", "bfloat16"),
    ("sm_80", "column", "leaky-backward", 32): (2, "sliced-column", "float32", "float32"),
    ("sm_90", "plane", "backward", 16): (2, "sliced-flat", "bfloat16", "bfloat16"),
    ("sm_90", "column", "forward", 16): (2, "sliced-column", "bfloat16", "bfloat16"),
    ("sm_90", "column", "backward", 16): (2, "sliced-column", "float16", "float16"),
    ("sm_90", "column", "frozen", 16): (3, "column-channels-last", "bfloat16", "bfloat16"),
    ("sm_90", "column", "leaky-forward", 16): (2, "sliced-column", "bfloat16", "bfloat16"),
    ("sm_90", "column", "leaky-backward", 16): (2, "sliced-column", "bfloat16", "bfloat16"),
    ("sm_100", "plane", "forward", 16): (2, "plane", "bfloat16", "float32"),
    ("sm_100", "plane", "backward", 16): (2, "sliced-flat", "bfloat16", "bfloat16"),
    ("sm_100", "plane", "leaky-forward", 16): (2, "sliced-flat", "bfloat16", "bfloat16"),
    ("sm_100", "odd plane", "forward", 16): (2, "odd-plane", "bfloat16", "float32"),
    ("sm_100", "column", "forward", 16): (2, "column-7x7", "bfloat16", "float32"),
    ("sm_100", "column", "backward", 16): (2, "column-7x7", "bfloat16", "float32"),
    ("sm_100", "column", "backward", 32): (3, "sliced-column", "float32", "float32"),
    ("sm_100", "column", "leaky-forward", 16): (2, "sliced-column", "bfloat16", "bfloat16"),
    ("sm_100", "column", "leaky-backward", 16): (2, "sliced-column", "bfloat16", "bfloat16"),
    ("gfx942", "column", "forward", 32): (6, "sliced-column", "float32", "float32"),
}
"""Tiles that load less of themselves before the first use: by target, tile, operation and bits of
x, the loads of the worst kernel, and which one that is.

In the code that Triton hands to NVIDIA's assembler all loads stand first. The assembler moves some
behind the arithmetic of the first, though its registers would do: mostly where 16 bits are
unpacked, where slopes differ between a lane's elements, and on sm_80, which has no bfloat16
arithmetic.
"""

MORE_INSTRUCTIONS = {
    ("sm_100", "column", "backward", 16): (13.5, "sliced-column", "bfloat16", "float32"),
}
"""Tiles that take half of the budget of instructions per element or more, and the worst kernel's:
slopes and sums are each element's own."""

# What other versions of Triton do worse than the pinned one: the fewest loads and the most
# instructions of a tile, the bytes of a kernel.
SINCE_3_8 = {
    ("sm_80", "flat", "forward", 16): 3,
    ("sm_80", "flat", "backward", 16): 2,
    ("sm_80", "flat", "leaky-forward", 16): 3,
    ("sm_80", "flat", "leaky-in-place", 16): 3,
    ("sm_80", "plane", "forward", 16): 2,
    ("sm_80", "plane", "leaky-forward", 16): 2,
    ("sm_80", "plane", "leaky-backward", 16): 2,
    ("sm_80", "odd plane", "backward", 16): 2,
    ("sm_90", "column", "frozen", 16): 2,
    ("gfx942", "column", "forward", 32): 3,
    ("gfx942", "column", "leaky-forward", 32): 4,
}
VERSION = ".".join(triton.__version__.split(".")[:2])
OTHER_LOADS = {
    "3.6": {
        ("sm_80", "plane", "forward", 16): 2,
        ("sm_80", "plane", "leaky-forward", 16): 2,
        ("gfx942", "column", "leaky-forward", 32): 6,
    },
    "3.8": {**SINCE_3_8, ("sm_90", "flat", "backward", 16): 2},
    "3.9": {
        **SINCE_3_8,
        ("sm_80", "column", "forward", 32): 5,
        ("sm_90", "flat", "backward", 16): 3,
        ("sm_90", "column", "backward", 32): 3,
        ("sm_90", "column", "leaky-backward", 32): 2,
    },
}.get(VERSION, {})
OTHER_INSTRUCTIONS = {"3.6": {("sm_100", "column", "backward", 16): 13.9}}.get(VERSION, {})
SPILLED_BYTES = {
    "3.8": {("sm_80", "sliced-column", "forward", "float16", "float16"): 8},
    "3.9": {
        ("sm_80", "sliced-column", "forward", "float16", "float16"): 8,
        ("sm_100", "sliced-column", "leaky-forward", "float16", "float16"): 8,
    },
}.get(VERSION, {})


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


def leaky_relus(full):
    """A number for a slope: dense tensors are one row, slices are rows; in place, dense ones."""
    both = "flat", "flat-prime", "sliced-flat", "sliced-column"
    ops = {"leaky-forward": both, "leaky-in-place": both[:2], "leaky-backward": both}
    for (t, target), (o, op) in itertools.product(*map(enumerate, (TARGETS, ops))):
        for c, case in enumerate(ops[op]):
            for dtypes in DTYPES[:3] if full else [DTYPES[(t + o + c) % 3]]:
                yield (target, case, op, *dtypes)


def exceptional_kernels():
    for exceptions in (FEWER_LOADS, MORE_INSTRUCTIONS):
        for (target, _, op, _), (_, case, *dtypes) in exceptions.items():
            yield (target, case, op, *dtypes)
    yield from SPILLED_BYTES


def offset_kernels(full):
    """Inputs off the 16-byte grid."""
    cases = "offset-flat", "offset-plane", "offset-column"
    dtypes = DTYPES if full else DTYPES[:2]
    for (t, target), case, op in itertools.product(enumerate(TARGETS), cases, OPS):
        for pair in dtypes if full or target == "sm_90" else [dtypes[t % 2]]:
            yield (target, case, op, *pair)


PLAIN = {
    ("flat", "forward"): ((24, 29), (43, 109), (43, 109)),
    ("flat", "backward"): ((30, 68), (48, 175), (44, 153)),
    ("plane", "forward"): ((32, 35), (40, 109), (40, 109)),
    ("plane", "backward"): ((30, 75), (40, 177), (40, 152)),
    ("column-7x7", "forward"): ((48, 123), (36, 175), (36, 175)),
    ("column-7x7", "backward"): ((52, 100), (64, 200), (63, 183)),
    ("odd-plane", "forward"): ((30, 31), (40, 109), (40, 109)),
    ("odd-plane", "backward"): ((32, 71), (40, 173), (55, 180)),
}
"""Registers, and instructions of the hot loop, of PReLU's own kernels on sm_90, as they were when
nothing else shared their walk: of float32, bfloat16 and float16."""


def plain_kernels():
    for case, op in PLAIN:
        for dtype, slope in DTYPES[:3]:
            yield ("sm_90", case, op, dtype, slope)


NORM_OPS = ("norm-moments", "norm-forward", "norm-sums", "norm-gradient", "norm-frozen")
NORM_CASES = ("plane", "column-7x7", "column-channels-last", "column-folded", "odd-plane")
REGISTERS = {"plane": (48, 48), "odd plane": (48, 48), "column": (80, 96)}
"""On sm_90, of float32 and of 16 bits."""

MORE_REGISTERS = {
    ("column", "norm-sums", 16): (124, "column-7x7", "bfloat16"),
    ("column", "norm-gradient", 16): (115, "column-folded", "bfloat16"),
    ("column", "norm-frozen", 16): (143, "sliced-column", "bfloat16"),
    ("column", "norm-frozen", 32): (87, "column-folded", "float32"),
    ("odd plane", "norm-frozen", 16): (56, "odd-plane", "bfloat16"),
}
"""What norms take more on sm_90, and the kernel that takes most.

A thread has eight columns of 16 bits, with four coefficients and three sums each. Without the mean
there would be 95 registers for the sums, but these would lose 7e-6 of their terms' sizes at ten
standard deviations; with a limit of 96 there would be spills. A frozen norm's backward has the
input gradient and its addresses, too.
"""

HALF_OF_THE_BUDGET = {
    "norm-moments": (6.8, "column-folded"),
    "norm-sums": (13.8, "column-folded"),
    "norm-frozen": (16.3, "sliced-column"),
}
"""Instructions an element that a norm takes of bfloat16 on sm_100, where memory is so fast that its
half of the budget is 4.5, 9 and 13."""

LATENCY = 700e-9
"""Seconds that a load from memory takes, about."""


def norm_kernels(full):
    """All of sm_90 in 16 bits; of other GPUs and float32 a case for each launch."""
    for (t, target), (o, op) in itertools.product(*map(enumerate, (TARGETS, NORM_OPS))):
        for c, case in enumerate(NORM_CASES):
            chosen = full or (t + o + c) % len(NORM_CASES) == 0
            if chosen:
                yield (target, case, op, "float32", "float32")
            if chosen or target == "sm_90":
                yield (target, case, op, "bfloat16", "float32")
            if full:
                yield (target, case, op, "float16", "float32")
    for (_, op, _), (_, case, dtype) in MORE_REGISTERS.items():
        yield ("sm_90", case, op, dtype, "float32")
    for op, (_, case) in HALF_OF_THE_BUDGET.items():
        yield ("sm_100", case, op, "bfloat16", "float32")


FULL = os.environ.get("MACHINE_CODE") == "full"
CHOSEN = all_kernels() if FULL else covering_kernels()
KERNELS = [*CHOSEN, *partial_backwards(), *leaky_relus(FULL), *exceptional_kernels()]
KERNELS = list(dict.fromkeys(KERNELS))
OFFSET_KERNELS = list(offset_kernels(FULL))
NORM_KERNELS = list(dict.fromkeys(norm_kernels(FULL)))
PLAIN_KERNELS = list(plain_kernels())
ODD_KERNELS = [*itertools.product(TARGETS, ["sliced-odd"], OPS, ["bfloat16"], ["bfloat16"])]


def compiled(program):
    """What a program prints whose kernels are not interpreted, but compiled."""
    program = f"from benchmarks.machine_code import *\n{program}"
    output, _ = run_program(program, interpret=False, timeout=1200)
    return output


@pytest.fixture(scope="module")
def reports():
    every = KERNELS, OFFSET_KERNELS, ODD_KERNELS, NORM_KERNELS, PLAIN_KERNELS
    names = list(dict.fromkeys(itertools.chain.from_iterable(every)))
    program = f"""
import json
for one in reports([Kernel(*names) for names in {names}]):
    print(json.dumps(dataclasses.asdict(one) | {{"kernel": one.kernel._asdict()}}))
"""
    lines = map(json.loads, compiled(program).splitlines())
    return {tuple(one["kernel"].values()): one for one in lines}


@pytest.fixture(params=KERNELS, ids=" ".join)
def report(reports, request):
    return reports[request.param]


@pytest.mark.skipif(triton.__version__ != PINNED, reason="exact for the pinned version alone")
def test_plain_launches_compile_to_what_they_did_or_less(reports):
    for target, case, op, *dtypes in PLAIN_KERNELS:
        report = reports[(target, case, op, *dtypes)]
        before = PLAIN[case, op][DTYPES.index(tuple(dtypes))]
        (loop,) = report["loops"]
        assert report["registers"] <= before[0], (case, op, dtypes)
        assert loop["instructions"] <= before[1], (case, op, dtypes)


@pytest.fixture(params=NORM_KERNELS, ids=" ".join)
def norm(reports, request):
    return reports[request.param]


def test_a_norms_hot_loops_are_wide_and_do_not_divide(norm):
    assert norm["vector_bits"] == 128
    assert norm["divisions"] == []
    for loop in norm["loops"]:
        assert {*loop["load_bits"], *loop["store_bits"]} == {128}
        assert len(loop["load_bits"]) == norm["tile_loads"]


def test_a_norm_spills_nothing(norm):
    # The assembler of sm_100 keeps two values of a program on its stack, and has registers left.
    kernel = norm["kernel"]
    odd = kernel["target"] == "sm_100" and kernel["op"] == "norm-forward" and VERSION == "3.7"
    assert norm["spilled_bytes"] <= (8 if odd and norm["kind"] == "column" else 0)


@pytest.mark.skipif(triton.__version__ != PINNED, reason="exact for the pinned version alone")
def test_a_norms_registers(norm):
    kernel = norm["kernel"]
    if kernel["target"] != "sm_90":
        pytest.skip("the limits are sm_90's")
    bits = 32 if kernel["dtype"] == "float32" else 16
    limit = REGISTERS[norm["kind"]][bits == 16]
    limit, *_ = MORE_REGISTERS.get((norm["kind"], kernel["op"], bits), (limit,))
    assert norm["registers"] <= limit


def test_a_norms_instructions_take_less_than_half_of_the_time_of_memory(norm):
    kernel = norm["kernel"]
    exception = 0
    if kernel["target"] == "sm_100" and kernel["dtype"] != "float32":
        exception, _ = HALF_OF_THE_BUDGET.get(kernel["op"], (0, ""))
    most = most_instructions(norm)
    assert most < norm["issue_budget"] / 2 or round(most, 1) <= exception


@pytest.mark.skipif(triton.__version__ != PINNED, reason="exact for the pinned version alone")
def test_exceptions_of_norms_are_exact(reports):
    for (kind, op, _), (registers, case, dtype) in MORE_REGISTERS.items():
        report = reports[("sm_90", case, op, dtype, "float32")]
        assert (report["kind"], report["registers"]) == (kind, registers)
    for op, (most, case) in HALF_OF_THE_BUDGET.items():
        report = reports[("sm_100", case, op, "bfloat16", "float32")]
        assert round(most_instructions(report), 1) == most


def test_a_norms_loads_in_flight_cover_the_latency_of_memory(norm):
    """By Little's law: what memory moves in that time, on each multiprocessor."""
    kernel = norm["kernel"]
    if kernel["target"] not in ("sm_80", "sm_90"):
        pytest.skip("sm_100's columns have less, and places are NVIDIA's")
    gpu = machine_code.GPUS[kernel["target"]]
    programs = machine_code.places(norm["registers"], num_warps=4)
    in_flight = programs * 4 * 32 * 16 * fewest_loads(norm)
    bandwidth = {"sm_80": 2.039e12, "sm_90": 3.35e12}[kernel["target"]]
    assert in_flight >= LATENCY * bandwidth / gpu.multiprocessors


@pytest.mark.skipif(triton.__version__ != PINNED, reason="exact for the pinned version alone")
def test_a_norms_column_programs_run_at_once(norm):
    """The rule's programs of a multiprocessor find registers: one wave."""
    kernel = norm["kernel"]
    if kernel["target"] != "sm_90" or norm["kind"] != "column":
        pytest.skip("the rule is by sm_90's registers, of columns")
    itemsize = getattr(torch, kernel["dtype"]).itemsize
    programs = getattr(gpu_rules(1, itemsize, True).norm, kernel["op"].removeprefix("norm-"))
    room = machine_code.places(norm["registers"], num_warps=4)
    # What is folded with a remainder, or has gaps, takes more registers: two waves.
    more = kernel["case"] in ("column-folded", "sliced-column")
    assert programs <= room + more


@pytest.mark.parametrize("kernel", OFFSET_KERNELS, ids=" ".join)
def test_off_the_grid_lanes_lie_side_by_side(reports, kernel):
    """Each lane has 4 bytes of a line, and an input's elements one by one; nothing else suffers."""
    report = reports[kernel]
    element = 8 * getattr(torch, kernel[3]).itemsize
    assert report["loops"]
    for loop in report["loops"]:
        assert {*loop["load_bits"]} == {element}
        assert {*loop["store_bits"]} == {32}
    assert report["spilled_bytes"] == 0
    assert most_instructions(report) < report["issue_budget"] / 2


@pytest.mark.parametrize("kernel", ODD_KERNELS, ids=" ".join)
def test_lanes_of_two_bytes_are_few(reports, kernel):
    """With 32 of them, their addresses take 250 registers, and spill."""
    report = reports[kernel]
    for loop in report["loops"]:
        assert {*loop["load_bits"], *loop["store_bits"]} == {16}
        assert loop["loads_in_flight"] == len(loop["load_bits"])
    assert report["spilled_bytes"] == 0
    assert report["registers"] <= 80


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
    op = report["kernel"]["op"]
    stores_per_load = 0 if op == "slope" else 1 if op in ONE_INPUT else 1 / 2
    for loop in report["loops"]:
        assert len(loop["load_bits"]) == report["tile_loads"]
        assert len(loop["store_bits"]) == stores_per_load * report["tile_loads"]


def tile_of(report):
    """What exceptions go by: target, tile, operation and bits of x."""
    kernel = report["kernel"]
    bits = 32 if kernel["dtype"] == "float32" else 16
    return kernel["target"], report["kind"], kernel["op"], bits


def fewest_loads(report):
    return min(loop["loads_in_flight"] for loop in report["loops"])


def most_instructions(report):
    return max(loop["instructions"] / loop["elements"] for loop in report["loops"])


def test_hot_loops_load_a_tile_before_they_use_it(report):
    tile = tile_of(report)
    pinned, *_ = FEWER_LOADS.get(tile, (report["tile_loads"],))
    assert fewest_loads(report) >= min(pinned, OTHER_LOADS.get(tile, pinned))


def test_nothing_spills(report):
    assert report["spilled_bytes"] <= SPILLED_BYTES.get(tuple(report["kernel"].values()), 0)


def test_instructions_take_less_than_half_of_the_time_of_memory(report):
    tile, instructions = tile_of(report), most_instructions(report)
    pinned, *_ = MORE_INSTRUCTIONS.get(tile, (0,))
    exception = max(pinned, OTHER_INSTRUCTIONS.get(tile, 0))
    assert instructions < report["issue_budget"] / 2 or round(instructions, 1) <= exception


@pytest.mark.skipif(triton.__version__ != PINNED, reason="exact for the pinned version alone")
@pytest.mark.parametrize(("itemsize", "spare"), [(2, 0), (4, 1)])
def test_column_programs_of_a_backward_run_at_once(reports, itemsize, spare):
    """The rule's programs of a multiprocessor find registers, with room for `spare` more."""
    room = [
        machine_code.places(report["registers"], num_warps=4)
        for report in reports.values()
        if report["kind"] == "column" and report["kernel"]["op"] == "backward"
        if getattr(torch, report["kernel"]["dtype"]).itemsize == itemsize
        if report["kernel"]["target"] != "gfx942"
    ]
    assert min(room) == gpu_rules(1, itemsize, backward=True).column.programs + spare


@pytest.mark.parametrize(
    ("registers", "num_warps", "programs"),
    # A warp of 72 registers takes 9 blocks of 256, and a quarter of 16384 has room for 7 of them.
    [(72, 4, 7), (73, 4, 6), (64, 4, 8), (32, 4, 16), (16, 4, 16), (32, 1, 32), (255, 8, 1)],
)
def test_programs_that_a_multiprocessor_runs_at_once(registers, num_warps, programs):
    assert machine_code.places(registers, num_warps) == programs


def test_the_last_wave_of_a_known_launch():
    """An H100 runs 7 programs of 72 registers on each of 132 multiprocessors."""
    fill = machine_code.Fill((), programs=1044, places=7 * 132)
    assert (fill.waves, fill.last) == (2, 120 / 924)
    whole = machine_code.Fill((), programs=2 * 924, places=924)
    assert (whole.waves, whole.last) == (2, 1.0)


def test_the_programs_of_a_benchmarks_case():
    """Float32 (100000, 512): a program takes 512 columns of 8 rows, twice."""
    output = compiled(
        "from benchmarks.cases import MODELS\n"
        "(case,) = (case for case in MODELS if case.name == 'graph-infomax')\n"
        "for one in fills(case): print(one.setting[0], one.setting[-1], one.programs)"
    )
    forward, backward = output.splitlines()
    assert forward == "graph-infomax forward 6250"
    # Four blocks of 128 columns for 8 x 132 programs: 48 times 8 rows each.
    assert backward == "graph-infomax backward 1044"


@pytest.mark.skipif(triton.__version__ != PINNED, reason="exact for the pinned version alone")
@pytest.mark.parametrize(
    ("exceptions", "measure"), [(FEWER_LOADS, fewest_loads), (MORE_INSTRUCTIONS, most_instructions)]
)
def test_exceptions_are_exact(reports, exceptions, measure):
    measured = {}
    for tile, (_, case, *dtypes) in exceptions.items():
        report = reports[(tile[0], case, tile[2], *dtypes)]
        assert tile_of(report) == tile
        measured[tile] = (round(measure(report), 1), case, *dtypes)
    assert measured == exceptions


def test_the_pinned_version_is_the_one_that_make_installs():
    constraints = Path(__file__).parents[2] / "constraints.txt"
    assert f"triton=={PINNED}" in constraints.read_text().splitlines()


def test_loops_divide_by_nothing_that_is_unknown_until_run_time(report):
    assert report["divisions"] == []


TTGIR = """
  tt.func public @kernel(%n: i32) {
    %c8 = arith.constant 8 : i32
    %a = arith.divsi %n, %n : i32
    scf.for %i = %c8 to %n step %c8  : i32 {
      scf.if %b {
        %d = arith.remui %i, %n : i32
      } else {
        %e = arith.divsi %i, %c8 : i32
      }
      %f = arith.ceildivsi %i, %n : i32
    }
    %g = scf.while (%h = %n) : (i32) -> i32 {
      %j = arith.divui %h, %n : i32
    } do {
      %k = arith.remsi %h, %n : i32
    }
    %l = arith.remsi %n, %n : i32
  }
"""


def test_divisions_are_found_in_loops_only_and_not_by_constants():
    found = [f"arith.{name}" for name in ("remui", "ceildivsi", "divui", "remsi")]
    assert list(machine_code.loop_divisions(TTGIR)) == found


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


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_lets_a_compiler_take_x_and_y_for_different_memory(target):
    """In place they are one: a load from a cache of what nobody writes, or behind a store."""
    code = compiled(
        f"kernel = Kernel('{target}', 'flat', 'leaky-in-place', 'float32', 'float32')\n"
        "_, kernel = compile_launch(kernel)\n"
        "print(kernel.asm['llir'], kernel.asm.get('ptx', 'no PTX'))"
    )
    assert "plane_forward" in code
    assert not re.search(r"\bnoalias\b|invariant\.load|ld\.global\S*\.nc\b", code)
