"""Triton's driver for an H100 that is the emulator: Triton's own JIT compiles and launches here.

A launch checks its arguments against what the kernel was compiled for, so that one which is cached
under the wrong key is a Fault and not a wrong result.
"""

import contextlib
import itertools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

import prelu_gpu
from prelu_gpu import backend, rules, run

from .instructions import Fault, kernel_of
from .machine import Launch, Range

MULTIPROCESSORS = 132
CPU = -1
"""The index of its device, to PyTorch."""
_DTYPES = {
    "i1": np.dtype(bool),
    "fp32": np.dtype(np.float32),
    "fp64": np.dtype(np.float64),
    **{
        f"{kind}{bits}": np.dtype(f"{kind}{bits // 8}") for kind in "iu" for bits in (8, 16, 32, 64)
    },
}
_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Options:
    """How launches run."""

    mode: str = "lockstep"
    """Or "interleaved", or "weak"."""
    seed: int = 0
    policy: str = "stale"
    """Which of the values that it may a weak load sees: the oldest, or a "random" one."""
    window: int = 1 << 30
    """CTAs that are resident at once, when they do not run in lockstep."""
    ctas: Callable | None = None
    """Which CTAs run, of a launch of so many, in lockstep; all of them if None."""
    complete: bool = True
    """Whether a launch must write every element of its outputs."""
    edit: Callable | None = None
    """Changes the text of PTX before it runs."""
    trace: list | None = None
    """Takes (whether it is a store, bytes, CTA of each lane, addresses) for every access."""
    count: bool = True
    """Whether launches have stats."""


_options = Options(count=False)
_launches = None
"""Where launches are kept."""

_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def emulation(**options):
    """Runs the launches of a block with these Options, in the whole process, and lists them."""
    global _options, _launches
    before = _options, _launches
    _options, _launches = Options(**options), []
    try:
        yield _launches
    finally:
        _options, _launches = before


@dataclass(frozen=True)
class Loaded:
    """A kernel in a device's memory."""

    ptx: str
    shared: int
    device: int


class Driver:
    """An H100, or several, as Triton sees them."""

    def __init__(self):
        self.utils = self
        self.launcher_cls = Launcher
        self.functions = {}
        """What is loaded, by handle."""
        self.loads = []
        """(name, device) of each load."""
        self._device, self._handles = 0, itertools.count(1)

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return self._device

    def set_current_device(self, device):
        self._device = device

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, type_):
        return type_

    def get_device_properties(self, device):
        return {
            "max_shared_mem": 232448,
            "multiprocessor_count": MULTIPROCESSORS,
            "max_num_regs": 65536,
            "warpSize": 32,
        }

    def load_binary(self, name, binary, shared, device):
        """Gives module, function, and registers, spills and threads as if ptxas had said them."""
        handle = next(self._handles)
        self.functions[handle] = Loaded(binary.decode(), shared, device)
        self.loads.append((name, device))
        return handle, handle, 32, 0, 1024

    def unload_module(self, module):
        del self.functions[module]


class Launcher:
    """Launches one kernel, as often as it is called."""

    def __init__(self, src, metadata):
        self.signature = src.signature
        self.constants = {src.fn.arg_names[place]: v for (place,), v in src.constants.items()}
        self.divisible = {
            src.fn.arg_names[place]
            for (place,), attributes in src.attrs.items()
            if ["tt.divisibility", 16] in attributes
        }

    def __call__(
        self, x, y, z, stream, function, kernel_metadata, launch_metadata, enter, leave, *arguments
    ):
        driver = triton.runtime.driver.active
        loaded = driver.functions.get(function)
        if loaded is None:
            raise Fault("launch of a kernel that is not loaded, or not any more")
        if loaded.device != (current := driver.get_current_device()):
            raise Fault(f"launch on device {current} of device {loaded.device}'s kernel")
        if not (0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16):
            raise Fault(f"no such grid: {(x, y, z)}")
        with _one_at_a_time:
            ptx = _options.edit(loaded.ptx) if _options.edit else loaded.ptx
            kernel = kernel_of(ptx, loaded.shared)
            ranges, values = self._passed(arguments)
            # Triton's own last ones, for memory that these kernels do not ask for.
            values += [np.uint64(0)] * (len(kernel.parameters) - len(values))
            parameters = dict(zip(kernel.parameters, values, strict=True))
            if enter is not None:
                enter(launch_metadata)
            launch = Launch(kernel, (x, y, z), parameters, ranges, _options)
            if leave is not None:
                leave(launch_metadata)
            if _launches is not None:
                _launches.append(launch)

    def _passed(self, arguments):
        """The memory that arguments point to, and what the kernel is given."""
        ranges, values = [], []
        for (name, kind), value in zip(self.signature.items(), arguments, strict=True):
            if kind == "constexpr":
                if value != self.constants[name] or type(value) is not type(self.constants[name]):
                    raise Fault(f"{name} is {value} for a kernel of {self.constants[name]}")
                continue
            if kind[0] == "*":
                if _POINTERS[value.dtype] != kind:
                    raise Fault(f"{name} is {value.dtype} for a kernel of {kind}")
                ranges.append(Range(name, value, writable=name not in run._INPUTS))
                values.append(np.uint64(value.data_ptr()))
            else:
                try:
                    values.append(np.array(value, _DTYPES[kind])[()])
                except OverflowError:
                    raise Fault(f"{name} is {value} for a kernel of {kind}") from None
            if name in self.divisible and int(values[-1]) % 16:
                raise Fault(f"{name} is {values[-1]} for a kernel of multiples of 16")
        return ranges, values


def _stop_at_ptx(compiler=None, stages=None, *others):
    """A stage for Triton's pipeline: its binary is the PTX, as nothing here runs machine code."""
    if stages is None:
        return "ptx", "ptx"  # part of the keys of Triton's caches
    stages["cubin"] = lambda ptx, metadata: ptx.encode()
    return None


_FOREVER = contextlib.ExitStack()


def activate():
    """Makes Triton compile for the emulator and launch there; gives the driver."""
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    triton.knobs.runtime.add_stages_inspection_hook = _stop_at_ptx
    # Triton 3.6 has no such key: a folder apart from the one of machine code.
    triton.knobs.cache.dir = os.path.join(triton.knobs.cache.dir, "ptx")
    return driver


def install():
    """Makes prelu_gpu run its kernels in the emulator, on CPU tensors of any size, once a process.

    Gives the driver.
    """
    if backend.INTERPRETED:
        raise RuntimeError(
            "kernels are interpreted: unset TRITON_INTERPRET before the first import"
        )
    driver = activate()
    backend.KERNEL_DEVICES = (*backend.KERNEL_DEVICES, "cpu")
    driver.set_current_device(CPU)
    _FOREVER.enter_context(
        rules.using_rules(
            lambda device, itemsize, backward: rules.gpu_rules(MULTIPROCESSORS, itemsize, backward)
        )
    )
    prelu_gpu.set_kernel_threshold(0)
    return driver
