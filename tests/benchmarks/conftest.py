"""A device, a clock and a command line that need no GPU."""

import contextlib
import io
import itertools

import pytest
import torch
from rich.console import Console

from benchmarks.__main__ import main


class FakeDevice:
    """Runs on the CPU; every timing takes the next of its microseconds."""

    name = "Fake GPU"
    l2_bytes = 300

    def __init__(self):
        self.device = torch.device("cpu")
        self.times = itertools.repeat(10000.0)
        self.timed = self.captured = 0

    def stream(self):
        return contextlib.nullcontext()

    def device_us(self, batch):
        return self.call_us(batch.run)

    def call_us(self, run):
        run()
        self.timed += 1
        return next(self.times)

    def extra_bytes(self, call):
        call()
        return 64

    def capture(self, run):
        self.captured += 1
        return run


class Clock:
    """Seconds that go on by `step` each time it is asked."""

    now = 0.0
    step = 0.0

    def __call__(self):
        now = self.now
        self.now += self.step
        return now


@pytest.fixture
def fake():
    return FakeDevice()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def cli(monkeypatch):
    """Runs `python -m benchmarks ...` in this process; gives the exit status."""
    monkeypatch.setenv("COLUMNS", "400")  # messages stay in one line

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        return end.value.code or 0

    return run


@pytest.fixture
def commit(monkeypatch):
    monkeypatch.setenv("PRELU_GPU_COMMIT", "abc123")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
