"""Which backend serves a tensor's device."""

import enum

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
    EAGER = "PyTorch operators"


def backend(device: torch.device) -> Backend:
    """The backend of tensors on `device`."""
    if WITHOUT_TRITON is not None:
        return Backend.EAGER
    if INTERPRETED and device.type in ("cpu", *KERNEL_DEVICES):
        return Backend.INTERPRETER
    return Backend.TRITON if device.type in KERNEL_DEVICES else Backend.EAGER


def reason(device: torch.device) -> str:
    """Why `device` has the backend that it has, in a few words."""
    if WITHOUT_TRITON is not None:
        return WITHOUT_TRITON
    if INTERPRETED:
        return "TRITON_INTERPRET=1 was set at import"
    return "" if device.type in KERNEL_DEVICES else f"Triton has no kernels for {device.type}"
