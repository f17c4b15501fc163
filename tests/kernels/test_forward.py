import math

import pytest
import torch
from support import DTYPES, PAIRS, assert_same, channel_dim, id_of, randn

from prelu_gpu import composed, leaky_relu, prelu
from prelu_gpu.rules import Kind, gpu_rules, rules_for

pytestmark = pytest.mark.usefixtures("launches")

# Tiles of a forward plane, in elements: the edges to test around.
TILE = {dtype: gpu_rules(1, dtype.itemsize, False).plane.size // dtype.itemsize for dtype in DTYPES}
VECTOR = {dtype: 16 // dtype.itemsize for dtype in DTYPES}

SPECIAL = (0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 3e4, -3e4)
SLOPES = (0.0, 1.0, 0.25, -0.5, 3.0, math.nan, math.inf, -0.0)


def sizes_around_tiles(dtype):
    v, tile = VECTOR[dtype], TILE[dtype]
    return [1, v - 1, v, v + 1, tile - 1, tile, tile + 1, 3 * tile + v + 1, 2 * tile + v]


def check(x, weight, dim=1):
    assert_same(
        prelu(x, weight, dim=dim), composed.prelu_forward(x, weight, channel_dim(x, weight, dim))
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize("kind", [Kind.FLAT, Kind.COLUMN], ids=id_of)
def test_shared_slope_around_every_tile_edge(dtype, kind, device, force):
    force(kind)
    more_tiles_than_programs = 70 * TILE[dtype] + VECTOR[dtype] + 1
    for size in filter(None, (*sizes_around_tiles(dtype), more_tiles_than_programs)):
        check(randn((size,), dtype, device), randn((1,), dtype, device, seed=1))


@pytest.mark.parametrize("dtypes", PAIRS, ids=id_of)
@pytest.mark.parametrize("kind", [Kind.PLANE, Kind.ODD_PLANE], ids=id_of)
def test_planes_around_every_tile_edge(dtypes, kind, device, force):
    force(kind)
    for inner in filter(None, sizes_around_tiles(dtypes[0])):
        x = randn((2, 3, inner), dtypes[0], device)
        check(x, randn((3,), dtypes[1], device, seed=1))


def test_one_program_walks_rows_of_several_tiles_and_a_tail(device, force):
    force(Kind.PLANE)
    for inner in (2 * TILE[torch.float32] + 4, 2 * TILE[torch.float32] + 7):
        x = randn((32, 2, inner), torch.float32, device)
        check(x, randn((2,), torch.float32, device, seed=1))


@pytest.mark.parametrize("dtypes", PAIRS, ids=id_of)
@pytest.mark.parametrize(
    ("outer", "channels", "inner"),
    [
        *((1, 1, 5), (9, 1, 1), (40, 3, 1), (700, 3, 1), (333, 12, 1), (70, 90, 1), (9, 512, 1)),
        *((5, 12, 49), (3, 90, 7), (17, 3, 391), (4, 7, 128), (9, 2, 1024)),
    ],
)
def test_columns(dtypes, outer, channels, inner, device, force):
    force(Kind.COLUMN)
    x = randn((outer, channels, inner), dtypes[0], device)
    check(x, randn((channels,), dtypes[1], device, seed=1))


def test_more_channels_than_programs_down_the_rows(device, force):
    force(Kind.PLANE)
    check(randn((3, 40, 8), torch.float32, device), randn((40,), torch.float32, device, seed=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=id_of)
def test_more_tiles_along_columns_than_down_the_rows(dtype, device, force):
    force(Kind.COLUMN)
    check(randn((20, 9000), dtype, device), randn((9000,), dtype, device, seed=1))


@pytest.mark.parametrize("kind", [Kind.PLANE, Kind.COLUMN, None], ids=id_of)
@pytest.mark.parametrize(
    ("shape", "layout", "dim"),
    [
        ((2, 5, 6, 7), torch.contiguous_format, 1),
        ((2, 3, 4, 5), torch.channels_last, 1),
        ((2, 3, 4, 5, 6), torch.contiguous_format, 1),
        ((2, 3, 2, 3, 4), torch.channels_last_3d, 1),
        ((6, 9), torch.contiguous_format, 1),
        ((6, 9), torch.contiguous_format, 0),
        ((2, 6, 9), torch.contiguous_format, -1),
        ((2, 3, 4, 5), torch.contiguous_format, -2),
        ((1, 4, 3, 3), torch.channels_last, 1),
        ((3, 1, 2, 3), torch.contiguous_format, 1),
    ],
)
def test_layouts(shape, layout, dim, kind, device, force):
    force(kind)
    x = randn(shape, torch.float32, device).contiguous(memory_format=layout)
    check(x, randn((shape[dim],), torch.float32, device, seed=1), dim)
    check(x, randn((1,), torch.float32, device, seed=1), dim)


def test_permuted_sliced_expanded_and_offset_inputs(device):
    base = randn((4, 6, 10), torch.float32, device)
    for x in (
        base.permute(2, 0, 1),
        base.transpose(0, 2),
        base[:, 1:4],
        base[..., ::2],
        base[:, :1].expand(4, 5, 10),
        base.flatten()[3:].view(-1, 3),
        base.flatten()[1:-7].view(2, 4, -1),
    ):
        check(x, randn((x.shape[1],), torch.float32, device, seed=1))
        check(x, randn((), torch.float32, device, seed=1))


def test_slopes_that_are_not_contiguous(device):
    x = randn((4, 6, 10), torch.float32, device)
    check(x, randn((12,), torch.float32, device)[::2])
    check(x, randn((1,), torch.float32, device).expand(6))


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
def test_zero_dimensional_and_one_dimensional_inputs(dtype, device):
    for shape in ((), (1,), (7,)):
        for slope_shape in ((), (1,)):
            check(randn(shape, dtype, device), randn(slope_shape, dtype, device, seed=1))


@pytest.mark.parametrize("dtypes", PAIRS, ids=id_of)
@pytest.mark.parametrize("kind", [Kind.PLANE, Kind.COLUMN], ids=id_of)
def test_special_values_and_slopes(dtypes, kind, device, force):
    force(kind)
    tiny = torch.finfo(dtypes[0]).smallest_normal
    values = [*SPECIAL, tiny, -tiny, tiny / 8, -tiny / 8, torch.finfo(dtypes[0]).max]
    x = torch.tensor(values, dtype=dtypes[0], device=device).repeat(2, len(SLOPES), 1)
    check(x, torch.tensor(SLOPES, dtype=dtypes[1], device=device))
    for slope in SLOPES:
        check(x, torch.tensor([slope], dtype=dtypes[1], device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize("slope", [0.01, 0.2, 0.0, 1.0, -0.3, 2.5, 1 / 3])
def test_leaky_relu_bit_for_bit(dtype, slope, device, force):
    force()
    x = randn((TILE[dtype] + 5,), dtype, device)
    x[: len(SPECIAL)] = torch.tensor(SPECIAL, dtype=dtype, device=device)
    expected = torch.nn.functional.leaky_relu(x, slope)
    assert_same(leaky_relu(x, slope), expected)
    assert leaky_relu(x, slope, inplace=True) is x
    assert_same(x, expected)


def test_leaky_relu_layouts_and_slices_in_place(device):
    for part in (
        lambda base: base.contiguous(memory_format=torch.channels_last),
        lambda base: base.permute(3, 0, 2, 1),
        lambda base: base[:, 1:4],
        lambda base: base[..., 0],
    ):
        ours, torchs = (randn((4, 6, 10, 3), torch.float32, device) for _ in range(2))
        expected = torch.nn.functional.leaky_relu(part(torchs))
        assert_same(leaky_relu(part(ours)), expected)
        torch.nn.functional.leaky_relu(part(torchs), inplace=True)
        leaky_relu(part(ours), inplace=True)
        assert_same(ours, torchs)


@pytest.mark.compiled
def test_bfloat16_stores_round_to_nearest_even(device):
    x = -torch.rand(1 << 16, device=device).bfloat16()
    check(x, torch.rand((), device=device).bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2**31 + 24,), (2, 3, 2**29 + 1), (2**29 + 3, 5)], ids=str)
def test_more_than_two_to_the_31_elements(shape, device):
    x = torch.full(shape, -1.0, dtype=torch.float16, device=device)
    channels = shape[1] if len(shape) > 1 else 1
    weight = torch.arange(1.0, channels + 1, device=device, requires_grad=True)
    y = prelu(x, weight)
    for channel in range(channels):
        assert (y.select(1, channel) if channels > 1 else y).eq(-1.0 - channel).all()
    y.backward(x)
    summands = x.numel() // channels
    torch.testing.assert_close(weight.grad, torch.full_like(weight, summands))


def test_plan_kinds_are_forced(device, force, launches):
    for kind in (Kind.PLANE, Kind.COLUMN):
        force(kind)
        prelu(randn((2, 3, 8), torch.float32, device), randn((3,), torch.float32, device))
    assert launches == ["plane_forward", "column_forward"]
    assert rules_for(device, 4, False).kind is Kind.COLUMN
