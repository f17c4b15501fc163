"""Inputs and gradients that are slices or expanded: read where they lie, or copied in each pass."""

import itertools
import math

import pytest
import torch
from support import (
    MARGIN,
    REDUCTIONS,
    assert_right,
    assert_same,
    backward,
    eager_backward,
    id_of,
    integers,
    randn,
)

from prelu_gpu import launch, leaky_relu, prelu
from prelu_gpu.layout import DENSE, Gaps, View, make_view
from prelu_gpu.plan import make_plan
from prelu_gpu.rules import Kind, gpu_rules

SHAPE = (2, 6, 3, 4)

# Ways to see part of a larger tensor: what indexes it, and the view of the part.
SLICES = {
    "channel slice": ((2, 9, 3, 4), lambda b: b[:, 2:8]),
    "chunk half": ((2, 12, 3, 4), lambda b: b.chunk(2, 1)[1]),
    "every other image": ((4, 6, 3, 4), lambda b: b[::2]),
    "every other channel": ((2, 12, 3, 4), lambda b: b[:, ::2]),
    "first rows": ((2, 6, 5, 4), lambda b: b[:, :, :3]),
    "channels_last chunk half": ((2, 3, 4, 12), lambda b: b.chunk(2, -1)[0].permute(0, 3, 1, 2)),
    "transposed": ((12, 2, 3, 4), lambda b: b[::2].transpose(0, 1)),
}
CROPS = {
    "crop": ((2, 6, 5, 6), lambda b: b[:, :, 1:-1, 1:-1]),
    "every other column": ((2, 6, 3, 8), lambda b: b[..., ::2]),
    "images and rows": ((4, 6, 5, 4), lambda b: b[::2, :, :3]),
    "expanded": ((2, 6, 1, 4), lambda b: b.expand(SHAPE)),
}
# Output gradients: of cat, of sum, of sums over some dimensions.
GRADIENTS = {
    **SLICES,
    **CROPS,
    "sum": ((), lambda b: b.expand(SHAPE)),
    "sum over pictures": ((2, 6, 1, 1), lambda b: b.expand(SHAPE)),
    "sum over all but channels": ((1, 6, 1, 1), lambda b: b.expand(SHAPE)),
    "sum over channels": ((2, 1, 3, 4), lambda b: b.expand(SHAPE)),
}


def part(name, make, device, dtype=torch.float32, seed=0):
    shape, index = GRADIENTS[name]
    tensor = index(make(shape, dtype, device, seed))
    assert tensor.shape == SHAPE
    return tensor


def addresses(layout, gaps):
    """Where the elements of a view lie in the input of these gaps, in order."""
    numbers = [torch.arange(size) for size in layout[:3]]
    n, c, i = torch.meshgrid(*numbers, indexing="ij")
    if gaps.expanded:
        return (n * gaps.outer + c * gaps.channel).flatten()
    dense = (n * layout.channels + c) * layout.inner + i
    return (dense + n * gaps.outer + c * gaps.channel).flatten()


@pytest.mark.parametrize("dim", [None, 0, 1, 2, 3])
def test_a_view_finds_every_element_of_every_input(dim):
    for x_name, grad_y_name in itertools.product([*SLICES, *CROPS], GRADIENTS):
        check_view(x_name, grad_y_name, dim)


def check_view(x_name, grad_y_name, dim):
    def numbered(shape, *_):
        return torch.arange(torch.Size(shape).numel()).view(shape)

    inputs = {
        name: part(slice_name, numbered, "cpu")
        for name, slice_name in (("x", x_name), ("grad_y", grad_y_name))
    }
    result = torch.empty_like(inputs["x"])
    strides = {name: tensor.stride() for name, tensor in inputs.items()}
    layout = make_view(result.shape, result.stride(), dim, **strides)
    assert layout.numel == result.numel()
    memory_order = sorted(range(4), key=result.stride().__getitem__, reverse=True)
    for name, tensor in inputs.items():
        gaps = layout.inputs[name]
        if name in layout.copies:
            assert gaps == DENSE
        else:
            expected = tensor.permute(memory_order).flatten() - tensor.storage_offset()
            assert torch.equal(addresses(layout, gaps), expected)


@pytest.mark.parametrize(
    ("name", "channel_dim", "expected"),
    [
        ("channel slice", 1, View(2, 6, 12, x=Gaps(outer=36))),
        ("channel slice", None, View(2, 1, 72, x=Gaps(outer=36))),
        ("every other image", 1, View(2, 6, 12, x=Gaps(outer=72))),
        ("every other channel", 1, View(2, 6, 12, x=Gaps(outer=72, channel=12))),
        ("every other channel", None, View(12, 1, 12, x=Gaps(outer=12))),
        ("transposed", 1, View(1, 6, 24, x=Gaps(channel=24))),
        ("channels_last chunk half", 1, View(24, 6, 1, x=Gaps(outer=6))),
        ("crop", 1, View(2, 6, 12, copies=("x",))),
        ("expanded", None, View(1, 1, 144, copies=("x",))),
    ],
)
def test_views_of_slices(name, channel_dim, expected):
    x = part(name, randn, "cpu")
    y = torch.empty_like(x)
    assert make_view(y.shape, y.stride(), channel_dim, x.stride()) == expected


def test_an_output_gradient_is_copied_rather_than_an_input():
    x, grad_y = part("channel slice", randn, "cpu"), part("crop", randn, "cpu")
    strides = torch.empty(SHAPE).stride()
    assert make_view(SHAPE, strides, 1, x.stride(), grad_y.stride()).copies == ("grad_y",)
    assert make_view(SHAPE, strides, 1, grad_y.stride(), x.stride()).copies == ("x",)
    assert make_view(SHAPE, strides, 1, grad_y.stride(), grad_y.stride()).copies == ("x", "grad_y")


@pytest.mark.parametrize(
    ("gaps", "copied"),
    [
        (Gaps(outer=8), False),
        (Gaps(outer=8, channel=4), True),
        (Gaps(expanded=True), False),
        (Gaps(outer=1, expanded=True), True),
        (Gaps(channel=1, expanded=True), True),
    ],
)
def test_what_columns_cannot_read_is_copied(gaps, copied):
    for backward_rules in (gpu_rules(132, 4, True), gpu_rules(1, 4, False)):
        launch_plan = make_plan(View(1000, 64, 4, grad_y=gaps), 4, backward_rules)
        assert launch_plan.kind is Kind.COLUMN
        assert launch_plan.view.copies == (("grad_y",) if copied else ())


def test_short_rows_with_gaps_fill_their_tiles_with_rows():
    row = gpu_rules(132, 4, True)
    launch_plan = make_plan(View(10**6, 16, 1, x=Gaps(outer=16)), 4, row)
    assert launch_plan.kind is Kind.COLUMN
    constants = launch_plan.constants
    assert constants["BLOCK"] * constants["ROWS"] == row.column.size // 4
    assert constants["BLOCK"] == 16


@pytest.mark.parametrize(("gap", "vector"), [(4, 4), (2, 2), (6, 2), (3, 1), (0, 4)])
def test_vectors_are_as_wide_as_all_rows_allow(gap, vector):
    for inner in (4096, 4097):
        launch_plan = make_plan(View(9, 8, inner, x=Gaps(outer=gap)), 4, gpu_rules(132, 4, True))
        assert launch_plan.constants["V"] == vector
        assert launch_plan.sizes["x_outer_gap"] == (gap // vector if gap else None)


@pytest.mark.parametrize("kind", [Kind.PLANE, Kind.COLUMN], ids=id_of)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", [*SLICES, *CROPS])
def test_sliced_inputs(name, shared, kind, device, force, launches):
    force(kind)
    x, grad_y = part(name, randn, device), randn(SHAPE, torch.float32, device, seed=1)
    weight = randn((1 if shared else 6,), torch.float32, device, seed=2)
    check(x, weight, grad_y)


@pytest.mark.parametrize(
    ("x_name", "kind"),
    [
        *(("dense", Kind.PLANE), ("dense", Kind.COLUMN), ("channels_last", Kind.COLUMN)),
        *(("channel slice", Kind.PLANE), ("channel slice", Kind.COLUMN)),
    ],
    ids=id_of,
)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_with_strides_of_their_own(name, x_name, shared, kind, device, force, launches):
    force(kind)
    if x_name == "channel slice":
        x = part(x_name, randn, device)
    else:
        x = randn(SHAPE, torch.float32, device)
        if x_name == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
    weight = randn((1 if shared else 6,), torch.float32, device, seed=2)
    check(x, weight, part(name, randn, device, seed=1))


def check(x, weight, grad_y):
    y, grad_x, grad_weight = backward(prelu, x, weight, grad_y)
    eager_y, eager_grad_x, _ = eager_backward(x, weight, grad_y)
    assert_same(y, eager_y)
    assert_same(grad_x, eager_grad_x)
    exact = eager_backward(x.double(), weight.double(), grad_y.double())[2]
    torch.testing.assert_close(grad_weight.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", list(Kind), ids=id_of)
@pytest.mark.parametrize(
    ("inner", "dtype"),
    [(1, torch.float32), (2, torch.float32), (37, torch.float16), (1030, torch.float32)],
    ids=id_of,
)
def test_whole_numbers_in_slices_sum_exactly(inner, dtype, kind, reduction, device, force):
    """Slices off the vector grid, tails and several programs a row."""
    force(kind, reduction)
    slopes = 1 if kind is Kind.FLAT else 3
    base = integers((5, 7, inner), dtype, device)
    for x in (base[:, 1:4], base[:, ::3], base[1::2, 2:5]):
        grad_y = integers((5, 5, inner), dtype, device, seed=1)[: len(x), 2:]
        weight = integers((slopes,), dtype, device, seed=2)
        y, grad_x, grad_weight = backward(prelu, x, weight, grad_y)
        eager_y, eager_grad_x, _ = eager_backward(x, weight, grad_y)
        assert_same(y, eager_y)
        assert_same(grad_x, eager_grad_x)
        exact = eager_backward(x.double(), weight.double(), grad_y.double())[2]
        assert torch.equal(grad_weight.double(), exact)


@pytest.mark.parametrize("kind", list(Kind), ids=id_of)
def test_an_infinite_gradient_of_a_sum_stays_in_its_rows(kind, device, force, launches):
    """Nothing but the elements of a row meets its one number: not the padding of a tile."""
    force(kind)
    x = torch.full((3, 2, 5), -2.0, device=device)
    weight = torch.ones(1 if kind is Kind.FLAT else 2, device=device)
    grad_y = torch.full((), torch.inf, device=device).expand(3, 2, 5)
    _, grad_x, grad_weight = backward(prelu, x, weight, grad_y)
    assert torch.equal(grad_x, grad_y)
    assert torch.equal(grad_weight, torch.full_like(weight, -torch.inf))


def copies(allocations, numel):
    return sum(buffer.numel() - 2 * MARGIN == numel for buffer in allocations.buffers) - 1


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", [*SLICES, *CROPS])
def test_slices_are_read_without_a_copy(name, shared, device, force, guarded_allocations):
    # Columns have no gaps between the channels.
    force(Kind.PLANE if name in {"every other channel", "first rows", "transposed"} else None)
    x = part(name, randn, device).requires_grad_()
    guarded_allocations.buffers.clear()
    y = prelu(x, torch.ones(1 if shared else 6, device=device))
    expected = int(name in CROPS)
    assert copies(guarded_allocations, x.numel()) == expected
    guarded_allocations.buffers.clear()
    y.backward(torch.ones_like(y))
    assert copies(guarded_allocations, x.numel()) == expected


@pytest.mark.parametrize("name", CROPS)
@pytest.mark.parametrize("function", [prelu, leaky_relu], ids=lambda f: f.__name__)
def test_a_crop_is_copied_in_each_pass_and_saved_where_it_lies(
    function, name, device, guarded_allocations
):
    """So that the graph holds no memory of ours, and sees a change of the input, as PyTorch's."""
    x = part(name, randn, device).requires_grad_()
    slope = torch.full((6,), 0.2, device=device) if function is prelu else 0.2
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        guarded_allocations.buffers.clear()
        y = function(x, slope)
        assert copies(guarded_allocations, x.numel()) == 1
    assert (saved[0].data_ptr(), saved[0].stride()) == (x.data_ptr(), x.stride())
    for grad_y, copied in ((torch.ones_like(y), 1), (part(name, randn, device, seed=1), 2)):
        guarded_allocations.buffers.clear()
        y.backward(grad_y, retain_graph=True)
        assert copies(guarded_allocations, x.numel()) == copied
    if name != "expanded":  # PyTorch writes into no memory that overlaps itself.
        y = function(x, slope)  # Hooks answer for what they give back.
        with torch.no_grad():
            x.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(torch.ones_like(y))


@pytest.mark.parametrize("shape", [(1, 6, 3, 1), (1, 6, 1, 4), (1, 6, 3, 4)], ids=str)
def test_a_crop_beside_slopes_along_several_dimensions_is_copied_once(shape, device, monkeypatch):
    """Merging those dimensions is the copy, which the graph keeps."""
    made = []
    original = launch._copy
    monkeypatch.setattr(launch, "_copy", lambda *tensors: made.append(0) or original(*tensors))
    x = part("crop", randn, device).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = prelu(x, randn(shape, torch.float32, device, seed=1))
    y.backward(torch.ones_like(y))
    merged = saved[0]
    assert merged.is_contiguous()
    assert merged.untyped_storage().nbytes() == x.numel() * x.itemsize
    assert not made


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("x_name", "name"),
    [
        *(("dense", name) for name in ("channel slice", "every other image", "first rows", "sum")),
        ("dense", "sum over pictures"),
        ("channels_last", "channels_last chunk half"),
        ("channels_last", "sum"),
        ("channel slice", "chunk half"),
        ("channel slice", "sum"),
    ],
)
def test_gradients_are_read_without_a_copy(
    x_name, name, shared, device, force, guarded_allocations
):
    force(Kind.PLANE if "pictures" in name or "rows" in name else None)
    x = randn(SHAPE, torch.float32, device)
    if x_name == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif x_name != "dense":
        x = part(x_name, randn, device)
    y = prelu(x.requires_grad_(), torch.ones(1 if shared else 6, device=device))
    grad_y = part(name, randn, device, seed=1)
    guarded_allocations.buffers.clear()
    y.backward(grad_y)
    assert copies(guarded_allocations, x.numel()) == 0


def test_the_slope_gradient_alone_of_slices_and_crops(device):
    for name in (*SLICES, *CROPS):
        x, grad_y = part(name, integers, device), part("chunk half", integers, device, seed=1)
        weight = torch.ones(6, device=device, requires_grad=True)
        prelu(x, weight).backward(grad_y)
        exact = eager_backward(x, weight.detach(), grad_y)[2]
        assert torch.equal(weight.grad, exact)


@pytest.mark.parametrize("name", [*SLICES, *CROPS])
def test_leaky_relu_of_slices(name, device, force):
    for kind in (None, Kind.PLANE, Kind.COLUMN):
        force(kind)
        x, grad_y = part(name, randn, device), randn(SHAPE, torch.float32, device, seed=1)
        outcomes = []
        for function in (leaky_relu, torch.nn.functional.leaky_relu):
            leaf = x.detach().requires_grad_()
            y = function(leaf, 0.2)
            outcomes.append((y.detach(), *torch.autograd.grad(y, leaf, grad_y)))
        for ours, expected in zip(*outcomes, strict=True):
            assert_same(ours, expected)


def test_the_gradient_of_cat_reaches_the_kernel_as_it_lies(device, monkeypatch):
    views = []
    original = launch.make_plan
    monkeypatch.setattr(launch, "make_plan", lambda v, *rest: views.append(v) or original(v, *rest))
    launch.plan_call.cache_clear()
    x = randn((2, 3, 4), torch.float32, device).requires_grad_()
    other = randn((2, 5, 4), torch.float32, device)
    joined = torch.cat([prelu(x, torch.ones(3, device=device)), other], 1)
    joined.backward(randn(joined.shape, torch.float32, device))
    assert views[-1] == View(2, 3, 4, grad_y=Gaps(outer=20))


@pytest.mark.parametrize("shape", [(12,), (3, 2, 5), (100,)])
@pytest.mark.parametrize("offsets", [(0, 1), (1, 0), (1, 1)])
def test_a_number_for_a_gradient_and_tensors_off_the_grid(shape, offsets, device, launches):
    memory = randn((2, 200), torch.float32, device)
    x = memory[0, offsets[0] :][: math.prod(shape)].view(shape)
    grad_y = memory[1, offsets[1]].expand(shape)
    weight = randn((1,), torch.float32, device, seed=1)
    y, grad_x, grad_weight = backward(prelu, x, weight, grad_y)
    assert_right(grad_y, x, weight, y=y, grad_x=grad_x, grad_weight=grad_weight)
