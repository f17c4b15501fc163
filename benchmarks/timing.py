"""How it is measured: cold caches, providers in turn, device time apart from whole-call time."""

import itertools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.utils import benchmark

from benchmarks.program import first_line

ROUNDS = 15
BATCH_US = 2500.0
"""Device time that a batch of calls aims at, long beside the resolution of events."""
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


@dataclass
class Batch:
    """Calls that are timed together."""

    run: Callable[[], object]
    calls: int
    lead: int = LEAD_CYCLES
    """Cycles that the device spins while the host queues the calls."""
    notice: str | None = None
    """What is unusual about its times."""


class Gpu:
    """The current CUDA device; tests bring a stand-in with the same methods."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self.name: str = properties.name
        self.l2_bytes: int = properties.L2_cache_size
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self._stream = torch.cuda.Stream()

    def stream(self) -> AbstractContextManager[object]:
        """A stream beside the default one, on which nothing can be captured."""
        return torch.cuda.stream(self._stream)

    def device_us(self, batch: Batch) -> float:
        """Time the device takes for a batch, without the host's part; above 0.

        The device spins until the host has queued the whole batch; one that was not queued in time
        is repeated behind a longer spin. The next spin is twice as long as the host took: one
        hiccup does not lengthen all that follow.
        """
        while True:
            torch.cuda._sleep(batch.lead)
            start = time.perf_counter()
            self._start.record()
            batch.run()
            self._end.record()
            queuing = time.perf_counter() - start
            queued_in_time = not self._start.query()
            self._end.synchronize()
            if queued_in_time:
                needed = int(2 * queuing * LEAD_CYCLES_PER_S)
                batch.lead = min(batch.lead, max(needed, LEAD_CYCLES))
                break
            if batch.lead >= LEAD_LIMIT:  # it waits for the device itself
                batch.notice = "never queued in time: its device time includes the host's gaps"
                break
            batch.lead *= 2
        us = self._start.elapsed_time(self._end) * 1e3
        if us < RESOLUTION_US:
            batch.notice = f"events see no time pass: {RESOLUTION_US} us stand for a batch"
        return max(us, RESOLUTION_US)

    def call_us(self, run: Callable[[], object]) -> float:
        """Time from the first call of `run` until its last result is there."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e6

    def extra_bytes(self, call: Callable[[], object]) -> int:
        """Most memory that `call` held at once beside what it returns."""
        torch.cuda.reset_peak_memory_stats()
        result = call()
        extra = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        del result
        return extra

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        """What `run` launches, which must have run before, as a CUDA graph: replays it.

        Raises:
            RuntimeError: something in `run` cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            run()
        return graph.replay


@dataclass
class Measurement:
    """One provider's samples in microseconds, a round each; none where it failed."""

    extra_bytes: int | None = None
    device_samples: list[float] = field(default_factory=list)
    call_samples: list[float] = field(default_factory=list)
    notice: str | None = None
    """What is unusual about it, or why it failed."""

    @property
    def device_us(self) -> float | None:
        """Median device time of a call."""
        return summary(self.device_samples).median if self.device_samples else None

    @property
    def call_us(self) -> float:
        """Median whole time of a call."""
        return summary(self.call_samples).median

    @property
    def spread_us(self) -> float:
        """Interquartile range of the device times, or where there are none of the whole times."""
        return summary(self.device_samples or self.call_samples).iqr


def summary(samples: Sequence[float]) -> benchmark.Measurement:
    """PyTorch's median and interquartile range (iqr) of samples, in their own unit."""
    return benchmark.Measurement(1, list(samples), benchmark.TaskSpec("", ""))


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


def count_sets(device: Gpu, nbytes: int) -> int:
    """Input sets of `nbytes` each that are larger than CACHES times the L2 cache, to a limit."""
    return min(CACHES * device.l2_bytes // nbytes + 1, SETS_LIMIT)


def measure(
    device: Gpu,
    providers: Mapping[str, Callable[[], Call]],
    sets: int,
    *,
    rounds: int = ROUNDS,
    replay: bool = False,
    advance: Callable[[], object] = lambda: None,
    may_fail: Collection[str] = (),
) -> dict[str, Measurement]:
    """Measures calls by several providers, all of them in every round.

    Args:
        device: where they run.
        providers: what prepares each provider's call.
        sets: how many input sets the calls know.
        rounds: how many samples are taken.
        replay: take device times from replays of a CUDA graph of one rotation, as the device does
            what is small faster than a host can ask for it.
        advance: called after every round.
        may_fail: providers whose errors end nothing but their own measurement.
    """
    measured: dict[str, Measurement] = {}
    timed: dict[str, _Timed] = {}

    def attempt(name: str, step: Callable[[], object]) -> None:
        try:
            step()
        except Exception as error:  # compilers raise of all kinds
            if name not in may_fail:
                raise
            measured[name] = Measurement(notice=f"failed: {first_line(error)}")
            timed.pop(name, None)

    def prepare(name: str, provider: Callable[[], Call]) -> None:
        timed[name] = _Timed(device, provider(), sets, replay)

    for name, provider in providers.items():
        attempt(name, partial(prepare, name, provider))
    for _ in range(rounds):
        for name, one in list(timed.items()):
            attempt(name, one.sample)
        advance()
    measured |= {name: one.measurement() for name, one in timed.items()}
    return {name: measured[name] for name in providers}


class _Timed:
    """A provider's batches, and what was measured of them."""

    def __init__(self, device: Gpu, call: Call, sets: int, replay: bool) -> None:
        self._device = device
        self._samples = Measurement()
        rotation = Rotation(call, sets)
        # The first round compiles, the second finds the memory that every later one reuses.
        rotation.run(2 * sets)
        tried = Batch(partial(rotation.run, min(sets, BATCH_CALLS)), min(sets, BATCH_CALLS))
        calls = _fill(device.device_us(tried) / tried.calls)
        self._whole = self._on_device = Batch(partial(rotation.run, calls), calls)
        self._samples.extra_bytes = device.extra_bytes(partial(call, 0))
        if replay:
            try:
                graph = device.capture(partial(Rotation(call, sets).run, sets))
            except RuntimeError as error:
                self._samples.notice = f"no CUDA graph, timed with events: {first_line(error)}"
            else:
                replays = _fill(device.device_us(Batch(graph, sets)))
                self._on_device = Batch(partial(_repeat, graph, replays), replays * sets)

    def sample(self) -> None:
        """Takes one sample of each time."""
        device_us = self._device.device_us(self._on_device) / self._on_device.calls
        self._samples.device_samples.append(device_us)
        call_us = self._device.call_us(self._whole.run) / self._whole.calls
        self._samples.call_samples.append(call_us)

    def measurement(self) -> Measurement:
        """The samples, and what was unusual about them."""
        notices = filter(None, (self._samples.notice, self._on_device.notice))
        self._samples.notice = "; ".join(notices) or None
        return self._samples


def _fill(us: float) -> int:
    """How many repetitions of so many microseconds fill a batch."""
    return min(max(round(BATCH_US / us), 1), BATCH_CALLS)


def _repeat(run: Callable[[], None], times: int) -> None:
    for _ in range(times):
        run()
