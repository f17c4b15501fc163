"""The plans of norms at real sizes: launched nowhere."""

import math

import pytest
import torch

from prelu_gpu.layout import SAMPLES_LIMIT, batch_layout, instance_layout
from prelu_gpu.plan_norm import make_finish_plan, make_norm_plan
from prelu_gpu.rules import Kind, gpu_rules

LAUNCHES = ("moments", "sums")
TABLES = {"moments": 4, "sums": 3}
"""Tables of partial sums that a launch leaves at most."""


def plan(shape, layout, itemsize, launch, instances=False):
    x = torch.empty(shape, device="meta").to(memory_format=layout)
    make = instance_layout if instances else batch_layout
    view = make(shape, x.stride()).view
    return make_norm_plan(view, itemsize, gpu_rules(132, itemsize, True), launch)


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_second_stage_does_not_grow_with_the_data(itemsize, launch):
    """Channels last with 64 channels: whole rows of tiles are summed before they are stored."""
    for n in (8, 32, 128, 512, 2**11):
        planned = plan((n, 64, 112, 112), torch.channels_last, itemsize, launch)
        assert planned.kind is Kind.COLUMN
        assert TABLES[launch] * planned.partial_sums <= 2**18


@pytest.mark.parametrize("launch", LAUNCHES)
def test_a_channel_of_many_terms_has_a_program_of_its_own(launch):
    planned = plan((128, 64, 112, 112), torch.channels_last, 2, launch)
    splits, channels, inner = planned.partials
    assert splits * inner > 512
    assert make_finish_plan(planned.partials, False).grid == (channels,) == (64,)


@pytest.mark.parametrize("terms", [1, 7, 100, 1023, 1024, 5000])
def test_channels_with_few_terms_share_programs(terms):
    planned = make_finish_plan((terms, 70, 1), False)
    block = planned.constants["CHANNEL_BLOCK"]
    assert planned.grid == (math.ceil(70 / block),)
    assert block * planned.constants["TERM_BLOCK"] <= 1024
    assert (block == 1) == (terms > 512)


def test_samples_beyond_a_grids_third_axis_are_contiguous_planes():
    shape = (SAMPLES_LIMIT + 1, 8, 2, 2)
    last = torch.empty(shape, device="meta").to(memory_format=torch.channels_last).stride()
    layout = instance_layout(shape, last)
    assert layout.view.samples == 1
    assert layout.view.copies == ("x",)
    assert instance_layout((SAMPLES_LIMIT, *shape[1:]), last).view.samples == SAMPLES_LIMIT
