"""Fetch misses from the daemon; fall back to the local store while the daemon is away or full."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

from moetier.tiers.cache.budget import slots_for, smallest_budget
from moetier.tiers.errors import BudgetError, ClosedError, ExhaustedError, StoreError, UnavailableError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import POLL_SECONDS, ForkGuard, Monitor, interruptible
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import Lease
from moetier.tiers.stats import TierCounters, TierStats
from moetier.tiers.store.reader import ExpertStore

from .link import Link, LinkEvent, RequestFailed, SlotGranted, SlotRequest

GRACE = 1.0  # seconds that a daemon may be away before the local store is read
_RETRY = 0.1  # seconds until a daemon that refused a request is asked again


class ClientCounters:
    """Counters of a tier whose callers share no lock. Counting never waits, as finalizers count."""

    def __init__(self, name: str) -> None:
        self._counters = TierCounters(name)
        self._monitor = Monitor()

    def add(self, *, hits: int = 0, misses: int = 0, discarded: int = 0, failures: int = 0) -> None:
        """Add to the counters of these names."""
        self._monitor.post(partial(self._add, hits, misses, discarded, failures))

    def waited(self, seconds: float) -> None:
        """Count one wait for a record."""
        self._monitor.post(partial(self._counters.waited, seconds))

    def snapshot(self, *, slots: int, ready: int, slot_bytes: int, reads: TierStats | None) -> TierStats:
        """Return the counters, with the reads of the fallback's tier. Raises ClosedError in a forked child."""
        take = partial(self._counters.snapshot, slots=slots, ready=ready, leased=None, slot_bytes=slot_bytes)
        stats = self._monitor.run(take)
        if reads is None:
            return stats
        return replace(stats, bytes_in=reads.bytes_in, loads=reads.loads, load_seconds=reads.load_seconds)

    def _add(self, hits: int, misses: int, discarded: int, failures: int) -> None:
        self._counters.hits += hits
        self._counters.misses += misses
        self._counters.discarded += discarded
        self._counters.failures += failures


class Fallback:
    """Host tier of the smallest budget over the store in a model directory, opened when it is first needed."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory = directory
        self._manifest = manifest
        self._fork_guard = ForkGuard()
        self._lock = threading.Lock()
        self._closing = contextlib.ExitStack()
        self._host: HostTier | None = None
        self._error: StoreError | BudgetError | None = None
        self._closed = False

    def open(self) -> HostTier | None:
        """Return the tier, or None if there is no such store or no memory for it; ``error`` says which."""
        self._fork_guard.check()
        with self._lock:
            if self._closed:
                raise ClosedError("The tier was closed.", "Load the model again.")
            if self._host is None and self._error is None:
                self._closing.close()  # left by an attempt that an exception cut
                with contextlib.ExitStack() as opening:
                    try:
                        store = opening.enter_context(ExpertStore.open(self._directory))
                        if store.manifest.digest != self._manifest.digest:
                            raise StoreError(f"{self._directory} holds another store by now.", "Load the model again.")
                        slots = slots_for(self._manifest, smallest_budget(self._manifest))
                        host = opening.enter_context(HostTier(store, slots=slots))
                        store.on_fault(host.condemn)
                    except (StoreError, BudgetError) as error:
                        self._error = error
                    else:
                        self._closing = opening.pop_all()
                        self._host = host
            return self._host

    @property
    def error(self) -> str:
        """Why the tier could not be opened; "" if it was, or was not needed yet."""
        return self._error.cause if self._error is not None else ""

    def retry(self) -> None:
        """Let the next ``open`` try again after a failure."""
        self._error = None

    def reclaim(self) -> None:
        """End all that the calling thread has acquired here."""
        if self._host is not None:
            self._host.reclaim()

    def stats(self) -> TierStats | None:
        """Return the tier's counters; None before it was needed."""
        host = self._host
        return host.stats() if host is not None else None

    def close(self) -> None:
        """Close the tier and its store. Idempotent."""
        if self._fork_guard.is_owner:  # in a forked child the lock may be held for ever
            with self._lock:
                self._closed = True
        self._closing.close()


@dataclass(frozen=True, slots=True)
class MissContext:
    """State that all misses of one tier share."""

    link: Link
    fallback: Fallback
    patience: float  # seconds that a miss waits for the daemon if there is no fallback
    counters: ClientCounters
    check_open: Callable[[], None]  # raises ClosedError once the tier is closed
    slots: Callable[[], int]  # number of slots in the mapped arena


class Misses:
    """The misses of one call of acquire, all of one block.

    ``register`` has those that hold or await something, by thread.
    """

    def __init__(self, context: MissContext, block: int, register: dict[int, Misses]) -> None:
        self._context = context
        self._block = block
        self._register = register
        self._thread = 0  # set by the first request
        self._requests: list[SlotRequest] = []
        self._events: SimpleQueue[LinkEvent] = SimpleQueue()
        self.wanted: dict[int, None] = {}  # experts that were not computed with yet

    def want(self, experts: Sequence[int]) -> None:
        """Request experts from the daemon, in one message."""
        self.wanted.update(dict.fromkeys(experts))
        request = SlotRequest(self._block, dict.fromkeys(experts), self._events)
        self._requests.append(request)  # first: close() cancels it even if an exception cuts what follows
        self._thread = threading.get_ident()
        self._register[self._thread] = self
        self._context.link.request(request)

    def close(self) -> None:
        """Cancel all requests. Never waits; if an exception cuts it, it can be repeated."""
        for request in self._requests:
            self._context.link.cancel(request)
        if self._register.get(self._thread) is self:
            self._register.pop(self._thread, None)

    def leases(self) -> Generator[Lease[memoryview], None, None]:
        """Yield a lease of each wanted expert in order of arrival."""
        while self.wanted:
            granted = self._wait()
            if isinstance(granted, HostTier):
                yield from self._from_fallback(granted)
                return
            expert = granted.expert
            lease, proof = granted.arena.lease(ExpertKey(self._block, expert), granted.slot, granted.generation)
            yield lease
            self._context.check_open()
            if proof.held:
                del self.wanted[expert]
                if self.wanted:  # otherwise close() ends the request with it
                    self._context.link.release(granted.request, expert)
            else:  # the daemon that granted the slot is gone, and another one has refilled it
                self._context.counters.add(discarded=1)
                self._context.link.cancel(granted.request)
                self.want([expert, *granted.request.awaited])

    def _wait(self) -> SlotGranted | HostTier:
        """Return the next granted slot, or the fallback's tier if the daemon grants none in time."""
        context, link = self._context, self._context.link
        began = time.monotonic()
        limit = began + context.patience
        try:
            while True:
                context.check_open()
                away = link.away_since
                due = limit if away is None or context.fallback.error else min(limit, max(away, began - GRACE) + GRACE)
                try:
                    event = _take(self._events, max(due - time.monotonic(), 0.0))
                except Empty:
                    if time.monotonic() < due:
                        continue
                    if (host := context.fallback.open()) is not None:
                        return host
                    if time.monotonic() >= limit:
                        raise self._timeout_error() from None
                    continue
                if isinstance(event, SlotGranted):
                    if event.expert in self.wanted:
                        return event
                    link.release(event.request, event.expert)  # granted twice: it was requested again meanwhile
                elif isinstance(event, RequestFailed) and (host := self._fail(event, limit)) is not None:
                    return host
        finally:
            context.counters.waited(time.monotonic() - began)

    def _fail(self, event: RequestFailed, limit: float) -> HostTier | None:
        """Return the fallback's tier if it may help; None if the daemon was asked again. Raises the error otherwise."""
        if isinstance(event.error, StoreError):
            self._context.counters.add(failures=1)
        is_ending = isinstance(event.error, UnavailableError | ClosedError)
        if not is_ending and not isinstance(event.error, ExhaustedError):
            raise event.error
        if (host := self._context.fallback.open()) is not None:
            return host
        if not is_ending or time.monotonic() + _RETRY >= limit:
            raise event.error
        _sleep(_RETRY)
        self.want(list(event.request.awaited))
        return None

    def _from_fallback(self, host: HostTier) -> Generator[Lease[memoryview], None, None]:
        self.close()
        first = self._context.slots()  # the fallback's slots are numbered behind the arena's
        keys = [ExpertKey(self._block, expert) for expert in self.wanted]
        with contextlib.closing(host.acquire(keys)) as leases:
            for lease in leases:
                yield Lease(lease.key, lease.record, first + lease.slot, lease.proof, lease.more)
                self._context.check_open()

    def _timeout_error(self) -> UnavailableError:
        context, link = self._context, self._context.link
        if link.away_since is None:
            cause = f"The daemon has not answered for {context.patience:g} seconds."
        else:
            cause = f"The daemon has been away for {context.patience:g} seconds and more: {link.error.cause}"
        return UnavailableError(f"{cause} {context.fallback.error}".rstrip(), "Start it again: moetier daemon DIR")


@interruptible
def _take(events: SimpleQueue[LinkEvent], seconds: float) -> LinkEvent:
    """Raises Empty."""
    return events.get(timeout=min(seconds, POLL_SECONDS))


@interruptible
def _sleep(seconds: float) -> None:
    time.sleep(seconds)
