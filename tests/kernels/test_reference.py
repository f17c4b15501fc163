"""The oracle itself: PyTorch's formulas in float64, and what it tells apart."""

import pytest
import torch
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
