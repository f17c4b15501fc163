"""torch.compile: whole graphs, PyTorch's forward for the compiler to fuse, our backward."""

import functools

import pytest
import torch
from support import assert_same, id_of, randn
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import metrics
from torch.func import grad, jvp, vmap
from torch.testing._internal.two_tensor import TwoTensor

import prelu_gpu
from prelu_gpu import leaky_relu, prelu

SHAPE = (4, 3, 8)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def step(function, x, *parameters):
    """The output, and the gradients of what requires one."""
    x = x.detach().requires_grad_()
    y = function(x)
    grad_y = randn(y.shape, y.dtype, y.device, seed=5)
    leaves = [leaf for leaf in (x, *parameters) if leaf.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]


def assert_same_step(compiled, function, x, *parameters):
    given, expected = (step(f, x, *parameters) for f in (compiled, function))
    assert len(given) == len(expected)
    for actual, exact in zip(given, expected, strict=True):
        assert_same(actual, exact)


class Functional(nn.PReLU):
    """A module of others that calls our function."""

    def forward(self, x):
        return prelu_gpu.prelu(x, self.weight)


MODULES = {
    "function": lambda: Functional(3),
    "per channel": lambda: prelu_gpu.PReLU(3),
    "shared": prelu_gpu.PReLU,
    "last dimension": lambda: prelu_gpu.PReLU(8, dim=-1),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_one_graph_for_every_batch_size_after_the_first(make, device, launches):
    module = make().to(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for batch in (4, 5, 7, 16, 2):
        x = randn((batch, *SHAPE[1:]), torch.float32, device)
        launches.clear()
        compiled(x.requires_grad_()).sum().backward()
        assert {name.partition("_")[2] for name in launches} <= {"backward", "partials"}
        assert launches, "not our backward"
        assert_same_step(compiled, module, x, module.weight)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_is_the_compilers_alone(mode, device):
    module = prelu_gpu.PReLU(3).to(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    with mode():
        for batch in (4, 5, 7):
            x = randn((batch, *SHAPE[1:]), torch.float32, device)
            assert_same(compiled(x), module(x))
    assert counter.frame_count <= 2
    targets = {str(node.target) for graph in counter.graphs for node in graph.graph.nodes}
    assert not any("prelu_gpu" in target for target in targets)


def test_inductor_fuses_the_forward_with_what_is_around_it(device, launches):
    module = prelu_gpu.PReLU(3).to(device)
    compiled = torch.compile(lambda x: module(x * 2 + 1) * 3 - x, fullgraph=True)
    x = randn(SHAPE, torch.float32, device).requires_grad_()
    metrics.reset()
    y = compiled(x)
    assert metrics.generated_kernel_count == 1
    given = torch.autograd.grad(y.sum(), (x, module.weight))
    assert "column_backward" in launches
    expected = module(x * 2 + 1) * 3 - x
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(given, torch.autograd.grad(expected.sum(), (x, module.weight)))


def test_the_input_and_the_slope_are_saved_and_nothing_else(device):
    module = prelu_gpu.PReLU(3).to(device)
    x = randn(SHAPE, torch.float32, device).requires_grad_()
    y = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    saved = y.grad_fn.saved_tensors
    assert {tensor.data_ptr() for tensor in saved} == {x.data_ptr(), module.weight.data_ptr()}
    assert len(saved) == 2


def test_a_frozen_slope_costs_nothing(device, launches):
    module = prelu_gpu.PReLU(3).to(device).requires_grad_(False)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = randn(SHAPE, torch.float32, device)
    step(compiled, x)
    assert launches == ["column_backward"]
    assert_same_step(compiled, module, x)


def test_an_input_without_gradient(device, launches):
    module = prelu_gpu.PReLU(3).to(device)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = randn(SHAPE, torch.float32, device)
    given, expected = (
        torch.autograd.grad(f(x).sum(), module.weight)[0] for f in (compiled, module)
    )
    assert_same(given, expected)
    assert launches.count("column_backward") == 2


@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16], ids=id_of)
@pytest.mark.parametrize("slope", ["the input's", "float32", "autocast"])
def test_half_precision_is_rounded_as_without_the_compiler(given, slope, device):
    module = prelu_gpu.PReLU(3, dtype=given if slope == "the input's" else None, device=device)
    x = randn(SHAPE, torch.float32 if slope == "autocast" else given, device)

    def function(x):
        with torch.autocast(device.type, given, enabled=slope == "autocast"):
            return module(x)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_same_step(compiled, function, x, module.weight)


def test_a_network_that_was_accelerated(device, launches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.PReLU(4), nn.Conv1d(4, 2, 3), nn.PReLU())
    prelu_gpu.accelerate(model.to(device))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = randn((2, 3, 9), torch.float32, device)
    given = step(compiled, x, *model.parameters())
    assert len(launches) >= 2
    for actual, exact in zip(given, step(model, x, *model.parameters()), strict=True):
        torch.testing.assert_close(actual, exact)


TRANSFORMS = {
    "vmap": lambda prelu, x, weight: vmap(lambda x: prelu(x.unsqueeze(0), weight))(x),
    "gradients of each sample": lambda prelu, x, weight: vmap(
        grad(lambda x: prelu(x.unsqueeze(0), weight).sin().sum())
    )(x),
    "forward mode": lambda prelu, x, weight: jvp(lambda x: prelu(x, weight), (x,), (x,)),
}


@pytest.mark.parametrize("transformed", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_in_a_compiled_function(transformed, device):
    x = randn(SHAPE, torch.float32, device).requires_grad_()
    weight = randn((3,), torch.float32, device, seed=1).requires_grad_()
    given, expected = (
        torch.compile(functools.partial(transformed, prelu), backend="aot_eager", fullgraph=True)(
            x, weight
        )
        for prelu in (prelu_gpu.prelu, torch.prelu)
    )
    torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_backward_in_a_compiled_function(backend, device, launches):
    """A graph break runs it, and Dynamo compiles neither our operator nor Triton's Python."""
    module = prelu_gpu.PReLU(3).to(device)
    x = randn(SHAPE, torch.float32, device)

    def train(x):
        loss = module(x).square().sum()
        loss.backward()
        return loss

    results = []
    for run in (train, torch.compile(train, backend=backend)):
        module.zero_grad()
        launches.clear()
        results.append((run(x), module.weight.grad))
        assert "column_backward" in launches
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("wrapped", ["the input", "the slope"])
def test_a_tensor_subclass_that_does_not_know_our_operators(wrapped, device, monkeypatch):
    dispatch = TwoTensor.__torch_dispatch__

    def aten_only(func, types, args=(), kwargs=None):
        assert func.namespace in ("aten", "prims")
        return dispatch(func, types, args, kwargs)

    monkeypatch.setattr(TwoTensor, "__torch_dispatch__", staticmethod(aten_only))
    x, weight = randn(SHAPE, torch.float32, device), torch.ones(3, device=device)
    if wrapped == "the input":
        x = TwoTensor(x, x)
    else:
        weight = TwoTensor(weight, weight)
    weight.requires_grad_()
    given, expected = (
        torch.autograd.grad(torch.compile(prelu, backend="aot_eager")(x, weight).sum(), weight)[0]
        for prelu in (prelu_gpu.prelu, torch.prelu)
    )
    torch.testing.assert_close(given.a, expected.a)


def test_slopes_that_broadcast(device):
    x = randn(SHAPE, torch.float32, device)
    weight = randn((1, 3, 8), torch.float32, device, seed=1).requires_grad_()
    compiled = torch.compile(prelu_gpu.prelu, backend="aot_eager", fullgraph=True)
    given, expected = (
        step(lambda x, f=f: f(x, weight), x, weight) for f in (compiled, prelu_gpu.prelu)
    )
    torch.testing.assert_close(given, expected)


def test_a_graph_does_not_depend_on_the_size(device, launches, threshold):
    threshold(2**22)
    module = prelu_gpu.PReLU(3).to(device)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    step(compiled, randn(SHAPE, torch.float32, device), module.weight)
    assert "column_backward" in launches


@pytest.mark.gpu
def test_cuda_graphs_of_the_compiler(device):
    module = prelu_gpu.PReLU(64).to(device)
    compiled = torch.compile(module, mode="reduce-overhead", fullgraph=True)
    for seed in range(5):
        x = randn((8, 64, 33, 33), torch.float32, device, seed=seed)
        torch.compiler.cudagraph_mark_step_begin()
        given = [tensor.clone() for tensor in step(compiled, x, module.weight)]
        for actual, exact in zip(given, step(module, x, module.weight), strict=True):
            torch.testing.assert_close(actual, exact)


BACKWARDS = {
    "y.backward() in a compiled function": lambda y, leaves: torch.compile(
        lambda y: y.sum().backward(), backend="eager"
    )(y),
    "compiled autograd": lambda y, leaves: compiled_autograd(y),
}


def compiled_autograd(y):
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        y.sum().backward()


@pytest.mark.parametrize("backward_of", BACKWARDS.values(), ids=BACKWARDS)
@pytest.mark.parametrize("function", ["prelu", "leaky_relu"])
def test_the_backward_of_an_eager_forward_is_compiled(function, backward_of, device):
    gradients = []
    for compiled in (False, True):
        x = randn((4, 3, 5), torch.float32, device).requires_grad_()
        weight = randn((3,), torch.float32, device, seed=1).requires_grad_()
        y = prelu(x, weight) if function == "prelu" else leaky_relu(x, 0.1) + 0 * weight.sum()
        if compiled:
            backward_of(y, (x, weight))
        else:
            y.sum().backward()
        gradients.append((x.grad, weight.grad))
    torch.testing.assert_close(*gradients)
