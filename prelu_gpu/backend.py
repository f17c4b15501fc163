"""Which backend serves a tensor's device, and whether a call may reach it."""

import enum
import functools
import logging
import sys
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

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

PLAIN_TYPES: frozenset[type[Tensor]] = frozenset((Tensor, nn.Parameter, nn.Buffer))
_TRACING_MODES = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
    torch._C._TorchDispatchModeKey.PROXY,
)
_BATCHED = torch._C._dispatch_key_parse("Batched")

watchers = torch._C._len_torch_dispatch_stack
"""How many dispatch modes see the calls: they go through the dispatcher then."""


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
    served_by = backend(device)
    if served_by is Backend.INTERPRETER:
        return "TRITON_INTERPRET=1 was set at import"
    if served_by is Backend.TRITON:
        return ""
    return WITHOUT_TRITON or f"Triton has no kernels for {device.type}"


@functools.cache
def warn_once(message: str) -> None:
    """Says at level WARNING, once a process, what is as true of the next call."""
    logging.getLogger("prelu_gpu").warning("%s", message)


def is_plain(*tensors: Tensor, types: Collection[type[Tensor]] = PLAIN_TYPES) -> bool:
    """Whether nothing but plain execution sees a call.

    Compilers, tracers, transforms and tensor subclasses must see PyTorch's operators: the memory
    behind their tensors is not what a kernel may read, or not there at all.
    """
    if (
        is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._is_tracing()
        or (watchers() and any(torch._C._get_dispatch_mode(key) for key in _TRACING_MODES))
    ):
        return False
    for tensor in tensors:
        if type(tensor) not in types:
            return False
        if tensor._is_zerotensor():
            return False
    return True


def as_plain(tensor: Tensor) -> Tensor:
    """The same tensor without its class, where that only adds to torch functions.

    As those of data pipelines, that carry metadata: they have run by then, and would run again in
    each call on the way to a kernel.
    """
    kind = type(tensor)
    if (
        kind in PLAIN_TYPES
        or is_compiling()
        or kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl
    ):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def is_distributed(*tensors: Tensor) -> bool:
    """Whether plain execution sees DTensors."""
    return is_sharded(*tensors) and is_plain(*tensors, types={type(tensor) for tensor in tensors})


def is_sharded(*tensors: Tensor) -> bool:
    """Whether tensors are DTensors, whose dispatch brings our operators the shards."""
    given = {type(tensor) for tensor in tensors}
    if given <= PLAIN_TYPES or "torch.distributed.tensor" not in sys.modules:
        return False
    from .sharding import UNWRAPPED

    return any(given <= types for types in UNWRAPPED)


def is_exporting() -> bool:
    """Whether torch.export records a call.

    Not torch.compiler's own, which Dynamo before torch 2.13 takes for true in all that it compiles.
    """
    return torch.compiler._is_exporting_flag


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps Dynamo from compiling a function, and what it calls: a decorator.

    PyTorch calls operators written in Python also from regions of torch.compile that a graph break
    runs as they are, and Dynamo would take up their frames, and those of Triton, one by one. As
    torch.compiler.disable, which costs each call more than this does, and imports Dynamo.
    """
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    return function


def is_batched(tensor: Tensor) -> bool:
    """Whether torch.autograd.grad(..., is_grads_batched=True) made a gradient."""
    return torch._C._dispatch_keys(tensor).has(_BATCHED)
