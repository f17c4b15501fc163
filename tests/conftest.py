"""The same tests on a GPU and, without one, on the CPU with interpreted or emulated kernels."""

import contextlib
import math
import os
import sys
import warnings

import pytest

with warnings.catch_warnings():
    # What packages say when they are imported is no fault of the tests.
    warnings.simplefilter("default")
    import torch

    # Triton decides when a kernel is decorated, so before the first import. The processes of
    # pytest-xdist know by the variable.
    if "--compiled" in sys.argv:
        os.environ["PRELU_GPU_TEST_COMPILED"] = "1"
        os.environ.pop("TRITON_INTERPRET", None)
    if "PRELU_GPU_TEST_COMPILED" not in os.environ and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"

    if "PYTEST_XDIST_WORKER" in os.environ:
        # The processes share the cores: threads that wait for each other would take most of them.
        torch.set_num_threads(1)

    from support import CANARY, EMULATED, GPU, MARGIN, randn

    from prelu_gpu import backend, kernel_threshold, launch, launch_norm
    from prelu_gpu.backend import warn_once
    from prelu_gpu.rules import gpu_rules, using_rules
    from prelu_gpu.run import execute, intercepting

with contextlib.suppress(ImportError):
    from hypothesis import settings

    # The same examples on every run; --hypothesis-profile=full draws new ones.
    # Compiled, most of them make kernels of their own.
    examples = 50 if GPU or EMULATED else 500
    settings.register_profile("default", max_examples=examples, deadline=None, derandomize=True)
    settings.register_profile("full", max_examples=20_000, deadline=None, derandomize=False)
    settings.load_profile("default")


def pytest_addoption(parser):
    parser.addoption(
        "--compiled",
        action="store_true",
        help="run kernels as Triton compiles them, in an emulator of PTX, instead of interpreted",
    )


def pytest_configure(config):
    """On a GPU machine, whose packages nobody chose, only warnings from this library are errors."""
    if EMULATED and GPU:
        raise pytest.UsageError("--compiled is for machines without a GPU: here kernels run on it")
    if EMULATED:
        from ptx import driver

        driver.install()
    elif config.getoption("compiled"):
        raise pytest.UsageError("give --compiled on the command line, where it is read first")
    if GPU:
        for line in ("default", "error:::prelu_gpu"):
            config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(items):
    there = {"gpu": GPU, "compiled": GPU or EMULATED, "emulated": EMULATED}
    for item in items:
        for marker, why in (
            ("gpu", "needs a GPU"),
            ("compiled", "needs a GPU, or --compiled"),
            ("emulated", "needs --compiled"),
        ):
            if item.get_closest_marker(marker) and not there[marker]:
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture
def device():
    return torch.device("cuda", 0) if GPU else torch.device("cpu")


@pytest.fixture
def x(device):
    return randn((4, 3, 40), torch.float32, device)


@pytest.fixture
def weight(device):
    """A slope for each of x's channels."""
    return randn((3,), torch.float32, device, seed=1)


class GuardedTorch:
    """Torch whose fresh tensors are full of NaN and lie between canaries."""

    def __init__(self):
        self.buffers = []

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, shape, *, dtype, device):
        return self._guarded(torch.empty(shape, dtype=dtype, device=device))

    def empty_like(self, tensor, **options):
        return self._guarded(torch.empty_like(tensor, **options))

    def empty_strided(self, shape, stride, *, dtype, device):
        return self._guarded(torch.empty_strided(shape, stride, dtype=dtype, device=device))

    def _guarded(self, tensor):
        numel = tensor.numel()
        buffer = torch.full((numel + 2 * MARGIN,), CANARY, dtype=tensor.dtype, device=tensor.device)
        buffer[MARGIN : MARGIN + numel] = math.nan
        self.buffers.append(buffer)
        return buffer.as_strided(tensor.shape, tensor.stride(), MARGIN)

    def check(self):
        for buffer in self.buffers:
            canary = torch.tensor(CANARY, dtype=buffer.dtype).item()
            assert (buffer[:MARGIN] == canary).all(), "a kernel wrote before its output"
            assert (buffer[-MARGIN:] == canary).all(), "a kernel wrote behind its output"


@pytest.fixture(autouse=True)
def guarded_allocations(monkeypatch):
    """What a kernel leaves unwritten is NaN, and what it writes outside its output is seen."""
    guard = GuardedTorch()
    monkeypatch.setattr(launch, "torch", guard)
    monkeypatch.setattr(launch_norm, "torch", guard)
    yield guard
    guard.check()


@pytest.fixture
def unguarded_allocations(monkeypatch, guarded_allocations):
    """Thousands of launches leave no canaries behind, and capture refuses to fill them."""
    monkeypatch.setattr(launch, "torch", torch)
    monkeypatch.setattr(launch_norm, "torch", torch)


@pytest.fixture(autouse=True)
def kernels_at_every_size():
    """On a GPU, too, where PyTorch's operator serves small inputs."""
    with kernel_threshold(0):
        yield


@pytest.fixture
def outputs_may_be_incomplete():
    """The emulator otherwise refuses a launch that leaves an output's elements unwritten."""
    with contextlib.ExitStack() as stack:
        if EMULATED:
            from ptx import driver

            stack.enter_context(driver.emulation(complete=False))
        yield


@pytest.fixture
def threshold():
    """Sets the size from which kernels serve, for the rest of a test."""
    with contextlib.ExitStack() as stack:
        yield lambda elements: stack.enter_context(kernel_threshold(elements))


@pytest.fixture
def no_kernels(monkeypatch):
    """A machine without kernels."""
    monkeypatch.setattr(backend, "WITHOUT_TRITON", "a test takes it away")


@pytest.fixture(autouse=True)
def nothing_said_yet():
    """What is said once a process is said once a test."""
    warn_once.cache_clear()


def noted(what):
    """What is noted of every launch; at least one kernel must be launched."""
    made = []

    def note(call, values):
        made.append(what(call, values))
        execute(call, values)

    with intercepting(note):
        yield made
    assert made, "no kernel was launched"


@pytest.fixture
def calls():
    """Every launch, as (call, values); a test that asks for them must launch a kernel."""
    yield from noted(lambda call, values: (call, values))


@pytest.fixture
def launches():
    """The names of the kernels launched; a test that asks for them must launch one."""
    yield from noted(lambda call, values: call.kernel.__name__)


@pytest.fixture
def no_launch():
    """No kernel may be launched."""

    def refuse(call, values):
        raise AssertionError(f"{call.kernel.__name__} was launched")

    with intercepting(refuse):
        yield


@pytest.fixture
def force():
    """Makes every launch use a GPU's tilings of the given kind.

    For one multiprocessor, so that small tensors already make programs walk and split.
    """
    with contextlib.ExitStack() as stack:

        def force_rules(kind=None, reduction="last program"):
            def table(device, itemsize, backward):
                row = gpu_rules(1, itemsize, backward)
                finish = row.finish if reduction == "last program" else 0
                return row._replace(kind=kind, finish=finish, atomic=reduction == "atomic")

            stack.enter_context(using_rules(table))

        yield force_rules
