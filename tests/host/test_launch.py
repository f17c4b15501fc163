"""One launch, and the one without Triton's look-up: the same code, by a key of our own."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch
import triton
from support import assert_same, backward, randn, run_program

from prelu_gpu import launch, prelu, run
from prelu_gpu.kernels.plane import plane_forward
from prelu_gpu.plan import Launch

# Triton decides on its key for a driver; this one is of a GPU that need not be there.
KEYS = """
import itertools, torch
from triton.runtime.jit import compute_cache_key
from benchmarks.machine_code import GPUS, compile_for
from prelu_gpu import launch, run
from prelu_gpu.rules import gpu_rules

target = GPUS["sm_90"].target
compile_for(target)

NAMES = "grad_y_ptr", "x_ptr", "weight_ptr", "negative_slope", "grad_x_ptr", "sums_ptr"

def keys(call, tensors):
    kernel = call.kernel
    *_, key_cache, _, _, binder = kernel.device_caches[target]
    values = dict(zip((*NAMES, "counters_ptr", "grad_weight_ptr"), tensors))
    _, specialization, options = binder(**values, **call.arguments, num_warps=4)
    tritons = compute_cache_key(key_cache, specialization, options)
    return run.specialization(0, values), tritons

def memory(dtype, offset):
    return torch.empty(64, dtype=dtype)[offset:]

_, call = launch.plan_call(
    gpu_rules(132, 4, True), 1, torch.float32,
    (2, 4, 4096), (16384, 4096, 1), (16384, 4096, 1),
)
dtypes, offsets = (torch.float32, torch.float16), (0, 1, 4, 8)
some = [memory(*choice) for choice in itertools.product(dtypes, offsets)]
fixed = memory(torch.float32, 0)
pairs = set()
outputs = [fixed, some[1], None]
for x, weight, slope, out in itertools.product(some, [*some, None], (0.0, 1.0), outputs):
    pairs.add(keys(call, (fixed, x, weight, slope, out, fixed, None, None)))
ours, tritons = ({pair[side] for pair in pairs} for side in (0, 1))
assert len(pairs) == len(ours) == len(tritons), (len(pairs), len(ours), len(tritons))
print(len(pairs))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there on Linux only")
def test_the_key_tells_apart_what_triton_compiles_apart_and_nothing_else():
    printed, _ = run_program(KEYS, interpret=False)
    # Two dtypes, aligned or not, for x; for the slope None too; three kinds of output.
    assert int(printed) == 4 * 5 * 3


class Kernel:
    """A kernel that records its launches, and what it compiled."""

    arg_names = ["x_ptr", "y_ptr", "rows"]  # noqa: RUF012
    __name__ = "kernel"

    def __init__(self, log, name):
        self.log, self.name = log, name

    def __getitem__(self, grid):
        def launch(*in_order, **by_name):
            values = [getattr(value, "data_ptr", lambda value=value: value)() for value in in_order]
            self.log.append((self.name, grid, values))
            return Kernel(self.log, f"compiled {len(self.log)}")

        return launch


@pytest.fixture
def direct(monkeypatch):
    """Direct launches, of kernels that are compiled."""
    monkeypatch.setattr(run, "INTERPRETED", False)
    monkeypatch.setattr(run, "LOOK_UP_BECAUSE", None)
    monkeypatch.setattr(run, "CompiledKernel", Kernel)
    there = SimpleNamespace(get_current_device=lambda: -1)  # a CPU tensor's
    monkeypatch.setattr(run, "driver", SimpleNamespace(active=there))


def call_of(kernel, **arguments):
    return run.bind(kernel, Launch((3, 2), 4, arguments, {}))


def test_what_was_compiled_for_such_tensors_is_launched_again(direct):
    log = []
    call = call_of(Kernel(log, "kernel"), rows=7)
    x, y, odd = torch.empty(8), torch.empty(8), torch.empty(8)[1:]
    for given, made in ((x, y), (y, x), (odd, y), (x, y)):
        run.run(call, {"x_ptr": given, "y_ptr": made})
    assert [name for name, _, _ in log] == ["kernel", "compiled 1", "kernel", "compiled 1"]
    assert [grid for _, grid, _ in log] == [(3, 2), (3, 2, 1), (3, 2), (3, 2, 1)]
    # As compiled kernels take them: by place.
    assert log[1][2] == [y.data_ptr(), x.data_ptr(), 7]


def test_arguments_out_of_the_kernels_order_are_an_error(direct):
    call = call_of(Kernel([], "kernel"), rows=7)
    with pytest.raises(
        AssertionError, match=r"\['y_ptr', 'x_ptr', 'rows'\] is not in the kernel's"
    ):
        run.run(call, {"y_ptr": torch.empty(8), "x_ptr": torch.empty(8)})


@pytest.mark.parametrize("compiled", [None, object()], ids=["a hook's", "not there yet"])
def test_what_is_no_compiled_kernel_is_looked_up_again(compiled, direct, monkeypatch):
    looked_up = []
    monkeypatch.setattr(run, "_look_up_and_launch", lambda *c: looked_up.append(c) or compiled)
    monkeypatch.setattr(run, "CompiledKernel", Kernel)
    call = call_of(Kernel([], "kernel"))
    for _ in range(2):
        run.run(call, {"x_ptr": torch.empty(8)})
    assert len(looked_up) == 2


def test_a_call_has_what_its_kernel_has_parameters_for(device):
    class Kernel:
        arg_names = ("x_ptr", "y_ptr", "rows", "V", "BLOCK")

    plan = Launch((1,), 4, {"rows": 3}, {"V": 4, "UNUSED": 1})
    assert run.bind(Kernel, plan, BLOCK=8).arguments == {"rows": 3, "V": 4, "BLOCK": 8}


def test_a_launch_without_an_argument_fails(device):
    x = torch.ones(8, device=device)
    call = run.bind(plane_forward, Launch((1,), 4, {"outer": 1, "channels": 1}, {}))
    with pytest.raises(TypeError, match="inner"):
        run.run(call, {"x_ptr": x, "weight_ptr": x, "negative_slope": 0.0, "y_ptr": x})


@pytest.mark.parametrize(
    ("version", "variables", "hip", "why"),
    [
        ("3.7.1", {}, None, None),
        ("3.9.5+git1234", {}, None, None),
        ("3.10.0", {}, None, "triton 3.10 is none of 3.6, 3.7, 3.8, 3.9"),
        ("3.7.1", {"PRELU_GPU_DIRECT_LAUNCH": "0"}, None, "PRELU_GPU_DIRECT_LAUNCH=0 was set"),
        ("3.7.1", {}, "6.4", "its key is known for NVIDIA's GPUs"),
    ],
)
def test_versions_that_were_not_tried_and_a_setting_take_tritons_look_up(
    version, variables, hip, why, monkeypatch
):
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(os, "environ", variables)
    found = run._why_look_up()
    assert found is None if why is None else found.startswith(why)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_direct_launch_gives_the_same_bits(dtype, device, force, monkeypatch):
    assert run.LOOK_UP_BECAUSE is None
    for shape in ((4, 6, 4096), (64, 6, 49), (300, 90), (2, 6, 391)):
        sets = [[randn(shape, dtype, device, seed) for seed in (n, n + 9)] for n in range(3)]
        weight = randn(shape[1:2], dtype, device, seed=5)
        launch.plan_call.cache_clear()
        direct = [backward(prelu, x, weight, grad_y) for x, grad_y in sets]
        with monkeypatch.context() as patch:
            patch.setattr(run, "LOOK_UP_BECAUSE", "of this test")
            looked_up = [backward(prelu, x, weight, grad_y) for x, grad_y in sets]
        for results in zip(direct, looked_up, strict=True):
            for actual, expected in zip(*results, strict=True):
                assert_same(actual, expected)
