"""The switch for unchanged code: torch.prelu itself runs on the kernels.

torch.prelu, torch.nn.functional.prelu and torch.nn.PReLU end in two operators, aten::_prelu_kernel
and its backward. `enable` overrides these for one type of device, below autograd: PyTorch's own
formulas for higher orders, forward mode and transforms stay around them.
"""

import contextlib
import os
import sys
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._torch import (
    ENGINE,
    PRELU_NODE,
    current_node,
    destroy,
    dispatch_key_set,
    in_forward_ad,
    is_fx_tracing,
    untraced,
)
from .backend import WITHOUT_TRITON, has_kernels, reason, warn_once
from .checks import DTYPES, check_memory
from .route import PLAIN_TYPES, as_plain, is_small

if TYPE_CHECKING or WITHOUT_TRITON is None:
    from . import launch

_LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):
    # A child has none of the threads that might hold it.
    os.register_at_fork(
        before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release
    )

_SERVED: set[str] = set()
"""The device types that the kernels serve."""

_OVERRIDES: dict[str, Any] = {}
"""The libraries that hold the overriding operators, by device type. For a type that is no longer
served, the operators pass calls on to PyTorch's."""

_BLOCKS: defaultdict[str, list["_Block"]] = defaultdict(list)
"""The `enabled` blocks that are open, in the order of their opening."""


def enable(device: str | torch.device | None = None) -> None:
    """Runs torch.prelu, torch.nn.functional.prelu and torch.nn.PReLU on the kernels.

    It holds for the whole process and every caller, until :func:`disable`; a second call changes
    nothing. Results, errors, autograd and transforms stay PyTorch's, except that the slope gradient
    is summed before it is rounded. As in :func:`prelu_gpu.prelu`, PyTorch's operator serves inputs
    below :func:`prelu_gpu.kernel_threshold`, where it is quicker; it also serves slopes that
    broadcast in a way that torch.prelu never makes. Under autocast PyTorch rounds the slope
    before the kernels see it.

    It does not reach code that Inductor compiled, which holds kernels of Inductor's own, nor
    torch.nn.functional.leaky_relu.

    A device type without kernels is left as it is, and the logger "prelu_gpu" warns once. The first
    call changes PyTorch's table of operators, which has no lock: make it while no other thread is
    in torch.prelu. If another library overrides the same operators, undo its override after this
    one, not before.

    Args:
        device: a device type such as "cuda". None means the accelerator of this PyTorch, or "cpu"
            if it has none. The CPU has kernels under TRITON_INTERPRET=1.

    Raises:
        ValueError: a device with an index: all devices of a type share their operators.
        RuntimeError, TypeError: what :class:`torch.device` does not take.
    """
    device_type = _device_type("enable", device)
    with _LOCK:
        _switch(device_type, True)


def disable(device: str | torch.device | None = None) -> None:
    """Runs torch.prelu on PyTorch's own operators again.

    PyTorch's table of operators is as it was before :func:`enable`. While other Python threads run,
    one of them might be in an operator: then the overriding operators stay in the table and pass
    every call on to PyTorch's.

    Args:
        device: as in :func:`enable`.

    Raises:
        ValueError, RuntimeError, TypeError: as :func:`enable`.
    """
    device_type = _device_type("disable", device)
    with _LOCK:
        _switch(device_type, False)


@contextlib.contextmanager
def enabled(device: str | torch.device | None = None) -> Iterator[None]:
    """:func:`enable` for a block, or as a decorator for a function (no generator or coroutine).

    Leaving the block, also by an exception, restores what was before, whatever :func:`enable` and
    :func:`disable` did meanwhile. Blocks may be nested, and may overlap in several threads: all of
    them see the kernels until the last one is left, which restores what was before the first.

    Put the backward into the block too: outside of it PyTorch's operator computes the gradients.

    Args:
        device: as in :func:`enable`.

    Raises:
        ValueError, RuntimeError, TypeError: as :func:`enable`.
    """
    device_type = _device_type("enabled", device)
    with _LOCK:
        block, blocks = _Block(device_type in _SERVED), _BLOCKS[device_type]
        _switch(device_type, True)
        blocks.append(block)
    try:
        yield
    finally:
        with _LOCK:
            index = blocks.index(block)
            del blocks[index]
            if index < len(blocks):
                # Another thread's, opened later: what was before is for it to restore.
                blocks[index].before = block.before
            else:
                _switch(device_type, block.before)


class _Block:
    """An open `enabled` block, with whether the kernels served before it."""

    def __init__(self, before: bool) -> None:
        self.before = before


def _device_type(function: str, device: str | torch.device | None) -> str:
    if device is None:
        accelerator = torch.accelerator.current_accelerator()
        return "cpu" if accelerator is None else accelerator.type
    named = torch.device(device)
    if named.index is not None:
        raise ValueError(
            f"{function}(): got device {str(named)!r}. All devices of a type share PyTorch's "
            f"operators: give the type alone, {named.type!r}."
        )
    return named.type


def _switch(device_type: str, on: bool) -> None:
    """Turns the kernels on or off for a device type."""
    if on and (device_type in _OVERRIDES or _override(device_type)):
        _SERVED.add(device_type)
    elif not on:
        _SERVED.discard(device_type)
        if device_type in _OVERRIDES and threading.active_count() == 1:
            destroy(_OVERRIDES.pop(device_type))


def _override(device_type: str) -> bool:
    """Overrides a device type's operators if it has kernels; logs why not."""
    operators = _operators(device_type)
    if operators is None:
        return False
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        # PyTorch warns once that an operator is overridden, which was asked for.
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for name, operator in operators.items():
            library.impl(name, operator, device_type.upper(), allow_override=True)
    _OVERRIDES[device_type] = library
    return True


def _operators(device_type: str) -> dict[str, Callable[..., Any]] | None:
    """The overriding operators by the names of PyTorch's; None where there are no kernels."""
    device = torch.device(device_type)
    stays = f"enable: torch.prelu on {device_type} stays PyTorch's: "
    if not has_kernels(device):
        warn_once(stays + reason(device))
        return None
    key = device_type.upper()
    try:
        native = torch.library.get_kernel("aten::_prelu_kernel", key).call_boxed
        native_backward = torch.library.get_kernel("aten::_prelu_kernel_backward", key).call_boxed
    except RuntimeError as error:
        warn_once(f"{stays}{error}")
        return None
    keys = dispatch_key_set(key)

    @untraced
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor
        if type(x) not in PLAIN_TYPES or type(weight) not in PLAIN_TYPES:
            x, weight = as_plain(x), as_plain(weight)
        if is_small(x) or device_type not in _SERVED or not _is_prelus(x, weight):
            y = native(keys, x, weight)
        else:
            check_memory(x, weight)
            y = launch.prelu_forward(x, weight, None if weight.numel() == 1 else 1)
        return y

    @untraced
    def backward(grad_y: Tensor, x: Tensor, weight: Tensor) -> Any:
        if not {type(grad_y), type(x), type(weight)} <= PLAIN_TYPES:
            grad_y, x, weight = as_plain(grad_y), as_plain(x), as_plain(weight)
        needs = _needs_of_autograd()
        if (
            needs is None
            or is_small(x)
            or grad_y.shape != x.shape
            or grad_y.dtype is not x.dtype
            # A recorded graph may run where nothing is overridden.
            or is_fx_tracing()
            or device_type not in _SERVED
            or not _is_prelus(x, weight)
        ):
            return native_backward(keys, grad_y, x, weight)
        check_memory(grad_y, x, weight)
        channel_dim = None if weight.numel() == 1 else 1
        return launch.prelu_backward(grad_y, x, weight, channel_dim, needs)

    return {"_prelu_kernel": forward, "_prelu_kernel_backward": backward}


def _needs_of_autograd() -> tuple[bool, bool] | None:
    """Whether autograd needs the gradients of x and of the slopes; None if autograd does not call.

    By the operator's contract the slope gradient has x's shape. Autograd then sums it to the
    slopes' shape, so it accepts a gradient that is summed already, and none if no graph needs one.
    Every other caller gets PyTorch's shape: other calls from Python, such as those that a dispatch
    mode passes on, and forward-mode AD, whose tangents have x's shape.
    """
    node, caller = current_node(), sys._getframe(1).f_back
    if (
        node is None
        or node.name() != PRELU_NODE
        or in_forward_ad()
        or (caller is not None and caller.f_code is not ENGINE)
    ):
        return None
    if torch.is_grad_enabled():
        return True, True  # transforms cannot batch a missing gradient
    (x, _), (weight, _) = node.next_functions
    return x is not None, weight is not None


def _is_prelus(x: Tensor, weight: Tensor) -> bool:
    """Whether arguments are as torch.prelu makes them: slopes (1, C, 1, ...) of the input's rank.

    Those of vmap differ: its slope gradient is one for each sample, not their sum.
    """
    dtype, ndim, slopes = x.dtype, x.dim(), weight.numel()
    if dtype is not weight.dtype or dtype not in DTYPES or weight.dim() != ndim:
        return False
    if ndim < 2:
        return slopes == 1
    return weight.shape[1] == slopes and slopes in (1, x.shape[1])
