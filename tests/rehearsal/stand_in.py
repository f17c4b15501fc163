"""Stands in for torch.cuda where there is no GPU: tests and programs for a GPU run unchanged.

Tensors lie in the CPU's memory and say that they are on cuda:0. PyTorch's operators compute on
them as on a CPU. Triton compiles its kernels for a GPU, and the emulator of `ptx` runs them, each
launch before the next: nothing shows of streams that race, of caches, or of time. Its clock is made
up, and memory is not counted. What it does not stand in for raises NotRehearsedError, which pytest
reports as a skip with its reason.
"""

import contextlib
import functools
import threading
import time
import unittest
from types import SimpleNamespace

import torch
from torch.utils import _device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(
    name="Emulated H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    L2_cache_size=2**11,  # a set or two of small inputs fill it three times
    total_memory=80 * 2**30,
)
EVENT_S = 1e-6
CYCLES_PER_S = 2**31


class NotRehearsedError(unittest.SkipTest):
    """What only a GPU can do."""


# Time, streams, events


class Clock:
    """The time of the host without what the emulator takes of it, and when the device is done."""

    def __init__(self):
        self.emulated = self.done = 0.0

    def now(self):
        return time.perf_counter() - self.emulated

    def work(self, seconds):
        """Queues work of the device; gives when it will be done."""
        self.done = max(self.done, self.now()) + seconds
        return self.done

    def wait(self, until):
        while self.now() < until:
            time.sleep(0)


CLOCK = Clock()


class Stream:
    """An identity: all streams run their work in the order in which the host asks for it."""

    count = 0

    def __init__(self, device=None, priority=0):
        self.cuda_stream = Stream.count
        Stream.count += 1

    def synchronize(self):
        synchronize()

    def is_capturing(self):
        return is_capturing()

    def wait_stream(self, stream):
        pass  # its work is done


class Event:
    def __init__(self, enable_timing=False):
        self.at = None

    def record(self, stream=None):
        self.at = CLOCK.work(EVENT_S)

    def query(self):
        return CLOCK.now() >= self.at

    def synchronize(self):
        CLOCK.wait(self.at)

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


DEFAULT_STREAM = Stream()
CURRENT = threading.local()


def current_stream(device=None):
    return getattr(CURRENT, "stream", DEFAULT_STREAM)


@contextlib.contextmanager
def stream(new):
    before, CURRENT.stream = current_stream(), new
    try:
        yield
    finally:
        CURRENT.stream = before


def is_capturing():
    return Graph.capturing is not None


def synchronize(device=None):
    if is_capturing():
        raise RuntimeError("operation not permitted when stream is capturing")
    CLOCK.wait(CLOCK.done)


# Graphs


class Graph(TorchDispatchMode):
    """A CUDA graph: the launches and PyTorch's operators of a capture, which a replay runs again.

    As on a GPU, a capture launches nothing: results are there after the first replay only. Unlike
    there it is a dispatch mode, so that our kernels are called as operators of the dispatcher, and
    Leaky ReLU in place is PyTorch's.
    """

    capturing = None

    def __init__(self, keep_graph=False):
        super().__init__()
        self._steps = []

    def capture_begin(self, *pool, **options):
        Graph.capturing = self
        self.__enter__()

    def capture_end(self):
        self.__exit__(None, None, None)
        Graph.capturing = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        call = functools.partial(function, *args, **(kwargs or {}))
        known = len(self._steps)
        results = call()
        if len(self._steps) == known:  # else it is one of ours, which has added its launches
            self.add(functools.partial(self._run_again, call, results))
        return results

    def add(self, step):
        """Takes note of a launch or an operator."""
        self._steps.append(step)

    def replay(self):
        for step in self._steps:
            step()

    def pool(self):
        return 0, 0

    def _run_again(self, call, results):
        with torch.no_grad():
            for old, new in zip(tree_leaves(results), tree_leaves(call()), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


# PyTorch


def not_rehearsed(what):
    """A function of PyTorch that raises."""

    def refuse(*args, **kwargs):
        raise NotRehearsedError(f"{what} is not rehearsed: it needs a GPU")

    return refuse


def on_cpu(device):
    """The CPU for the stand-in's device; any other as it is."""
    if isinstance(device, int) and not isinstance(device, bool):
        return "cpu"
    if isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda":
        return "cpu"
    return device


def with_cpu(function):
    """A function of PyTorch that takes the CPU for the stand-in's device, wherever it is given."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if "device" in kwargs:
            kwargs["device"] = on_cpu(kwargs["device"])
        return function(*args, **kwargs)

    return call


def install():
    """Replaces what PyTorch knows of GPUs, for the rest of the process."""
    replace_devices()
    replace_tensors()
    replace_keys()
    torch.compile = not_rehearsed("torch.compile")


def replace_devices():
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_name": lambda device=None: PROPERTIES.name,
        "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
        "is_current_stream_capturing": is_capturing,
        "_sleep": lambda cycles: CLOCK.work(cycles / CYCLES_PER_S),
        "empty_cache": lambda: None,
        "current_stream": current_stream,
        "stream": stream,
        "synchronize": synchronize,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
    }
    accelerator = {
        "is_available": lambda: True,
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "device_count": lambda: 1,
        "current_device_index": lambda: 0,
        "current_stream": current_stream,
        "synchronize": synchronize,
    }
    memory = ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats")
    not_counted = {name: lambda device=None: 0 for name in memory}
    for module, replaced in (
        (torch.version, {"cuda": "13.0"}),
        # What PyTorch's own functions around a capture call.
        (torch._C, {"_host_emptyCache": lambda: None}),
        (torch.cuda.graphs, {"_graph_pool_handle": lambda: (0, 0)}),
        (torch.cuda, cuda | not_counted),
        (torch.accelerator, accelerator | not_counted),
    ):
        for name, value in replaced.items():
            setattr(module, name, value)


def replace_tensors():
    real_device = torch._C.TensorBase.device.__get__

    def device(tensor):
        real = real_device(tensor)
        return DEVICE if real.type == "cpu" else real

    torch.Tensor.device = property(device)
    torch.Tensor.is_cuda = property(lambda tensor: tensor.device.type == "cuda")
    torch.Tensor.get_device = lambda tensor: -1 if tensor.device.index is None else 0
    for name in (function.__name__ for function in _device._device_constructors()):
        if hasattr(torch, name):
            setattr(torch, name, with_cpu(getattr(torch, name)))
    for owner, prefix, suffix in ((torch, "", "_like"), (torch.Tensor, "new_", "")):
        for name in dir(owner):
            if name.startswith(prefix) and name.endswith(suffix):
                setattr(owner, name, with_cpu(getattr(owner, name)))
    to = with_cpu(torch.Tensor.to)
    torch.Tensor.to = lambda tensor, *args, **kwargs: to(tensor, *map(on_cpu, args), **kwargs)
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor
    context = _device.DeviceContext.__init__
    _device.DeviceContext.__init__ = lambda self, device: context(self, on_cpu(device))


def replace_keys():
    """What PyTorch keeps for each type of device: operators, and the state of autocast."""
    enter = torch.autocast.__init__

    def key_on_cpu(key):
        return "CPU" if key == "CUDA" else key

    def autocast(self, device_type, *args, **kwargs):
        enter(self, on_cpu(device_type), *args, **kwargs)

    torch.autocast.__init__ = autocast
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        asked = getattr(torch, name)
        setattr(torch, name, lambda *device, asked=asked: asked(*map(on_cpu, device)))
    get_kernel, impl = torch.library.get_kernel, torch.library.Library.impl
    torch.library.get_kernel = lambda op, key: get_kernel(op, key_on_cpu(key))

    def impl_on_cpu(library, op, function, key="", **options):
        key = key_on_cpu(key) if str(op).startswith("_prelu_kernel") else key
        return impl(library, op, function, key, **options)

    torch.library.Library.impl = impl_on_cpu
