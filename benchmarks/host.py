"""The host's part of a call: its time with the launch left out, on any machine.

    python -m benchmarks.host

A tensor of a few elements on the CPU stands for one on a GPU: checks, route, plan, allocations and
autograd are those of a GPU's call, but nothing is computed. Beside it torch.prelu, which computes
its few elements.
"""

import statistics
import timeit
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import NamedTuple
from unittest import mock

import torch
from rich.table import Table
from torch import Tensor

import prelu_gpu
from benchmarks.cases import H100_MULTIPROCESSORS
from benchmarks.program import make_table, open_console
from prelu_gpu import functional, launch, ops, override
from prelu_gpu.backend import Backend
from prelu_gpu.plan import SMALL, Rules, gpu_rules

ROUNDS = 7
CALLS = 2000


class Cost(NamedTuple):
    """Microseconds of a call, medians."""

    call: str
    torch_us: float
    kernel_us: float
    """The route of large tensors: to a Triton kernel."""
    small_us: float
    """The route of small ones: to PyTorch's operator."""


def measure() -> list[Cost]:
    """Times the calls by every route, in turn."""
    x = torch.randn(2, 8, 4, 4)
    module, ours = torch.nn.PReLU(8), prelu_gpu.PReLU(8)
    grad_y = torch.randn_like(x)
    leaf, weight = x.clone().requires_grad_(), ours.weight

    def without_grad(function: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        def call() -> Tensor:
            with torch.no_grad():
                return function(x)

        return call

    def step(prelu: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(prelu(leaf, weight), (leaf, weight), grad_y)

    calls = {
        "module, no grad": (without_grad(module), without_grad(ours)),
        "forward": (
            lambda: torch.prelu(leaf, weight),
            lambda: prelu_gpu.prelu(leaf, weight),
        ),
        "forward + backward": (step(torch.prelu), step(prelu_gpu.prelu)),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        costs = [Cost(name, *_medians(*both)) for name, both in calls.items()]
        for name in ("forward", "forward + backward"):
            theirs, _ = calls[name]
            costs.append(Cost(f"{name}, enabled", *_medians(theirs, theirs, enabled)))
        return costs
    finally:
        torch.set_num_threads(threads)


def enabled() -> AbstractContextManager[None]:
    """torch.prelu on the kernels."""
    return prelu_gpu.enabled("cpu")


def _medians(
    theirs: Callable[[], object],
    ours: Callable[[], object],
    switch: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[float]:
    samples: list[list[float]] = [[], [], []]
    for _ in range(ROUNDS):
        samples[0].append(_us(theirs))
        for below, row in ((0, samples[1]), (SMALL, samples[2])):
            with without_launches(below), switch():
                row.append(_us(ours))
    return [statistics.median(row) for row in samples]


def _us(call: Callable[[], object]) -> float:
    call()
    return timeit.timeit(call, number=CALLS) / CALLS * 1e6


@contextmanager
def without_launches(eager_below: int) -> Iterator[None]:
    """Calls on the CPU take the routes of a GPU, and launch nothing."""
    with ExitStack() as stack:
        for target, name, stand_in in (
            (functional, "backend", lambda device: Backend.TRITON),
            (functional, "EAGER_BELOW", eager_below),
            (override, "backend", lambda device: Backend.TRITON),
            (ops, "backend", lambda device: Backend.TRITON),
            (launch, "rules", _rules),
            (launch, "run", lambda call, inputs, outputs: None),
        ):
            stack.enter_context(mock.patch.object(target, name, stand_in))
        yield


def _rules(device: torch.device, itemsize: int, backward: bool) -> Rules:
    return gpu_rules(H100_MULTIPROCESSORS, itemsize, backward)


def host_table() -> Table:
    """The measured costs."""
    table = make_table(
        ["call"],
        ["torch", "prelu_gpu", "prelu_gpu, small"],
        title=f"The host's microseconds of a call, launches left out; medians of {ROUNDS} rounds",
        caption="torch computes its few elements; small is the route of tensors below "
        f"{SMALL:,} elements, enabled is torch.prelu in a prelu_gpu.enabled block",
    )
    for cost in measure():
        table.add_row(cost.call, *(f"{us:.1f}" for us in cost[1:]))
    return table


if __name__ == "__main__":
    open_console().print(host_table())
