"""Norms with PReLU: what they launch, and their results against PyTorch's in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from support import EMULATED, GPU, NormCall, id_of, norm_call, randn

from prelu_gpu.launch_norm import Norm
from prelu_gpu.rules import Kind, gpu_rules

pytestmark = pytest.mark.usefixtures("launches")

PAIRS = (
    *((dtype, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    *((dtype, torch.float32) for dtype in (torch.float16, torch.bfloat16)),
)
NORMS = {
    "batch": {},
    "evaluation": {"training": False},
    "instance": {"instances": True},
}
LAYOUTS = (torch.contiguous_format, torch.channels_last)

FULL = pytest.mark.compiled
"""Not interpreted, which takes long."""

norms = pytest.mark.parametrize("norm", NORMS)
kinds = pytest.mark.parametrize("kind", [Kind.PLANE, Kind.ODD_PLANE, Kind.COLUMN, None], ids=id_of)


@norms
@pytest.mark.parametrize(
    ("dtypes", "layout"),
    [(PAIRS[0], LAYOUTS[0]), *((pair, LAYOUTS[1]) for pair in PAIRS)],
    ids=id_of,
)
def test_dtypes(dtypes, layout, norm, device):
    call = norm_call(
        (2, 8, 5, 6), dtypes[0], device, parameters=dtypes[1], layout=layout, **NORMS[norm]
    )
    call.check()


@norms
@pytest.mark.parametrize(
    ("slopes", "affine"), [(1, False), (1, True), (0.0, True), (0.25, False), (-0.3, True)]
)
def test_slopes_and_parameters(slopes, affine, norm, device):
    norm_call((3, 4, 5), torch.float32, device, slopes, affine=affine, **NORMS[norm]).check()


@norms
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((3, 4, 10), torch.contiguous_format),
        ((2, 3, 2, 3, 4), torch.contiguous_format),
        ((2, 3, 2, 3, 4), torch.channels_last_3d),
        ((1, 4, 2, 3), torch.channels_last),
    ],
)
def test_ranks(shape, layout, norm, device):
    norm_call(shape, torch.float32, device, layout=layout, **NORMS[norm]).check()


@pytest.mark.parametrize("training", [True, False])
def test_matrices(training, device):
    norm_call((6, 9), torch.float32, device, training=training).check()


def test_no_running_statistics(device):
    call = norm_call((3, 4, 5), torch.float32, device)
    call._replace(running_mean=None, running_var=None).check()


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_momentum_and_eps(momentum, device):
    call = norm_call((3, 4, 5), torch.float32, device)
    call._replace(momentum=momentum, norm=Norm(True, False, 0.5)).check()


@norms
def test_an_output_of_autocasts_dtype(norm, device):
    call = norm_call((3, 4, 5), torch.float32, device, **NORMS[norm])
    call = call._replace(grad_y=call.grad_y.bfloat16())
    call.check()
    assert call.forward()[0].dtype == torch.bfloat16


@pytest.mark.parametrize("norm", ["batch", "evaluation"])
@pytest.mark.parametrize(
    "needs",
    [
        needs if sum(needs) in (1, 4) else pytest.param(needs, marks=FULL)
        for needs in itertools.product((True, False), repeat=4)
        if any(needs)
    ],
    ids=str,
)
def test_what_is_needed_and_what_that_launches(needs, norm, device, launches):
    call = norm_call((2, 3, 5), torch.float32, device, **NORMS[norm])._replace(needs=needs)
    results = call.results()
    counted = len(launches)
    call.check(results)
    if norm == "batch":
        assert counted == 3 + (3 if needs[0] else 2)
    else:
        assert counted == 2 + (2 if any(needs[1:]) else 1)


@pytest.mark.parametrize("slopes", [1, None])
@norms
def test_launches_with_a_gpus_rules(norm, slopes, device, force, launches):
    force()
    norm_call((2, 12, 64), torch.float32, device, slopes, **NORMS[norm]).results()
    assert len(launches) <= {"batch": 6, "instance": 7, "evaluation": 4}[norm]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=id_of)
@pytest.mark.parametrize("slopes", [1, None])
def test_the_half_precision_slope_gradient_is_at_least_as_close_as_eagers(slopes, dtype, device):
    for norm, seed in itertools.product(NORMS, range(2 if EMULATED or GPU else 1)):
        call = norm_call((4, 5, 6, 6), dtype, device, slopes, seed=seed, **NORMS[norm])
        exact, beside, _ = call.exact()["grad_slope"]
        slope = call.slope.clone().requires_grad_()
        if call.norm.instances:
            z = F.instance_norm(call.x, None, None, call.weight, call.bias)
        else:
            running = call.running_mean.to(dtype), call.running_var.to(dtype)
            z = F.batch_norm(call.x, *running, call.weight, call.bias, call.norm.training)
        F.prelu(z, slope).backward(call.grad_y)
        found = call.results()["grad_slope"], slope.grad
        error, eagers = ((grad.double() - exact).abs() for grad in found)
        assert (error <= eagers + beside).all()


# Tiles of a GPU


def cases(kind, dtype):
    """Shapes of (samples, channels, elements) around the edges of a kind's tiles."""
    v = 16 // dtype.itemsize
    block = gpu_rules(1, dtype.itemsize, True).plane.size // dtype.itemsize
    if kind is Kind.COLUMN:
        return [(5, 3, 5), (40, 3, 1), (70, 90, 1), (5, 12, 49), (9, 512, 1), (33, 2, 1024)]
    if kind is None:
        return [(3, 4, 60), (64, 8, 1), (1, 3, 2 * block), (2, 70, 3)]
    edges = (v - 1, v, v + 1, block - 1, block, block + 1, 2 * block + v + 1)
    return [(2, 3, n) for n in edges] + [(9, 2, block + v), (70, 2, 9), (1, 1, 9 * block + 3)]


@pytest.mark.compiled
@norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=id_of)
@kinds
def test_every_kind_of_tile(kind, dtype, norm, device, force):
    force(kind)
    for shape in cases(kind, dtype):
        if norm == "instance" and shape[2] < 5:  # a few may be nearly equal
            continue
        norm_call(shape, dtype, device, **NORMS[norm]).check()


@pytest.mark.compiled
@norms
@pytest.mark.parametrize("kind", [Kind.COLUMN, None], ids=id_of)
def test_channels_last_in_tiles_of_a_gpu(kind, norm, device, force):
    force(kind)
    for shape, dtype, slopes in itertools.product(
        ((2, 3, 7, 9), (3, 64, 9, 5), (2, 90, 5, 5), (2, 520, 3, 3), (65, 16, 3, 1)),
        (torch.float32, torch.float16),
        (1, None),
    ):
        layout = torch.channels_last
        norm_call(shape, dtype, device, slopes, layout=layout, **NORMS[norm]).check()


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (Kind.PLANE, (3, 2, 1040)),
        (Kind.ODD_PLANE, (3, 2, 1035)),
        (Kind.ODD_PLANE, (4, 2, 5)),
        (Kind.COLUMN, (41, 3, 5)),
        (Kind.COLUMN, (333, 12)),
        (Kind.COLUMN, (3, 90, 5, 3)),
    ],
    ids=id_of,
)
def test_tiles_walks_splits_and_folds(kind, shape, device, force):
    """Interpreted, too: several programs for a channel, several tiles of a program."""
    force(kind)
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    norm_call(shape, torch.float32, device, layout=layout).check()
    if len(shape) > 2:
        norm_call(shape, torch.float16, device, 1, instances=True, layout=layout).check()


# Memory

SHAPE = (2, 6, 4, 8)
PARTS = {
    "channel slice": ((2, 12, 4, 8), lambda b: b[:, 6:]),
    "every other channel": ((2, 12, 4, 8), lambda b: b[:, ::2]),
    "every other image": ((4, 6, 4, 8), lambda b: b[::2]),
    "crop": ((2, 6, 4, 10), lambda b: b[..., 1:-1]),
    "transposed": ((6, 2, 4, 8), lambda b: b.transpose(0, 1)),
    "permuted": ((4, 8, 2, 6), lambda b: b.permute(2, 3, 0, 1)),
    "channels last": ((2, 4, 8, 6), lambda b: b.permute(0, 3, 1, 2)),
    "channels last slice": ((2, 4, 8, 12), lambda b: b.permute(0, 3, 1, 2)[:, :6]),
    "off the grid": ((2 * 6 * 4 * 8 + 1,), lambda b: b[1:].view(SHAPE)),
    "dense": (SHAPE, lambda b: b),
}
GRADIENTS = {
    **PARTS,
    "sum": ((), lambda b: b.expand(SHAPE)),
    "sum over pictures": ((2, 6, 1, 1), lambda b: b.expand(SHAPE)),
    "sum over channels": ((2, 1, 4, 8), lambda b: b.expand(SHAPE)),
}
PAIRED = [
    *((name, "dense") for name in PARTS),
    *(("dense", name) for name in GRADIENTS),
    *(("channels last", name) for name in ("sum", "sum over pictures", "channels last slice")),
    *(("channel slice", "sum over pictures"), ("off the grid", "off the grid")),
]


def part(name, device, seed, dtype=torch.float32):
    shape, index = GRADIENTS[name]
    return index(randn(shape, dtype, device, seed))


def parts(names, device, **options):
    call = norm_call(SHAPE, torch.float32, device, **options)
    return call._replace(x=part(names[0], device, 21), grad_y=part(names[1], device, 22))


@pytest.mark.parametrize("instances", [False, True], ids=["batch", "instance"])
@pytest.mark.parametrize(
    "names",
    [
        *(("channel slice", "sum over pictures"), ("channels last", "channels last slice")),
        *(("off the grid", "crop"), ("transposed", "sum")),
    ],
    ids="-".join,
)
def test_memory(names, instances, device):
    parts(names, device, instances=instances).check()


@pytest.mark.compiled
@pytest.mark.parametrize("instances", [False, True], ids=["batch", "instance"])
@kinds
def test_memory_in_tiles_of_a_gpu(kind, instances, device, force):
    force(kind)
    for names in PAIRED:
        parts(names, device, instances=instances).check()


# Statistics


def statistics(x):
    """Mean and unbiased variance of the channels by the kernels: what a momentum of 1 leaves."""
    zeros = torch.zeros(x.shape[1], device=x.device)
    call = NormCall(x, x, 0.25, None, None, zeros, zeros, Norm(True, False, 1e-5), momentum=1.0)
    y, _, mean, variance = call.forward()
    assert y.isfinite().all()
    return mean.double(), variance.double()


def assert_statistics(x):
    mean, variance = statistics(x)
    rows = x.double().transpose(0, 1).flatten(1)
    exact = rows.var(1)
    assert ((variance - exact).abs() <= 1e-6 * exact).all(), (variance / exact - 1).abs().max()
    largest = torch.maximum(rows.mean(1).abs(), exact.sqrt())
    assert ((mean - rows.mean(1)).abs() <= 1e-6 * largest).all()


# The interpreter adds one after another, which is exact enough for few elements.
MANY = (
    ((3, 4, 37, 41), torch.contiguous_format),
    ((2, 3, 64, 64), torch.contiguous_format),
    ((7, 6, 15, 16), torch.channels_last),
    ((50, 24), torch.contiguous_format),
    ((2, 16, 300), torch.contiguous_format),
    ((1000, 3), torch.contiguous_format),
)
FEW = (((6, 4, 8), torch.contiguous_format), ((50, 24), torch.contiguous_format))
statistics_cases = pytest.mark.parametrize(
    ("shape", "layout"), MANY if EMULATED or GPU else FEW, ids=id_of
)


@statistics_cases
@pytest.mark.parametrize("ratio", [0, 1, 10, 100, 1000])
def test_variance_where_the_mean_is_far_from_0(ratio, shape, layout, device, force):
    for tilings in (lambda: None, force):
        tilings()
        for dtype in (torch.float32, torch.bfloat16):
            x = randn(shape, torch.float64, device)
            x[:, ::2] += ratio
            x[:, 1::2] -= ratio
            assert_statistics(x.to(dtype).contiguous(memory_format=layout))


@statistics_cases
def test_variance_of_constant_channels(shape, layout, device, force):
    constants = [0.0, 1.0, 1000.1, -3e4, 1e-20, 1e15, -1e-42]
    for tilings in (lambda: None, force):
        tilings()
        for constant in constants:
            x = torch.full(shape, constant, device=device).contiguous(memory_format=layout)
            mean, variance = statistics(x)
            assert (variance >= 0).all()
            assert (variance.sqrt() <= 1e-5 * abs(constant)).all()
            assert ((mean - constant).abs() <= 1e-5 * abs(constant) + 1e-44).all()


@statistics_cases
def test_variance_with_one_huge_outlier(shape, layout, device, force):
    elements = math.prod(shape) // shape[1]
    for tilings in (lambda: None, force):
        tilings()
        for place in (0, 1, elements // 2, elements - 1):
            x = randn(shape, torch.float32, device)
            rows = x.transpose(0, 1).flatten(1)
            rows[:, place] = 1e4
            x = rows.view(x.transpose(0, 1).shape).transpose(0, 1)
            assert_statistics(x.contiguous(memory_format=layout))


# NaN and infinities


def eager(call):
    """What PyTorch's operators make of a call, in float32."""
    leaves = [t.detach().clone().requires_grad_() for t in (call.x, call.slope, call.weight)]
    x, slope, weight = leaves
    if call.norm.instances:
        z = F.instance_norm(x, None, None, weight, call.bias)
        running = None, None
    else:
        running = call.running_mean.clone(), call.running_var.clone()
        z = F.batch_norm(x, *running, weight, call.bias, call.norm.training)
    y = F.prelu(z, slope)
    grads = torch.autograd.grad(y, leaves, call.grad_y)
    names = "y", "grad_x", "grad_slope", "grad_weight", "running_mean", "running_var"
    return dict(zip(names, (y.detach(), *grads, *running), strict=True))


@norms
@pytest.mark.parametrize("layout", LAYOUTS, ids=id_of)
@pytest.mark.parametrize("kind", [None, Kind.COLUMN], ids=id_of)
def test_nan_and_infinities_are_where_they_are_in_pytorch(kind, layout, norm, device, force):
    if kind:
        force(kind)
    call = norm_call((2, 9, 3, 4), torch.float32, device, layout=layout, **NORMS[norm])
    x, grad_y, weight = (t.clone() for t in (call.x, call.grad_y, call.weight))
    x[0, 0, 0, 0], x[1, 1, 2, 3] = math.nan, math.nan
    x[0, 2, 0, 0], x[1, 3, 2, 1] = math.inf, -math.inf
    grad_y[0, 4, 1, 1], grad_y[1, 5, 2, 3] = math.nan, math.inf
    weight[6], x[:, 7] = math.nan, 3.0
    call = call._replace(x=x, grad_y=grad_y, weight=weight)
    results = call.results()
    for name, expected in eager(call).items():
        if expected is not None:
            found = results[name]
            assert torch.equal(found.isfinite(), expected.isfinite()), name
            if not call.norm.training:
                assert torch.equal(found.isnan(), expected.isnan()), name
