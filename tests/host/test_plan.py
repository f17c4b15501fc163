import itertools
import math
import random

import pytest
import torch

from prelu_gpu import launch, prelu
from prelu_gpu.layout import DENSE, Gaps, View, dense_stride, is_dense, make_view
from prelu_gpu.plan import (
    COLUMNS_LIMIT,
    FULL_TILE,
    GRID_LIMIT,
    choose_kind,
    make_plan,
    make_sum_plan,
)
from prelu_gpu.rules import Kind, gpu_rules, interpreter_rules, using_rules


def rules(itemsize=4, backward=False):
    return gpu_rules(132, itemsize, backward)


@pytest.mark.parametrize("permutation", list(itertools.permutations(range(4))))
@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 1, 5), (1, 3, 4, 1), (2, 1, 4, 5)])
def test_view_gives_each_element_of_memory_its_channel(shape, permutation, dim):
    inverse = [permutation.index(d) for d in range(4)]
    x = torch.empty(shape).permute(permutation).contiguous().permute(inverse)
    assert x.shape == shape
    layout = make_view(x.shape, x.stride(), dim)
    assert layout.numel == x.numel()
    channel_in_memory = torch.arange(x.numel()) // layout.inner % layout.channels
    by_index = (
        torch.arange(shape[dim]).view([-1 if d == dim else 1 for d in range(4)]).expand(shape)
    )
    assert torch.equal(channel_in_memory.as_strided(x.shape, x.stride()), by_index)


@pytest.mark.parametrize(
    ("x", "dim", "expected"),
    [
        (torch.empty(2, 3, 4, 5), None, View(1, 1, 120)),
        (torch.empty(2, 3, 4, 5), 1, View(2, 3, 20)),
        (torch.empty(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), 1, View(40, 3, 1)),
        (
            torch.empty(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d),
            1,
            View(240, 3, 1),
        ),
        (torch.empty(7, 9), 1, View(7, 9, 1)),
        (torch.empty(7, 8, 9), 2, View(56, 9, 1)),
        (torch.empty(7, 9).t(), 1, View(1, 7, 9)),
    ],
)
def test_view_of_the_layouts_in_use(x, dim, expected):
    assert make_view(x.shape, x.stride(), dim) == expected


@pytest.mark.parametrize(
    "x",
    [
        torch.empty(()),
        torch.empty(4, 5),
        torch.empty(4, 5).t(),
        torch.empty(4, 5)[:, :3],
        torch.empty(4, 5)[::2],
        torch.empty(4, 1).expand(4, 5),
        torch.empty(4, 1, 5).as_strided((4, 1, 5), (5, 777, 1)),
        torch.empty(2, 3, 4, 5).permute(2, 0, 3, 1),
        torch.empty(10).as_strided((4, 3), (2, 1)),
    ],
)
def test_is_dense_agrees_with_pytorch(x):
    assert is_dense(x.shape, x.stride()) == torch.ops.aten.is_non_overlapping_and_dense(x)


def test_results_have_the_strides_that_pytorch_gives_them():
    choice = random.Random(0).choices
    for _ in range(5000):
        dims = choice(range(6))[0]
        shape, stride = (tuple(choice(of, k=dims)) for of in ((0, *[1, 2, 3] * 4), STRIDES))
        expected = torch.empty_like(torch.empty_strided(shape, stride)).stride()
        assert dense_stride(shape, stride) == expected, (shape, stride)


STRIDES = (0, 1, 2, 3, 4, 6, 8, 12, 24)


@pytest.mark.parametrize(
    ("layout", "itemsize", "kind"),
    [
        (View(1, 1, 2 * 32 * 96**3), 4, Kind.FLAT),
        (View(128, 64, 112 * 112), 2, Kind.PLANE),
        (View(128, 64, 56 * 56), 4, Kind.PLANE),
        (View(128, 512, 7 * 7), 4, Kind.COLUMN),
        (View(128 * 112 * 112, 64, 1), 2, Kind.COLUMN),
        (View(100_000, 512, 1), 4, Kind.COLUMN),
        (View(360 * 640, 90, 1), 2, Kind.COLUMN),
        (View(64, 64, 391), 4, Kind.COLUMN),
        (View(1, 12, 10_007), 4, Kind.ODD_PLANE),
        (View(1, 512, 7 * 7), 4, Kind.COLUMN),
        (View(2, 3, 5), 4, Kind.COLUMN),
        (View(2, 2**31, 1), 4, Kind.ODD_PLANE),
        (View(8, 64, 100_003), 4, Kind.ODD_PLANE),
    ],
)
def test_kind_of_the_shapes_in_use(layout, itemsize, kind):
    assert choose_kind(layout, itemsize, rules(itemsize, backward=True)) is kind


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("channels", [1, 3, 12, 64, 90, 512, 1001])
@pytest.mark.parametrize("inner", [1, 7, 49, 391])
def test_folded_rows_are_whole_vectors_in_full_tiles(channels, inner, itemsize):
    layout = View(1_000_000, channels, inner)
    row = rules(itemsize)
    launch = make_plan(layout, itemsize, _forced(row, Kind.COLUMN))
    columns = launch.sizes["vectors"] * launch.constants["V"]
    assert columns % (channels * inner) == 0
    assert launch.constants["V"] * itemsize == 16
    assert columns / (launch.grid[0] * launch.constants["BLOCK"]) >= FULL_TILE
    assert launch.sizes["rows"] * columns + launch.sizes["remainder"] == layout.numel
    assert launch.constants["REMAINDER"] == (launch.sizes["remainder"] > 0)


@pytest.mark.parametrize("kind", [Kind.PLANE, Kind.COLUMN, Kind.ODD_PLANE, None])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize(
    "layout",
    [
        View(1, 1, 2**32 + 1),
        View(70_000, 3, 70_001),
        View(3, 70_000, 11),
        View(1, 70_000, 40_000),
        View(2**31, 3, 1),
        View(2, 2**31 - 1, 1),
    ],
)
def test_plans_of_any_size_fit_a_grid(layout, itemsize, kind):
    if kind is Kind.COLUMN and layout.channels * layout.inner >= COLUMNS_LIMIT:
        with pytest.raises(ValueError, match="32 bits, got"):
            make_plan(layout, itemsize, _forced(rules(itemsize), kind))
        return
    launch = make_plan(layout, itemsize, _forced(rules(itemsize, backward=True), kind))
    assert 1 <= launch.grid[0] < 2**31
    assert all(1 <= size <= GRID_LIMIT for size in launch.grid[1:])
    # Offsets within a row of columns are 32 bits wide in the kernel.
    assert launch.sizes.get("vectors", 0) * launch.constants["V"] < 2**31


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    "layout", [View(128, 64, 12544), View(128, 512, 49), View(10**6, 64, 1), View(1, 1, 2**28)]
)
def test_partial_sums_take_at_most_a_mebibyte(layout, itemsize):
    launch = make_plan(layout, itemsize, rules(itemsize, backward=True))
    assert math.prod(launch.partials) * 4 <= 2**20


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("channels", [75, 51_131, 262_145, 1_000_001, 262_148])
@pytest.mark.parametrize("outer", [1, 2, 3, 1000])
def test_many_channels_leave_no_table_of_partial_sums(outer, channels, itemsize):
    launch = make_plan(View(outer, channels, 1), itemsize, rules(itemsize, backward=True))
    assert launch.direct or math.prod(launch.partials) * 4 <= 2**20
    columns = launch.sizes["vectors"] * launch.constants["V"]
    assert launch.sizes["rows"] * columns + launch.sizes["remainder"] == outer * channels
    assert launch.sizes["rows"] >= 1


@pytest.mark.parametrize(
    ("channels", "inner", "itemsize", "vector"),
    [(1001, 49, 2, 4), (1001, 49, 4, 4), (2049, 49, 2, 2), (4097, 49, 4, 1), (51_131, 1, 2, 4)],
)
def test_short_rows_are_columns_of_the_widest_vectors_that_leave_few_sums(
    channels, inner, itemsize, vector
):
    launch = make_plan(View(320, channels, inner), itemsize, rules(itemsize, backward=True))
    assert launch.kind is Kind.COLUMN
    assert launch.constants["V"] == vector
    assert math.prod(launch.partials) <= 2**18
    # Twice as wide vectors were too wide for a thread, or twice as many sums too many.
    assert 2 * vector * itemsize > 16 or 2 * vector * channels * inner > 2**18


@pytest.mark.parametrize(("itemsize", "share"), [(2, 1 / 8), (4, 1 / 16), (8, 1 / 16)])
@pytest.mark.parametrize("layout", [View(8192, 512, 1), View(256, 256, 196), View(256, 512, 49)])
def test_slopes_are_a_small_share_of_what_a_forward_of_columns_accesses(layout, itemsize, share):
    planned = make_plan(layout, itemsize, rules(itemsize))
    blocks, row_splits = planned.grid
    # Warps that lie over the same columns read the same slopes.
    held = max(planned.constants["BLOCK"], 32 * planned.num_warps * planned.constants["V"])
    assert blocks * row_splits * held <= share * 2 * layout.numel * 1.03  # the last tiles' padding


@pytest.mark.parametrize("inner", [1, 3, 4, 8, 12, 1024, 1025])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_edges_only_where_rows_are_no_whole_vectors(inner, itemsize):
    launch = make_plan(View(3, 5, inner), itemsize, _forced(rules(itemsize), Kind.PLANE))
    assert launch.constants["EDGES"] == (inner * itemsize % 16 != 0)


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        (View(10**6, 3, 64), Kind.PLANE),
        (View(1, 3, 2**30), Kind.PLANE),
        (View(10**8, 3, 64), Kind.COLUMN),
    ],
)
def test_a_grid_is_kept_where_many_programs_are_wanted(layout, kind):
    tile = rules().plane._replace(programs=10**9)
    launch = make_plan(layout, 4, rules()._replace(plane=tile, column=tile, kind=kind))
    assert all(size <= GRID_LIMIT for size in launch.grid[1:])
    assert max(launch.grid[1:]) > GRID_LIMIT / 2


@pytest.mark.parametrize(
    ("inner", "kind"),
    [(764, Kind.COLUMN), (768, Kind.PLANE), (765, Kind.COLUMN), (10_004, Kind.PLANE)],
)
def test_rows_are_planes_from_three_quarters_of_a_tile(inner, kind):
    assert rules(backward=True).plane.size == 4096
    assert choose_kind(View(64, 64, inner), 4, rules(backward=True)) is kind


@pytest.mark.parametrize(
    ("inner", "kind"), [(8191, Kind.COLUMN), (8193, Kind.ODD_PLANE), (383 * 389, Kind.ODD_PLANE)]
)
@pytest.mark.parametrize("backward", [False, True])
def test_rows_off_the_vector_grid_are_planes_from_eight_tiles(inner, kind, backward):
    # Rows and sums are few and many enough for columns.
    assert choose_kind(View(32, 3, inner), 4, rules(backward=backward)) is kind


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        (View(8, 64, 391), Kind.COLUMN),
        (View(7, 64, 391), Kind.ODD_PLANE),
        (View(7, 64, 127), Kind.COLUMN),
        (View(7, 64, 129), Kind.ODD_PLANE),
        (View(8, 700, 391), Kind.ODD_PLANE),
        # Columns of narrower vectors would leave few enough.
        (View(320, 201, 391), Kind.ODD_PLANE),
        (View(8, 700, 392), Kind.PLANE),
    ],
)
def test_columns_need_rows_and_room_for_their_sums(layout, kind):
    assert choose_kind(layout, 4, rules(backward=True)) is kind


@pytest.mark.parametrize("layout", [View(1, 2**23, 128), View(1, 2**30, 1), View(64, 2**20, 16)])
@pytest.mark.parametrize("backward", [False, True])
def test_exactly_as_many_columns_as_there_may_be(layout, backward):
    assert make_plan(layout, 2, rules(2, backward)).view == layout


def test_more_channels_than_a_grid_has_programs():
    for layout in (View(1, 2**31, 1), View(5, 2**31 + 3, 1), View(1, 2**31, 2)):
        with pytest.raises(
            RuntimeError, match=r"slopes; up to 2147483647 have kernels. torch.prelu"
        ):
            make_plan(layout, 2, rules(2))


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("backward", [False, True])
def test_no_thread_is_left_without_a_whole_vector(itemsize, backward):
    for kind, layout in ((Kind.PLANE, (4, 5)), (Kind.COLUMN, (400, 1))):
        for inner in (32, 64, 128, 256, 512, 1024, 4096):
            view_of = View(layout[0], layout[1], inner)
            launch = make_plan(view_of, itemsize, _forced(rules(itemsize, backward), kind))
            tile = launch.constants["BLOCK"] * launch.constants.get("ROWS", 1)
            threads = 32 * launch.num_warps
            assert tile >= launch.constants["V"] * threads or launch.num_warps == 1
            assert launch.num_warps in (1, 2, 4)


@pytest.mark.parametrize("kind", [Kind.PLANE, Kind.COLUMN, Kind.ODD_PLANE, None])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_no_block_is_a_single_element(kind, itemsize):
    """The compiler of triton 3.6 fails on one."""
    sizes = 1, 2, 3, 8, 17
    inputs = DENSE, Gaps(outer=1), Gaps(outer=8), Gaps(outer=3, channel=1), Gaps(1, 1, True)
    for layout, x, grad_y in itertools.product(
        itertools.product(sizes, repeat=3), inputs[:4], inputs
    ):
        for multiprocessors, backward in ((1, True), (132, True), (132, False)):
            row = _forced(gpu_rules(multiprocessors, itemsize, backward), kind)
            launch = make_plan(View(*layout, x=x, grad_y=grad_y), itemsize, row)
            assert launch.constants["BLOCK"] >= 2, launch
            assert make_sum_plan(launch.partials, False).constants["TERM_BLOCK"] >= 2


@pytest.mark.parametrize(("itemsize", "vector"), [(2, 2), (4, 1), (8, 1)])
@pytest.mark.parametrize("shape", [(1, 1, 100_003), (8, 64, 10_003), (9999, 90, 1)])
def test_lanes_are_narrow_off_the_grid(shape, itemsize, vector):
    constants = make_plan(View(*shape, off_grid=("x",)), itemsize, rules(itemsize)).constants
    assert (constants["NARROW"], constants["V"]) == (True, vector)
    assert not make_plan(View(*shape), itemsize, rules(itemsize)).constants["NARROW"]


@pytest.mark.parametrize("layout", [View(8, 64, 10_000, Gaps(40)), View(9999, 90, 1, Gaps(6))])
def test_rows_with_gaps_are_not_narrow(layout):
    on_the_grid = make_plan(layout, 4, rules())
    off_the_grid = make_plan(layout._replace(off_grid=("x", "grad_y")), 4, rules())
    assert off_the_grid.constants == on_the_grid.constants


def test_lanes_are_wide_for_copies_and_numbers_off_the_grid():
    view = View(8, 64, 10_000, grad_y=Gaps(expanded=True), off_grid=("grad_y",))
    assert not make_plan(view, 4, rules()).constants["NARROW"]
    assert make_plan(view._replace(off_grid=("x",)), 4, rules()).constants["NARROW"]
    copied = view._replace(off_grid=("x",)).copied("x")
    assert not make_plan(copied, 4, rules()).constants["NARROW"]


@pytest.mark.parametrize("off", ["x", "grad_y", None])
def test_both_inputs_are_asked_where_they_begin(off, device, calls):
    x, grad_y = (
        torch.ones(101, device=device)[1 if name == off else 0 :][:100] for name in ("x", "grad_y")
    )
    launch.prelu_forward(x, torch.ones(1, device=device), None)
    launch.prelu_backward(grad_y, x, torch.ones(1, device=device), None, (True, True))
    forward, backward, *_ = (call.arguments["NARROW"] for call, _ in calls)
    assert (forward, backward) == (off == "x", off is not None)


@pytest.mark.parametrize("steps", [1, 2, 7, 12, 100])
def test_splits_are_even_and_no_more_than_the_steps(steps):
    for programs in (1, 2, 5, 11, 12, 40, 1000):
        tile = rules().plane._replace(programs=programs)
        row = rules()._replace(plane=tile, kind=Kind.PLANE)
        splits = make_plan(View(steps, 1, 1024), 4, row).grid[2]
        walked = -(-steps // splits)
        assert 1 <= splits <= min(steps, programs)
        assert walked == -(-steps // min(steps, programs))
        assert -(-steps // max(1, splits - 1)) > walked or splits == 1


def test_forward_and_backward_ask_for_their_own_rules(device):
    asked = []

    def rules_of(device, itemsize, backward):
        asked.append((itemsize, backward))
        return interpreter_rules(itemsize)

    x = torch.ones(2, 3, dtype=torch.float16, device=device, requires_grad=True)
    with using_rules(rules_of):
        prelu(x, torch.ones(3, device=device)).backward(torch.ones_like(x))
    assert asked == [(2, False), (2, True)]


def test_a_plan_is_the_same_on_every_run_and_printable():
    layout = View(128, 64, 12544)
    launch = make_plan(layout, 4, rules())
    assert make_plan(layout, 4, rules()) == launch
    assert "Kind.PLANE" in str(launch)
    assert "BLOCK" in str(launch)


def test_the_interpreter_gets_few_programs():
    for layout in (View(8, 16, 48 * 48), View(8 * 48 * 48, 16, 1), View(1, 1, 8 * 16 * 48 * 48)):
        launch = make_plan(layout, 4, interpreter_rules(4))
        assert math.prod(launch.grid) == 1
        assert launch.sizes.get("rows", 1) == 1


def test_one_split_that_is_the_gradient_needs_no_second_stage():
    assert make_plan(View(1, 64, 4096), 4, _few_programs()).direct
    assert not make_plan(View(64, 64, 49), 4, _few_programs()).direct


@pytest.mark.parametrize("channels", [1, 3, 8, 9, 2048])
def test_the_second_stage_covers_every_channel(channels):
    launch = make_sum_plan((100, channels, 3), False)
    block = launch.constants["CHANNEL_BLOCK"]
    assert (launch.grid[0] - 1) * block < channels <= launch.grid[0] * block


def test_deterministic_mode_is_asked_at_every_backward_and_never_atomic(device, force, calls):
    force(reduction="atomic")
    x = torch.ones(2, 4, device=device, requires_grad=True)
    weight = torch.ones(1, device=device, requires_grad=True)
    for deterministic in (False, True, False):
        torch.use_deterministic_algorithms(deterministic)
        try:
            prelu(x, weight).sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
        backwards = [call for call, _ in calls if call.kernel.__name__ == "plane_backward"]
        assert backwards[-1].arguments["ATOMIC"] != deterministic


def test_a_call_is_planned_once(device, monkeypatch):
    planned = []
    monkeypatch.setattr(launch, "make_plan", lambda *args: planned.append(args) or make_plan(*args))
    x, weight = torch.ones(2, 4, 5, device=device), torch.ones(4, device=device)
    launch.plan_call.cache_clear()
    for _ in range(3):
        prelu(x, weight)
    assert len(planned) == 1
    prelu(x.transpose(1, 2).contiguous().transpose(1, 2), weight)
    prelu(x.half(), weight)
    assert len(planned) == 3


def _forced(row, kind):
    return row._replace(kind=kind)


def _few_programs():
    row = rules(backward=True)
    plane, column = (tile._replace(programs=1) for tile in (row.plane, row.column))
    return row._replace(plane=plane, column=column)
