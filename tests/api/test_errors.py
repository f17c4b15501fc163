"""A wrong argument: given, allowed, what to do; and nothing is launched or changed."""

import pytest
import torch

from prelu_gpu import PReLU, leaky_relu, prelu

pytestmark = pytest.mark.usefixtures("no_launch")


X = torch.zeros(2, 3, 4)
W = torch.zeros(3)


@pytest.mark.parametrize(
    ("x", "weight", "words"),
    [
        (X.half(), W.double(), "prelu: Type promoting not supported. Got Half and Double"),
        (X, W.half(), "prelu: Type promoting not supported. Got Float and Half"),
        (X.double(), W, "prelu: Type promoting not supported. Got Double and Float"),
        (X.bfloat16(), W.half(), "Got BFloat16 and Half"),
        (X.sum(), W, "Not allow zero-dim input tensor."),
        (
            X,
            torch.zeros(4),
            "Mismatch of parameter numbers and input channel size. "
            "Found parameter numbers = 4 and channel size = 3.",
        ),
        (X[0, 0], W, "Found parameter numbers = 3 and channel size = 1."),
        (X, torch.zeros(0), "Found parameter numbers = 0 and channel size = 3."),
        (
            X,
            torch.zeros(3, 1),
            "prelu: Expected `weight` to be a scalar or 1D tensor, but got: ndim = 2",
        ),
        (X, torch.zeros(1, 1), "scalar or 1D tensor, but got: ndim = 2"),
    ],
)
def test_prelu_errors_begin_with_pytorchs_words(x, weight, words):
    with pytest.raises(RuntimeError) as ours:
        prelu(x, weight)
    assert words in str(ours.value)
    with pytest.raises(RuntimeError) as theirs:
        torch.prelu(x, weight)
    assert words.removeprefix("prelu: ").split(". ")[0] in str(theirs.value)
    assert len(str(ours.value)) > len(words) + 10, "what to do"


@pytest.mark.parametrize("dim", [3, -4])
def test_a_dim_out_of_range(dim):
    with pytest.raises(IndexError, match=rf"expected to be in range of \[-3, 2\], but got {dim}"):
        prelu(X, W, dim=dim)


@pytest.mark.parametrize("function", [lambda x: prelu(x, torch.zeros(1)), leaky_relu])
@pytest.mark.parametrize(
    ("x", "words"),
    [
        (X.int(), "not implemented for 'int32' input. Float, Double, Half and BFloat16 are"),
        (X.bool(), "not implemented for 'bool'"),
        (X.to(torch.complex64), "not implemented for 'complex64'"),
        (X.to(torch.float8_e4m3fn), "not implemented for 'float8_e4m3fn'"),
        (X.to_sparse(), "expected a dense input, got a torch.sparse_coo tensor. Convert it"),
    ],
)
def test_inputs_of_other_kinds(function, x, words):
    with pytest.raises(RuntimeError, match="(?s)" + words):
        function(x)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_and_nested_inputs():
    with pytest.raises(RuntimeError, match="got a jagged nested tensor"):
        prelu(torch.nested.nested_tensor([X[0], X[1]], layout=torch.jagged), W[:1])
    with pytest.raises(RuntimeError, match="got a nested tensor"):
        leaky_relu(torch.nested.nested_tensor([X[0], X[1]]))
    quantised = torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)
    with pytest.raises(RuntimeError, match="got a quantized tensor"):
        prelu(quantised, W)


def test_what_is_no_tensor_or_no_number():
    with pytest.raises(TypeError, match=r"prelu\(\): argument 'input' .* must be Tensor, not list"):
        prelu([1.0], W)
    with pytest.raises(TypeError, match=r"argument 'weight' .* must be Tensor, not float"):
        prelu(X, 0.25)
    with pytest.raises(TypeError, match=r"'negative_slope' .* must be Number, not str"):
        leaky_relu(X, "0.1")
    with pytest.raises(TypeError, match=r"prelu\(\): argument 'dim' must be int, not float"):
        prelu(X, W, dim=1.0)
    with pytest.raises(RuntimeError, match=r"without overflow\. Got negative_slope=1e\+300"):
        leaky_relu(X, 1e300)
    with pytest.raises(TypeError, match="must be Number, not Tensor"):
        leaky_relu(X, W)


def test_tensors_on_different_devices():
    with pytest.raises(RuntimeError, match="same device, but got input on cpu and weight on meta"):
        prelu(X, W.to("meta"))


def test_in_place_on_what_may_not_be_written():
    leaf = torch.full((3,), -1.0, requires_grad=True)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used"):
        leaky_relu(leaf, inplace=True)
    with pytest.raises(RuntimeError, match="a view of a leaf Variable that requires grad"):
        leaky_relu(leaf[1:], inplace=True)
    assert leaf.tolist() == [-1.0] * 3
    hidden = leaf * 2
    with pytest.raises(RuntimeError, match="output of a function that returns multiple views"):
        leaky_relu(hidden.chunk(2)[0], inplace=True)
    with torch.no_grad():
        view = hidden[1:]
    with pytest.raises(RuntimeError, match="A view was created in no_grad mode"):
        leaky_relu(view, inplace=True)
    assert hidden.tolist() == [-2.0] * 3
    with torch.inference_mode():
        inference = torch.full((3,), -1.0)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        leaky_relu(inference, inplace=True)
    overlapping = torch.full((1, 3), -1.0).expand(2, 3)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        leaky_relu(overlapping, inplace=True)
    assert overlapping.tolist() == [[-1.0] * 3] * 2


@pytest.mark.parametrize("dim", ["1", 1.0, None])
@pytest.mark.parametrize("slopes", [1, 3])
def test_a_dim_that_is_no_integer(slopes, dim):
    with pytest.raises(TypeError, match=r"argument 'dim' must be int, not (str|float|NoneType)"):
        prelu(X, torch.zeros(slopes), dim=dim)
    with pytest.raises(TypeError, match=r"PReLU\(\): argument 'dim' must be int, not"):
        PReLU(slopes, dim=dim)


def test_a_slope_of_leaky_relu_in_a_tensor_is_a_number_where_it_is_one_to_pytorch(calls):
    x = torch.tensor([-1.0, 2.0])
    slope = torch.tensor(0.3)
    assert torch.equal(leaky_relu(x, slope), torch.nn.functional.leaky_relu(x, slope))
    for refused in (torch.tensor([0.3]), torch.tensor(0.3, requires_grad=True)):
        for function in (leaky_relu, torch.nn.functional.leaky_relu):
            with pytest.raises(TypeError, match="argument 'negative_slope'"):
                function(x, refused)
        with pytest.raises(TypeError, match="Slopes in a tensor are prelu's"):
            leaky_relu(x, refused)
    with pytest.raises(TypeError, match=r"must be Number, not str\.$"):
        leaky_relu(x, "0.1")
