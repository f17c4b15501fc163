"""Norms with PReLU, drawn at random: shapes, layouts, dtypes and options of public calls."""

from dataclasses import dataclass

import pytest
import torch
from support import NORM_RESULTS, NormCall, norm_call

from prelu_gpu import batch_norm_prelu, instance_norm_prelu, launch_norm
from prelu_gpu.layout import Norm

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from test_property import DEVICE, Layout, Tiling, layouts, tiled, tilings

from prelu_gpu.rules import Kind

SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 33, 65)
MOST_ELEMENTS = (60, 60, 250, 250, 1000)
PAIRS = (
    *((dtype, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    *((dtype, torch.float32) for dtype in (torch.float16, torch.bfloat16)),
)
SLOPES = ("channels", "one", 0.0, 0.01, -0.3)


@dataclass(frozen=True)
class NormCase:
    """One call of a norm with PReLU and its backward."""

    x: Layout
    grad_y: Layout
    instances: bool
    training: bool
    affine: bool
    running: bool
    slope: str | float
    dtypes: tuple[torch.dtype, torch.dtype]
    needs: tuple[bool, bool, bool, bool]
    momentum: float
    eps: float
    seed: int
    tiling: Tiling | None

    def call(self):
        """The call on tensors that lie so."""
        slopes = {"channels": None, "one": 1}.get(self.slope, self.slope)
        call = norm_call(
            self.x.shape,
            self.dtypes[0],
            DEVICE,
            slopes,
            self.instances,
            self.training,
            self.affine,
            self.dtypes[1],
            seed=self.seed,
        )
        placed = {}
        for name, layout in (("x", self.x), ("grad_y", self.grad_y)):
            memory = torch.full((layout.memory,), torch.nan, dtype=self.dtypes[0], device=DEVICE)
            tensor = layout.of(memory)
            if layout.overlaps:
                memory.copy_(torch.linspace(-1, 1, layout.memory))
            else:
                tensor.copy_(getattr(call, name))
            placed[name] = tensor
        norm = Norm(self.training or self.instances, self.instances, self.eps)
        call = call._replace(**placed, norm=norm, momentum=self.momentum, needs=self.needs)
        if self.training and not self.running:
            call = call._replace(running_mean=None, running_var=None)
        return call


@st.composite
def norm_cases(draw):
    """At least four elements a channel, so that none are nearly equal."""
    left = draw(st.sampled_from(MOST_ELEMENTS))
    shape = []
    instances = draw(st.booleans())
    for _ in range(draw(st.integers(3 if instances else 2, 5))):
        shape.append(draw(st.sampled_from([size for size in SIZES if size <= left])))
        left //= shape[-1]
    shape = draw(st.permutations(shape))
    first = 2 if instances else 0
    if torch.Size([*shape[first:1], *shape[2:]]).numel() < 4:
        shape[-1 if len(shape) > 2 else 0] = 5
    shape = tuple(shape)
    x = draw(layouts(shape).filter(lambda layout: not layout.overlaps))
    rows = shape[0] * shape[1]
    kinds = (Kind.COLUMN, Kind.PLANE, Kind.ODD_PLANE, None) if rows <= 30 else (Kind.COLUMN,)
    return NormCase(
        x,
        draw(st.one_of(st.just(x), layouts(shape))),
        instances,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from(SLOPES)),
        draw(st.sampled_from(PAIRS)),
        draw(st.tuples(*[st.sampled_from((True, True, False))] * 4)),
        draw(st.sampled_from((0.1, 0.0, 1.0))),
        draw(st.sampled_from((1e-5, 1e-3))),
        draw(st.integers(0, 2**16)),
        draw(tilings(torch.Size(shape).numel(), kinds)),
    )


def by_public_function(call: NormCall):
    """The results of the public functions, by name."""
    x, slope, weight, bias = (
        t.detach().requires_grad_(need) if isinstance(t, torch.Tensor) else t
        for t, need in zip((call.x, call.slope, call.weight, call.bias), call.needs, strict=True)
    )
    running = [None if t is None else t.clone() for t in (call.running_mean, call.running_var)]
    if call.norm.instances:
        y = instance_norm_prelu(x, slope, weight, bias, call.norm.eps)
    else:
        options = call.norm.training, call.momentum, call.norm.eps
        y = batch_norm_prelu(x, slope, *running, weight, bias, *options)
    needed = [t for t, need in zip((x, slope, weight, bias), call.needed, strict=True) if need]
    grads = iter(torch.autograd.grad(y, needed, call.grad_y) if needed else ())
    grads = [next(grads) if need else None for need in call.needed]
    return dict(zip(NORM_RESULTS, (y.detach(), *grads, *running), strict=True))


@given(norm_cases())
@settings(max_examples=max(8, settings.default.max_examples // 60))
def test_norms_are_pytorchs_whatever_they_are_given(case):
    call = case.call()
    before = [t.clone() for t in (call.x, call.grad_y)]
    with tiled(case.tiling) as launches:
        results = by_public_function(call)
        assert launches
        call.check(results)
    for tensor, original in zip((call.x, call.grad_y), before, strict=True):
        assert torch.equal(tensor, original)
    launch_norm.torch.check()
    launch_norm.torch.buffers.clear()
