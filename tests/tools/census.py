"""A census of the kernels: all that public calls launch, compiled for GPUs that need not be there.

    python tests/tools/census.py                      every set of compile-time constants
    python tests/tools/census.py --each               each constant, dtype and absent tensor once
    python tests/tools/census.py --full               every set, alignment and special size
    python tests/tools/census.py --target sm_80 gfx942  for other GPUs than sm_90
    python tests/tools/census.py --entrance leaky_relu  the calls of one public name

The calls are public ones, on tensors of every kind of memory. They go through Triton's own JIT to a
driver that compiles and launches nothing, so the tensors are on the CPU and hold no values. A line
is printed for each kernel. The exit status is 1 where a kernel does not compile, where a branch of
kernels/ on a compile-time constant is never taken, or where an entrance reaches no kernel.
PYTHONPATH names the checkout.

Triton's interpreter cannot tell: it runs Python, and what runs there may not compile.
"""

import argparse
import ast
import contextlib
import dataclasses
import enum
import functools
import itertools
import math
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor, nn
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.code_generator import CodeGenerator
from triton.compiler.errors import CompilationError

import prelu_gpu
from benchmarks.machine_code import GPUS, CompileOnly
from prelu_gpu import backend, functional, launch, leaky_relu, prelu
from prelu_gpu.plan import Rules, gpu_rules

PAIRS = (
    *((dtype, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
)
"""Dtypes of x and of the slopes."""

NEEDS = ((True, True), (True, False), (False, True))
"""Whether x and the slopes require grad."""

RULES: tuple[Callable[[Rules], Rules], ...] = (
    lambda row: row,
    # The slope gradient by a second launch, and by atomic sums; both is a rule's choice.
    lambda row: dataclasses.replace(row, finish=0),
    lambda row: dataclasses.replace(row, atomic=True),
    # As `benchmarks tune` may propose.
    lambda row: dataclasses.replace(row, column=dataclasses.replace(row.column, rows=1)),
)
"""The rule table's row, and what else may stand there."""

DENSE = (
    *((1,), (7,), (4096,), (5003,), (1, 1, 1), (64, 1, 5)),
    # Planes of one sample, of few tiles and of many, and off the vector grid.
    *((1, 16, 4096), (2, 3, 8192), (3, 2, 17408), (2, 3, 40001)),
    # Columns, few and many, with whole rows after folding and without.
    *((301, 90), (1, 512), (16, 4096), (40, 3), (4099, 16), (20, 512, 7, 7), (3, 5, 7, 7)),
)
SPECIAL = tuple(itertools.product((1, 3, 16), (1, 3, 16), (1, 3, 16, 8192, 8200, 40001)))
"""Sizes of 1, that 16 divides, and that it does not, in every place."""

CHANNELS_LAST = ((4, 64, 14, 14), (4, 3, 37, 37), (2, 90, 5, 5))
SLICED = (
    *((6, 16, 64, 64), (6, 16, 50, 43), (6, 16, 5, 7), (40, 6, 40003), (4, 6, 40001)),
    *((300, 128), (300, 90), (9, 3000)),
)
"""Shapes of which half of the channels is taken."""

CUT = (
    *(((40, 704), 513), ((6, 1, 7), 3), ((9, 3, 40016), 40001)),
    # Gaps of one vector, and columns of one.
    *(((4, 16, 8196), 8192), ((4, 16, 8200), 8192), ((4, 16, 8194), 8192), ((5, 18), 2)),
)
"""Shapes and what is kept of the last dimension."""


class Tensors(NamedTuple):
    """What a call is made of."""

    x: Tensor
    weight: Tensor
    grad_y: Tensor
    dim: int = 1


class Memory:
    """Makes tensors that hold no values.

    Args:
        pair: dtypes of x and of the slopes.
        offsets: elements by which x, the slopes and the gradient lie off the grid of 16 bytes.
    """

    def __init__(
        self, pair: tuple[torch.dtype, torch.dtype], offsets: tuple[int, ...] = (0, 0, 0)
    ) -> None:
        self.x, self.weight, self.grad_y = (
            functools.partial(self._tensor, dtype, offset)
            for dtype, offset in zip((*pair, pair[0]), offsets, strict=True)
        )

    @staticmethod
    def _tensor(dtype: torch.dtype, offset: int, *shape: int) -> Tensor:
        return torch.empty(math.prod(shape) + offset, dtype=dtype)[offset:].view(shape)

    def gradients(self, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """A dense one, and those that `sum` makes: one number, and one for each row."""
        yield self.grad_y(*shape)
        yield self.grad_y(*[1] * len(shape)).expand(shape)
        yield self.grad_y(*shape[:2], *[1] * (len(shape) - 2)).expand(shape)

    def all(self, dense: tuple[tuple[int, ...], ...] = DENSE) -> Iterator[Tensors]:
        """Tensors of every kind of memory."""
        for shape in dense:
            for slopes, grad_y in itertools.product({1, *shape[1:2]}, self.gradients(shape)):
                yield Tensors(self.x(*shape), self.weight(slopes), grad_y)
            if len(shape) > 1:
                yield Tensors(self.x(*shape), self.weight(shape[-1]), self.grad_y(*shape), -1)
        for shape in CHANNELS_LAST:
            x, grad_y = (
                make(*shape).to(memory_format=torch.channels_last) for make in (self.x, self.grad_y)
            )
            yield Tensors(x, self.weight(shape[1]), grad_y)
            yield Tensors(x, self.weight(shape[1]), self.grad_y(*shape))
        for whole in SLICED:
            half = whole[1] // 2
            yield from self._parts(whole, (slice(None), slice(half)))
        for whole, kept in CUT:
            yield from self._parts(whole, (..., slice(kept)))
        # What only a copy can read.
        yield Tensors(self.x(20, 12, 80)[..., ::2], self.weight(12), self.grad_y(20, 12, 40))

    def _parts(self, whole: tuple[int, ...], part: Any) -> Iterator[Tensors]:
        x, grad_y = self.x(*whole)[part], self.grad_y(*whole)[part]
        shape = tuple(x.shape)
        for slopes in {1, shape[1]}:
            for gradient in (grad_y, *self.gradients(shape)):
                yield Tensors(x, self.weight(slopes), gradient)
            yield Tensors(self.x(*shape), self.weight(slopes), grad_y)


Function = Callable[[Tensor, nn.Parameter, int], Tensor]
"""Y of x, slopes and dim."""


def with_slopes(module: nn.Module, weight: nn.Parameter) -> nn.Module:
    """A module with other slopes."""
    module.weight = weight
    return module


def along(x: Tensor, weight: Tensor, dim: int) -> list[int]:
    """The shape of slopes that broadcast over x."""
    varying = dim % x.dim() if weight.numel() > 1 else None
    return [weight.numel() if d == varying else 1 for d in range(x.dim())]


def broadcast(x: Tensor, weight: nn.Parameter, dim: int) -> Tensor:
    """prelu with slopes of x's rank."""
    return prelu(x, weight.view(along(x, weight, dim)))


def shared_axes(x: Tensor, weight: nn.Parameter, dim: int) -> Tensor:
    """Keras's layer."""
    sizes = along(x, weight, dim)[1:]
    module = prelu_gpu.SharedAxesPReLU(sizes)
    slopes = nn.Parameter(weight.detach().view(sizes), weight.requires_grad)
    return with_slopes(module, slopes)(x)


@prelu_gpu.enabled("cpu")
def enabled(function: Function, given: Tensors, needs: tuple[bool, bool]) -> None:
    """A function of PyTorch, and its backward."""
    step(function, given, needs)


def step(function: Function, given: Tensors, needs: tuple[bool, bool]) -> None:
    """A forward and a backward."""
    x, weight = given.x.detach().requires_grad_(needs[0]), nn.Parameter(given.weight, needs[1])
    y = function(x, weight, given.dim)
    if y.requires_grad:
        y.backward(given.grad_y)


def operators(given: Tensors, needs: tuple[bool, bool]) -> None:
    """The library's operators."""
    x, weight, grad_y, dim = given
    channel_dim = None if weight.numel() == 1 else dim % x.dim()
    ops = torch.ops.prelu_gpu
    ops.prelu(x, weight, channel_dim)
    ops.prelu_backward(grad_y, x, weight, channel_dim, needs)
    ops.leaky_relu(x, 0.1)
    ops.leaky_relu_backward(grad_y, x, 0.1)


ENTRANCES: dict[str, Callable[[Tensors, tuple[bool, bool]], None]] = {
    "prelu": functools.partial(step, lambda x, weight, dim: prelu(x, weight, dim=dim)),
    "prelu, slopes of x's rank": functools.partial(step, broadcast),
    "PReLU": functools.partial(
        step, lambda x, weight, dim: with_slopes(prelu_gpu.PReLU(dim=dim), weight)(x)
    ),
    "SharedAxesPReLU": functools.partial(step, shared_axes),
    "accelerate": functools.partial(
        step, lambda x, weight, _: with_slopes(prelu_gpu.accelerate(nn.PReLU()), weight)(x)
    ),
    "torch.ops.prelu_gpu": operators,
    "leaky_relu": functools.partial(step, lambda x, *_: leaky_relu(x, 0.1)),
    "leaky_relu of -0.0": functools.partial(step, lambda x, *_: leaky_relu(x, -0.0)),
    "leaky_relu in place": functools.partial(step, lambda x, *_: leaky_relu(x * 1, 0.1, True)),
    "LeakyReLU": functools.partial(step, lambda x, *_: prelu_gpu.LeakyReLU(0.1)(x)),
    "LeakyReLU in place": functools.partial(
        step, lambda x, *_: prelu_gpu.LeakyReLU(0.1, inplace=True)(x * 1)
    ),
    "enable, torch.prelu": functools.partial(enabled, lambda x, weight, _: torch.prelu(x, weight)),
    "enable, torch.nn.PReLU": functools.partial(
        enabled, lambda x, weight, _: with_slopes(nn.PReLU(), weight)(x)
    ),
}


def takes(entrance: str, given: Tensors) -> bool:
    """Whether an entrance takes such tensors."""
    if entrance in ("SharedAxesPReLU", "prelu, slopes of x's rank"):
        return given.x.dim() > 1
    if entrance == "accelerate":
        return given.dim == 1
    return not entrance.startswith("enable") or (
        given.dim == 1 and given.x.dtype == given.weight.dtype
    )


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


def variant(call: launch.Call, tensors: tuple[Any, ...]) -> Variant:
    """The variant of its kernel that a launch runs."""
    given = dict(zip(call.kernel.arg_names, (*tensors, *call.arguments), strict=True))
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


def specialization(call: launch.Call, tensors: tuple[Any, ...]) -> tuple[object, ...]:
    """What Triton makes code of its own for: alignments, sizes of 1 and those that 16 divides."""
    sizes = [value for value in call.launch.sizes.values() if value is not None]
    return (
        *(t.data_ptr() % 16 == 0 for t in tensors if isinstance(t, Tensor)),
        *(1 if size == 1 else size % 16 == 0 for size in sizes),
    )


@contextlib.contextmanager
def launches_are(
    run: Callable[..., None], gpu: str = "sm_90", changed: Callable[[Rules], Rules] = RULES[0]
) -> Iterator[None]:
    """The library takes CPU tensors for those of a GPU, and `run` takes the launches."""
    properties = GPUS[gpu]

    def rules(device: torch.device, itemsize: int, backward: bool) -> Rules:
        warp_size = int(properties.target.warp_size)
        return changed(gpu_rules(properties.multiprocessors, itemsize, backward, warp_size))

    with (
        mock.patch.multiple(launch, run=run, rules=rules, _on=lambda device: launch._UNCHANGED),
        mock.patch.object(backend, "KERNEL_DEVICES", (*backend.KERNEL_DEVICES, "cpu")),
        mock.patch.object(functional, "EAGER_BELOW", 0),
    ):
        yield


def drive(
    run: Callable[..., None],
    gpu: str,
    memories: Iterator[Tensors],
    entrances: Collection[str] = ENTRANCES.keys(),
) -> set[str]:
    """Calls every entrance with every tensor, and `prelu` also with all needs and rules.

    Gives the entrances that launched something.
    """
    reached = set()

    def noted(entrance: str, *arguments: Any) -> None:
        reached.add(entrance)
        run(entrance, *arguments)

    for given in memories:
        for entrance in entrances:
            if not takes(entrance, given):
                continue
            kinds = (
                itertools.product(RULES, NEEDS) if entrance == "prelu" else [(RULES[0], NEEDS[0])]
            )
            for changed, needs in kinds:
                with launches_are(functools.partial(noted, entrance), gpu, changed):
                    ENTRANCES[entrance](given, needs)
    return reached


class Branches:
    """Compile-time branches of kernels/, and which way the compiler took them."""

    def __init__(self) -> None:
        self.taken: set[tuple[str, int, str]] = set()
        self.folder = Path(launch.__file__).parent / "kernels"

    @staticmethod
    def _is_known(test: ast.expr) -> bool:
        """Whether a condition is known when a kernel is compiled."""
        if isinstance(test, ast.Compare) and isinstance(test.ops[0], (ast.Is, ast.IsNot)):
            return True
        return all(n.id.isupper() for n in ast.walk(test) if isinstance(n, ast.Name))

    @property
    def written(self) -> set[tuple[str, int, str]]:
        """File, line, and what is there: a function, or a way that a branch may go."""
        places = set()
        for path in self.folder.glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    places.add((path.name, node.lineno, node.name))
                elif isinstance(node, (ast.If, ast.IfExp)) and self._is_known(node.test):
                    test = ast.unparse(node.test)
                    for way in (test, f"not ({test})"):
                        places.add((path.name, node.lineno, way))
        return places

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Notes what Triton visits of the kernels' code."""
        visit = CodeGenerator.visit
        # By function that is compiled; the nodes are kept, so that their ids stay theirs.
        visited: dict[int, dict[int, ast.AST]] = {}

        def noting(generator: Any, node: Any) -> Any:
            if node is None or Path(generator.file_name).parent != self.folder:
                return visit(generator, node)
            if isinstance(node, ast.FunctionDef):
                visited[id(generator)] = {}
                self.taken.add(self._place(generator, node, node.name))
            nodes = visited.setdefault(id(generator), {})
            nodes[id(node)] = node
            result = visit(generator, node)
            if isinstance(node, (ast.If, ast.IfExp)) and self._is_known(node.test):
                first = node.body[0] if isinstance(node, ast.If) else node.body
                test = ast.unparse(node.test)
                way = test if id(first) in nodes else f"not ({test})"
                self.taken.add(self._place(generator, node, way))
            if isinstance(node, ast.FunctionDef):
                del visited[id(generator)]
            return result

        with mock.patch.object(CodeGenerator, "visit", noting):
            yield

    @staticmethod
    def _place(generator: Any, node: ast.stmt | ast.expr, what: str) -> tuple[str, int, str]:
        return Path(generator.file_name).name, generator.begin_line + node.lineno, what


class NoLauncher:
    """Launches nothing."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        """A launch."""


class NoGPU(CompileOnly):
    """The driver of a GPU that is not there: kernels are compiled, loaded into nothing, and
    launched on nothing."""

    launcher_cls = NoLauncher

    @property
    def utils(self) -> "NoGPU":
        """What loads kernels."""
        return self

    def get_device_properties(self, device: Any) -> dict[str, int]:
        """Memory that a kernel may use."""
        return {"max_shared_mem": 2**16}

    def load_binary(self, *kernel: Any) -> tuple[None, None, int, int, int]:
        """No module, no function, registers, no spills, most threads."""
        return None, None, 32, 0, 1024

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors are."""
        return torch.device("cpu")


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
        self._run = launch.run

    def run(
        self, entrance: str, call: launch.Call, inputs: tuple[Any, ...], outputs: tuple[Any, ...]
    ) -> None:
        """Compiles the kernel of a launch, if it is one to be compiled."""
        one = variant(call, (*inputs, *outputs))
        kinds = {(one.kernel, frozenset(one.dtypes))}
        if self.detail is Detail.EACH:
            kinds |= {(one.kernel, choice) for choice in one.choices | one.tile}
        else:
            kinds |= {(one.kernel, one.choices), (one.kernel, one.tile)}
        if self.detail is Detail.FULL:
            special = specialization(call, (*inputs, *outputs))
            kinds |= {(one.kernel, one.choices, special)}
        if kinds <= self._seen:
            return
        self._seen |= kinds
        self.compiled[one] = None
        try:
            self._run(call, inputs, outputs)
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
    triton.runtime.driver.set_active(NoGPU(GPUS[gpu].target))
    # ptxas takes longer than all else; tests/test_machine_code.py runs it.
    # A folder of its own keeps kernels without machine code from all other programs.
    no_ptxas = mock.patch.object(CUDABackend, "make_cubin", return_value=b"")
    with branches.noted(), no_ptxas, tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        reached = drive(census.run, gpu, memories(detail), entrances)
    for one in census.compiled:
        print(f"{gpu} {one}")
    print(f"{gpu}: {len(census.compiled)} kernels compiled, {len(branches.taken)} branches")
    return [
        *(f"{gpu}: {one} does not compile, called by {why}" for one, why in census.failed.items()),
        *(
            f"{gpu}: {file}:{line}: {what} is compiled nowhere"
            for file, line, what in sorted(branches.written - branches.taken)
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
    if backend.INTERPRETED:
        parser.error("TRITON_INTERPRET=1 runs Python: unset it, and kernels are compiled")
    wrong = [one for gpu in options.target for one in take(gpu, options.detail, options.entrance)]
    print("\n".join(wrong), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
