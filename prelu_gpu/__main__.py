"""`python -m prelu_gpu`: what is installed, which backend each device gets, a self-check."""

import platform
import sys
from collections.abc import Callable, Iterator
from importlib import metadata

import torch
from torch import Tensor

from . import (
    __version__,
    backend,
    batch_norm_prelu,
    enabled,
    get_kernel_threshold,
    instance_norm_prelu,
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
            right = "ok" if _checks_norms(device, dtype) else "ok, without norms"
            print(f"  self-check  {str(dtype).removeprefix('torch.'):10}{wrong or right}")
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
    checks = {
        "prelu": _mistakes(prelu, True, device, dtype),
        "leaky_relu": _mistakes(_leaky_relu, False, device, dtype),
        "leaky_relu in place": _mistakes(_leaky_relu_in_place, False, device, dtype),
    }
    if overridden:
        checks["torch.prelu"] = _overridden_mistakes(device, dtype)
    if _checks_norms(device, dtype):
        checks["batch_norm_prelu"] = _norm_mistakes(True, False, device, dtype)
        checks["batch_norm_prelu in evaluation"] = _norm_mistakes(False, False, device, dtype)
        checks["instance_norm_prelu"] = _norm_mistakes(True, True, device, dtype)
    # The kernels are checked, on tensors for which PyTorch's operator would do.
    with kernel_threshold(0):
        for name, mistakes in checks.items():
            try:
                for mistake in mistakes:
                    return f"{name}: wrong {mistake}"
            except Exception as error:
                return f"{name}: failed: {type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _checks_norms(device: torch.device, dtype: torch.dtype) -> bool:
    """PyTorch's operators round a norm's output to half precision before PReLU."""
    return dtype.itemsize > 2 or backend.has_kernels(device)


def _mistakes(
    function: Callable[..., Tensor], learned: bool, device: torch.device, dtype: torch.dtype
) -> Iterator[str]:
    """What is wrong with `function`.

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
        y = function(*leaves)
        gradients = torch.autograd.grad(y, leaves, grad_y.to(device))
        yield from reference.mistakes(
            grad_y,
            x,
            weight,
            y=y.detach().cpu(),
            grad_x=gradients[0].cpu(),
            grad_weight=gradients[1].cpu() if learned else None,
            products_in=None if backend.has_kernels(device) else dtype,
        )


def _overridden_mistakes(device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    with enabled(device.type):
        mistakes = [*_mistakes(torch.prelu, True, device, dtype)]
    yield from mistakes


def _norm_mistakes(
    training: bool, instances: bool, device: torch.device, dtype: torch.dtype
) -> Iterator[str]:
    """What is wrong with a norm with PReLU."""
    generator = torch.Generator().manual_seed(0)
    # Short rows, long rows, columns: every kind of kernel.
    for shape, layout in (
        ((2, 6, 7, 5), torch.contiguous_format),
        ((2, 3, 64, 128), torch.contiguous_format),
        ((2, 6, 7, 5), torch.channels_last),
    ):
        x, grad_y = (
            t.to(dtype).contiguous(memory_format=layout)
            for t in torch.randn(2, *shape, generator=generator)
        )
        # Positive, so that the output's sign is that of the norm's.
        slope, weight, bias, mean, variance = (
            torch.rand(5, shape[1], generator=generator).add(0.1).to(dtype)
        )
        leaves = [t.to(device).requires_grad_() for t in (x, slope, weight, bias)]
        before: tuple[Tensor, ...] = () if instances else (mean, variance)
        running = [t.to(device, copy=True) for t in before]
        if instances:
            y = instance_norm_prelu(*leaves)
        else:
            y = batch_norm_prelu(
                *(leaves[0], leaves[1], running[0], running[1], leaves[2], leaves[3], training)
            )
        computed = y, *torch.autograd.grad(y, leaves, grad_y.to(device)), *running
        results = [t.detach().cpu() for t in computed]
        exact = reference.norm_exact(
            *(~results[0].signbit(), grad_y, x, slope, weight, bias, *before),
            training=training,
            instances=instances,
            eps=1e-5,
        )
        named = zip(reference.NORM_RESULTS, results, strict=False)
        yield from reference.norm_mistakes(dict(named), exact)


def _leaky_relu(x: Tensor) -> Tensor:
    return leaky_relu(x, NEGATIVE_SLOPE)


def _leaky_relu_in_place(x: Tensor) -> Tensor:
    y = x.clone()  # a leaf cannot be written
    leaky_relu(y, NEGATIVE_SLOPE, inplace=True)
    return y


if __name__ == "__main__":
    sys.exit(main())
