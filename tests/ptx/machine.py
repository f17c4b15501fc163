"""One launch: threads and their registers, memory and its checks, and in which order things happen.

Lockstep runs many CTAs an instruction at a time. Interleaved, a random warp of those that are ready
runs up to its next access, barrier or fence, again and again. Weak is interleaved, with stores that
others do not see and loads that are stale until something orders them.
"""

import ctypes
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .instructions import BITS, Fault, width_of

ALL = slice(None)
"""Every lane."""

LOCKSTEP_LANES = 1 << 15
POISON = 0xBADBADBADBADBAD
"""What a register holds that nothing was written to."""


@dataclass(frozen=True)
class AddressOnly:
    """A tensor without memory: loads are 0, stores are checked and forgotten."""

    dtype: object
    elements: int
    address: int
    device: object

    def data_ptr(self):
        return self.address

    def get_device(self):
        return -1  # the CPU's


class Lanes:
    """Threads that run together: all of some CTAs, or one warp of one.

    Where a branch parts them, those that are at the first place in the code run, until they come to
    where others wait.
    """

    def __init__(self, launch, ctas, threads):
        self.launch, self.memory = launch, launch.memory
        self.cta = np.repeat(ctas, len(threads))
        self.thread = np.tile(threads, len(ctas))
        self.count = len(self.cta)
        self.shared = None
        self.registers = {}
        self.at, self.here, self.elsewhere = 0, ALL, {}
        """Place in the code, the lanes that are there, and others by their places."""
        self.active = ALL
        """The lanes for which an instruction runs: of those here the ones that its guard lets."""
        x, y, _ = launch.grid
        self._special = {
            "%tid.x": self.thread,
            "%laneid": self.thread % 32,
            "%ctaid.x": self.cta % x,
            "%ctaid.y": self.cta // x % y,
            "%ctaid.z": self.cta // (x * y),
        }
        for axis, size in zip("xyz", launch.grid, strict=True):
            self._special[f"%nctaid.{axis}"] = np.full(self.count, size)

    def special(self, name):
        if name not in self._special:
            raise Fault(f"unknown register {name}")
        return self._special[name][self.active]

    def full(self, number):
        return np.full(len(self.cta[self.active]), number)

    def read(self, name):
        if name not in self.registers and name in self.launch.kernel.undefined:
            self.registers[name] = self._poison(name)
        if name not in self.registers:
            raise Fault(f"{name} of {self.launch.kernel} is read before a lane has written it")
        return self.registers[name][self.active]

    def write(self, name, values):
        if values.dtype != bool:
            values = values.view(BITS[8 * values.dtype.itemsize])
        if (1 if values.dtype == bool else 8 * values.dtype.itemsize) != width_of(name):
            raise Fault(f"{values.dtype} is written to {name}")
        if self.active is ALL:
            self.registers[name] = values
            return
        if name not in self.registers:
            self.registers[name] = self._poison(name)
        self.registers[name][self.active] = values

    def _poison(self, name):
        bits = width_of(name)
        if bits == 1:
            return np.ones(self.count, bool)
        return np.full(self.count, POISON & (1 << bits) - 1, BITS[bits])

    def step(self):
        """Runs one instruction for the lanes here, and gives it."""
        instruction = self.launch.kernel.code[self.at]
        if self._is_joint(self.at) and not all(map(self._is_joint, self.elsewhere)):
            # It waits for lanes that are still on their way.
            self._join(self.at, self.here)
            self._next()
            instruction = self.launch.kernel.code[self.at]
        self.active = self.here
        if self.launch.stats is not None:
            self.launch.stats.note(instruction, len(self.cta[self.here]))
        if self._is_joint(self.at):
            self._must_be_whole(instruction)
        if instruction.op == "bra":
            self._branch(instruction)
        elif instruction.op == "ret":
            self._next()
        else:
            if instruction.op in ("fence", "membar"):
                self.memory.order(self, release=True, acquire=True)
            elif instruction.run and self._let_in(instruction):
                instruction.run(self)
            self.at += 1
            if self.at in self.elsewhere:
                self._join(self.at, self.here)
                self._next()
        return instruction

    def _let_in(self, instruction):
        """Whether an instruction's guard lets any lane run it: those are active then."""
        if instruction.guard:
            lets = self.read(instruction.guard) ^ instruction.negated
            if not lets.all():
                self.active = np.arange(self.count)[self.active][lets]
        return len(self.cta[self.active]) > 0

    def _branch(self, branch):
        here = np.arange(self.count)[self.here]
        taken = np.full(len(here), not branch.guard)
        if branch.guard:
            taken = self.read(branch.guard) ^ branch.negated
        for place, lanes in ((branch.target, here[taken]), (self.at + 1, here[~taken])):
            if len(lanes):
                self._join(place, lanes)
        self._next()

    def _join(self, place, lanes):
        others = self.elsewhere.get(place, np.arange(0))
        lanes = np.arange(self.count)[lanes]
        self.elsewhere[place] = np.sort(np.concatenate([others, lanes]))

    def _next(self):
        """On with the lanes at the first place, of those that need no others; None at the end."""
        alone = [place for place in self.elsewhere if not self._is_joint(place)]
        self.at = min(alone or self.elsewhere, default=None)
        if self.at is not None:
            self.here = self.elsewhere.pop(self.at)
            if len(self.here) == self.count:
                self.here = ALL

    def _is_joint(self, place):
        """Whether the instruction there is for all lanes of a warp, or of a CTA, at once."""
        return self.launch.kernel.code[place].op in ("bar", "shfl", "ldmatrix", "stmatrix")

    def _must_be_whole(self, instruction):
        """A barrier is for all lanes of a CTA, a shuffle for those of a warp."""
        whole = 32
        if instruction.is_barrier and self.count > 32:
            whole = self.launch.kernel.threads
        groups = np.unique(np.arange(self.count)[self.here] // whole, return_counts=True)[1]
        if np.any(groups != whole):
            raise Fault(f"lanes are missing at {instruction} of {self.launch.kernel}")


# Memory


class SharedMemory:
    """The shared memory of CTAs, NaN until it is written. Lanes know theirs by `start`."""

    def __init__(self, kernel, ctas):
        self.size = kernel.shared
        self.bytes = np.full(ctas * self.size, 0xFF, np.uint8)
        self.start = np.repeat(np.arange(ctas) * self.size, kernel.threads)

    def _index(self, lanes, at, width, count, instruction):
        at = at.astype(np.int64)
        if np.any(at % (width * count)) or np.any(at + width * count > self.size):
            raise Fault(f"misaligned, or outside of {self.size} bytes: {instruction}")
        start = self.start[lanes.active] if lanes.count == len(self.start) else 0
        return (start + at) // width

    def load(self, lanes, at, width, count, instruction):
        index = self._index(lanes, at, width, count, instruction)
        return [self.bytes.view(BITS[8 * width])[index + k] for k in range(count)]

    def store(self, lanes, at, width, values, instruction):
        index = self._index(lanes, at, width, len(values), instruction)
        for k, value in enumerate(values):
            self.bytes.view(BITS[8 * width])[index + k] = value


class Range:
    """A tensor's memory: which of its bytes are elements, and how often each was written."""

    def __init__(self, name, tensor, writable):
        self.name, self.writable = name, writable
        self.itemsize = tensor.dtype.itemsize
        self.start = tensor.data_ptr()
        if self.start == 0:
            raise Fault(f"{name} is a null pointer")
        self.elements = None
        """Which places between the first and the last one are elements; None if all are."""
        self.writes = None
        """How often each place was written; None if that is not known."""
        self.is_counter = False
        """Whether atomics act on it."""
        if isinstance(tensor, AddressOnly):
            self.end, self.memory = self.start + tensor.elements * self.itemsize, None
            return
        places = 0
        if tensor.numel():
            strides = zip(tensor.shape, tensor.stride(), strict=True)
            places = 1 + sum((size - 1) * stride for size, stride in strides)
        self.end = self.start + places * self.itemsize
        if places != tensor.numel():
            self.elements = np.zeros(places, bool)
            strided = np.lib.stride_tricks.as_strided
            strided(self.elements, tensor.shape, tensor.stride())[...] = True
        if writable:
            self.writes = np.zeros(places, np.uint8)
        # NumPy's views of all widths begin at a multiple of the widest.
        self.base = self.start // 16 * 16
        size = -(-(self.end - self.base) // 16) * 16
        memory = np.frombuffer((ctypes.c_uint8 * size).from_address(self.base), np.uint8)
        self.memory = {bits // 8: memory.view(dtype) for bits, dtype in BITS.items()}

    def holds(self, at, size):
        """At which addresses all bytes are elements."""
        inside = (at >= self.start) & (at + size <= self.end)
        if self.elements is not None:
            place = np.where(inside, at - self.start, 0) // self.itemsize
            for k in range(-(-size // self.itemsize)):
                inside &= self.elements[np.minimum(place + k, len(self.elements) - 1)]
        return inside

    def note_writes(self, at, size, instruction):
        """Counts an element's writes; the second one of a launch is a Fault."""
        if self.writes is None or self.is_counter:
            return
        place = (at - self.start) // self.itemsize
        for k in range(size // self.itemsize):
            np.add.at(self.writes, place + k, 1)
            if np.any(self.writes[place + k] > 1):
                raise Fault(f"an element of {self.name} is written twice, now by {instruction}")

    def must_be_complete(self):
        """That a launch has written every element."""
        if self.writes is not None and not self.is_counter:
            left = self.writes == 0
            if self.elements is not None:
                left &= self.elements
            if left.any():
                raise Fault(f"{left.sum()} elements of {self.name} are not written")


class Memory:
    """The launch's tensors, where every access is checked and counted. Any order is seen by all."""

    def __init__(self, launch):
        self.launch = launch
        # An input that is written in place is found as an output.
        self.ranges = sorted(launch.ranges, key=lambda r: not r.writable)

    def _find(self, lanes, at, size, instruction, writes):
        """Parts of the lanes: a range, which of them it serves, and their addresses."""
        where = f"{instruction} of {self.launch.kernel}"
        at = at.astype(np.int64)
        if np.any(at % size):
            raise Fault(f"misaligned for {size} bytes, {int(at[at % size != 0][0]):#x}: {where}")
        if self.launch.trace is not None:
            self.launch.trace.append((writes, size, lanes.cta[lanes.active], at))
        left, found = np.ones(len(at), bool), []
        for r in self.ranges:
            if writes and not r.writable:
                continue
            held = left & r.holds(at, size)
            if held.any():
                part = ALL if held.all() else np.flatnonzero(held)
                found.append((r, part, at[part]))
                left &= ~held
        if left.any():
            first = int(at[left][0])
            near = [
                f"{r.name}{'' if r.writable else ' (input)'} {first - r.start:+}"
                f" of {r.end - r.start}"
                for r in self.ranges
            ]
            raise Fault(f"{size} bytes outside of what may be accessed, {near}: {where}")
        if self.launch.stats is not None:
            self.launch.stats.access(lanes, at, size, writes, found)
        return found

    def load(self, lanes, at, width, count, instruction):
        values = np.zeros((count, len(at)), BITS[8 * width])
        for r, part, places in self._find(lanes, at, width * count, instruction, writes=False):
            if "nc" in instruction.modifiers and r.writable:
                raise Fault(f"non-coherent load of what is written: {instruction}")
            if r.memory is not None:
                values[:, part] = self._fetch(lanes, r, part, places, width, count)
        return values

    def store(self, lanes, at, width, values, instruction):
        size = width * len(values)
        for r, part, places in self._find(lanes, at, size, instruction, writes=True):
            r.note_writes(places, size, instruction)
            if r.memory is not None:
                self._put(lanes, r, part, places, width, [value[part] for value in values])

    def _fetch(self, lanes, r, part, places, width, count):
        first = (places - r.base) // width
        return np.stack([r.memory[width][first + k] for k in range(count)])

    def _put(self, lanes, r, part, places, width, values):
        for k, value in enumerate(values):
            r.memory[width][(places - r.base) // width + k] = value

    def add(self, lanes, at, values, order, instruction):
        """Adds atomically, lane by lane in a random order, and gives what was there."""
        before = np.zeros_like(values)
        width = values.dtype.itemsize
        for r, part, places in self._find(lanes, at, width, instruction, writes=True):
            r.is_counter = True
            if r.memory is not None:
                cells, which = r.memory[width].view(values.dtype), np.arange(len(values))[part]
                for k in self.launch.random.permutation(len(which)):
                    cell = (places[k] - r.base) // width
                    before[which[k]] = cells[cell]
                    cells[cell] += values[which[k]]
        return before

    def order(self, lanes, release, acquire):
        """What a fence does."""

    def barrier(self, cta):
        """What a barrier of a CTA does."""

    def finish(self):
        """The end of the launch."""


@dataclass
class Store:
    """A store that only its own thread sees, and those that a barrier put behind it."""

    thread: int
    barriers: int
    """Barriers that its CTA had passed."""
    range: Range
    offset: int
    data: bytes


class WeakMemory(Memory):
    """Stores stay unseen until a release orders them, and loads are as stale as they may be.

    A thread's release makes visible its own stores and, by cumulativity, those that a barrier put
    before it. A thread sees memory as of its last acquire, or of one that a barrier put before it,
    at first as of the launch. Atomics act on visible memory, each at once.
    """

    def __init__(self, launch):
        super().__init__(launch)
        self.tracked = [r for r in self.ranges if r.writable]
        self.barriers = np.zeros(launch.ctas, int)
        self.unseen = [[] for _ in range(launch.ctas)]
        """Stores of each CTA."""
        self.versions = []
        """Visible memory after each change."""
        self.seen = np.zeros((launch.ctas, launch.kernel.threads), int)
        """The version as of which each thread loads, at least."""
        self._changed()

    def _changed(self):
        self.versions.append({r.name: r.memory[1].tobytes() for r in self.tracked})

    def _is_before(self, store, thread, cta):
        return store.thread == thread or store.barriers < self.barriers[cta]

    def _each(self, lanes, part=ALL):
        """The CTA and thread of each lane."""
        active = lanes.active
        return zip(lanes.cta[active][part], lanes.thread[active][part], strict=True)

    def barrier(self, cta):
        self.barriers[cta] += 1
        self.seen[cta] = self.seen[cta].max()

    def _fetch(self, lanes, r, part, places, width, count):
        if r not in self.tracked:
            return super()._fetch(lanes, r, part, places, width, count)
        size, values = width * count, []
        for (cta, thread), place in zip(self._each(lanes, part), places - r.base, strict=True):
            version = self.seen[cta, thread]
            if self.launch.policy == "random":
                version = self.launch.random.integers(version, len(self.versions))
            data = bytearray(self.versions[version][r.name][place : place + size])
            for store in self.unseen[cta]:
                offset = store.offset - place
                if store.range is r and 0 <= offset < size and self._is_before(store, thread, cta):
                    data[offset : offset + len(store.data)] = store.data
            values.append(np.frombuffer(bytes(data), BITS[8 * width]))
        return np.stack(values, 1)

    def _put(self, lanes, r, part, places, width, values):
        for k, (cta, thread) in enumerate(self._each(lanes, part)):
            data = b"".join(value[k].tobytes() for value in values)
            store = Store(thread, self.barriers[cta], r, int(places[k]) - r.base, data)
            self.unseen[cta].append(store)

    def _make_visible(self, stores):
        for store in stores:
            end = store.offset + len(store.data)
            store.range.memory[1][store.offset : end] = np.frombuffer(store.data, np.uint8)

    def order(self, lanes, release, acquire):
        for cta, thread in self._each(lanes):
            if release:
                stores = self.unseen[cta]
                self._make_visible(s for s in stores if self._is_before(s, thread, cta))
                self.unseen[cta] = [s for s in stores if not self._is_before(s, thread, cta)]
                self._changed()
            if acquire:
                self.seen[cta, thread] = len(self.versions) - 1

    def add(self, lanes, at, values, order, instruction):
        self.order(lanes, release=order in ("release", "acq_rel"), acquire=False)
        before = super().add(lanes, at, values, order, instruction)
        self._changed()
        self.order(lanes, release=False, acquire=order in ("acquire", "acq_rel"))
        return before

    def finish(self):
        for cta in self.launch.random.permutation(len(self.unseen)):
            self._make_visible(self.unseen[cta])


# Counting


@dataclass
class Stats:
    """What a launch did, of all its threads."""

    instructions: int = 0
    moves: int = 0
    """Of these, moves between registers and loads of parameters."""
    by_op: Counter = field(default_factory=Counter)
    read: Counter = field(default_factory=Counter)
    written: Counter = field(default_factory=Counter)
    """Bytes that lanes asked for, by tensor."""
    widths: Counter = field(default_factory=Counter)
    """Accesses of lanes, by ("ld" or "st", bytes)."""
    warp_accesses: int = 0
    sectors: int = 0
    """Sectors of 32 bytes that the warps' accesses touch."""
    ideal_sectors: int = 0
    """Sectors that as many different bytes would touch, packed."""

    @property
    def bytes_read(self):
        return self.read.total()

    @property
    def bytes_written(self):
        return self.written.total()

    def note(self, instruction, lanes):
        self.instructions += lanes
        self.by_op[instruction.op] += lanes
        self.moves += lanes * (instruction.op == "mov" or "param" in instruction.modifiers)

    def access(self, lanes, at, size, writes, found):
        self.widths["st" if writes else "ld", size] += len(at)
        for r, _, places in found:
            (self.written if writes else self.read)[r.name] += size * len(places)
        warp = np.arange(lanes.count)[lanes.active] // 32
        warps = len(np.unique(warp))
        self.warp_accesses += warps
        self.sectors += len(_different(warp, at // 32)[0])
        _, packed = _different(warp, at // size)
        self.ideal_sectors += int(np.sum(-(-packed * size // 32)))


def _different(warp, places):
    """The different (warp, place), and how many of them each warp has."""
    pairs = np.unique(np.stack([warp, places], 1), axis=0)
    return pairs, np.unique(pairs[:, 0], return_counts=True)[1]


# Launches


class Launch:
    """A kernel run once over a grid."""

    def __init__(self, kernel, grid, parameters, ranges, options):
        self.kernel, self.grid, self.parameters, self.ranges = kernel, grid, parameters, ranges
        self.ctas = grid[0] * grid[1] * grid[2]
        self.policy, self.trace = options.policy, options.trace
        self.random = np.random.default_rng(options.seed)
        self.stats = Stats() if options.count else None
        self.memory = (WeakMemory if options.mode == "weak" else Memory)(self)
        # NumPy warns of infinities and NaN, which a GPU computes like other values.
        with np.errstate(all="ignore"):
            if options.mode != "lockstep":
                self._interleave(options.window)
            elif options.ctas is None:
                self._lockstep(range(self.ctas))
            else:
                self._lockstep(options.ctas(self.ctas))
        self.memory.finish()
        if options.ctas is None and options.complete:
            for r in self.ranges:
                r.must_be_complete()

    def _lockstep(self, ctas):
        together = max(1, LOCKSTEP_LANES // self.kernel.threads)
        for first in range(0, len(ctas), together):
            some = np.array(ctas[first : first + together])
            lanes = Lanes(self, some, np.arange(self.kernel.threads))
            lanes.shared = SharedMemory(self.kernel, len(some))
            while lanes.at is not None:
                lanes.step()

    def _interleave(self, window):
        """Runs a random warp of the `window` CTAs that are resident, again and again."""
        warps = self.kernel.threads // 32
        waiting = list(self.random.permutation(self.ctas))
        ready, arrived, running = [], {}, Counter()
        while waiting or ready or running:
            while waiting and len(running) < window:
                cta = waiting.pop()
                shared = SharedMemory(self.kernel, 1)
                for warp in range(warps):
                    lanes = Lanes(self, np.array([cta]), np.arange(32) + 32 * warp)
                    lanes.shared = shared
                    ready.append(lanes)
                running[cta], arrived[cta] = warps, []
            if not ready:
                raise Fault(f"deadlock: warps of {self.kernel} wait at a barrier that others left")
            lanes = ready.pop(self.random.integers(len(ready)))
            cta = lanes.cta[0]
            last = self._run_to_an_access(lanes)
            if lanes.at is None:
                running[cta] -= 1
                running += Counter()  # without those at 0
            elif last.is_barrier:
                arrived[cta].append(lanes)
                if len(arrived[cta]) == warps:
                    self.memory.barrier(cta)
                    ready += arrived[cta]
                    arrived[cta] = []
            else:
                ready.append(lanes)

    def _run_to_an_access(self, lanes):
        """Up to where others may see it, or a barrier has been reached; gives what ran last."""
        while True:
            last = lanes.step()
            if lanes.at is None or last.is_barrier:
                return last
            if self.kernel.code[lanes.at].is_seen_by_others:
                return last
