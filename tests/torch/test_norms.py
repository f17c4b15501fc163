"""Norms with PReLU behind them through PyTorch's machinery, beside F.prelu(F.batch_norm(...))."""

import contextlib
import io
import itertools
import math
import typing

import pytest
import torch
from support import assert_same, id_of, randn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from prelu_gpu import batch_norm_prelu, instance_norm_prelu, kernel_threshold

SHAPE = (4, 3, 5, 3)
KINDS = ("training", "evaluation", "instances")
HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)


def arguments(dtype=torch.float32, parameters=None, slope="channels", device=None, shape=SHAPE):
    """Input, slope, weight, bias and both running statistics."""
    channels = shape[1:2]
    x = randn(shape, dtype, device) * 2 + 1
    vectors = [randn(channels, parameters or dtype, device, seed) for seed in range(1, 6)]
    slopes, weight, bias, mean, variance = vectors
    slope = {"channels": slopes, "one": slopes[:1], "scalar": slopes[0]}.get(slope, slope)
    return x, slope, weight, bias, mean, variance.abs() + 0.5


def ours(kind, x, slope, weight, bias, mean, variance, **options):
    if kind == "instances":
        return instance_norm_prelu(x, slope, weight, bias, **options)
    training = kind == "training"
    return batch_norm_prelu(x, slope, mean, variance, weight, bias, training, **options)


def theirs(kind, x, slope, weight, bias, mean, variance, **options):
    if kind == "instances":
        z = F.instance_norm(x, weight=weight, bias=bias, **options)
    else:
        training = kind == "training"
        z = F.batch_norm(x, mean, variance, weight, bias, training, **options)
    if not isinstance(slope, torch.Tensor):
        return F.leaky_relu(z, slope)
    return F.prelu(z, slope)


def copies(values, to=None, grad=True):
    """Leaves, of which the first four require grad; the others are running statistics."""
    made = []
    for position, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            value = value.detach().to(to or value.dtype).clone()
            value.requires_grad_(grad and position < 4)
        made.append(value)
    return made


def leaves(values):
    return [v for v in values[:4] if isinstance(v, torch.Tensor) and v.requires_grad]


def is_by_kernels(y):
    """Not by PyTorch's norm, with a kernel of PReLU behind it."""
    return y.grad_fn.name() == "NormPReLUFunctionBackward"


def results(function, kind, values, grad_y, **options):
    """The output, all gradients, and the running statistics."""
    y = function(kind, *values, **options)
    gradients = torch.autograd.grad(y, leaves(values), grad_y.to(y.dtype))
    return [y.detach(), *gradients, *values[4:]]


def magnitudes(kind, x, slope, weight, bias, mean, variance, grad_y):
    """The sizes of what is summed for each result, in float64: what rounding is relative to."""
    x, weight, bias, mean, variance, grad_y = (
        t.detach().double() for t in (x, weight, bias, mean, variance, grad_y)
    )
    others = [0, *range(2, x.dim())]
    averaged = others[1:] if kind == "instances" else others
    shape = [-1 if d == 1 else 1 for d in range(x.dim())]
    if kind != "evaluation":
        variance, mean = torch.var_mean(x, averaged, correction=0, keepdim=True)
    else:
        mean, variance = mean.view(shape), variance.view(shape)
    rstd = variance.add(1e-5).rsqrt()
    normed = (x.abs() + mean.abs()) * rstd
    z = normed * weight.abs().view(shape) + bias.abs().view(shape)
    number = not isinstance(slope, torch.Tensor)
    slopes = torch.tensor(abs(slope)) if number else slope.detach().double().abs()
    slopes = slopes.clamp(min=1)
    slopes = slopes.view(shape) if slopes.numel() > 1 else slopes
    grad_z = grad_y.abs() * slopes
    grad_x = grad_z * weight.abs().view(shape)
    if kind != "evaluation":
        share = (grad_x * normed).mean(averaged, keepdim=True)
        grad_x = grad_x + grad_x.mean(averaged, keepdim=True) + normed * share
    grad_slope = (grad_y.abs() * z).sum(others)
    return [
        z * slopes,
        grad_x * rstd,
        *([] if number else [grad_slope if slope.numel() > 1 else grad_slope.sum()]),
        (grad_z * normed).sum(others),
        grad_z.sum(others),
        1 + mean.abs().amax() + x.abs().amax(),
        1 + variance.amax() + x.square().amax(),
    ]


def assert_near(given, exact, sizes):
    """That each number is right up to four roundings of its dtype, or eight of float32's."""
    for result, expected, size in zip(given, exact, sizes, strict=True):
        roundings = 2 * torch.finfo(result.dtype).eps
        error = (result.double() - expected).abs()
        assert result.shape == expected.shape
        assert (error <= roundings * (expected.abs() + size)).all(), (error / size).max().item()


@pytest.fixture(params=["kernels", "small", "no kernels", "dispatch mode", "compiled"])
def route(request):
    """A function that wraps one of the above, and what it is called within."""
    within = contextlib.nullcontext
    if request.param == "kernels":
        request.getfixturevalue("launches")  # there must be one
    if request.param == "no kernels":
        request.getfixturevalue("no_kernels")
        request.getfixturevalue("no_launch")
    if request.param == "small":
        within = lambda: kernel_threshold(10**6)  # noqa: E731
    if request.param == "dispatch mode":
        within = lambda: FlopCounterMode(display=False)  # noqa: E731
    if request.param == "compiled":
        torch.compiler.reset()
        return torch.compile(ours, backend="aot_eager", fullgraph=True), within, False
    return ours, within, request.param == "kernels"


def compare(kind, values, function=ours, within=contextlib.nullcontext, by_kernels=True, **options):
    grad_y = randn(values[0].shape, values[0].dtype, values[0].device, seed=9)
    with within():
        assert is_by_kernels(function(kind, *copies(values), **options)) == by_kernels
        given = results(function, kind, copies(values), grad_y, **options)
    exact = results(theirs, kind, copies(values, torch.float64), grad_y.double(), **options)
    assert_near(given, exact, magnitudes(kind, *values, grad_y))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slope", ["channels", "one", "scalar", 0.2, 0, -0.5], ids=str)
def test_every_route_computes_the_same(slope, kind, route, device):
    compare(kind, arguments(slope=slope, device=device), *route)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALF, ids=id_of)
@pytest.mark.parametrize("wide", [False, True], ids=["", "float32 parameters"])
def test_half_inputs_with_both_kinds_of_parameters(wide, dtype, kind, device, launches):
    values = arguments(dtype, torch.float32 if wide else None, device=device)
    given = ours(kind, *copies(values))
    assert given.dtype == dtype
    compare(kind, values)
    values = (*values[:1], values[1].to(dtype), *values[2:])
    compare(kind, values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 2), (2, 3, 2, 2, 3), (4, 1, 3)], ids=str)
def test_inputs_of_every_rank(shape, kind, device, launches):
    if kind == "instances" and len(shape) == 2:
        kind = "training"
    compare(kind, arguments(shape=shape, device=device))


def test_small_inputs_launch_nothing(device, no_launch):
    for kind, slope in itertools.product(KINDS, ("channels", 0.2)):
        with kernel_threshold(10**6):
            y = ours(kind, *copies(arguments(slope=slope, device=device)))
            y.sum().backward()


def negative(tensor):
    """The same numbers with the sign in a bit of the tensor."""
    return torch._neg_view(-tensor)


def with_gaps(tensor):
    return torch.stack([tensor, tensor], 1)[:, 0]


RARE = {
    "float64": lambda *values: [t.double() for t in values],
    "six dimensions": lambda x, *others: [x[..., None, None], *others],
    "empty samples": lambda x, *others: [x[..., :0], *others],
    "a negative input": lambda x, *others: [negative(x), *others],
    "negative slopes": lambda x, slope, *others: [x, negative(slope), *others],
    "negative weights": lambda x, slope, weight, *others: [x, slope, negative(weight), *others],
    "weights with gaps": lambda x, slope, weight, *others: [x, slope, with_gaps(weight), *others],
    "slopes that broadcast": lambda x, slope, *others: [x, slope.view(1, 3, 1, 1), *others],
}
RARE_IN_BATCHES = {  # F.instance_norm fails with these, or has none
    "an empty batch": lambda x, *others: [x[:0], *others],
    "weights in rows": lambda x, slope, weight, *others: [x, slope, weight[:, None], *others],
    "statistics with gaps": lambda *values: [*values[:4], *map(with_gaps, values[4:])],
}


@pytest.mark.parametrize(
    ("what", "kind"),
    [*itertools.product(RARE, KINDS), *itertools.product(RARE_IN_BATCHES, KINDS[:2])],
)
def test_rarities_are_pytorchs(what, kind, device):
    results = []
    for function in (ours, theirs):
        x, slope, *others = (RARE | RARE_IN_BATCHES)[what](*arguments(device=device))
        slope = slope.flatten() if function is theirs else slope
        y = function(kind, x.requires_grad_(), slope, *others)
        assert not is_by_kernels(y)
        results.append([y.detach(), *others[2:]])
    for given, expected in zip(*results, strict=True):
        assert_same(given, expected)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("training", {"eps": math.nan}),
        ("instances", {"eps": math.nan}),
        ("instances", {"eps": 0.0}),
        ("evaluation", {"eps": 0.0}),
        ("training", {"momentum": torch.tensor(0.3)}),
    ],
    ids=str,
)
def test_options_that_are_rare_are_pytorchs(kind, options, device):
    values = copies(arguments(device=device)), copies(arguments(device=device))
    given, expected = (f(kind, *v, **options) for f, v in zip((ours, theirs), values, strict=True))
    assert not is_by_kernels(given)
    assert_same(given.detach(), expected.detach())
    assert_same(values[0][4], values[1][4])


def test_one_value_a_channel_in_evaluation(device, launches):
    compare("evaluation", arguments(shape=(1, 3, 1), device=device))
    compare("evaluation", arguments(shape=(1, 3), device=device))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, device):
    values = copies(arguments(torch.float64, device=device, shape=(3, 2, 3)))
    running = values[4:]
    assert torch.autograd.gradcheck(lambda *v: ours(kind, *v, *running), values[:4])
    assert torch.autograd.gradgradcheck(lambda *v: ours(kind, *v, *running), values[:4])


class TestRunningStatistics:
    @pytest.mark.parametrize("momentum", [0, 0.0, 0.1, 1.0, 1, True])
    @pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
    def test_momentum(self, dtype, momentum, device, launches):
        values = arguments(dtype, device=device)
        compare("training", values, momentum=momentum)

    def test_training_without_any(self, device, launches):
        values = copies(arguments(device=device))
        y, z = (f("training", *values[:4], None, None) for f in (ours, theirs))
        torch.testing.assert_close(y, z)

    def test_those_that_are_not_contiguous(self, device):
        x, slope, weight, bias, mean, variance = arguments(device=device)
        both = []
        for function in (ours, theirs):
            running = [torch.stack([t, t], 1)[:, 0] for t in (mean, variance)]
            function("training", x, slope, weight, bias, *running)
            both.append(running)
        assert not torch.equal(both[0][0], mean)
        torch.testing.assert_close(*both)

    def test_neither_kind_of_call_counts_as_a_change(self, device, launches):
        for function, kind in itertools.product((ours, theirs), ("training", "evaluation")):
            values = copies(arguments(device=device), grad=False)
            function(kind, *values)
            assert [t._version for t in values[4:]] == [0, 0]

    def test_those_that_require_grad_without_recording(self, device):
        values = copies(arguments(device=device), grad=False)
        expected = copies(values, grad=False)
        with torch.no_grad():
            theirs("training", *expected)
            ours("training", *values[:4], *(t.requires_grad_() for t in values[4:]))
        torch.testing.assert_close([t.detach() for t in values[4:]], expected[4:])

    @pytest.mark.parametrize("order", [1, 2])
    def test_they_may_change_between_forward_and_backward(self, order, device, launches):
        values = arguments(device=device)
        both = []
        for changed in (False, True):
            given = copies(values)
            y = ours("evaluation", *given)
            if changed:
                given[4].add_(100)
                given[5].mul_(100)
            gradients = torch.autograd.grad(y.square().sum(), leaves(given), create_graph=order > 1)
            both.append([gradient.detach() for gradient in gradients])
        torch.testing.assert_close(*both, rtol=0, atol=0)


class TestWhatIsComputed:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)), ids=str)
    @pytest.mark.parametrize("order", [1, 2])
    def test_all_combinations_of_gradients_that_are_needed(
        self, order, needs, kind, device, launches
    ):
        values = copies(arguments(device=device))
        expected = torch.autograd.grad(theirs(kind, *values).square().sum(), values[:4])
        values = copies(arguments(device=device))
        for value, need in zip(values, needs, strict=False):
            value.requires_grad_(need)
        y = ours(kind, *values)
        assert y.requires_grad == any(needs)
        if not any(needs):
            return
        launches.clear()
        given = iter(torch.autograd.grad(y.square().sum(), leaves(values), create_graph=order > 1))
        assert bool(launches) == (order == 1)
        launches.append("forward")
        for gradient, need in zip(expected, needs, strict=True):
            if need:
                torch.testing.assert_close(next(given), gradient, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("kind", KINDS)
    def test_no_affine(self, kind, device, launches):
        x, slope, _, bias, *running = arguments(device=device)
        for parameters in ((None, None), (None, bias)):
            values = copies((x, slope, *parameters, *running))
            grad_y = randn(SHAPE, x.dtype, device, seed=9)
            for retain in (False, True):
                given, expected = (
                    torch.autograd.grad(
                        f(kind, *values), leaves(values), grad_y, create_graph=retain
                    )
                    for f in (ours, theirs)
                )
                torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("kind", KINDS)
    def test_no_graph_without_gradients(self, kind, device, launches):
        values = arguments(device=device)
        assert not ours(kind, *values).requires_grad
        with torch.no_grad():
            assert not ours(kind, *copies(values)).requires_grad
        with torch.inference_mode():
            assert ours(kind, *copies(values)).is_inference()

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("slope", ["channels", 0.2], ids=str)
    def test_the_input_and_nothing_else_of_its_size_is_saved(self, slope, kind, device, launches):
        values = copies(arguments(slope=slope, shape=(5, 3, 400), device=device))
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = ours(kind, *values)
        assert saved[0].data_ptr() == values[0].data_ptr()
        others = [t for t in saved[1:] if all(t is not v for v in values)]
        assert sum(t.numel() for t in others) < values[0].numel() / 4
        assert all(t.data_ptr() != s.data_ptr() for t in saved for s in values[4:])
        y.sum().backward()

    def test_an_input_changed_after_the_forward_is_an_error(self, device, launches):
        values = copies(arguments(device=device))
        y = ours("training", *values)
        values[0].data.add_(1)
        with torch.no_grad():
            values[0].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_layout_of_the_input(self, kind, device, launches):
        x, *others = arguments(device=device)
        for given in (x, x.to(memory_format=torch.channels_last), x.permute(3, 1, 0, 2)):
            leaf = given.detach().requires_grad_()
            y = ours(kind, leaf, *others)
            (grad_x,) = torch.autograd.grad(y.sum(), leaf)
            # Samples that do not follow one another are copied to do so.
            copied = kind == "instances" and given.stride(0) < given.stride(2)
            stride = given.contiguous().stride() if copied else given.stride()
            assert y.stride() == grad_x.stride() == stride
            torch.testing.assert_close(y, theirs(kind, given, *others))

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_negative_view_as_gradient(self, kind, device, launches):
        x, *others = arguments(device=device)
        gradients = [
            torch.autograd.grad(f(kind, x.requires_grad_(), *others), x, negative(x.detach()))[0]
            for f in (ours, theirs)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slope", ["channels", "one", 0.2], ids=str)
class TestHigherOrders:
    def test_gradients_of_gradients(self, kind, slope, device, launches):
        values = arguments(slope=slope, device=device)
        outcomes = []
        for function, dtype in ((ours, torch.float32), (theirs, torch.float64)):
            given = copies(values, dtype)
            inputs = [*leaves(given), randn(SHAPE, dtype, device, seed=9).requires_grad_()]
            first = torch.autograd.grad(
                function(kind, *given), inputs[:-1], inputs[-1], create_graph=True
            )
            tangents = [randn(t.shape, dtype, device, seed=10) for t in first]
            second = torch.autograd.grad(first, inputs, tangents)
            outcomes.append([t.detach().double() for t in (*first, *second)])
        # Twice the summands of a channel, 60: a first gradient's rounding goes into each of a sum.
        for actual, expected in zip(*outcomes, strict=True):
            size = 60 * expected.abs().amax()
            assert (actual - expected).abs().amax() <= 8 * torch.finfo(torch.float32).eps * size

    def test_arguments_that_depend_on_each_other(self, kind, slope, device, launches):
        """What an argument was computed from does not get its gradient twice."""
        x, slope, weight, bias, *running = arguments(slope=slope, device=device)
        outcomes = []
        for function in (ours, theirs):
            root = bias.clone().requires_grad_()
            given = x * root.view(3, 1, 1), slope, weight * root, root, *running
            y = function(kind, *given)
            (first,) = torch.autograd.grad(y.square().sum(), root, create_graph=True)
            outcomes.append([first, *torch.autograd.grad(first.square().sum(), root)])
        torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-3)

    def test_batched_gradients(self, kind, slope, device, launches):
        values = copies(arguments(slope=slope, device=device))
        inputs = leaves(values)
        rows = randn((2, *SHAPE), torch.float32, device, seed=9)
        y = ours(kind, *values)
        given = torch.autograd.grad(y, inputs, rows, is_grads_batched=True, retain_graph=True)
        for row, grad_y in enumerate(rows):
            alone = torch.autograd.grad(y, inputs, grad_y, retain_graph=True)
            torch.testing.assert_close([t[row] for t in given], list(alone), rtol=1e-5, atol=1e-5)

    def test_forward_mode_over_a_backward(self, kind, slope, device, launches):
        """The tangent is the second derivative along a direction, which a backward gives, too."""
        values = copies(arguments(slope=slope, device=device))
        x = values[0]
        y = ours(kind, *values)
        grad_y = torch.ones_like(y)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(grad_y, y.detach())
            (grad_x,) = torch.autograd.grad(y, x, dual, retain_graph=True)
            tangent = torch.autograd.forward_ad.unpack_dual(grad_x).tangent
        # grad_x is linear in grad_y, and so are its tangents.
        (expected,) = torch.autograd.grad(y, x, y.detach())
        torch.testing.assert_close(tangent, expected, rtol=1e-5, atol=1e-5)

    def test_compiled_autograd(self, kind, slope, device, launches):
        values = copies(arguments(slope=slope, device=device))
        y = ours(kind, *values)
        expected = torch.autograd.grad(y.square().sum(), leaves(values), retain_graph=True)
        torch.compiler.reset()
        compiler = torch.compile(backend="eager", fullgraph=True)
        with torch._dynamo.compiled_autograd._enable(compiler):
            given = torch.autograd.grad(y.square().sum(), leaves(values))
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)

    def test_dispatch_modes_around_the_backward(self, kind, slope, device, launches):
        values = copies(arguments(slope=slope, device=device))
        y = ours(kind, *values)
        expected = torch.autograd.grad(y.square().sum(), leaves(values), retain_graph=True)
        launches.append("forward")
        before = len(launches)
        with FlopCounterMode(display=False):
            given = torch.autograd.grad(y, leaves(values), 2 * y.detach())
        assert len(launches) == before
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
class TestWhatSeesPyTorchsOperators:
    def test_func_transforms(self, kind, device):
        values = arguments(device=device)
        x, slope, *others = values
        for transform in (
            lambda f: torch.func.grad(lambda x, s: f(x, s).square().sum(), (0, 1))(x, slope),
            lambda f: torch.func.jvp(f, (x, slope), (x, slope)),
            lambda f: torch.func.vjp(f, x, slope)[1](x),
            lambda f: torch.func.jacrev(lambda s: f(x, s).sum((0, 2)))(slope),
        ):
            given, expected = (
                transform(lambda x, s, f=f: f(kind, x, s, *map(torch.clone, others)))
                for f in (ours, theirs)
            )
            torch.testing.assert_close(given, expected)

    def test_vmap(self, kind, device):
        x, slope, weight, bias, *running = arguments(device=device)
        batch = torch.stack([x, 2 * x])
        slopes = torch.stack([slope, -slope])
        if kind == "training":  # vmap refuses to write every sample's into one
            running = None, None
        given = torch.vmap(lambda x, s: ours(kind, x, s, weight, bias, *running))
        expected = [theirs(kind, x, s, weight, bias, *running) for x, s in zip(batch, slopes)]  # noqa: B905
        torch.testing.assert_close(given(batch, slopes), torch.stack(expected))

    def test_forward_mode(self, kind, device):
        x, *others = arguments(device=device)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x).cumsum(0))
            given, expected = (
                torch.autograd.forward_ad.unpack_dual(f(kind, dual, *others)).tangent
                for f in (ours, theirs)
            )
        torch.testing.assert_close(given, expected)

    # F.batch_norm's own look at a size.
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning:torch.nn.functional")
    def test_jit_trace(self, kind, device):
        x, slope, weight, bias, *running = arguments(device=device)
        function = lambda x, s: ours(kind, x, s, weight, bias, *running)  # noqa: E731
        traced = torch.jit.trace(function, (x, slope), check_trace=False)
        assert "PythonOp" not in str(traced.graph)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        loaded = torch.jit.load(io.BytesIO(file.getvalue()))
        torch.testing.assert_close(loaded(2 * x, -slope), function(2 * x, -slope))

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("slope", ["channels", 0.2], ids=str)
    def test_export(self, strict, slope, kind, device):
        values = arguments(slope=slope, device=device)

        class Network(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.mean = torch.nn.Buffer(values[4].clone())
                self.variance = torch.nn.Buffer(values[5].clone())

            def forward(self, x):
                return ours(kind, x, *values[1:4], self.mean, self.variance)

        network = Network()
        program = torch.export.export(network, values[:1], strict=strict)
        assert "prelu_gpu" not in str(program.graph)
        expected = theirs(kind, *copies(values, grad=False))
        torch.testing.assert_close(program.module()(values[0]), expected)

    def test_fx_keeps_our_functions_and_their_arguments(self, kind, device):
        values = arguments(device=device)
        graph = torch.fx.symbolic_trace(
            lambda x, s, w, b, mean, variance: ours(kind, x, s, w, b, mean, variance, eps=0.1)
        )
        (call,) = [node for node in graph.graph.nodes if node.op == "call_function"]
        function = instance_norm_prelu if kind == "instances" else batch_norm_prelu
        assert call.target is function
        expected = ours(kind, *copies(values, grad=False), eps=0.1)
        torch.testing.assert_close(graph(*values), expected)

    @pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
    def test_make_fx(self, mode, kind, device):
        values = arguments(device=device)
        graph = make_fx(lambda *v: ours(kind, *v), tracing_mode=mode)(*copies(values, grad=False))
        assert "prelu_gpu" not in graph.code
        given, expected = copies(values, grad=False), copies(values, grad=False)
        torch.testing.assert_close(graph(*given), theirs(kind, *expected))
        torch.testing.assert_close(given[4:], expected[4:])

    def test_tensors_without_memory(self, kind, device, no_launch):
        values = arguments(device=device)
        with torch._subclasses.FakeTensorMode() as mode:
            y = ours(kind, *(mode.from_tensor(t) for t in values))
        assert (y.shape, y.dtype, y.device) == (SHAPE, torch.float32, values[0].device)
        y = ours(kind, *(t.to("meta") for t in values))
        assert (y.shape, y.dtype, y.is_meta) == (SHAPE, torch.float32, True)

    def test_subclasses_with_operators_of_their_own(self, kind, device, no_launch):
        x, slope, weight, bias, *running = arguments(device=device)
        running = [None, None] if kind == "training" else [TwoTensor(t, t) for t in running]
        others = [TwoTensor(t, t) for t in (slope, weight, bias)]
        given = ours(kind, TwoTensor(x, 2 * x), *others, *running)
        plain = [None if t is None else t.a for t in running]
        torch.testing.assert_close(given.a, theirs(kind, x, slope, weight, bias, *plain))
        torch.testing.assert_close(given.b, theirs(kind, 2 * x, slope, weight, bias, *plain))


class Annotated(torch.Tensor):
    """A class that adds to torch functions, and to no operator."""

    seen: typing.ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_serve_tensors_whose_class_only_adds_to_torch_functions(kind, device, launches):
    values = copies(arguments(device=device), grad=False)
    expected = ours(kind, *copies(values, grad=False))
    annotated = [value.as_subclass(Annotated) for value in values]
    annotated[0].requires_grad_()
    Annotated.seen.clear()
    y = ours(kind, *annotated)
    assert len(Annotated.seen) == 1
    assert type(y) is Annotated
    assert y.grad_fn.next_functions[0][0].name() == "NormPReLUFunctionBackward"  # before its class
    torch.testing.assert_close(y.detach().as_subclass(torch.Tensor), expected)


class TestTraining:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpoint(self, reentrant, kind, device, launches):
        grad_y = randn(SHAPE, torch.float32, device, seed=9)
        outcomes = []
        for function in (ours, theirs):
            values = copies(arguments(device=device))
            y = checkpoint(lambda *v, f=function: f(kind, *v), *values, use_reentrant=reentrant)
            y.backward(grad_y)
            outcomes.append([y.detach(), *(v.grad for v in values[:4]), *values[4:]])
        for actual, expected in zip(*outcomes, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("kind", KINDS)
    def test_saved_tensors_hooks(self, kind, device, launches):
        values = copies(arguments(device=device))
        expected = torch.autograd.grad(ours(kind, *values).square().sum(), values[:4])
        with torch.autograd.graph.save_on_cpu():
            y = ours(kind, *values)
        given = torch.autograd.grad(y.square().sum(), values[:4])
        torch.testing.assert_close(given, expected)

    @pytest.mark.parametrize("kind", KINDS)
    def test_one_graph_twice(self, kind, device, launches):
        values = copies(arguments(device=device))
        y = ours(kind, *values)
        once = torch.autograd.grad(y.sum(), values[:4], retain_graph=True)
        y.sum().backward(retain_graph=True)
        y.sum().backward()
        torch.testing.assert_close([v.grad for v in values[:4]], [2 * g for g in once])


def assert_rounded_once(given, exact):
    error = (given.double() - exact).abs()
    assert (error <= torch.finfo(given.dtype).eps / 2 * exact.abs() + 4e-6).all(), error.max()


class TestAutocast:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("given", DTYPES, ids=id_of)
    @pytest.mark.parametrize("dtype", HALF, ids=id_of)
    def test_as_pytorchs_with_the_slope_unrounded(self, dtype, given, kind, device, launches):
        values = arguments(given, torch.float32, device=device)
        leaf = copies(values)
        with torch.autocast(device.type, dtype):
            y = ours(kind, *leaf)
            assert y.dtype == theirs(kind, *copies(values)).dtype == dtype
        # From the unrounded input, with the unrounded slope, and rounded once.
        expected = theirs(kind, *copies(values, torch.float64))
        assert_rounded_once(y, expected)
        gradients = torch.autograd.grad(y.sum(), leaf[:4])
        assert [g.dtype for g in gradients] == [given, *[torch.float32] * 3]

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("given", DTYPES, ids=id_of)
    def test_leaky_relu_is_not_cast(self, given, kind, device, launches):
        values = arguments(given, slope=0.2, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            y = ours(kind, *copies(values))
            assert y.dtype == theirs(kind, *copies(values)).dtype == given

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.bfloat16], ids=id_of)
    def test_slopes_of_half_precision(self, given, kind, device):
        x, slope, *others = arguments(given, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            if given is torch.float64:
                with pytest.raises(RuntimeError, match="Type promoting not supported"):
                    ours(kind, x, slope.half(), *others)
                return
            y = ours(kind, x, slope.half(), *others)
            assert y.dtype == theirs(kind, x, slope.half(), *others).dtype == torch.bfloat16
        exact = theirs(kind, *copies((x, slope.half(), *others), torch.float64))
        assert_rounded_once(y, exact)

    def test_without_kernels_it_is_pytorchs(self, device, no_kernels):
        values = arguments(device=device)
        with torch.autocast(device.type, torch.bfloat16):
            given, expected = (f("training", *copies(values)) for f in (ours, theirs))
        assert_same(given, expected)

    def test_compiled(self, device):
        values = arguments(device=device)
        torch.compiler.reset()
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        with torch.autocast(device.type, torch.bfloat16):
            given = compiled("training", *copies(values, grad=False))
            expected = ours("training", *copies(values, grad=False))
        assert given.dtype == torch.bfloat16
        torch.testing.assert_close(given, expected, rtol=torch.finfo(given.dtype).eps, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_are_not_finite(kind, device, launches):
    x, *others = arguments(device=device)
    for value in (math.nan, math.inf, -math.inf):
        x[0, 1, 0, 0] = value
        given, expected = (f(kind, x, *others) for f in (ours, theirs))
        torch.testing.assert_close(given, expected, equal_nan=True)
