"""Public calls on tensors of every kind of memory: whatever the library may launch.

They are made on the CPU, on tensors that hold no values, as if it were a GPU, and every launch is
given to a function.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import prelu_gpu
from benchmarks.machine_code import GPUS
from prelu_gpu import (
    backend,
    batch_norm_prelu,
    instance_norm_prelu,
    kernel_threshold,
    leaky_relu,
    prelu,
)
from prelu_gpu.rules import Rules, gpu_rules, using_rules
from prelu_gpu.run import Call, Values, intercepting

PAIRS = (
    *((dtype, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
)
"""Dtypes of x and of the slopes."""

NEEDS = ((True, True), (True, False), (False, True))
"""Whether x and the slopes require grad."""

RULES: tuple[Callable[[Rules], Rules], ...] = (
    lambda row: row,
    # The slope gradient by a second launch, and by atomic sums; both is a rule's choice.
    lambda row: row._replace(finish=0),
    lambda row: row._replace(atomic=True),
    # As `benchmarks tune` may propose.
    lambda row: row._replace(column=row.column._replace(rows=1)),
)
"""The rule table's row, and what else may stand there."""

DENSE = (
    *((1,), (7,), (4096,), (5003,), (1, 1, 1), (64, 1, 5)),
    # Planes of one sample, of few tiles and of many, and off the vector grid.
    *((1, 16, 4096), (2, 3, 8192), (3, 2, 17408), (2, 3, 40001)),
    # Columns, few and many, with whole rows after folding and without.
    *((301, 90), (1, 512), (16, 4096), (40, 3), (4099, 16), (20, 512, 7, 7), (3, 5, 7, 7)),
)
SPECIAL = tuple(itertools.product((1, 3, 16), (1, 3, 16), (1, 3, 16, 8192, 8200, 40001)))
"""Sizes of 1, that 16 divides, and that it does not, in every place."""

CHANNELS_LAST = ((4, 64, 14, 14), (4, 3, 37, 37), (2, 90, 5, 5))
SLICED = (
    *((6, 16, 64, 64), (6, 16, 50, 43), (6, 16, 5, 7), (40, 6, 40003), (4, 6, 40001)),
    *((300, 128), (300, 90), (9, 3000)),
)
"""Shapes of which half of the channels is taken."""

CUT = (
    *(((40, 704), 513), ((6, 1, 7), 3), ((9, 3, 40016), 40001)),
    # Gaps of one vector, and columns of one.
    *(((4, 16, 8196), 8192), ((4, 16, 8200), 8192), ((4, 16, 8194), 8192), ((5, 18), 2)),
)
"""Shapes and what is kept of the last dimension."""


class Tensors(NamedTuple):
    """What a call is made of."""

    x: Tensor
    weight: Tensor
    grad_y: Tensor
    dim: int = 1


def tensors(
    pair: tuple[torch.dtype, torch.dtype],
    offsets: tuple[int, ...] = (0, 0, 0),
    dense: tuple[tuple[int, ...], ...] = DENSE,
) -> Iterator[Tensors]:
    """Tensors of every kind of memory, which hold no values.

    Args:
        pair: dtypes of x and of the slopes.
        offsets: elements by which x, the slopes and the gradient lie off the grid of 16 bytes.
        dense: shapes of dense tensors.
    """

    def maker(dtype: torch.dtype, offset: int) -> Callable[..., Tensor]:
        return lambda *shape: torch.empty(math.prod(shape) + offset, dtype=dtype)[offset:].view(
            shape
        )

    x, weight, grad_y = map(maker, (*pair, pair[0]), offsets)

    def gradients(shape: tuple[int, ...]) -> Iterator[Tensor]:
        """A dense one, and those that `sum` makes: one number, and one for each row."""
        yield grad_y(*shape)
        yield grad_y(*[1] * len(shape)).expand(shape)
        yield grad_y(*shape[:2], *[1] * (len(shape) - 2)).expand(shape)

    for shape in dense:
        for slopes, gradient in itertools.product({1, *shape[1:2]}, gradients(shape)):
            yield Tensors(x(*shape), weight(slopes), gradient)
        if len(shape) > 1:
            yield Tensors(x(*shape), weight(shape[-1]), grad_y(*shape), -1)
    for shape in CHANNELS_LAST:
        last = [make(*shape).to(memory_format=torch.channels_last) for make in (x, grad_y)]
        yield Tensors(last[0], weight(shape[1]), last[1])
        yield Tensors(last[0], weight(shape[1]), grad_y(*shape))
    halves = [(whole, (slice(None), slice(whole[1] // 2))) for whole in SLICED]
    for whole, part in (*halves, *((whole, (..., slice(kept))) for whole, kept in CUT)):
        part_x, part_grad_y = x(*whole)[part], grad_y(*whole)[part]
        shape = part_x.shape
        for slopes in {1, shape[1]}:
            for gradient in (part_grad_y, *gradients(shape)):
                yield Tensors(part_x, weight(slopes), gradient)
            yield Tensors(x(*shape), weight(slopes), part_grad_y)
    # What only a copy can read.
    yield Tensors(x(20, 12, 80)[..., ::2], weight(12), grad_y(20, 12, 40))


Function = Callable[[Tensor, nn.Parameter, int], Tensor]
"""Y of x, slopes and dim."""


def with_slopes(module: nn.Module, weight: nn.Parameter) -> nn.Module:
    """A module with other slopes."""
    module.weight = weight
    return module


def along(x: Tensor, weight: Tensor, dim: int) -> list[int]:
    """The shape of slopes that broadcast over x."""
    varying = dim % x.dim() if weight.numel() > 1 else None
    return [weight.numel() if d == varying else 1 for d in range(x.dim())]


def broadcast(x: Tensor, weight: nn.Parameter, dim: int) -> Tensor:
    """prelu with slopes of x's rank."""
    return prelu(x, weight.view(along(x, weight, dim)))


def shared_axes(x: Tensor, weight: nn.Parameter, dim: int) -> Tensor:
    """Keras's layer."""
    sizes = along(x, weight, dim)[1:]
    module = prelu_gpu.SharedAxesPReLU(sizes)
    slopes = nn.Parameter(weight.detach().view(sizes), weight.requires_grad)
    return with_slopes(module, slopes)(x)


Needs = tuple[bool, bool]


def step(function: Function, given: Tensors, needs: Needs) -> None:
    """A forward and a backward."""
    x, weight = given.x.detach().requires_grad_(needs[0]), nn.Parameter(given.weight, needs[1])
    y = function(x, weight, given.dim)
    if y.requires_grad:
        y.backward(given.grad_y)


def operators(given: Tensors, needs: Needs) -> None:
    """The library's operators."""
    x, weight, grad_y, dim = given
    channel_dim = None if weight.numel() == 1 else dim % x.dim()
    ops = torch.ops.prelu_gpu
    ops.prelu(x, weight, channel_dim)
    ops.prelu_backward(grad_y, x, weight, channel_dim, needs)
    ops.leaky_relu(x, 0.1)
    ops.leaky_relu_backward(grad_y, x, 0.1)


def normed(
    x: Tensor,
    slope: nn.Parameter,
    _: int,
    *,
    training: bool | None = True,
    bare: bool = False,
    frozen: bool = False,
    number: bool = False,
) -> Tensor:
    """A norm with PReLU.

    Args:
        x: the input.
        slope: the slopes.
        training: of a batch norm; None for an instance norm.
        bare: without parameters, running statistics and slopes: with a number for a slope.
        frozen: parameters and slopes need no gradient.
        number: a number for a slope.
    """
    channels = x.shape[1]
    weight, bias, mean, variance = (
        None if bare else torch.empty(channels, dtype=slope.dtype) for _ in range(4)
    )
    if weight is not None and bias is not None and not frozen:
        weight.requires_grad_(slope.requires_grad)
        bias.requires_grad_(slope.requires_grad)
    slopes = 0.1 if bare or number else slope.detach() if frozen else slope
    if training is None:
        return instance_norm_prelu(x, slopes, weight, bias)
    return batch_norm_prelu(x, slopes, mean, variance, weight, bias, training)


FUNCTIONS: dict[str, Function] = {
    "prelu": lambda x, weight, dim: prelu(x, weight, dim=dim),
    "prelu, slopes of x's rank": broadcast,
    "PReLU": lambda x, weight, dim: with_slopes(prelu_gpu.PReLU(dim=dim), weight)(x),
    "SharedAxesPReLU": shared_axes,
    "accelerate": lambda x, weight, _: with_slopes(prelu_gpu.accelerate(nn.PReLU()), weight)(x),
    "leaky_relu": lambda x, *_: leaky_relu(x, 0.1),
    "leaky_relu of -0.0": lambda x, *_: leaky_relu(x, -0.0),
    "leaky_relu in place": lambda x, *_: leaky_relu(x * 1, 0.1, inplace=True),
    "LeakyReLU": lambda x, *_: prelu_gpu.LeakyReLU(0.1)(x),
    "LeakyReLU in place": lambda x, *_: prelu_gpu.LeakyReLU(0.1, inplace=True)(x * 1),
}
NORMS: dict[str, Function] = {
    "batch_norm_prelu": normed,
    "batch_norm_prelu, bare": functools.partial(normed, bare=True),
    "batch_norm_prelu, evaluation": functools.partial(normed, training=False),
    "batch_norm_prelu, frozen": functools.partial(normed, training=False, frozen=True),
    "instance_norm_prelu": functools.partial(normed, training=None),
    "instance_norm_prelu, number": functools.partial(normed, training=None, number=True),
    "instance_norm_prelu, bare": functools.partial(normed, training=None, bare=True),
}
PATCHED: dict[str, Function] = {
    "enable, torch.prelu": lambda x, weight, _: torch.prelu(x, weight),
    "enable, torch.nn.PReLU": lambda x, weight, _: with_slopes(nn.PReLU(), weight)(x),
}
"""Functions of PyTorch that the library serves on demand."""

ENTRANCES: dict[str, Callable[[Tensors, Needs], None]] = {
    **{name: functools.partial(step, function) for name, function in (FUNCTIONS | NORMS).items()},
    **{
        name: functools.partial(prelu_gpu.enabled("cpu")(step), function)
        for name, function in PATCHED.items()
    },
    "torch.ops.prelu_gpu": operators,
}


def takes(entrance: str, given: Tensors) -> bool:
    """Whether an entrance takes such tensors."""
    if entrance in NORMS:
        sizes = (*given.x.shape[2:], 1 if "instance" in entrance else given.x.shape[0])
        return (
            given.x.dtype != torch.float64
            and given.dim == 1
            and given.x.dim() > 1
            and math.prod(sizes) > 1
        )
    if entrance in ("SharedAxesPReLU", "prelu, slopes of x's rank"):
        return given.x.dim() > 1
    if entrance == "accelerate":
        return given.dim == 1
    alike = given.dim == 1 and given.x.dtype == given.weight.dtype
    return alike or entrance not in PATCHED


@contextlib.contextmanager
def launches_go_to(
    function: Callable[[Call, Values], None],
    gpu: str = "sm_90",
    changed: Callable[[Rules], Rules] = RULES[0],
) -> Iterator[None]:
    """The library takes CPU tensors for those of a GPU, and a function takes the launches."""
    properties = GPUS[gpu]

    def table(device: torch.device, itemsize: int, backward: bool) -> Rules:
        warp_size = int(properties.target.warp_size)
        return changed(gpu_rules(properties.multiprocessors, itemsize, backward, warp_size))

    with (
        using_rules(table),
        intercepting(function),
        kernel_threshold(0),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(backend, "KERNEL_DEVICES", (*backend.KERNEL_DEVICES, "cpu"))
        yield


def call_all(
    function: Callable[[str, Call, Values], None],
    gpu: str,
    memories: Iterable[Tensors],
    entrances: Collection[str] = ENTRANCES.keys(),
) -> set[str]:
    """Calls every entrance with every tensor, and some also with all needs and rules.

    The function takes each launch, with the entrance that made it. Gives the entrances that
    launched something.
    """
    reached = set()

    def noted(entrance: str, call: Call, values: Values) -> None:
        reached.add(entrance)
        function(entrance, call, values)

    for number, given in enumerate(memories):
        for entrance in entrances:
            # Of the many kinds of memory a third shows all that norms' kernels may be.
            if not takes(entrance, given) or (entrance in NORMS and number % 3):
                continue
            kinds = [(RULES[0], NEEDS[0])]
            if entrance in ("prelu", "batch_norm_prelu"):
                # No rule has atomic sums of norms, or other rows.
                kinds = [*itertools.product(RULES if entrance == "prelu" else RULES[:2], NEEDS)]
            for changed, needs in kinds:
                with launches_go_to(functools.partial(noted, entrance), gpu, changed):
                    ENTRANCES[entrance](given, needs)
    return reached
