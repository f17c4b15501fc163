"""How it is measured: cold caches, providers in turn, device time apart from whole-call time."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from benchmarks.cases import Call

ROUNDS = 21
BATCH_US = 5000.0
"""Device time that a batch of calls aims at, long beside the resolution of events (0.5 us)."""
BATCH_CALLS = 64
"""Most calls in a batch: the driver queues about a thousand launches before it makes the host
wait."""
CACHES = 3
"""How many times the L2 cache is filled by a rotation over the input sets."""


class Device(Protocol):
    """What a measurement needs of a device; tests bring their own."""

    device: torch.device
    name: str
    l2_bytes: int

    def device_us(self, batch: Callable[[], None]) -> float:
        """Time the device takes for `batch`, without the host's part."""

    def call_us(self, batch: Callable[[], None]) -> float:
        """Time from the first call of `batch` until its last result is there."""

    def extra_bytes(self, call: Callable[[], object]) -> int:
        """Most memory that `call` held at once beside what it returns."""


class Gpu:
    """The current CUDA device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self.name: str = properties.name
        self.l2_bytes: int = properties.L2_cache_size
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self._lead_cycles = 2**21

    def device_us(self, batch: Callable[[], None]) -> float:
        """Time between events around `batch`.

        The device idles in a spin kernel, about a millisecond at first, until the host has queued
        the whole batch; a batch that was not queued in time is repeated behind a longer spin. What
        never fits (it waits for the device itself) is timed with its gaps.
        """
        while True:
            torch.cuda._sleep(self._lead_cycles)
            self._start.record()
            batch()
            self._end.record()
            queued_in_time = not self._start.query()
            self._end.synchronize()
            if queued_in_time or self._lead_cycles >= 2**28:
                return self._start.elapsed_time(self._end) * 1e3
            self._lead_cycles *= 2

    def call_us(self, batch: Callable[[], None]) -> float:
        """Time by the host's clock, the last synchronisation included."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        batch()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e6

    def extra_bytes(self, call: Callable[[], object]) -> int:
        """The allocator's peak above what is held after the call."""
        torch.cuda.reset_peak_memory_stats()
        result = call()
        extra = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        del result
        return extra


@dataclass
class Measurement:
    """One provider's samples, a round each, and its memory."""

    extra_bytes: int
    device_samples: list[float] = field(default_factory=list)
    call_samples: list[float] = field(default_factory=list)

    @property
    def device_us(self) -> float:
        """Median device time of a call."""
        return statistics.median(self.device_samples)

    @property
    def call_us(self) -> float:
        """Median whole time of a call."""
        return statistics.median(self.call_samples)

    @property
    def spread_us(self) -> float:
        """Interquartile range of the device times."""
        lower, _, upper = statistics.quantiles(self.device_samples, n=4)
        return upper - lower


class Rotation:
    """Calls over the input sets in turn.

    A result is kept until its set comes round again, so that neither inputs nor outputs are in the
    cache when they are used.
    """

    def __init__(self, call: Call, sets: int) -> None:
        self._call = call
        self._numbers = itertools.cycle(range(sets))
        self._results: list[object] = [None] * sets

    def run(self, calls: int) -> None:
        """Makes so many calls."""
        for number in itertools.islice(self._numbers, calls):
            self._results[number] = self._call(number)


def count_sets(device: Device, nbytes: int) -> int:
    """Input sets of `nbytes` each that together are larger than CACHES times the L2 cache."""
    return CACHES * device.l2_bytes // nbytes + 1


def measure(
    device: Device, calls: Mapping[str, Call], sets: int, advance: Callable[[], object]
) -> dict[str, Measurement]:
    """Measures calls by several providers, all of them in every round.

    Args:
        device: where they run.
        calls: each provider's call.
        sets: how many input sets they know.
        advance: called after every round.
    """
    batches: dict[str, tuple[Callable[[], None], int]] = {}
    measurements: dict[str, Measurement] = {}
    for name, call in calls.items():
        rotation = Rotation(call, sets)
        # The first round compiles, the second finds the memory that every later one reuses.
        rotation.run(2 * sets)
        device_us = device.device_us(partial(rotation.run, sets)) / sets
        count = min(max(round(BATCH_US / device_us), 1), BATCH_CALLS)
        batches[name] = partial(rotation.run, count), count
        measurements[name] = Measurement(device.extra_bytes(partial(call, 0)))

    for _ in range(ROUNDS):
        for name, (batch, count) in batches.items():
            measurements[name].device_samples.append(device.device_us(batch) / count)
            measurements[name].call_samples.append(device.call_us(batch) / count)
        advance()
    return measurements
