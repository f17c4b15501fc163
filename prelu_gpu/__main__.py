"""`python -m prelu_gpu`: what is installed, which backend each device gets, a self-check."""

import platform
import sys
from collections.abc import Callable
from importlib import metadata

import torch
from torch import Tensor

from . import (
    __version__,
    backend,
    enabled,
    get_kernel_threshold,
    kernel_threshold,
    leaky_relu,
    prelu,
    reference,
    threshold,
)
from .backend import Backend, reason

NEGATIVE_SLOPE = 0.25
"""Exact in every dtype."""


def main() -> int:
    """Prints the report; gives the exit status: 1 where a self-check failed."""
    print(f"prelu_gpu {__version__}, torch {torch.__version__}, triton {_triton_version()}")
    failed = False
    for device in _devices():
        why = reason(device)
        print(f"\n{device}: {_device_name(device)}")
        served_by = backend.backend_of(device)
        print(f"  runs on     {served_by.value}{f' ({why})' if why else ''}")
        if served_by is Backend.TRITON:
            print(f"              PyTorch operators below {_threshold(device)}")
            print(f"              launches {_launches()}")
        left = served_by is Backend.PYTORCH
        if device.type == "cpu" and left and backend.WITHOUT_TRITON is None:
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


def _threshold(device: torch.device) -> str:
    elements = get_kernel_threshold()
    if elements is None:
        return f"{threshold.defaults[device.index] / 1e6:.0f} MB"
    return f"{elements} elements"


def _launches() -> str:
    from . import run  # which needs triton

    why = run.LOOK_UP_BECAUSE
    return f"through Triton's look-up: {why}" if why else "without Triton's look-up after the first"


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
    with kernel_threshold(0):
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
    """What is wrong with `function`; None if it is right.

    It is called with the input and, `learned`, with slopes; else its slope is NEGATIVE_SLOPE.
    """
    generator = torch.Generator().manual_seed(0)
    # Short rows, long rows, one slope: every kind of kernel.
    for shape, slopes in (((2, 6, 35), 6), ((2, 3, 8192), 3), ((2, 3, 700), 1)):
        x, grad_y = torch.randn(2, *shape, generator=generator).to(dtype)
        weight = torch.full((1,), NEGATIVE_SLOPE, dtype=dtype)
        if learned:
            weight = torch.rand(slopes, generator=generator).to(dtype)
        leaves = [t.to(device).requires_grad_() for t in ((x, weight) if learned else (x,))]
        try:
            y = function(*leaves)
            gradients = torch.autograd.grad(y, leaves, grad_y.to(device))
        except Exception as error:
            return f"failed: {type(error).__name__}: {' '.join(str(error).split())}"
        for mistake in reference.mistakes(
            grad_y,
            x,
            weight,
            y=y.detach().cpu(),
            grad_x=gradients[0].cpu(),
            grad_weight=gradients[1].cpu() if learned else None,
            products_in=None if backend.has_kernels(device) else dtype,
        ):
            return f"wrong {mistake}"
    return None


def _leaky_relu(x: Tensor) -> Tensor:
    return leaky_relu(x, NEGATIVE_SLOPE)


def _leaky_relu_in_place(x: Tensor) -> Tensor:
    y = x.clone()  # a leaf cannot be written
    leaky_relu(y, NEGATIVE_SLOPE, inplace=True)
    return y


if __name__ == "__main__":
    sys.exit(main())
