"""The counters by which the last program knows that it is: zeros before and after every launch."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from support import EMULATED, GPU, backward, integers, randn

from prelu_gpu import launch, prelu, rules, run
from prelu_gpu.kernels import partials
from prelu_gpu.layout import View
from prelu_gpu.plan import make_plan
from prelu_gpu.rules import Kind, gpu_rules

SHAPES = {Kind.FLAT: (1, 1, 5003), Kind.PLANE: (3, 2, 2064), Kind.ODD_PLANE: (3, 5, 515)}


def arguments(kind, device, make=randn):
    shape = SHAPES[kind]
    x, grad_y = (make(shape, torch.float32, device, seed) for seed in (0, 1))
    return x, make(shape[1:2], torch.float32, device, seed=2), grad_y


@pytest.mark.parametrize("kind", SHAPES)
def test_counters_are_zeros_after_every_launch_and_used_again(kind, device, force, monkeypatch):
    monkeypatch.setattr(run, "_COUNTERS", {})
    force(kind)
    for _ in range(3):
        backward(prelu, *arguments(kind, device))
        (counters,) = run._COUNTERS.values()
        assert counters.dtype == torch.int32
        assert counters.numel() >= SHAPES[kind][1]
        assert not counters.any()
    first = counters
    backward(prelu, *arguments(kind, device))
    assert run._COUNTERS[next(iter(run._COUNTERS))] is first


def test_more_channels_get_more_counters(device, monkeypatch):
    monkeypatch.setattr(run, "_COUNTERS", {})
    few = run.counters(device, 3)
    assert run.counters(device, few.numel()) is few
    more = run.counters(device, few.numel() + 1)
    assert more.numel() == few.numel() + 1
    assert run.counters(device, 3) is more
    assert not more.any()


@pytest.mark.usefixtures("outputs_may_be_incomplete")
def test_a_counter_that_is_no_zero_would_be_seen(device, force):
    """What the other tests rest on: the sum is the last program's, by its counter."""
    force(Kind.PLANE)
    x, weight, grad_y = arguments(Kind.PLANE, device)
    # None of the programs counts to the last.
    run.counters(x.device, 2)[0] = -1
    try:
        grad_weight = backward(prelu, x, weight, grad_y)[2]
    finally:
        run.counters(x.device, 2).zero_()
    exact = (torch.where(x > 0, 0, grad_y * x)).sum((0, 2))
    assert not torch.allclose(grad_weight[0], exact[0])
    assert torch.allclose(grad_weight[1], exact[1])


@pytest.mark.skipif(GPU or EMULATED, reason="programs that are compiled cannot be watched")
@pytest.mark.parametrize("kind", SHAPES)
def test_one_program_of_each_channel_adds_up(kind, device, force, monkeypatch):
    sums, sum_channels = [], partials.sum_channels

    def counted(*arguments):
        sums.append(arguments)
        sum_channels(*arguments)

    monkeypatch.setattr(partials, "sum_channels", counted)
    force(kind)
    backward(prelu, *arguments(kind, device))
    assert len(sums) == SHAPES[kind][1]


def test_only_small_sums_of_planes_are_finished_by_the_last_program():
    rules = gpu_rules(132, 4, True)
    assert make_plan(View(128, 64, 12544), 4, rules).finish
    assert not make_plan(View(128, 512, 49), 4, rules).finish  # columns
    assert not make_plan(View(1, 8448, 4096), 4, rules).finish  # one program each: the sum itself
    many_programs = gpu_rules(304, 4, True)
    assert make_plan(View(1, 1, 2**24), 4, many_programs).finish
    assert not make_plan(View(1, 1, 2**28), 4, many_programs).finish  # more than 64 KiB


class StandInForCuda:
    """Torch, whose CUDA device is this machine's memory."""

    int32 = torch.int32

    def __init__(self):
        self.capturing, self.stream = False, 1
        self.cuda = self

    def is_current_stream_capturing(self):
        return self.capturing

    def get_current_stream(self, index):
        return self.stream

    def zeros(self, size, *, dtype, device):
        return torch.zeros(size, dtype=dtype)


def test_each_device_and_stream_and_each_graph_has_its_own_counters(monkeypatch):
    cuda = StandInForCuda()
    monkeypatch.setattr(run, "_COUNTERS", {})
    monkeypatch.setattr(run, "torch", cuda)
    monkeypatch.setattr(run, "driver", SimpleNamespace(active=cuda))
    monkeypatch.setattr(run, "on", lambda device: contextlib.nullcontext())
    devices = [torch.device("cuda", index) for index in (0, 1)]
    first = run.counters(devices[0], 3)
    assert run.counters(devices[1], 3) is not first
    cuda.stream = 2
    assert run.counters(devices[0], 3) is not first
    cuda.stream = 1
    assert run.counters(devices[0], 3) is first
    cuda.capturing = True
    captured = [run.counters(devices[0], 3) for _ in range(2)]
    assert captured[0] is not captured[1]
    assert all(counters is not first for counters in captured)
    cuda.capturing = False
    assert run.counters(devices[0], 3) is first


@pytest.mark.parametrize(("kind_of_device", "finishes"), [("cuda", True), ("xpu", False)])
def test_the_last_program_finishes_where_that_is_shown_to_be_sound(
    kind_of_device, finishes, monkeypatch
):
    properties = SimpleNamespace(multi_processor_count=132, gpu_subslice_count=64, warp_size=32)
    module = SimpleNamespace(get_device_properties=lambda device: properties)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(rules, "INTERPRETED", False)
    row = rules._table.__wrapped__(torch.device(kind_of_device, 0), 4, True)
    assert make_plan(View(8, 64, 4096), 4, row).finish == finishes


@pytest.mark.gpu
@pytest.mark.usefixtures("unguarded_allocations")
@pytest.mark.parametrize("kind", SHAPES)
def test_ten_thousand_repeats(kind, device, force):
    force(kind)
    x, weight, grad_y = arguments(kind, device, integers)
    expected = launch.prelu_backward(grad_y, x, weight, 1, (True, True))
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(10_000):
        given = launch.prelu_backward(grad_y, x, weight, 1, (True, True))
        wrong += sum((a != b).sum() for a, b in zip(given, expected, strict=True))
    assert wrong.item() == 0


@pytest.mark.gpu
@pytest.mark.usefixtures("unguarded_allocations")
def test_two_streams_at_once(device, force):
    force(Kind.PLANE)
    x, weight, grad_y = (t.to(device) for t in arguments(Kind.PLANE, "cpu", integers))
    expected = launch.prelu_backward(grad_y, x, weight, 1, (True, True))[1]
    streams = [torch.cuda.Stream() for _ in range(2)]
    sums = [[], []]
    torch.cuda.synchronize()
    for _ in range(500):
        for stream, found in zip(streams, sums, strict=True):
            with torch.cuda.stream(stream):
                found.append(launch.prelu_backward(grad_y, x, weight, 1, (True, True))[1])
    torch.cuda.synchronize()
    assert all(torch.equal(found, expected) for found in (*sums[0], *sums[1]))
    assert len({key for key in run._COUNTERS if key[1] in {s.cuda_stream for s in streams}}) == 2


@pytest.mark.gpu
@pytest.mark.usefixtures("unguarded_allocations")
def test_replays_of_a_cuda_graph_on_two_streams_at_once(device, force):
    force(Kind.PLANE)
    x, weight, grad_y = arguments(Kind.PLANE, device, integers)
    expected = launch.prelu_backward(grad_y, x, weight, 1, (True, True))[1]
    graphs, results = [], []
    for _ in range(2):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            results.append(launch.prelu_backward(grad_y, x, weight, 1, (True, True))[1])
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(500):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)
