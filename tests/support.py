"""What the tests compare with, and the data they use."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from prelu_gpu import composed, reference

GPU = torch.cuda.is_available()
EMULATED = "PRELU_GPU_TEST_COMPILED" in os.environ
"""Whether kernels are compiled and run in the emulator of tests/ptx."""
MARGIN, CANARY = 64, 12345.0
"""Elements around what a kernel writes, and what they hold."""

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
PAIRS = (
    *((dtype, dtype) for dtype in DTYPES),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
)
"""Dtypes of the input and of the slope."""


REDUCTIONS = ("last program", "second launch", "atomic")
"""How partial slope gradients become one: what the `force` fixture takes."""


def id_of(value):
    """A test id for dtypes, pairs of them and kinds."""
    if isinstance(value, tuple) and value and isinstance(value[0], torch.dtype):
        return "-".join(map(id_of, value))
    return str(value).removeprefix("torch.")


def randn(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def integers(shape, dtype, device, seed=0, high=4):
    """Small whole numbers: products and sums of them are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-high, high + 1, shape, generator=generator).to(dtype).to(device)


def channel_dim(x, weight, dim=1):
    return None if weight.numel() == 1 else dim % x.dim()


def exact_grad_weight(x, weight, grad_y, dim=1):
    """The slope gradient in float64."""
    return reference.prelu_backward(grad_y.double(), x.double(), weight.double(), dim)[1]


def assert_right(grad_y, x, weight, dim=1, **results):
    """That results are those of the reference, up to what rounding explains."""
    assert not (mistakes := list(reference.mistakes(grad_y, x, weight, dim, **results))), mistakes


def assert_same(actual, expected):
    """Equal bit for bit, where any NaN equals any NaN; strides too."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.stride() == expected.stride()
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(actual[~nan], expected[~nan])
    assert torch.equal(actual[~nan].signbit(), expected[~nan].signbit())


def backward(function, x, weight, grad_y, *args, **options):
    """The output and both gradients of function(x, weight, *args, **options)."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight, *args, **options)
    return y.detach(), *torch.autograd.grad(y, (x, weight), grad_y)


def eager_backward(x, weight, grad_y, dim=1):
    return backward(composed.prelu_forward, x, weight, grad_y, channel_dim(x, weight, dim))


def run_program(source, *options, interpret=True, timeout=120, **variables):
    """What a program in a process of its own printed, and what it wrote to stderr; it must succeed.

    With interpret=False, kernels are not interpreted, and a CPU has none.
    """
    environment = {**os.environ, **variables}
    if not interpret:
        environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *options, "-c", source],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr
