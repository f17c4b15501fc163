"""Tensors that are not dense: PyTorch's operator computes those it knows; others are refused."""

import pytest
import torch
import torch.nn.functional as F
from support import assert_same

from prelu_gpu import LeakyReLU, PReLU, SharedAxesPReLU, leaky_relu, ops, prelu

pytestmark = pytest.mark.usefixtures("no_launch")


pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.quantize_per:UserWarning",
    "ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning",
    "ignore:Sparse (CSR|CSC|BSR|BSC) tensor support is in beta state:UserWarning",
)
X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
W = torch.tensor([0.25, -0.5, 2.0])
ONE = torch.tensor([0.3])
PARTS = [X[0, 0], X[1, 0, :2]]
with_mkldnn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no MKL-DNN")


def quantised(tensor, dtype=torch.quint8):
    return torch.quantize_per_tensor(tensor, 0.1, 0, dtype)


def by_channel(tensor, axis):
    channels = tensor.shape[axis]
    scales, zeros = torch.full((channels,), 0.1), torch.zeros(channels, dtype=torch.long)
    return torch.quantize_per_channel(tensor, scales, zeros, axis, torch.quint8)


def jagged(dtype=torch.float32):
    return torch.nested.nested_tensor([part.to(dtype) for part in PARTS], layout=torch.jagged)


def nested():
    return torch.nested.nested_tensor([X[0], X[1, :, :2]])


KINDS = {
    "mkldnn": lambda: X.to_mkldnn(),
    "mkldnn bfloat16": lambda: X.bfloat16().to_mkldnn(),
    "quint8": lambda: quantised(X),
    "qint8": lambda: quantised(X, torch.qint8),
    "qint32": lambda: quantised(X, torch.qint32),
    "by channel": lambda: by_channel(X, 1),
    "jagged": jagged,
    "jagged float64": lambda: jagged(torch.float64),
    "jagged int32": lambda: jagged(torch.int32),
    "nested": nested,
    "coo": lambda: X.to_sparse(),
    "csr": lambda: X[0, :3, 0].to_sparse_csr(),
    "csc": lambda: X[0, :3, 0].to_sparse_csc(),
    "bsr": lambda: X[0, 0].to_sparse_bsr((2, 2)),
    "complex": lambda: X.cfloat(),
    "int32": lambda: X.int(),
    "bool": lambda: X.bool(),
    "float8": lambda: X.to(torch.float8_e5m2),
    "dense": lambda: X.clone(),
}
SLOPES = {
    "for each channel": lambda: W,
    "one": lambda: ONE,
    "without dimensions": lambda: ONE[0],
    "bfloat16": lambda: W.bfloat16(),
    "mkldnn": lambda: W.to_mkldnn(),
    "mkldnn bfloat16": lambda: W.bfloat16().to_mkldnn(),
    "quint8": lambda: quantised(W),
    "one quint8": lambda: quantised(ONE),
    "qint8": lambda: quantised(W, torch.qint8),
    "qint32": lambda: quantised(W, torch.qint32),
    "by channel": lambda: by_channel(W, 0),
    "coo": lambda: W.to_sparse(),
}


def dense(tensor):
    """Its numbers, in a tensor or several."""
    if tensor.is_nested:
        return [part.detach() for part in tensor.unbind()]
    if tensor.is_quantized:
        return [tensor.int_repr(), torch.tensor([tensor.q_scale(), tensor.q_zero_point()])]
    return [tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()]


def assert_equal(actual, expected):
    assert (type(actual), actual.layout, actual.dtype) == (
        type(expected),
        expected.layout,
        expected.dtype,
    )
    for ours, theirs in zip(dense(actual), dense(expected), strict=True):
        assert_same(ours, theirs)


def assert_as_pytorch(ours, theirs):
    """Equal to PyTorch's result where there is one; else an error that says what to do."""
    try:
        expected = theirs()
    except (RuntimeError, NotImplementedError):
        with pytest.raises(RuntimeError) as error:
            ours()
        assert type(error.value) is RuntimeError
        message = str(error.value)
        assert message.startswith(("prelu: ", "leaky_relu: "))
        assert any(way in message for way in ("Convert", "convert", "cast one", "cast it")), message
        return False
    assert_equal(ours(), expected)
    return True


COMPUTED = {
    "mkldnn": ["for each channel", "one", "without dimensions", "mkldnn"],
    "mkldnn bfloat16": ["bfloat16", "mkldnn bfloat16"],
    "quint8": ["quint8", "one quint8"],
    "qint8": ["qint8"],
    "qint32": ["qint32"],
}


@with_mkldnn
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dense"])
def test_prelu_computes_what_pytorch_computes(kind):
    computed = [
        name
        for name, slopes in SLOPES.items()
        if assert_as_pytorch(
            lambda slopes=slopes: prelu(KINDS[kind](), slopes()),
            lambda slopes=slopes: torch.prelu(KINDS[kind](), slopes()),
        )
    ]
    assert computed == COMPUTED.get(kind, [])


@with_mkldnn
@pytest.mark.parametrize("slopes", ["mkldnn", "mkldnn bfloat16", "quint8", "by channel", "coo"])
def test_slopes_that_are_not_dense_beside_a_dense_input(slopes):
    assert not assert_as_pytorch(
        lambda: prelu(X, SLOPES[slopes]()), lambda: torch.prelu(X, SLOPES[slopes]())
    )


@with_mkldnn
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dense"])
@pytest.mark.parametrize("module", [False, True])
def test_leaky_relu_computes_what_pytorch_computes(kind, inplace, module):
    ours = LeakyReLU(0.2, inplace) if module else lambda x: leaky_relu(x, 0.2, inplace)
    computed = assert_as_pytorch(
        lambda: ours(KINDS[kind]()), lambda: F.leaky_relu(KINDS[kind](), 0.2, inplace)
    )
    if not kind.startswith("jagged"):  # of which PyTorch 2.11 computes none
        assert computed == (kind in ("quint8", "qint8", "qint32"))
    if computed:
        x = KINDS[kind]()
        y = ours(x)
        assert (y is x) == inplace
        assert_equal(x, y if inplace else KINDS[kind]())


@with_mkldnn
@pytest.mark.parametrize("slopes", ["for each channel", "one", "mkldnn"])
def test_gradients_through_mkldnn_are_pytorchs(slopes):
    gradients = []
    for function in (torch.prelu, prelu):
        x, weight = X.clone().requires_grad_(), (ONE if slopes == "one" else W).clone()
        weight.requires_grad_()
        given = weight.to_mkldnn() if slopes == "mkldnn" else weight
        y = function(x.to_mkldnn(), given).to_dense()
        y.backward(torch.ones_like(y))
        gradients.append((x.grad, weight.grad))
    for given, expected in zip(*reversed(gradients), strict=True):
        assert expected.abs().sum() > 0
        assert_same(given, expected)


@with_mkldnn
def test_modules_take_mkldnn_inputs_as_torchs():
    module, torchs = PReLU(3), torch.nn.PReLU(3)
    for each in (module, torchs):
        with torch.no_grad():
            each.weight.copy_(W)
    assert_equal(module(X.to_mkldnn()), torchs(X.to_mkldnn()))


@with_mkldnn
@pytest.mark.parametrize(
    ("call", "given"),
    [
        (lambda x: prelu(x, torch.ones(4), dim=-1), r"shape \(4,\) along dim -1"),
        (lambda x: SharedAxesPReLU((3, 4, 4), [2, 3])(x), r"shape \(1, 3, 1, 1\) along dim 1"),
    ],
)
def test_slopes_that_torch_prelu_does_not_know_beside_mkldnn(call, given):
    words = r"as torch\.prelu takes them beside a torch\._mkldnn input: .* Got Float slopes of "
    what_to_do = r"\. Convert the input first with \.to_dense\(\)"
    with pytest.raises(RuntimeError, match=words + given + what_to_do):
        call(X.to_mkldnn())


def test_jagged_leaky_relu_in_a_graph_is_pytorchs():
    """Its forward; PyTorch has no backward of it."""
    try:
        F.leaky_relu(jagged())
    except NotImplementedError:
        pytest.skip("no Leaky ReLU of jagged tensors in this PyTorch")
    errors = []
    for function in (F.leaky_relu, leaky_relu):
        x = jagged().requires_grad_()
        y = function(x, 0.2)
        assert y.requires_grad
        with pytest.raises(NotImplementedError) as error:
            y.values().sum().backward()
        errors.append(str(error.value))
    assert errors == ["aten.leaky_relu_backward.default"] * 2


@with_mkldnn
@pytest.mark.parametrize("kind", ["mkldnn", "quint8", "coo"])
def test_operators_take_dense_tensors(kind):
    x = KINDS[kind]()
    calls = {
        "prelu": lambda: ops.prelu_forward(x, ONE, None),
        "leaky_relu": lambda: ops.leaky_relu_forward(x, 0.2),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=f"{name}: expected a dense input, got a"):
            call()


def test_a_quantised_models_input_names_restore():
    for x, module in ((quantised(X), PReLU(3)), (by_channel(X, 1), LeakyReLU())):
        with pytest.raises(RuntimeError, match=r"call prelu_gpu\.restore\(model\) before"):
            module(x)
