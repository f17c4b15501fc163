"""Which backend serves the tensors of a device."""

import enum
import functools
import logging

import torch

try:
    import triton
except ImportError as error:
    WITHOUT_TRITON: str | None = f"triton cannot be imported: {error}"
    INTERPRETED = False
else:
    WITHOUT_TRITON = None
    INTERPRETED = bool(triton.knobs.runtime.interpret)
    """Whether TRITON_INTERPRET=1 was set at import: kernels run on the CPU, for tests."""

KERNEL_DEVICES = ("cuda", "xpu")


class Backend(enum.Enum):
    """What computes a call."""

    TRITON = "Triton kernels"
    INTERPRETER = "Triton kernels, interpreted on the CPU"
    PYTORCH = "PyTorch operators"


def has_kernels(device: torch.device) -> bool:
    """Whether there are kernels for tensors on `device`."""
    there = device.type in KERNEL_DEVICES or (INTERPRETED and device.type == "cpu")
    return there and WITHOUT_TRITON is None


def backend_of(device: torch.device) -> Backend:
    """The backend of tensors on `device`."""
    if not has_kernels(device):
        return Backend.PYTORCH
    return Backend.INTERPRETER if INTERPRETED else Backend.TRITON


def reason(device: torch.device) -> str:
    """Why `device` has the backend that it has, in a few words."""
    served_by = backend_of(device)
    if served_by is Backend.INTERPRETER:
        return "TRITON_INTERPRET=1 was set at import"
    if served_by is Backend.TRITON:
        return ""
    return WITHOUT_TRITON or f"Triton has no kernels for {device.type}"


@functools.cache
def warn_once(message: str) -> None:
    """Logs at level WARNING, once a process, what is as true of the next call."""
    logging.getLogger("prelu_gpu").warning("%s", message)
