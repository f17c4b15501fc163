"""`python -m prelu_gpu`: what is installed, which backend each device gets, a self-check."""

import platform
import sys
from collections.abc import Callable
from importlib import metadata
from unittest import mock

import torch
from torch import Tensor

from . import __version__, enabled, functional, prelu
from .backend import Backend, backend, reason


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
            # The kernels are checked, on tensors for which PyTorch's operator would do.
            with mock.patch.object(functional, "EAGER_BELOW", 0):
                wrong = _self_check(prelu, device, dtype)
                if wrong is None and not left:
                    with enabled(device.type):
                        wrong = _self_check(torch.prelu, device, dtype)
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


def _self_check(
    function: Callable[[Tensor, Tensor], Tensor], device: torch.device, dtype: torch.dtype
) -> str | None:
    """What is wrong with `function` on `device` beside float64 on the CPU; None if it is right."""
    generator = torch.Generator().manual_seed(0)
    # Short rows, long rows, one slope: every kind of kernel.
    for shape, slopes in (((2, 6, 35), 6), ((2, 3, 8192), 3), ((2, 3, 700), 1)):
        x, grad_y = torch.randn(2, *shape, generator=generator).to(dtype)
        weight = torch.rand(slopes, generator=generator).to(dtype)
        expected = _outcome(_formula, x.double(), weight.double(), grad_y.double())
        try:
            given = _outcome(function, x.to(device), weight.to(device), grad_y.to(device))
        except Exception as error:
            return f"failed: {type(error).__name__}: {' '.join(str(error).split())}"
        names = ("forward", "input gradient", "slope gradient")
        for name, actual, exact in zip(names, given, expected, strict=True):
            # A sum of products of either sign may be far smaller than its rounding errors.
            rtol, atol = 2 * torch.finfo(dtype).eps, 1e-3 if name == "slope gradient" else 1e-7
            try:
                torch.testing.assert_close(actual.cpu(), exact.to(dtype), rtol=rtol, atol=atol)
            except AssertionError as error:
                return f"wrong {name}: {' '.join(str(error).split())}"
    return None


def _formula(x: Tensor, weight: Tensor) -> Tensor:
    return torch.where(x > 0, x, weight.unsqueeze(1) * x)


def _outcome(
    function: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, grad_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The output and both gradients."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad_y)
    return y.detach(), grad_x, grad_weight


if __name__ == "__main__":
    sys.exit(main())
