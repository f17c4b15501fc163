"""The host's part of a call: what the benchmark times, and that it stays thin."""

import sys
from pathlib import Path

import pytest
import torch

import prelu_gpu
from benchmarks import host
from prelu_gpu import functional, launch

PACKAGE = str(Path(prelu_gpu.__file__).parent)


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


@pytest.fixture
def arguments():
    module = prelu_gpu.PReLU(8)
    return module, torch.randn(2, 8, 4, 4)


def test_a_small_inference_is_four_functions_and_pytorchs_operator(arguments):
    module, x = arguments
    with host.without_launches(SMALL), torch.no_grad():
        names = functions_called(lambda: module(x))
    assert names == ["forward", "prelu", "_is_small", "check_memory"]


def test_a_kernel_is_reached_by_few_functions_and_without_planning_again(arguments):
    module, x = arguments
    with host.without_launches(0), torch.no_grad():
        names = functions_called(lambda: module(x))
    assert not {"plan_call", "plan", "view", "rules", "_rules", "bind"} & set(names)
    assert {"forward", "prelu", "check_prelu", "prelu_forward"} <= set(names)
    assert len(names) <= 17, names


def test_a_backward_is_planned_once(arguments):
    module, x = arguments
    grad_y = torch.randn_like(x)
    x.requires_grad_()
    with host.without_launches(0):
        names = functions_called(lambda: torch.autograd.grad(module(x), (x, module.weight), grad_y))
    assert not {"plan_call", "plan", "view", "rules", "_rules", "bind"} & set(names)
    assert len(names) <= 30, names


def test_the_routes_are_those_of_a_gpu_and_end_with_the_measurement(arguments, monkeypatch):
    module, x = arguments
    called = []
    before = launch.run, launch.rules, functional.backend, functional.EAGER_BELOW
    with host.without_launches(0), monkeypatch.context() as patch:
        patch.setattr(launch, "run", lambda call, *tensors: called.append(call))
        module(x)
    assert before == (launch.run, launch.rules, functional.backend, functional.EAGER_BELOW)
    (call,) = called
    assert call.kernel.__name__ == "column_forward"
    assert call.launch.num_warps > 1  # the interpreter has one


def test_the_table_has_a_cost_of_every_call_and_route(monkeypatch):
    monkeypatch.setattr(host, "ROUNDS", 1)
    monkeypatch.setattr(host, "CALLS", 2)
    costs = host.measure()
    assert [cost.call for cost in costs] == [
        "module, no grad",
        "forward",
        "forward + backward",
        "forward, enabled",
        "forward + backward, enabled",
    ]
    assert all(us > 0 for cost in costs for us in cost[1:])
    table = host.host_table()
    assert table.row_count == 5
    assert len(table.columns) == 4
