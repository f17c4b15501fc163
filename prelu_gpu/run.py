"""One launch: a kernel, its plan and its tensors, on the tensors' device, or interpreted."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

from .backend import INTERPRETED
from .plan import Launch

DIRECT_VERSIONS = frozenset(("3.6", "3.7", "3.8", "3.9"))
"""Versions of Triton whose compiled kernels tests/ptx launches without Triton's look-up."""


def _why_look_up() -> str | None:
    version = ".".join(triton.__version__.split(".")[:2])
    if os.environ.get("PRELU_GPU_DIRECT_LAUNCH") == "0":
        return "PRELU_GPU_DIRECT_LAUNCH=0 was set at import"
    if torch.version.hip is not None or torch.version.xpu is not None:
        return "its key is known for NVIDIA's GPUs"
    if version not in DIRECT_VERSIONS:
        return f"triton {version} is none of {', '.join(sorted(DIRECT_VERSIONS))}"
    return None


LOOK_UP_BECAUSE = _why_look_up()
"""Why every launch goes through Triton's look-up of what it has compiled, which takes the host
longer than a small kernel runs. None if only a kernel's first launch does: what Triton's
knobs say of compiling and of its cache is as at that launch then."""

_COUNTERS: dict[tuple[torch.device, int], Tensor] = {}

_INPUTS = frozenset(
    (
        *("x_ptr", "grad_y_ptr", "weight_ptr", "bias_ptr", "slope_ptr", "mean_ptr", "var_ptr"),
        *("partials_ptr", "table_ptr", "correction_ptr"),
    )
)
"""Parameters of the kernels that are only read."""

_INTERPRETER = threading.Lock()
if hasattr(os, "register_at_fork"):
    # A child has none of the threads that might hold it.
    os.register_at_fork(
        before=_INTERPRETER.acquire,
        after_in_parent=_INTERPRETER.release,
        after_in_child=_INTERPRETER.release,
    )

Values = dict[str, Any]
"""Arguments of a kernel by parameter name, in the order of its parameters."""


class Call(NamedTuple):
    """A kernel with all of its arguments but the first: tensors, None, a number for a slope."""

    kernel: Any
    launch: Launch
    arguments: Values
    compiled: dict[tuple[Any, ...], Callable[..., None]]
    """Launches of compiled kernels, by what Triton specialises the other arguments on."""


def bind(kernel: Any, launch: Launch, **constants: Any) -> Call:
    """The call of a launch, with the sizes and constants that the kernel has parameters for."""
    known = {**launch.sizes, **launch.constants, **constants}
    arguments = {name: known[name] for name in kernel.arg_names if name in known}
    return Call(kernel, launch, arguments, {})


def run(call: Call, values: Values) -> None:
    """Launches a kernel on tensors: the one place that does."""
    _executed_by(call, values)


@contextlib.contextmanager
def intercepting(function: Callable[[Call, Values], None]) -> Iterator[None]:
    """Gives every launch to a function for a block, in the whole process: for tests and inspection.

    The function calls :func:`execute`, or launches nothing.
    """
    global _executed_by
    before, _executed_by = _executed_by, function
    try:
        yield
    finally:
        _executed_by = before


def execute(call: Call, values: Values) -> None:
    """Launches a kernel, or interprets it."""
    if INTERPRETED:
        _interpret(call, values)
        return
    first = next(iter(values.values()))  # a tensor
    # Mostly it is, and `with` takes longer than to ask.
    if driver.active.get_current_device() != (device := first.get_device()):
        with on(first.device):
            _launch(call, values, device)
    else:
        _launch(call, values, device)


def _launch(call: Call, values: Values, device: int) -> None:
    """Launches a kernel on the current device."""
    if LOOK_UP_BECAUSE:
        _look_up_and_launch(call, values)
        return
    key = specialization(device, values)
    launch = call.compiled.get(key)
    if launch is not None:
        launch(*values.values(), *call.arguments.values())
        return
    compiled = _look_up_and_launch(call, values)
    # Not what a hook has kept from being compiled, or is still being compiled.
    if isinstance(compiled, CompiledKernel):
        given = [*values, *call.arguments]
        assert given == call.kernel.arg_names, f"{given} is not in the kernel's order"
        # This keeps the kernel loaded.
        call.compiled[key] = compiled[(*call.launch.grid, 1, 1)[:3]]


_executed_by: Callable[[Call, Values], None] = execute


def _look_up_and_launch(call: Call, values: Values) -> Any:
    """Launches through Triton's look-up of what it has compiled; gives that."""
    kernel, launch = call.kernel, call.launch
    return kernel[launch.grid](**values, **call.arguments, num_warps=launch.num_warps)


def specialization(device: int, values: Values) -> tuple[object, ...]:
    """What decides which machine code Triton makes for a call's values, on NVIDIA's GPUs."""
    key: list[object] = [device]
    for value in values.values():
        if value is None or type(value) is float:
            key.append(value is None)
        else:
            key.append(value.dtype)
            key.append(value.data_ptr() % 16 == 0)
    return tuple(key)


def _interpret(call: Call, values: Values) -> None:
    """Runs an interpreted kernel, with bfloat16 brought in and out as float32.

    The interpreter truncates bfloat16 stores, where a GPU rounds to nearest even.
    """
    import numpy  # the interpreter's need, not a dependency of ours

    def staged(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.bfloat16:
            return value
        # What lies between the elements comes along: strides stay.
        strides = zip(value.shape, value.stride(), strict=True)
        memory = value.as_strided((1 + sum((size - 1) * step for size, step in strides),), (1,))
        return memory.float().as_strided(value.shape, value.stride())

    by_name = {name: staged(value) for name, value in values.items()}
    # NumPy warns of infinities and NaN, which a GPU computes like other values. The interpreter
    # keeps the program it runs in global variables.
    with _INTERPRETER, numpy.errstate(all="ignore"):
        call.kernel[call.launch.grid](**by_name, **call.arguments)
    for name, value in values.items():
        if name not in _INPUTS and value is not by_name[name]:
            value.copy_(by_name[name])


def counters(device: torch.device, channels: int) -> Tensor:
    """Zeros, one for each channel, that the kernel leaves as zeros.

    Launches on one stream follow each other, so a stream has one set of them. A CUDA graph, which
    may be replayed on any, has its own.
    """
    stream = 0
    if device.type == "cuda":
        with on(device):
            if torch.cuda.is_current_stream_capturing():
                return torch.zeros(channels, dtype=torch.int32, device=device)
            stream = driver.active.get_current_stream(device.index)
    zeros = _COUNTERS.get((device, stream))
    if zeros is None or zeros.numel() < channels:
        zeros = torch.zeros(max(channels, 1024), dtype=torch.int32, device=device)
        _COUNTERS[device, stream] = zeros
    return zeros


_UNCHANGED = contextlib.nullcontext()


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes `device` the current one, which it mostly is already."""
    if driver.active.get_current_device() == device.index:
        return _UNCHANGED
    context: contextlib.AbstractContextManager[Any]
    context = torch.get_device_module(device.type).device(device)
    return context
