"""Same bits in any order, and no access outside the tensors, wherever they lie in memory."""

import contextlib
import itertools
import math
import random

import pytest
import torch
from support import (
    DTYPES,
    EMULATED,
    GPU,
    MARGIN,
    REDUCTIONS,
    assert_same,
    backward,
    id_of,
    integers,
    randn,
)

from prelu_gpu import prelu
from prelu_gpu.rules import Kind

pytestmark = pytest.mark.usefixtures("launches")

SHAPES = {
    Kind.FLAT: (1, 1, 5003),
    Kind.PLANE: (3, 2, 2064),
    Kind.COLUMN: (31, 12, 49),
    Kind.ODD_PLANE: (3, 2, 2061),
}
# Columns always have a second launch.
TWO_STAGE = [
    *itertools.product((Kind.FLAT, Kind.PLANE, Kind.ODD_PLANE), REDUCTIONS[:2]),
    (Kind.COLUMN, "second launch"),
]


def outcome(kind, dtype, device):
    shape = SHAPES[kind]
    x, grad_y = (randn(shape, dtype, device, seed) for seed in (0, 1))
    weight = randn((shape[1],), dtype, device, seed=2)
    return backward(prelu, x, weight, grad_y)


@pytest.mark.parametrize(("kind", "reduction"), TWO_STAGE, ids=id_of)
def test_two_stage_gives_the_same_bits_in_twenty_runs(kind, reduction, device, force):
    force(kind, reduction)
    first = outcome(kind, torch.float32, device)
    for _ in range(19):
        for value, again in zip(first, outcome(kind, torch.float32, device), strict=True):
            assert torch.equal(value, again)


@pytest.fixture
def shuffle(monkeypatch):
    """Makes the programs of all launches that follow run in a random order."""
    if EMULATED:
        from ptx import driver

        with contextlib.ExitStack() as stack:
            emulation = driver.emulation(mode="interleaved", window=1, count=False)
            yield lambda: stack.enter_context(emulation)
        return
    from triton.runtime.interpreter import interpreter_builder

    set_grid_idx, orders = interpreter_builder.set_grid_idx, {}

    def shuffled(*index):
        grid = tuple(interpreter_builder.grid_dim)
        if grid not in orders:
            orders[grid] = [random.Random(axis).sample(range(n), n) for axis, n in enumerate(grid)]
        set_grid_idx(*(orders[grid][axis][i] for axis, i in enumerate(index)))

    yield lambda: monkeypatch.setattr(interpreter_builder, "set_grid_idx", shuffled)
    assert any(order != sorted(order) for grid in orders.values() for order in grid)


@pytest.mark.skipif(GPU, reason="a GPU's programs run in an order of its own")
@pytest.mark.parametrize(("kind", "reduction"), TWO_STAGE, ids=id_of)
def test_two_stage_gives_the_same_bits_in_any_program_order(
    kind, reduction, device, force, shuffle
):
    force(kind, reduction)
    expected = outcome(kind, torch.float32, device)
    shuffle()
    for value, again in zip(expected, outcome(kind, torch.float32, device), strict=True):
        assert torch.equal(value, again)


@pytest.mark.parametrize("offset", [0, 1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize("kind", list(Kind), ids=id_of)
def test_nothing_outside_the_inputs_is_read(kind, dtype, offset, device, force):
    """Inputs lie between NaN, at storage offsets off the vector grid."""
    force(kind)

    def between_nan(tensor):
        buffer = torch.full((tensor.numel() + 2 * MARGIN,), math.nan, dtype=dtype, device=device)
        inside = buffer[MARGIN + offset :][: tensor.numel()].view(tensor.shape)
        return inside.copy_(tensor)

    outer, channels, inner = SHAPES[kind]
    shape = (min(outer, 5), channels, inner // 2)
    # Whole numbers, whose sums are exact: off the grid a sum has another order.
    x, grad_y = (integers(shape, dtype, device, seed) for seed in (0, 1))
    weight = randn((channels,), dtype, device, seed=2)
    expected = backward(prelu, x, weight, grad_y)
    given = backward(prelu, *map(between_nan, (x, weight, grad_y)))
    for value, reference in zip(given, expected, strict=True):
        assert_same(value, reference)
