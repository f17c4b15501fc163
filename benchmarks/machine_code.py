"""Compiles the kernels for GPUs that need not be there, and reads their machine code.

    python -m benchmarks.machine_code                        a table
    python -m benchmarks.machine_code --json                 the same as JSON
    python -m benchmarks.machine_code --target sm_80 sm_100 --dtype float16 --weight-dtype float32

The launches are prelu_gpu's own, on tensors without memory (whose address, 0, is aligned), so the
plans and Triton's specialisation of every argument are those of a real call. What counts are the
hot loops: every innermost loop that stores, or that loads where nothing but the slope gradient is
wanted. Edges and epilogues lie outside them.
"""

import argparse
import collections
import dataclasses
import enum
import itertools
import json
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
from prelu_gpu.plan import Launch, Plan, Rules, gpu_rules


class GPU(NamedTuple):
    """A GPU as far as occupancy is concerned."""

    target: GPUTarget
    multiprocessors: int
    registers: int
    """Registers of a multiprocessor."""
    warps: int
    """Most warps on a multiprocessor."""


GPUS = {
    "sm_80": GPU(GPUTarget("cuda", 80, 32), 108, 2**16, 64),
    "sm_90": GPU(GPUTarget("cuda", 90, 32), 132, 2**16, 64),
    "sm_100": GPU(GPUTarget("cuda", 100, 32), 148, 2**16, 64),
    "gfx942": GPU(GPUTarget("hip", "gfx942", 64), 304, 2**17, 32),
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
    "flat-prime": Case((999_983,), channel_dim=None),
    # A multiple of 8 but not of 16: what Triton itself notices of a size is of no help.
    "plane": Case((128, 64, 108, 110)),
    "column-7x7": Case((128, 512, 7, 7)),
    "column-channels-last": Case((16, 64, 96, 96), memory_format=torch.channels_last),
    "column-folded": Case((100_003, 90)),
    "odd-plane": Case((2, 65, 391, 391)),
    "sliced-plane": Case((16, 64, 108, 110), sliced=True),
    "sliced-flat": Case((16, 64, 108, 110), channel_dim=None, sliced=True),
    "sliced-column": Case((16, 64, 96, 96), memory_format=torch.channels_last, sliced=True),
}


class Op(enum.Enum):
    """What is computed."""

    FORWARD = "forward"
    BACKWARD = "backward"
    FROZEN = "frozen"
    """The backward of x alone."""
    SLOPE = "slope"
    """The backward of the slope alone."""


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

    target: str
    case: str
    kind: str
    op: str
    dtype: str
    weight_dtype: str
    num_warps: int
    registers: int
    spilled_bytes: int
    """Stack, or scratch memory, of a lane."""
    shared_bytes: int
    occupancy: float
    """Share of a multiprocessor's warps that the registers have room for."""
    loops: tuple[Loop, ...]
    """The hot loops, the one with the most elements first."""

    def kib_in_flight(self, loop: Loop) -> float:
        """KiB that a full multiprocessor requests at once in a hot loop."""
        gpu = GPUS[self.target]
        lanes = self.occupancy * gpu.warps * int(gpu.target.warp_size)
        return lanes * loop.bytes_in_flight / 1024


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


def compile_launch(
    gpu: GPU, case: Case, op: Op, dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[Plan, CompiledKernel]:
    """Compiles the kernel that a call of prelu_gpu would launch."""
    launches: list[tuple[Plan, CompiledKernel]] = []

    def rules(device: torch.device, itemsize: int, backward: bool) -> Rules:
        row = gpu_rules(gpu.multiprocessors, itemsize, backward, gpu.target.warp_size)
        # The loop that adds up partial sums loads and stores nothing, as the slope's own.
        return dataclasses.replace(row, finish=0) if op is Op.SLOPE else row

    def run(
        kernel: Any, plan: Launch, inputs: Sequence[Any], outputs: Sequence[Any], **constants: Any
    ) -> None:
        # The second stage of a reduction is no plan's launch.
        if isinstance(plan, Plan):
            compiled = kernel.warmup(
                *inputs,
                *outputs,
                **plan.sizes,
                **plan.constants,
                **constants,
                num_warps=plan.num_warps,
                grid=plan.grid,
            )
            launches.append((plan, compiled))

    shape = list(case.shape)
    shape[1:2] = [size * (2 if case.sliced else 1) for size in shape[1:2]]
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=case.memory_format)
    if case.sliced:
        x = x[:, : case.shape[1]]
    slopes = 1 if case.channel_dim is None else case.shape[case.channel_dim]
    weight = torch.empty(slopes, dtype=weight_dtype, device="meta")
    triton.runtime.driver.set_active(CompileOnly(gpu.target))
    with mock.patch.multiple(launch, rules=rules, run=run):
        if op is Op.FORWARD:
            launch.prelu_forward(x, weight, case.channel_dim)
        else:
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


def hot_loops(code: MachineCode, op: Op, dtype: torch.dtype) -> tuple[Loop, ...]:
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
                    elements=bits // (8 * dtype.itemsize),
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


def report(target: str, case: str, op: Op, dtype: torch.dtype, weight_dtype: torch.dtype) -> Report:
    """Compiles and reads one kernel."""
    gpu = GPUS[target]
    plan, kernel = compile_launch(gpu, CASES[case], op, dtype, weight_dtype)
    code = disassemble(kernel)
    lane_registers = -(-code.registers // REGISTER_UNIT) * REGISTER_UNIT
    warps = min(gpu.warps, gpu.registers // (lane_registers * gpu.target.warp_size))
    return Report(
        target=target,
        case=case,
        kind=plan.kind.value,
        op=op.value,
        dtype=_name(dtype),
        weight_dtype=_name(weight_dtype),
        num_warps=plan.num_warps,
        registers=code.registers,
        spilled_bytes=code.spilled_bytes,
        shared_bytes=kernel.metadata.shared,
        occupancy=warps // plan.num_warps * plan.num_warps / gpu.warps,
        loops=hot_loops(code, op, dtype),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table(reports: Sequence[Report]) -> Table:
    """A row per hot loop."""
    result = Table()
    for column in ("target", "case", "tile", "op", "dtype", "slope"):
        result.add_column(column)
    for column in (
        "warps",
        "regs",
        "spilled B",
        "shared B",
        "occupancy",
        "load bits",
        "store bits",
        "loads before use",
        "KiB in flight",
        "elements",
        "instr/element",
    ):
        result.add_column(column, justify="right")
    for one in reports:
        for loop in one.loops:
            result.add_row(
                one.target,
                one.case,
                one.kind,
                one.op,
                one.dtype,
                one.weight_dtype,
                str(one.num_warps),
                str(one.registers),
                str(one.spilled_bytes),
                str(one.shared_bytes),
                f"{one.occupancy:.0%}",
                _widths(loop.load_bits),
                _widths(loop.store_bits),
                f"{loop.loads_in_flight} of {len(loop.load_bits)}",
                f"{one.kib_in_flight(loop):.0f}",
                str(loop.elements),
                f"{loop.instructions_per_element:.1f}",
            )
    return result


def _widths(bits: Sequence[int]) -> str:
    counts = collections.Counter(bits)
    return " + ".join(f"{count} x {width}" for width, count in sorted(counts.items(), reverse=True))


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
    add("--target", nargs="+", choices=GPUS, default=["sm_90", "gfx942"])
    add("--case", nargs="+", choices=CASES, default=list(CASES))
    add("--op", nargs="+", choices=[op.value for op in Op], default=["forward", "backward"])
    add("--dtype", nargs="+", choices=dtypes, default=["float32", "bfloat16"])
    add("--weight-dtype", choices=dtypes, help="the slope's; by default that of x")
    add("--json", action="store_true", help="print JSON, not a table")
    if INTERPRETED:
        parser.error("interpreted kernels have no machine code: unset TRITON_INTERPRET")
    return parser.parse_args(arguments, Options())


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parse(arguments)
    choices = list(itertools.product(options.target, options.case, options.op, options.dtype))
    progress = Console(stderr=True)
    reports = [
        report(
            target,
            case,
            Op(op),
            getattr(torch, dtype),
            getattr(torch, options.weight_dtype or dtype),
        )
        for target, case, op, dtype in track(choices, "compiling", console=progress, transient=True)
    ]
    if options.json:
        print(json.dumps([dataclasses.asdict(one) for one in reports], indent=1))
    else:
        console = Console()
        # A table that is no terminal's is as wide as it needs to be.
        console.width = console.width if console.is_terminal else 180
        console.print(table(reports))


if __name__ == "__main__":
    main()
