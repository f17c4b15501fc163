"""What people train with: the same beside torch.nn.PReLU and beside an accelerated one.

Inputs and output gradients are small whole numbers and slopes are powers of 2, so that every
product and sum is exact: results are equal bit for bit, slope gradients too.
"""

import contextlib
import copy
import doctest

import pytest
import torch
from support import DTYPES, assert_same, id_of, integers
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import prelu_gpu
from prelu_gpu.rules import Kind

SLOPES = (0.25, -0.5, 2.0)


def modules(device, dtype=torch.float32):
    """A torch.nn.PReLU and the same accelerated."""
    plain = nn.PReLU(len(SLOPES), device=device, dtype=dtype)
    with torch.no_grad():
        plain.weight.copy_(torch.tensor(SLOPES))
    return plain, prelu_gpu.accelerate(copy.deepcopy(plain))


def results(call, module, device, dtype=torch.float32, shape=(4, 3, 10)):
    """What a call gives, and what its backward does; what it yields was seen on the way."""
    seen = []
    x = integers(shape, dtype, device).requires_grad_()
    y = call(module, x, seen.append)
    y.backward(integers(y.shape, y.dtype, device, seed=1))
    return [y.detach(), x.grad, *(p.grad for p in module.parameters()), *seen]


def assert_all_same(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        if isinstance(theirs, torch.Tensor):
            assert_same(ours, theirs)
        else:
            assert ours == theirs


def assert_equal_to_torchs(call, device, dtype=torch.float32, shape=(4, 3, 10)):
    plain, fast = modules(device, dtype)
    expected = results(call, plain, device, dtype, shape)
    assert_all_same(results(call, fast, device, dtype, shape), expected)


# How a module is called


def alone(module, x, see):
    return module(x)


def checkpointed(module, x, see):
    return checkpoint(module, x, use_reentrant=False)


def checkpointed_reentrantly(module, x, see):
    return checkpoint(module, x, use_reentrant=True)


def checkpointed_twice(module, x, see):
    return checkpoint(
        lambda x: checkpoint(module, x, use_reentrant=False) * 2, x, use_reentrant=False
    )


def saved_on_cpu(module, x, see):
    with torch.autograd.graph.save_on_cpu(pin_memory=x.is_cuda):
        return module(x)


def saved_as_arrays(module, x, see):
    def unpack(array):
        see("unpacked")
        return torch.from_numpy(array).to(x.device)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().cpu().numpy(), unpack):
        return module(x)


def with_forward_hooks(module, x, see):
    def before(module, args, kwargs):
        see(args[0].detach().clone())
        return (args[0] * 2,), kwargs

    def after(module, args, y):
        see(y.detach().clone())
        return y * 2

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after)
    module.register_forward_hook(lambda *_: see("always"), always_call=True)
    return module(x)


def with_backward_hooks(module, x, see):
    def before(module, grad_output):
        see(grad_output[0].clone())
        return (grad_output[0] * 2,)

    def after(module, grad_input, grad_output):
        see(grad_input[0].clone())
        see(grad_output[0].clone())
        return (grad_input[0] * 2,)

    module.register_full_backward_pre_hook(before)
    module.register_full_backward_hook(after)
    return module(x)


def with_a_hook_on_the_slope(module, x, see):
    module.weight.register_hook(lambda gradient: see(gradient.clone()) or gradient * 2)
    torch.autograd.graph.register_multi_grad_hook(
        (x, module.weight), lambda gradients: see([g.tolist() for g in gradients])
    )
    return module(x)


def with_a_hook_after_the_slopes_gradient(module, x, see):
    def step(weight):
        see(weight.grad.clone())
        weight.grad = None

    module.weight.register_post_accumulate_grad_hook(step)
    return module(x)


def with_hooks_on_the_node(module, x, see):
    y = module(x)
    y.grad_fn.register_prehook(lambda gradients: (gradients[0] * 2,))
    y.grad_fn.register_hook(lambda gradient_inputs, gradient_outputs: see(gradient_outputs[0] / 2))
    return y


def with_the_slope_of_a_caller(module, x, see):
    slope = torch.tensor([4.0, 0.5, 1.0], device=x.device, requires_grad=True)
    slope.register_hook(lambda gradient: see(gradient.clone()))
    return torch.func.functional_call(module, {"weight": slope * 2}, (x,))


def as_a_replica(module, x, see):
    """As torch.nn.parallel.replicate makes one for each device."""
    replica = module._replicate_for_data_parallel()
    replica.weight = module.weight * 2
    return replica(x)


def in_data_parallel(module, x, see):
    return nn.DataParallel(module, device_ids=[x.device.index] if x.is_cuda else None)(x)


def used_twice(module, x, see):
    return module(module(x) + 1)


def its_gradient_twice(module, x, see):
    y = module(x)
    y.sum().backward(retain_graph=True)
    return y


def parametrised(module, x, see):
    parametrize.register_parametrization(module, "weight", Range())
    with parametrize.cached():
        return module(x) + module(2 * x)


def its_sign_and_size_apart(module, x, see):
    parametrizations.weight_norm(module)  # of single slopes: sizes and signs
    return module(x)


def pruned(module, x, see):
    prune.custom_from_mask(module, "weight", torch.tensor([1, 0, 1], device=x.device))
    return module(x)


class Range(nn.Module):
    def forward(self, weight):
        return weight.clamp(0.0, 1.0)


CALLS = (
    *(alone, checkpointed, checkpointed_reentrantly, checkpointed_twice, saved_on_cpu),
    *(saved_as_arrays, with_forward_hooks, with_backward_hooks, with_a_hook_on_the_slope),
    *(with_a_hook_after_the_slopes_gradient, with_hooks_on_the_node, with_the_slope_of_a_caller),
    *(as_a_replica, in_data_parallel, used_twice, its_gradient_twice, parametrised),
    *(its_sign_and_size_apart, pruned),
)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_a_module_is_called(call, device, launches):
    assert_equal_to_torchs(call, device)


# Where it is called


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic(warn_only):
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


CONTEXTS = {
    "anomaly mode": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "deterministic": lambda: deterministic(False),
    "deterministic, else a warning": lambda: deterministic(True),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype float16": lambda: default_dtype(torch.float16),
    "saved on cpu": torch.autograd.graph.save_on_cpu,
    "no threads of autograd": lambda: torch.autograd.set_multithreading_enabled(False),
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("call", [alone, checkpointed], ids=lambda call: call.__name__)
def test_a_module_is_trained_in(context, call, device, force, launches):
    force(Kind.PLANE, "second launch")  # needs memory for sums of its own

    def inside(module, x, see):
        with context():
            y = call(module, x, see)
            y.backward(torch.ones_like(y), retain_graph=True)
        return y

    assert_equal_to_torchs(inside, device)


@pytest.mark.parametrize("kind", [prelu_gpu.PReLU, lambda n: prelu_gpu.SharedAxesPReLU((n,))])
def test_slopes_are_made_in_the_default_dtype(kind):
    with default_dtype(torch.float64):
        assert kind(3).weight.dtype is torch.float64


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("slopes", [1, 3])
def test_anomaly_mode_names_the_backward_that_made_nan_and_its_forward(slopes, device, launches):
    module = prelu_gpu.PReLU(slopes, init=0.0, device=device)
    x = -torch.ones(2, 3, device=device, requires_grad=True)
    with torch.autograd.detect_anomaly():
        y = module(x)
        with (
            pytest.warns(UserWarning, match="(?s)Error detected in PReLUFunctionBackward.*y = mod"),
            pytest.raises(
                RuntimeError,
                match="'PReLUFunctionBackward' returned nan values in its 0th output",
            ),
        ):
            y.backward(torch.full_like(y, torch.inf))


@pytest.mark.parametrize("kind", [nn.PReLU, prelu_gpu.PReLU])
def test_a_slope_that_changed_since_the_forward_is_an_error(kind, device):
    module = kind(3, device=device)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    y = module(torch.ones(2, 3, device=device, requires_grad=True))
    y.sum().backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: .* version 2"):
        y.sum().backward()


@pytest.mark.parametrize("kind", [nn.PReLU, prelu_gpu.PReLU])
def test_what_inference_mode_made_is_not_trained_on(kind, device):
    module = kind(3, device=device)
    with torch.inference_mode():
        x = module(torch.ones(2, 3, device=device))
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        module(x)
    with torch.no_grad():
        assert_same(module(x), x.clone())


# What a module is turned into


@pytest.mark.parametrize("first", ["accelerated", "converted"])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
def test_modules_of_other_dtypes(dtype, swap, first, device, launches):
    plain, _ = modules(device)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        convert = {
            torch.float16: nn.Module.half,
            torch.bfloat16: nn.Module.bfloat16,
            torch.float64: nn.Module.double,
            torch.float32: nn.Module.float,
        }[dtype]
        steps = [prelu_gpu.accelerate, convert][:: 1 if first == "accelerated" else -1]
        fast = steps[1](steps[0](copy.deepcopy(plain)))
        convert(plain)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    expected = results(alone, plain, device, dtype)
    assert_all_same(results(alone, fast, device, dtype), expected)


def network(device):
    """With gradients that are whole numbers too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.PReLU(3), nn.Conv2d(3, 2, 1), nn.PReLU())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(integers(parameter.shape, parameter.dtype, "cpu", high=1))
        model[1].weight.copy_(torch.tensor(SLOPES))
    return model.to(device)


def step_of(model, x):
    model.zero_grad()
    y = model(x)
    y.backward(integers(y.shape, y.dtype, y.device, seed=1))
    return [y.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_networks_of_another_memory_format(layout, device, launches):
    plain = network(device)
    fast = prelu_gpu.accelerate(copy.deepcopy(plain)).to(memory_format=layout)
    plain.to(memory_format=layout)
    x = integers((2, 2, 6, 5), torch.float32, device).to(memory_format=layout)
    expected, given = step_of(plain, x), step_of(fast, x)
    assert given[0].is_contiguous(memory_format=layout)
    assert_all_same(given, expected)


@pytest.mark.parametrize("assign", [False, True])
def test_networks_that_go_by_way_of_the_meta_device(assign, device, launches):
    plain = network(device)
    fast = prelu_gpu.accelerate(copy.deepcopy(plain)).to("meta")
    assert [p.device.type for p in fast.parameters()] == ["meta"] * 6
    assert fast(torch.empty(2, 2, 6, 5, device="meta")).shape == (2, 2, 6, 5)
    fast = fast if assign else fast.to_empty(device=device)
    fast.load_state_dict(plain.state_dict(), assign=assign)
    assert [type(m) for m in fast[1::2]] == [prelu_gpu.PReLU] * 2
    x = integers((2, 2, 6, 5), torch.float32, device)
    expected = step_of(plain, x)
    assert_all_same(step_of(fast.train(), x), expected)


@pytest.mark.gpu
def test_networks_that_go_to_the_gpu_and_back(device, launches):
    plain = network("cpu")
    fast = prelu_gpu.accelerate(copy.deepcopy(plain))
    x = integers((2, 2, 6, 5), torch.float32, "cpu")
    for place in (device, "cpu", device):
        launches.clear()
        expected = step_of(plain.to(place), x.to(place))
        assert_all_same(step_of(fast.to(place), x.to(place)), expected)
        assert bool(launches) == (place is device)


def test_averages_of_a_model(device, launches):
    averages = []
    for model in (network(device), prelu_gpu.accelerate(network(device))):
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        for seed in range(3):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(integers(parameter.shape, parameter.dtype, device, seed))
            average.update_parameters(model)
        assert type(average.module[1]) is type(model[1])
        y = average(integers((2, 2, 6, 5), torch.float32, device))
        averages.append([p.detach() for p in (*average.parameters(), y)])
    assert averages[0][2].frac().any(), "an average, not the last slopes"
    assert_all_same(*averages)


def test_gradients_of_parts_of_a_batch_add_up(device, launches):
    x = integers((4, 2, 6, 5), torch.float32, device)
    sums = []
    for model in (network(device), prelu_gpu.accelerate(network(device))):
        for part in x.chunk(4):
            model(part).sum().backward()
        whole = copy.deepcopy(model)
        whole.zero_grad()
        whole(x).sum().backward()
        parts = [parameter.grad for parameter in model.parameters()]
        assert_all_same(parts, [parameter.grad for parameter in whole.parameters()])
        sums.append(parts)
    assert_all_same(*sums)


# Mixed precision


def test_a_scaler_skips_the_step_that_overflows_and_makes_the_next(device, launches):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 3), nn.PReLU(3), nn.Linear(3, 2)).to(device)
    x = integers((8, 4), torch.float32, device)
    for model in (plain, prelu_gpu.accelerate(copy.deepcopy(plain))):
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**20, backoff_factor=2.0**-10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for scale in (2.0**20, 2.0**10):
            before = [parameter.detach().clone() for parameter in model.parameters()]
            assert scaler.get_scale() == scale
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.float16):
                y = model(x)
            assert y.dtype is torch.float16
            scaler.scale(y.float().square().mean()).backward()
            assert model[1].weight.grad.dtype is torch.float32
            scaler.step(optimizer)
            scaler.update()
            same = [torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
            assert same == [scale == 2.0**20] * len(same)
        assert scaler.get_scale() == 2.0**10


@pytest.mark.parametrize("kind", [nn.PReLU, prelu_gpu.PReLU])
def test_an_overflow_that_only_slopes_see_skips_the_step(kind, device):
    model = kind(3).to(device)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**120)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    y = model(torch.full((2, 3), -1.0, device=device))
    scaler.scale((y * 2.0**20).sum()).backward()
    assert model.weight.grad.isinf().all()
    scaler.step(optimizer)
    scaler.update()
    assert model.weight.tolist() == [0.25] * 3
    assert scaler.get_scale() == 2.0**119


def test_autocast_of_a_model_is_pytorchs_where_its_slopes_need_no_rounding(device, launches):
    outcomes = []
    x = integers((1, 2, 3, 3), torch.float32, device)
    for model in (network(device), prelu_gpu.accelerate(network(device))):
        with torch.autocast(device.type, torch.float16):
            outcomes.append(step_of(model, x))
    assert outcomes[1][0].dtype is torch.float16
    assert_all_same(*outcomes)


# Slopes in a range


def test_slopes_stay_in_the_range_of_their_parametrisation(device, launches):
    module = prelu_gpu.PReLU(3, device=device)
    parametrize.register_parametrization(module, "weight", Range())
    weight = module.parametrizations.weight.original
    with torch.no_grad():
        weight.copy_(torch.tensor([0.5, 0.5, 2.0]))  # the last one is outside
    x = -torch.ones(4, 3, device=device)
    given = module(x)
    grad_y = torch.tensor([1.0, -1.0, 1.0], device=device).expand(4, 3)
    (expected,) = torch.autograd.grad(torch.prelu(x, weight.clamp(0.0, 1.0)), weight, grad_y)
    given.backward(grad_y)
    assert_same(weight.grad, expected)
    assert weight.grad.tolist() == [-4.0, 4.0, 0.0]
    torch.optim.SGD(module.parameters(), lr=1.0).step()
    assert weight.tolist() == [4.5, -3.5, 2.0]
    assert module.weight.tolist() == [1.0, 0.0, 1.0]
    assert_same(module(x).detach(), torch.prelu(x, torch.tensor([1.0, 0.0, 1.0], device=device)))


@pytest.mark.parametrize("documented", [prelu_gpu.PReLU, prelu_gpu.parameter_groups])
def test_examples_of_the_documentation_run(documented):
    names = {"torch": torch, "prelu_gpu": prelu_gpu, "PReLU": prelu_gpu.PReLU}
    (example,) = doctest.DocTestFinder(recurse=False).find(documented, globs=names)
    assert example.examples
    assert doctest.DocTestRunner().run(example, clear_globs=False).failed == 0
    if documented is prelu_gpu.PReLU:
        act = example.globs["act"]
        with torch.no_grad():
            act.parametrizations.weight.original.fill_(3.0)
        assert act.weight.tolist() == [1.0] * 64


# CUDA graphs


@pytest.mark.gpu
def test_a_captured_step_is_that_of_its_inputs_at_each_replay(device, launches):
    plain, fast = modules(device)
    x = integers((64, 3, 1000), torch.float32, device).requires_grad_()
    grad_y = integers(x.shape, x.dtype, device, seed=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            fast(x).backward(grad_y)
    torch.cuda.current_stream().wait_stream(stream)
    x.grad = fast.weight.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fast(x)
        y.backward(grad_y)
    for seed in (2, 3, 4):
        with torch.no_grad():
            x.copy_(integers(x.shape, x.dtype, device, seed))
            fast.weight.mul_(2)
            plain.weight.copy_(fast.weight)
        graph.replay()
        leaf = x.detach().requires_grad_()
        plain.zero_grad()
        plain(leaf).backward(grad_y)
        expected = [plain(leaf), leaf.grad, plain.weight.grad]
        assert_all_same([y, x.grad, fast.weight.grad], expected)


@pytest.mark.gpu
def test_graphed_callables(device, launches):
    plain, fast = (
        model.to(device) for model in (network("cpu"), prelu_gpu.accelerate(network("cpu")))
    )
    x = integers((2, 2, 6, 5), torch.float32, device)
    fast = torch.cuda.make_graphed_callables(fast, (x.clone(),))
    for seed in (1, 2):
        x = integers(x.shape, x.dtype, device, seed)
        expected = step_of(plain, x)
        assert_all_same(step_of(fast, x), expected)
