"""Norms with PReLU beyond 2^31 elements: as test_large.py, whose words these tests use."""

import math

import numpy as np
import pytest
import torch

from prelu_gpu.launch_norm import _finish_gradients, _finish_moments, _walk
from prelu_gpu.rules import gpu_rules
from prelu_gpu.run import run
from ptx import driver
from ptx.driver import MULTIPROCESSORS
from ptx.test_large import FAR, in_strides, own_elements, some, tensor, touched

pytestmark = pytest.mark.emulated

NORM_CASES = {
    "plane": (torch.bfloat16, (700, 64, 224 * 224), None, False),
    "odd plane": (torch.float32, (900, 50, 223 * 225), None, False),
    "many channels": (torch.float32, (3, 70_000, 20_000), None, True),
    "column": (torch.bfloat16, (2**23 + 3, 512), None, False),
    "column of 3": (torch.float32, (2**30 + 1, 3), None, False),
    "column of 7 x 7": (torch.float32, (90_001, 512, 49), None, False),
    "samples of columns": (torch.bfloat16, (3000, 64, 12544), (64 * 12544, 1, 64), True),
    "slice of planes": (
        torch.bfloat16,
        (700, 64, 224 * 224),
        (128 * 224 * 224, 224 * 224, 1),
        False,
    ),
    "slice of columns": (torch.float32, (2**24, 160), (200, 1), False),
}


@pytest.mark.parametrize("launch", ["moments", "forward", "sums", "gradient", "frozen"])
@pytest.mark.parametrize("case", NORM_CASES)
def test_programs_of_norms_read_and_write_their_own_elements(case, launch):
    dtype, shape, stride, instances = NORM_CASES[case]
    dense = tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
    stride = stride or dense
    backward = launch not in ("moments", "forward")
    rules = gpu_rules(MULTIPROCESSORS, dtype.itemsize, backward)
    # Many programs, which walk a short way each.
    rules = rules._replace(norm=type(rules.norm)(*[2**17] * len(rules.norm)), partials=2**24)
    count = {"sums": 2, "frozen": 3}.get(launch, 0)
    strides, on_grid = (stride,) * (1 + backward), (True,) * (1 + backward)
    walk = _walk(launch, count, instances, rules, dtype, shape, strides, on_grid)
    planned = walk.plan
    assert not planned.view.copies

    span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    x, grad_y = (tensor(dtype, span, place) for place in (1, 2))
    channels = planned.partials[1]
    result = tensor(dtype, math.prod(shape), 3)
    table = tensor(torch.float32, 5 * channels, 4)
    tables = count or 4
    partials = tensor(torch.float32, tables * math.prod(planned.partials), 5)
    if launch == "moments":
        values = {"x_ptr": x, "moments_ptr": partials}
    elif launch == "forward":
        values = {"x_ptr": x, "table_ptr": table, "y_ptr": result}
    else:
        correction = tensor(torch.float32, 2 * channels, 6) if launch == "gradient" else None
        values = {
            "grad_y_ptr": grad_y,
            "x_ptr": x,
            "table_ptr": table,
            "correction_ptr": correction,
            "grad_x_ptr": None if launch == "sums" else result,
            "sums_ptr": partials if count else None,
        }
    trace = []
    with driver.emulation(ctas=some, trace=trace, count=False) as launches:
        run(walk.call, values)

    programs = some(launches[0].ctas)
    own = np.sort(np.concatenate([own_norm_elements(planned, int(p)) for p in programs]))
    assert (np.diff(own) > 0).all()
    elements = touched([access for access in trace if access[3][0] // FAR <= 3], dtype.itemsize)
    # Results of samples lie as their inputs do, channels innermost.
    places = own if "samples" in case else np.sort(in_strides(own, dense, stride))
    for place in (1, 2)[: 1 + backward]:
        assert np.array_equal(np.unique(elements[place, False]), places)
    writes = launch not in ("moments", "sums")
    assert ((3, True) in elements) == writes
    if writes:
        assert np.array_equal(elements[3, True], own)
    if launch in ("moments", "sums", "frozen"):
        sums = touched([access for access in trace if access[3][0] // FAR == 5], 4)[5, True]
        size = math.prod(planned.partials)
        assert (np.diff(sums) > 0).all()
        first = sums[sums < size]
        assert np.array_equal(sums, np.concatenate([first + k * size for k in range(tables)]))
        # In a table (splits, channels, inner), each program's sums are of its own channels.
        inner = planned.partials[2]
        found = np.unique(first // inner % channels)
        assert np.array_equal(found, np.unique(channels_of(own, shape, stride, instances)))


def own_norm_elements(planned, program):
    """The elements of a program; those of samples follow one another."""
    samples = planned.view.samples
    if samples == 1:
        return own_elements(planned, program)
    within = math.prod(planned.grid[:2])
    return own_elements(planned, program % within) + program // within * planned.view.numel


def channels_of(elements, shape, stride, instances):
    """The channels of a dense result's elements, among those of all samples for instances."""
    sizes = math.prod(shape[2:])
    if len(shape) == 3 and stride[1] == 1 and stride[2] == shape[1]:
        sample, channel = elements // (shape[1] * sizes), elements % shape[1]
    else:
        sample, channel = np.divmod(elements // sizes, shape[1])
    return sample * shape[1] + channel if instances else channel


@pytest.mark.parametrize("launch", ["moments", "gradients"])
@pytest.mark.parametrize("partials", [(7, 2**20, 63), (3000, 300_000, 1)], ids=str)
def test_the_finishing_launches_read_each_partial_of_their_channels_once(partials, launch):
    splits, channels, inner = partials
    size = math.prod(partials)
    table = tensor(torch.float32, 5 * channels, 2)
    if launch == "moments":
        call, tables = _finish_moments(partials, channels, 1), 4
        values = {
            "table_out_ptr": table,
            "partials_ptr": tensor(torch.float32, tables * size, 1),
            "weight_ptr": None,
            "bias_ptr": None,
            "slope_ptr": None,
            "negative_slope": 0.0,
            "mean_ptr": None,
            "var_ptr": None,
            "running_mean_ptr": None,
            "running_var_ptr": None,
            "momentum": 0.1,
            "eps": 1e-5,
        }
    else:
        call, tables = _finish_gradients(partials, 3, False), 3
        gradients = [tensor(torch.float32, channels, place) for place in (3, 4, 5)]
        values = {
            "partials_ptr": tensor(torch.float32, tables * size, 1),
            "table_ptr": table,
            "correction_out_ptr": None,
            "channel_sums_ptr": None,
            "grad_slope_ptr": gradients[0],
            "grad_weight_ptr": gradients[1],
            "grad_bias_ptr": gradients[2],
            "slope_sums_ptr": None,
            "counters_ptr": None,
            "elements": 1.0,
        }
    trace = []
    with driver.emulation(ctas=some, trace=trace, count=False) as launches:
        run(call, values)
    block = call.launch.constants["CHANNEL_BLOCK"]
    own = np.concatenate(
        [
            np.arange(program * block, min(channels, (program + 1) * block))
            for program in some(launches[0].ctas)
        ]
    )
    elements = touched(trace, 4)
    rows = np.arange(splits)[:, None, None] * channels + own[:, None]
    terms = np.sort((rows * inner + np.arange(inner)).ravel())
    read = np.concatenate([terms + table * size for table in range(tables)])
    assert np.array_equal(np.unique(elements[1, False]), read)
    if launch == "moments":
        expected = np.concatenate([row * channels + own for row in range(5)])
        assert np.array_equal(elements[2, True], expected)
    else:
        for place in (3, 4, 5):
            assert np.array_equal(elements[place, True], own)
