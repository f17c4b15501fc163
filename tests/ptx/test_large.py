"""More than 2^31 elements, of tensors of which there is only an address: some programs of each.

Where they read and write is what the kernels' descriptions say, computed with Python's integers.
"""

import math

import numpy as np
import pytest
import torch
from support import id_of

from prelu_gpu.launch import _sum_call, plan_call
from prelu_gpu.rules import Kind, gpu_rules
from prelu_gpu.run import run
from ptx import driver
from ptx.driver import MULTIPROCESSORS
from ptx.machine import AddressOnly

pytestmark = pytest.mark.emulated

FAR = 1 << 44
"""Bytes from one tensor to the next."""

CASES = {
    "flat": (torch.bfloat16, (2**31 + 5,), None),
    "flat of 2^32": (torch.float32, (2**32,), None),
    "flat of 2^33": (torch.float16, (2**33 + 1,), None),
    "flat in float64": (torch.float64, (2**31 + 1,), None),
    "plane": (torch.bfloat16, (700, 64, 224 * 224), None),
    "plane of long rows": (torch.float32, (1, 3, 2**31 + 8), None),
    "odd plane": (torch.float32, (900, 50, 223 * 225), None),
    "odd plane of long rows": (torch.float16, (2, 2, 2**31 + 7), None),
    "many channels": (torch.float32, (3, 70_000, 20_000), None),
    "column": (torch.bfloat16, (2**23 + 3, 512), None),
    "column of 3": (torch.float32, (2**30 + 1, 3), None),
    "column of 7 x 7": (torch.float32, (90_001, 512, 49), None),
    "slice of planes": (torch.bfloat16, (700, 64, 224 * 224), (128 * 224 * 224, 224 * 224, 1)),
    "slice of columns": (torch.float32, (2**24, 160), (200, 1)),
    "slice of one row": (torch.float32, (2**18, 2**13 + 4), (2**13 + 16, 1)),
}


def some(count):
    """Some of so many programs: the first, the last, and others."""
    return np.unique([0, count - 1, count // 2, *np.random.default_rng(0).integers(0, count, 3)])


def tensor(dtype, elements, place):
    return AddressOnly(dtype, elements, place * FAR, torch.device("cpu"))


def touched(trace, itemsize):
    """The elements of each access, sorted, by (place of the tensor, whether they are written)."""
    parts = {}
    for writes, size, _, at in trace:
        elements = (at % FAR // itemsize)[:, None] + np.arange(size // itemsize)
        parts.setdefault((int(at[0]) // FAR, writes), []).append(elements.ravel())
    return {key: np.sort(np.concatenate(elements)) for key, elements in parts.items()}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", CASES)
def test_programs_read_and_write_their_own_elements(case, backward):
    dtype, shape, stride = CASES[case]
    dense = tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
    stride = stride or dense
    channels = shape[1] if len(shape) > 1 and "one row" not in case else 1
    rules = gpu_rules(MULTIPROCESSORS, dtype.itemsize, backward)
    # Many programs, which walk a short way each.
    column = rules.column._replace(programs=2**17)
    rules = rules._replace(column=column, partials=2**24)
    channel_dim = None if channels == 1 else 1
    strides = [stride] * (1 + backward)
    planned, call = plan_call(rules, channel_dim, dtype, shape, *strides)
    assert not planned.view.copies

    span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    x, grad_y = (tensor(dtype, span, place) for place in (1, 2))
    result = tensor(dtype, math.prod(shape), 3)
    weight, grad_weight = (tensor(dtype, channels, place) for place in (4, 5))
    values = {"x_ptr": x, "weight_ptr": weight, "negative_slope": 0.0, "y_ptr": result}
    if backward:
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        values = {
            "grad_y_ptr": grad_y,
            "x_ptr": x,
            "weight_ptr": weight,
            "negative_slope": 0.0,
            "grad_x_ptr": result,
            "sums_ptr": tensor(sums, math.prod(planned.partials), 6),
        }
        if planned.kind is not Kind.COLUMN:
            finish = planned.finish
            values["counters_ptr"] = tensor(torch.int32, channels, 7) if finish else None
            values["grad_weight_ptr"] = grad_weight if finish else None
    trace = []
    with driver.emulation(ctas=some, trace=trace, count=False) as launches:
        run(call, values)

    programs = some(launches[0].ctas)
    elements = touched([access for access in trace if access[3][0] // FAR <= 3], dtype.itemsize)
    written = elements[3, True]
    own = [own_elements(planned, int(program)) for program in programs]
    assert np.array_equal(written, np.sort(np.concatenate(own)))
    assert (np.diff(written) > 0).all()
    # Several warps may read the same.
    places = np.sort(in_strides(written, dense, stride))
    for place in (1, 2)[: 1 + backward]:
        assert np.array_equal(np.unique(elements[place, False]), places)


def in_strides(elements, dense, stride):
    """Where elements of a dense tensor lie in one of other strides."""
    at = np.zeros_like(elements)
    for step, other in zip(dense, stride, strict=True):
        at, elements = at + elements // step * other, elements % step
    return at


def own_elements(planned, program):
    """The elements of a program: those of its tiles, and of edges or a remainder."""
    x, y, z = (*planned.grid, 1)[:3]
    first, second, third = program % x, program // x % y, program // (x * y)
    vector, block = planned.constants["V"], planned.constants["BLOCK"]
    parts = []
    if planned.kind is Kind.COLUMN:
        rows, columns = planned.sizes["rows"], planned.sizes["vectors"] * vector
        step = planned.constants["ROWS"]
        mine = np.arange(first * block, min(columns, (first + 1) * block))
        for row in range(second * step, rows, y * step):
            tile = np.arange(row, min(rows, row + step))
            parts.append((tile[:, None] * columns + mine).ravel())
        if second == y - 1:
            parts.append(rows * columns + mine[mine < planned.sizes["remainder"]])
        return np.concatenate(parts)
    outer, channels, inner = planned.view[:3]
    for n in range(third, outer, z):
        start = (n * channels + first) * inner
        end = start + inner
        body, body_end = -(-start // vector) * vector, end // vector * vector
        for tile in range(body + second * block, body_end, y * block):
            parts.append(np.arange(tile, min(body_end, tile + block)))
        if second == 0:
            parts += [np.arange(start, min(body, end)), np.arange(max(body_end, body), end)]
    return np.concatenate(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=id_of)
@pytest.mark.parametrize(
    "partials", [(7, 2**21, 63), (1, 2**20, 1000), (3000, 300_000, 1)], ids=str
)
def test_the_second_launch_reads_each_partial_sum_of_its_channels_once(partials, dtype):
    splits, channels, inner = partials
    call = _sum_call(partials)
    values = {
        "partials_ptr": tensor(torch.float32, math.prod(partials), 1),
        "grad_weight_ptr": tensor(dtype, channels, 2),
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
    written = touched([access for access in trace if access[0]], dtype.itemsize)[2, True]
    assert np.array_equal(written, own)
    read = touched([access for access in trace if not access[0]], 4)[1, False]
    rows = np.arange(splits)[:, None, None] * channels + own[:, None]
    assert np.array_equal(np.unique(read), np.sort((rows * inner + np.arange(inner)).ravel()))
