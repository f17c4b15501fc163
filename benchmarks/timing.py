"""How it is measured: cold caches, providers in turn, device time apart from whole-call time."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from benchmarks.program import first_line

ROUNDS = 15
BATCH_US = 2500.0
"""Device time that a batch of calls aims at, long beside the resolution of events (0.5 us)."""
BATCH_CALLS = 64
"""Most calls in a batch: the driver queues about a thousand launches before it makes the host
wait."""
CACHES = 3
"""How many times the L2 cache is filled by a rotation over the input sets."""
SETS_LIMIT = 256
"""Most input sets: x of less than about 1 MiB is then in the cache, as it is in a network."""
LEAD_CYCLES = 2**21
"""A spin of about a millisecond."""
LEAD_LIMIT = 2**26
LEAD_CYCLES_PER_S = 2**31
"""The clock of a device, roughly."""
RESOLUTION_US = 0.5
"""The step in which events count; what is shorter reads as 0."""

Call = Callable[[int], object]
"""Runs one operation on the input set of that number and returns what it allocated."""


class Device(Protocol):
    """What a measurement needs of a device; tests bring their own."""

    device: torch.device
    name: str
    l2_bytes: int

    def stream(self) -> AbstractContextManager[object]:
        """Where everything that is measured must run."""

    def device_us(self, batch: Callable[[], object]) -> float:
        """Time the device takes for `batch`, without the host's part; above 0."""

    def call_us(self, batch: Callable[[], object]) -> float:
        """Time from the first call of `batch` until its last result is there."""

    def extra_bytes(self, call: Callable[[], object]) -> int:
        """Most memory that `call` held at once beside what it returns."""

    def capture(self, batch: Callable[[], object]) -> Callable[[], None]:
        """What `batch` launches, as a CUDA graph: a function that replays it.

        Raises:
            RuntimeError: something in `batch` cannot be captured.
        """


class Gpu:
    """The current CUDA device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self.name: str = properties.name
        self.l2_bytes: int = properties.L2_cache_size
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self._stream = torch.cuda.Stream()
        self._lead_cycles = LEAD_CYCLES

    def stream(self) -> AbstractContextManager[object]:
        """A stream beside the default one, on which nothing can be captured."""
        return torch.cuda.stream(self._stream)

    def device_us(self, batch: Callable[[], object]) -> float:
        """Time between events around `batch`.

        The device idles in a spin kernel until the host has queued the whole batch; a batch that
        was not queued in time is repeated behind a longer spin. The next batch spins twice as long
        as the host took for this one: one hiccup does not lengthen all that follow. What never fits
        (it waits for the device itself) is timed with its gaps.
        """
        while True:
            torch.cuda._sleep(self._lead_cycles)
            start = time.perf_counter()
            self._start.record()
            batch()
            self._end.record()
            queuing = time.perf_counter() - start
            queued_in_time = not self._start.query()
            self._end.synchronize()
            never = self._lead_cycles >= LEAD_LIMIT
            if queued_in_time:
                needed = int(2 * queuing * LEAD_CYCLES_PER_S)
                self._lead_cycles = min(self._lead_cycles, max(needed, LEAD_CYCLES))
            else:
                self._lead_cycles = LEAD_CYCLES if never else 2 * self._lead_cycles
            if queued_in_time or never:
                return max(self._start.elapsed_time(self._end) * 1e3, RESOLUTION_US)

    def call_us(self, batch: Callable[[], object]) -> float:
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

    def capture(self, batch: Callable[[], object]) -> Callable[[], None]:
        """Records `batch`, which must have run before."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            batch()
        return graph.replay


@dataclass
class Measurement:
    """One provider's samples, a round each, and its memory."""

    extra_bytes: int | None
    """None, as device times, where work is not on PyTorch's streams and in its allocator."""
    device_samples: list[float] = field(default_factory=list)
    call_samples: list[float] = field(default_factory=list)
    notice: str | None = None
    """What is unusual about it."""

    @property
    def device_us(self) -> float | None:
        """Median device time of a call."""
        return statistics.median(self.device_samples) if self.device_samples else None

    @property
    def call_us(self) -> float:
        """Median whole time of a call."""
        return statistics.median(self.call_samples)

    @property
    def spread_us(self) -> float:
        """Interquartile range of the device times, or where there are none of the whole times."""
        return spread(self.device_samples or self.call_samples)


def spread(samples: Sequence[float]) -> float:
    """The interquartile range."""
    lower, _, upper = statistics.quantiles(samples, n=4)
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

    def run(self, calls: int) -> object:
        """Makes so many calls; gives the last one's result."""
        for number in itertools.islice(self._numbers, calls):
            self._results[number] = self._call(number)
        return self._results[number]


def count_sets(device: Device, nbytes: int) -> int:
    """Input sets of `nbytes` each that are larger than CACHES times the L2 cache, to a limit."""
    return min(CACHES * device.l2_bytes // nbytes + 1, SETS_LIMIT)


def measure(
    device: Device,
    calls: Mapping[str, Call],
    sets: int,
    advance: Callable[[], object],
    *,
    rounds: int = ROUNDS,
    replay: bool = False,
    waits: Mapping[str, Callable[[object], None]] | None = None,
) -> dict[str, Measurement]:
    """Measures calls by several providers, all of them in every round.

    Args:
        device: where they run.
        calls: each provider's call.
        sets: how many input sets they know.
        advance: called after every round.
        rounds: how many samples are taken.
        replay: take device times from replays of a CUDA graph of one rotation, as the device does
            what is small faster than a host can ask for it.
        waits: for providers that the device's events do not see, what waits for a result.
    """
    timed = {
        name: _prepare(device, call, sets, replay, (waits or {}).get(name))
        for name, call in calls.items()
    }
    for _ in range(rounds):
        for one in timed.values():
            one.sample(device)
        advance()
    return {name: one.measurement for name, one in timed.items()}


@dataclass
class _Batch:
    """Calls that are timed together."""

    run: Callable[[], object]
    calls: int


@dataclass
class _Timed:
    """A provider's batches, and what was measured of them."""

    whole: _Batch
    on_device: _Batch | None
    measurement: Measurement

    def sample(self, device: Device) -> None:
        if self.on_device:
            device_us = device.device_us(self.on_device.run) / self.on_device.calls
            self.measurement.device_samples.append(device_us)
        call_us = device.call_us(self.whole.run) / self.whole.calls
        self.measurement.call_samples.append(call_us)


def _prepare(
    device: Device, call: Call, sets: int, replay: bool, wait: Callable[[object], None] | None
) -> _Timed:
    rotation = Rotation(call, sets)
    # The first round compiles, the second finds the memory that every later one reuses.
    rotation.run(2 * sets)
    tried = min(sets, BATCH_CALLS)
    if wait is not None:

        def run(calls: int) -> None:
            wait(rotation.run(calls))

        calls = _fill(device.call_us(partial(run, tried)) / tried)
        return _Timed(_Batch(partial(run, calls), calls), None, Measurement(extra_bytes=None))

    calls = _fill(device.device_us(partial(rotation.run, tried)) / tried)
    batch = _Batch(partial(rotation.run, calls), calls)
    measurement = Measurement(device.extra_bytes(partial(call, 0)))
    if not replay:
        return _Timed(batch, batch, measurement)
    try:
        graph = device.capture(partial(Rotation(call, sets).run, sets))
    except RuntimeError as error:
        measurement.notice = f"no CUDA graph, timed with events: {first_line(error)}"
        return _Timed(batch, batch, measurement)
    replays = _fill(device.device_us(graph))

    def run_graph() -> None:
        for _ in range(replays):
            graph()

    return _Timed(batch, _Batch(run_graph, replays * sets), measurement)


def _fill(us: float) -> int:
    """How many repetitions of so many microseconds fill a batch."""
    return min(max(round(BATCH_US / us), 1), BATCH_CALLS)
