"""The oracle itself: PyTorch's formulas in float64, and what it tells apart."""

import pytest
import torch
import torch.nn.functional as F
from support import DTYPES, backward, id_of, randn

from prelu_gpu import reference

SHAPE = (6, 5, 7)


def arguments(dtype, slopes):
    x, grad_y = (randn(SHAPE, dtype, "cpu", seed) for seed in (0, 1))
    return grad_y, x, randn(slopes, dtype, "cpu", seed=2)


def results(grad_y, x, weight, dim=1):
    wide = torch.promote_types(x.dtype, torch.float32)
    grad_x, grad_weight = reference.prelu_backward(*(t.to(wide) for t in (grad_y, x, weight)), dim)
    return {
        "y": reference.prelu(x.to(wide), weight.to(wide), dim).to(x.dtype),
        "grad_x": grad_x.to(x.dtype),
        "grad_weight": grad_weight.to(weight.dtype),
    }


@pytest.mark.parametrize("dim", [1, -2])
@pytest.mark.parametrize("slopes", [(5,), (1,), ()], ids=str)
def test_it_is_torch_prelu_in_float64(slopes, dim):
    grad_y, x, weight = arguments(torch.float64, slopes)
    expected = backward(torch.prelu, x, weight, grad_y)
    given = results(grad_y, x, weight, dim)
    assert torch.equal(given["y"], expected[0])
    assert torch.equal(given["grad_x"], expected[1])
    torch.testing.assert_close(given["grad_weight"], expected[2])


def test_slopes_along_another_dimension_and_of_the_inputs_rank():
    grad_y, x, weight = arguments(torch.float64, (7,))
    along = results(grad_y, x, weight, dim=2)
    broadcast = results(grad_y, x, weight.view(1, 1, 7))
    assert torch.equal(along["y"], torch.where(x > 0, x, weight * x))
    for name, result in along.items():
        assert torch.equal(result, broadcast[name].view_as(result))


def off_by_a_bit(tensor):
    wrong = tensor.clone()
    wrong.view(-1)[3] = torch.nextafter(wrong.view(-1)[3], torch.full((), torch.inf).to(wrong))
    return wrong


def without_zeros_sign(tensor):
    return torch.where(tensor == 0, torch.zeros_like(tensor), tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("y", off_by_a_bit, "output: 1 of 210 elements are wrong, the first at (0, 0, 3)"),
        ("y", without_zeros_sign, "output: 2 of 210 elements"),
        ("y", torch.flatten, "output: ((210,), "),
        ("grad_x", off_by_a_bit, "input gradient: 1 of 210"),
        ("grad_x", lambda g: g * torch.nan, "input gradient: 210 of 210"),
        ("grad_weight", lambda g: g * 1.05, "slope gradient: 5 of 5"),
        ("grad_weight", lambda g: g * torch.nan, "slope gradient: 5 of 5"),
        ("grad_weight", lambda g: g[:1], "slope gradient: ((1,), "),
        ("grad_weight", lambda g: g[None], "slope gradient: ((1, 5), "),
        ("grad_weight", lambda g: g.to(torch.float8_e5m2), "slope gradient: ((5,), torch.float8"),
    ],
)
def test_each_mistake_is_named(name, spoil, words, dtype):
    grad_y, x, weight = arguments(dtype, (5,))
    x[0, 0, :2] = -0.0
    weight = weight.abs()
    right = results(grad_y, x, weight)
    assert list(reference.mistakes(grad_y, x, weight, **right)) == []
    (mistake,) = reference.mistakes(grad_y, x, weight, **{**right, name: spoil(right[name])})
    assert mistake.startswith(words)


def test_nan_is_right_where_nan_is_expected():
    grad_y, x, weight = arguments(torch.float32, (5,))
    x[0, 1, 0] = torch.nan
    right = results(grad_y, x, weight)
    assert right["grad_weight"].isnan().tolist() == [False, True, False, False, False]
    assert list(reference.mistakes(grad_y, x, weight, **right)) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=id_of)
def test_the_products_that_pytorch_rounds_in_half_precision_explain_its_error(dtype):
    grad_y, x = (randn((64, 5, 99), dtype, "cpu", seed) for seed in (0, 1))
    weight = randn((5,), dtype, "cpu", seed=2)
    theirs = {"grad_weight": backward(torch.prelu, x, weight, grad_y)[2]}
    assert list(reference.mistakes(grad_y, x, weight, **theirs))
    assert list(reference.mistakes(grad_y, x, weight, **theirs, products_in=dtype)) == []


@pytest.mark.parametrize("wrong", [5.0, torch.inf, 0.0])
@pytest.mark.parametrize(
    ("x", "dtype"), [(-torch.inf, torch.float32), (-1e200, torch.float64)], ids=str
)
def test_infinite_and_huge_slope_gradients_are_told_from_others(x, dtype, wrong):
    x, ones = torch.full((3,), x, dtype=dtype), torch.ones(3, dtype=dtype)
    exact = torch.full((1,), x.sum().item(), dtype=dtype)
    arguments = ones, x, torch.ones(1, dtype=dtype)
    assert list(reference.mistakes(*arguments, grad_weight=exact)) == []
    assert list(reference.mistakes(*arguments, grad_weight=torch.full_like(exact, wrong)))


def test_sums_of_one_sign_that_are_made_one_by_one_are_right():
    x, ones = (
        -torch.rand(2048, 96, generator=torch.Generator().manual_seed(0)),
        torch.ones(2048, 96),
    )
    grad_weight = torch.zeros(96)
    for row in x:
        grad_weight += row
    assert list(reference.mistakes(ones, x, torch.ones(96), grad_weight=grad_weight)) == []


def test_whole_numbers_leave_a_sum_no_room():
    x = torch.full((2**22,), -1.0)
    arguments = torch.ones_like(x), x, torch.ones(1)
    one_less = torch.tensor([1.0 - 2**22])
    assert list(reference.mistakes(*arguments, grad_weight=one_less)) == []
    assert list(reference.mistakes(*arguments, grad_weight=one_less, whole_numbers=True))


# Norms

NORMS = {
    "batch": {"training": True, "instances": False},
    "evaluation": {"training": False, "instances": False},
    "instance": {"training": True, "instances": True},
}
norms = pytest.mark.parametrize("norm", NORMS)


def norm_arguments(norm, dtype=torch.float32):
    """From grad_y to the running variance, as they follow one another; slopes are positive."""
    x, grad_y = (randn(SHAPE, dtype, "cpu", seed) for seed in (0, 1))
    slope, weight, bias, mean, variance = randn((5, 5), dtype, "cpu", seed=2).abs() + 0.1
    running = (None, None) if norm == "instance" else (mean, variance)
    return grad_y, 2 * x + 0.5, slope, weight, bias, *running


def norm_by_pytorch(norm, grad_y, x, slope, weight, bias, mean, variance):
    """The results of PyTorch's operators in float64, each in the dtype of what it belongs to."""
    given = grad_y, x, slope, weight, bias, mean, variance
    grad_y, *leaves, mean, variance = (t if t is None else t.double() for t in given)
    x, slope, weight, bias = leaves = [leaf.requires_grad_() for leaf in leaves]
    if norm == "instance":
        z = F.instance_norm(x, weight=weight, bias=bias)
    else:
        mean, variance = mean.clone(), variance.clone()
        z = F.batch_norm(x, mean, variance, weight, bias, norm == "batch")
    y = F.prelu(z, slope)
    found = y.detach(), *torch.autograd.grad(y, leaves, grad_y), mean, variance
    return {
        name: result if result is None else result.to(like.dtype)
        for name, result, like in zip(reference.NORM_RESULTS, found, given, strict=True)
    }


@norms
def test_the_norms_meaning_is_that_of_pytorchs_operators_in_float64(norm):
    arguments = norm_arguments(norm, torch.float64)
    expected = norm_by_pytorch(norm, *arguments)
    _, x, slope, weight, bias, mean, variance = arguments
    if norm == "evaluation":
        mean, variance = (t[:, None] for t in (mean, variance))
    else:
        variance, mean = torch.var_mean(
            x, (2,) if norm == "instance" else (0, 2), correction=0, keepdim=True
        )
    y = reference.norm_prelu(x, slope, weight, bias, mean, variance, 1e-5)
    torch.testing.assert_close(y, expected["y"])
    exact = reference.norm_exact(y > 0, *arguments, eps=1e-5, **NORMS[norm])
    assert exact.keys() == {name for name, result in expected.items() if result is not None}
    for name, (value, _, _) in exact.items():
        torch.testing.assert_close(value, expected[name])


@norms
@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
def test_right_norms_have_no_mistake_and_each_mistake_is_named(dtype, norm):
    arguments = norm_arguments(norm, dtype)
    right = norm_by_pytorch(norm, *arguments)
    exact = reference.norm_exact(~right["y"].signbit(), *arguments, eps=1e-5, **NORMS[norm])
    assert not [*reference.norm_mistakes(right, exact)]
    for name, result in right.items():
        if result is not None:
            words = reference.NORM_RESULTS[name]
            for spoilt in (result * 1.03, result * torch.nan, result.flatten()[:-1]):
                (mistake,) = reference.norm_mistakes({**right, name: spoilt}, exact)
                assert mistake.startswith(f"{words}: ")


@pytest.mark.parametrize("name", ["y", "grad_x"])
def test_one_wrong_element_of_a_norm_is_found(name):
    arguments = norm_arguments("batch")
    exact = reference.norm_exact(arguments[1] > 0, *arguments, eps=1e-5, **NORMS["batch"])
    wrong = norm_by_pytorch("batch", *arguments)[name].clone()
    wrong[1, 2, 3] += 1e-5 * wrong.abs().max()
    (mistake,) = reference.norm_mistakes({name: wrong}, exact)
    assert "1 of 210 elements are wrong, the first at (1, 2, 3)" in mistake


def test_gradients_follow_the_computed_side_of_the_kink_only_next_to_it():
    x = torch.tensor([[1e-7], [-1e-7], [0.5], [-0.5]])
    one, zero = torch.ones(1), torch.zeros(1)
    arguments = torch.ones(4, 1), x, 0.25, one, zero, zero, one
    for positive, expected in (
        (x > 0, [1.0, 0.25, 1.0, 0.25]),
        (x < 0, [0.25, 1.0, 1.0, 0.25]),
    ):
        exact = reference.norm_exact(positive, *arguments, eps=0.0, **NORMS["evaluation"])
        assert exact["grad_x"].value.flatten().tolist() == expected
        assert "grad_slope" not in exact, "a number has no gradient"


def test_a_norm_without_parameters_has_those_of_1_and_0():
    grad_y, x, slope, weight, bias, *running = norm_arguments("batch")
    given = grad_y, x, slope, torch.ones_like(weight), torch.zeros_like(bias), *running
    right = norm_by_pytorch("batch", *given)
    exact = reference.norm_exact(
        ~right["y"].signbit(), grad_y, x, slope, None, None, *running, eps=1e-5, **NORMS["batch"]
    )
    assert exact.keys() == right.keys() - {"grad_weight", "grad_bias"}
    assert not [*reference.norm_mistakes({name: right[name] for name in exact}, exact)]
