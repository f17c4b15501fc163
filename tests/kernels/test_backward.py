import math

import pytest
import torch
from support import (
    DTYPES,
    PAIRS,
    REDUCTIONS,
    assert_right,
    assert_same,
    backward,
    channel_dim,
    eager_backward,
    exact_grad_weight,
    id_of,
    integers,
    randn,
)

from prelu_gpu import leaky_relu, prelu, reference
from prelu_gpu.kernels.partials import sum_partials
from prelu_gpu.plan import make_sum_plan
from prelu_gpu.rules import Kind, gpu_rules
from prelu_gpu.run import bind, run

pytestmark = pytest.mark.usefixtures("launches")


def tile(dtype):
    return gpu_rules(1, dtype.itemsize, True).plane.size // dtype.itemsize


def cases(kind, dtype):
    """(outer, channels, inner) around the edges of a kind's tiles."""
    v, block = 16 // dtype.itemsize, tile(dtype)
    edges = [n for n in (1, v - 1, v, v + 1, block - 1, block, block + 1, 2 * block + v + 1) if n]
    if kind is Kind.FLAT:
        # The last has more tiles than programs, and a tail.
        return [(1, 1, n) for n in (*edges, 9 * block + 3, 70 * block + v + 3)]
    if kind is Kind.COLUMN:
        return [
            *((1, 3, 5), (40, 3, 1), (700, 3, 1), (333, 12, 1), (70, 90, 1), (9, 512, 1)),
            *((5, 12, 49), (17, 3, 391), (33, 2, 1024)),
        ]
    return [(2, 3, n) for n in edges] + [(9, 2, block + v)]


def check(x, weight, grad_y, dim=1):
    """Input gradient bit for bit PyTorch's, slope gradient within float32's rounding."""
    _, grad_x, grad_weight = backward(prelu, x, weight, grad_y, dim=dim)
    _, eager_grad_x, eager_grad_weight = eager_backward(x, weight, grad_y, dim)
    assert_same(grad_x, eager_grad_x)
    assert grad_weight.dtype == weight.dtype
    assert grad_weight.shape == weight.shape
    assert_right(grad_y, x, weight, dim, grad_x=grad_x, grad_weight=grad_weight)
    # At least as close as eager, up to the float32 sum that the last bit may turn on.
    exact = exact_grad_weight(x, weight, grad_y, dim)
    tolerance = reference.rounding(grad_y, x, weight, dim)
    sum_error = tolerance - torch.finfo(weight.dtype).eps / 2 * exact.abs()
    error = (grad_weight - exact).abs()
    assert (error <= (eager_grad_weight - exact).abs() + sum_error).all()


@pytest.mark.parametrize("dtypes", PAIRS, ids=id_of)
@pytest.mark.parametrize("kind", list(Kind), ids=id_of)
def test_gradients_in_every_kind_of_tile(kind, dtypes, device, force):
    force(kind)
    for shape in cases(kind, dtypes[0]):
        slopes = (1,) if kind is Kind.FLAT else (shape[1],)
        x = randn(shape, dtypes[0], device)
        check(x, randn(slopes, dtypes[1], device, seed=1), randn(shape, dtypes[0], device, seed=2))


@pytest.mark.parametrize(
    ("dtypes", "reduction"),
    [*((dtypes, "last program") for dtypes in PAIRS)]
    + [(PAIRS[0], reduction) for reduction in REDUCTIONS[1:]],
    ids=id_of,
)
@pytest.mark.parametrize("kind", list(Kind), ids=id_of)
def test_whole_numbers_sum_exactly(kind, dtypes, reduction, device, force):
    """No element is left out or counted twice: not one part in the sum may be off."""
    force(kind, reduction)
    for shape in cases(kind, dtypes[0]):
        slopes = (1,) if kind is Kind.FLAT else (shape[1],)
        x = integers(shape, dtypes[0], device)
        weight = integers(slopes, dtypes[1], device, seed=1)
        grad_y = integers(shape, dtypes[0], device, seed=2)
        _, _, grad_weight = backward(prelu, x, weight, grad_y)
        exact = exact_grad_weight(x, weight, grad_y)
        assert torch.equal(grad_weight, exact.to(weight.dtype)), shape


@pytest.mark.parametrize("kind", [Kind.PLANE, Kind.COLUMN, None], ids=id_of)
@pytest.mark.parametrize(
    ("shape", "layout", "dim"),
    [
        ((2, 5, 6, 7), torch.contiguous_format, 1),
        ((2, 3, 4, 5), torch.channels_last, 1),
        ((2, 3, 2, 3, 4), torch.channels_last_3d, 1),
        ((6, 9), torch.contiguous_format, 1),
        ((6, 9), torch.contiguous_format, 0),
        ((2, 6, 9), torch.contiguous_format, -1),
    ],
)
def test_layouts(shape, layout, dim, kind, device, force):
    force(kind)
    x = randn(shape, torch.float32, device).contiguous(memory_format=layout)
    grad_y = randn(shape, torch.float32, device, seed=2)
    for slopes in ((shape[dim],), (1,), ()):
        weight = randn(slopes, torch.float32, device, seed=1)
        check(x, weight, grad_y.contiguous(memory_format=layout), dim)
        check(x, weight, grad_y, dim)
        check(x, weight, torch.ones((), device=device).expand(shape), dim)


def test_permuted_sliced_and_offset_inputs(device):
    base = randn((4, 6, 10), torch.float32, device)
    for x in (base.permute(2, 0, 1), base[:, 1:4], base.flatten()[3:].view(-1, 3)):
        weight = randn((x.shape[1],), torch.float32, device, seed=1)
        check(x, weight, randn(x.shape, torch.float32, device, seed=2))


@pytest.mark.parametrize("dtypes", PAIRS, ids=id_of)
@pytest.mark.parametrize("kind", [Kind.PLANE, Kind.COLUMN, Kind.FLAT], ids=id_of)
def test_special_values(dtypes, kind, device, force):
    force(kind)
    tiny = torch.finfo(dtypes[0]).smallest_normal
    values = (0.0, -0.0, math.inf, -math.inf, math.nan, tiny, -tiny, tiny / 8, -tiny / 8, 1.0, -2.0)
    slopes = (0.0, 1.0, 0.25, -0.5, 3.0, math.nan, math.inf)
    x, grad_y = (
        grid.reshape(1, 1, -1).repeat(2, len(slopes), 1).to(dtypes[0]).to(device)
        for grid in torch.meshgrid(*[torch.tensor(values, dtype=torch.float64)] * 2, indexing="ij")
    )
    weight = torch.tensor(slopes, dtype=dtypes[1], device=device)
    if kind is Kind.FLAT:
        weight = weight[2:3]
    _, grad_x, _ = backward(prelu, x, weight, grad_y)
    assert_same(grad_x, eager_backward(x, weight, grad_y)[1])


@pytest.mark.parametrize("kind", [Kind.PLANE, Kind.COLUMN], ids=id_of)
def test_special_values_reach_their_own_channels_slope_gradient(kind, device, force):
    force(kind)
    x = -torch.ones(2, 5, 6, device=device)
    x[1, 0, 3], x[0, 1, 0], x[1, 2, 5], x[:, 3] = math.nan, math.inf, -math.inf, 0.0
    _, _, grad_weight = backward(prelu, x, torch.ones(5, device=device), torch.ones_like(x))
    assert grad_weight.isnan().tolist() == [True, False, False, False, False]
    assert grad_weight[1:].tolist() == [-11.0, -math.inf, 0.0, -12.0]


@pytest.mark.parametrize("kind", [Kind.FLAT, Kind.COLUMN], ids=id_of)
def test_shared_half_precision_gradient_is_finite_where_eager_overflows(kind, device, force):
    force(kind)
    x = torch.full((4, 64), -300.0, dtype=torch.float16, device=device)
    grad_y = torch.full_like(x, 300.0)
    grad_y[:2] *= -1
    weight = torch.tensor([0.25], dtype=torch.float16, device=device)
    assert not eager_backward(x, weight, grad_y)[2].isfinite()
    assert backward(prelu, x, weight, grad_y)[2].item() == 0.0


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 4), (2, 3, 0)])
@pytest.mark.parametrize("shared", [False, True])
def test_empty_inputs(shape, shared, device, launches):
    x = torch.empty(shape, device=device)
    channels = shape[1] if len(shape) > 1 and not shared else 1
    weight = torch.ones(channels, device=device)
    y, grad_x, grad_weight = backward(prelu, x, weight, torch.empty(shape, device=device))
    assert y.shape == grad_x.shape == shape
    assert torch.equal(grad_weight, torch.zeros(channels, device=device))
    assert launches == []
    launches.append("none, as it should be")


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize(
    ("slope", "inplace"),
    [(slope, inplace) for slope in (0.01, 0.2, 0.0, 2.5, 1 / 3) for inplace in (False, True)]
    + [(-0.3, False)],
)
def test_leaky_relu_gradient_bit_for_bit(dtype, slope, inplace, device, force):
    force()
    x = randn((tile(dtype) + 5,), dtype, device)
    x[:5] = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf])
    grad_y = randn(x.shape, dtype, device, seed=1)
    grads = []
    for function in (leaky_relu, torch.nn.functional.leaky_relu):
        leaf = x.detach().requires_grad_()
        y = function(leaf.clone() if inplace else leaf, slope, inplace)
        grads.append(torch.autograd.grad(y, leaf, grad_y)[0])
    assert_same(*grads)


@pytest.mark.parametrize("kind", [Kind.PLANE, Kind.COLUMN, Kind.FLAT], ids=id_of)
def test_an_infinite_gradient_at_zero_makes_the_slope_gradient_nan(kind, device, force):
    force(kind)
    x = torch.zeros(2, 1, 4, device=device)
    for special in (math.inf, -math.inf, math.nan):
        grad_y = torch.zeros_like(x)
        grad_y[1, 0, 2] = special
        weight = torch.ones(1, device=device)
        assert eager_backward(x, weight, grad_y)[2].isnan()
        assert backward(prelu, x, weight, grad_y)[2].isnan()


def test_one_program_walks_rows_of_several_tiles_and_a_tail(device, force):
    force(Kind.PLANE)
    for inner in (2 * tile(torch.float32) + 4, 2 * tile(torch.float32) + 7):
        x, grad_y = (integers((32, 2, inner), torch.float32, device, seed) for seed in (0, 1))
        check(x, integers((2,), torch.float32, device, seed=2), grad_y)


@pytest.mark.parametrize("kind", list(Kind), ids=id_of)
def test_the_slope_gradient_alone(kind, device, force):
    force(kind)
    x, grad_y = (integers((3, 2, 37), torch.float32, device, seed) for seed in (0, 1))
    weight = torch.ones(1 if kind is Kind.FLAT else 2, device=device, requires_grad=True)
    prelu(x, weight).backward(grad_y)
    assert torch.equal(weight.grad, exact_grad_weight(x, weight, grad_y).float())


@pytest.mark.parametrize("channels", [1, 5, 8, 19])
@pytest.mark.parametrize(("splits", "inner"), [(700, 3), (3, 700), (1, 1), (1, 2000), (1025, 1)])
def test_the_second_stage_in_tiles_of_a_gpu(splits, channels, inner, device):
    partials = integers((splits, channels, inner), torch.float32, device)
    grad_weight = torch.full((channels + 1,), torch.nan, device=device)
    plan = make_sum_plan(partials.shape, interpreted=False)
    values = {"partials_ptr": partials, "grad_weight_ptr": grad_weight[:channels]}
    run(bind(sum_partials, plan), values)
    assert torch.equal(grad_weight[:channels], partials.sum((0, 2)))
    assert grad_weight[channels].isnan()


def test_slopes_that_are_not_contiguous(device):
    x, grad_y = (randn((4, 6, 10), torch.float32, device, seed) for seed in (0, 1))
    check(x, randn((12,), torch.float32, device)[::2], grad_y)
    check(x, randn((1,), torch.float32, device).expand(6), grad_y)


def test_many_channels_with_few_rows(device, force):
    force()
    for shape in ((1, 5113), (2, 3001), (3, 1001), (7, 90), (3, 5, 3)):
        for dtype in (torch.float32, torch.float16):
            x, grad_y = (randn(shape, dtype, device, seed) for seed in (0, 1))
            check(x, randn(shape[1:2], dtype, device, seed=2), grad_y)


def test_leaky_relu_gradient_of_a_sliced_input_by_a_kernel(device, launches):
    base = randn((4, 6, 10), torch.float32, device)
    x = base[:, 1:4].requires_grad_()
    (grad_x,) = torch.autograd.grad(leaky_relu(x, 0.2), x, torch.ones_like(x))
    assert launches == ["column_forward", "column_backward"]
    assert torch.equal(grad_x, torch.where(x > 0, 1.0, 0.2))


@pytest.mark.parametrize("inplace", [False, True])
def test_leaky_relu_of_nothing(inplace, device, launches):
    x = torch.empty(0, 3, device=device, requires_grad=True)
    hidden = x * 1
    y = leaky_relu(hidden, inplace=inplace)
    assert (y is hidden) == inplace
    y.sum().backward()
    assert x.grad.shape == x.shape
    launches.append("none, as it should be")


def test_tensors_with_the_negative_bit(device):
    complex_values = torch.randn(3, 4, 5, dtype=torch.complex64, device=device)
    x = complex_values.conj().imag
    assert x.is_neg()
    weight = torch._neg_view(randn((4,), torch.float32, device))
    grad_y = torch._neg_view(randn((3, 4, 5), torch.float32, device, seed=1))
    dense = torch._neg_view(randn((3, 4, 5), torch.float32, device, seed=2))
    for given in (x, dense):
        plain = backward(prelu, given.resolve_neg(), weight.resolve_neg(), grad_y.resolve_neg())
        for value, expected in zip(backward(prelu, given, weight, grad_y), plain, strict=True):
            assert torch.equal(value, expected)
    expected = torch.nn.functional.leaky_relu(dense)
    assert torch.equal(leaky_relu(dense, inplace=True), expected)
    assert torch.equal(dense, expected)


def test_a_gradient_that_lies_alike_is_not_copied(device, guarded_allocations):
    x = randn((6, 3, 1, 1), torch.float32, device).requires_grad_()
    y = prelu(x, randn((3,), torch.float32, device, seed=1))
    grad_y = torch.ones_like(x).contiguous(memory_format=torch.channels_last)
    grad_y = grad_y.as_strided(x.shape, (3, 1, 777, 3))
    guarded_allocations.buffers.clear()
    y.backward(grad_y)
    assert len(guarded_allocations.buffers) == 1


def test_gradient_with_foreign_dim(device):
    x = randn((2, 3, 4), torch.float32, device)
    weight = randn((4,), torch.float32, device, seed=1)
    assert channel_dim(x, weight, -1) == 2
    check(x, weight, randn(x.shape, torch.float32, device, seed=2), dim=-1)
