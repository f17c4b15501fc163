"""enable, disable, enabled: PyTorch's own operators on the kernels."""

import functools
import itertools
import os
import threading
import timeit
import warnings
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack

import pytest
import torch
from support import DTYPES, assert_right, assert_same, backward, id_of, randn, run_program
from torch import nn
from torch._subclasses import CrossRefFakeMode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import prelu_gpu
from prelu_gpu import launch, override
from prelu_gpu.run import execute, intercepting

SHAPE = (4, 3, 40)
OPERATORS = ("aten::_prelu_kernel", "aten::_prelu_kernel_backward")


def table():
    """PyTorch's operators, as the dispatcher lists them."""
    return [torch._C._dispatch_dump_table(name) for name in OPERATORS]


@pytest.fixture(autouse=True)
def everything_is_restored(device, monkeypatch):
    """Threads that others left in this process do not count, as a compiler's."""
    count, others = threading.active_count, threading.active_count() - 1
    monkeypatch.setattr(threading, "active_count", lambda: count() - others)
    prelu_gpu.disable(device.type)
    before = table()
    assert not any("override.py" in operators for operators in before)
    yield
    after, served = table(), set(override._SERVED)
    prelu_gpu.disable(device.type)
    assert after == before
    assert not served
    assert not any(override._BLOCKS.values())


@pytest.fixture
def served(x, weight):
    """Whether torch.prelu reaches the kernels."""

    def reaches():
        launched = []
        with intercepting(lambda *call: launched.append(call) or execute(*call)):
            torch.prelu(x, weight)
        return bool(launched)

    return reaches


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize("slopes", [3, 1])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "slice"])
def test_forward_and_gradients(dtype, slopes, layout, device, launches):
    x = randn((4, 3, 5, 8), dtype, device)
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "slice":
        x = randn((4, 6, 5, 8), dtype, device)[:, 3:]
    weight = randn((slopes,), dtype, device, seed=1)
    grad_y = randn(x.shape, dtype, device, seed=2)
    y, grad_x, _ = backward(torch.prelu, x, weight, grad_y)
    assert launches == []

    with prelu_gpu.enabled(device.type):
        given = backward(F.prelu, x, weight, grad_y)
    assert any(name.endswith("forward") for name in launches)
    assert any(name.endswith("backward") for name in launches)
    assert_same(given[0], y)
    assert_same(given[1], grad_x)
    assert_right(grad_y, x, weight, grad_weight=given[2])


@pytest.mark.parametrize("shape", [(), (1,), (7,), (1, 1), (0, 3), (2, 0), (2, 3), (1, 3, 1)])
def test_shapes_at_the_edge(shape, device):
    x = randn(shape, torch.float32, device)
    weight = randn((shape[1] if len(shape) > 1 else 1,), torch.float32, device, seed=1)
    grad_y = randn(shape, torch.float32, device, seed=2)
    expected = backward(torch.prelu, x, weight, grad_y)
    with prelu_gpu.enabled(device.type):
        given = backward(torch.prelu, x, weight, grad_y)
    for actual, exact in zip(given, expected, strict=True):
        assert actual.shape == exact.shape
        torch.testing.assert_close(actual, exact)


def test_a_module_that_nobody_changed(device, launches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.PReLU(4), nn.Conv1d(4, 2, 3), nn.PReLU())
    model.to(device)
    x = randn((2, 3, 9), torch.float32, device).requires_grad_()
    leaves = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x).square().sum(), leaves)
    prelu_gpu.enable(device.type)
    try:
        given = torch.autograd.grad(model(x).square().sum(), leaves)
        assert {type(module) for module in model} == {nn.Conv1d, nn.PReLU}
    finally:
        prelu_gpu.disable(device.type)
    assert len(launches) >= 4
    for actual, exact in zip(given, expected, strict=True):
        torch.testing.assert_close(actual, exact)


def test_a_backward_outside_of_the_block_is_pytorchs(device, x, weight, launches):
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    with prelu_gpu.enabled(device.type):
        loss = torch.prelu(*leaves).square().sum()
    expected = torch.autograd.grad(torch.prelu(*leaves).square().sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), expected)
    assert launches == ["column_forward"]


def test_enable_and_disable_any_number_of_times(device, served):
    before = table()
    for switch in (prelu_gpu.disable, prelu_gpu.enable, prelu_gpu.enable, prelu_gpu.disable):
        switch(device.type)
        assert served() == (switch is prelu_gpu.enable)
    prelu_gpu.disable(device.type)
    assert table() == before


def test_blocks_in_blocks_restore_what_was_before_each(device, served):
    with prelu_gpu.enabled(device.type):
        with prelu_gpu.enabled(device.type):
            assert served()
        assert served()
        prelu_gpu.disable(device.type)
        assert not served()
        with prelu_gpu.enabled(device.type):
            assert served()
        assert not served()
        prelu_gpu.enable(device.type)
    assert not served()
    prelu_gpu.enable(device.type)
    with prelu_gpu.enabled(device.type):
        prelu_gpu.disable(device.type)
    assert served()
    prelu_gpu.disable(device.type)


def test_an_exception_in_a_block_passes_and_restores(device, served):
    def fail():
        with prelu_gpu.enabled(device.type):
            assert served()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not served()


def test_a_decorator(device, served):
    function = prelu_gpu.enabled(device.type)(served)
    assert function()
    assert function()
    assert not served()


def test_blocks_of_two_threads_that_overlap(device, served):
    """The first to open is the first to close: the second still sees the kernels."""
    first, second = (prelu_gpu.enabled(device.type) for _ in range(2))
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        one.submit(first.__enter__).result()
        other.submit(second.__enter__).result()
        one.submit(first.__exit__, None, None, None).result()
        assert served()
        assert other.submit(served).result()
        other.submit(second.__exit__, None, None, None).result()
        assert not served()
    prelu_gpu.disable(device.type)


def test_threads_compute_while_others_switch(device, x, weight):
    """No call is without an operator, or half of one."""
    grad_y = randn(SHAPE, torch.float32, device, seed=2)
    expected = backward(torch.prelu, x, weight, grad_y)
    done = threading.Event()

    def compute():
        for _ in range(8):
            given = backward(torch.prelu, x, weight, grad_y)
            assert_same(given[0], expected[0])
            assert_same(given[1], expected[1])
            torch.testing.assert_close(given[2], expected[2])

    def switch():
        while not done.is_set():
            with prelu_gpu.enabled(device.type):
                torch.prelu(x, weight)

    prelu_gpu.enable(device.type)
    with ThreadPoolExecutor(4) as pool:
        switching = [pool.submit(switch) for _ in range(2)]
        try:
            for computing in [pool.submit(compute) for _ in range(2)]:
                computing.result()
        finally:
            done.set()
        for thread in switching:
            thread.result()
    prelu_gpu.disable(device.type)


def test_one_thread_switches_at_a_time(device, served, monkeypatch):
    entered, leave = threading.Event(), threading.Event()
    override_operators = override._override

    def slowly(device_type):
        entered.set()
        assert leave.wait(10)
        return override_operators(device_type)

    monkeypatch.setattr(override, "_override", slowly)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(prelu_gpu.enable, device.type)
        assert entered.wait(10)
        second = pool.submit(prelu_gpu.disable, device.type)
        assert not wait([second], timeout=0.1).done
        leave.set()
        first.result()
        second.result()
        assert not served()
    prelu_gpu.disable(device.type)


def test_beside_other_threads_the_table_stays_and_calls_are_pytorchs(device, served):
    before = table()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        with prelu_gpu.enabled(device.type):
            assert served()
        assert not served()
        assert table() != before
        with prelu_gpu.enabled(device.type):
            assert served()
    prelu_gpu.disable(device.type)
    assert table() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not work in a forked child")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_inherits_it(device, served):
    with prelu_gpu.enabled(device.type):
        child = os.fork()
        if child == 0:
            try:
                status = 0 if served() else 1
                prelu_gpu.disable(device.type)
                status += 2 if served() else 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert served()


FORK_BESIDE_A_SWITCH = """
import os, signal, threading
from prelu_gpu import disable, override

holds, forked = threading.Event(), threading.Event()

def switch():
    with override._LOCK:
        holds.set()
        forked.wait(0.1)

thread = threading.Thread(target=switch)
thread.start()
holds.wait()
child = os.fork()
if child == 0:
    signal.alarm(10)
    disable("cpu")
    os._exit(0)
thread.join()
disable("cpu")
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_while_another_thread_switches():
    run_program(FORK_BESIDE_A_SWITCH)


def test_an_override_of_another_library_is_passed_calls_and_stays(device, x, weight, served):
    theirs = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        key = device.type.upper()
        theirs.impl("_prelu_kernel", lambda x, weight: torch.full_like(x, 7), key)
    with prelu_gpu.enabled(device.type):
        assert served()
        slopes = torch.ones(1, 1, SHAPE[2], device=device)
        assert (torch.ops.aten._prelu_kernel(x, slopes) == 7).all()
    assert (torch.prelu(x, weight) == 7).all()
    theirs._destroy()


def test_higher_orders_are_pytorchs(device):
    for shape, slopes in (((2, 2, 2), 2), ((3, 1), 1)):
        x = randn(shape, torch.float64, device).requires_grad_()
        weight = randn((slopes,), torch.float64, device, seed=1).requires_grad_()
        with prelu_gpu.enabled(device.type):
            torch.autograd.gradcheck(
                torch.prelu, (x, weight), check_forward_ad=True, check_batched_grad=True
            )
            torch.autograd.gradgradcheck(torch.prelu, (x, weight), check_fwd_over_rev=True)


def outcome(call):
    """What a call gives, or how it fails."""
    try:
        return call()
    except (RuntimeError, NotImplementedError) as error:
        return type(error).__name__, str(error).partition("\n")[0]


def loss(x, weight):
    terms = torch.prelu(x, weight).sin()
    return (terms * torch.arange(1.0, 1 + x.numel(), dtype=x.dtype).view(x.shape).to(x)).sum()


TRANSFORMS = {
    "vmap": (torch.prelu, lambda f: f),
    "gradients of each sample": (loss, lambda f: grad(f, (0, 1))),
    "jacobians": (torch.prelu, lambda f: jacrev(f, (0, 1))),
    "forward jacobians": (torch.prelu, lambda f: jacfwd(f, (0, 1))),
    "hessians": (loss, lambda f: hessian(f, (0, 1))),
}


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize(("function", "transform"), TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("shape", [(), (2,), (1, 1), (2, 1), (2, 3), (3, 1, 2), (2, 2, 2)], ids=str)
def test_transforms(function, transform, shape, device):
    """A gradient of each sample has the shape of a sample, not of the sum over all."""
    computed = 0
    for slopes, samples in itertools.product({1, *shape[1:2]}, (1, 2, 3)):
        xs = randn((samples, *shape), torch.float64, device)
        weights = randn((samples, slopes), torch.float64, device, seed=1)
        for dims in ((0, None), (None, 0), (0, 0)):
            x, weight = xs if dims[0] == 0 else xs[0], weights if dims[1] == 0 else weights[0]
            call = functools.partial(vmap(transform(function), dims), x, weight)
            expected = outcome(call)
            with prelu_gpu.enabled(device.type):
                given = outcome(call)
            if isinstance(expected, tuple) and isinstance(expected[0], str):
                assert given == expected  # PyTorch has no rule for it.
            else:
                torch.testing.assert_close(given, expected)
                computed += 1
    assert computed >= 3


def test_a_graph_recorded_in_a_block_runs_outside(device, x, weight):
    gradients = grad(lambda x, weight: torch.prelu(x, weight).square().sum(), (0, 1))
    with prelu_gpu.enabled(device.type):
        graph = make_fx(gradients)(x, weight)
        inside = graph(x, weight)
    torch.testing.assert_close(inside, gradients(x, weight))
    torch.testing.assert_close(graph(x, weight), gradients(x, weight))


def test_a_compiled_graph(device, x):
    torch._dynamo.reset()
    module = nn.PReLU(3).to(device)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for switch in (prelu_gpu.enable, prelu_gpu.disable):
        switch(device.type)
        given, expected = (
            torch.autograd.grad(f(x).square().sum(), module.weight) for f in (compiled, module)
        )
        torch.testing.assert_close(given, expected)


def test_what_a_graph_break_leaves_to_python_is_not_compiled(device, x, launches):
    """Dynamo would take up the frames of the operators, and Triton's."""
    torch._dynamo.reset()
    module, lock = nn.PReLU(3).to(device), threading.RLock()

    def step(x):
        with lock:  # which Dynamo cannot enter
            loss = module(x).square().sum()
        loss.backward()
        return loss

    compiled = torch.compile(step, backend="eager")
    results = []
    for run, block in ((step, ExitStack()), (compiled, prelu_gpu.enabled(device.type))):
        module.zero_grad()
        with block:
            results.append((run(x), module.weight.grad))
    assert {name.partition("_")[2] for name in launches} >= {"forward", "backward"}
    torch.testing.assert_close(*results)


def test_slopes_that_torch_prelu_never_makes_are_the_native_operators(device, x, no_launch):
    """As composed.py and vmap make them: the slope gradient stays as large as the input."""
    grad_y = torch.ones_like(x)
    for x_given, shape in (
        *((x, shape) for shape in ((1, 1, 40), (4, 1, 1), SHAPE, (1,))),
        (x[:, :1], (1, 3, 1)),
    ):
        weight = torch.ones(shape, device=device)
        expected = backward(torch.ops.aten._prelu_kernel, x_given, weight, grad_y)
        with prelu_gpu.enabled(device.type):
            given = backward(torch.ops.aten._prelu_kernel, x_given, weight, grad_y)
        for actual, exact in zip(given, expected, strict=True):
            assert_same(actual, exact)


def test_who_is_not_autograd_gets_the_slope_gradient_in_pytorchs_shape(device, x, weight):
    """A call of the operator itself, also from the backward of another function."""
    arguments = torch.ones_like(x), x, weight.view(1, 3, 1)
    operator = torch.ops.aten._prelu_kernel_backward

    class Theirs(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad_y):
            return operator(*arguments)[1]

    expected = operator(*arguments)
    assert expected[1].shape == SHAPE
    with prelu_gpu.enabled(device.type):
        given = operator(*arguments)
        leaf = x.clone().requires_grad_()
        (inside,) = torch.autograd.grad(Theirs.apply(leaf).sum(), leaf)
    for actual, exact in zip((*given, inside), (*expected, expected[1]), strict=True):
        assert_same(actual, exact)


def test_a_dispatch_mode_sees_results_of_pytorchs_shapes(device, x, weight, monkeypatch):
    """This one compares each operator's with those of fake tensors, storage offsets included."""
    monkeypatch.setattr(launch, "torch", torch)  # no canaries
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = torch.autograd.grad(torch.prelu(*leaves).square().sum(), leaves)
    with prelu_gpu.enabled(device.type), CrossRefFakeMode():
        given = torch.autograd.grad(torch.prelu(*leaves).square().sum(), leaves)
    torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("frozen_slopes", [False, True])
def test_every_way_to_call_the_backward_from_python_gives_pytorchs_shapes(
    frozen_slopes, device, x, weight
):
    shapes = []

    class Passes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            results = function.overloadpacket(*args, **(kwargs or {}))
            if function is torch.ops.aten._prelu_kernel_backward.default:
                shapes.extend(result.shape for result in results)
            return results

    weight.requires_grad_(not frozen_slopes)
    with prelu_gpu.enabled(device.type), Passes():
        torch.prelu(x.requires_grad_(), weight).sum().backward()
    assert shapes == [SHAPE, SHAPE]


def frozen(function, x, weight, needs):
    x, weight = x.clone().requires_grad_(needs[0]), weight.clone().requires_grad_(needs[1])
    return torch.autograd.grad(
        function(x, weight).square().sum(), [t for t in (x, weight) if t.requires_grad]
    )


@pytest.mark.parametrize(
    "needs", [(True, False), (False, True)], ids=["slopes frozen", "input frozen"]
)
def test_the_gradient_of_what_is_frozen_is_not_computed(needs, device, x, weight, calls):
    expected = frozen(torch.prelu, x, weight, needs)
    with prelu_gpu.enabled(device.type):
        given = frozen(torch.prelu, x, weight, needs)
    (values,) = (v for call, v in calls if call.kernel.__name__ == "column_backward")
    assert (values["grad_x_ptr"] is not None, values["sums_ptr"] is not None) == needs
    torch.testing.assert_close(given, expected)


def slope_hessian_vector(x, weight, direction):
    """Of the sum of squares of torch.prelu, which is quadratic in the slopes."""
    return 2 * torch.where(x > 0, 0, x * x).sum((0, 2)) * direction


def squares(x, weight):
    return torch.prelu(x, weight).square().sum()


def dual_gradients(x, weight, x_tangent, weight_tangent):
    """Gradients of `squares`, and their derivatives along the tangents."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    with forward_ad.dual_level():
        dual_x = x if x_tangent is None else forward_ad.make_dual(x, x_tangent)
        dual_weight = (
            weight if weight_tangent is None else forward_ad.make_dual(weight, weight_tangent)
        )
        squares(dual_x, dual_weight).backward()
        return [forward_ad.unpack_dual(leaf.grad) for leaf in (x, weight)]


def module_gradients(weight, x):
    module = nn.PReLU(3, device=weight.device, dtype=weight.dtype)
    return torch.func.functional_call(module, {"weight": weight}, (x,)).square().sum()


FORWARD_OVER_REVERSE = {
    "slopes": lambda x, w, u, v: jvp(grad(squares, 1), (x, w), (torch.zeros_like(u), v)),
    "slopes alone": lambda x, w, u, v: jvp(grad(lambda w: squares(x, w)), (w,), (v,)),
    "input": lambda x, w, u, v: jvp(grad(lambda x: squares(x, w)), (x,), (u,)),
    "both": lambda x, w, u, v: jvp(grad(squares, (0, 1)), (x, w), (u, v)),
    "slopes' along the input": lambda x, w, u, v: jvp(lambda x: grad(squares, 1)(x, w), (x,), (u,)),
    "each of several directions": lambda x, w, u, v: vmap(
        lambda v: jvp(grad(lambda w: squares(x, w)), (w,), (v,))
    )(torch.stack((v, 2 * v))),
    "jacobian of a jacobian": lambda x, w, u, v: jacfwd(jacrev(squares, 1), 1)(x, w),
    "functional.hessian": lambda x, w, u, v: torch.autograd.functional.hessian(
        squares, (x, w), vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "dual slopes": lambda x, w, u, v: dual_gradients(x, w, None, v),
    "dual input": lambda x, w, u, v: dual_gradients(x, w, u, None),
    "dual both": dual_gradients,
    "functional_call": lambda x, w, u, v: jvp(
        grad(functools.partial(module_gradients, x=x)), (w,), (v,)
    ),
}


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 3), (1, 3, 1)], ids=str)
@pytest.mark.parametrize("call", FORWARD_OVER_REVERSE.values(), ids=FORWARD_OVER_REVERSE)
def test_forward_over_reverse(call, shape, device):
    x, u = (randn(shape, torch.float64, device, seed) for seed in (0, 1))
    weight, v = (randn((3,), torch.float64, device, seed) for seed in (2, 3))
    expected = call(x, weight, u, v)
    with prelu_gpu.enabled(device.type):
        given = call(x, weight, u, v)
    torch.testing.assert_close(given, expected)


def test_a_product_of_the_slopes_hessian_is_that_of_the_formula(device, x, weight):
    direction = randn((3,), torch.float32, device, seed=3)
    with prelu_gpu.enabled(device.type):
        _, given = jvp(grad(lambda weight: squares(x, weight)), (weight,), (direction,))
    torch.testing.assert_close(given, slope_hessian_vector(x, weight, direction))


@pytest.mark.parametrize("argnums", [0, 1])
def test_a_gradient_of_each_sample_beside_a_frozen_argument(argnums, device):
    """Of one sample of one channel, whose tensors look as if nothing were batched."""
    x, weight = torch.full((1, 2, 1, 4), -1.0, device=device), torch.ones(1, 1, device=device)
    call = functools.partial(vmap(grad(squares, argnums)), x, weight)
    expected = call()
    with prelu_gpu.enabled(device.type):
        torch.testing.assert_close(call(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_small_inputs_are_the_native_operators(dtype, device, launches, threshold):
    threshold(2**22)
    x, weight = randn(SHAPE, dtype, device), randn((3,), dtype, device, seed=1)
    with prelu_gpu.enabled(device.type):
        backward(torch.prelu, x, weight, x)
        assert launches == []
        threshold(0)
        backward(torch.prelu, x, weight, x)
    assert launches == ["column_forward", "column_backward", "sum_partials"]


def test_autocast_is_pytorchs(device, x, weight):
    def call():
        with torch.autocast(device.type, torch.bfloat16):
            return backward(torch.prelu, x, weight, torch.ones_like(x, dtype=torch.bfloat16))

    expected = call()
    with prelu_gpu.enabled(device.type):
        given = call()
    assert_same(given[0], expected[0])
    assert_same(given[1], expected[1])
    assert given[2].dtype == torch.float32
    rounded = torch.ones_like(x).bfloat16(), x.bfloat16(), weight.bfloat16()
    assert_right(*rounded, grad_weight=given[2].bfloat16())
    assert torch.equal(given[2], given[2].bfloat16().float())


def test_fake_and_meta_tensors_and_other_errors_are_pytorchs(device, x, weight):
    calls = [
        lambda: torch.prelu(x.to("meta"), weight.to("meta")).shape,
        lambda: torch.prelu(x, weight.to("meta")),
        lambda: torch.prelu(x, weight.double()),
        lambda: torch.prelu(x, torch.ones(2, device=device)),
        lambda: torch.prelu(x.int(), weight.int()),
        lambda: torch.ops.aten._prelu_kernel(x, weight.double().view(1, 3, 1)),
        lambda: torch.prelu(x.to_sparse(), weight),
    ]

    expected = [outcome(call) for call in calls]
    assert [type(result) for result in expected] == [torch.Size, *[tuple] * (len(calls) - 1)]
    with prelu_gpu.enabled(device.type):
        assert [outcome(call) for call in calls] == expected
        with FakeTensorMode() as mode:
            y = torch.prelu(mode.from_tensor(x), mode.from_tensor(weight))
        assert y.shape == x.shape


@pytest.mark.parametrize("freed", [0, 1, 2])
def test_memory_that_was_freed_is_not_read(freed, device, x, weight, launches):
    grad_y, x, weight = torch.ones_like(x), x.requires_grad_(), weight.requires_grad_()
    with prelu_gpu.enabled(device.type):
        y = torch.prelu(x, weight)
        (grad_y, x, weight)[freed].untyped_storage().resize_(0)
        before = len(launches)
        with pytest.raises(RuntimeError, match="data is not allocated yet"):
            torch.autograd.grad(y, (x, weight), grad_y)
        if freed:
            with pytest.raises(RuntimeError, match="data is not allocated yet"):
                torch.prelu(x, weight)
    assert len(launches) == before


@pytest.mark.parametrize(
    ("device_given", "error", "message"),
    [
        ("cuda:0", ValueError, "got device 'cuda:0'.*give the type alone, 'cuda'"),
        (torch.device("cpu", 0), ValueError, "got device 'cpu:0'.*'cpu'"),
        ("gpu", RuntimeError, "Expected one of cpu, cuda"),
        (1.5, TypeError, "device"),
    ],
)
@pytest.mark.parametrize("function", [prelu_gpu.enable, prelu_gpu.disable, prelu_gpu.enabled])
def test_a_device_that_is_no_type(function, device_given, error, message):
    with pytest.raises(error, match=message):
        ExitStack().enter_context(function(device_given))


def test_a_device_type_without_kernels_is_left_alone_and_named(caplog):
    """Once a process and device type, not at each block of a loop."""
    before = table()
    for function in (prelu_gpu.enabled, prelu_gpu.enable, prelu_gpu.enabled):
        for device_type in ("mps", "meta"):
            with ExitStack() as stack:
                if function is prelu_gpu.enable:
                    function(device_type)
                else:
                    stack.enter_context(function(device_type))
                assert table() == before
    assert caplog.messages == [
        "enable: torch.prelu on mps stays PyTorch's: Triton has no kernels for mps",
        "enable: torch.prelu on meta stays PyTorch's: Triton has no kernels for meta",
    ]


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this PyTorch has CUDA's operators")
def test_a_pytorch_without_cuda_is_named(caplog):
    for _ in range(2):
        prelu_gpu.enable("cuda")
    (message,) = caplog.messages
    assert message.startswith("enable: torch.prelu on cuda stays PyTorch's: no kernel for CUDA")


def test_the_device_is_the_accelerators_or_the_cpu(device, served, monkeypatch, caplog):
    accelerator = None if device.type == "cpu" else device
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: accelerator)
    prelu_gpu.enable()
    assert served()
    prelu_gpu.disable()
    assert not served()
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    with prelu_gpu.enabled():
        assert not served()
    assert "torch.prelu on mps stays PyTorch's" in caplog.text


def test_nothing_is_said_where_all_is_well():
    """Nor by PyTorch, which warns of the first override of a process."""
    program = """
import torch, warnings
warnings.simplefilter("error")  # what its import says is not of our doing
import prelu_gpu
prelu_gpu.enable()
prelu_gpu.disable()
"""
    assert run_program(program, "-W", "ignore") == ("", "")


def test_a_call_costs_the_host_little_more_than_pytorchs(monkeypatch):
    """1 us more where torch.prelu takes 1.0, the launch and what it allocates left out."""
    x, weight = torch.randn(2, 8, 4, 4), torch.rand(8)
    y = torch.prelu(x, weight)

    def us():
        return min(timeit.repeat(lambda: torch.prelu(x, weight), number=500, repeat=5)) * 2000

    monkeypatch.setattr(launch, "prelu_forward", lambda x, weight, dim: y)
    plain, ours = [], []
    with intercepting(lambda call, values: None):
        for _ in range(5):
            plain.append(us())
            with prelu_gpu.enabled("cpu"):
                ours.append(us())
    assert min(ours) <= 2 * min(plain)
