"""How the operators act on the shards of DTensors, and which tensors they see so.

Imported where such a tensor has arrived: without one, torch.distributed.tensor is slow to import.
"""

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

from . import ops
from .backend import PLAIN_TYPES

UNWRAPPED: tuple[frozenset[type[Tensor]], ...] = (
    frozenset((DTensor,)),
    PLAIN_TYPES | {AsyncCollectiveTensor},
)
"""Types of tensors that go together and that come to our operators as the plain ones inside: shards
of DTensors, and what a collective, as that behind a RowwiseParallel layer, is still fetching."""

Sharding = tuple[list[Placement | None], list[Placement | None]]
"""Placements of results and of arguments with which each rank computes without the others."""


def _placements(
    x: Any, weight: Any, channel_dim: int | None
) -> Iterator[tuple[Placement, Placement, Placement]]:
    """Placements of the input, the slopes and the slopes' gradient that go together."""
    yield Replicate(), Replicate(), Replicate()
    channels = None if channel_dim is None or math.prod(weight.shape) == 1 else channel_dim % x.ndim
    for d in range(x.ndim):
        if d == channels:
            yield Shard(d), Shard(0), Shard(0)
        else:
            yield Shard(d), Replicate(), Partial()


def _prelu(x: Any, weight: Any, channel_dim: int | None) -> list[Sharding]:
    return [([x_], [x_, w, None]) for x_, w, _ in _placements(x, weight, channel_dim)]


def _prelu_backward(
    grad_y: Any, x: Any, weight: Any, channel_dim: int | None, needs: list[bool]
) -> list[Sharding]:
    needs_x, needs_weight = needs
    return [
        ([x_ if needs_x else None, grad_w if needs_weight else None], [x_, x_, w, None, None])
        for x_, w, grad_w in _placements(x, weight, channel_dim)
    ]


def _leaky_relu(x: Any, negative_slope: float) -> list[Sharding]:
    return [([p], [p, None]) for p in (Replicate(), *map(Shard, range(x.ndim)))]


def _leaky_relu_backward(grad_y: Any, saved: Any, negative_slope: float) -> list[Sharding]:
    return [([p], [p, p, None]) for p in (Replicate(), *map(Shard, range(saved.ndim)))]


for _operator, _shardings in (
    (ops.prelu_forward, _prelu),
    (ops.prelu_backward, _prelu_backward),
    (ops.leaky_relu_forward, _leaky_relu),
    (ops.leaky_relu_backward, _leaky_relu_backward),
):
    register_sharding(_operator)(_shardings)
