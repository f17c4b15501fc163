"""Warps of many programs in random orders, and stores that others see late: what no lockstep shows.

The planted faults are changes of the PTX that must turn these same checks red.
"""

import re

import pytest
import torch
from support import PAIRS, REDUCTIONS, assert_right, assert_same, backward, id_of, randn

from prelu_gpu import launch, leaky_relu, prelu, run
from prelu_gpu.rules import Kind
from ptx import driver
from ptx.instructions import Fault

pytestmark = pytest.mark.emulated

SHAPES = {
    Kind.FLAT: [(1, 1, 6003)],
    Kind.PLANE: [(3, 2, 1040)],
    Kind.ODD_PLANE: [(2, 3, 1043)],
    Kind.COLUMN: [(301, 30, 1), (20, 64, 9), (40, 12, 4)],
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtypes", PAIRS, ids=id_of)
@pytest.mark.parametrize("kind", list(Kind), ids=id_of)
def test_every_kernel_in_a_random_order_of_its_warps(kind, dtypes, reduction, device, force):
    force(kind, reduction)
    window = {"last program": 1 << 30, "second launch": 1, "atomic": 4}[reduction]
    for shape in SHAPES[kind]:
        x, grad_y = (randn(shape, dtypes[0], device, seed) for seed in (0, 1))
        weight = randn(shape[1:2], dtypes[1], device, seed=2)
        with driver.emulation(mode="interleaved", window=window, count=False):
            y, grad_x, grad_weight = backward(prelu, x, weight, grad_y)
        assert_right(grad_y, x, weight, y=y, grad_x=grad_x, grad_weight=grad_weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=id_of)
@pytest.mark.parametrize("size", [13, 4096, 5003])
def test_leaky_relu_in_place_in_a_random_order(size, dtype, device, force):
    force()
    x = randn((size,), dtype, device)
    expected = torch.nn.functional.leaky_relu(x, 0.1)
    with driver.emulation(mode="weak", count=False):
        leaky_relu(x, 0.1, inplace=True)
    assert_same(x, expected)


# The last program

FINISHED = {Kind.FLAT: (1, 1, 4099), Kind.PLANE: (3, 2, 1040), Kind.ODD_PLANE: (3, 3, 1030)}
ORDERS = [
    *({"mode": "interleaved", "window": window} for window in (1, 2, 5, 1 << 30)),
    *(
        {"mode": "weak", "window": window, "policy": policy}
        for window in (3, 1 << 30)
        for policy in ("stale", "random")
    ),
]


def name_of(order):
    return "-".join(str(value) for value in order.values())


def finished(kind, dtype, device):
    """Both gradients by one launch, whose last programs add up; counters are zeros after it."""
    shape = FINISHED[kind]
    x, grad_y = (randn(shape, dtype, device, seed) for seed in (0, 1))
    weight = randn(shape[1:2], dtype, device, seed=2)
    channel_dim = None if kind is Kind.FLAT else 1
    gradients = launch.prelu_backward(grad_y, x, weight, channel_dim, (True, True))
    (counters,) = run._COUNTERS.values()
    assert not counters.any()
    return gradients


@pytest.fixture
def new_counters(monkeypatch):
    monkeypatch.setattr(run, "_COUNTERS", {})


@pytest.mark.usefixtures("new_counters")
@pytest.mark.parametrize("order", ORDERS, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=id_of)
@pytest.mark.parametrize("kind", FINISHED, ids=id_of)
def test_the_last_program_adds_up_all_partial_sums(kind, dtype, order, device, force, launches):
    force(kind)
    expected = finished(kind, dtype, device)
    for seed in range(2):
        with driver.emulation(**order, seed=seed, count=False):
            gradients = finished(kind, dtype, device)
        for value, lockstep in zip(gradients, expected, strict=True):
            assert_same(value, lockstep)
    assert launches == ["plane_backward"] * 3


# Planted faults

COUNT = "atom.global.gpu.acq_rel.add.u32"


def order_of_count(order):
    return lambda ptx: ptx.replace(COUNT, COUNT.replace("acq_rel", order))


def split_at_count(ptx):
    """The lines before the count and from there on, and which of the first stores a partial sum."""
    lines = ptx.split("\n")
    count = next(n for n, line in enumerate(lines) if COUNT in line)
    before, after = lines[:count], lines[count:]
    store = max(n for n, line in enumerate(before) if "st.global.b" in line)
    return before, after, store


def stored_after_the_count(ptx):
    before, after, store = split_at_count(ptx)
    return "\n".join([*before[:store], *before[store + 1 :], after[0], before[store], *after[1:]])


def stored_by_another_thread(ptx):
    """Not by thread 0, which counts: only a barrier orders its store before the count."""
    before, after, store = split_at_count(ptx)
    thread = re.search(r"mov\.u32 \t(%r\d+), %tid\.x", ptx).group(1)
    before[store] = f"\tsetp.eq.b32 \t%p999, {thread}, 64;\n" + re.sub(
        r"@%p\d+", "@%p999", before[store]
    )
    return "\n".join([*before, *after])


def without_a_barrier(ptx):
    """None between the store and the count: there may be one of Triton's own."""
    before, after, store = split_at_count(ptx)
    between = [line for line in before[store:] if "bar.sync" not in line]
    return "\n".join([*before[:store], *between, *after])


def count_of_programs(ptx):
    """The last program is the one that finds 1 less than it should."""
    _, after, _ = split_at_count(ptx)
    behind = "\n".join(after)
    changed = re.sub(r"(setp\.ne\.b32 \t%p\d+, %r\d+, )%r\d+", r"\g<1>0", behind, count=1)
    return ptx.replace(behind, changed)


def counter_not_reset(ptx):
    """The last store of all is the counter's."""
    stores = list(re.finditer(r"@%p\d+ st\.global\.b32 [^;]*;", ptx))
    return ptx[: stores[-1].start()] + ptx[stores[-1].end() :]


FAULTS = {
    "relaxed count": order_of_count("relaxed"),
    "count that only releases": order_of_count("release"),
    "count that only acquires": order_of_count("acquire"),
    "partial sum stored after the count": stored_after_the_count,
    "no barrier before the count of another thread": lambda ptx: without_a_barrier(
        stored_by_another_thread(ptx)
    ),
    "wrong number of programs": count_of_programs,
    "counter not reset": counter_not_reset,
}


def in_every_order(kind, edit, device):
    """Whether each order gives the gradients of the kernel as it is."""
    expected = finished(kind, torch.float32, device)
    for order in ORDERS:
        run._COUNTERS.clear()
        try:
            with driver.emulation(**order, edit=edit, count=False):
                gradients = finished(kind, torch.float32, device)
        except (Fault, AssertionError):
            yield False
        else:
            yield all(map(torch.equal, gradients, expected))


@pytest.mark.usefixtures("new_counters")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", FINISHED, ids=id_of)
def test_a_wrong_count_is_seen(kind, fault, device, force):
    force(kind)
    assert not all(in_every_order(kind, FAULTS[fault], device))


@pytest.mark.usefixtures("new_counters")
@pytest.mark.parametrize("kind", FINISHED, ids=id_of)
def test_the_barrier_is_enough_for_another_thread(kind, device, force):
    force(kind)
    assert all(in_every_order(kind, stored_by_another_thread, device))


def test_without_a_barrier_another_threads_store_stays_unseen(device, force):
    """Also where it comes before the count, as for some of 16 channels of two programs each."""
    force(Kind.PLANE)
    x, grad_y = (randn((2, 16, 520), torch.float32, device, seed) for seed in (0, 1))
    weight = randn((16,), torch.float32, device, seed=2)
    edit = FAULTS["no barrier before the count of another thread"]
    with driver.emulation(mode="weak", edit=edit, count=False) as launches:
        _, grad_weight = launch.prelu_backward(grad_y, x, weight, 1, (True, True))
    assert launches[0].ctas == 2 * 16
    assert grad_weight.isnan().all()


@pytest.mark.usefixtures("new_counters")
@pytest.mark.parametrize("instruction", ["bar.sync", "shfl.sync"])
def test_what_needs_all_threads_is_refused_when_some_pass_it_by(instruction, device, force):
    def passed_by(ptx):
        thread = re.search(r"mov\.u32 \t(%r\d+), %tid\.x", ptx).group(1)
        jump = f"\tsetp.lt.u32 \t%p999, {thread}, 16;\n\t@%p999 bra \t$past;\n"
        where = re.search(rf"\t{re.escape(instruction)}[^;]*;\n", ptx)
        return f"{ptx[: where.start()]}{jump}{where.group()}$past:\n{ptx[where.end() :]}"

    force(Kind.PLANE)
    for mode in ("lockstep", "interleaved"):
        with (
            pytest.raises(Fault, match=r"lanes are missing|wait at a barrier|is read before"),
            driver.emulation(mode=mode, edit=passed_by),
        ):
            finished(Kind.PLANE, torch.float32, device)
