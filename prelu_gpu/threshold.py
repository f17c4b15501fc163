"""The size from which the kernels serve: below it PyTorch's operator does, where it gives the same.

Host time decides for small inputs, and PyTorch's operator takes the least of it.
"""

import contextlib
import operator
import os
import threading
from collections.abc import Iterator

from .backend import INTERPRETED

DEFAULT = 0 if INTERPRETED else 2**22
"""By arithmetic, until a GPU has measured it: a launch through Triton takes the host about 17
microseconds. In that time PyTorch's forward, at some 2.6 TB/s, computes 2**22 elements of float32
on an H100. Interpreted kernels are for tests and learning, and serve at every size."""

_LOCK = threading.Lock()
_setting = DEFAULT
_blocks: list["_Block"] = []
"""The `kernel_threshold` blocks that are open, in the order of their opening."""

elements = DEFAULT
"""The threshold in force: read at every call, and written by this module alone."""


class _Block:
    def __init__(self, elements: int) -> None:
        self.elements = elements
        self.thread = threading.get_ident()


def get_kernel_threshold() -> int:
    """Number of elements of an input from which the kernels serve a call."""
    return elements


def set_kernel_threshold(elements: int | None) -> None:
    """Sets the number of elements of an input from which the kernels serve a call.

    Below it PyTorch's own operator serves where its result is identical; 0 means always the
    kernels. It holds for the whole process, except within blocks of :func:`kernel_threshold`.
    Compiled, traced and exported graphs never depend on the size.

    Args:
        elements: 0 or more; None for the default, 2**22 (0 under TRITON_INTERPRET=1).

    Raises:
        TypeError: `elements` is not an integer.
        ValueError: `elements` is negative.
    """
    global _setting
    checked = DEFAULT if elements is None else _checked("set_kernel_threshold", elements)
    with _LOCK:
        _setting = checked
        _update()


def kernel_threshold(elements: int) -> contextlib.AbstractContextManager[None]:
    """:func:`set_kernel_threshold` for a block, or as a decorator for a function (no generator).

    The block counts in every thread, since backward passes run in threads of their own. If blocks
    overlap, the one that was opened last counts. Use it around compiled functions, not in them.

    >>> with prelu_gpu.kernel_threshold(0):
    ...     loss(model(x)).backward()  # by the kernels, however small x is

    Args:
        elements: 0 or more.

    Raises:
        TypeError: `elements` is not an integer.
        ValueError: `elements` is negative.
    """
    return _block(_checked("kernel_threshold", elements))


@contextlib.contextmanager
def _block(elements: int) -> Iterator[None]:
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
