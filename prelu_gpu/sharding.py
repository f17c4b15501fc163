"""How the operators act on the shards of DTensors: importing this registers the rules.

It is imported where such a tensor has arrived, since torch.distributed.tensor is slow to import.
"""

import math
from collections.abc import Iterator
from typing import Any

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

from . import ops

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
