"""What goes wrong around a call: devices, memory, threads, forks, tensors that are strangers."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import assert_same, backward, id_of, integers, randn, run_program
from torch import nn
from torch.testing._internal.logging_tensor import LoggingTensor, capture_logs

import prelu_gpu
from prelu_gpu import leaky_relu, ops, prelu
from prelu_gpu.checks import check_memory
from prelu_gpu.rules import Kind

SHAPE = (4, 3, 5)


@pytest.fixture
def x(device):
    return randn(SHAPE, torch.float32, device)


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        (("meta", None), r"input on meta and weight on (cpu|cuda:0)"),
        ((None, "meta"), r"input on (cpu|cuda:0) and weight on meta"),
        pytest.param(("cpu", None), "input on cpu and weight on cuda:0", marks=pytest.mark.gpu),
        pytest.param((None, "cpu"), "input on cuda:0 and weight on cpu", marks=pytest.mark.gpu),
    ],
    ids=str,
)
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("slopes", [1, 3])
def test_a_slope_on_another_device(devices, words, small, slopes, x, weight, no_launch, threshold):
    threshold(1000 if small else 0)
    x, weight = (t.to(d or t.device) for t, d in zip((x, weight[:slopes]), devices, strict=True))
    module = prelu_gpu.accelerate(nn.PReLU(slopes, device=weight.device))
    for function in (lambda: prelu(x.requires_grad_(), weight), lambda: module(x)):
        with pytest.raises(RuntimeError, match=rf"same device, but got .*{words}. Move one with"):
            function()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=id_of)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("slopes", [1, 6])
def test_meta_tensors_give_meta_results_as_pytorchs(dtype, layout, slopes):
    x = torch.empty(2, 6, 4, 4, device="meta", dtype=dtype).to(memory_format=layout)
    outcomes = []
    for kind in (nn.PReLU, prelu_gpu.PReLU):
        module = kind(slopes, device="meta", dtype=dtype)
        leaf = x.detach().requires_grad_()
        y = module(leaf)
        y.sum().backward()
        results = (y, leaf.grad, module.weight.grad)
        outcomes.append([(t.device, t.dtype, t.shape, t.stride()) for t in results])
    assert outcomes[0] == outcomes[1]
    assert outcomes[1][0] == (x.device, x.dtype, x.shape, x.stride())


def freed(tensor):
    """Without memory, as FSDP leaves parameters that are not in use."""
    tensor.untyped_storage().resize_(0)
    return tensor


def in_autocast(function):
    def run(x, weight):
        with torch.autocast(x.device.type, torch.bfloat16):
            return function(x, weight)

    return run


FREED = {
    "prelu": (prelu, 2),
    "autocast": (in_autocast(prelu), 2),
    "operator": (lambda x, weight: ops.prelu_forward(x, weight, 1), 2),
    "operator, backward": (lambda x, w: ops.prelu_backward(x, x, w, 1, [True, True]), 2),
    "leaky_relu": (lambda x, _: leaky_relu(x, 0.1), 1),
    "leaky_relu in place": (lambda x, _: leaky_relu(x, 0.1, inplace=True), 1),
    "leaky operator": (lambda x, _: ops.leaky_relu_forward(x, 0.1), 1),
    "leaky operator, backward": (
        lambda x, _: ops.leaky_relu_backward(torch.ones_like(x), x, 0.1),
        1,
    ),
}
NOT_ALLOCATED = "non-zero number of elements, but its data is not allocated yet. Got one of shape"


@pytest.mark.parametrize(("function", "tensors"), FREED.values(), ids=FREED)
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=id_of)
def test_memory_that_was_freed_is_not_read(
    function, tensors, small, dtype, device, no_launch, threshold
):
    """PyTorch's operators read it all the same."""
    threshold(1000 if small else 0)
    for lost in range(tensors):
        pair = randn((5, 3, 5), dtype, device)[1:], randn((3,), dtype, device, seed=1)
        freed(pair[lost])
        with pytest.raises(RuntimeError, match=NOT_ALLOCATED):
            function(*pair)


def test_slopes_to_broadcast_whose_memory_was_freed_are_not_read(x, weight, no_launch):
    slopes = weight[:, None].expand(3, 5)[None]
    freed(weight)
    with pytest.raises(RuntimeError, match=NOT_ALLOCATED):
        prelu(x, slopes)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("lost", ["x", "weight", "grad_y"])
def test_memory_that_was_freed_since_the_forward_is_not_read(lost, create_graph, x, weight):
    tensors = {"x": x.requires_grad_(), "weight": weight, "grad_y": torch.ones_like(x)}
    y = prelu(x, weight)
    freed(tensors[lost])
    with pytest.raises(RuntimeError, match=NOT_ALLOCATED):
        torch.autograd.grad(y, x, tensors["grad_y"], create_graph=create_graph)


def test_a_leaky_relus_memory_that_was_freed_since_the_forward_is_not_read(x):
    y = leaky_relu(x.requires_grad_(), 0.1)
    freed(x)
    with pytest.raises(RuntimeError, match=NOT_ALLOCATED):
        y.sum().backward()


def test_memory_that_was_freed_and_filled_again_is_used(x, weight, launches):
    """As FSDP gathers parameters anew for the backward."""
    grad_y = torch.ones_like(x)
    expected = backward(prelu, x, weight, grad_y)[1:]
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = prelu(*leaves)
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(leaves):
        for leaf, values in zip(leaves, (x, weight), strict=True):
            nbytes = leaf.untyped_storage().nbytes()
            freed(leaf).untyped_storage().resize_(nbytes)
            leaf.copy_(values)
    for given, wanted in zip(torch.autograd.grad(y, leaves, grad_y), expected, strict=True):
        assert_same(given, wanted)


def test_tensors_without_storages_are_not_asked_for_them(x, weight, threshold):
    """As those of some devices, and of transforms."""
    expected = torch.prelu(x, weight)
    assert_same(torch.vmap(lambda x: check_memory(x) or x)(x), x)
    threshold(1000)
    assert_same(torch.vmap(prelu, (0, None))(x[:, None], weight)[:, 0], expected)


@pytest.mark.parametrize(
    ("kind", "reduction"),
    [(Kind.FLAT, "last program"), (Kind.COLUMN, "last program"), (Kind.COLUMN, "second launch")],
    ids=id_of,
)
def test_forward_and_backward_in_threads_are_those_of_one(kind, reduction, device, force, launches):
    force(kind, reduction)
    weight = randn((1 if kind is Kind.FLAT else 3,), torch.float32, device)
    inputs = [randn((2, 3, 40), torch.float32, device, seed) for seed in range(8)]

    def step(x):
        return backward(prelu, x, weight, x)

    expected = [step(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        given = list(pool.map(step, inputs))
    for results, alone in zip(given, expected, strict=True):
        for result, reference in zip(results, alone, strict=True):
            assert_same(result, reference)


@pytest.mark.gpu
def test_threads_on_streams_of_their_own(device, force):
    force(Kind.FLAT)  # its last program counts the others, on each stream for itself
    weight = randn((1,), torch.float32, device)
    inputs = [randn((2**20,), torch.float32, device, seed) for seed in range(4)]
    expected = [backward(prelu, x, weight, x) for x in inputs]
    torch.cuda.synchronize()

    def steps(x):
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [backward(prelu, x, weight, x) for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        return results

    with ThreadPoolExecutor(len(inputs)) as pool:
        for runs, alone in zip(pool.map(steps, inputs), expected, strict=True):
            for results in runs:
                for result, reference in zip(results, alone, strict=True):
                    assert_same(result, reference)


# In a process of its own: PyTorch's backward refuses to run in a child of one that used a GPU.
FORK = """
import multiprocessing, torch, prelu_gpu
from prelu_gpu import run
from prelu_gpu.backend import INTERPRETED

launched = []
noting = run.intercepting(lambda *call: (launched.append(call), run.execute(*call)))
noting.__enter__()

def step(seed):
    torch.manual_seed(seed)
    module = prelu_gpu.PReLU(3)
    x = torch.randn(4, 3, 5, requires_grad=True)
    y = module(x)
    y.square().sum().backward()
    return [t.tolist() for t in (y, x.grad, module.weight.grad)]

def child(seed, queue):
    before = len(launched)
    queue.put((step(seed), len(launched) > before))

context = multiprocessing.get_context("fork")
torch.set_num_threads(1)
for used in ("after the import", "after use"):
    queue = context.Queue()
    children = [context.Process(target=child, args=(seed, queue)) for seed in (1, 1)]
    for process in children:
        process.start()
    results = [queue.get(timeout=60) for _ in children]
    for process in children:
        process.join()
        assert process.exitcode == 0
    expected = step(1)
    assert results == [(expected, INTERPRETED)] * 2, used
print("ok")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_children_that_were_forked_compute_what_their_parent_computes():
    assert run_program(FORK)[0] == "ok\n"


class Image(torch.Tensor):
    """A subclass whose results are of it too."""


class Boxes(torch.Tensor):
    """A subclass whose results are plain tensors, as torchvision's tv_tensors."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def subclass(kind, tensor):
    return LoggingTensor(tensor) if kind is LoggingTensor else tensor.clone().as_subclass(kind)


def plain(tensor):
    return getattr(tensor, "elem", tensor).detach().as_subclass(torch.Tensor)


FUNCTIONS = {
    "prelu": (prelu, torch.prelu),
    "leaky_relu": (lambda x, _: leaky_relu(x, 0.1), lambda x, _: nn.functional.leaky_relu(x, 0.1)),
    "module": (
        lambda x, weight: torch.func.functional_call(prelu_gpu.PReLU(3), {"weight": weight}, (x,)),
        torch.prelu,
    ),
}


@pytest.mark.parametrize("kind", [Image, Boxes, LoggingTensor])
@pytest.mark.parametrize("wrapped", ["x", "weight", "x and weight"])
@pytest.mark.parametrize(("function", "reference"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_subclasses_that_do_not_know_our_operators(
    kind, wrapped, function, reference, x, weight, monkeypatch
):
    x = integers(x.shape, x.dtype, x.device)  # for sums that are the same in any order
    # Its records are no messages to whoever formats all records.
    monkeypatch.setattr(logging.getLogger("LoggingTensor"), "propagate", False)
    outcomes = []
    for f in (function, reference):
        leaves = [
            (subclass(kind, tensor) if name in wrapped else tensor.clone()).requires_grad_()
            for name, tensor in (("x", x), ("weight", weight))
        ]
        with capture_logs() as log:
            y = f(*leaves)
            gradients = torch.autograd.grad(y.sum(), leaves, allow_unused=True)
        outcomes.append((y, gradients, log))
    (y, gradients, log), (expected_y, expected_gradients, expected_log) = outcomes
    assert log == expected_log, "what dispatches sees PyTorch's operators"
    for given, expected in zip((y, *gradients), (expected_y, *expected_gradients), strict=True):
        assert type(given) is type(expected)
        if expected is not None:
            assert_same(plain(given), plain(expected))


def test_a_slope_that_is_a_parameter_of_a_subclass_trains(x):
    x = integers(x.shape, x.dtype, x.device)  # for sums that are the same in any order
    weights = []
    for kind in (nn.PReLU, prelu_gpu.PReLU):
        module = kind(3, device=x.device)
        module.weight = nn.Parameter(module.weight.detach().as_subclass(Image))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        module(x).sum().backward()
        optimizer.step()
        weights.append(module.weight)
    assert type(weights[1]) is type(weights[0])
    assert_same(*map(plain, weights))
    assert not torch.equal(plain(weights[1]), torch.full_like(plain(weights[1]), 0.25))
