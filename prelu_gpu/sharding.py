"""How the operators act on the shards of DTensors, and which tensors they see so.

Imported where such a tensor has arrived: without one, torch.distributed.tensor is slow to import.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

from . import ops
from .backend import PLAIN_TYPES

Sharding = tuple[list[Any], list[Any]]
"""Placements of results, and of arguments, that one rank computes without the others."""

UNWRAPPED = (frozenset((DTensor,)), PLAIN_TYPES | {AsyncCollectiveTensor})
"""Types of tensors that go together and that come to our operators as the plain ones inside: shards
of DTensors, and what a collective, as that behind a RowwiseParallel layer, is still fetching."""


def _placements(
    x: Any, weight: Any, channel_dim: int | None
) -> Iterator[tuple[Placement, Placement, Placement]]:
    """Placements of the input, the slope and the slope's gradient."""
    yield Replicate(), Replicate(), Replicate()
    channels = None if channel_dim is None or weight.shape.numel() == 1 else channel_dim % x.ndim
    for d in range(x.ndim):
        if d == channels:
            yield Shard(d), Shard(0), Shard(0)
        else:
            yield Shard(d), Replicate(), Partial()


@register_sharding(ops.prelu_forward)
def _prelu(x: Any, weight: Any, channel_dim: int | None) -> list[Sharding]:
    return [([x_], [x_, w, None]) for x_, w, _ in _placements(x, weight, channel_dim)]


@register_sharding(ops.prelu_backward)
def _prelu_backward(
    grad_y: Any, x: Any, weight: Any, channel_dim: int | None, needs: list[bool]
) -> list[Sharding]:
    return [
        ([x_, grad_w], [x_, x_, w, None, None])
        for x_, w, grad_w in _placements(x, weight, channel_dim)
    ]


@register_sharding(ops.leaky_relu_forward)
def _leaky_relu(x: Any, negative_slope: float) -> list[Sharding]:
    return [([p], [p, None]) for p in (Replicate(), *map(Shard, range(x.ndim)))]


@register_sharding(ops.leaky_relu_backward)
def _leaky_relu_backward(grad_y: Any, saved: Any, negative_slope: float) -> list[Sharding]:
    return [([p], [p, p, None]) for p in (Replicate(), *map(Shard, range(saved.ndim)))]
