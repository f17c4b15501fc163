"""Compiles the kernels for GPUs that need not be there, and reads their machine code.

The launches are prelu_gpu's own, on tensors without memory (whose address, 0, is aligned), so the
plans and Triton's specialisation of every argument are those of a real call. What counts are the
hot loops: every innermost loop that stores, or that loads if only the slope gradient is wanted.
Edges and epilogues lie outside them.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import math
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Annotated, NamedTuple, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from benchmarks.cases import CASES as BENCHMARK_CASES
from benchmarks.cases import Case as BenchmarkCase
from benchmarks.disassembly import Instruction, disassemble, innermost_loops
from benchmarks.program import choice, fail, make_table, open_console
from prelu_gpu import launch, launch_norm
from prelu_gpu.backend import INTERPRETED
from prelu_gpu.layout import Norm
from prelu_gpu.plan import Plan
from prelu_gpu.rules import Rules, gpu_rules, using_rules
from prelu_gpu.run import Call, Values, intercepting

_One, _Result = TypeVar("_One"), TypeVar("_Result")


class GPU(NamedTuple):
    """A GPU as far as the kernels' code is concerned."""

    name: str
    target: GPUTarget
    multiprocessors: int
    instructions_per_byte: float
    """What a lane issues in the time in which memory moves a byte, for all lanes of the GPU."""


# Multiprocessors x lanes that issue in a cycle x GHz / GB/s. Counts and bandwidths are those of the
# vendors' data sheets. Clocks follow from the peak of dense float16 matrix products there: 312,
# 989, 2250 and 1307 TFLOPS. A multiprocessor has four schedulers: on NVIDIA each issues for 32
# lanes a cycle, on AMD for a quarter of a wave of 64.
GPUS = {
    "sm_80": GPU("A100 80GB", GPUTarget("cuda", 80, 32), 108, 108 * 128 * 1.41 / 2039),
    "sm_90": GPU("H100 SXM", GPUTarget("cuda", 90, 32), 132, 132 * 128 * 1.83 / 3350),
    "sm_100": GPU("B200", GPUTarget("cuda", 100, 32), 148, 148 * 128 * 1.86 / 8000),
    "gfx942": GPU("MI300X", GPUTarget("hip", "gfx942", 64), 304, 304 * 64 * 2.1 / 5300),
}


class Case(NamedTuple):
    """A tensor that brings about one kind of tile."""

    shape: tuple[int, ...]
    channel_dim: int | None = 1
    memory_format: torch.memory_format = torch.contiguous_format
    sliced: bool = False
    """Whether the input and the output's gradient are half of the channels of larger tensors."""
    offset: bool = False
    """Whether their memory begins one element off the 16-byte grid."""


CASES = {
    "flat": Case((8, 512, 4000), channel_dim=None),
    "flat-prime": Case((16_777_213,), channel_dim=None),
    # A multiple of 8 but not of 16: what Triton itself notices of a size does not help.
    "plane": Case((128, 64, 108, 110)),
    "column-7x7": Case((256, 512, 7, 7)),
    "column-channels-last": Case((16, 64, 96, 96), memory_format=torch.channels_last),
    "column-folded": Case((100_003, 90)),
    "odd-plane": Case((2, 65, 391, 391)),
    "sliced-plane": Case((16, 64, 108, 110), sliced=True),
    "sliced-flat": Case((16, 64, 108, 110), channel_dim=None, sliced=True),
    "sliced-column": Case((16, 64, 96, 96), memory_format=torch.channels_last, sliced=True),
    # Nothing lies alike in its tensors but single elements.
    "sliced-odd": Case((64, 3, 225, 225), sliced=True),
    "offset-flat": Case((16_777_216,), channel_dim=None, offset=True),
    "offset-plane": Case((128, 64, 108, 110), offset=True),
    "offset-column": Case((256, 512, 7, 7), offset=True),
}
ONE_OF_EACH_KIND = ["flat", "plane", "column-7x7", "odd-plane"]


class Op(NamedTuple):
    """What is computed."""

    reads: int
    """Tensors of x's size."""
    writes: int
    call: Callable[[Tensor, Tensor, int | None], object]
    """Of x, the slopes and their dimension."""
    place: int = 0
    """Which of the call's launches over x it is."""


NEGATIVE_SLOPE = 0.1
"""Of Leaky ReLU; not a number that Triton makes code of its own for."""


def _backward(reads: int, writes: int, *needs: bool) -> Op:
    return Op(reads, writes, lambda x, weight, dim: launch.prelu_backward(x, x, weight, dim, needs))


def _norm_forward(x: Tensor, slope: Tensor, dim: int | None) -> Tensor:
    """Of a batch norm in training, which makes its table, too."""
    row = torch.empty(x.shape[1], device="meta")
    norm = Norm(training=True, instances=False, eps=1e-5)
    _, table = launch_norm.norm_prelu_forward(x, slope, row, row, row, row, norm, 0.1, x.dtype)
    return table


def _norm_backward(training: bool) -> Callable[[Tensor, Tensor, int | None], object]:
    def call(x: Tensor, slope: Tensor, dim: int | None) -> object:
        row = torch.empty(x.shape[1], device="meta")
        table = torch.empty(5, x.shape[1], device="meta")
        norm = Norm(training=training, instances=False, eps=1e-5)
        needs = (True, True, True, True)
        return launch_norm.norm_prelu_backward(x, x, table, slope, row, row, norm, needs)

    return call


OPS = {
    "forward": Op(1, 1, launch.prelu_forward),
    "backward": _backward(2, 1, True, True),
    # Of x alone, or of the slope alone.
    "frozen": _backward(2, 1, True, False),
    "slope": _backward(2, 0, False, True),
    "leaky-forward": Op(1, 1, lambda x, *_: launch.leaky_relu_forward(x, NEGATIVE_SLOPE)),
    "leaky-in-place": Op(1, 1, lambda x, *_: launch.leaky_relu_forward_(x, NEGATIVE_SLOPE)),
    "leaky-backward": Op(2, 1, lambda x, *_: launch.leaky_relu_backward(x, x, NEGATIVE_SLOPE)),
    # A norm with PReLU: in training two launches each way, frozen one backward.
    "norm-moments": Op(1, 0, _norm_forward),
    "norm-forward": Op(1, 1, _norm_forward, place=1),
    "norm-sums": Op(2, 0, _norm_backward(training=True)),
    "norm-gradient": Op(2, 1, _norm_backward(training=True), place=1),
    "norm-frozen": Op(2, 1, _norm_backward(training=False)),
}


class Kernel(NamedTuple):
    """What is compiled, in the words of the command line."""

    target: str
    case: str
    op: str
    dtype: str
    weight_dtype: str


@dataclasses.dataclass(frozen=True)
class Loop:
    """One hot loop, per lane and iteration."""

    instructions: int
    elements: int
    """Elements of x."""
    load_bits: list[int]
    """Width of every load from global memory."""
    store_bits: list[int]
    loads_in_flight: int
    """Loads that are issued before the first of their values is used."""


@dataclasses.dataclass(frozen=True)
class Report:
    """The machine code of one kernel."""

    kernel: Kernel
    kind: str
    vector_bits: int
    """Width of an access to x, as planned."""
    tile_loads: int
    """Loads of a lane that read its part of a tile of all inputs, as planned."""
    registers: int
    spilled_bytes: int
    """Stack, or scratch memory, of a lane."""
    divisions: list[str]
    """Integer divisions in loops, by what is unknown until run time."""
    loops: list[Loop]
    """The hot loops, the one with the most elements first."""
    issue_budget: float
    """Instructions per element that a lane has time for while memory moves an element's bytes."""


def compile_for(target: GPUTarget) -> None:
    """Makes Triton compile for a GPU that need not be there: all it asks a driver before a launch.

    Compiled kernels are kept for the target in place of a device.
    """
    asked = {"get_current_target": lambda: target, "get_current_device": lambda: target}
    driver.set_active(SimpleNamespace(**asked, get_current_stream=lambda device: 0))


def compile_call(call: Call, values: Values) -> CompiledKernel:
    """Compiles the kernel of a launch, and does not launch it."""
    options = {"num_warps": call.launch.num_warps, "grid": call.launch.grid}
    return call.kernel.warmup(**values, **call.arguments, **options)


def compile_plan(
    gpu: GPU,
    call: Callable[[], object],
    changed: Callable[[Rules], Rules] = lambda row: row,
    place: int = 0,
) -> tuple[Plan, CompiledKernel]:
    """Compiles the kernel that a call of prelu_gpu would launch, by the GPU's rules or others.

    `place` is the launch's among those of the call over x.
    """
    seen: list[Call] = []
    launches: list[tuple[Plan, CompiledKernel]] = []

    def table(device: torch.device, itemsize: int, backward: bool) -> Rules:
        return changed(gpu_rules(gpu.multiprocessors, itemsize, backward, gpu.target.warp_size))

    def compile_only(call: Call, values: Values) -> None:
        # The second stage of a reduction is no plan's launch.
        if isinstance(call.launch, Plan):
            seen.append(call)
            if len(seen) == place + 1:
                launches.append((call.launch, compile_call(call, values)))

    compile_for(gpu.target)
    with using_rules(table), intercepting(compile_only):
        call()
    (only,) = launches
    return only


def compile_launch(kernel: Kernel) -> tuple[Plan, CompiledKernel]:
    """Compiles the kernel of one report."""
    case, op = CASES[kernel.case], OPS[kernel.op]
    shape = list(case.shape)
    if case.sliced:
        shape[1] *= 2
    dtype, weight_dtype = (getattr(torch, name) for name in (kernel.dtype, kernel.weight_dtype))
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=case.memory_format)
    x = x[:, : case.shape[1]] if case.sliced else x
    if case.offset:
        x = torch.empty(x.numel() + 1, dtype=dtype, device="meta")[1:].view(case.shape)
    slopes = 1 if case.channel_dim is None else case.shape[case.channel_dim]
    weight = torch.empty(slopes, dtype=weight_dtype, device="meta")
    return compile_plan(
        GPUS[kernel.target],
        lambda: op.call(x, weight, case.channel_dim),
        # The loop that adds up partial sums loads and stores nothing, as the slope's own.
        lambda row: row if op.writes else row._replace(finish=0),
        op.place,
    )


def places(registers: int, num_warps: int) -> int:
    """Programs that a multiprocessor of sm_80, sm_90 or sm_100 runs at once.

    Each quarter of it has 16384 registers, which warps take in blocks of 256, and 16 warps. There
    are 32 programs at most. These kernels' shared memory, 2 KiB or less, allows more.
    """
    blocks = -(-32 * registers // 256)
    warps = 4 * min(16, 16384 // (256 * blocks))
    return min(32, warps // num_warps)


@dataclasses.dataclass(frozen=True)
class Fill:
    """How the programs of a launch fill a GPU."""

    setting: tuple[str, ...]
    """Of the benchmarks' case, and the operation."""
    programs: int
    places: int
    """Programs that run at once, on all multiprocessors."""

    @property
    def waves(self) -> int:
        """Rounds in which programs of one length would run."""
        return -(-self.programs // self.places)

    @property
    def last(self) -> float:
        """Share of the places that the last wave takes."""
        return (self.programs - (self.waves - 1) * self.places) / self.places


def fills(case: BenchmarkCase) -> list[Fill]:
    """How the forward and the backward of a benchmarks' case fill an H100."""
    x, weight, grad_y = case.inputs(torch.device("meta"))
    dim = case.channel_dim
    if case.slope == "number":
        calls = {
            "forward": lambda: launch.leaky_relu_forward(x, NEGATIVE_SLOPE),
            "backward": lambda: launch.leaky_relu_backward(grad_y, x, NEGATIVE_SLOPE),
        }
    else:
        calls = {
            "forward": lambda: launch.prelu_forward(x, weight, dim),
            "backward": lambda: launch.prelu_backward(grad_y, x, weight, dim, (True, True)),
        }
    found = []
    for op, call in calls.items():
        plan, compiled = compile_plan(GPUS["sm_90"], call)
        names = ("case", "shape", "layout", "slope", "dtype", "slope_dtype")
        at_once = places(disassemble(compiled).registers, plan.num_warps)
        found.append(
            Fill(
                (*(case.setting[name] for name in names), op),
                math.prod(plan.grid),
                at_once * GPUS["sm_90"].multiprocessors,
            )
        )
    return found


def loop_divisions(ttgir: str) -> Iterator[str]:
    """Integer divisions and remainders in loops, except by constants: those become shifts."""
    constants = set(re.findall(r"(%\w+) = arith\.constant\b", ttgir))
    loops: list[int] = []  # the indentations of those around a line
    for line in ttgir.splitlines():
        indentation = len(line) - len(line.lstrip())
        # A `while` loop has two regions.
        if not line.lstrip().startswith("} do {"):
            loops = [loop for loop in loops if loop < indentation]
        division = re.search(r"\b(arith\.(?:\w*div|rem)[su]i) %\S+, (%\w+)", line)
        if division and loops and division[2] not in constants:
            yield division[1]
        if re.search(r"\bscf\.(for|while)\b", line):
            loops.append(indentation)


def hot_loop(body: Sequence[Instruction], op: Op, itemsize: int) -> Loop:
    """An innermost loop; without elements if it does not walk over x."""
    load_bits = [step.load_bits for step in body if step.load_bits]
    store_bits = [step.store_bits for step in body if step.store_bits]
    bits = sum(store_bits) // op.writes if op.writes else sum(load_bits) // op.reads
    in_flight, loaded = 0, set[int]()
    for step in body:
        if step.registers & loaded:
            break
        in_flight += step.load_bits > 0
        loaded |= step.loaded
    return Loop(len(body), bits // (8 * itemsize), load_bits, store_bits, in_flight)


def report(kernel: Kernel) -> Report:
    """Compiles and reads one kernel."""
    gpu, op, itemsize = GPUS[kernel.target], OPS[kernel.op], getattr(torch, kernel.dtype).itemsize
    plan, compiled = compile_launch(kernel)
    code = disassemble(compiled)
    vector = plan.constants["V"]
    tile = plan.constants["BLOCK"] * plan.constants.get("ROWS", 1) // vector
    loops = (hot_loop(body, op, itemsize) for body in innermost_loops(code))
    return Report(
        kernel=kernel,
        kind=plan.kind.value,
        vector_bits=8 * itemsize * vector,
        tile_loads=op.reads * tile // (plan.num_warps * gpu.target.warp_size),
        registers=code.registers,
        spilled_bytes=code.spilled_bytes,
        divisions=list(loop_divisions(compiled.asm["ttgir"])),
        loops=sorted(filter(lambda loop: loop.elements, loops), key=lambda loop: -loop.elements),
        issue_budget=gpu.instructions_per_byte * (op.reads + op.writes) * itemsize,
    )


def on_all_cores(function: Callable[[_One], _Result], ones: Sequence[_One]) -> list[_Result]:
    """The function's results, each compiled in a process of several."""
    # A fork of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context) as pool:
        results = pool.map(function, ones, chunksize=4)
        console = Console(stderr=True)
        return list(track(results, "compiling", len(ones), console=console, transient=True))


def reports(kernels: Sequence[Kernel]) -> list[Report]:
    """Compiles and reads kernels, on all cores."""
    return on_all_cores(report, kernels)


def to_fill_table(fills: Iterable[Fill]) -> Table:
    """A row per launch of the benchmarks' cases."""
    table = make_table(
        ["case", "shape", "layout", "slope", "dtype", "slope dtype", "op"],
        ["programs", "places", "waves", "last wave"],
        caption="Places: programs that an H100 runs at once, by the registers of the kernel; last "
        "wave: the share of the places that it takes",
    )
    for one in fills:
        numbers = f"{one.programs}", f"{one.places}", f"{one.waves}", f"{one.last:.0%}"
        table.add_row(*one.setting, *numbers)
    return table


def to_table(reports: Sequence[Report]) -> Table:
    """A row per kernel, of its first hot loop."""
    table = make_table(
        ["GPU", "case", "op", "dtype", "slope"],
        ["registers", "spilled B", "accesses", "loads before use", "instructions / budget"],
        caption="Of a lane in the hot loop: accesses by bits, loads before the first is used, "
        "instructions an element beside those that issue while memory moves it",
    )
    for one in reports:
        loop = one.loops[0]
        widths = collections.Counter((*loop.load_bits, *loop.store_bits))
        table.add_row(
            f"{one.kernel.target} ({GPUS[one.kernel.target].name})",
            *one.kernel[1:],
            str(one.registers),
            str(one.spilled_bytes),
            " + ".join(f"{count} x {width}" for width, count in sorted(widths.items())),
            f"{loop.loads_in_flight} of {len(loop.load_bits)}",
            f"{loop.instructions / loop.elements:.1f} / {one.issue_budget:.0f}",
        )
    return table


TARGETS, OPERATIONS = [*GPUS], ["forward", "backward"]
DTYPES = ["float32", "bfloat16", "float16", "float64"]
WAVES_HELP = (
    "How launches of the benchmarks' cases without a norm fill an H100, instead of all else."
)


def main(
    target: Annotated[list[str], choice(GPUS, "A GPU.")] = TARGETS,
    case: Annotated[list[str], choice(CASES, "A tensor.")] = ONE_OF_EACH_KIND,
    op: Annotated[list[str], choice(OPS, "An operation.")] = OPERATIONS,
    dtype: Annotated[list[str], choice(DTYPES, "The dtype of x.")] = DTYPES[:3],
    weight_dtype: Annotated[
        list[str] | None, choice(DTYPES, "The dtype of the slopes; by default that of x.")
    ] = None,
    waves: Annotated[bool, typer.Option("--waves", help=WAVES_HELP)] = False,
) -> None:
    """Tells what the kernels compile to for GPUs that need not be here.

    Registers, spills, the width of memory accesses, loads that are issued before the first is
    used, and instructions beside the time of memory. Nothing is run or measured.
    """
    if INTERPRETED:
        fail("interpreted kernels have no machine code; unset TRITON_INTERPRET.")
    if waves:
        each = on_all_cores(fills, [case for case in BENCHMARK_CASES if not case.norm])
        open_console(170).print(to_fill_table(itertools.chain.from_iterable(each)))
        return
    kernels = [
        Kernel(*chosen, slopes)
        for chosen in itertools.product(target, case, op, dtype)
        for slopes in weight_dtype or [chosen[-1]]
    ]
    open_console().print(to_table(reports(kernels)))
