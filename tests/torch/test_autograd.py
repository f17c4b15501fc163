import contextlib
import io
import itertools
import math
import typing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import (
    MARGIN,
    REDUCTIONS,
    assert_same,
    backward,
    eager_backward,
    exact_grad_weight,
    id_of,
    randn,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

from prelu_gpu import enabled, leaky_relu, prelu
from prelu_gpu.rules import Kind


@pytest.mark.parametrize("kind", [Kind.PLANE, Kind.COLUMN], ids=id_of)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_only_the_gradients_that_are_needed(kind, reduction, x, weight, launches, force):
    force(kind, reduction)
    grad_y = randn(x.shape, x.dtype, x.device, seed=2)
    _, grad_x, grad_weight = eager_backward(x, weight, grad_y)

    y = prelu(x.requires_grad_(), weight)
    launches.clear()
    y.backward(grad_y)
    assert_same(x.grad, grad_x)
    assert weight.grad is None
    backward = f"{kind.value}_backward"
    assert launches == [backward], "a frozen slope makes a plain elementwise backward"

    y = prelu(x.detach(), weight.requires_grad_())
    launches.clear()
    y.backward(grad_y)
    torch.testing.assert_close(weight.grad, grad_weight)
    # A column is a sum of many programs' partials: no last program sums those.
    second = reduction == "second launch" or (reduction, kind) == ("last program", Kind.COLUMN)
    assert launches == [backward, *["sum_partials"] * second]


def test_an_input_without_gradient_allocates_none(device, weight, force, guarded_allocations):
    force()
    x = randn((400, 3, 40), torch.float32, device)
    y = prelu(x, weight.requires_grad_())
    grad_y = torch.ones_like(y)
    guarded_allocations.buffers.clear()
    y.backward(grad_y)
    sizes = [buffer.numel() - 2 * MARGIN for buffer in guarded_allocations.buffers]
    assert sum(sizes) < x.numel()


def test_backward_allocates_the_input_gradient_and_little_more(device, force, guarded_allocations):
    force()
    for shape in ((4, 3, 3000), (3000, 12), (40, 12, 49)):
        x = randn(shape, torch.float32, device).requires_grad_()
        y = prelu(x, randn((shape[1],), torch.float32, device, seed=1).requires_grad_())
        grad_y = torch.ones_like(y)
        guarded_allocations.buffers.clear()
        y.backward(grad_y)
        grad_x, *others = guarded_allocations.buffers
        assert grad_x.numel() - 2 * MARGIN == x.numel()
        assert sum(other.numel() - 2 * MARGIN for other in others) < x.numel()


@pytest.mark.parametrize("kind", list(Kind), ids=id_of)
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=2)), ids=str)
def test_all_combinations_of_gradients_that_are_needed(needs, kind, x, weight, force):
    force(kind)
    weight = weight[:1] if kind is Kind.FLAT else weight
    grad_y = randn(x.shape, x.dtype, x.device, seed=2)
    expected = eager_backward(x, weight, grad_y)[1:]
    leaves = [t.detach().requires_grad_(need) for t, need in zip((x, weight), needs, strict=True)]
    y = prelu(*leaves)
    assert y.requires_grad == any(needs)
    if any(needs):
        y.backward(grad_y)
    for leaf, gradient, need in zip(leaves, expected, needs, strict=True):
        if need:
            torch.testing.assert_close(leaf.grad, gradient)
        else:
            assert leaf.grad is None


def test_no_graph_without_gradients(x, weight, launches):
    assert not prelu(x, weight).requires_grad
    with torch.no_grad():
        assert not prelu(x, weight.requires_grad_()).requires_grad
    with torch.inference_mode():
        assert prelu(x, weight).is_inference()
    assert set(launches) == {"column_forward"}


def test_saves_the_input_and_the_slope_only(x, weight):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        prelu(x.requires_grad_(), weight.requires_grad_())
    assert [t.data_ptr() for t in saved] == [x.data_ptr(), weight.data_ptr()]


def test_an_input_changed_after_the_forward_is_an_error(x, weight):
    y = prelu(x, weight.requires_grad_())
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_create_graph_gives_differentiable_gradients(device):
    x = randn((2, 3, 4), torch.float64, device).requires_grad_()
    weight = randn((3,), torch.float64, device, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(prelu, (x, weight))
    assert torch.autograd.gradgradcheck(prelu, (x, weight))
    assert torch.autograd.gradgradcheck(prelu, (x, weight.detach()))
    assert torch.autograd.gradgradcheck(prelu, (x.detach(), weight))
    assert torch.autograd.gradgradcheck(leaky_relu, (x, 0.3))
    assert torch.autograd.gradgradcheck(lambda x: leaky_relu(x.clone(), 0.3, inplace=True), (x,))


def test_second_order_and_forward_mode_at_zero_are_pytorchs(device):
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan], device=device)
    outcomes = []
    for f in (prelu, torch.prelu):
        leaves = [values.clone(), torch.tensor([0.3], device=device), torch.ones_like(values)]
        x, weight, grad_y = (t.requires_grad_() for t in leaves)
        first = torch.autograd.grad(f(x, weight), (x, weight), grad_y, create_graph=True)
        tangents = [torch.ones_like(gradient) for gradient in first]
        second = torch.autograd.grad(first, (x, weight, grad_y), tangents)
        one = torch.ones_like(values)
        _, tangent = torch.func.jvp(lambda x, w, f=f: f(x, w), (x, weight), (one, weight))
        outcomes.append((*first, *second, tangent))
    for ours, torchs in zip(*outcomes, strict=True):
        assert_same(ours.detach(), torchs.detach())


def test_one_graph_twice_and_gradients_that_accumulate(x, weight):
    grad_y = torch.ones_like(x)
    y = prelu(x, weight.requires_grad_())
    y.backward(grad_y, retain_graph=True)
    y.backward(grad_y)
    torch.testing.assert_close(weight.grad, 2 * exact_grad_weight(x, weight, grad_y).float())


def test_leaky_relu_in_place_saves_its_output(x):
    leaf = x.clone().requires_grad_()
    hidden = leaf * 1
    y = leaky_relu(hidden, 0.2, inplace=True)
    assert y is hidden
    assert_same(y.detach(), torch.nn.functional.leaky_relu(x, 0.2))
    y.sum().backward()
    assert_same(leaf.grad, torch.where(x > 0, 1.0, 0.2).to(x.dtype))


def test_leaky_relu_in_place_backward_refuses_a_negative_slope_as_pytorch_does(x):
    for function in (leaky_relu, torch.nn.functional.leaky_relu):
        leaf = x.clone().requires_grad_()
        for slope in (-0.2, math.nan):
            y = function(leaf * 1, slope, inplace=True)
            with pytest.raises(RuntimeError, match="triggered with a negative slope"):
                y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=id_of)
@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16], ids=id_of)
def test_autocast_casts_the_input_and_not_the_slope(dtype, given, x, weight):
    x, weight = x.to(given).requires_grad_(), weight.requires_grad_()
    with torch.autocast(x.device.type, dtype):
        y = prelu(x, weight)
        assert y.dtype == torch.prelu(x, weight).dtype == dtype
        assert prelu(x, weight.half()).dtype == dtype
        assert prelu(x.double(), weight.double()).dtype == torch.float64
        assert prelu(torch.empty(2, 3, device="meta"), weight.to("meta")).dtype == torch.float32
        assert leaky_relu(x).dtype == given
    assert_same(y.detach(), prelu(x.detach().to(dtype), weight.detach()))
    y.sum().backward()
    assert x.grad.dtype == given
    assert weight.grad.dtype == torch.float32


def test_writing_in_place_is_seen_by_autograd(device):
    x = randn((4, 3), torch.float32, device)
    factor = randn((4, 3), torch.float32, device, seed=1).requires_grad_()
    for mode in (torch.enable_grad, torch.no_grad):
        y = factor * x
        with mode():
            leaky_relu(x, 0.1, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_a_leaf_may_be_written_without_grad(device):
    leaf = torch.full((3,), -1.0, device=device, requires_grad=True)
    with torch.no_grad():
        assert leaky_relu(leaf, 0.5, inplace=True) is leaf
    assert leaf.tolist() == [-0.5] * 3


def inputs_of_autocast(device):
    """With slopes that half precision rounds."""
    x = -torch.rand(64, 8, device=device) - 0.5
    slopes = 0.1 + torch.arange(8, device=device) * 1e-4
    return x, (slopes, slopes[None], slopes[:1], slopes[0])


def test_autocast_gives_the_same_compiled(device):
    x, all_slopes = inputs_of_autocast(device)
    compiled = torch.compile(prelu, backend="eager")
    for weight in all_slopes:
        with torch.autocast(device.type, torch.bfloat16):
            expected = prelu(x, weight)
            assert_same(expected, prelu(x.bfloat16(), weight))
            assert torch.equal(compiled(x, weight), expected)


def bytes_saved(function):
    """What a function gives, and how much it keeps for the backward."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function()
    return y, sum(saved.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=id_of)
@pytest.mark.parametrize("route", ["no kernels", "forward mode"])
def test_autocast_without_kernels_is_pytorchs_and_saves_no_more(route, dtype, device, request):
    x, all_slopes = inputs_of_autocast(device)
    if route == "no kernels":
        request.getfixturevalue("no_kernels")
    forward_mode = route == "forward mode"
    level = torch.autograd.forward_ad.dual_level if forward_mode else contextlib.nullcontext
    for weight, given in itertools.product(all_slopes, (torch.float32, dtype)):
        results, saved = [], []
        for function in (torch.prelu, prelu):
            # torch.prelu takes no slopes to broadcast; these are as those of the channels.
            slopes = weight.flatten() if function is torch.prelu and weight.dim() else weight
            leaves = [t.detach().clone().requires_grad_() for t in (x.to(given), slopes)]
            with level():
                with torch.autocast(device.type, dtype):
                    y, kept = bytes_saved(lambda f=function, t=leaves: f(*t))
                y.backward(torch.ones_like(y))
            results.append([y.detach(), leaves[0].grad, leaves[1].grad.view(weight.shape)])
            saved.append(kept)
        for theirs, ours in zip(*results, strict=True):
            assert_same(ours, theirs)
        assert x.numel() * 2 <= saved[1] <= saved[0]


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x, w: torch.func.grad(lambda x, w: f(x, w).float().square().sum(), (0, 1))(x, w),
        # Autocast does not reach torch.prelu in a vmap.
        lambda f, x, w: torch.vmap(f, (0, None))(x[:, None], w)[:, 0] if f is prelu else f(x, w),
        lambda f, x, w: torch.func.jvp(f, (x, w), (x, w)),
        lambda f, x, w: torch.jit.trace(f, (x, w), check_trace=False)(x, w),
    ],
    ids=["grad", "vmap", "jvp", "trace"],
)
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_autocast_under_transforms_is_pytorchs(transform, device):
    x, all_slopes = inputs_of_autocast(device)
    for weight in all_slopes[0], all_slopes[2]:
        with torch.autocast(device.type, torch.bfloat16):
            expected, given = (transform(f, x, weight) for f in (torch.prelu, prelu))
            kernels = prelu(x, weight)
        if not isinstance(given, tuple):
            given, expected = (given,), (expected,)
        for ours, theirs in zip(given, expected, strict=True):
            assert_same(ours, theirs)
        assert not torch.equal(kernels, torch.prelu(x.bfloat16(), weight.bfloat16()))


def test_the_version_counter_moves_by_one(device):
    x = randn((4, 3), torch.float32, device).requires_grad_()
    for hidden in (x * 1, x.detach() * 1):
        before = hidden._version
        leaky_relu(hidden, 0.1, inplace=True)
        assert hidden._version == before + 1


def leaky(x, weight):
    return leaky_relu(x, 0.2) * weight.sum()


def torch_leaky(x, weight):
    return torch.nn.functional.leaky_relu(x, 0.2) * weight.sum()


@pytest.mark.parametrize(
    ("function", "reference"),
    [(prelu, torch.prelu), (leaky, torch_leaky)],
    ids=["prelu", "leaky_relu"],
)
class TestWhatSeesPyTorchsOperators:
    def test_func_transforms(self, function, reference, x, weight):
        given, expected = (
            torch.func.grad(lambda x, w, f=f: f(x, w).square().sum(), (0, 1))(x, weight)
            for f in (function, reference)
        )
        torch.testing.assert_close(given, expected)
        for transform in (
            lambda f: torch.vmap(f, (0, None))(x.unsqueeze(1), weight),
            lambda f: torch.func.jvp(f, (x, weight), (x, weight)),
            lambda f: torch.func.vjp(f, x, weight)[1](x),
            lambda f: torch.func.jacrev(lambda x: f(x, weight).sum((0, 2)))(x),
            lambda f: torch.func.jacrev(lambda w: f(x, w).sum((0, 2)))(weight),
            lambda f: torch.func.jacfwd(lambda w: f(x, w).sum((0, 2)))(weight),
        ):
            torch.testing.assert_close(transform(function), transform(reference))

    def test_hessian(self, function, reference, device):
        x, weight = (randn(shape, torch.float64, device) for shape in ((2, 3), (3,)))
        hessians = [
            torch.func.hessian(lambda x, w, f=f: f(x, w).square().sum(), (0, 1))(x, weight)
            for f in (function, reference)
        ]
        torch.testing.assert_close(*hessians)
        assert hessians[0][0][1].any()

    def test_gradients_per_sample(self, function, reference, x, weight):
        gradients = []
        for f in (function, reference):
            loss = torch.func.grad(lambda w, sample, f=f: f(sample[None], w).square().sum())
            gradients.append(torch.vmap(loss, (None, 0))(weight, x))
        torch.testing.assert_close(*gradients)
        alone = weight.detach().requires_grad_()
        for sample, gradient in zip(x, gradients[0], strict=True):
            loss = function(sample[None], alone).square().sum()
            torch.testing.assert_close(gradient, torch.autograd.grad(loss, alone)[0])

    def test_forward_mode(self, function, reference, x, weight):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            tangents = [
                torch.autograd.forward_ad.unpack_dual(f(dual, weight)).tangent
                for f in (function, reference)
            ]
        torch.testing.assert_close(*tangents)

    def test_forward_mode_over_a_backward(self, function, reference, x, weight):
        tangents = []
        for f in (function, reference):
            y = f(x.requires_grad_(), weight)
            with torch.autograd.forward_ad.dual_level():
                grad_y = torch.autograd.forward_ad.make_dual(torch.ones_like(y), y.detach())
                (grad_x,) = torch.autograd.grad(y, x, grad_y)
                tangents.append(torch.autograd.forward_ad.unpack_dual(grad_x).tangent)
        torch.testing.assert_close(*tangents)

    def test_batched_gradients(self, function, reference, device):
        x, weight = randn((2, 3), torch.float32, device), torch.ones(3, device=device)
        given, expected = (
            torch.autograd.functional.jacobian(f, (x, weight), vectorize=True)
            for f in (function, reference)
        )
        torch.testing.assert_close(given, expected)

    def test_compile(self, function, reference, x, weight):
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, weight), reference(x, weight))

    def test_jit_trace(self, function, reference, x, weight):
        traced = torch.jit.trace(function, (x, weight))
        assert "PythonOp" not in str(traced.graph)
        torch.testing.assert_close(traced(2 * x, weight), reference(2 * x, weight))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        loaded = torch.jit.load(io.BytesIO(file.getvalue()))
        torch.testing.assert_close(loaded(2 * x, weight), reference(2 * x, weight))

    @pytest.mark.parametrize("mode", ["real", "fake"])
    def test_make_fx(self, function, reference, mode, x, weight):
        graph = make_fx(lambda x, w: function(x, w), tracing_mode=mode)(x, weight)
        torch.testing.assert_close(graph(2 * x, weight), reference(2 * x, weight))

    def test_tensor_subclasses_without_torch_function(self, function, reference, x, weight):
        given, expected = (f(TwoTensor(x, 2 * x), weight) for f in (function, reference))
        torch.testing.assert_close(given.a, expected.a)
        torch.testing.assert_close(given.b, expected.b)


@pytest.mark.parametrize("given", [torch.float32, torch.float16], ids=id_of)
@pytest.mark.parametrize("weight_shape", [(1,), (), (1, 1)], ids=str)
def test_vmap_over_slopes_that_are_one_in_each_call(weight_shape, given, device):
    """As an ensemble of models has them, of as many models as the last dimension, and not."""
    for models in (5, 4):
        x = randn((models, 3, 5), torch.float32, device).to(given)
        weight = randn((models, *weight_shape), torch.float32, device, seed=1)
        gradients = torch.vmap(torch.func.grad(lambda x, w: prelu(x, w).sum(), (0, 1)))(x, weight)
        for model in range(models):
            expected = backward(prelu, x[model], weight[model], torch.ones_like(x[model]))[1:]
            for ours, alone in zip(gradients, expected, strict=True):
                torch.testing.assert_close(ours[model], alone)


@pytest.mark.parametrize("function", [prelu, leaky], ids=["prelu", "leaky_relu"])
def test_zerotensors(function, device):
    zeros = torch._efficientzerotensor((2, 3), device=device)
    x, weight = randn((2, 3), torch.float32, device), torch.ones(3, device=device)
    assert torch.equal(function(zeros, weight), torch.zeros(2, 3, device=device))
    y = function(x.requires_grad_(), weight)
    (grad_x,) = torch.autograd.grad(y, x, zeros)
    assert torch.equal(grad_x, torch.zeros(2, 3, device=device))


def test_fx_keeps_our_functions_and_their_arguments(x, weight):
    def network(x, weight):
        return leaky_relu(prelu(x, weight, dim=-2), 0.3, inplace=True)

    graph = torch.fx.symbolic_trace(network)
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert [(node.target, node.kwargs) for node in calls] == [
        (prelu, {"dim": -2}),
        (leaky_relu, {"negative_slope": 0.3, "inplace": True}),
    ]
    torch.testing.assert_close(graph(x, weight), network(x, weight))


def test_compiling_leaky_relu_in_place(x):
    compiled = torch.compile(
        lambda x: leaky_relu(x * 1, 0.2, inplace=True), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(x), torch.nn.functional.leaky_relu(x, 0.2))


def test_threads_at_once(x, weight):
    expected = prelu(x, weight)
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: prelu(x, weight), range(40)):
            assert torch.equal(y, expected)


class Annotated(torch.Tensor):
    """As data pipelines have them: a class that adds to torch functions, and to no operator."""

    seen: typing.ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("function", [prelu, torch.prelu], ids=["prelu", "enabled"])
def test_the_kernels_serve_tensors_whose_class_only_adds_to_torch_functions(
    function, x, weight, launches
):
    slopes = weight.clone().as_subclass(Annotated).requires_grad_()
    annotated = x.clone().as_subclass(Annotated).requires_grad_()
    Annotated.seen.clear()
    with enabled(x.device.type) if function is torch.prelu else contextlib.nullcontext():
        y = function(annotated, slopes)
        given = torch.autograd.grad(y.sum(), (annotated, slopes))
    assert type(y) is Annotated
    assert Annotated.seen == [function, torch.Tensor.sum, torch.autograd.grad]
    assert [name.split("_")[1] for name in launches[:2]] == ["forward", "backward"]
    expected = backward(prelu, x, weight, torch.ones_like(x))
    for ours, plain in zip((y, *given), expected, strict=True):
        assert torch.equal(ours.detach().as_subclass(torch.Tensor), plain)


class Strict(torch.Tensor):
    """A class that knows few functions, as those of data pipelines may."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if "zerotensor" in getattr(function, "__name__", ""):
            raise NotImplementedError(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_gradients_class_sees_none_of_the_questions_of_the_route(x, weight):
    x, weight = x.requires_grad_(), weight.requires_grad_()
    expected = torch.autograd.grad(prelu(x, weight), (x, weight), torch.ones_like(x))
    grad_y = torch.ones_like(x).as_subclass(Strict)
    given = torch.autograd.grad(prelu(x, weight), (x, weight), grad_y)
    for actual, exact in zip(given, expected, strict=True):
        torch.testing.assert_close(actual.as_subclass(torch.Tensor), exact)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.functionalize])
@pytest.mark.parametrize("trains", [False, True])
def test_a_tensor_that_has_left_a_transform_is_pytorchs(transform, trains, weight, x, no_launch):
    left = []

    def function(inside):
        left.append(inside * 2)
        return inside.sum()

    transform(function)(x)
    with torch.set_grad_enabled(trains):
        y = prelu(left[0], weight.requires_grad_())
        expected = torch.prelu(left[0], weight)
        assert torch.equal(y, expected)
        assert torch.equal(leaky_relu(left[0]), torch.nn.functional.leaky_relu(left[0]))
        if trains:
            for result in (y, expected):
                result.sum().backward()
