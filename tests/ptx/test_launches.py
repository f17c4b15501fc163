"""What the emulator checks of a launch: its arguments, its device, and every access to memory."""

import re

import pytest
import torch
import triton
import triton.language as tl
from support import randn

from prelu_gpu import prelu
from prelu_gpu.rules import Kind
from ptx import driver
from ptx.instructions import Fault
from ptx.machine import AddressOnly

pytestmark = pytest.mark.emulated


@triton.jit
def add(x_ptr, y_ptr, n, number, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """y = x + number, of n elements; reads SHIFT elements behind its own."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets + SHIFT, offsets < n, 0.0)
    tl.store(y_ptr + offsets, x + number, offsets < n)


@triton.jit
def write_input(x_ptr, y_ptr):
    tl.store(x_ptr, tl.load(y_ptr))


@triton.jit
def reverse_halves(y_ptr, x_ptr, BLOCK: tl.constexpr):
    """Each program writes the middle of what all of them write."""
    offsets = tl.program_id(0) * BLOCK // 2 + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets))


@pytest.fixture
def active():
    there = triton.runtime.driver.active
    yield there
    there.set_current_device(driver.CPU)


@pytest.fixture
def x():
    return torch.arange(100.0)


def launch(x, y, *, n=None, shift=0, block=32):
    n = y.numel() if n is None else n
    return add[(triton.cdiv(n, block),)](x, y, n, 0.5, SHIFT=shift, BLOCK=block, num_warps=1)


@pytest.mark.parametrize("mode", ["lockstep", "interleaved", "weak"])
def test_what_a_launch_does_is_computed_and_counted(mode, x):
    y = torch.empty_like(x)
    with driver.emulation(mode=mode) as launches:
        launch(x, y)
    assert torch.equal(y, x + 0.5)
    (one,) = launches
    assert (one.kernel.name, one.grid) == ("add", (4, 1, 1))
    assert (one.stats.bytes_read, one.stats.bytes_written) == (400, 400)
    assert one.stats.read == {"x_ptr": 400}
    assert one.stats.widths == {("ld", 4): 100, ("st", 4): 100}
    # 32 bytes each.
    assert one.stats.sectors == one.stats.ideal_sectors == 2 * 13
    assert one.stats.instructions > one.stats.moves > 0


def test_an_input_off_the_grid_of_sectors_touches_one_more_a_warp(x):
    with driver.emulation() as launches:
        launch(x[1:], torch.empty(96))
    assert launches[0].stats.ideal_sectors == 2 * 12
    assert launches[0].stats.sectors == 2 * 12 + 3


def test_launches_outside_of_a_block_are_not_kept(x):
    with driver.emulation() as launches:
        pass
    launch(x, torch.empty_like(x))
    assert launches == []


# Memory


def refuses(message):
    return pytest.raises(Fault, match=message)


def test_a_load_outside_of_its_tensor(x):
    with refuses("outside of what may be accessed"):
        launch(x, torch.empty_like(x), shift=1)


def test_a_load_between_a_tensors_elements(x):
    sparse = torch.zeros(200)[::2]
    with refuses("outside of what may be accessed"):
        launch(sparse, torch.empty_like(x))


def test_a_store_outside_of_its_tensor(x):
    with refuses("outside of what may be accessed"):
        launch(x, torch.empty(99), n=100)


def test_a_store_to_an_input(x):
    with refuses("outside of what may be accessed"):
        write_input[(1,)](x, torch.empty_like(x))


def test_an_element_that_is_not_written(x):
    with refuses("1 elements of y_ptr are not written"):
        launch(x, torch.empty_like(x), n=99)


@pytest.mark.parametrize("mode", ["lockstep", "interleaved", "weak"])
def test_an_element_that_is_written_twice(mode, x):
    with refuses("an element of y_ptr is written twice"), driver.emulation(mode=mode):
        reverse_halves[(2,)](torch.empty(48), x, BLOCK=32)


def test_a_vector_that_is_not_aligned(x):
    def unaligned(ptx):
        return ptx.replace("st.global.b32 [ %rd2 + 0 ]", "st.global.b32 [ %rd2 + 2 ]")

    with refuses("misaligned for 4 bytes"), driver.emulation(edit=unaligned):
        launch(x, torch.empty_like(x))


def test_addresses_without_memory_are_checked_alike():
    device = torch.device("cpu")
    large = [AddressOnly(torch.float32, 2**31, at << 44, device) for at in (1, 2)]
    trace = []
    with driver.emulation(ctas=lambda count: [0, count - 1], trace=trace, complete=False):
        add[(2**26,)](*large, 2**31, 1.0, SHIFT=0, BLOCK=32)
        assert {size for _, size, _, _ in trace} == {4}
        assert max(at.max() for *_, at in trace) == (2 << 44) + 4 * (2**31 - 1)
        with refuses("outside of what may be accessed"):
            add[(2**26,)](*large, 2**31, 1.0, SHIFT=1, BLOCK=32)


# Arguments and devices

GRID = (4, 1, 1)


@pytest.mark.parametrize(
    ("n", "change", "message"),
    [
        (112, {2: 100}, "n is 100 for a kernel of multiples of 16"),
        (1, {2: 100}, "n is 100 for a kernel of 1"),
        (112, {4: 1}, "SHIFT is 1 for a kernel of 0"),
        (112, {1: torch.empty(112).half()}, "y_ptr is torch.float16 for a kernel of .fp32"),
        (112, {0: torch.empty(113)[1:]}, "x_ptr is .* for a kernel of multiples of 16"),
        (112, {2: 2**31}, "n is 2147483648 for a kernel of i32"),
    ],
)
def test_arguments_that_a_kernel_was_not_compiled_for(n, change, message):
    x = torch.ones(112)
    y = torch.empty(n)
    compiled = launch(x, y, n=n)
    arguments = dict(enumerate((x, torch.empty(n), n, 0.5, 0, 32)))
    compiled[GRID](*arguments.values())
    with refuses(message):
        compiled[GRID](*{**arguments, **change}.values())


def test_a_kernel_runs_on_the_device_that_it_was_loaded_on(x, active):
    y = torch.empty_like(x)
    compiled = launch(x, y)
    before = len(active.loads)
    active.set_current_device(1)
    with refuses("launch on device 1 of device -1's kernel"):
        compiled[GRID](x, y, 100, 0.5, 0, 32)
    launch(x, y)
    assert active.loads[before:] == [("add", 1)]
    active.set_current_device(driver.CPU)
    launch(x, y)
    assert len(active.loads) == before + 1


def test_a_kernel_that_is_unloaded_does_not_run(x, active):
    y = torch.empty_like(x)
    compiled = launch(x, y)
    function = compiled.function
    kept = active.functions.pop(function)
    with refuses("not loaded"):
        compiled[GRID](x, y, 100, 0.5, 0, 32)
    active.functions[function] = kept


def test_a_grid_that_is_none(x):
    with refuses("no such grid"):
        launch(x, x)[(0, 1, 1)](x, torch.empty_like(x), 100, 0.5, 0, 32)


# The library's own kernels, changed

CHANGES = {
    "stores without predicates": (r"@%p\d+ (st\.global)", r"\1"),
    "loads without predicates": (r"@%p\d+ (ld\.global)", r"\1"),
    "a vector off by an element": (r"(ld\.global\.v4\.b32 \{[^}]*\}, \[ %rd\d+ \+ )0", r"\g<1>4"),
    "a vector off by another": (r"(st\.global\.v4\.b32 \[ %rd\d+ \+ )0", r"\g<1>16"),
    "bounds that are less or equal": (r"setp\.lt\.s64", "setp.le.s64"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_wrong_access_of_a_kernel_is_seen(change, device, force):
    force(Kind.ODD_PLANE)
    x = randn((3, 5, 1031), torch.float32, device)
    weight = randn((5,), torch.float32, device, seed=1)
    prelu(x, weight)
    pattern, replacement = CHANGES[change]
    with (
        pytest.raises(Fault),
        driver.emulation(edit=lambda ptx: re.sub(pattern, replacement, ptx)),
    ):
        prelu(x, weight)
