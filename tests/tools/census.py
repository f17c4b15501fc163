"""A census of the kernels: all that public calls launch, compiled for GPUs that need not be there.

    python tests/tools/census.py                      every set of compile-time constants
    python tests/tools/census.py --detail each        each constant, dtype and absent tensor once
    python tests/tools/census.py --detail full        every set, alignment and special size
    python tests/tools/census.py --target sm_80 gfx942  for other GPUs than sm_90
    python tests/tools/census.py --entrance leaky_relu  the calls of one public name

The calls are public ones, on tensors of every kind of memory (calls.py). Their kernels are compiled
by Triton's own JIT, and not launched. A line is printed for each kernel. The exit status is 1 if a
kernel does not compile, if a branch of kernels/ on a compile-time constant is never taken, or if an
entrance reaches no kernel. PYTHONPATH names the checkout.

Triton's interpreter cannot tell: it runs Python, and what runs there may not compile.
"""

import argparse
import ast
import enum
import itertools
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from calls import DENSE, ENTRANCES, PAIRS, SPECIAL, Tensors, call_all, tensors
from torch import Tensor
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import code_generator
from triton.compiler.code_generator import CodeGenerator
from triton.compiler.errors import CompilationError

from benchmarks.machine_code import GPUS, compile_call, compile_for
from prelu_gpu import launch
from prelu_gpu.backend import INTERPRETED
from prelu_gpu.run import Call, Values


class Variant(NamedTuple):
    """A kernel with all that Triton compiles it for, except alignments and special sizes."""

    kernel: str
    dtypes: tuple[str, ...]
    """Of its tensors, in order; "None" for one that is not there."""
    optional: tuple[tuple[str, bool], ...]
    """Sizes that may be None, as gaps of inputs that have none, and whether they are there."""
    constants: tuple[tuple[str, Any], ...]
    num_warps: int

    @property
    def choices(self) -> frozenset[object]:
        """What decides the ways through compile-time branches."""
        there = {(place, dtype != "None") for place, dtype in enumerate(self.dtypes)}
        flags = {constant for constant in self.constants if type(constant[1]) is not int}
        return frozenset(there | flags | {*self.optional})

    @property
    def tile(self) -> frozenset[object]:
        """What decides the shapes of tiles."""
        return frozenset(constant for constant in self.constants if type(constant[1]) is int)

    def __str__(self) -> str:
        constants = " ".join(f"{name}={value}" for name, value in self.constants)
        dtypes = " ".join(self.dtypes)
        absent = " ".join(name for name, there in self.optional if not there)
        absent = f" without {absent}" if absent else ""
        return f"{self.kernel} ({dtypes}){absent} {constants} num_warps={self.num_warps}"


def variant(call: Call, values: Values) -> Variant:
    """The variant of its kernel that a launch runs."""
    arguments = {**values, **call.arguments}
    given = {name: arguments[name] for name in call.kernel.arg_names}
    return Variant(
        call.kernel.__name__,
        tuple(
            str(getattr(value, "dtype", None)).removeprefix("torch.")
            for name, value in given.items()
            if name.endswith("_ptr")
        ),
        tuple(
            (name, value is not None)
            for name, value in given.items()
            if name.endswith(("_gap", "sample_vectors"))
        ),
        tuple((name, value) for name, value in given.items() if name.isupper()),
        call.launch.num_warps,
    )


def specialization(call: Call, values: Values) -> tuple[object, ...]:
    """What Triton makes code of its own for: alignments, sizes of 1 and those that 16 divides."""
    sizes = [value for value in call.launch.sizes.values() if value is not None]
    return (
        *(t.data_ptr() % 16 == 0 for t in values.values() if isinstance(t, Tensor)),
        *(1 if size == 1 else size % 16 == 0 for size in sizes),
    )


FOLDER = Path(launch.__file__).parent / "kernels"

Place = tuple[str, int, str]
"""File, line, and what is there: a function, or a way that a branch may go."""


def functions() -> set[Place]:
    """The functions of kernels/."""
    return {
        (path.name, node.lineno, node.name)
        for path in FOLDER.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }


class Watched(CodeGenerator):
    """Triton's compiler of one function. Notes functions of kernels/ and compile-time branches."""

    there: set[Place]
    """What the compiler should reach: both ways of each branch, and every function."""
    reached: set[Place]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.tests: dict[ast.AST, str] = {}

    def visit(self, node: Any) -> Any:
        """Compiles a node of the function's syntax tree."""
        if node is None or Path(self.file_name).parent != FOLDER:
            return super().visit(node)
        if isinstance(node, ast.FunctionDef):
            self.reached.add(self._place(node, node.name))
        elif isinstance(node, (ast.If, ast.IfExp)):
            self.tests[node.test] = ast.unparse(node.test)
        value = super().visit(node)
        # A tensor is known at run time only; anything else has chosen a way now.
        if node in self.tests and not isinstance(value, triton.language.tensor):
            ways = [self._place(node, prefix + self.tests[node]) for prefix in ("not ", "")]
            self.there.update(ways)
            self.reached.add(ways[bool(value)])
        return value

    def _place(self, node: ast.stmt | ast.expr, what: str) -> Place:
        return Path(self.file_name).name, self.begin_line + node.lineno, what


class Detail(enum.Enum):
    """How many of the kernels are compiled."""

    EACH = "each"
    """Those that have a compile-time constant, a dtype, or a tensor or size, there or absent, that
    no other had."""
    SETS = "sets"
    """Those that have a set of constants and absent tensors, or a tile, that no other had."""
    FULL = "full"
    """Those whose set has an alignment of its tensors, or a special size, that no other had."""


class Census:
    """What was compiled, and what does not compile."""

    def __init__(self, detail: Detail) -> None:
        self.detail = detail
        self.compiled: dict[Variant, None] = {}
        self.failed: dict[Variant, str] = {}
        self._seen: set[object] = set()

    def compile(self, entrance: str, call: Call, values: Values) -> None:
        """Compiles the kernel of a launch, if it is one to be compiled."""
        one = variant(call, values)
        kinds = {(one.kernel, frozenset(one.dtypes))}
        if self.detail is Detail.EACH:
            kinds |= {(one.kernel, choice) for choice in one.choices | one.tile}
            # Which tensors are not there together, too: a norm's launches differ in that, and sums.
            there = tuple(dtype != "None" for dtype in one.dtypes)
            kinds |= {(one.kernel, there, dict(one.constants).get("SUMS"))}
        else:
            kinds |= {(one.kernel, one.choices), (one.kernel, one.tile)}
        if self.detail is Detail.FULL:
            special = specialization(call, values)
            kinds |= {(one.kernel, one.choices, special)}
        if kinds <= self._seen:
            return
        self._seen |= kinds
        self.compiled[one] = None
        try:
            compile_call(call, values)
        except CompilationError as error:
            cause = str(error.__cause__ or error).strip().splitlines()[-1]
            self.failed[one] = f"{entrance}: {cause}"
        call.kernel.device_caches.clear()  # Triton's memory of it, which nobody asks again


def memories(detail: Detail) -> Iterator[Tensors]:
    """Tensors of every kind of memory. The dtypes take turns; where sets count, float64 has all."""
    full = detail is Detail.FULL
    shapes = (*DENSE, *SPECIAL) if full else DENSE
    for offsets in itertools.product((0, 1), repeat=3) if full else [(0, 0, 0), (1, 0, 1)]:
        in_turn = zip(*(tensors(pair, offsets, shapes) for pair in PAIRS), strict=True)
        yield from (given[turn % len(PAIRS)] for turn, given in enumerate(in_turn))
        if detail is not Detail.EACH:
            yield from tensors((torch.float64, torch.float64), offsets, shapes)


def take(gpu: str, detail: Detail, entrances: Collection[str]) -> list[str]:
    """Takes the census for a GPU and prints it; gives what is wrong."""
    census = Census(detail)
    Watched.there, Watched.reached = functions(), set()
    compile_for(GPUS[gpu].target)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(code_generator, "CodeGenerator", Watched)
        # ptxas takes longer than all else; test_machine_code.py runs it.
        patch.setattr(CUDABackend, "make_cubin", lambda *args, **options: b"")
        # A folder of its own keeps kernels without machine code from all other programs.
        patch.setattr(triton.knobs.cache, "dir", folder)
        launched = call_all(census.compile, gpu, memories(detail), entrances)
    for one in census.compiled:
        print(f"{gpu} {one}")
    print(f"{gpu}: {len(census.compiled)} kernels compiled, {len(Watched.reached)} places reached")
    return [
        *(f"{gpu}: {one} does not compile, called by {why}" for one, why in census.failed.items()),
        *(
            f"{gpu}: {file}:{line}: {what} is compiled nowhere"
            for file, line, what in sorted(Watched.there - Watched.reached)
        ),
        *(f"{gpu}: {entrance} reaches no kernel" for entrance in {*entrances} - launched),
    ]


def main() -> int:
    """The program; gives the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", nargs="+", choices=GPUS, default=["sm_90"])
    parser.add_argument("--detail", choices=[d.value for d in Detail], default="sets")
    parser.add_argument("--entrance", nargs="+", choices=ENTRANCES, default=[*ENTRANCES])
    options = parser.parse_args()
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 runs Python: unset it, and kernels are compiled")
    wrong = [
        one for gpu in options.target for one in take(gpu, Detail(options.detail), options.entrance)
    ]
    print("\n".join(wrong), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
