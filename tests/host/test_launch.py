"""The launch without Triton's look-up: the same machine code, by a key of our own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import assert_same, backward, randn

from prelu_gpu import launch, prelu

# Triton decides on its key for a driver; this one is of a GPU that need not be there.
KEYS = """
import itertools, torch, triton
from triton.runtime.jit import compute_cache_key
from benchmarks.machine_code import GPUS, CompileOnly
from prelu_gpu import launch
from prelu_gpu.plan import gpu_rules

target = GPUS["sm_90"].target
triton.runtime.driver.set_active(CompileOnly(target))

def keys(call, tensors):
    kernel = call.kernel
    *_, key_cache, _, _, binder = kernel.device_caches[target]
    _, specialization, options = binder(*tensors, *call.arguments, num_warps=4)
    tritons = compute_cache_key(key_cache, specialization, options)
    return tuple(launch.specialization(tensors)), tritons

def memory(dtype, offset):
    return torch.empty(64, dtype=dtype)[offset:]

_, call = launch.plan_call(
    lambda *a: gpu_rules(132, 4, True), False, 1, torch.float32, torch.device("cpu"),
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
    done = subprocess.run(
        [sys.executable, "-c", KEYS],
        cwd=Path(__file__).parents[2],
        env={name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # Two dtypes, aligned or not, for x; for the slope None too; three kinds of output.
    assert int(done.stdout) == 4 * 5 * 3


class Kernel:
    """A kernel that records its launches, and what it compiled."""

    arg_names = ()
    __name__ = "kernel"

    def __init__(self, log, name):
        self.log, self.name = log, name

    def __getitem__(self, grid):
        def run(*tensors, **options):
            self.log.append((self.name, grid, [t.data_ptr() for t in tensors]))
            return Kernel(self.log, f"compiled {len(self.log)}")

        return run


def test_what_was_compiled_for_such_tensors_is_launched_again(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "DIRECT_LAUNCH", True)
    monkeypatch.setattr(launch, "_on", lambda device: launch._UNCHANGED)
    monkeypatch.setattr(launch, "CompiledKernel", Kernel)
    log = []
    call = launch.Call(Kernel(log, "kernel"), launch.Launch((3, 2), 4, {}, {}), (), {})
    x, y, odd = torch.empty(8), torch.empty(8), torch.empty(8)[1:]
    for inputs, outputs in (((x,), (y,)), ((y,), (x,)), ((odd,), (y,)), ((x,), (y,))):
        launch.run(call, inputs, outputs)
    assert [name for name, _, _ in log] == ["kernel", "compiled 1", "kernel", "compiled 1"]
    assert [grid for _, grid, _ in log] == [(3, 2), (3, 2, 1), (3, 2), (3, 2, 1)]
    assert log[1][2] == [y.data_ptr(), x.data_ptr()]


@pytest.mark.parametrize("compiled", [None, object()], ids=["a hook's", "not there yet"])
def test_what_is_no_compiled_kernel_is_looked_up_again(compiled, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "DIRECT_LAUNCH", True)
    monkeypatch.setattr(launch, "_on", lambda device: launch._UNCHANGED)
    looked_up = []
    monkeypatch.setattr(launch, "_launch", lambda *call: looked_up.append(call) or compiled)
    call = launch.Call(None, launch.Launch((1,), 4, {}, {}), (), {})
    for _ in range(2):
        launch.run(call, (torch.empty(8),), (torch.empty(8),))
    assert len(looked_up) == 2


def test_every_parameter_after_the_tensors_has_an_argument():
    class Kernel:
        arg_names = ("x_ptr", "y_ptr", "rows", "V", "BLOCK")

    plan = launch.Launch((1,), 4, {"rows": 3}, {"V": 4, "UNUSED": 1})
    assert launch.bind(Kernel, plan, BLOCK=8).arguments == (3, 4, 8)
    with pytest.raises(KeyError, match="BLOCK"):
        launch.bind(Kernel, plan)


def test_no_version_is_launched_directly_that_was_not_seen_to():
    assert (
        launch.triton.__version__ in launch.SEEN_TO_LAUNCH_DIRECTLY
        and torch.version.cuda is not None
    ) == launch.DIRECT_LAUNCH


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_direct_launch_gives_the_same_bits(dtype, device, force, monkeypatch):
    monkeypatch.setattr(launch, "DIRECT_LAUNCH", True)
    for shape in ((4, 6, 4096), (64, 6, 49), (300, 90), (2, 6, 391)):
        sets = [[randn(shape, dtype, device, seed) for seed in (n, n + 9)] for n in range(3)]
        weight = randn(shape[1:2], dtype, device, seed=5)
        launch.plan_call.cache_clear()
        direct = [backward(prelu, x, weight, grad_y) for x, grad_y in sets]
        with monkeypatch.context() as patch:
            patch.setattr(launch, "DIRECT_LAUNCH", False)
            looked_up = [backward(prelu, x, weight, grad_y) for x, grad_y in sets]
        for results in zip(direct, looked_up, strict=True):
            for actual, expected in zip(*results, strict=True):
                assert_same(actual, expected)
