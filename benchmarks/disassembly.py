"""Reads machine code of NVIDIA (SASS) and AMD (GCN)."""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import NamedTuple

import networkx
import triton
from triton.compiler import CompiledKernel


class Instruction(NamedTuple):
    """One machine instruction, of either vendor."""

    registers: frozenset[int]
    """Vector registers it names."""
    jump: str | None
    """Label it may jump to."""
    falls_through: bool
    """Whether the next instruction may follow it."""
    load_bits: int
    """Read from global memory."""
    store_bits: int
    """Written to global memory."""
    loaded: frozenset[int]
    """Those of the registers that a load fills."""


class MachineCode(NamedTuple):
    """A disassembled kernel."""

    registers: int
    """Of a lane."""
    spilled_bytes: int
    """Stack, or scratch memory, of a lane."""
    instructions: list[Instruction]
    labels: dict[str, int]
    """Index of the instruction after each label."""


def disassemble(kernel: CompiledKernel) -> MachineCode:
    """Reads a compiled kernel."""
    if "cubin" in kernel.asm:
        return _disassemble_nvidia(kernel.asm["cubin"])
    return _disassemble_amd(kernel.asm["amdgcn"])


def _disassemble_nvidia(cubin: bytes) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)

        def tool(name: str, option: str) -> str:
            command = [getattr(triton.knobs.nvidia, name).path, option, path]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        usage, assembly = tool("cuobjdump", "--dump-resource-usage"), tool("nvdisasm", "-c")
    code = r"\s+/\*\w+\*/\s+(@!?\w+)?\s*([A-Z][\w.]*)(.*);"
    return MachineCode(
        _number(r"REG:(\d+)", usage),
        _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
        *_read(assembly, r"(\.L\w+):", code, _nvidia_instruction),
    )


def _nvidia_instruction(predicate: str | None, opcode: str, operands: str) -> Instruction:
    name, *modifiers = opcode.split(".")
    widths = (re.fullmatch(r"[US]?(8|16|64|128|256)", modifier) for modifier in modifiers)
    bits = next((int(width[1]) for width in widths if width), 32)
    names = [(int(n), 2 if pair else 1) for n, pair in re.findall(r"\bR(\d+)(\.64)?", operands)]
    jump = re.match(r"(.*)`\((\.L\w+)\)", operands) if name == "BRA" else None
    always = predicate is None and (name == "EXIT" or (jump is not None and not jump[1].strip()))
    return Instruction(
        registers=frozenset(n + half for n, count in names for half in range(count)),
        jump=jump[2] if jump else None,
        falls_through=not always,
        load_bits=bits if name == "LDG" else 0,
        store_bits=bits if name == "STG" else 0,
        loaded=frozenset(names[0][0] + n for n in range(-(-bits // 32)) if name == "LDG"),
    )


def _disassemble_amd(assembly: str) -> MachineCode:
    body, _, _ = assembly.partition("\t.section")
    return MachineCode(
        _number(r"\.vgpr_count:\s+(\d+)", assembly),
        _number(r"\.private_segment_fixed_size:\s+(\d+)", assembly),
        *_read(body, r"(\.LBB\w+):", r"\s+([a-z]\w+)([^;]*)", _amd_instruction),
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


def _read(
    assembly: str, label: str, code: str, instruction: Callable[..., Instruction]
) -> tuple[list[Instruction], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if match := re.match(label, line):
            labels[match[1]] = len(instructions)
        elif match := re.match(code, line):
            instructions.append(instruction(*match.groups()))
    return instructions, labels


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern} in:\n{text[:2000]}")
    return int(match[1])


def innermost_loops(code: MachineCode) -> Iterator[list[Instruction]]:
    """Loop bodies that have no loop inside."""
    flow = networkx.DiGraph()
    for index, instruction in enumerate(code.instructions):
        if instruction.falls_through:
            flow.add_edge(index, index + 1)
        if instruction.jump is not None:
            flow.add_edge(index, code.labels[instruction.jump])

    def innermost(among: Set[int]) -> Iterator[Set[int]]:
        for body in networkx.strongly_connected_components(flow.subgraph(among)):
            if len(body) > 1:
                # What still goes round without the loop's entrance is a loop inside.
                entrances = {to for origin, to in flow.in_edges(body) if origin not in body}
                yield from list(innermost(body - entrances)) or [body]

    for body in innermost(flow.nodes):
        yield [code.instructions[index] for index in sorted(body)]
