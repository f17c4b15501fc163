"""The README's section "What it computes", a test for each of its sentences."""

import math
from pathlib import Path

import pytest
import torch
from support import (
    PAIRS,
    assert_same,
    backward,
    exact_grad_weight,
    id_of,
    integers,
    randn,
)

import prelu_gpu
from prelu_gpu import leaky_relu, prelu

HALF = torch.float16, torch.bfloat16
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=id_of)
each_half = pytest.mark.parametrize("dtype", HALF, ids=id_of)
each_slope = pytest.mark.parametrize("a", [0.25, 0.0, -0.5, 3.0])
with_kernels = pytest.mark.usefixtures("launches")


def inputs(dtype, device):
    """What may be special about x, and 1000 numbers that are not."""
    tiny, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    subnormal = tiny * torch.finfo(dtype).eps
    magnitudes = (0.0, math.inf, math.nan, 1.0, largest, tiny, tiny / 4, 3 * subnormal, subnormal)
    special = torch.tensor([sign * m for m in magnitudes for sign in (1, -1)], dtype=dtype)
    return torch.cat([special.to(device), randn((1000,), dtype, device)])


def slope(a, x):
    return torch.tensor(a, dtype=x.dtype, device=x.device)


def keras(x, a):
    return torch.relu(x) - a * torch.relu(-x)


def maximum(x, a):
    return torch.maximum(x, a * x)


def assert_equal(actual, expected):
    """Equal numbers; zeros may differ in their sign."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# The function


@with_kernels
@each_dtype
@each_slope
def test_prelu_is_x_where_x_is_positive_else_a_times_x(a, dtype, device):
    x = inputs(dtype, device)
    assert_same(prelu(x, slope(a, x)), torch.where(x > 0, x, slope(a, x) * x))


@with_kernels
@each_dtype
@each_slope
def test_forward_and_input_gradient_are_pytorchs_bit_for_bit(a, dtype, device):
    x = inputs(dtype, device)
    y, grad_x, _ = backward(prelu, x, slope(a, x), x.flip(0))
    expected_y, expected_grad_x, _ = backward(torch.prelu, x, slope(a, x), x.flip(0))
    assert_same(y, expected_y)
    assert_same(grad_x, expected_grad_x)


@with_kernels
@each_dtype
@each_slope
def test_so_are_leaky_relus(a, dtype, device):
    x = inputs(dtype, device).requires_grad_()
    y, expected_y = leaky_relu(x, a), torch.nn.functional.leaky_relu(x, a)
    assert_same(y.detach(), expected_y.detach())
    grad_y = x.detach().flip(0)
    assert_same(*(torch.autograd.grad(output, x, grad_y)[0] for output in (y, expected_y)))


# PReLU and Leaky ReLU


@with_kernels
@pytest.mark.parametrize("slopes", [[0.7], [0.7, -0.5, 2.0]], ids=["shared", "channel-wise"])
def test_prelu_learns_one_slope_for_everything_or_one_for_each_channel(slopes, device):
    x = randn((50, 3), torch.float64, device)
    target = torch.where(x > 0, x, torch.tensor(slopes, device=device) * x)
    act = prelu_gpu.PReLU(len(slopes), device=device, dtype=torch.float64)
    optimizer = torch.optim.SGD(act.parameters(), lr=len(slopes))
    for _ in range(12):
        optimizer.zero_grad()
        (act(x) - target).square().mean().backward()
        optimizer.step()
    assert act.weight.shape == (len(slopes),)
    assert act.weight.tolist() == pytest.approx(slopes, abs=1e-3)


@with_kernels
@each_dtype
def test_leaky_relu_is_prelu_with_a_fixed_slope(dtype, device):
    x = inputs(dtype, device)
    act = prelu_gpu.LeakyReLU(0.2)
    assert list(act.parameters()) == []
    a = torch.tensor(0.2, dtype=torch.promote_types(dtype, torch.float32), device=device)
    assert_same(act(x), prelu(x, a))


@with_kernels
def test_the_slope_of_leaky_relu_is_a_hundredth_if_none_is_given(device):
    x = inputs(torch.float32, device)
    for y in (leaky_relu(x), prelu_gpu.LeakyReLU()(x)):
        assert_same(y, prelu(x, slope(0.01, x)))


# max(x, a * x)


@with_kernels
@each_dtype
@pytest.mark.parametrize("a", [0.01, 0.25, 0.99, 1.0])
def test_for_slopes_above_0_up_to_1_prelu_is_the_maximum_bit_for_bit(a, dtype, device):
    x = inputs(dtype, device)
    assert_same(prelu(x, slope(a, x)), maximum(x, slope(a, x)))


@with_kernels
@each_dtype
def test_for_slope_0_prelu_is_the_maximum_but_at_inf(dtype, device):
    x = inputs(dtype, device)
    y, z = prelu(x, slope(0.0, x)), maximum(x, slope(0.0, x))
    at_inf = x == math.inf
    assert_same(y[~at_inf], z[~at_inf])
    assert y[at_inf].tolist() == [math.inf]
    assert z[at_inf].isnan().all()


@with_kernels
@each_dtype
def test_for_slope_0_prelu_is_relu_but_at_minus_inf(dtype, device):
    x = inputs(dtype, device)
    y, z = prelu(x, slope(0.0, x)), torch.relu(x)
    at_minus_inf = x == -math.inf
    assert_equal(y[~at_minus_inf], z[~at_minus_inf])
    assert y[at_minus_inf].isnan().all()
    assert z[at_minus_inf].tolist() == [0.0]


@with_kernels
@each_dtype
@pytest.mark.parametrize("a", [-0.01, -1.0, -3.0])
def test_for_slopes_below_0_prelu_is_the_maximum_up_to_the_sign_of_a_zero(a, dtype, device):
    x = inputs(dtype, device)
    y, z = prelu(x, slope(a, x)), maximum(x, slope(a, x))
    assert_same(y[x != 0], z[x != 0])
    # The maximum of 0.0 and -0.0 is either; torch's own choice changes with the tensor's size.
    assert_same(y[:2], slope(a, x) * x[:2])
    assert z[:2].tolist() == [0, 0]


@with_kernels
@each_dtype
@pytest.mark.parametrize("a", [1.5, 100.0])
def test_for_slopes_above_1_prelu_is_the_minimum_bit_for_bit(a, dtype, device):
    x = inputs(dtype, device)
    assert_same(prelu(x, slope(a, x)), torch.minimum(x, slope(a, x) * x))


@with_kernels
@each_dtype
@pytest.mark.parametrize("a", [1.5, 100.0])
def test_for_slopes_above_1_the_maximum_bends_the_other_way(a, dtype, device):
    x = inputs(dtype, device)
    y, z = prelu(x, slope(a, x)), maximum(x, slope(a, x))
    assert_same(z, torch.where(x > 0, slope(a, x) * x, x))
    assert torch.equal(y != z, x.isnan() | (x != 0) & x.isfinite())


# The gradient at 0


@with_kernels
@each_dtype
@each_slope
def test_at_0_the_gradient_is_a_here_and_in_pytorch_and_other_elsewhere(a, dtype, device):
    x = torch.tensor([0.0, -0.0], dtype=dtype, device=device)
    for function, gradient in (
        (prelu, a),
        (torch.prelu, a),
        (keras, 0.0),
        (maximum, (1 + a) / 2),
    ):
        _, grad_x, _ = backward(function, x, slope(a, x), torch.ones_like(x))
        assert grad_x.tolist() == [gradient] * 2, function


@with_kernels
def test_at_0_leaky_relus_gradient_is_the_slope(device):
    x = torch.zeros(1, device=device, requires_grad=True)
    leaky_relu(x, 0.25).backward()
    assert x.grad.tolist() == [0.25]


@with_kernels
@each_dtype
@each_slope
def test_at_every_other_number_kerass_gradients_are_equal(a, dtype, device):
    x = inputs(dtype, device)
    x = x[(x != 0) & ~x.isnan()]
    grad_y = randn(x.shape, dtype, device, seed=1)
    _, grad_x, _ = backward(prelu, x, slope(a, x), grad_y)
    _, expected, _ = backward(keras, x, slope(a, x), grad_y)
    assert_equal(grad_x, expected)


@with_kernels
@each_dtype
@each_slope
def test_everywhere_kerass_values_are_equal(a, dtype, device):
    x = inputs(dtype, device)
    assert_equal(prelu(x, slope(a, x)), keras(x, slope(a, x)))


@with_kernels
@pytest.mark.parametrize(("shared_axes", "shape"), [(None, (3, 5)), ([2], (3, 1)), ([1], (1, 5))])
def test_shared_axes_prelu_is_kerass_layer_with_its_slope_gradient(shared_axes, shape, device):
    act = prelu_gpu.SharedAxesPReLU((3, 5), shared_axes, device=device)
    assert act.weight.tolist() == torch.zeros(shape).tolist()
    torch.nn.init.normal_(act.weight)
    # Quarters of whole numbers: in whichever order, their sums are exact.
    x, grad_y = (integers((4, 3, 5), torch.float32, device, seed) / 4 for seed in (0, 1))
    ours, kerass = act(x), keras(x, act.weight)
    assert_equal(ours, kerass)
    assert_equal(*(torch.autograd.grad(y, act.weight, grad_y)[0] for y in (ours, kerass)))


# The slope gradient


@with_kernels
@pytest.mark.parametrize("dtypes", PAIRS, ids=id_of)
def test_the_slope_gradient_is_summed_wide_and_rounded_once(dtypes, device):
    """Exact in float32, and in float64 beyond float32: any other rounding would show."""
    x = -1 - integers((64,), dtypes[0], device).abs() / 64
    grad_y = 1 + integers((64,), dtypes[0], device, seed=1).abs() / 64
    if dtypes[0] == torch.float64:
        x = x - 2.0**-40
    a = torch.full((), 0.25, dtype=dtypes[1], device=device)
    _, _, grad = backward(prelu, x, a, grad_y)
    exact = exact_grad_weight(x, a, grad_y)
    assert torch.equal(grad, exact.to(dtypes[1]))


@with_kernels
@each_half
def test_in_half_precision_it_is_closer_to_the_true_sum_than_pytorchs(dtype, device):
    x, grad_y = (randn((64, 100), dtype, device, seed) for seed in (0, 1))
    a = torch.full((100,), 0.25, dtype=dtype, device=device)
    exact = exact_grad_weight(x, a, grad_y)
    ours, torchs = (
        (backward(function, x, a, grad_y)[2] - exact).abs() for function in (prelu, torch.prelu)
    )
    assert ours.mean() < torchs.mean()


@with_kernels
def test_the_same_inputs_give_the_same_bits_on_every_run(device, force):
    force()
    x, grad_y = (randn((9, 3, 50), torch.float32, device, seed) for seed in (0, 1))
    for a in (randn((3,), torch.float32, device), randn((), torch.float32, device)):
        first, *others = (backward(prelu, x, a, grad_y) for _ in range(3))
        for other in others:
            for value, expected in zip(other, first, strict=True):
                assert_same(value, expected)


# Slopes, layouts, dtypes


@with_kernels
@pytest.mark.parametrize(
    ("shape", "view", "dim"),
    [
        ((), (1, 1, 1), 1),
        ((1,), (1, 1, 1), 1),
        ((2,), (2, 1, 1), 0),
        ((3,), (1, 3, 1), 1),
        ((4,), (1, 1, 4), 2),
        ((4,), (1, 1, 4), -1),
        ((1, 3, 1), (1, 3, 1), 1),
        ((2, 1, 4), (2, 1, 4), 1),
        ((2, 3, 4), (2, 3, 4), 1),
    ],
)
def test_slopes_are_shared_or_lie_along_any_dim_or_broadcast(shape, view, dim, device):
    x, a = randn((2, 3, 4), torch.float32, device), randn(shape, torch.float32, device, seed=1)
    assert_same(prelu(x, a, dim=dim), torch.where(x > 0, x, a.view(view) * x))


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x,
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.permute(3, 1, 0, 2),
    ],
    ids=["contiguous", "channels_last", "permuted"],
)
def test_dense_layouts_are_read_and_written_without_a_copy(layout, device, calls):
    x = layout(randn((2, 3, 4, 5), torch.float32, device))
    for a in (randn((x.shape[1],), torch.float32, device), randn((), torch.float32, device)):
        y = prelu(x, a)
        assert y.stride() == x.stride()
        values = calls[-1][1]
        assert (values["x_ptr"].data_ptr(), values["y_ptr"].data_ptr()) == (
            x.data_ptr(),
            y.data_ptr(),
        )
    assert len(calls) == 2


@with_kernels
@pytest.mark.parametrize("dtypes", PAIRS, ids=id_of)
def test_every_dtype_and_half_precision_beside_a_float32_slope(dtypes, device):
    x = inputs(dtypes[0], device)
    a = torch.tensor(0.01, dtype=dtypes[1], device=device)
    wide = x.to(dtypes[1])
    assert_same(prelu(x, a), torch.where(wide > 0, wide, a * wide).to(dtypes[0]))


@with_kernels
@each_half
def test_autocast_rounds_the_slope_in_pytorch_and_not_here(dtype, device):
    x, a = randn((1000,), torch.float32, device), torch.tensor([0.01], device=device)
    with torch.autocast(device.type, dtype):
        ours, torchs = prelu(x, a), torch.prelu(x, a)
    half = x.to(dtype)
    assert_same(ours, torch.where(half > 0, half, (a * half.float()).to(dtype)))
    assert_same(torchs, torch.where(half > 0, half, a.to(dtype) * half))
    assert not torch.equal(ours, torchs)


# The picture


def test_the_picture_shows_the_librarys_values(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from benchmarks import functions

    figures = []
    draw = functions.draw
    monkeypatch.setattr(functions, "draw", lambda: figures.append(draw()) or figures[0])
    functions.main(tmp_path / "new")
    content = (tmp_path / "new" / "functions.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) < 100_000

    function_panel, gradient_panel = figures[0].axes
    for label, y, gradient in (
        ("PReLU, a = \N{MINUS SIGN}0.5", piecewise(-0.5), step(-0.5)),
        ("Leaky ReLU, a = 0.01", piecewise(0.01), step(0.01)),
        ("PReLU, a = 0.25", piecewise(0.25), step(0.25)),
        ("PReLU, a = 2", piecewise(2.0), step(2.0)),
        ("max(x, 2x)", lambda x: torch.maximum(x, 2 * x), lambda x: 1.5 + 0.5 * x.sign()),
    ):
        assert_drawn(function_panel, label, y)
        assert_drawn(gradient_panel, label, gradient)
        for panel in figures[0].axes:
            assert label in [text.get_text() for text in panel.texts]
    assert_drawn(gradient_panel, "by a", lambda x: x.clamp(max=0))


def test_a_folder_that_cannot_be_used_is_refused():
    pytest.importorskip("matplotlib")
    typer = pytest.importorskip("typer")
    from benchmarks import functions

    with pytest.raises(typer.BadParameter, match=r"functions.png cannot be written .*; give"):
        functions.main(Path(__file__))


def piecewise(a):
    return lambda x: torch.where(x > 0, x, a * x)


def step(a):
    return lambda x: torch.where(x > 0, 1.0, a)


def assert_drawn(panel, label, function):
    """The lines of that label show the function from -2 to 2."""
    lines = [
        torch.as_tensor(line.get_xydata()) for line in panel.lines if line.get_label() == label
    ]
    x, y = torch.cat(lines).float().T
    assert (x.min(), x.max()) == (-2, 2)
    assert x.sort().values.diff().max() < 0.025
    assert_equal(y, function(x))
