"""The size from which the kernels serve, as a setting."""

import contextlib
import os
import threading

import pytest
import torch
from support import run_program

import prelu_gpu
from prelu_gpu import get_kernel_threshold, kernel_threshold, set_kernel_threshold, threshold


@pytest.fixture(autouse=True)
def kernels_at_every_size():
    """Not here: the threshold is as a user has it."""
    yield
    set_kernel_threshold(None)


def serves(elements, device, launches):
    """Whether a kernel serves an input of so many elements."""
    before = len(launches)
    x = torch.ones(elements, device=device)
    prelu_gpu.prelu(x, torch.ones(1, device=device))
    return len(launches) > before


def test_the_kernels_serve_from_it_on(device, launches):
    set_kernel_threshold(100)
    assert get_kernel_threshold() == 100
    assert [serves(n, device, launches) for n in (99, 100)] == [False, True]
    with kernel_threshold(0):
        assert serves(1, device, launches)
    assert not serves(99, device, launches)


def test_none_brings_back_the_default():
    default = get_kernel_threshold()
    assert default == threshold.DEFAULT
    set_kernel_threshold(5)
    set_kernel_threshold(None)
    assert get_kernel_threshold() == default


def test_a_block_may_have_the_default_too():
    set_kernel_threshold(5)
    with kernel_threshold(None):
        assert get_kernel_threshold() == threshold.DEFAULT


def test_blocks_in_blocks_and_exceptions_restore_what_was_before():
    set_kernel_threshold(7)
    with kernel_threshold(1):
        with contextlib.suppress(KeyError), kernel_threshold(2):
            assert get_kernel_threshold() == 2
            raise KeyError
        assert get_kernel_threshold() == 1
        set_kernel_threshold(8)
        assert get_kernel_threshold() == 1
    assert get_kernel_threshold() == 8


def test_a_decorator():
    @kernel_threshold(3)
    def function():
        return get_kernel_threshold()

    set_kernel_threshold(7)
    assert [function(), function(), get_kernel_threshold()] == [3, 3, 7]


def test_a_block_counts_in_other_threads_and_blocks_may_end_in_any_order():
    set_kernel_threshold(7)
    opened, end = threading.Event(), threading.Event()

    def other():
        with kernel_threshold(2):
            opened.set()
            end.wait(10)

    thread = threading.Thread(target=other)
    with kernel_threshold(1):
        thread.start()
        assert opened.wait(10)
        assert get_kernel_threshold() == 2
    assert get_kernel_threshold() == 2
    end.set()
    thread.join()
    assert get_kernel_threshold() == 7


def test_many_threads_leave_it_as_it_was():
    set_kernel_threshold(7)
    start = threading.Barrier(8)

    def open_and_close(n):
        start.wait(10)
        for _ in range(300):
            with kernel_threshold(n):
                assert get_kernel_threshold() != 7

    threads = [threading.Thread(target=open_and_close, args=(n,)) for n in range(10, 18)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert get_kernel_threshold() == 7
    assert threshold._blocks == []


@pytest.mark.parametrize("function", [set_kernel_threshold, kernel_threshold])
def test_wrong_thresholds(function):
    name = function.__name__
    for wrong in (1.5, "4", torch.ones(2)):
        with pytest.raises(TypeError, match=rf"{name}\(\): argument 'elements' must be int, not "):
            function(wrong)
    with pytest.raises(ValueError, match=rf"{name}\(\): got -1 elements. 0 or more is allowed"):
        function(-1)
    assert get_kernel_threshold() == threshold.DEFAULT


FORK = """
import os, threading, prelu_gpu

opened, end = threading.Event(), threading.Event()

def other():
    with prelu_gpu.kernel_threshold(77):
        opened.set()
        end.wait()

thread = threading.Thread(target=other)
with prelu_gpu.kernel_threshold(5):
    thread.start()
    opened.wait()
    child = os.fork()
    if not child:
        os._exit(prelu_gpu.get_kernel_threshold())
    assert prelu_gpu.get_kernel_threshold() == 77
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    end.set()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_keeps_the_blocks_of_its_own_thread():
    assert run_program(FORK, "-W", "ignore")[0] == "5\n"
