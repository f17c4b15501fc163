"""Every number of 16 bits, stored as a GPU stores it: rounded once, to nearest even."""

import math

import pytest
import torch
from support import PAIRS, assert_right, assert_same, id_of

from prelu_gpu import launch, prelu
from prelu_gpu.rules import Kind

pytestmark = pytest.mark.emulated

SLOPES = (0.25, 0.01, -0.7, 1.0, 0.0, -0.0, 3.0, 1e-6, 1e-38, 1e30, math.inf, math.nan, 1 / 3)


@pytest.mark.parametrize("dtypes", [pair for pair in PAIRS if pair[0].itemsize == 2], ids=id_of)
@pytest.mark.parametrize("kind", [Kind.FLAT, Kind.COLUMN], ids=id_of)
def test_every_number(kind, dtypes, device, force):
    force(kind)
    dtype, slope_dtype = dtypes
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(512, 128)
    grad_y = x.flip(0, 1)
    for slope in SLOPES:
        weight = torch.tensor([slope], dtype=slope_dtype)
        y = prelu(x, weight)
        grad_x, _ = launch.prelu_backward(grad_y, x, weight, None, (True, False))
        assert_right(grad_y, x, weight, y=y, grad_x=grad_x)
        if dtype == slope_dtype:
            assert_same(y, torch.prelu(x, weight))
