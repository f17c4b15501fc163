"""A launch without Triton's look-up, run: the emulator refuses a kernel of other arguments."""

import contextlib
import gc

import pytest
import torch
import triton
from support import PAIRS, assert_same, id_of, randn

from prelu_gpu import launch, run
from prelu_gpu.kernels import column, partials, plane
from prelu_gpu.rules import Kind
from ptx import driver

pytestmark = pytest.mark.emulated

SHAPES = {
    Kind.FLAT: [(1, 1, 1), (1, 1, 4096), (1, 1, 5003)],
    Kind.PLANE: [(1, 2, 16), (3, 2, 2064)],
    Kind.ODD_PLANE: [(1, 1, 17), (2, 3, 1043)],
    Kind.COLUMN: [(1, 16, 1), (33, 7, 1), (16, 64, 1), (20, 3, 9)],
}
"""With sizes of one, divisible by 16, and neither."""

OFFSETS = (0, 1, 4, 0)
"""Elements between a grid of 16 bytes and each tensor, in the order of the calls."""


@pytest.fixture
def looked_up(monkeypatch):
    """The kernels that Triton looked up."""
    names = []

    def look_up(call, values, original=run._look_up_and_launch):
        names.append(call.kernel.__name__)
        return original(call, values)

    monkeypatch.setattr(run, "_look_up_and_launch", look_up)
    launch.plan_call.cache_clear()
    launch._sum_call.cache_clear()
    return names


def results(dtypes, kind, shape):
    """Of forward and backward, for tensors at every offset, in turn."""
    found = []
    for offset in OFFSETS:
        x, grad_y = (
            randn((shape[0] * shape[1] * shape[2] + offset,), dtypes[0], "cpu", seed)[offset:].view(
                shape
            )
            for seed in (0, 1)
        )
        weight = randn((shape[1],), dtypes[1], "cpu", seed=2)
        dim = None if kind is Kind.FLAT else 1
        found.append(launch.prelu_forward(x, weight, dim))
        found += launch.prelu_backward(grad_y, x, weight, dim, (True, True))
        found += launch.prelu_backward(grad_y, x, weight, dim, (x.dtype == weight.dtype, False))
        if dim is None:
            found.append(launch.leaky_relu_forward(x, 0.1))
            found.append(launch.leaky_relu_forward_(x.clone(), 0.1))
            found.append(launch.leaky_relu_backward(grad_y, x, 0.1))
    return [result for result in found if result is not None]


@pytest.mark.parametrize("dtypes", PAIRS, ids=id_of)
@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.value)
@pytest.mark.parametrize("reduction", ["last program", "second launch"])
def test_it_gives_the_same_bits(dtypes, kind, reduction, force, looked_up, monkeypatch):
    force(kind, reduction)
    for shape in SHAPES[kind]:
        with monkeypatch.context() as patch:
            patch.setattr(run, "LOOK_UP_BECAUSE", "of this test")
            expected = results(dtypes, kind, shape)
        assert looked_up
        results(dtypes, kind, shape)
        looked_up.clear()
        for actual, wanted in zip(results(dtypes, kind, shape), expected, strict=True):
            assert_same(actual, wanted)
        assert not looked_up


def test_a_kernel_that_triton_drops_stays_loaded(looked_up):
    x = randn((3, 2, 2064), torch.float32, "cpu")
    for _ in range(2):
        y = launch.prelu_forward(x, torch.ones(2), 1)
        for module in (column, plane, partials):
            for name in vars(module):
                caches = getattr(getattr(module, name), "device_caches", None)
                if caches is not None:
                    caches.clear()
        gc.collect()
        assert_same(y, x)
    assert looked_up == ["plane_forward"]


class OnAnother(torch.Tensor):
    """A tensor that claims to be on another device than the CPU."""

    index = 1

    def get_device(self):
        return self.index


def test_each_device_has_kernels_of_its_own(looked_up, monkeypatch):
    active = triton.runtime.driver.active

    @contextlib.contextmanager
    def on_another(device):
        active.set_current_device(OnAnother.index)
        yield
        active.set_current_device(driver.CPU)

    monkeypatch.setattr(run, "on", on_another)
    x = randn((3, 2, 2064), torch.float32, "cpu")
    weight = torch.ones(2)
    _, call = launch.plan_call(
        launch.rules_for(x.device, 4, False), 1, x.dtype, x.shape, x.stride()
    )
    for given in (x, x.as_subclass(OnAnother)) * 2:
        y = torch.empty_like(x)
        values = {"x_ptr": given, "weight_ptr": weight, "negative_slope": 0.0, "y_ptr": y}
        run.execute(call, values)
        assert_same(y, x)
    assert looked_up == ["plane_forward"] * 2


def test_hooks_see_every_launch():
    """Profilers set them at any time."""
    seen = []
    x = randn((3, 2, 2064), torch.float32, "cpu")

    def note(metadata):
        seen.append(metadata.get()["name"])

    launch.prelu_forward(x, torch.ones(2), 1)
    triton.knobs.runtime.launch_enter_hook.add(note)
    triton.knobs.runtime.launch_exit_hook.add(note)
    try:
        launch.prelu_forward(x, torch.ones(2), 1)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(note)
        triton.knobs.runtime.launch_exit_hook.remove(note)
    assert seen == ["plane_forward"] * 2
