"""Every input that is served, as strategies: drawn at random and compared with PyTorch.

`make test` runs the same examples each time; `make test-full` runs 40 times as many, new ones.
"""

import contextlib
import math
from dataclasses import dataclass

import pytest
import torch
from support import (
    DTYPES,
    PAIRS,
    REDUCTIONS,
    assert_same,
    channel_dim,
    exact_grad_weight,
    id_of,
)

from prelu_gpu import launch, leaky_relu, prelu, reference
from prelu_gpu.rules import Kind, gpu_rules, using_rules
from prelu_gpu.run import execute, intercepting

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Small ones first: a failing example shrinks towards them. Odd ones, and vectors and tiles +- 1.
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 33, 64, 65, 127, 257, 1000, 2049)
MOST_ELEMENTS = (8, 60, 60, 250, 250, 250, 3000)
NEGATIVE_SLOPES = (0.01, 0.0, -0.0, 1.0, 2.5, 1 / 3, -0.3, 1e-41, math.inf, -math.inf, math.nan)
REQUIRES_GRAD = ((True, True), (True, True), (True, False), (False, True), (False, False))


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory: `order` lists its dimensions from the outermost one.

    Along each dimension it is memory[start : start + step * size : step], with `rest` more behind;
    where `expanded`, memory holds one element, and the stride is 0.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    start: tuple[int, ...]
    step: tuple[int, ...]
    rest: tuple[int, ...]
    expanded: tuple[bool, ...]
    offset: int

    @property
    def overlaps(self):
        """Whether elements share memory."""
        return any(one and size > 1 for one, size in zip(self.expanded, self.shape, strict=True))

    @property
    def whole(self):
        """The shape of the larger tensor that this one is a part of."""
        along = zip(self.shape, self.start, self.step, self.rest, self.expanded, strict=True)
        return [1 if one else a + size * step + rest for size, a, step, rest, one in along]

    @property
    def memory(self):
        """Number of elements in memory."""
        return self.offset + math.prod(self.whole)

    def of(self, memory):
        """The tensor that lies so in flat `memory`."""
        whole = self.whole
        outermost_first = memory[self.offset :].view([whole[d] for d in self.order])
        tensor = outermost_first.permute([self.order.index(d) for d in range(len(whole))])
        along = zip(self.shape, self.start, self.step, self.expanded, strict=True)
        slices = [slice(a, a + size * s, s) if not one else slice(1) for size, a, s, one in along]
        return tensor[(*slices, ...)].expand(self.shape)


@dataclass(frozen=True)
class Numbers:
    """What a tensor holds; `kind` is "normal", "whole" or "special"."""

    kind: str
    seed: int

    def tensor(self, numel, dtype):
        generator = torch.Generator().manual_seed(self.seed)
        if self.kind == "whole":
            # Products and sums of them are exact in every dtype.
            return torch.randint(-4, 5, (numel,), generator=generator).to(dtype).to(DEVICE)
        numbers = torch.randn(numel, generator=generator, dtype=torch.float64)
        if self.kind == "special":
            tiny = torch.finfo(dtype).smallest_normal
            special = [0.0, -0.0, math.inf, -math.inf, math.nan, tiny, -tiny, tiny / 8, -tiny / 8]
            chosen = torch.randint(0, 5 * len(special), (numel,), generator=generator)
            for index, number in enumerate(special):
                numbers[chosen == index] = number
        return numbers.to(dtype).to(DEVICE)


@dataclass(frozen=True)
class Tiling:
    """A GPU's tilings: of one with narrow warps, where small tensors are already several tiles."""

    kind: Kind | None
    reduction: str
    warp_size: int
    programs: int

    def rules(self, device, itemsize, backward):
        row = gpu_rules(1, itemsize, backward, self.warp_size)
        return row._replace(
            plane=row.plane._replace(programs=self.programs),
            kind=self.kind,
            finish=row.finish if self.reduction == "last program" else 0,
            atomic=self.reduction == "atomic",
        )


@dataclass(frozen=True)
class PReLUCase:
    """One call of prelu and its backward."""

    x: Layout
    weight: Layout
    grad_y: Layout
    dim: int
    dtypes: tuple[torch.dtype, torch.dtype]
    numbers: tuple[Numbers, Numbers, Numbers]
    requires_grad: tuple[bool, bool]
    tiling: Tiling | None


@dataclass(frozen=True)
class LeakyReLUCase:
    """One call of leaky_relu and its backward."""

    x: Layout
    grad_y: Layout
    is_view: bool
    negative_slope: float
    inplace: bool
    dtype: torch.dtype
    numbers: tuple[Numbers, Numbers]
    requires_grad: bool
    tiling: Tiling | None


@st.composite
def shapes(draw):
    """0 to 5 dimensions; now and then one of them is 0."""
    left = draw(st.sampled_from(MOST_ELEMENTS))
    shape = []
    for _ in range(draw(st.integers(0, 5))):
        shape.append(draw(st.sampled_from([size for size in SIZES if size <= left])))
        left //= shape[-1]
    if shape:
        shape = draw(st.permutations(shape))
        if draw(st.integers(0, 19)) == 19:
            shape[0] = 0
    return tuple(shape)


@st.composite
def layouts(draw, shape):
    """Any layout of `shape`: what views, permutes, slices and expansions make of dense memory."""
    rank = len(shape)
    order, expanded = list(range(rank)), [False] * rank
    start, step, rest = [0] * rank, [1] * rank, [0] * rank
    families = ("contiguous", "channels last", "permuted", "part", "expanded")
    family = draw(st.sampled_from(families if rank else families[:1]))
    if family == "channels last" and rank > 2:
        order = [0, *range(2, rank), 1]
    if family == "permuted" or (family in ("part", "expanded") and draw(st.booleans())):
        order = draw(st.permutations(order))
    dims = st.integers(0, rank - 1)
    if family == "part" or (family == "expanded" and draw(st.integers(0, 3)) == 3):
        for d in draw(st.sets(dims, min_size=1, max_size=2)):
            # One half of chunk(2), a part of torch.cat, a crop, every other one.
            start[d] = draw(st.sampled_from((0, 1, 2, 4, shape[d])))
            rest[d] = draw(st.sampled_from((0, 1, 2, 4, shape[d])))
            step[d] = draw(st.sampled_from((1, 1, 2, 3)))
    if family == "expanded":
        # All of them: the gradient of sum(); the last ones: of a pooling over them.
        which = draw(st.sampled_from(("all", "last", "any")))
        last = draw(dims) if which == "last" else 0
        some = draw(st.sets(dims)) if which == "any" else range(last, rank)
        expanded = [d in some for d in range(rank)]
    offset = draw(st.sampled_from((0, 0, 0, 1, 3, 4, 8)))
    return Layout(shape, *map(tuple, (order, start, step, rest, expanded)), offset=offset)


@st.composite
def numbers(draw, tensors):
    """Numbers for so many tensors, different ones."""
    seed = draw(st.integers(0, 2**16))
    kinds = st.sampled_from(("normal", "whole", "special"))
    return tuple(Numbers(draw(kinds), seed + n) for n in range(tensors))


@st.composite
def tilings(draw, elements, kinds):
    """The device's own, or a GPU's of one of these kinds; of few programs, which take time."""
    if draw(st.integers(0, 2)) == 0:
        return None
    return Tiling(
        draw(st.sampled_from(kinds)),
        reduction=draw(st.sampled_from(REDUCTIONS)),
        warp_size=draw(st.sampled_from((1, 32) if elements <= 250 else (8, 32))),
        programs=draw(st.sampled_from((1, 2, 5))),
    )


@st.composite
def prelu_cases(draw):
    """One slope, as 0-dim, (1,) or of x's rank; one for each channel; or slopes that broadcast."""
    shape = draw(shapes())
    rank, dim = len(shape), 1
    slopes = draw(st.sampled_from(("one", "channels", "broadcast") if rank > 1 else ("one",)))
    if slopes == "one":
        kept = []
        weight_shape = draw(st.sampled_from(((), (1,), (1,) * rank)))
    elif slopes == "channels":
        dim = draw(st.integers(-rank, rank - 1))
        kept = [dim % rank]
        weight_shape = (shape[dim],)
    else:
        kept = draw(st.sets(st.integers(0, rank - 1)))
        weight_shape = tuple(size if d in kept else 1 for d, size in enumerate(shape))
    x = draw(layouts(shape))
    # Planes take the rows that have one slope each one by one.
    innermost = max((x.order.index(d) for d in kept), default=-1)
    rows = math.prod(shape[d] for d in x.order[: innermost + 1])
    kinds = (Kind.COLUMN, *Kind, None) if rows <= 30 else (Kind.COLUMN,)
    return PReLUCase(
        x,
        draw(layouts(weight_shape)),
        draw(st.one_of(st.just(x), layouts(shape))),
        dim,
        draw(st.sampled_from(PAIRS)),
        draw(numbers(3)),
        draw(st.sampled_from(REQUIRES_GRAD)),
        draw(tilings(math.prod(shape), kinds)),
    )


@st.composite
def leaky_relu_cases(draw):
    shape = draw(shapes())
    x = draw(layouts(shape))
    return LeakyReLUCase(
        x,
        draw(st.one_of(st.just(x), layouts(shape))),
        draw(st.booleans()),
        draw(st.sampled_from(NEGATIVE_SLOPES)),
        draw(st.booleans()),
        draw(st.sampled_from(DTYPES)),
        draw(numbers(2)),
        draw(st.booleans()),
        draw(tilings(math.prod(shape), [Kind.FLAT, Kind.COLUMN])),
    )


def assert_alike(actual, expected, strides=True):
    """Equal bit for bit, and in strides, where they mean something: not along a single element."""
    assert actual.shape == expected.shape
    if strides and expected.numel() > 0:
        steps, expected_steps = (
            [step for size, step in zip(t.shape, t.stride(), strict=True) if size != 1]
            for t in (actual, expected)
        )
        assert steps == expected_steps
    assert_same(*(t.clone(memory_format=torch.contiguous_format) for t in (actual, expected)))


@contextlib.contextmanager
def tiled(tiling):
    """Launches by `tiling`, and gives the kernels' names; none may write outside of its outputs."""
    names = []

    def counted(call, values):
        names.append(call.kernel.__name__)
        execute(call, values)

    with intercepting(counted), using_rules(tiling.rules) if tiling else contextlib.nullcontext():
        yield names
    launch.torch.check()
    launch.torch.buffers.clear()


def run(function, x, weight, grad_y, needs, *args, **options):
    """The output, and the gradients that are needed, of function(x, weight, ...)."""
    x, weight = (
        t.detach().requires_grad_(need) for t, need in zip((x, weight), needs, strict=True)
    )
    y = function(x, weight, *args, **options)
    assert y.requires_grad == any(needs)
    # Not backward(), which may store a gradient with the strides of its leaf.
    needed = [t for t in (x, weight) if t.requires_grad]
    grads = iter(torch.autograd.grad(y, needed, grad_y) if needed else ())
    return y.detach(), *[next(grads) if need else None for need in needs]


def slopes_over(x, weight, dim):
    """The slopes, in a shape that broadcasts over x."""
    if weight.dim() > 1:
        return weight
    channels = channel_dim(x, weight, dim)
    return weight.reshape([-1 if d == channels else 1 for d in range(x.dim())])


def torch_prelu(x, weight, dim):
    """PReLU by PyTorch; where it has no such thing, by its operator behind torch.prelu."""
    if x.dtype == weight.dtype and weight.dim() < 2 and (weight.numel() == 1 or dim == 1):
        return torch.prelu(x, weight)
    slopes = slopes_over(x, weight, dim)
    return torch.ops.aten._prelu_kernel(x.to(weight.dtype), slopes).to(x.dtype)


def assert_grad_weight(grad_weight, x, weight, grad_y, case):
    assert grad_weight.dtype == weight.dtype
    assert grad_weight.shape == weight.shape
    exact = exact_grad_weight(x, weight, grad_y, case.dim)
    if x.numel() == 0 or case.numbers[0].kind == case.numbers[2].kind == "whole":
        assert torch.equal(grad_weight, exact.to(weight.dtype))
        return
    finite = exact.isfinite()
    assert torch.equal(grad_weight.isnan(), exact.isnan())
    assert torch.equal(grad_weight[exact.isinf()].double(), exact[exact.isinf()])
    tolerance = reference.rounding(grad_y, x, weight, case.dim)
    if case.x.overlaps and case.grad_y.overlaps:
        # Equal terms round alike, and the interpreter adds them one after the other.
        tolerance *= x.numel() / weight.numel()
    # Products and the sum may be subnormal.
    for dtype, roundings in ((x.dtype, x.numel()), (weight.dtype, 1)):
        dtype = torch.promote_types(dtype, torch.float32) if roundings > 1 else dtype
        tolerance += roundings * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((grad_weight - exact).abs() <= tolerance)[finite].all()


@given(prelu_cases())
def test_prelu_is_pytorchs_whatever_it_is_given(case):
    layouts = (case.x, case.weight, case.grad_y)
    dtypes = (*case.dtypes, case.dtypes[0])
    memories = [
        numbers.tensor(layout.memory, dtype)
        for numbers, layout, dtype in zip(case.numbers, layouts, dtypes, strict=True)
    ]
    before = [memory.clone() for memory in memories]
    x, weight, grad_y = (
        layout.of(memory) for layout, memory in zip(layouts, memories, strict=True)
    )
    needs = case.requires_grad
    with tiled(case.tiling) as launches:
        y, grad_x, grad_weight = run(prelu, x, weight, grad_y, needs, dim=case.dim)
    assert bool(launches) == (x.numel() > 0)
    for memory, original in zip(memories, before, strict=True):
        assert_same(memory, original)

    torch_y, torch_grad_x, _ = run(torch_prelu, x, weight, grad_y, needs, case.dim)
    assert_alike(y, torch_y)
    if grad_x is not None:
        # PyTorch lays the gradient of an input that overlaps itself out as grad_y.
        assert_alike(grad_x, torch_grad_x, strides=not case.x.overlaps)
    if grad_weight is not None:
        assert_grad_weight(grad_weight, x, weight, grad_y, case)


def leaky_relu_outcome(function, case, memory, grad_y):
    """What a call does: its output, the input and its memory afterwards, the gradient; or an error.

    In place, PyTorch's operator writes views, and what is not dense; a kernel writes the rest.
    """
    leaf = memory.clone().requires_grad_(case.requires_grad)
    hidden = leaf.clone()
    x = case.x.of(hidden) if case.is_view else case.x.of(hidden).clone()
    grad = None
    try:
        y = function(x, case.negative_slope, case.inplace)
        assert y.requires_grad == case.requires_grad
        assert (y is x) == case.inplace
        if case.requires_grad:
            (grad,) = torch.autograd.grad(y, leaf if case.inplace else x, grad_y)
    except RuntimeError as error:
        return (str(error),)
    return y.detach(), x.detach(), hidden.detach(), grad


@given(leaky_relu_cases())
@settings(max_examples=settings.default.max_examples // 5)
def test_leaky_relu_is_pytorchs_whatever_it_is_given(case):
    memory, grad_memory = (
        numbers.tensor(layout.memory, case.dtype)
        for numbers, layout in zip(case.numbers, (case.x, case.grad_y), strict=True)
    )
    grad_y, before = case.grad_y.of(grad_memory), grad_memory.clone()
    expected = leaky_relu_outcome(torch.nn.functional.leaky_relu, case, memory, grad_y)
    with tiled(case.tiling):
        outcome = leaky_relu_outcome(leaky_relu, case, memory, grad_y)
    assert_same(grad_memory, before)
    for value, torchs in zip(outcome, expected, strict=True):
        if isinstance(torchs, torch.Tensor):
            assert_alike(value, torchs, strides=not case.x.overlaps)
        else:
            assert value == torchs


# What was found.


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
def test_leaky_relu_of_the_slope_minus_zero(dtype):
    x = torch.tensor([-1.0, -0.0, 0.0, 2.0], dtype=dtype, device=DEVICE)
    expected = torch.nn.functional.leaky_relu(x, -0.0)
    assert expected.signbit().tolist() == [False, False, True, False]
    assert_same(leaky_relu(x, -0.0), expected)


def test_a_slice_in_bfloat16_is_read_at_its_strides():
    memory = Numbers("normal", 0).tensor(6, torch.bfloat16)
    x, weight = memory.view(2, 3)[:, :2], torch.tensor(0.25, dtype=torch.bfloat16, device=DEVICE)
    assert_same(prelu(x, weight), torch.prelu(x, weight))
