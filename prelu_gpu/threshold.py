"""The size from which the kernels serve: below it PyTorch's operator does, where it may.

A GPU runs behind the host: of a call's host time and its time on the GPU the longer one counts.
Kernels take the host longer than PyTorch's operators, so they serve from the size on at which
PyTorch's take the GPU that long at least.
"""

import contextlib
import operator
import os
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .backend import INTERPRETED


class Cost(NamedTuple):
    """What a call costs."""

    host: float
    """Microseconds of the kernels' host time, launches left out, where torch.prelu takes 1.0."""
    launches: int
    """Kernels that it launches."""
    passes: int
    """PyTorch's passes over memory the size of the input, with a dense output gradient:
    `python -m benchmarks traffic`."""

    def nbytes(self, bandwidth: float) -> float:
        """Bytes of input that take PyTorch as long as the kernels' host time."""
        return (self.host + self.launches * LAUNCH) * 1e-6 * bandwidth / self.passes


LAUNCH = 4.0
"""Microseconds of host time of one launch by CUDA's driver: an estimate, until it is measured."""

H100 = 3.35e12
"""Bytes a second of an H100's memory, by its data sheet. Its cache is quicker: where tensors stay
in it the true limit is higher."""

COSTS = {
    "prelu": Cost(host=5.0, launches=1, passes=2),
    "prelu and its backward": Cost(host=23.5, launches=2, passes=7),
    "leaky_relu": Cost(host=4.0, launches=1, passes=2),
    "leaky_relu and its backward": Cost(host=19.0, launches=2, passes=5),
    "batch_norm_prelu": Cost(host=16.0, launches=3, passes=5),
    "batch_norm_prelu and its backward": Cost(host=54.0, launches=6, passes=15),
    "batch_norm_prelu in evaluation": Cost(host=14.0, launches=2, passes=4),
}
"""Held by tests/host/test_host.py. Under autocast PReLU has no limit: eager launches five kernels
for a training step and takes the host as long as the two here."""


def default_bytes(bandwidth: float) -> int:
    """Bytes of an input that take PyTorch as long as the kernels' host time, in all the calls."""
    return int(max(cost.nbytes(bandwidth) for cost in COSTS.values()))


class _Defaults(dict[int, int]):
    def __missing__(self, index: int) -> int:
        self[index] = nbytes = default_bytes(_bandwidth(index))
        return nbytes


def _bandwidth(index: int) -> float:
    if index < 0 or not torch.cuda.is_available() or torch.version.hip is not None:
        return H100  # there is none, or none that says
    properties = torch.cuda.get_device_properties(index)
    try:
        kilohertz, bits = properties.memory_clock_rate, properties.memory_bus_width
    except AttributeError:  # an older PyTorch
        return H100
    return 2 * kilohertz * 1e3 * bits / 8 or H100


defaults = _Defaults()
"""Bytes of an input from which the kernels serve by default, by the index of its device."""

DEFAULT = 0 if INTERPRETED else None
"""Interpreted kernels are for tests and learning, and serve at every size."""

_LOCK = threading.Lock()
_setting: int | None = DEFAULT
_blocks: list["_Block"] = []
"""The `kernel_threshold` blocks that are open, in the order of their opening."""

elements: int | None = DEFAULT
"""The threshold in force, None for `defaults`: read at every call, and written here alone."""


class _Block:
    def __init__(self, elements: int | None) -> None:
        self.elements = elements
        self.thread = threading.get_ident()


def get_kernel_threshold() -> int | None:
    """Number of elements of an input from which the kernels serve a call; None for the default."""
    return elements


def set_kernel_threshold(elements: int | None) -> None:
    """Sets the number of elements of an input from which the kernels serve a call.

    Below it PyTorch's own operator serves where it is quicker: its results are identical, but that
    in half precision it rounds every product of the slope gradient. 0 means always the kernels,
    which sum it in float32. The setting holds for the whole process, except within blocks of
    :func:`kernel_threshold`. Compiled, traced and exported graphs never depend on the size.

    Args:
        elements: 0 or more; None for the default. It follows from the host's costs and the GPU's
            memory bandwidth: 19 MB of input on an H100, 4.7 million elements of float32. Under
            TRITON_INTERPRET=1 it is 0.

    Raises:
        TypeError: `elements` is not an integer.
        ValueError: `elements` is negative.
    """
    global _setting
    checked = DEFAULT if elements is None else _checked("set_kernel_threshold", elements)
    with _LOCK:
        _setting = checked
        _update()


def kernel_threshold(elements: int | None) -> contextlib.AbstractContextManager[None]:
    """:func:`set_kernel_threshold` for a block, or as a decorator for a function (no generator).

    The block counts in every thread, since backward passes run in threads of their own. If blocks
    overlap, the one that was opened last counts. Use it around compiled functions, not in them.

    >>> with prelu_gpu.kernel_threshold(0):
    ...     loss(model(x)).backward()  # by the kernels, however small x is

    Args:
        elements: 0 or more; None for the default.

    Raises:
        TypeError: `elements` is not an integer.
        ValueError: `elements` is negative.
    """
    return _block(DEFAULT if elements is None else _checked("kernel_threshold", elements))


@contextlib.contextmanager
def _block(elements: int | None) -> Iterator[None]:
    block = _Block(elements)
    with _LOCK:
        _blocks.append(block)
        _update()
    try:
        yield
    finally:
        with _LOCK:
            _blocks.remove(block)
            _update()


def _update() -> None:
    global elements
    elements = _blocks[-1].elements if _blocks else _setting


def _after_fork() -> None:
    """A child has only the thread that forked: nobody would close the blocks of the others."""
    _blocks[:] = [block for block in _blocks if block.thread == threading.get_ident()]
    _update()
    _LOCK.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_after_fork
    )


def _checked(function: str, elements: int) -> int:
    try:
        checked = operator.index(elements)
    except TypeError:
        raise TypeError(
            f"{function}(): argument 'elements' must be int, not {type(elements).__name__}"
        ) from None
    if checked < 0:
        raise ValueError(
            f"{function}(): got {checked} elements. 0 or more is allowed; 0 means that the kernels "
            "serve at every size."
        )
    return checked
