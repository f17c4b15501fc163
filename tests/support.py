"""What the tests compare with, and the data they use."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prelu_gpu import composed, reference
from prelu_gpu.launch_norm import Norm, norm_prelu_backward, norm_prelu_forward

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

    def exact(self, positive):
        """Results and, of the sums among them, the sums of their terms' sizes: in float64."""
        # Contiguous: PyTorch's instance_norm of one sample in channels_last has a wrong gradient on
        # the CPU (2.13).
        x, weight, bias = (
            None if t is None else t.detach().double().contiguous().requires_grad_()
            for t in (self.x, self.weight, self.bias)
        )
        slope = torch.as_tensor(self.slope, dtype=torch.float64, device=x.device)
        slope = slope.clone().requires_grad_()
        running = [
            None if t is None else t.double().clone() for t in (self.running_mean, self.running_var)
        ]
        dims = [-1 if d == 1 else 1 for d in range(x.dim())]
        args = (True,) if self.norm.instances else (self.norm.training,)
        norm = F.instance_norm if self.norm.instances else F.batch_norm
        # Before the running statistics change.
        given = [None if t is None else t.clone() for t in running]
        with torch.no_grad():
            standard = norm(x, *given, None, None, *args, self.momentum, self.norm.eps)
        z = norm(x, *running, weight, bias, *args, self.momentum, self.norm.eps)
        y = torch.where(positive, z, slope.view(dims) * z)
        grad_y = self.grad_y.double().contiguous()
        leaves = [t for t in (x, slope, weight, bias) if t is not None]
        grad_z, *found = torch.autograd.grad(y, [z, *leaves], grad_y)
        grads = iter(found)
        grads = [None if t is None else next(grads) for t in (x, slope, weight, bias)]
        z = z.detach()
        others = [d for d in range(x.dim()) if d != 1]
        # z is a sum, too: next to 0 it is as exact as its terms.
        terms = [standard if weight is None else standard * weight.detach().view(dims)]
        terms += [] if bias is None else [bias.detach().view(dims)]
        z_size = sum(term.abs() for term in terms)
        slope_terms = torch.where(positive, 0.0, grad_y.abs() * z_size)
        sizes = {
            "grad_slope": slope_terms.sum(others) if slope.numel() > 1 else slope_terms.sum(),
            "grad_weight": (grad_z * standard).abs().sum(others),
            "grad_bias": grad_z.abs().sum(others),
        }
        results = (y.detach(), *grads, *running)
        return dict(zip(NORM_RESULTS, results, strict=True)), sizes, z

    def check(self, results=None):
        """That results are those of PyTorch in float64, up to what rounding explains."""
        results = self.results() if results is None else results
        positive = self.positive()
        exact, sizes, z = self.exact(positive)
        assert ((z > 0) == positive)[z.abs() > 1e-5 * z.abs().max()].all()
        strides = [torch.empty_like(self.x).stride()]
        if self.norm.instances:
            # As PyTorch's, where samples do not follow one another.
            strides.append(torch.empty(self.x.shape).stride())
        for name in ("y", "grad_x"):
            if results[name] is not None:
                assert results[name].stride() in strides, name
        needed = dict(zip(NORM_RESULTS[1:5], self.needed, strict=True))
        dtypes = {
            "y": self.grad_y.dtype,
            "grad_x": self.x.dtype,
            "grad_slope": getattr(self.slope, "dtype", None),
            "grad_weight": getattr(self.weight, "dtype", None),
            "grad_bias": getattr(self.bias, "dtype", None),
        }
        for name, right in exact.items():
            found = results[name]
            if right is None or not needed.get(name, True):
                assert found is None, name
                continue
            assert found.dtype == dtypes.get(name, torch.float32), name
            rounding = torch.finfo(found.dtype).eps / 2 * right.abs()
            if name in sizes:
                assert found.shape == self._asdict()[name.removeprefix("grad_")].shape
                tolerance = rounding + 5e-6 * sizes[name].view(found.shape)
            elif name.startswith("running"):
                tolerance = 1e-6 * right.abs() + (1e-6 if name == "running_mean" else 0)
            else:
                tolerance = 4 * rounding + 4e-6 * right.abs().max()
            error = (found.double() - right.view(found.shape)).abs()
            assert (error <= tolerance).all(), f"{name}: {(error / tolerance).max():.2f} too far"


NORM_RESULTS = (
    *("y", "grad_x", "grad_slope", "grad_weight", "grad_bias"),
    *("running_mean", "running_var"),
)


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
