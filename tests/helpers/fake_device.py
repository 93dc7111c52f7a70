"""A device that does what it is told as late as is legal, each stream in its own time, as chance has it."""

from __future__ import annotations

import contextlib
import random
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from enum import Enum, auto
from functools import partial

import numpy as np
import torch
from readers import PATIENCE


class Order(Enum):
    """An order of operations that a broken device does not keep."""

    COMPUTE_AFTER_COPY = auto()
    REFILL_AFTER_COMPUTE = auto()
    REUSE_AFTER_COPY = auto()


class FakeEvent:
    def __init__(self, device: FakeDevice, stream: FakeStream) -> None:
        self.device = device
        self.stream = stream
        self.done = False

    def synchronize(self) -> None:
        if self.done:
            return
        self.device.waits_of_the_host += 1
        error, self.device.wait_error = self.device.wait_error, None
        if error is not None:
            raise error
        if self.stream is self.device.copies:
            assert self.device.copy_may_end.wait(PATIENCE)
        if self.device.forgets is not Order.REUSE_AFTER_COPY:
            self.device.run_until(self)


class FakeStream:
    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.queue: deque[Callable[[], None] | FakeEvent] = deque()  # an event: wait for it
        self.waits = 0  # ever queued

    def record_event(self) -> FakeEvent:
        event = FakeEvent(self.device, self)

        def mark() -> None:
            event.done = True

        with self.device.lock:
            self.queue.append(mark)
        return event

    def wait_event(self, event: FakeEvent) -> None:
        forgotten = Order.REFILL_AFTER_COMPUTE if self is self.device.copies else Order.COMPUTE_AFTER_COPY
        if self.device.forgets is not forgotten:
            with self.device.lock:
                self.waits += 1
                self.queue.append(event)

    @property
    def blocked_by(self) -> FakeEvent | None:
        head = self.queue[0]
        return head if isinstance(head, FakeEvent) and not head.done else None


class FakeDevice:
    """Its memory is the host's. ``capacity`` bytes of it can be allocated."""

    def __init__(
        self,
        chance: random.Random,
        *,
        forgets: Order | None = None,
        capacity: int = 1 << 30,
        locks_pages: bool = True,
    ) -> None:
        self.lock = threading.RLock()
        self.forgets = forgets
        self.copies = FakeStream(self)
        self.arranging = FakeStream(self)
        self.streams = [self.copies, FakeStream(self), self.arranging]
        self.locked: dict[int, int] = {}  # bytes of page-locked memory, by address
        self.waits_of_the_host = 0  # for events that were not done
        self.copy_error: Exception | None = None  # of the next copy
        self.wait_error: Exception | None = None  # of the host's next wait for an event
        self.copying = 0  # copies that callers are about to queue
        self.copy_may_begin = threading.Event()  # a call that queues a copy returns only then
        self.copy_may_begin.set()
        self.copy_may_end = threading.Event()  # for who waits for it
        self.copy_may_end.set()
        self.pending: Counter[int] = Counter()  # copies that have not run, by the address of their source
        self._chance = chance
        self.left = capacity
        self._locks_pages = locks_pages
        self._here = threading.local()

    # -- what moetier.tiers.device.stream.StreamDevice asks for ------------------------------------------------------

    def allocate(self, nbytes: int) -> torch.Tensor:
        with self.lock:
            if nbytes > self.left:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes} of {self.left} bytes.")
            self.left -= nbytes
        memory = np.full(nbytes, 0xEE, dtype=np.uint8)  # is referred to by all tensors on it
        weakref.finalize(memory, self._give_back, nbytes)
        return torch.from_numpy(memory)

    def _give_back(self, nbytes: int) -> None:
        with self.lock:
            self.left += nbytes

    def page_locked(self, nbytes: int) -> torch.Tensor:
        if not self._locks_pages:
            raise RuntimeError("CUDA error: operation not supported")
        memory = np.full(nbytes, 0xEE, dtype=np.uint8)
        self.locked[memory.ctypes.data] = nbytes
        weakref.finalize(memory, self._unlock, memory.ctypes.data)
        return torch.from_numpy(memory)

    def _unlock(self, address: int) -> None:
        assert not self.pending[address], "it is copied from"
        del self.locked[address]

    def current_stream(self) -> FakeStream:
        return getattr(self._here, "stream", self.streams[1])

    def copy_stream(self) -> FakeStream:
        return self.copies

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with self.lock:
            assert source.data_ptr() in self.locked or not self._locks_pages, "a copy that the caller waits for"
            self.copying += 1
        may_begin = self.copy_may_begin.wait(PATIENCE)
        with self.lock:
            self.copying -= 1
        assert may_begin
        with self.lock:
            error, self.copy_error = self.copy_error, None
        if error is not None:
            raise error
        with self.lock:
            self.pending[source.data_ptr()] += 1
            self.copies.queue.append(partial(self._copy, target, source))

    def arranging_stream(self) -> FakeStream:
        return self.arranging

    def run(self, stream: FakeStream, work: Callable[[], None]) -> None:
        with self.lock:
            stream.queue.append(work)

    # -- the test's side ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def stream(self) -> Iterator[FakeStream]:
        """A new stream, current for this thread."""
        with self.lock:
            stream = FakeStream(self)
            self.streams.append(stream)
        self._here.stream = stream
        try:
            yield stream
        finally:
            del self._here.stream

    def compute(self, work: Callable[[], None]) -> None:
        with self.lock:
            self.current_stream().queue.append(work)

    def run_until(self, event: FakeEvent) -> None:
        """Does what ``event`` needs, in between whatever else could be done, as chance has it."""
        with self.lock:
            while not event.done:
                needed = event.stream
                for _ in self.streams:
                    blocker = needed.blocked_by
                    if blocker is None:
                        break
                    needed = blocker.stream
                else:
                    raise AssertionError("events wait for each other")
                able = [s for s in self.streams if s.queue and s.blocked_by is None]
                self._step(needed if self._chance.random() < 0.5 else self._chance.choice(able))

    def finish(self) -> None:
        """Does everything that is left."""
        with self.lock:
            while waiting := [s for s in self.streams if s.queue]:
                able = [s for s in waiting if s.blocked_by is None]
                assert able, "events wait for each other"
                self._step(self._chance.choice(able))

    def _step(self, stream: FakeStream) -> None:
        head = stream.queue.popleft()
        if not isinstance(head, FakeEvent):
            head()

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)
        self.pending[source.data_ptr()] -= 1


class PromptStream(FakeStream):
    """Stream of a thread that computes at once: the work that it waits for is done before."""

    def wait_event(self, event: FakeEvent) -> None:
        self.device.run_until(event)


def prompt_device(seed: int, *, capacity: int = 1 << 30) -> FakeDevice:
    """Return a device whose callers compute in their own thread, as torch on a CPU does."""
    device = FakeDevice(random.Random(seed), capacity=capacity)
    device.streams[1] = PromptStream(device)
    return device
