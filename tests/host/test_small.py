"""Small inputs: PyTorch's operator, where it means the same and no graph is recorded."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support import assert_same, randn, run_program

from prelu_gpu import PReLU, get_kernel_threshold, launch, leaky_relu, prelu
from prelu_gpu import threshold as threshold_module
from prelu_gpu.backend import INTERPRETED
from prelu_gpu.threshold import COSTS, default_bytes

SHAPE = (4, 6, 5)
LIMIT = 4 * 6 * 5 + 1


@pytest.fixture
def served(monkeypatch):
    """Whether a kernel served the last call."""
    calls = []
    for function in ("prelu_forward", "leaky_relu_forward", "leaky_relu_forward_"):
        kernel = getattr(launch, function)

        def counted(*args, kernel=kernel):
            calls.append(kernel)
            return kernel(*args)

        monkeypatch.setattr(launch, function, counted)

    def by_kernel(function, *args, **options):
        calls.clear()
        return function(*args, **options), bool(calls)

    return by_kernel


@pytest.fixture
def limit(threshold):
    threshold(LIMIT)


def arguments(device, dtype=torch.float32, slopes=6, slope_dtype=None):
    x = randn(SHAPE, dtype, device)
    return x, randn((slopes,), slope_dtype or dtype, device, seed=1)


@pytest.mark.usefixtures("limit")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("slopes", [1, 6])
def test_pytorchs_operator_serves_below_the_limit_and_a_kernel_above(dtype, slopes, device, served):
    x, weight = arguments(device, dtype, slopes)
    for function in (prelu, PReLU(slopes, device=device, dtype=dtype).requires_grad_(False)):
        args = (x, weight) if function is prelu else (x,)
        y, by_kernel = served(function, *args)
        assert not by_kernel
        assert_same(y, F.prelu(x, weight if function is prelu else function.weight))
        larger = torch.cat([args[0], args[0]])
        y, by_kernel = served(function, larger, *args[1:])
        assert by_kernel
    for y, by_kernel in (served(leaky_relu, x), served(leaky_relu, x.clone(), 0.01, True)):
        assert not by_kernel
        assert_same(y, F.leaky_relu(x))


def test_the_limit_itself_is_a_kernels(device, served, threshold):
    threshold(LIMIT - 1)
    assert served(prelu, *arguments(device))[1]
    assert served(leaky_relu, arguments(device)[0])[1]


@pytest.mark.usefixtures("limit")
def test_gradients_of_float32_are_pytorchs_too(device, served):
    x, weight = (t.requires_grad_() for t in arguments(device))
    y, by_kernel = served(prelu, x, weight)
    assert not by_kernel
    assert "PReLUFunction" not in type(y.grad_fn).__name__


@pytest.mark.usefixtures("limit")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_in_half_precision_is_pytorchs_but_under_autocast(dtype, device, served):
    x, weight = (t.requires_grad_() for t in arguments(device, dtype))
    assert not served(prelu, x, weight)[1]
    # Eager launches five kernels there, and the two here take the host no longer.
    with torch.autocast(device.type, dtype):
        assert served(prelu, x, weight.detach().float().requires_grad_())[1]


@pytest.mark.usefixtures("limit")
def test_what_pytorchs_operator_does_not_mean_is_a_kernels(device, served, monkeypatch):
    tried, operator = [], torch.prelu
    monkeypatch.setattr(torch, "prelu", lambda *args: tried.append(args) or operator(*args))
    x, weight = arguments(device)
    square = randn((4, 6, 6), torch.float32, device)
    assert served(prelu, square, weight, dim=2)[1]
    assert_same(prelu(square, weight, dim=2), torch.where(square > 0, square, weight * square))
    for slopes in (weight[None, :, None], weight[0], weight[:1, None, None]):
        assert served(prelu, x, slopes)[1]
    assert served(prelu, x.half(), weight)[1]
    with torch.autocast(device.type, torch.bfloat16):
        y, by_kernel = served(prelu, x, weight)
    assert by_kernel
    assert y.dtype == torch.bfloat16
    # To be refused by it takes longer than a kernel.
    assert not tried
    assert not served(prelu, x, weight[:1], dim=2)[1]
    assert len(tried) == 1


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated by PyTorch
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype of PyTorch
        return torch.nested.nested_tensor([torch.ones(1, 3), torch.ones(2, 3)])


def refusal(call):
    """What an error is, and that it is one."""
    with pytest.raises((RuntimeError, TypeError, IndexError)) as info:
        call()
    assert info.value.__context__ is None or info.value.__suppress_context__
    return type(info.value), str(info.value)


REFUSED = {
    "channels": lambda: prelu(torch.ones(2, 3), torch.ones(4)),
    "one dimension": lambda: prelu(torch.ones(3), torch.ones(3)),
    "no dimension": lambda: prelu(torch.ones(()), torch.ones(3)),
    "integers": lambda: prelu(torch.ones(2, 3).long(), torch.ones(3).long()),
    "dtypes": lambda: prelu(torch.ones(2, 3), torch.ones(3).double()),
    "devices": lambda: prelu(torch.ones(2, 3), torch.ones(3, device="meta")),
    "sparse": lambda: prelu(torch.ones(2, 3).to_sparse(), torch.ones(3)),
    "mkldnn slopes": lambda: prelu(torch.ones(2, 3), torch.ones(3).to_mkldnn()),
    "leaky mkldnn": lambda: leaky_relu(torch.ones(2, 3).to_mkldnn()),
    "quantised": lambda: prelu(quantised(), quantised()),
    "rank": lambda: prelu(torch.ones(2, 3, 4), torch.ones(2, 2)),
    "dim of one slope": lambda: prelu(torch.ones(2, 3), torch.ones(1), dim="channels"),
    "dim": lambda: prelu(torch.ones(2, 3), torch.ones(3), dim=1.0),
    "leaky integers": lambda: leaky_relu(torch.ones(3).int(), 0.2),
    "leaky meta integers": lambda: leaky_relu(torch.ones(3, device="meta").int(), 0.2),
    "leaky sparse": lambda: leaky_relu(torch.ones(3).to_sparse(), 0.2),
    "sparse weight": lambda: prelu(torch.ones(2, 3), torch.ones(3).to_sparse()),
    "nested": lambda: prelu(nested(), torch.ones(3)),
    "leaky nested": lambda: leaky_relu(nested(), 0.2),
    "leaky slope": lambda: leaky_relu(torch.ones(3), 1e39),
    "leaky whole slope": lambda: leaky_relu(torch.ones(3), 10**39),
    "leaky slope's type": lambda: leaky_relu(torch.ones(3), "0.2"),
    "leaky leaf": lambda: leaky_relu(torch.ones(3, requires_grad=True), 0.2, inplace=True),
    "no tensor": lambda: prelu([1.0], torch.ones(1)),
    "no slope": lambda: prelu(torch.ones(2), 0.5),
    "leaky no tensor": lambda: leaky_relu(1.0),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_errors_are_those_of_any_size(call, threshold):
    expected = refusal(call)
    threshold(LIMIT)
    assert refusal(call) == expected


CALLS = {
    "prelu": lambda x: prelu(x, torch.full((6,), 0.1, device=x.device)),
    "leaky_relu": lambda x: leaky_relu(x, 0.1),
    "leaky_relu in place": lambda x: leaky_relu(x, 0.1, inplace=True),
}
"""With a slope of 0.1, of six channels."""


@pytest.fixture(params=CALLS.values(), ids=CALLS)
def call(request):
    return request.param


@pytest.mark.usefixtures("limit")
def test_an_error_of_a_saved_tensor_hook_passes_and_nothing_is_computed_twice(call, device, served):
    packed = []

    def pack(tensor):
        packed.append(tensor)
        if len(packed) == 1:
            raise RuntimeError("disk full")
        return tensor

    x = -torch.ones(SHAPE, device=device)
    leaf = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        inner = leaf * 1  # which saves nothing
        with pytest.raises(RuntimeError, match=r"^disk full$"):
            call(inner)
    assert len(packed) == 1
    assert_same(inner.detach(), 0.1 * x if call is CALLS["leaky_relu in place"] else x)


class Forbidden(torch.overrides.TorchFunctionMode):
    """Refuses the family's functions of PyTorch once, as a machine that is out of memory."""

    def __init__(self):
        self.refused = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in ("prelu", "leaky_relu", "leaky_relu_"):
            self.refused.append(function)
            raise torch.OutOfMemoryError("out of memory")
        return function(*args, **(kwargs or {}))


@pytest.mark.usefixtures("limit")
def test_what_a_mode_raises_passes(call, device):
    x = -torch.ones(SHAPE, device=device)
    with Forbidden() as mode, pytest.raises(torch.OutOfMemoryError, match=r"^out of memory$"):
        call(x)
    assert len(mode.refused) == 1
    assert_same(x, -torch.ones_like(x))


@pytest.mark.usefixtures("limit")
def test_an_error_of_pytorchs_operator_is_no_reason_for_another_try(device, served, monkeypatch):
    def fail(*args):
        raise RuntimeError("an unspecified launch failure")

    monkeypatch.setattr(torch, "prelu", fail)
    monkeypatch.setattr(F, "leaky_relu", fail)
    x, weight = arguments(device)
    for function, *rest in ((prelu, weight), (leaky_relu, 0.1), (leaky_relu, 0.1, True)):
        before = x.clone()
        with pytest.raises(RuntimeError, match="unspecified launch failure"):
            served(function, x, *rest)
        assert_same(x, before)


@pytest.mark.usefixtures("limit")
@pytest.mark.parametrize("negative_slope", [0, 1, True, 0.5, 2**64])
def test_any_number_is_a_slope(negative_slope, device, served):
    x, _ = arguments(device)
    y, by_kernel = served(leaky_relu, x, negative_slope)
    assert not by_kernel
    assert_same(y, F.leaky_relu(x, float(negative_slope)))


@pytest.mark.usefixtures("limit")
def test_a_compiled_graph_does_not_depend_on_the_size(device):
    torch._dynamo.reset()
    weight = torch.ones(6, device=device)
    compiled = torch.compile(prelu, backend="eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 3, 50, 4):
            x = randn((batch, 6, 5), torch.float32, device)
            assert_same(compiled(x, weight), x)


@pytest.mark.usefixtures("limit")
def test_a_traced_graph_does_not_depend_on_the_size(device):
    # A branch on the size would warn, which is an error here.
    x, weight = arguments(device)
    traced = torch.jit.trace(prelu, (x, weight), check_trace=False)
    larger = torch.cat([x] * 9)
    assert_same(traced(larger, weight), F.prelu(larger, weight))


def test_every_test_but_these_meets_kernels(device):
    assert get_kernel_threshold() == 0
    assert INTERPRETED or device.type != "cpu"


@pytest.mark.parametrize("interpret", [False, True])
def test_a_users_limit_is_none_where_kernels_are_interpreted(interpret):
    program = "import prelu_gpu; print(prelu_gpu.get_kernel_threshold())"
    variables = {"TRITON_INTERPRET": "1"} if interpret else {}
    printed, _ = run_program(program, interpret=interpret, **variables)
    assert printed == ("0\n" if interpret else "None\n")


def test_the_default_is_where_pytorchs_operators_take_the_gpu_as_long_as_the_host(
    device, served, threshold, monkeypatch
):
    """A norm's forward decides: 28 us in which an H100 moves 94 MB, for 5 passes over it."""
    assert default_bytes(threshold_module.H100) == int(28e-6 * 3.35e12 / 5)
    assert default_bytes(2e12) == int(28e-6 * 2e12 / 5)
    for cost in COSTS.values():
        assert cost.nbytes(2e12) <= default_bytes(2e12)
    monkeypatch.setattr(threshold_module, "elements", None)
    for dtype in (torch.float64, torch.float16):
        x, weight = arguments(device, dtype)
        index = x.get_device()
        for limit, by_kernel in ((x.nbytes, True), (x.nbytes + 1, False)):
            monkeypatch.setitem(threshold_module.defaults, index, limit)
            assert served(prelu, x, weight)[1] is by_kernel
            assert served(leaky_relu, x)[1] is by_kernel


def test_a_gpus_memory_bandwidth_is_what_its_driver_says(monkeypatch):
    properties = SimpleNamespace(memory_clock_rate=2_619_000, memory_bus_width=5120)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert threshold_module._bandwidth(0) == pytest.approx(3.35e12, rel=1e-3)
    properties.memory_clock_rate = 0  # unknown
    assert threshold_module._bandwidth(0) == threshold_module.H100
    del properties.memory_bus_width
    assert threshold_module._bandwidth(0) == threshold_module.H100
    assert threshold_module._bandwidth(-1) == threshold_module.H100
