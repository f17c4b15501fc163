"""`python -m prelu_gpu`: what is installed, which backend each device gets, a self-check."""

import platform
import sys
from collections.abc import Callable
from importlib import metadata
from unittest import mock

import torch
from torch import Tensor

from . import __version__, enabled, functional, leaky_relu, prelu
from .backend import Backend, backend, reason

NEGATIVE_SLOPE = 0.2


def main() -> int:
    """Prints the report; gives the exit status: 1 where a self-check failed."""
    print(f"prelu_gpu {__version__}, torch {torch.__version__}, triton {_triton_version()}")
    failed = False
    for device in _devices():
        why = reason(device)
        print(f"\n{device}: {_device_name(device)}")
        served_by = backend(device)
        print(f"  runs on     {served_by.value}{f' ({why})' if why else ''}")
        if served_by is Backend.TRITON:
            print(f"              PyTorch operators below {functional.EAGER_BELOW} elements")
        left = served_by is Backend.EAGER
        if device.type == "cpu" and left:
            print("              TRITON_INTERPRET=1 runs the kernels here, interpreted and slow")
        print(
            f"  enable()    {'leaves torch.prelu as it is' if left else 'serves torch.prelu too'}"
        )
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            if device.type == "mps" and dtype == torch.float64:
                continue
            wrong = _self_check(device, dtype, overridden=not left)
            failed |= wrong is not None
            print(f"  self-check  {str(dtype).removeprefix('torch.'):10}{wrong or 'ok'}")
    return int(failed)


def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        count = torch.accelerator.device_count()
        devices += [torch.device(accelerator.type, index) for index in range(count)]
    return devices


def _device_name(device: torch.device) -> str:
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(name(device)) if name else platform.machine()


def _self_check(device: torch.device, dtype: torch.dtype, *, overridden: bool) -> str | None:
    """What is wrong on `device`; None if all is right. torch.prelu too, where it is overridden."""
    # The kernels are checked, on tensors for which PyTorch's operator would do.
    with mock.patch.object(functional, "EAGER_BELOW", 0):
        for name, function, learned in (
            ("prelu", prelu, True),
            ("leaky_relu", _leaky_relu, False),
            ("leaky_relu in place", _leaky_relu_in_place, False),
        ):
            if wrong := _mistake(function, learned, device, dtype):
                return f"{name}: {wrong}"
        if overridden:
            with enabled(device.type):
                if wrong := _mistake(torch.prelu, True, device, dtype):
                    return f"torch.prelu: {wrong}"
    return None


def _mistake(
    function: Callable[..., Tensor], learned: bool, device: torch.device, dtype: torch.dtype
) -> str | None:
    """What is wrong with `function` beside float64 on the CPU; None if it is right.

    It is called with the input and, `learned`, with slopes; else its slope is NEGATIVE_SLOPE.
    """
    generator = torch.Generator().manual_seed(0)
    # Short rows, long rows, one slope: every kind of kernel.
    for shape, slopes in (((2, 6, 35), 6), ((2, 3, 8192), 3), ((2, 3, 700), 1)):
        x, grad_y = torch.randn(2, *shape, generator=generator).to(dtype)
        weight = torch.rand(slopes, generator=generator).to(dtype)
        inputs = [x, weight] if learned else [x]
        expected = _outcome(_formula, [t.double() for t in inputs], grad_y.double())
        try:
            given = _outcome(function, [t.to(device) for t in inputs], grad_y.to(device))
        except Exception as error:
            return f"failed: {type(error).__name__}: {' '.join(str(error).split())}"
        names = ("forward", "input gradient", "slope gradient")[: len(expected)]
        for name, actual, exact in zip(names, given, expected, strict=True):
            # A sum of products of either sign may be far smaller than its rounding errors.
            rtol, atol = 2 * torch.finfo(dtype).eps, 1e-3 if name == "slope gradient" else 1e-7
            try:
                torch.testing.assert_close(actual.cpu(), exact.to(dtype), rtol=rtol, atol=atol)
            except AssertionError as error:
                return f"wrong {name}: {' '.join(str(error).split())}"
    return None


def _leaky_relu(x: Tensor) -> Tensor:
    return leaky_relu(x, NEGATIVE_SLOPE)


def _leaky_relu_in_place(x: Tensor) -> Tensor:
    y = x.clone()  # a leaf cannot be written
    leaky_relu(y, NEGATIVE_SLOPE, inplace=True)
    return y


def _formula(x: Tensor, weight: Tensor | None = None) -> Tensor:
    slopes = NEGATIVE_SLOPE if weight is None else weight.unsqueeze(1)
    return torch.where(x > 0, x, slopes * x)


def _outcome(
    function: Callable[..., Tensor], inputs: list[Tensor], grad_y: Tensor
) -> tuple[Tensor, ...]:
    """The output, and the gradient of each input."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    y = function(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, grad_y)


if __name__ == "__main__":
    sys.exit(main())
