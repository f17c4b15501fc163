"""Compiles the kernels for GPUs that need not be there, and reads their machine code.

    python -m benchmarks.machine_code                        a table, a case for each kind of tile
    python -m benchmarks.machine_code --json                 the same as JSON
    python -m benchmarks.machine_code --target sm_80 sm_100 --dtype float16 --weight-dtype float32

The launches are prelu_gpu's own, on tensors without memory (whose address, 0, is aligned), so the
plans and Triton's specialisation of every argument are those of a real call. What counts are the
hot loops: every innermost loop that stores, or that loads where nothing but the slope gradient is
wanted. Edges and epilogues lie outside them.

From a hot loop and the data sheet of a GPU follows a prediction, which no GPU has confirmed: the
kernel is as fast as a copy unless too few bytes are in flight to hide the latency of memory, or
the instructions of an element take longer to issue than its bytes to move.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import enum
import itertools
import json
import math
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from prelu_gpu import launch
from prelu_gpu.backend import INTERPRETED
from prelu_gpu.plan import Plan, Rules, gpu_rules


class GPU(NamedTuple):
    """A GPU as far as occupancy and the bounds of a loop are concerned."""

    name: str
    target: GPUTarget
    multiprocessors: int
    registers: int
    """Registers of a multiprocessor."""
    warps: int
    """Most warps on a multiprocessor."""
    shared_kib: int
    """Shared memory of a multiprocessor."""
    lanes: int
    """Lanes of a multiprocessor that an instruction is issued for in a cycle."""
    clock_ghz: float
    bandwidth_gbs: float
    """GB/s of memory."""
    latency_ns: float
    """From a load to its value while memory is busy."""

    @property
    def kib_to_cover(self) -> float:
        """KiB that a multiprocessor must have in flight to keep memory busy: Little's law."""
        return self.bandwidth_gbs / self.multiprocessors * self.latency_ns / 1024

    def issue_budget(self, moved_bytes: int) -> float:
        """Instructions of a lane that are issued in the time in which memory moves some bytes."""
        issued = self.multiprocessors * self.lanes * self.clock_ghz
        return issued / self.bandwidth_gbs * moved_bytes


# Counts and bandwidths are those of the vendors' data sheets. Clocks follow from the peak of dense
# float16 matrix products that they state: 312, 989, 2250 and 1307 TFLOPS. A scheduler issues for
# 32 lanes a cycle on NVIDIA, for a quarter of a wave of 64 on AMD, and a multiprocessor has four.
# Latencies are in no data sheet. NVIDIA's make the 16, 32 and 64 KiB in flight that CUB, NVIDIA's
# library, finds enough on these GPUs; AMD's is a guess in their range.
GPUS = {
    "sm_80": GPU(
        name="A100 80GB",
        target=GPUTarget("cuda", 80, 32),
        multiprocessors=108,
        registers=2**16,
        warps=64,
        shared_kib=164,
        lanes=128,
        clock_ghz=1.41,
        bandwidth_gbs=2039,
        latency_ns=868,
    ),
    "sm_90": GPU(
        name="H100 SXM",
        target=GPUTarget("cuda", 90, 32),
        multiprocessors=132,
        registers=2**16,
        warps=64,
        shared_kib=228,
        lanes=128,
        clock_ghz=1.83,
        bandwidth_gbs=3350,
        latency_ns=1291,
    ),
    "sm_100": GPU(
        name="B200",
        target=GPUTarget("cuda", 100, 32),
        multiprocessors=148,
        registers=2**16,
        warps=64,
        shared_kib=228,
        lanes=128,
        clock_ghz=1.86,
        bandwidth_gbs=8000,
        latency_ns=1212,
    ),
    "gfx942": GPU(
        name="MI300X",
        target=GPUTarget("hip", "gfx942", 64),
        multiprocessors=304,
        registers=2**17,
        warps=32,
        shared_kib=64,
        lanes=64,
        clock_ghz=2.1,
        bandwidth_gbs=5300,
        latency_ns=1000,
    ),
}

REGISTER_UNIT = 8
"""Registers are given to a warp's lanes in multiples of this, on NVIDIA and AMD."""


class Case(NamedTuple):
    """A tensor that brings about one kind of tile."""

    shape: tuple[int, ...]
    channel_dim: int | None = 1
    memory_format: torch.memory_format = torch.contiguous_format
    sliced: bool = False
    """Whether the input and the output's gradient are half of the channels of larger tensors."""


CASES = {
    "flat": Case((8, 512, 4000), channel_dim=None),
    "flat-prime": Case((16_777_213,), channel_dim=None),
    # A multiple of 8 but not of 16: what Triton itself notices of a size is of no help.
    "plane": Case((128, 64, 108, 110)),
    "column-7x7": Case((256, 512, 7, 7)),
    "column-channels-last": Case((16, 64, 96, 96), memory_format=torch.channels_last),
    "column-folded": Case((100_003, 90)),
    "odd-plane": Case((2, 65, 391, 391)),
    "sliced-plane": Case((16, 64, 108, 110), sliced=True),
    "sliced-flat": Case((16, 64, 108, 110), channel_dim=None, sliced=True),
    "sliced-column": Case((16, 64, 96, 96), memory_format=torch.channels_last, sliced=True),
}


NEGATIVE_SLOPE = 0.1
"""Of Leaky ReLU; not a number that Triton makes code of its own for."""

ONE_OF_EACH_KIND = ("flat", "plane", "column-7x7", "odd-plane")


class Op(enum.Enum):
    """What is computed."""

    FORWARD = "forward"
    BACKWARD = "backward"
    FROZEN = "frozen"
    """The backward of x alone."""
    SLOPE = "slope"
    """The backward of the slope alone."""
    LEAKY_FORWARD = "leaky-forward"
    """Leaky ReLU's, as the two below: one number is the slope of every channel."""
    LEAKY_IN_PLACE = "leaky-in-place"
    LEAKY_BACKWARD = "leaky-backward"

    @property
    def inputs(self) -> int:
        """Tensors of x's size that are read."""
        return 1 if self in (Op.FORWARD, Op.LEAKY_FORWARD, Op.LEAKY_IN_PLACE) else 2

    @property
    def passes(self) -> int:
        """Tensors of x's size that are read or written."""
        return self.inputs + (self is not Op.SLOPE)


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
    load_bits: tuple[int, ...]
    """Width of every load from global memory."""
    store_bits: tuple[int, ...]
    loads_in_flight: int
    """Loads that are issued before the first of their values is used."""

    @property
    def instructions_per_element(self) -> float:
        """The loop's issue cost."""
        return self.instructions / self.elements

    @property
    def bytes_in_flight(self) -> int:
        """Bytes requested before the first is used."""
        return sum(self.load_bits[: self.loads_in_flight]) // 8


@dataclasses.dataclass(frozen=True)
class Report:
    """The machine code of one kernel."""

    kernel: Kernel
    kind: str
    vector_bits: int
    """Width of an access to x, as planned."""
    tile_loads: int
    """Loads of a lane that read its part of a tile of all inputs, as planned."""
    num_warps: int
    registers: int
    spilled_bytes: int
    """Stack, or scratch memory, of a lane."""
    shared_bytes: int
    occupancy: float
    """Share of a multiprocessor's warps that the launch fills, and that there is room for."""
    divisions: tuple[str, ...]
    """Integer divisions in loops, by what is unknown until run time."""
    loops: tuple[Loop, ...]
    """The hot loops, the one with the most elements first."""
    issue_budget: float
    """Instructions per element that a lane has time for while memory moves an element's bytes."""

    @property
    def kib_in_flight(self) -> float:
        """KiB that a multiprocessor requests at once in the hot loop."""
        gpu = GPUS[self.kernel.target]
        lanes = self.occupancy * gpu.warps * int(gpu.target.warp_size)
        return lanes * self.loops[0].bytes_in_flight / 1024

    @property
    def shares(self) -> dict[str, float]:
        """What each bound allows, as a share of a copy's speed."""
        return {
            "memory": 1.0,
            "latency": self.kib_in_flight / GPUS[self.kernel.target].kib_to_cover,
            "issue": self.issue_budget / self.loops[0].instructions_per_element,
        }


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One machine instruction, of either vendor."""

    registers: frozenset[int]
    """Vector registers it names."""
    jump: str | None
    """Label it may jump to."""
    falls_through: bool
    """Whether the next instruction may follow it."""
    load_bits: int
    store_bits: int
    loaded: frozenset[int]
    """Those of the registers that a load fills."""


@dataclasses.dataclass(frozen=True)
class MachineCode:
    """A disassembled kernel."""

    registers: int
    spilled_bytes: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    """Index of the instruction after each label."""


class CompileOnly:
    """The driver of a GPU that is not there: what Triton asks it for before a launch."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self.target

    def get_current_device(self) -> GPUTarget:
        """The key under which Triton keeps compiled kernels."""
        return self.target

    def get_current_stream(self, device: GPUTarget) -> int:
        """No stream."""
        return 0


def compile_launch(kernel: Kernel) -> tuple[Plan, CompiledKernel]:
    """Compiles the kernel that a call of prelu_gpu would launch."""
    gpu, case, op = GPUS[kernel.target], CASES[kernel.case], Op(kernel.op)
    launches: list[tuple[Plan, CompiledKernel]] = []

    def rules(device: torch.device, itemsize: int, backward: bool) -> Rules:
        row = gpu_rules(gpu.multiprocessors, itemsize, backward, gpu.target.warp_size)
        # The loop that adds up partial sums loads and stores nothing, as the slope's own.
        return dataclasses.replace(row, finish=0) if op is Op.SLOPE else row

    def run(call: launch.Call, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        # The second stage of a reduction is no plan's launch.
        if isinstance(call.launch, Plan):
            compiled = call.kernel.warmup(
                *inputs,
                *outputs,
                *call.arguments,
                num_warps=call.launch.num_warps,
                grid=call.launch.grid,
            )
            launches.append((call.launch, compiled))

    shape = list(case.shape)
    shape[1:2] = [size * (2 if case.sliced else 1) for size in shape[1:2]]
    x = torch.empty(
        shape,
        dtype=getattr(torch, kernel.dtype),
        device="meta",
        memory_format=case.memory_format,
    )
    if case.sliced:
        x = x[:, : case.shape[1]]
    slopes = 1 if case.channel_dim is None else case.shape[case.channel_dim]
    weight = torch.empty(slopes, dtype=getattr(torch, kernel.weight_dtype), device="meta")
    triton.runtime.driver.set_active(CompileOnly(gpu.target))
    with mock.patch.multiple(launch, rules=rules, run=run):
        match op:
            case Op.FORWARD:
                launch.prelu_forward(x, weight, case.channel_dim)
            case Op.LEAKY_FORWARD:
                launch.leaky_relu_forward(x, NEGATIVE_SLOPE)
            case Op.LEAKY_IN_PLACE:
                launch.leaky_relu_forward_(x, NEGATIVE_SLOPE)
            case Op.LEAKY_BACKWARD:
                launch.leaky_relu_backward(x, x, NEGATIVE_SLOPE)
            case _:
                needs = op is not Op.SLOPE, op is not Op.FROZEN
                launch.prelu_backward(x, x, weight, case.channel_dim, needs)
    (only,) = launches
    return only


def disassemble(kernel: CompiledKernel) -> MachineCode:
    """Reads a compiled kernel."""
    if "cubin" in kernel.asm:
        return _disassemble_nvidia(kernel.asm["cubin"])
    return _disassemble_amd(kernel.asm["amdgcn"])


def _disassemble_nvidia(cubin: bytes) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)

        def tool(name: str, *options: str) -> str:
            program = getattr(triton.knobs.nvidia, name).path
            return subprocess.run(
                [program, *options, path], check=True, capture_output=True, text=True
            ).stdout

        usage = tool("cuobjdump", "--dump-resource-usage")
        assembly = tool("nvdisasm", "-c")

    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.match(r"\s+/\*\w+\*/\s+(@!?\w+)?\s*([A-Z][\w.]*)(.*);", line):
            instructions.append(_nvidia_instruction(*code.groups()))
    return MachineCode(
        registers=_number(r"REG:(\d+)", usage),
        spilled_bytes=_number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
        instructions=tuple(instructions),
        labels=labels,
    )


def _nvidia_instruction(predicate: str | None, opcode: str, operands: str) -> Instruction:
    name, *modifiers = opcode.split(".")
    bits = 32
    for modifier in modifiers:
        if width := re.fullmatch(r"[US]?(8|16|64|128|256)", modifier):
            bits = int(width[1])
    names = [(int(n), pair) for n, pair in re.findall(r"\bR(\d+)(\.64)?", operands)]
    loaded = range(names[0][0], names[0][0] + -(-bits // 32)) if name == "LDG" else ()
    jump = re.match(r"(.*)`\((\.L\w+)\)", operands) if name == "BRA" else None
    always = predicate is None and (name == "EXIT" or (jump is not None and not jump[1].strip()))
    return Instruction(
        registers=frozenset(n + half for n, pair in names for half in range(2 if pair else 1)),
        jump=jump[2] if jump else None,
        falls_through=not always,
        load_bits=bits if name == "LDG" else 0,
        store_bits=bits if name == "STG" else 0,
        loaded=frozenset(loaded),
    )


def _disassemble_amd(assembly: str) -> MachineCode:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    body, _, _ = assembly.partition("\t.section")
    for line in body.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.match(r"\s+([a-z]\w+)([^;]*)", line):
            instructions.append(_amd_instruction(code[1], code[2]))
    return MachineCode(
        registers=_number(r"\.vgpr_count:\s+(\d+)", assembly),
        spilled_bytes=_number(r"\.private_segment_fixed_size:\s+(\d+)", assembly),
        instructions=tuple(instructions),
        labels=labels,
    )


def _amd_instruction(opcode: str, operands: str) -> Instruction:
    access = re.fullmatch(r"(?:global|buffer|flat)_(load|store)_(\w+)", opcode)
    direction, kind = access.groups() if access else ("", "")
    scale = re.fullmatch(r"dwordx(\d)", kind)
    bits = 32 * int(scale[1]) if scale else 32 if kind == "dword" else 8 if "byte" in kind else 16
    names = [
        range(int(first or only), int(last or only) + 1)
        for only, first, last in re.findall(r"\bv(?:(\d+)\b|\[(\d+):(\d+)\])", operands)
    ]
    jump = re.search(r"\.LBB\w+", operands) if "branch" in opcode else None
    return Instruction(
        registers=frozenset(register for run in names for register in run),
        jump=jump[0] if jump else None,
        falls_through=opcode not in ("s_branch", "s_endpgm"),
        load_bits=bits if direction == "load" else 0,
        store_bits=bits if direction == "store" else 0,
        loaded=frozenset(names[0] if direction == "load" else ()),
    )


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern} in:\n{text[:2000]}")
    return int(match[1])


def innermost_loops(code: MachineCode) -> Iterator[tuple[Instruction, ...]]:
    """Loop bodies that have no loop inside."""
    before: dict[int, set[int]] = collections.defaultdict(set)
    for index, instruction in enumerate(code.instructions):
        if instruction.falls_through:
            before[index + 1].add(index)
        if instruction.jump is not None:
            before[code.labels[instruction.jump]].add(index)

    bodies = {}
    for start in set(code.labels.values()):
        # What runs from the start to a jump back to it. Where the walk arrives at the kernel's
        # first instruction, the blocks only lie in this order and make no loop.
        body = {start}
        waiting = [index for index in before[start] if index >= start]
        while waiting:
            index = waiting.pop()
            if index not in body:
                body.add(index)
                waiting.extend(before[index])
        if len(body) > 1 and 0 not in body:
            bodies[start] = body
    for start, body in bodies.items():
        if not any(inner in body for inner in bodies if inner != start):
            yield tuple(code.instructions[index] for index in sorted(body))


def loop_divisions(ttgir: str) -> Iterator[str]:
    """Integer divisions and remainders in loops, unless by a constant: those are shifts."""
    constants: set[str] = set()
    loops: list[int] = []
    for line in ttgir.splitlines():
        # A region ends at the indentation of the operation that it belongs to.
        indentation = len(line) - len(line.lstrip())
        if loops and indentation <= loops[-1] and line.strip().startswith("}"):
            # A `while` loop goes on with its second region.
            if not line.strip().startswith("} do {"):
                loops.pop()
        elif re.search(r"\bscf\.(for|while)\b", line):
            loops.append(indentation)
        if constant := re.match(r"\s*(%\w+) = arith\.constant\b", line):
            constants.add(constant[1])
        division = re.search(r"\b(arith\.(?:\w*div|rem)[su]i) %\S+, (%\w+)", line)
        if division and loops and division[2] not in constants:
            yield division[1]


def hot_loops(code: MachineCode, op: Op, itemsize: int) -> tuple[Loop, ...]:
    """The loops that walk over x, the one with the most elements first."""
    loops = []
    for body in innermost_loops(code):
        load_bits = tuple(step.load_bits for step in body if step.load_bits)
        store_bits = tuple(step.store_bits for step in body if step.store_bits)
        # Two tensors are loaded where only the slope gradient is wanted, and none is stored.
        bits = sum(load_bits) // 2 if op is Op.SLOPE else sum(store_bits)
        if bits:
            loops.append(
                Loop(
                    instructions=len(body),
                    elements=bits // (8 * itemsize),
                    load_bits=load_bits,
                    store_bits=store_bits,
                    loads_in_flight=_loads_in_flight(body),
                )
            )
    return tuple(sorted(loops, key=lambda loop: loop.elements, reverse=True))


def _loads_in_flight(body: Sequence[Instruction]) -> int:
    loads = 0
    loaded: set[int] = set()
    for instruction in body:
        if instruction.registers & loaded:
            break
        loads += instruction.load_bits > 0
        loaded |= instruction.loaded
    return loads


def report(kernel: Kernel) -> Report:
    """Compiles and reads one kernel."""
    gpu, op, itemsize = GPUS[kernel.target], Op(kernel.op), getattr(torch, kernel.dtype).itemsize
    plan, compiled = compile_launch(kernel)
    code = disassemble(compiled)
    constants = plan.constants
    tile = constants["BLOCK"] * constants.get("ROWS", 1) // constants["V"]
    return Report(
        kernel=kernel,
        kind=plan.kind.value,
        vector_bits=8 * itemsize * constants["V"],
        tile_loads=op.inputs * tile // (plan.num_warps * gpu.target.warp_size),
        num_warps=plan.num_warps,
        registers=code.registers,
        spilled_bytes=code.spilled_bytes,
        shared_bytes=compiled.metadata.shared,
        occupancy=_programs(gpu, plan, code, compiled.metadata.shared) * plan.num_warps / gpu.warps,
        divisions=tuple(loop_divisions(compiled.asm["ttgir"])),
        loops=hot_loops(code, op, itemsize),
        issue_budget=gpu.issue_budget(op.passes * itemsize),
    )


def _programs(gpu: GPU, plan: Plan, code: MachineCode, shared_bytes: int) -> int:
    """Programs that are on a multiprocessor at once."""
    lane_registers = -(-code.registers // REGISTER_UNIT) * REGISTER_UNIT
    warps = min(gpu.warps, gpu.registers // (lane_registers * gpu.target.warp_size))
    return min(
        warps // plan.num_warps,
        1024 * gpu.shared_kib // max(1, shared_bytes),
        -(-math.prod(plan.grid) // gpu.multiprocessors),
    )


def reports(kernels: Sequence[Kernel]) -> list[Report]:
    """Compiles and reads kernels, on all cores."""
    # A fork of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    workers = min(os.cpu_count() or 1, len(kernels))
    progress = Console(stderr=True)
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        results = pool.map(report, kernels, chunksize=4)
        return list(track(results, "compiling", len(kernels), console=progress, transient=True))


def table(reports: Sequence[Report]) -> Table:
    """A row per kernel."""
    result = Table(
        caption="Predicted from the machine code and data sheets, measured on no GPU: the speed "
        "as a share of a copy's, and what bounds it."
    )
    for column in ("GPU", "case", "op", "dtype", "slope"):
        result.add_column(column, no_wrap=True)
    for column in (
        "registers",
        "spilled B",
        "occupancy",
        "accesses",
        "loads before use",
        "KiB in flight / needed",
        "instructions an element / budget",
        "bound",
        "of a copy",
    ):
        result.add_column(column, justify="right")
    for one in reports:
        loop = one.loops[0]
        bound = min(one.shares, key=one.shares.__getitem__)
        result.add_row(
            f"{one.kernel.target} ({GPUS[one.kernel.target].name})",
            *one.kernel[1:],
            str(one.registers),
            str(one.spilled_bytes),
            f"{one.occupancy:.0%}",
            _widths((*loop.load_bits, *loop.store_bits)),
            f"{loop.loads_in_flight} of {len(loop.load_bits)}",
            f"{one.kib_in_flight:.0f} / {GPUS[one.kernel.target].kib_to_cover:.0f}",
            f"{loop.instructions_per_element:.1f} / {one.issue_budget:.0f}",
            bound,
            f"{one.shares[bound]:.0%}",
        )
    return result


def _widths(bits: Sequence[int]) -> str:
    counts = collections.Counter(bits)
    return " + ".join(f"{count} x {width}" for width, count in sorted(counts.items(), reverse=True))


def to_json(reports: Sequence[Report]) -> str:
    """The reports as JSON, with what each bound allows."""
    return json.dumps(
        [
            dataclasses.asdict(one) | {"kernel": one.kernel._asdict(), "shares": one.shares}
            for one in reports
        ],
        indent=1,
    )


class Options(argparse.Namespace):
    """The command line."""

    target: list[str]
    case: list[str]
    op: list[str]
    dtype: list[str]
    weight_dtype: str | None
    json: bool


def parse(arguments: Sequence[str] | None) -> Options:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.machine_code", description="The kernels' machine code."
    )
    dtypes = ("float64", "float32", "float16", "bfloat16")
    add = parser.add_argument
    add("--target", nargs="+", choices=GPUS, default=list(GPUS))
    add("--case", nargs="+", choices=CASES, default=ONE_OF_EACH_KIND)
    add("--op", nargs="+", choices=[op.value for op in Op], default=["forward", "backward"])
    add("--dtype", nargs="+", choices=dtypes, default=["float32", "bfloat16", "float16"])
    add("--weight-dtype", choices=dtypes, help="the slope's; by default that of x")
    add("--json", action="store_true", help="print JSON, not a table")
    if INTERPRETED:
        parser.error("interpreted kernels have no machine code: unset TRITON_INTERPRET")
    return parser.parse_args(arguments, Options())


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parse(arguments)
    choices = itertools.product(options.target, options.case, options.op, options.dtype)
    results = reports([Kernel(*choice, options.weight_dtype or choice[-1]) for choice in choices])
    if options.json:
        print(to_json(results))
    else:
        console = Console()
        # A table that is no terminal's is as wide as it needs to be.
        console.width = console.width if console.is_terminal else 200
        console.print(table(results))


if __name__ == "__main__":
    main()
