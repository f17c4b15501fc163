"""Counts what training steps move, launch and save: eager, compiled by Inductor, by the kernels.

Nothing is timed and no GPU is needed. Passes are bytes of tensors with as many elements as x, read
or written, over the bytes of x; slopes, statistics and partial sums are not counted. Every access
counts, whether or not a cache would answer it.

- eager: the operators that PyTorch calls, by OPERATORS, which says what their CUDA kernels do.
- compile: the code that Inductor generates for an H100 (inductor.py).
- prelu_gpu: the kernels' PTX, executed for an H100 by the emulator of tests/ptx, and PyTorch's
  operators around them. A norm and PReLU are one function.
"""

import functools
import multiprocessing
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import typer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import prelu_gpu
from benchmarks.cases import LAYOUTS, dtype_name
from benchmarks.inductor import Kernel, Step, compile_step
from benchmarks.program import fail, make_table, open_console
from benchmarks.providers import OURS
from benchmarks.results import describe_run
from prelu_gpu.backend import INTERPRETED
from prelu_gpu.plan import Plan
from prelu_gpu.run import Call, Values, execute, intercepting

ROOT = Path(__file__).parents[1]
FILE = ROOT / "benchmarks" / "results" / "traffic.csv"
README = ROOT / "README.md"
BETWEEN_MARKERS = re.compile(r"(?<=<!-- traffic -->\n).*(?=<!-- /traffic -->)", re.DOTALL)

Make = Callable[[ModuleType, torch.dtype], nn.Module]
"""Makes a module of PReLUs from torch.nn or prelu_gpu."""


class Bias(nn.Module):
    """The bias of a convolution, which PyTorch adds in a kernel of its own."""

    def __init__(self, channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Adds it along dimension 1."""
        return x + self.bias.view(-1, 1, 1)


class NormPReLU(nn.Module):
    """A norm, then PReLU; prelu_gpu's is one function."""

    def __init__(self, library: ModuleType, norm: Any, prelu: nn.PReLU) -> None:
        super().__init__()
        self.norm, self.prelu, self.fused = norm, prelu, library is prelu_gpu
        # Counting the batches would be a launch more for everyone.
        norm.num_batches_tracked = None

    def forward(self, x: Tensor) -> Tensor:
        """Applies both."""
        norm, slope = self.norm, self.prelu.weight
        affine, running = (norm.weight, norm.bias), (norm.running_mean, norm.running_var)
        y: Tensor
        if not self.fused:
            y = self.prelu(norm(x))
        elif isinstance(norm, nn.InstanceNorm3d):
            y = prelu_gpu.instance_norm_prelu(x, slope, *affine, norm.eps)
        else:
            options = norm.training, norm.momentum, norm.eps
            y = prelu_gpu.batch_norm_prelu(x, slope, *running, *affine, *options)
        return y


class Case(NamedTuple):
    """A row of the table."""

    name: str
    shape: tuple[int, ...]
    make: Make
    dtype: torch.dtype = torch.bfloat16
    layout: str = "contiguous"

    @property
    def x(self) -> str:
        """Shape, dtype and layout in words."""
        shape = "x".join(map(str, self.shape))
        return " ".join([shape, dtype_name(self.dtype), self.layout]).removesuffix(" contiguous")

    def empty(self) -> Tensor:
        """Memory for x."""
        return torch.empty(self.shape, dtype=self.dtype, memory_format=LAYOUTS[self.layout])


def _prelu(slopes: int, *before: Callable[[torch.dtype], nn.Module]) -> Make:
    return lambda library, dtype: nn.Sequential(
        *(make(dtype) for make in before), library.PReLU(slopes, dtype=dtype)
    )


def _norm_prelu(slopes: int, norm: Callable[[], nn.Module], training: bool = True) -> Make:
    return lambda library, dtype: NormPReLU(
        library, norm(), library.PReLU(slopes, dtype=dtype)
    ).train(training)


FLOAT32 = torch.float32
C64, C512, MONAI = (64, 64, 56, 56), (128, 512, 14, 14), (2, 32, 48, 48, 48)
_BATCH_64 = _norm_prelu(64, lambda: nn.BatchNorm2d(64))
_BATCH_64_FROZEN = _norm_prelu(64, lambda: nn.BatchNorm2d(64), training=False)
_INSTANCE_32 = _norm_prelu(1, lambda: nn.InstanceNorm3d(32))
CASES = (
    Case("PReLU, one slope", (16, 64, 96, 96), _prelu(1), FLOAT32),
    Case("PReLU, one slope", MONAI, _prelu(1), FLOAT32),
    Case("PReLU, C = 64", C64, _prelu(64)),
    Case("PReLU, C = 64", (2, 64, 64, 64), _prelu(64)),
    Case("PReLU, C = 512", C512, _prelu(512)),
    Case("PReLU, C = 64", C64, _prelu(64), layout="channels_last"),
    Case("PReLU, C = 512", (32768, 512), _prelu(512)),
    Case("Leaky ReLU", C64, lambda library, dtype: library.LeakyReLU(0.1)),
    Case("Leaky ReLU", C64, lambda library, dtype: library.LeakyReLU(0.1), FLOAT32),
    Case("bias, PReLU, C = 64", C64, _prelu(64, lambda dtype: Bias(64, dtype))),
    # bfloat16: with other dtypes PyTorch calls cuDNN, whose kernels cannot be read.
    Case("BatchNorm, PReLU, C = 64", C64, _BATCH_64),
    Case("BatchNorm, PReLU, C = 64", C64, _BATCH_64, layout="channels_last"),
    Case("BatchNorm, PReLU, C = 512", C512, _norm_prelu(512, lambda: nn.BatchNorm2d(512))),
    Case("BatchNorm in evaluation, PReLU", C64, _BATCH_64_FROZEN),
    # Without parameters, as MONAI has it: PyTorch does not call cuDNN.
    Case("InstanceNorm, PReLU", MONAI, _INSTANCE_32, FLOAT32),
    Case("InstanceNorm, PReLU", MONAI, _INSTANCE_32, FLOAT32, "channels_last_3d"),
)
"""Tensors of SRGAN, MONAI's UNet and IResNet; and others that show where torch.compile generates
something else, or PyTorch's operator serves."""

OPERATORS = {
    "aten::_prelu_kernel": [(1, 1)],
    "aten::_prelu_kernel_backward": [(2, 2)],
    "aten::add": [(1, 1)],
    "aten::clone": [(1, 1)],
    "aten::leaky_relu": [(1, 1)],
    "aten::leaky_relu_backward": [(2, 1)],
    # The statistics, the running ones or else 1 / sigma, and the output.
    "aten::native_batch_norm": [(1, 0), (0, 0), (1, 1)],
    # One kernel: a block sums a channel of both inputs, then reads them again.
    "aten::native_batch_norm_backward": [(4, 1)],
    "aten::native_batch_norm_backward of channels_last": [(2, 0), (2, 1)],
    # 1 / sigma of the running variance, and the output.
    "aten::native_batch_norm in evaluation": [(0, 0), (1, 1)],
    # It reads the input for the sums alone.
    "aten::native_batch_norm_backward in evaluation": [(3, 1)],
    # One kernel, also where several blocks share a sum.
    "aten::sum": [(1, 0)],
}
"""The CUDA kernels of PyTorch's operators, each with its reads and writes of tensors of x's size.

For dense inputs of fewer than 2**31 elements; from ActivationPreluKernel, Normalization and
Reduce in PyTorch's aten/src/ATen/native/cuda. A memset, as of a sum's semaphores, is no launch.
"""

WITHOUT_KERNELS = {"aten::detach", "aten::empty", "aten::expand", "aten::view"}


class Operators(TorchDispatchMode):
    """The kernels of the operators that a block calls; runs those of prelu_gpu in the emulator."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        """Runs an operator on the CPU, and notes what a GPU would launch."""
        name, _, _ = func.name().partition(".")
        if name.startswith("prelu_gpu::"):
            with intercepting(self.emulate):
                return func(*args, **kwargs or {})
        if name not in WITHOUT_KERNELS:
            name += _variant(name, args)
            if name not in OPERATORS:
                raise NotImplementedError(f"{name}: OPERATORS does not say what its kernels do")
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            nbytes = max(self._nbytes(tensor) for tensor in tensors)
            for reads, writes in OPERATORS[name]:
                self.kernels.append(Kernel(name, reads * nbytes, writes * nbytes))
        return func(*args, **kwargs or {})

    def _nbytes(self, tensor: Tensor) -> int:
        return tensor.nbytes if tensor.numel() == self.numel else 0

    def emulate(self, call: Call, values: Values) -> None:
        """Executes a launch, and notes which bytes of tensors of x's size it reads and writes."""
        if isinstance(call.launch, Plan) and call.launch.view.copies:
            raise NotImplementedError(f"{call.launch}: its copies are not counted")
        tensors = [value for value in values.values() if isinstance(value, Tensor)]
        accesses: list[Any] = []
        with _emulator().emulation(trace=accesses, count=False):
            execute(call, values)
        moved = [count_bytes(accesses, t) for t in tensors if self._nbytes(t)]
        read, written = (sum(each[way] for each in moved) for way in (0, 1))
        self.kernels.append(Kernel(call.kernel.__name__, read, written))


def count_bytes(accesses: list[Any], tensor: Tensor) -> tuple[int, int]:
    """The bytes of a tensor that a launch reads and writes, by the emulator's trace.

    An address that lanes of a program read together counts once: a warp reads it once.
    """
    begin, moved = tensor.data_ptr(), [0, 0]
    for writes, size, programs, at in accesses:
        inside = (at >= begin) & (at < begin + tensor.nbytes)
        places = programs[inside].astype(int) << 40 | (at[inside] - begin).astype(int)
        moved[writes] += size * len(np.unique(places))
    return moved[0], moved[1]


def _variant(name: str, args: Sequence[Any]) -> str:
    """Which of an operator's ways these arguments take, in words of OPERATORS."""
    if name == "aten::native_batch_norm":
        return "" if args[5] else " in evaluation"
    if name == "aten::native_batch_norm_backward":
        if not args[7]:
            return " in evaluation"
        return "" if args[1].is_contiguous() else " of channels_last"
    return ""


def _noting(operators: Operators, module: nn.Module) -> AbstractContextManager[object]:
    """Notes a block's kernels.

    Under a dispatch mode PyTorch's operators would serve a norm's function, which calls no others
    beside its launches.
    """
    fused = isinstance(module, NormPReLU) and module.fused
    return intercepting(operators.emulate) if fused else operators


def observe_step(case: Case, library: ModuleType) -> Step:
    """Runs a training step on the CPU, by the operators that a GPU would run."""
    x, saved = case.empty().requires_grad_(), {}
    module = case.make(library, case.dtype)

    def pack(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        saved[memory.data_ptr()] = memory.nbytes()
        return tensor

    forward, backward = Operators(x.numel()), Operators(x.numel())
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with _noting(forward, module), hooks:
        y = module(x)
    grad_y = torch.empty_like(y)
    with _noting(backward, module):
        torch.autograd.grad(y, [x, *module.parameters()], grad_y)
    return Step(forward.kernels, backward.kernels, sum(saved.values()))


def emulate_step(case: Case) -> Step:
    """Runs a training step whose PReLUs are prelu_gpu's kernels, for an H100."""
    _emulator()
    return observe_step(case, prelu_gpu)


@functools.cache
def _emulator() -> Any:
    """The tests' emulator, where this process's kernels run from now on, from the usual size on."""
    sys.path.insert(0, str(ROOT / "tests"))
    from ptx import driver

    driver.install()
    prelu_gpu.set_kernel_threshold(None)
    return driver


PROVIDERS: dict[str, Callable[[Case], Step]] = {
    "eager": lambda case: observe_step(case, nn),
    "compile": lambda case: compile_step(lambda: case.make(nn, case.dtype), case.empty),
    OURS: emulate_step,
}


def count(provider: str, cases: Sequence[Case] = CASES) -> pd.DataFrame:
    """A provider's rows, in a process that may be left with other drivers."""
    return pd.DataFrame(make_row(case, provider, PROVIDERS[provider](case)) for case in cases)


def make_row(case: Case, provider: str, step: Step) -> dict[str, Any]:
    """Bytes become units of x, in hundredths: parameters and statistics are none."""
    nbytes = case.empty().nbytes
    row: dict[str, Any] = {"case": case.name, "x": case.x, "provider": provider}
    for name, kernels in (("forward", step.forward), ("backward", step.backward)):
        row[f"{name}_reads"] = round(sum(kernel.read for kernel in kernels) / nbytes, 2)
        row[f"{name}_writes"] = round(sum(kernel.written for kernel in kernels) / nbytes, 2)
        row[f"{name}_launches"] = len(kernels)
    return row | {"saved": round(step.saved / nbytes, 2)}


def count_all() -> pd.DataFrame:
    """All rows, each provider's by a process of its own."""
    with multiprocessing.get_context("spawn").Pool(len(PROVIDERS), maxtasksperchild=1) as pool:
        counted = pool.map(count, PROVIDERS, chunksize=1)
    return pd.concat(counted).sort_index(kind="stable", ignore_index=True)


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """The table: total passes (forward + backward) of each provider, then their other figures."""
    forward = rows["forward_reads"] + rows["forward_writes"]
    backward = rows["backward_reads"] + rows["backward_writes"]
    pairs = zip(forward, backward, strict=True)
    launches = rows["forward_launches"] + rows["backward_launches"]
    rows = rows.assign(
        passes=[f"{one + other:g} ({one:g} + {other:g})" for one, other in pairs],
        launches=launches.astype(str),
        saved=rows["saved"].map("{:g}".format),
    )
    table = []
    for (case, x), group in rows.groupby(["case", "x"], sort=False):
        passes = zip(["eager", "torch.compile", "prelu_gpu"], group["passes"], strict=True)
        others = {name: " / ".join(group[name]) for name in ("launches", "saved")}
        table.append({"training step": case, "x": x, **dict(passes), **others})
    return pd.DataFrame(table)


def readme_block(rows: pd.DataFrame) -> str:
    """What stands between README's markers."""
    return str(summarize(rows).to_markdown(index=False, disable_numparse=True)) + "\n"


def differences(before: pd.DataFrame, after: pd.DataFrame) -> list[str]:
    """The cells in which two counts differ, in words."""
    rows = (before[after.columns], after)
    old, new = (one.set_index(["case", "x", "provider"]) for one in rows)
    if not old.index.equals(new.index):
        return ["its rows are others"]
    return [
        f"{', '.join(row)}: {figure} was {old.at[row, figure]:g} and is {new.at[row, figure]:g}"
        for row in old.index
        for figure in new.columns
        if old.at[row, figure] != new.at[row, figure]
    ]


WRITE_HELP = "Write benchmarks/results/traffic.csv and README's table."


def main(write: Annotated[bool, typer.Option("--write", help=WRITE_HELP)] = False) -> None:
    """Counts what training steps move, launch and save, in eager, compiled and by the kernels.

    Passes are over memory of the size of x, in total (forward + backward). Launches, and what is
    saved for the backward in units of x, are of eager / torch.compile / prelu_gpu. Without --write
    the status is 1 where benchmarks/results/traffic.csv says otherwise. Needs no GPU.
    """
    if INTERPRETED:
        fail("interpreted kernels have no PTX to execute; unset TRITON_INTERPRET.")
    rows = count_all()
    run = describe_run("none: counted for an H100")
    console = open_console()
    summary = summarize(rows)
    table = make_table([*summary.columns[:2]], [*summary.columns[2:]], caption=str(run))
    for line in summary.itertuples(index=False):
        table.add_row(*line)
    console.print(table)
    if write:
        told = pd.DataFrame({**asdict(run), **row} for row in rows.to_dict("records"))
        told.to_csv(FILE, index=False, lineterminator="\n")
        text = README.read_text(encoding="utf-8")
        text = BETWEEN_MARKERS.sub(lambda _: readme_block(rows), text)
        README.write_text(text, encoding="utf-8")
    elif wrong := differences(pd.read_csv(FILE), rows):
        fail(f"{FILE} says otherwise; if this count is right, write it with --write:", *wrong)
