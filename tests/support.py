"""What the tests compare with, and the data they use."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from prelu_gpu import composed, reference
from prelu_gpu.launch_norm import Norm, norm_prelu_backward, norm_prelu_forward
from prelu_gpu.reference import NORM_RESULTS

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


class NormCall(NamedTuple):
    """A norm with PReLU, forward and backward, of these tensors."""

    x: Tensor
    grad_y: Tensor
    slope: Tensor | float
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    norm: Norm
    momentum: float = 0.1
    needs: tuple[bool, bool, bool, bool] = (True, True, True, True)
    """Gradients of x, slope, weight and bias; only those of tensors are asked for."""

    @property
    def needed(self):
        """What is asked for, in the backward's order."""
        tensors = (self.x, self.slope, self.weight, self.bias)
        return tuple(
            need and isinstance(t, Tensor) for need, t in zip(self.needs, tensors, strict=True)
        )

    def forward(self, **changes):
        """Y, the table, and running statistics as they are after it: those here do not change."""
        call = self._replace(**changes)
        running = [None if t is None else t.clone() for t in (call.running_mean, call.running_var)]
        y, table = norm_prelu_forward(
            call.x,
            call.slope,
            call.weight,
            call.bias,
            *running,
            call.norm,
            call.momentum,
            call.grad_y.dtype,
        )
        return y, table, *running

    def results(self):
        """By name; None for what is not asked for."""
        y, table, running_mean, running_var = self.forward()
        grads = norm_prelu_backward(
            self.grad_y,
            self.x,
            table,
            self.slope,
            self.weight,
            self.bias,
            self.norm,
            self.needed,
        )
        return dict(zip(NORM_RESULTS, (y, *grads, running_mean, running_var), strict=True))

    def positive(self):
        """Where the kernels take PReLU's argument for positive: rounding may move the kink."""
        return (self.forward(slope=0.0, grad_y=self.grad_y.float())[0] > 0).contiguous()

    def exact(self):
        """Results in float64."""
        arguments = self.grad_y, self.x, self.slope, self.weight, self.bias
        running = self.running_mean, self.running_var
        options = {**self.norm._asdict(), "momentum": self.momentum}
        return reference.norm_exact(self.positive(), *arguments, *running, **options)

    def check(self, results=None):
        """That results are those of the reference, up to what rounding explains."""
        results = self.results() if results is None else results
        wanted = (True, *self.needed, *(t is not None for t in self[5:7]))
        assert tuple(results[name] is not None for name in NORM_RESULTS) == wanted
        strides = [torch.empty_like(self.x).stride()]
        if self.norm.instances:
            # As PyTorch's, where samples do not follow one another.
            strides.append(torch.empty(self.x.shape).stride())
        for name in ("y", "grad_x"):
            if results[name] is not None:
                assert results[name].stride() in strides, name
        assert not (mistakes := list(reference.norm_mistakes(results, self.exact()))), mistakes


def norm_call(
    shape,
    dtype,
    device,
    slopes=None,
    instances=False,
    training=True,
    affine=True,
    parameters=None,
    layout=torch.contiguous_format,
    mean=0.5,
    seed=0,
    **changes,
):
    """A call of random tensors; slopes: how many, or a number; `parameters`: their dtype."""
    channels, parameters = shape[1], parameters or dtype

    def numbers(place, dtype=parameters):
        return randn((channels,), dtype, device, seed=10 * seed + place)

    x, grad_y = (randn(shape, torch.float64, device, seed=10 * seed + place) for place in (0, 1))
    x, grad_y = (t.to(dtype).contiguous(memory_format=layout) for t in (1.5 * x + mean, grad_y))
    weight, bias, running_mean = numbers(2), numbers(3), numbers(4, torch.float32)
    running_var = numbers(5, torch.float32).abs() + 0.5
    slope = slopes
    if not isinstance(slopes, float):
        slope = numbers(6)[: slopes or channels]
    call = NormCall(
        x,
        grad_y,
        slope,
        weight if affine else None,
        bias if affine else None,
        None if instances else running_mean,
        None if instances else running_var,
        Norm(training or instances, instances, 1e-5),
    )
    return call._replace(**changes)
