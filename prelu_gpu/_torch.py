"""Every private name of PyTorch that this library uses: why, and the public name it waits for.

Where PyTorch changes one, this file is what breaks and what to mend. Tests run on every supported
release. Dynamo knows most of these functions by identity, so they are not wrapped.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace

dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""How many dispatch modes see a call. Waits for: a public count of active TorchDispatchModes."""

in_transform: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""Whether torch.func transforms a call: its tensors have no memory to read. Waits for: a public
question in torch.func."""

is_tracing: Callable[[], bool] = torch._C._is_tracing
"""Whether torch.jit.trace records. torch.jit.is_tracing is public and slower: it is Python."""

any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Whether autocast is on for any device. torch.is_autocast_enabled(device_type) is public and
raises for devices without autocast, such as meta."""

is_zero_tensor: Callable[[Tensor], bool] = Tensor._is_zerotensor
"""Whether a tensor is a zero without memory, as forward-mode AD makes. Waits for: the same."""

is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
"""Whether torch.autograd.grad(..., is_grads_batched=True) made a gradient. Waits for: a public
question."""

is_functional: Callable[[Tensor], bool] = torch._is_functional_tensor
"""Whether torch.func.functionalize made a tensor: it has no memory of its own. Waits for: a public
question in torch.func."""

is_view: Callable[[Tensor], bool] = Tensor._is_view
"""Whether autograd knows a tensor as a view. Waits for: Tensor.is_view."""

current_node: Callable[[], Any] = torch._C._current_autograd_node
"""The node of the graph whose backward runs, if any. Waits for: a public one in
torch.autograd.graph."""

ENGINE = torch.autograd.graph._engine_run_backward.__code__
"""What calls an operator in autograd's own backward, where that runs in the caller's thread.
Waits for: a way to ask whether the engine calls."""

is_fx_tracing: Callable[[], bool] = _symbolic_trace.is_fx_symbolic_tracing
"""Whether torch.fx.symbolic_trace records. Waits for: the same in torch.fx."""

_RECORDING_MODES = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
    torch._C._TorchDispatchModeKey.PROXY,
)


def in_forward_ad() -> bool:
    """Whether forward-mode AD is on. Waits for: a public question in torch.autograd.forward_ad."""
    return forward_ad._current_level >= 0


def in_recording_mode() -> bool:
    """Whether a dispatch mode records calls with tensors that have no memory.

    Waits for: public names of the fake, the functionalising and the proxy mode.
    """
    return any(torch._C._get_dispatch_mode(key) is not None for key in _RECORDING_MODES)


def is_exporting() -> bool:
    """Whether torch.export records a call.

    torch.compiler.is_exporting() is public; Dynamo before torch 2.13 takes it for true in all that
    it compiles.
    """
    return torch.compiler._is_exporting_flag


def single_level_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """What a Function's `apply` comes to outside of transforms, without its own checks in Python.

    They take a twentieth of a training step's host time. Waits for: a quicker `apply`.
    """
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def has_no_dispatch(kind: type[Tensor]) -> bool:
    """Whether a subclass of Tensor leaves operators alone. Waits for: a public disabled default."""
    return kind.__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl


def without_class(tensor: Tensor) -> Tensor:
    """The same tensor without its subclass.

    Waits for: a public DisableTorchFunctionSubclass; torch._C has the only one.
    """
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def async_collective_tensor() -> type[Tensor]:
    """The class of what a collective is still fetching; slow to import.

    Waits for: a public name in torch.distributed.
    """
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return AsyncCollectiveTensor


def dispatch_key_set(key: str) -> Any:
    """The set of one dispatch key, for the kernels that torch.library.get_kernel gives.

    Waits for: torch.library's kernels to be callable without one.
    """
    return torch._C.DispatchKeySet(torch._C.DispatchKey.__members__[key])


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps Dynamo from compiling a function, and what it calls: a decorator.

    PyTorch calls operators written in Python also from regions of torch.compile that a graph break
    runs as they are, and Dynamo would take up their frames, and those of Triton, one by one.
    torch.compiler.disable is public; it costs each call more than this does, and imports Dynamo.
    """
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    return function


def destroy(library: Any) -> None:
    """Takes a library's operators out of PyTorch's table. Waits for: a public end of a Library."""
    library._destroy()


def has_forward_hooks(module: torch.nn.Module) -> bool:
    """Whether a module has hooks around its forward. Waits for: a public question in nn.Module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


prelu_kernel = torch.ops.aten._prelu_kernel
prelu_kernel_backward = torch.ops.aten._prelu_kernel_backward
"""What torch.prelu and its backward end in: slopes of the input's rank, which broadcast. Autocast
does not know them, and they have all derivatives. Wait for: a torch.prelu whose slopes broadcast.
`enable` overrides them."""

PRELU_NODE = "PreluKernelBackward0"
"""PyTorch's name for torch.prelu in the graphs of autograd. Waits for: a way to ask a node which
operator it differentiates."""
