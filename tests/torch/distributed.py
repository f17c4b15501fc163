"""What only several processes show: test_distributed.py runs this program in two of them, once.

Every check runs in both, on the CPU, and compares with one process; what came of it is written to
`FOLDER/RANK.json` by the check's name: an empty text, or a traceback.
"""

import contextlib
import copy
import functools
import itertools
import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import (
    assert_right,
    assert_same,
    backward,
    channel_dim,
    integers,
)
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import prelu_gpu
from prelu_gpu import composed, leaky_relu, prelu, run

WORLD = 2
TIMEOUT = timedelta(seconds=15)

CHECKS = {}
"""By name; a check with parameters once for each combination of them."""
LAUNCHED = []
"""Names of the kernels that a check launched."""


def check(**parameters):
    """Makes a check of a function, for every combination of the values of its parameters."""

    def add(function):
        for values in itertools.product(*parameters.values()):
            arguments = dict(zip(parameters, values, strict=True))
            shown = ", ".join(map(str, values))
            name = f"{function.__name__}({shown})" if shown else function.__name__
            CHECKS[name] = functools.partial(function, **arguments)
        return function

    return add


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mesh(*shape):
    return init_device_mesh("cpu", shape or (WORLD,))


def distribute(tensor, placements, on=None):
    """A leaf, whole or in shards or, where Partial, as twice itself and minus itself."""
    on = on or mesh()
    if placements == [Partial()]:
        return DTensor.from_local(tensor * (2, -1)[dist.get_rank()], on, placements)
    return distribute_tensor(tensor, on, placements)


def whole(tensor):
    """In every process; dense, which PyTorch 2.11 does not make it of uneven shards."""
    return tensor.full_tensor().detach().contiguous() if isinstance(tensor, DTensor) else tensor


def assert_as_one_process(x, weight, *, dim=1):
    """PReLU of DTensors against PyTorch's of their whole; gives output and slope gradient."""
    x_whole, weight_whole = whole(x), whole(weight)
    grad_y = randn(*x.shape, seed=2)
    along = channel_dim(x, weight, dim) if weight.dim() <= 1 else None
    expected, grad_x, _ = backward(composed.prelu_forward, x_whole, weight_whole, grad_y, along)
    LAUNCHED.clear()
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = prelu(x, weight, dim=dim)
    y.backward(distribute_tensor(grad_y, x.device_mesh, y.placements))
    assert LAUNCHED
    assert_same(whole(y), expected)
    assert_same(whole(x.grad), grad_x)
    assert_near_exact(weight.grad, x_whole, weight_whole, grad_y, dim)
    return y, weight.grad


def assert_near_exact(grad_weight, x, weight, grad_y, dim=1):
    """The slope gradient in float64, but for the rounding that its order of sums explains."""
    assert_right(grad_y, x, weight, dim, grad_weight=whole(grad_weight))


@check(dim=[0, 1, 2], channels=[7, 1])
def shards_along_a_dimension_without_communication(dim, channels):
    """Of sizes that two processes do not divide."""
    x = distribute(randn(5, 7, 3), [Shard(dim)])
    along = dim == 1 and channels > 1
    weight = distribute(randn(channels, seed=1), [Shard(0) if along else Replicate()])
    with CommDebugMode() as communication:
        y = prelu(x.requires_grad_(), weight.requires_grad_())
        y.backward(y)
    assert communication.get_total_counts() == 0
    assert y.placements == x.grad.placements == (Shard(dim),)
    assert weight.grad.placements == (Shard(0) if along else Partial(),)


@check(
    placed=[Shard(0), Shard(1), Replicate(), Partial()],
    slopes=[
        ((), Replicate()),
        ((1,), Replicate()),
        ((1,), Shard(0)),
        ((7,), Replicate()),
        ((7,), Shard(0)),
    ],
)
def any_placement(placed, slopes):
    shape, weight_placed = slopes
    weight = distribute(randn(*shape, seed=1), [weight_placed])
    assert_as_one_process(distribute(randn(5, 7, 3), [placed]), weight)


@check()
def a_batch_smaller_than_the_mesh():
    x, weight = distribute(randn(1, 7), [Shard(0)]), distribute(randn(7, seed=1), [Replicate()])
    assert_as_one_process(x, weight)


@check(dim=[0, -1])
def channels_along_another_dimension(dim):
    x, weight = randn(5, 7, 3), randn(5 if dim == 0 else 3, seed=1)
    y, grad = assert_as_one_process(
        distribute(x, [Shard(dim % 3)]), distribute(weight, [Shard(0)]), dim=dim
    )
    assert (y.placements, grad.placements) == ((Shard(dim % 3),), (Shard(0),))
    y, grad = assert_as_one_process(
        distribute(x, [Shard(1)]), distribute(weight, [Replicate()]), dim=dim
    )
    assert (y.placements, grad.placements) == ((Shard(1),), (Partial(),))


@check(shape=[(1, WORLD), (WORLD, 1)])
def data_and_tensor_parallel(shape):
    on = mesh(*shape)
    x = distribute(randn(5, 7, 3), [Shard(0), Shard(1)], on)
    weight = distribute(randn(7, seed=1), [Replicate(), Shard(0)], on)
    y, grad = assert_as_one_process(x, weight)
    assert y.placements == (Shard(0), Shard(1))
    assert grad.placements == (Partial(), Shard(0))


@check(placed=[Shard(0), Shard(1)])
def only_the_gradients_that_are_needed(placed):
    x = distribute(randn(4, 6), [placed])
    weight = distribute(randn(6, seed=1), [Replicate() if placed == Shard(0) else Shard(0)])
    wholes = whole(x), whole(weight)
    grad_y = randn(4, 6, seed=2)
    y_grad = distribute(grad_y, [placed])

    trained = x.detach().requires_grad_()
    prelu(trained, weight).backward(y_grad)
    assert LAUNCHED == ["column_forward", "column_backward"], "no slope gradient is summed"
    assert weight.grad is None
    assert_same(whole(trained.grad), backward(prelu, *wholes, grad_y)[1])
    weight.requires_grad_()
    prelu(x, weight).backward(y_grad)
    assert x.grad is None
    assert_near_exact(weight.grad, *wholes, grad_y)
    with torch.no_grad():
        assert not prelu(x, weight).requires_grad


@check(placed=[Shard(0), Shard(1), Shard(2)], shape=[(1, 4, 1), (1, 1, 2)])
def slopes_of_the_inputs_rank(placed, shape):
    weight = distribute(randn(*shape, seed=1), [Replicate()])
    assert_as_one_process(distribute(randn(5, 4, 2), [placed]), weight)


@check(placed=[Shard(0), Shard(1), Shard(2)], shape=[(6, 4, 3), (6, 5, 3)])
def slopes_that_vary_over_several_dimensions(placed, shape):
    """Where PyTorch cannot merge sharded dimensions, it gathers them or says what to do."""
    x, weight = distribute(randn(*shape), [placed]), distribute(randn(1, *shape[1:]), [Replicate()])
    if placed == Shard(0) or (placed, shape) == (Shard(1), (6, 4, 3)):
        y, _ = assert_as_one_process(x, weight)
        assert y.placements == (placed,)
        return
    try:
        assert_as_one_process(x, weight)
    except RuntimeError as error:
        if "redistribut" not in str(error):
            raise


@check()
def keras_layer():
    layer = prelu_gpu.SharedAxesPReLU((4, 3), shared_axes=[2])
    x = randn(5, 4, 3)
    expected = layer(x)
    distribute_module(layer, mesh())
    y = layer(distribute(x, [Shard(0)]))
    y.sum().backward()
    assert_same(whole(y), expected.detach())
    assert layer.weight.grad.placements == (Partial(),)


@check(placed=[Shard(0), Shard(1), Replicate(), Partial()], inplace=[False, True])
def leaky_relus(placed, inplace):
    x_whole = randn(5, 7)
    x = distribute(x_whole, [placed]).requires_grad_()
    grad_y = randn(5, 7, seed=2)
    if inplace and placed == Partial():
        with torch.no_grad(), pytest.raises(RuntimeError, match="in-place"):
            leaky_relu(x, 0.2, inplace=True)
        return
    y = leaky_relu(x * 1 if inplace else x, 0.2, inplace=inplace)
    y.backward(distribute_tensor(grad_y, mesh(), y.placements))
    assert_same(whole(y), F.leaky_relu(x_whole, 0.2))
    assert_same(whole(x.grad), torch.where(x_whole > 0, grad_y, 0.2 * grad_y))
    assert bool(LAUNCHED) != inplace, "in place, PyTorch's operator"


@check(dtype=[torch.bfloat16, torch.float16])
def half_precision_beside_float32_slopes(dtype):
    x, weight = randn(4, 6).to(dtype), randn(6, seed=1)
    expected = prelu(x, weight)
    y = prelu(distribute(x, [Shard(0)]), distribute(weight, [Replicate()]))
    assert_same(whole(y), expected)
    with torch.autocast("cpu", dtype):
        y = prelu(distribute(x.float(), [Shard(1)]), distribute(weight, [Shard(0)]))
    assert_same(whole(y), expected)
    assert LAUNCHED


@check()
def plain_tensors_beside_dtensors_are_pytorchs_error():
    x, weight = randn(4, 6), randn(6, seed=1)
    for mixed in (
        (distribute(x, [Shard(0)]), weight),
        (x, distribute(weight, [Replicate()])),
    ):
        with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor") as expected:
            torch.prelu(*mixed)
        with pytest.raises(RuntimeError) as raised:
            prelu(*mixed)
        assert str(raised.value) == str(expected.value)
    assert not LAUNCHED


@check()
def arguments_are_checked_as_a_whole():
    x, weight = distribute(randn(4, 6), [Shard(1)]), distribute(randn(3), [Replicate()])
    with pytest.raises(RuntimeError, match="parameter numbers = 3 and channel size = 6"):
        prelu(x, weight)
    assert not LAUNCHED


@check()
def second_derivatives_are_pytorchs_error():
    x = distribute(randn(4, 6), [Shard(0)]).requires_grad_()
    y = prelu(x, distribute(randn(6), [Replicate()]))
    with pytest.raises(NotImplementedError, match="not have a sharding strategy"):
        torch.autograd.grad(y, x, y, create_graph=True)


@check()
def pytorchs_own_prelu_is_left_as_it_is():
    """Its backward has no sharding; a user of this package beside it sees nothing change."""
    x = distribute(randn(4, 6), [Shard(0)]).requires_grad_()
    weight = distribute(randn(6), [Replicate()])
    prelu(x, weight)
    y = torch.prelu(x, weight)
    with pytest.raises(NotImplementedError, match="not have a sharding strategy"):
        torch.autograd.grad(y, x, y)


class Branches(nn.Module):
    """Slopes for each channel, one slope, and a branch that is not always used.

    Of small whole numbers, and quarters: sums are exact in any order, results equal bit for bit.
    """

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.channels = nn.PReLU(8)
        self.second = nn.Linear(8, 4)
        self.shared = nn.PReLU()
        self.branch = nn.PReLU(4)
        for seed, parameter in enumerate(self.parameters()):
            whole = integers(parameter.shape, torch.float32, "cpu", seed, high=3)
            parameter.data = whole / 4 if parameter.dim() == 1 else whole

    def forward(self, x, branch=True):
        y = self.shared(self.second(self.channels(self.first(x))))
        return y + self.branch(y) if branch else y


BATCH = integers((8, 6), torch.float32, "cpu", seed=20)
GRAD_Y = integers((8, 4), torch.float32, "cpu", seed=21)


def half(batch):
    return batch.chunk(WORLD)[dist.get_rank()]


def gradients(model):
    """By name, whole, also what is not trained."""
    return {
        name.removeprefix("module."): None if p.grad is None else whole(p.grad)
        for name, p in model.named_parameters()
    }


def train_whole(model, *args, times=1):
    """One process's output, and gradients as data parallel ones: means over the processes."""
    for _ in range(times):
        y = model(BATCH, *args)
        y.backward(GRAD_Y / WORLD)
    return y.detach(), gradients(model)


def assert_same_training(model, expected, *args):
    """One step of a data parallel model against one process's output and gradients."""
    LAUNCHED.clear()
    y = model(half(BATCH), *args)
    y.backward(half(GRAD_Y).to(y.dtype))
    assert LAUNCHED
    assert_same(y.detach(), half(expected[0]))
    assert_same_gradients(gradients(model), expected[1])


def assert_same_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient is None:
            assert actual[name] is None, name
        else:
            assert_same(actual[name], gradient)


@check(
    option=[None, "find_unused_parameters", "static_graph", "gradient_as_bucket_view"],
    frozen=["nothing", "channels"],
)
def data_parallel(option, frozen):
    model = Branches()
    if frozen != "nothing":
        model.get_submodule(frozen).weight.requires_grad_(False)
    used = option != "find_unused_parameters"
    expected = train_whole(copy.deepcopy(model), used)
    options = {option: True} if option else {}
    parallel = DistributedDataParallel(prelu_gpu.accelerate(model), **options)
    for _ in range(2):  # static_graph learns from the first step
        parallel.zero_grad()
        assert_same_training(parallel, expected, used)


@check()
def data_parallel_accumulates_without_synchronising():
    model = Branches()
    expected = train_whole(copy.deepcopy(model), times=2)
    parallel = DistributedDataParallel(prelu_gpu.accelerate(model))
    with parallel.no_sync():
        parallel(half(BATCH)).backward(half(GRAD_Y))
    assert_same_training(parallel, expected)


@check()
def data_parallel_with_gradients_compressed_to_bfloat16():
    model = Branches()
    halves = []
    for x, grad_y in zip(BATCH.chunk(WORLD), GRAD_Y.chunk(WORLD), strict=True):
        alone = copy.deepcopy(model)
        alone(x).backward(grad_y)
        halves.append(gradients(alone))
    expected = {
        name: sum((each[name].bfloat16() / WORLD) for each in halves).float() for name in halves[0]
    }
    parallel = DistributedDataParallel(prelu_gpu.accelerate(model))
    # PyTorch refuses the hook itself without NCCL, by its name.
    parallel.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))
    assert_same_training(parallel, (model(BATCH).detach(), expected))


def shard_fully(model, units, **options):
    for name in units:
        fully_shard(model.get_submodule(name), **options)
    return fully_shard(model, **options)


UNITS = {
    "whole": [],
    "slopes alone": ["channels", "shared", "branch"],
    "several layers": ["first", "channels", "second"],
}


@check(units=list(UNITS), reshard=[True, False])
def fully_sharded(units, reshard):
    model = Branches()
    expected = train_whole(copy.deepcopy(model))
    sharded = shard_fully(prelu_gpu.accelerate(model), UNITS[units], reshard_after_forward=reshard)
    assert_same_training(sharded, expected)


@check(units=["whole", "slopes alone"])
def fully_sharded_in_mixed_precision(units):
    """In bfloat16, and its gradients, each rounded once, summed in float32."""
    model = prelu_gpu.accelerate(Branches())
    outputs, halves = [], []
    for x, grad_y in zip(BATCH.chunk(WORLD), GRAD_Y.chunk(WORLD), strict=True):
        alone = copy.deepcopy(model).bfloat16()
        y = alone(x.bfloat16())
        y.backward(grad_y.bfloat16())
        outputs.append(y.detach())
        halves.append(gradients(alone))
    expected = {name: sum(each[name].float() for each in halves) / WORLD for name in halves[0]}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    sharded = shard_fully(model, UNITS[units], mp_policy=policy)
    assert_same_training(sharded, (torch.cat(outputs), expected))


@check()
def fully_sharded_with_the_older_interface():
    model = Branches()
    expected = train_whole(copy.deepcopy(model))
    sharded = FullyShardedDataParallel(
        prelu_gpu.accelerate(model), use_orig_params=True, device_id=torch.device("cpu")
    )
    y = sharded(half(BATCH))
    y.backward(half(GRAD_Y))
    assert LAUNCHED
    assert_same(y.detach(), half(expected[0]))
    with FullyShardedDataParallel.summon_full_params(sharded, with_grads=True):
        actual = gradients(sharded)
    actual = {name.removeprefix("_fsdp_wrapped_module."): grad for name, grad in actual.items()}
    assert_same_gradients(actual, expected[1])


class Keras(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Linear(6, 4, bias=False),
            prelu_gpu.SharedAxesPReLU((4,), init=0.5),
            prelu_gpu.PReLU(4, init=2.0),
        )

    @classmethod
    def from_meta(cls):
        with torch.device("meta"):
            return cls()


@check(how=["fully_shard", "the older interface"])
def slopes_from_the_meta_device(how):
    """As large models are made: sharded, given memory, then filled by `reset_parameters`."""

    def reset(module):
        module.to_empty(device="cpu", recurse=False)
        for parameter in module.parameters(recurse=False):
            nn.init.constant_(parameter, 1e3)  # as memory that was another's
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if isinstance(module, nn.Linear):
            nn.init.ones_(module.weight)

    x = half(BATCH)
    if how == "fully_shard":
        model = shard_fully(Keras.from_meta(), ["1"])
        for module in model.modules():
            reset(module)
    else:
        model = FullyShardedDataParallel(
            Keras.from_meta(),
            param_init_fn=reset,
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
    hidden = x.sum(1, keepdim=True).expand(-1, 4)
    expected = torch.where(hidden > 0, hidden, hidden * 0.5 * 2.0)
    assert (hidden < 0).any()
    assert_same(model(x).detach(), expected)


def parallelise(model, on=None):
    """Tensor parallel: half of the channels, and their slopes, in each process."""

    on = on or mesh()

    def shard_slopes(name, module, on):
        module.weight = nn.Parameter(distribute_tensor(module.weight, on, [Shard(0)]))

    plan = {"first": ColwiseParallel(use_local_output=False), "second": RowwiseParallel()}
    parallelize_module(model, on, plan)
    distribute_module(model.channels, on, shard_slopes)
    return model


@check()
def tensor_parallel():
    model = Branches()
    expected = copy.deepcopy(model)
    expected(BATCH).backward(GRAD_Y)
    parallel = parallelise(prelu_gpu.accelerate(model))
    collected = []
    parallel.shared.register_forward_pre_hook(lambda module, args: collected.extend(args))
    y = parallel(BATCH)
    y.backward(GRAD_Y)
    assert type(collected[0]) is AsyncCollectiveTensor
    passes = [name for name in LAUNCHED if name != "sum_partials"]
    assert passes == [
        *("column_forward", "plane_forward", "column_forward"),
        *("column_backward", "plane_backward", "column_backward"),
    ]
    assert_same(whole(y.detach()), expected(BATCH).detach())
    assert_same_gradients(gradients(parallel), gradients(expected))


@check(shape=[(1, WORLD), (WORLD, 1)])
def fully_sharded_tensor_parallel(shape):
    model = Branches()
    expected = copy.deepcopy(model)
    expected(BATCH).backward(GRAD_Y / shape[0])
    on = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    parallel = parallelise(prelu_gpu.accelerate(model), on["tensor"])
    sharded = shard_fully(parallel, ["channels"], mesh=on["data"])
    part = on.get_local_rank("data")
    y = sharded(BATCH.chunk(shape[0])[part])
    y.backward(GRAD_Y.chunk(shape[0])[part])
    assert LAUNCHED
    assert_same(y.detach(), expected(BATCH).detach().chunk(shape[0])[part])
    assert_same_gradients(gradients(sharded), gradients(expected))


@check(how=["fully sharded", "tensor parallel"])
def checkpoints_of_distributed_models(how):
    """To torch.nn's model in one process, and back."""
    original = Branches()
    states = get_model_state_dict(
        (shard_fully if how == "fully sharded" else lambda model, _: parallelise(model))(
            prelu_gpu.accelerate(copy.deepcopy(original)), ["channels"]
        ),
        options=StateDictOptions(full_state_dict=True),
    )
    assert states.keys() == original.state_dict().keys()
    plain = Branches()
    for parameter in plain.parameters():
        nn.init.zeros_(parameter)
    plain.load_state_dict(states)
    expected = train_whole(copy.deepcopy(original))
    assert_same_gradients(train_whole(plain)[1], expected[1])

    blank = Branches()
    for parameter in blank.parameters():
        nn.init.zeros_(parameter)
    sharded = shard_fully(prelu_gpu.accelerate(blank), ["channels"])
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(sharded, original.state_dict(), options=options)
    assert_same_training(sharded, expected)


def main(rank, folder):
    torch.set_num_threads(1)

    def counted(call, values):
        LAUNCHED.append(call.kernel.__name__)
        run.execute(call, values)

    with run.intercepting(counted):
        check_all(rank, folder)


def check_all(rank, folder):
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=TIMEOUT)
    results = {}
    for name, function in CHECKS.items():
        LAUNCHED.clear()
        torch.manual_seed(0)
        try:
            function()
            results[name] = ""
        except (Exception, pytest.fail.Exception):
            results[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(results))
        # A process that failed waits for one that did not; its collective ends by the timeout.
        store.set(f"{name}/{rank}", "done")
        store.wait([f"{name}/{other}" for other in range(WORLD)], 3 * TIMEOUT)
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
