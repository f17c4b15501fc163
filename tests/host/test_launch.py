"""One launch, and the one without Triton's look-up: the same code, by a key of our own."""

import contextlib
import sys

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
    return tuple(run.specialization(values)), tritons

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

    arg_names = ("x_ptr", "rows", "y_ptr")
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
    monkeypatch.setattr(run, "DIRECT_LAUNCH", True)
    monkeypatch.setattr(run, "on", lambda device: contextlib.nullcontext())


def test_what_was_compiled_for_such_tensors_is_launched_again(direct, monkeypatch):
    monkeypatch.setattr(run, "CompiledKernel", Kernel)
    log = []
    call = run.Call(Kernel(log, "kernel"), Launch((3, 2), 4, {}, {}), {"rows": 7}, {})
    x, y, odd = torch.empty(8), torch.empty(8), torch.empty(8)[1:]
    for given, made in ((x, y), (y, x), (odd, y), (x, y)):
        run.run(call, {"x_ptr": given, "y_ptr": made})
    assert [name for name, _, _ in log] == ["kernel", "compiled 1", "kernel", "compiled 1"]
    assert [grid for _, grid, _ in log] == [(3, 2), (3, 2, 1), (3, 2), (3, 2, 1)]
    # As compiled kernels take them: by place.
    assert log[1][2] == [y.data_ptr(), 7, x.data_ptr()]


@pytest.mark.parametrize("compiled", [None, object()], ids=["a hook's", "not there yet"])
def test_what_is_no_compiled_kernel_is_looked_up_again(compiled, direct, monkeypatch):
    looked_up = []
    monkeypatch.setattr(run, "_look_up_and_launch", lambda *c: looked_up.append(c) or compiled)
    call = run.Call(None, Launch((1,), 4, {}, {}), {}, {})
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


def test_no_version_is_launched_directly_that_was_not_seen_to():
    seen = triton.__version__ in run.SEEN_TO_LAUNCH_DIRECTLY
    assert (seen and torch.version.cuda is not None) == run.DIRECT_LAUNCH


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_direct_launch_gives_the_same_bits(dtype, device, force, monkeypatch):
    monkeypatch.setattr(run, "DIRECT_LAUNCH", True)
    for shape in ((4, 6, 4096), (64, 6, 49), (300, 90), (2, 6, 391)):
        sets = [[randn(shape, dtype, device, seed) for seed in (n, n + 9)] for n in range(3)]
        weight = randn(shape[1:2], dtype, device, seed=5)
        launch.plan_call.cache_clear()
        direct = [backward(prelu, x, weight, grad_y) for x, grad_y in sets]
        with monkeypatch.context() as patch:
            patch.setattr(run, "DIRECT_LAUNCH", False)
            looked_up = [backward(prelu, x, weight, grad_y) for x, grad_y in sets]
        for results in zip(direct, looked_up, strict=True):
            for actual, expected in zip(*results, strict=True):
                assert_same(actual, expected)
