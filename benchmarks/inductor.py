"""The kernels that torch.compile generates for an H100, on a machine without one.

torch.compile traces and partitions a training step on fake tensors of the CPU, because autograd
refuses a GPU that is not there. Inductor then generates code of both graphs for an H100. Nothing is
run.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import make_boxed_func
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.utils import get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from benchmarks.machine_code import GPUS, compile_for

TARGET = GPUS["sm_90"]
DEVICE = torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(
    name=TARGET.name,
    major=9,
    minor=0,
    multi_processor_count=TARGET.multiprocessors,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=2**16,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
    total_memory=80 << 30,
    gcnArchName="",
)


class Kernel(NamedTuple):
    """A launch, and what it moves: bytes of tensors with as many elements as x."""

    name: str
    read: int
    written: int


class Step(NamedTuple):
    """A training step."""

    forward: list[Kernel]
    backward: list[Kernel]
    saved: int
    """Bytes that the backward gets from the forward."""


def compile_step(make: Callable[[], nn.Module], empty: Callable[[], Tensor]) -> Step:
    """Compiles the training step of a module on x, which both are made without memory."""
    graphs: list[tuple[GraphModule, list[Tensor], dict[str, Any]]] = []

    def note(graph: GraphModule, inputs: list[Tensor], **options: Any) -> Any:
        graphs.append((graph, list(inputs), options))
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = empty().requires_grad_()
        backend = functools.partial(compile_fx, inner_compile=note)
        y = torch.compile(make(), backend=backend, dynamic=False)(x)
        y.backward(torch.empty_like(y))
    passes = []
    for graph, tensors, options in graphs:
        names = [node.name for node in graph.graph.find_nodes(op="placeholder")]
        inputs = zip(names, tensors, strict=True)
        large = {name: t.itemsize for name, t in inputs if t.numel() == x.numel()}
        passes.append([*read_kernels(_generate(graph, tensors, options), x.numel(), large)])
    # The backward takes what is saved, and y's gradient.
    return Step(*passes, sum(tensor.nbytes for tensor in graphs[1][1]) - y.nbytes)


def read_kernels(code: str, numel: int, itemsizes: dict[str, int]) -> Iterator[Kernel]:
    """The launches of Inductor's code.

    A load or store counts once, in a loop too: in its course it goes over the whole tensor.

    Args:
        code: its module.
        numel: elements of x.
        itemsizes: of the code's arguments that have as many elements.
    """
    call = code[code.index("def call(") :]
    if other := re.search(r"extern_kernels\.\w+|torch\.ops\.\S+|\.copy_\(", call):
        raise NotImplementedError(f"{other[0]} in Inductor's code: what it moves is not known here")
    bodies = dict(re.findall(r"\ndef (triton_\w+)\((.*?)(?=\n''')", code, re.DOTALL))
    itemsizes = dict(itemsizes)
    for line in call.splitlines():
        if made := re.search(r"(\w+) = empty_strided_cuda\(\(([^)]*)\),.*torch\.(\w+)\)", line):
            if math.prod(int(size) for size in re.findall(r"\d+", made[2])) == numel:
                itemsizes[made[1]] = getattr(torch, made[3]).itemsize
        elif same := re.search(r"(\w+) = (?:reinterpret_tensor\()?(\w+)[;,]", line):
            itemsizes[same[1]] = itemsizes.get(same[2], 0)
        elif launch := re.search(r"(triton_\w+)\.run\(([^)]*)\)", line):
            parameters, _, body = bodies[launch[1]].partition("):\n")
            moved = {"load": 0, "store": 0}
            pairs = zip(parameters.split(", "), launch[2].split(", "), strict=False)
            for parameter, argument in pairs:
                for access in moved:
                    times = len(re.findall(rf"tl\.{access}\({parameter}\b", body))
                    moved[access] += times * numel * itemsizes.get(argument, 0)
            yield Kernel(launch[1], moved["load"], moved["store"])


def _generate(graph: GraphModule, inputs: list[Tensor], options: dict[str, Any]) -> str:
    """Inductor's code for a graph, moved to the GPU."""
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": DEVICE}
    graph.recompile()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        moved = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE) for t in inputs
        ]
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*moved)
        with tracing(TracingContext(mode)), _pretending_to_have_an_h100():
            return get_code(compile_fx_inner, graph, moved, **options)[0]


@contextlib.contextmanager
def _pretending_to_have_an_h100() -> Iterator[None]:
    """Answers what PyTorch and Triton ask of a GPU before they generate code."""
    answers = {
        "current_device": 0,
        "device_count": 1,
        "get_compute_capability": 90,
        "get_device_capability": (9, 0),
        "get_device_properties": PROPERTIES,
        "get_rng_state": torch.empty(16, dtype=torch.uint8),
        "is_available": True,
        "is_bf16_supported": True,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
        "set_rng_state": None,
        "_exchange_device": 0,
        "_lazy_init": None,
        "_maybe_exchange_device": 0,
    }

    def answer(value: Any) -> Any:
        return staticmethod(lambda *arguments, **options: value)

    compile_for(TARGET.target)
    before = []
    for place in (torch.cuda, CudaInterface, CudaInterface.Worker):
        for name in answers.keys() & vars(place).keys():
            before.append((place, name, vars(place)[name]))
            setattr(place, name, answer(answers[name]))
    for function in vars(torch.utils._triton).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()  # what it answered without the H100
    try:
        # Code that is cached would not be generated.
        with config.patch(fx_graph_cache=False):
            yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)
