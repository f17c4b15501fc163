"""The host's part of a call: that it stays thin, and what it takes beside torch.prelu's."""

import functools
import sys
import timeit
from pathlib import Path

import pytest
import torch

import prelu_gpu
from prelu_gpu import launch
from prelu_gpu.rules import gpu_rules, using_rules
from prelu_gpu.run import intercepting

PACKAGE = str(Path(prelu_gpu.__file__).parent)
PLANNING = {"plan_call", "make_plan", "make_view", "gpu_rules", "bind"}


@pytest.fixture(autouse=True)
def launched():
    """Calls take the route of an H100's, and what they would launch is noted."""
    calls = []

    @functools.cache
    def table(device, itemsize, backward):
        return gpu_rules(132, itemsize, backward)

    with intercepting(lambda call, values: calls.append(call)), using_rules(table):
        yield calls


@pytest.fixture
def arguments():
    return prelu_gpu.PReLU(8), torch.randn(2, 8, 4, 4)


def functions_called(call):
    """The package's own functions that a call runs, in order; what is cached is there already."""
    call()
    names = []

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            names.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return names


def test_a_small_inference_is_a_few_questions_and_pytorchs_operator(arguments, launched, threshold):
    threshold(2**22)
    module, x = arguments
    with torch.no_grad():
        names = functions_called(lambda: module(x))
    assert names == [
        *("forward_or_node", "forward", "prelu"),
        *("pytorch_is_quicker", "is_small", "check_memory"),
    ]
    assert launched == []


def test_a_kernel_is_reached_by_few_functions_and_without_planning_again(arguments, launched):
    module, x = arguments
    with torch.no_grad():
        names = functions_called(lambda: module(x))
    assert not PLANNING & set(names)
    assert {"forward", "prelu", "route", "prelu_forward"} <= set(names)
    assert len(names) <= 19, names
    assert [call.kernel.__name__ for call in launched] == ["column_forward"] * 2
    assert launched[0].launch.num_warps > 1  # the interpreter has one


def test_a_backward_is_planned_once(arguments):
    module, x = arguments
    grad_y = torch.randn_like(x)
    x.requires_grad_()
    names = functions_called(lambda: torch.autograd.grad(module(x), (x, module.weight), grad_y))
    assert not PLANNING & set(names)
    assert names.count("route") == 2  # once for the forward, once for the backward
    assert len(names) <= 34, names


@pytest.mark.parametrize(("backward", "limit"), [(False, 10), (True, 4)])
def test_a_call_takes_the_host_a_few_times_torch_prelus_time(
    backward, limit, arguments, monkeypatch
):
    """Launches left out; torch.prelu computes its few elements. The best of rounds, in turn."""
    monkeypatch.setattr(launch, "torch", torch)  # no canaries around what is allocated
    module, x = arguments
    weight, grad_y = module.weight, torch.randn_like(x)
    leaf = x.clone().requires_grad_()

    def call(function):
        if backward:
            return torch.autograd.grad(function(leaf, weight), (leaf, weight), grad_y)
        with torch.no_grad():
            return function(x, weight)

    samples = {torch.prelu: [], prelu_gpu.prelu: []}
    for _ in range(9):
        for function, times in samples.items():
            times.append(timeit.timeit(lambda function=function: call(function), number=200))
    theirs, ours = map(min, samples.values())
    assert ours <= limit * theirs
