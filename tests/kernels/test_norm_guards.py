"""Norms with PReLU: copies, running statistics, the same bits, no access outside of tensors."""

import math

import pytest
import torch
from support import MARGIN, assert_same, id_of, norm_call, randn
from test_guards import shuffle  # noqa: F401, a fixture
from test_norm import PARTS, SHAPE, part

import prelu_gpu
from prelu_gpu.launch_norm import norm_prelu_backward, norm_prelu_forward
from prelu_gpu.rules import Kind
from prelu_gpu.run import execute, intercepting

TILES = {
    "plane": (Kind.PLANE, (3, 2, 1040), torch.contiguous_format),
    "odd plane": (Kind.ODD_PLANE, (3, 2, 1035), torch.contiguous_format),
    "folded columns": (Kind.COLUMN, (41, 3, 5), torch.contiguous_format),
    "columns": (Kind.COLUMN, (3, 20, 5, 3), torch.channels_last),
}


def tiled(name, device, force, instances=False, slopes=1):
    kind, shape, layout = TILES[name]
    force(kind, "last program")
    options = {"instances": instances, "layout": layout}
    return norm_call(shape, torch.float32, device, slopes, **options)


def assert_same_results(found, expected):
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            assert_same(found[name], value)


@pytest.mark.compiled
@pytest.mark.parametrize("name", TILES)
def test_the_same_bits_on_every_run(name, device, force):
    call = tiled(name, device, force)
    expected = call.results()
    for _ in range(2):
        assert_same_results(call.results(), expected)


@pytest.mark.emulated
@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("instances", [False, True], ids=["batch", "instance"])
def test_the_same_bits_in_any_order_of_programs(name, instances, device, force, shuffle):  # noqa: F811
    call = tiled(name, device, force, instances)
    expected = call.results()
    shuffle()
    assert_same_results(call.results(), expected)


@pytest.mark.emulated
@pytest.mark.parametrize("mode", ["interleaved", "weak"])
@pytest.mark.parametrize("name", TILES)
def test_a_shared_slope_in_a_random_order_of_warps(name, mode, device, force):
    from ptx import driver

    call = tiled(name, device, force, instances=True)
    expected = call.results()
    for seed in range(2):
        with driver.emulation(mode=mode, seed=seed, count=False):
            assert_same_results(call.results(), expected)


@pytest.mark.compiled
@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("name", TILES)
def test_nothing_outside_the_inputs_is_read(name, offset, device, force):
    """Inputs lie between NaN, on the vector grid and off it."""
    call = tiled(name, device, force, slopes=None)

    def between_nan(tensor):
        size = tensor.numel()
        memory = torch.full((size + 2 * MARGIN,), math.nan, dtype=tensor.dtype, device=device)
        inside = memory[MARGIN + offset :][:size].as_strided(
            tensor.shape, tensor.stride(), MARGIN + offset
        )
        return inside.copy_(tensor)

    tensors = ("x", "grad_y", "slope", "weight", "bias", "running_mean", "running_var")
    moved = call._replace(**{name: between_nan(getattr(call, name)) for name in tensors})
    # Off the grid a sum has another order.
    call.check(moved.results())


# Copies


def copies(guarded_allocations, numel):
    buffers = [buffer.numel() - 2 * MARGIN for buffer in guarded_allocations.buffers]
    guarded_allocations.buffers.clear()
    return buffers.count(numel) - 1


COPIED = {
    False: {"crop"},
    # An instance norm's samples must follow one another.
    True: {"crop", "channel slice", "every other image", "transposed", "permuted"}
    | {"channels last slice"},
}


@pytest.mark.parametrize("instances", [False, True], ids=["batch", "instance"])
@pytest.mark.parametrize("name", PARTS)
def test_only_what_no_view_describes_is_copied(name, instances, device, force, guarded_allocations):
    # Columns have no gaps between the channels.
    if name in ("every other channel", "transposed"):
        force(Kind.PLANE)
    call = norm_call(SHAPE, torch.float32, device, instances=instances)
    call = call._replace(x=part(name, device, 21))
    expected = int(name in COPIED[instances])
    guarded_allocations.buffers.clear()
    y, table, *_ = call.forward()
    assert copies(guarded_allocations, y.numel()) == expected
    grad_y = torch.empty_strided(y.shape, y.stride(), device=device).copy_(call.grad_y)
    arguments = (call.x, table, call.slope, call.weight, call.bias, call.norm, call.needs)
    norm_prelu_backward(grad_y, *arguments)
    assert copies(guarded_allocations, y.numel()) == expected
    cropped = part("crop", device, 22)
    norm_prelu_backward(cropped, *arguments)
    assert copies(guarded_allocations, y.numel()) == expected + 1


@pytest.mark.parametrize("instances", [False, True], ids=["batch", "instance"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=id_of)
def test_only_results_are_as_large_as_the_input(
    layout, instances, device, force, guarded_allocations
):
    force()
    call = norm_call((4, 16, 64, 64), torch.float32, device, instances=instances, layout=layout)
    guarded_allocations.buffers.clear()
    with intercepting(lambda *launch: None):
        call.results()
    sizes = sorted(buffer.numel() - 2 * MARGIN for buffer in guarded_allocations.buffers)
    assert sizes[-2:] == [call.x.numel()] * 2
    assert sizes[-3] < call.x.numel() / 4


# Running statistics


@pytest.mark.parametrize("fails", ["forward", "moments", "finish_moments"])
def test_running_statistics_are_as_before_if_a_launch_fails(fails, device):
    call = norm_call((3, 4, 5), torch.float32, device)
    running = [t.clone() for t in (call.running_mean, call.running_var)]
    # What subtracting the update would not give back.
    running[0][1], running[1][2] = math.nan, 1e30
    before = [t.clone() for t in running]
    launched = []

    def refuse(launch, values):
        name = launch.kernel.__name__
        launched.append(name)
        if name.endswith(fails):
            raise RuntimeError("out of luck")
        execute(launch, values)

    arguments = (call.x, call.slope, call.weight, call.bias, *running, call.norm, 0.3)
    with intercepting(refuse), pytest.raises(RuntimeError, match="out of luck"):
        norm_prelu_forward(*arguments, torch.float32)
    assert launched[-1].endswith(fails)
    for now, then in zip(running, before, strict=True):
        assert_same(now, then)


def test_given_statistics_do_not_change(device):
    call = norm_call((3, 4, 5), torch.float32, device, training=False)
    _, _, *running = call.forward()
    assert torch.equal(running[0], call.running_mean)
    assert torch.equal(running[1], call.running_var)


def test_gradients_with_the_negative_bit_and_slopes_that_are_not_contiguous(device):
    """PyTorch's operators serve other tensors of these kinds."""
    call = norm_call((3, 4, 5), torch.float32, device)
    expected = call.results()
    slope = torch.stack([call.slope] * 2, 1)[:, 0]
    negated = torch._neg_view(-call.grad_y)
    assert_same_results(call._replace(slope=slope, grad_y=negated).results(), expected)


def test_running_statistics_forget_the_old_ones_where_momentum_is_one(device):
    """Their rounding, too: it would be all of a small variance."""
    x = randn((64, 4, 8, 8), torch.float32, device) * 3e-4
    running_mean, running_var = (torch.full((4,), 1e4, device=device) for _ in range(2))
    prelu_gpu.batch_norm_prelu(x, 0.1, running_mean, running_var, training=True, momentum=1.0)
    exact = x.double().var((0, 2, 3))
    assert ((running_var - exact).abs() <= 1e-6 * exact).all()
    assert ((running_mean - x.double().mean((0, 2, 3))).abs() <= 1e-6 * exact.sqrt()).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_parameters_of_many_samples_are_summed_by_one_more_launch(layout, device, force, launches):
    force()
    call = norm_call((70, 3, 4, 4), torch.float32, device, instances=True, layout=layout)
    call.check()
    assert launches[3:7] == [*launches[3:4], *["finish_gradients"] * 2, *launches[6:7]]


@pytest.mark.gpu
@pytest.mark.usefixtures("unguarded_allocations")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=id_of)
def test_a_thousand_repeats_and_the_memory_beside_the_results(layout, device):
    call = norm_call((32, 64, 56, 56), torch.float16, device, slopes=1, layout=layout)
    expected = call.results()
    for _ in range(1000):
        assert_same_results(call.results(), expected)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call.results()
    # Beside y and grad_x there are tables, each of 2^18 numbers at most.
    assert torch.cuda.max_memory_allocated() - before < 2 * call.x.nbytes + 2**22
