"""A wrong argument of a norm: PyTorch's error, and nothing is launched or changed."""

import contextlib

import pytest
import torch
from support import GPU
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from prelu_gpu import batch_norm_prelu, instance_norm_prelu, kernel_threshold

pytestmark = pytest.mark.usefixtures("no_launch")


def vector(size, dtype=torch.float32, device=None):
    return torch.ones(size, dtype=dtype, device=device)


@pytest.fixture
def arguments(device):
    """Those of F.batch_norm, and right."""
    return {
        "input": torch.ones(2, 3, 4, device=device),
        "running_mean": vector(3, device=device),
        "running_var": vector(3, device=device),
        "weight": vector(3, device=device),
        "bias": vector(3, device=device),
        "training": True,
    }


def raised(function, **arguments):
    try:
        function(**arguments)
    except Exception as error:
        return type(error), str(error)
    return None


@contextlib.contextmanager
def unchanged(*tensors):
    before = [t.clone() if isinstance(t, torch.Tensor) else t for t in tensors]
    yield
    for tensor, value in zip(tensors, before, strict=True):
        if isinstance(value, torch.Tensor) and not value.is_meta:
            assert torch.equal(tensor, value)


HALF = torch.float16
BATCH = [
    ({"input": (1, 3)}, "Expected more than 1 value per channel when training, got input size"),
    ({"input": (1, 3, 1, 1)}, "when training, got input size torch.Size([1, 3, 1, 1])"),
    ({"input": (3,)}, "running_mean should contain 0 elements not 3"),
    ({"running_mean": 4}, "running_mean should contain 3 elements not 4"),
    ({"running_var": 4}, "running_var should contain 3 elements not 4"),
    ({"weight": 4}, "weight should contain 3 elements not 4"),
    ({"bias": 1}, "bias should contain 3 elements not 1"),
    ({"bias": 4, "training": False}, "bias should contain 3 elements not 4"),
    ({"running_mean": None}, "running_mean and running_var must either both be None or neither"),
    ({"running_var": None}, "running_mean and running_var must either both be None or neither"),
    (
        {"running_mean": None, "running_var": None, "training": False},
        "running_mean must be defined in evaluation mode",
    ),
    ({"running_var": None, "training": False}, "running_var must be defined in evaluation mode"),
    ({"eps": 0.0}, "batch_norm eps must be positive during training, but got 0.0"),
    ({"eps": -1.0, "training": False}, "batch_norm eps must be non-negative, but got -1.0"),
    ({"eps": "1"}, "'<=' not supported between instances of 'str' and 'float'"),
    ({"momentum": None}, "argument 'momentum' (position 7) must be float, not NoneType"),
    ({"momentum": "1"}, "argument 'momentum' (position 7) must be float, not str"),
    ({"training": 1}, "argument 'training' (position 6) must be bool, not int"),
    ({"training": None}, "argument 'training' (position 6) must be bool, not NoneType"),
    ({"running_mean": [1.0]}, "argument 'running_mean' (position 4) must be Tensor, not list"),
    ({"weight": 1.0}, "argument 'weight' (position 2) must be Tensor, not float"),
    ({"running_mean": vector(3).requires_grad_()}, "not differentiable with respect to argument"),
]


@pytest.mark.parametrize("slopes", ["number", "slopes"])
@pytest.mark.parametrize(("wrong", "words"), BATCH, ids=[words[-40:] for _, words in BATCH])
def test_batch_norms_errors_are_pytorchs(wrong, words, slopes, arguments, device):
    for name, value in wrong.items():
        arguments[name] = value
        if name == "input" or (isinstance(value, int) and name not in ("training", "eps")):
            arguments[name] = vector(value, device=device)
        elif isinstance(value, torch.Tensor) and not value.is_meta:
            arguments[name] = value.detach().to(device).requires_grad_(value.requires_grad)
    slope = 0.1 if slopes == "number" else vector(1 if "(3,)" in str(wrong) else 3, device=device)
    with unchanged(arguments["running_mean"], arguments["running_var"]):
        given = raised(batch_norm_prelu, slope=slope, **arguments)
        assert given == raised(F.batch_norm, **arguments)
    if not GPU:
        assert words in given[1]


FLOAT, DOUBLE, BFLOAT16 = torch.float32, torch.float64, torch.bfloat16


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize(
    ("of_input", "of_others", "of_one", "words"),
    [
        (FLOAT, FLOAT, HALF, "expected scalar type Float but found Half for {}."),
        (FLOAT, FLOAT, DOUBLE, "expected scalar type Float but found Double for {}."),
        (DOUBLE, DOUBLE, FLOAT, "expected scalar type Double but found Float for {}."),
        (HALF, HALF, BFLOAT16, "expected scalar type Half but found BFloat16 for {}."),
        (BFLOAT16, FLOAT, DOUBLE, "but found Double for {}."),
        (HALF, FLOAT, HALF, "have one dtype, the input's or float32 beside a half-precision"),
        (BFLOAT16, BFLOAT16, FLOAT, "have one dtype, the input's or float32 beside a half-prec"),
    ],
)
def test_dtypes_that_do_not_go_together(
    of_input, of_others, of_one, words, name, training, arguments, device
):
    arguments["training"] = training
    for vectors in ("running_mean", "running_var", "weight", "bias"):
        arguments[vectors] = vector(3, of_one if vectors == name else of_others, device)
    arguments["input"] = arguments["input"].to(of_input)
    with unchanged(arguments["running_mean"], arguments["running_var"]):
        given = raised(batch_norm_prelu, slope=0.1, **arguments)
        assert given[0] is RuntimeError
        assert words.format(name) in given[1]
        if not GPU:
            assert raised(F.batch_norm, **{**arguments, "training": False})[0] is RuntimeError
    if name in ("weight", "bias"):
        del arguments["running_mean"], arguments["running_var"], arguments["training"]
        given = raised(instance_norm_prelu, slope=0.1, **arguments)
        assert given[0] is RuntimeError
        assert words.format(name) in given[1]


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
def test_devices_that_differ(name, arguments, device):
    arguments[name] = arguments[name].to("meta")
    words = f"same device, but got input on {device} and {name} on meta. Move one with .to(device)"
    with unchanged(arguments["running_mean"], arguments["running_var"]):
        assert words in raised(batch_norm_prelu, slope=0.1, **arguments)[1]
    if name in ("weight", "bias"):
        instances = {n: arguments[n] for n in ("input", "weight", "bias")}
        assert words in raised(instance_norm_prelu, slope=0.1, **instances)[1]


INSTANCE = [
    ({"input": (2, 3, 1)}, "Expected more than 1 spatial element when training, got input size"),
    ({"input": (2, 3)}, "Expected more than 1 spatial element when training, got input size"),
    ({"weight": vector(4)}, "weight should contain 6 elements not 8"),
    ({"bias": vector(1)}, "bias should contain 6 elements not 2"),
    ({"weight": [1.0]}, "argument 'weight' (position 2) must be Tensor, not list"),
    ({"eps": "1"}, "argument 'eps' (position 8) must be float, not str"),
]


@pytest.mark.parametrize("slopes", ["number", "slopes"])
@pytest.mark.parametrize(("wrong", "words"), INSTANCE, ids=[words[-40:] for _, words in INSTANCE])
def test_instance_norms_errors_are_pytorchs(wrong, words, slopes, arguments, device):
    arguments = {name: arguments[name] for name in ("input", "weight", "bias")} | wrong
    if isinstance(arguments["input"], tuple):
        arguments["input"] = vector(arguments["input"], device=device)
    slope = 0.1 if slopes == "number" else vector(3, device=device)
    given = raised(instance_norm_prelu, slope=slope, **arguments)
    assert given == raised(F.instance_norm, **arguments)
    if not GPU:
        assert words in given[1]


ROUTES = {
    "kernels": contextlib.nullcontext,
    "small": lambda: kernel_threshold(10**6),
    "dispatch mode": lambda: FlopCounterMode(display=False),
    "forward mode": torch.autograd.forward_ad.dual_level,
    "no kernels": contextlib.nullcontext,
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("slope", "kind", "words"),
    [
        (vector(4), RuntimeError, "Found parameter numbers = 4 and channel size = 3."),
        (vector(0), RuntimeError, "Found parameter numbers = 0 and channel size = 3."),
        (vector((3, 1)), RuntimeError, "to be a scalar or 1D tensor, but got: ndim = 2"),
        (vector((1, 3, 3)), RuntimeError, "size of tensor weight (3) must match the size of"),
        (vector(3, HALF), RuntimeError, "Type promoting not supported. Got Float and Half"),
        (vector(3, device="meta"), RuntimeError, "all tensors to be on the same device"),
        (vector(3).int(), RuntimeError, "not implemented for 'int32' slope"),
        (vector(3).to_sparse(), RuntimeError, "expected a dense slope, got a torch.sparse_coo"),
        ("0.1", TypeError, "argument 'slope' (position 2) must be Tensor or Number, not str"),
        (None, TypeError, "argument 'slope' (position 2) must be Tensor or Number, not NoneType"),
        ([0.1], TypeError, "argument 'slope' (position 2) must be Tensor or Number, not list"),
        (1e300, RuntimeError, "converted to type float without overflow. Got negative_slope=1e+30"),
    ],
    ids=lambda value: None if isinstance(value, torch.Tensor) else str(value)[-40:],
)
def test_a_slope_is_refused_before_running_statistics_change(
    slope, kind, words, route, arguments, device, request
):
    if route == "no kernels":
        request.getfixturevalue("no_kernels")
    if isinstance(slope, torch.Tensor) and not slope.is_meta:
        slope = slope.to(device)
    running = arguments["running_mean"], arguments["running_var"]
    with ROUTES[route](), unchanged(*running):
        for function, names in (
            (batch_norm_prelu, arguments),
            (instance_norm_prelu, ("input", "weight", "bias")),
        ):
            given = raised(function, slope=slope, **{name: arguments[name] for name in names})
            assert given[0] is kind
            assert words in given[1]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: x.int(), "norm_prelu: not implemented for 'int32' input. Float, Double"),
        (lambda x: x.to(torch.complex64), "norm_prelu: not implemented for 'complex64' input"),
        (lambda x: x.to_sparse(), "norm_prelu: expected a dense input, got a torch.sparse_coo"),
        (lambda x: x.tolist(), "norm_prelu(): argument 'input' (position 1) must be Tensor, not"),
    ],
    ids=["int", "complex", "sparse", "list"],
)
def test_inputs_of_other_kinds(make, words, arguments):
    x = make(arguments.pop("input"))
    running = arguments["running_mean"], arguments["running_var"]
    with unchanged(*running):
        for given in (
            raised(batch_norm_prelu, input=x, slope=0.1, **arguments),
            raised(instance_norm_prelu, input=x, slope=0.1),
        ):
            assert given[0] is (TypeError if isinstance(x, list) else RuntimeError)
            assert words in given[1]


@pytest.mark.parametrize("name", ["input", "slope", "running_mean", "running_var", "weight"])
def test_memory_that_was_freed_is_not_read(name, arguments, device):
    arguments["slope"] = vector(3, device=device)
    arguments[name].untyped_storage().resize_(0)
    kept = [arguments[n] for n in ("running_mean", "running_var") if n != name]
    with unchanged(*kept), pytest.raises(RuntimeError, match="its data is not allocated yet"):
        batch_norm_prelu(**arguments)


def test_scripting_is_refused():
    for function in (batch_norm_prelu, instance_norm_prelu):
        with pytest.raises(RuntimeError, match="compiles Python, and the kernels"):
            torch.jit.script(function)
