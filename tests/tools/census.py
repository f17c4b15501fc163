"""A census of the kernels: all that public calls launch, compiled for GPUs that need not be there.

    python tests/tools/census.py                      every set of compile-time constants
    python tests/tools/census.py --each               each constant, dtype and absent tensor once
    python tests/tools/census.py --full               every set, alignment and special size
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
import contextlib
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
from calls import DENSE, ENTRANCES, PAIRS, SPECIAL, Memory, Tensors, call_all
from torch import Tensor
from triton.backends.nvidia.compiler import CUDABackend
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
    absent: tuple[str, ...]
    """Gaps of inputs that have none."""
    constants: tuple[tuple[str, Any], ...]
    num_warps: int

    @property
    def choices(self) -> frozenset[object]:
        """What decides the ways through compile-time branches."""
        there = {(place, dtype != "None") for place, dtype in enumerate(self.dtypes)}
        flags = {constant for constant in self.constants if type(constant[1]) is not int}
        return frozenset(there | flags | {*self.absent})

    @property
    def tile(self) -> frozenset[object]:
        """What decides the shapes of tiles."""
        return frozenset(constant for constant in self.constants if type(constant[1]) is int)

    def __str__(self) -> str:
        constants = " ".join(f"{name}={value}" for name, value in self.constants)
        dtypes = " ".join(self.dtypes)
        absent = f" without {' '.join(self.absent)}" if self.absent else ""
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
        tuple(name for name, value in given.items() if value is None and name.endswith("_gap")),
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


Place = tuple[str, int, str]
"""File, line, and what is there: a function, or a way that a branch may go."""


class Branches:
    """Functions and compile-time branches of kernels/, and where the compiler went."""

    def __init__(self) -> None:
        self.folder = Path(launch.__file__).parent / "kernels"
        self.taken: set[Place] = set()
        self.there: set[Place] = {
            (path.name, node.lineno, node.name)
            for path in self.folder.glob("*.py")
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef)
        }

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Notes what Triton visits of the kernels' code."""
        visit = CodeGenerator.visit
        # By function that is compiled: its nodes, kept so that their ids stay theirs, and what
        # they evaluate to.
        visited: dict[int, dict[int, tuple[ast.AST, Any]]] = {}

        def noting(generator: Any, node: Any) -> Any:
            if node is None or Path(generator.file_name).parent != self.folder:
                return visit(generator, node)
            if isinstance(node, ast.FunctionDef):
                visited[id(generator)] = {}
                self.taken.add(self._place(generator, node, node.name))
            nodes = visited.setdefault(id(generator), {})
            nodes[id(node)] = node, None  # before its children: a branch asks for its first one
            result = visit(generator, node)
            nodes[id(node)] = node, result
            if isinstance(node, (ast.If, ast.IfExp)):
                _, condition = nodes[id(node.test)]
                if not isinstance(condition, triton.language.tensor):
                    first = node.body[0] if isinstance(node, ast.If) else node.body
                    test = ast.unparse(node.test)
                    ways = [self._place(generator, node, way) for way in (test, f"not ({test})")]
                    self.there.update(ways)
                    self.taken.add(ways[id(first) not in nodes])
            if isinstance(node, ast.FunctionDef):
                del visited[id(generator)]
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CodeGenerator, "visit", noting)
            yield

    @staticmethod
    def _place(generator: Any, node: ast.stmt | ast.expr, what: str) -> Place:
        return Path(generator.file_name).name, generator.begin_line + node.lineno, what


class Detail(enum.Enum):
    """How many of the kernels are compiled."""

    EACH = "each"
    """Those that have a compile-time constant, a dtype or an absent tensor that no other had."""
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
    for offsets in itertools.product((0, 1), repeat=3) if full else [(0, 0, 0)]:
        in_turn = zip(*(Memory(pair, offsets).all(shapes) for pair in PAIRS), strict=True)
        yield from (given[turn % len(PAIRS)] for turn, given in enumerate(in_turn))
        if detail is not Detail.EACH:
            yield from Memory((torch.float64, torch.float64), offsets).all(shapes)


def take(gpu: str, detail: Detail, entrances: Collection[str]) -> list[str]:
    """Takes the census for a GPU and prints it; gives what is wrong."""
    census, branches = Census(detail), Branches()
    compile_for(GPUS[gpu].target)
    # A folder of its own keeps kernels without machine code from all other programs.
    with (
        branches.noted(),
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory() as folder,
    ):
        # ptxas takes longer than all else; test_machine_code.py runs it.
        patch.setattr(CUDABackend, "make_cubin", lambda *args, **options: b"")
        triton.knobs.cache.dir = folder
        reached = call_all(census.compile, gpu, memories(detail), entrances)
    for one in census.compiled:
        print(f"{gpu} {one}")
    print(f"{gpu}: {len(census.compiled)} kernels compiled, {len(branches.taken)} branches")
    return [
        *(f"{gpu}: {one} does not compile, called by {why}" for one, why in census.failed.items()),
        *(
            f"{gpu}: {file}:{line}: {what} is compiled nowhere"
            for file, line, what in sorted(branches.there - branches.taken)
        ),
        *(f"{gpu}: {entrance} reaches no kernel" for entrance in {*entrances} - reached),
    ]


def main() -> int:
    """The program; gives the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", nargs="+", choices=GPUS, default=["sm_90"])
    for detail in (Detail.EACH, Detail.FULL):
        parser.add_argument(
            f"--{detail.value}",
            dest="detail",
            action="store_const",
            const=detail,
            default=Detail.SETS,
        )
    parser.add_argument("--entrance", nargs="+", choices=ENTRANCES, default=[*ENTRANCES])
    options = parser.parse_args()
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 runs Python: unset it, and kernels are compiled")
    wrong = [one for gpu in options.target for one in take(gpu, options.detail, options.entrance)]
    print("\n".join(wrong), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
