"""A host tier on a virtual clock: ``HostTier`` and its ledger decide, and only the disk and the threads are simulated.

A *process* is a generator that yields the time at which it goes on, or a list in which it waits to be woken. Results
are the same on every machine.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from types import SimpleNamespace
from typing import Any

from moetier.tiers.host import tier
from moetier.tiers.host.demands import Load
from moetier.tiers.host.ledger import Ledger
from moetier.tiers.host.loaders import Loaders, most_prefetches
from moetier.tiers.host.staging import StagingBuffer, StagingBuffers
from moetier.tiers.host.tier import HostTier
from moetier.tiers.source import LOADERS, interruptible_bytes

Process = Generator[Any, None, None]

# seconds
LATENCY = 1e-4  # of a read, besides its bytes
TURN = 5e-5  # that a computing thread loses to a loader that takes the GIL
HANDOVER = 6e-5  # that a caller sleeps so that loaders can begin
COPY = 1 / 5e9  # of a byte from a staging buffer into its slot


class Clock:
    """Virtual time, in place of the module ``time``."""

    def __init__(self) -> None:
        self.now = 0.0
        self._processes: list[tuple[float, int, Process]] = []
        self._order = itertools.count()

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter

    def sleep(self, seconds: float) -> None:
        self.compute(HANDOVER)

    def start(self, process: Process, when: float | None = None) -> None:
        heapq.heappush(self._processes, (self.now if when is None else when, next(self._order), process))

    def step(self) -> None:
        """Let the next process go on."""
        self.now, _, process = heapq.heappop(self._processes)
        wait = next(process)
        if isinstance(wait, float):
            self.start(process, wait)
        else:
            wait.append(process)

    def compute(self, seconds: float) -> None:
        """Let the caller's time pass. Each process that goes on meanwhile takes the GIL from it for a TURN."""
        end = self.now + seconds
        while self._processes and self._processes[0][0] <= end:
            self.step()
            end += TURN
        self.now = end


class VirtualMonitor:
    """In place of ``Monitor``: only the caller and yielding loaders wait."""

    def __init__(self, clock: Clock) -> None:
        self.fork_guard = SimpleNamespace(is_owner=True, check=lambda: None)
        self.waited = 0.0  # seconds, by the caller
        self.parked: list[Process] = []
        self._clock = clock
        self._is_woken = False

    def run(self, step: Callable[..., Any], *arguments: Any) -> Any:
        return step(*arguments)

    def post(self, work: Callable[[], None]) -> None:
        work()

    def wait_for(self, step: Callable[..., Any], *arguments: Any) -> Any:
        began = self._clock.now
        while (found := step(*arguments)) is None:
            self._is_woken = False
            while not self._is_woken:
                self._clock.step()
        self.waited += self._clock.now - began
        return found

    def wake(self) -> None:
        self._is_woken = True
        for process in self.parked:
            self._clock.start(process)
        self.parked.clear()


class VirtualLoaders(Loaders):
    """Loaders and the reads of their store as processes, on a disk that serves one read after the other."""

    def __init__(self, clock: Clock, monitor: VirtualMonitor, rate: float) -> None:
        """``rate``: bytes a second."""
        self.bytes = 0
        self._clock, self._virtual_monitor, self._rate = clock, monitor, rate
        self._monitor: Any = monitor
        self._disk_is_free = 0.0  # when the disk has served all earlier reads
        self._rings, self._idle = 0, deque[Process]()

    def start(self, count: int) -> None:
        self._threads: Any = [None] * count
        for _ in range(count):
            self._clock.start(self._live())

    def ring(self) -> None:
        self._rings += 1
        if self._idle:
            self._clock.start(self._idle.popleft())

    def _read_bytes(self, count: int) -> float:
        """Return when the read ends."""
        self.bytes += count
        self._disk_is_free = max(self._clock.now, self._disk_is_free) + count / self._rate
        return self._disk_is_free + LATENCY

    def _live(self) -> Iterator[Any]:
        while True:
            while not self._rings:
                yield self._idle
            self._rings -= 1
            while (task := self._monitor.run(self._loads.next_read)) is not None:
                if isinstance(task, StagingBuffer):
                    yield self._read_bytes(task.end - task.filled)
                    self._loads.finish_piece(task)
                    self._monitor.wake()
                else:
                    yield from self._read_record(task)

    def _read_record(self, load: Load) -> Iterator[Any]:
        began, whole = self._clock.now, load.pool.slot_bytes
        start, step = 0 if load.staged is None else load.staged.end, interruptible_bytes(whole)
        may_pause = load.is_prefetch
        while may_pause and start < whole:
            yield self._read_bytes(min(step, whole - start))
            start += step
            if start < whole:
                while (wanted := self._loads.go_on(load)) is None:
                    yield self._virtual_monitor.parked
                if not wanted:
                    return
                may_pause = not load.waiters
        if start < whole:
            yield self._read_bytes(whole - start)
        if load.staged is not None:
            while load.staged.is_reading:
                yield self._virtual_monitor.parked
            yield self._clock.now + load.staged.filled * COPY
        self._loads.arrive(load, self._clock.now - began)


class VirtualTier(HostTier):
    """A host tier without memory, of ``blocks`` with ``quota`` slots each, and records of ``record`` bytes."""

    def __init__(
        self, clock: Clock, blocks: int, experts: int, quota: int, record: int, rate: float, *, staging: bool
    ) -> None:
        """``rate``: of the disk, in bytes a second. ``staging``: with staging buffers."""
        tier.time = clock  # type: ignore[attr-defined, assignment]
        block = SimpleNamespace(array="records", top_k=1, experts=experts)
        members = dict.fromkeys(range(blocks), block)
        self._records: Any = [None] * (blocks * quota)
        self.manifest: Any = SimpleNamespace(blocks=[block] * blocks, members={"records": members}, check_keys=_nothing)
        self.plan: Any = SimpleNamespace(
            regions=[SimpleNamespace(array="records", slots=blocks * quota, slot_bytes=record)], first_slots=[0]
        )
        self.virtual_monitor = VirtualMonitor(clock)
        self.virtual_loaders = VirtualLoaders(clock, self.virtual_monitor, rate)
        self._monitor: Any = self.virtual_monitor
        self._loaders = self.virtual_loaders
        self._ledger = Ledger(
            self.manifest,
            self.plan,
            Discarded(),  # type: ignore[arg-type]
            buffers=StagingBuffers(record) if staging else None,
            wake=self.virtual_monitor.wake,
            ring=self.virtual_loaders.ring,
            watch=_nothing,
            ahead=2 * LOADERS,
            most_prefetches=most_prefetches(LOADERS, self.plan),
            clock=clock.monotonic,
        )
        self._loaders._loads = self._ledger.loads
        self._loaders.start(LOADERS)


class Discarded:
    """In place of an arena's directory, which no other process reads."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return _nothing


def _nothing(*_: Any) -> None:
    pass
