"""The kernels as operators of the dispatcher, and who sees them there."""

import pytest
import torch
from support import REDUCTIONS, assert_same, backward, eager_backward, id_of, randn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from prelu_gpu import launch, leaky_relu, ops, prelu
from prelu_gpu.rules import Kind

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.transpose(0, 3),
    "sliced": lambda x: x[:, ::2],
    "crop": lambda x: x[..., 1:],
    "expanded": lambda x: x[:, :, :1].expand_as(x),
}


@pytest.fixture(autouse=True)
def unguarded_allocations(monkeypatch, guarded_allocations):
    """What allocates is PyTorch: opcheck compares storages, and modes see the allocations."""
    monkeypatch.setattr(launch, "torch", torch)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", [False, True])
def test_opcheck_of_prelu(shared, layout, device):
    """With static and, in its last part, dynamic shapes."""
    x = LAYOUTS[layout](randn((4, 6, 3, 5), torch.float32, device))
    weight = randn((1 if shared else x.shape[1],), torch.float32, device, seed=1)
    channel_dim = None if shared else 1
    opcheck(ops.prelu_forward, (x, weight, channel_dim))
    for needs in ([True, True], [True, False], [False, True]):
        grad_y = randn(x.shape, torch.float32, device, seed=2)
        opcheck(ops.prelu_backward, (grad_y, x, weight, channel_dim, needs))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_of_leaky_relu(layout, device):
    x = LAYOUTS[layout](randn((4, 6, 3, 5), torch.float32, device))
    opcheck(ops.leaky_relu_forward, (x, 0.1))
    opcheck(ops.leaky_relu_backward, (randn(x.shape, torch.float32, device, seed=1), x, 0.1))


def test_opcheck_of_half_precision_beside_a_float32_slope(device):
    x, weight = randn((2, 3), torch.float16, device), torch.ones(3, device=device)
    opcheck(ops.prelu_forward, (x, weight, 1))
    opcheck(ops.prelu_backward, (x, x, weight, 1, [True, True]))


def test_operators_where_there_are_no_kernels(no_kernels, no_launch):
    x, weight, grad_y = torch.randn(2, 3, 4), torch.rand(3), torch.randn(2, 3, 4)
    given = (ops.prelu_forward(x, weight, 1),)
    given += ops.prelu_backward(grad_y, x, weight, 1, [True, True])
    for value, expected in zip(given, eager_backward(x, weight, grad_y), strict=True):
        assert torch.equal(value, expected)
    y = ops.leaky_relu_forward(x, 0.1)
    assert torch.equal(y, torch.nn.functional.leaky_relu(x, 0.1))
    grad_x = ops.leaky_relu_backward(grad_y, x, 0.1)
    assert torch.equal(grad_x, torch.where(x > 0, grad_y, 0.1 * grad_y))


X, W = torch.zeros(2, 3, 4), torch.zeros(3)


@pytest.mark.parametrize(
    ("x", "weight", "channel_dim", "words"),
    [
        (X, W, None, "got 3 slopes of shape .3,. for channel_dim=None. It takes one slope, or one"),
        (X, torch.zeros(1, 3, 1), 1, "got 3 slopes of shape .1, 3, 1. for channel_dim=1"),
        (X, W, 0, "Found parameter numbers = 3 and channel size = 2"),
        (X, W, 7, "Dimension out of range"),
        (X, W.to("meta"), 1, "on the same device"),
        (X.int(), torch.zeros(1), None, "not implemented for 'int32'"),
        (X.double(), W, 1, "Type promoting not supported"),
        (X.to_sparse(), W, 1, "expected a dense input"),
    ],
)
def test_operators_refuse_what_prelu_refuses(x, weight, channel_dim, words):
    with pytest.raises((RuntimeError, IndexError), match=words):
        ops.prelu_forward(x, weight, channel_dim)
    with pytest.raises((RuntimeError, IndexError), match=words):
        ops.prelu_backward(x, x, weight, channel_dim, [True, True])


@pytest.mark.parametrize(
    "grad_y", [torch.zeros(2, 3, 1), X.double(), X.to("meta"), torch.zeros(2, 3)], ids=str
)
def test_operators_refuse_gradients_that_are_not_like_the_input(grad_y):
    with pytest.raises(RuntimeError, match=r"got grad_y of .* beside an input of .* same. Convert"):
        ops.prelu_backward(grad_y, X, W, 1, [True, True])
    with pytest.raises(RuntimeError, match=r"got grad_y of .* beside an input of .* same. Convert"):
        ops.leaky_relu_backward(grad_y, X, 0.1)


def test_leaky_operators_refuse_what_leaky_relu_refuses():
    for function in (ops.leaky_relu_forward, lambda x, s: ops.leaky_relu_backward(x, x, s)):
        with pytest.raises(RuntimeError, match="without overflow"):
            function(X, 1e39)
        with pytest.raises(RuntimeError, match="not implemented for 'int32'"):
            function(X.int(), 0.1)


def test_a_channel_dim_counted_from_the_back(device):
    x, weight = randn((2, 3, 4), torch.float32, device), randn((4,), torch.float32, device, seed=1)
    assert torch.equal(ops.prelu_forward(x, weight, -1), prelu(x, weight, dim=-1))
    given = ops.prelu_backward(x, x, weight, -1, [True, True])
    for value, expected in zip(given, backward(prelu, x, weight, x, dim=-1)[1:], strict=True):
        assert torch.equal(value, expected)


class Recorder(TorchDispatchMode):
    """Notes the operators, and the bytes of memory that they allocate."""

    def __init__(self):
        super().__init__()
        self.names, self.allocated, self.known = [], [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        self.known |= {storage(arg) for arg in args if isinstance(arg, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
                continue
            if storage(tensor) not in self.known:
                self.known.add(storage(tensor))
                self.allocated.append(tensor.untyped_storage().nbytes())
        return out


def storage(tensor):
    return tensor.untyped_storage()._cdata


def test_a_dispatch_mode_sees_our_operators_and_gets_the_kernels_results(device, launches):
    x, grad_y = (randn((4, 3, 5), torch.float16, device, seed) for seed in (0, 1))
    weight = randn((3,), torch.float32, device, seed=2)
    expected = backward(prelu, x, weight, grad_y)
    alone = len(launches)
    with Recorder() as recorder:
        given = backward(prelu, x, weight, grad_y)
        with torch.no_grad():
            prelu(x, weight)
    for value, reference in zip(given, expected, strict=True):
        assert_same(value, reference)
    ours = [name for name in recorder.names if name.startswith("prelu_gpu")]
    assert ours == ["prelu_gpu::prelu", "prelu_gpu::prelu_backward", "prelu_gpu::prelu"]
    assert len(launches) == 2 * alone + 1


def test_a_dispatch_mode_sees_leaky_relu(device, launches):
    x, grad_y = (randn((4, 3, 5), torch.float32, device, seed) for seed in (0, 1))
    leaf = x.clone().requires_grad_()
    with Recorder() as recorder:
        y = leaky_relu(leaf, 0.1)
        (grad_x,) = torch.autograd.grad(y, leaf, grad_y)
        leaky_relu(x, 0.1)
        leaky_relu(x, 0.1, inplace=True)
    assert_same(x, y.detach())
    assert torch.equal(grad_x, torch.where(leaf > 0, grad_y, 0.1 * grad_y))
    assert [name for name in recorder.names if "leaky" in name] == [
        *("prelu_gpu::leaky_relu", "prelu_gpu::leaky_relu_backward"),
        *("prelu_gpu::leaky_relu", "aten::leaky_relu_"),
    ]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        *(("contiguous", Kind.PLANE), ("contiguous", Kind.COLUMN), ("channels_last", Kind.COLUMN)),
        *(("sliced", Kind.PLANE), ("sliced", Kind.COLUMN)),
    ],
    ids=id_of,
)
def test_allocations(layout, reduction, kind, device, force):
    """Forward y; backward dx and at most 1 MiB."""
    force(kind, reduction)
    x = LAYOUTS[layout](randn((2, 8, 6, 40), torch.float32, device))
    grad_y = torch.empty_like(x).copy_(x)
    weight = randn((x.shape[1],), torch.float32, device, seed=1)
    size = x.numel() * x.element_size()
    if (kind, layout) == (Kind.COLUMN, "sliced"):
        size *= 2  # columns cannot have gaps between channels: the copy that the plan names
    launch.prelu_backward(grad_y, x, weight, 1, (True, True))  # counters stay allocated
    with Recorder() as recorder:
        launch.prelu_forward(x, weight, 1)
    assert sum(recorder.allocated) == size
    with Recorder() as recorder:
        launch.prelu_backward(grad_y, x, weight, 1, (True, True))
    assert sum(recorder.allocated) - size <= min(2**20, size)
    with Recorder() as recorder:
        launch.prelu_backward(grad_y, x, weight, 1, (True, False))
    assert sum(recorder.allocated) == size


def test_flop_counter(device):
    x = randn((4, 3), torch.float32, device).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        prelu(x @ torch.ones(3, 3, device=device), torch.ones(3, device=device)).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 4 * 3 * 3)


def test_selective_checkpointing_saves_or_recomputes_ours(device, launches):
    x, weight = randn((4, 3), torch.float32, device).requires_grad_(), torch.ones(3, device=device)
    grads = []
    for policy in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE):

        def policy_of(ctx, op, *args, policy=policy, **kwargs):
            return policy if op is ops.prelu_forward else CheckpointPolicy.MUST_RECOMPUTE

        launches.clear()
        y = checkpoint(
            lambda x: prelu(x.exp(), weight).square().sum(),
            x,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy_of),
        )
        grads.append(torch.autograd.grad(y, x)[0])
        forwards = sum("forward" in name for name in launches)
        assert forwards == (1 if policy is CheckpointPolicy.MUST_SAVE else 2)
    assert torch.equal(*grads)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_graph_made_by_make_fx_is_pytorchs(mode, device):
    x, weight = randn((4, 3), torch.float32, device), torch.ones(3, device=device)
    graph = make_fx(lambda x, w: prelu(x, w), tracing_mode=mode)(x, weight)
    assert not any("prelu_gpu" in str(node.target) for node in graph.graph.nodes)
    assert torch.equal(graph(2 * x, weight), prelu(2 * x, weight))


class Seen(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_mode_sees_the_same_at_the_first_call_and_at_later_ones(device):
    """Selective checkpointing recomputes by what it saw."""
    x = randn((2, 6, 4, 7), torch.float32, device)[:, :, ::2, 1:4]
    weight = randn((1, 6, 1, 1), torch.float32, device, seed=1)
    launch.plan_call.cache_clear()
    seen = []
    for _ in range(2):
        with Seen() as mode:
            prelu(x, weight)
        seen.append(mode.names)
    assert seen[0] == seen[1]
    assert "prelu_gpu.prelu.default" in seen[0]
