"""DaemonTier: the host tier of a daemon on this machine, used like a tier of this process.

The daemon's arena is mapped read-only. A hit is found in the arena's directory, without a message to the daemon; the
slot's generation proves afterwards that the record was not replaced meanwhile. All misses of a block are sent in one
request. While the daemon is away or full, misses are read from the local store. DaemonTier and Misses are in one
module, because each changes the state of the other.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue

from moetier.runtime.wire.address import Address
from moetier.runtime.wire.control import ControlConnection
from moetier.tiers.closeable import Closeable, closed_on_error
from moetier.tiers.errors import ClosedError, ExhaustedError, StoreError, UnavailableError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import POLL_SECONDS, ForkGuard
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import Lease, Residents
from moetier.tiers.stats import TierCounters, TierStats

from .daemon_link import Link, LinkEvent, RequestFailed, SlotGranted, SlotRequest
from .fallback import Fallback
from .mapped_arena import MappedArena

GRACE = 1.0  # seconds that a daemon may be away before the local store is read
_RETRY = 0.1  # seconds before a request that failed because the daemon was ending is sent again


class DaemonTier(Closeable):
    """Source of experts in the memory of a daemon on this host; a ``CopySource``.

    Thread-safe. A forked child must open a tier of its own. If an exception from outside, such as Ctrl-C, interrupts a
    method, ``reclaim`` ends the leases that it has left open.
    """

    @classmethod
    def open(cls, folder: Path, directory: Path, manifest: Manifest, *, timeout: float = 30.0) -> DaemonTier:
        """Connect to the daemon in ``folder``, as a client of the store with ``manifest``.

        The model directory ``directory`` is read only while the daemon is away or full. If it holds no records, a miss
        waits ``timeout`` seconds for the daemon.

        Raises:
            UnavailableError: no daemon answers, or it accepts no more clients.
            UnknownModelError: the daemon does not serve the store.
            RefusedError: another user runs the daemon, or could enter or replace its folder.
            ArenaError: the daemon's arena can't be mapped.
            ProtocolError: the daemon has another version.
        """
        control = ControlConnection.open(folder, manifest.digest)
        with closed_on_error(control):
            return cls(folder, manifest, control, Fallback(directory, manifest), timeout)

    def __init__(
        self, folder: Path, manifest: Manifest, control: ControlConnection, fallback: Fallback, timeout: float
    ) -> None:
        self._folder = folder
        self._manifest = manifest
        self._arena = MappedArena.of(control, manifest)
        self._fallback = fallback
        self._timeout = timeout
        self._fork_guard = ForkGuard()
        self._closed_error: ClosedError | None = None
        self._prefetching: set[int] = set()  # blocks whose prefetch requests the daemon may still have to serve
        self._copied: set[ExpertKey] = set()  # keys pinned for a copy, and not reported as used since then
        self._misses: dict[int, Misses] = {}  # misses that hold or await leases, by thread
        self._counting = threading.Lock()  # guards the counters; finalizers don't take it
        self._counters = TierCounters("daemon")
        self._link = Link(folder, manifest.digest, control, self._connected)
        _opened_here.add(self)

    def acquire(self, keys: Sequence[ExpertKey]) -> Generator[Lease[memoryview], None, None]:
        """Yield leases as ``ExpertSource`` says. Each has a proof, unless its record is from the local store.

        Raises MissingExpertError for a key that the model does not have. If the local store can't be read, also raises
        UnavailableError if the daemon does not answer in time, and ExhaustedError if all its slots are leased.
        """
        if not keys:
            return
        block = keys[0].block
        self._manifest.check_keys(block, keys)
        self._check_open()
        arena = self._arena
        self._copied.difference_update(keys)  # this demand is reported to the daemon in any case
        cached, missing = [], []
        for key in dict.fromkeys(keys):
            if (place := arena.directory.find(key)) is None:
                missing.append(key.expert)
            else:
                cached.append((key, *place))
        if cached:
            self._link.note_uses([place[0] for place in reversed(cached)])
        if block in self._prefetching:
            self._prefetching.discard(block)
            if not missing:  # with misses, their request tells the daemon that the demand has come
                self._link.prefetch(block, [])
        with self._counting:
            self._counters.looked_up(hits=len(cached), misses=len(missing))
        rest = Misses(self, block)
        try:
            if missing:
                rest.request(missing)
            proofs = []
            for number, (key, slot, generation) in enumerate(cached, 1):
                lease, proof = arena.lease(key, slot, generation, more=number < len(cached))
                proofs.append((key.expert, proof))
                yield lease
                self._check_open()
            if lost := [expert for expert, proof in proofs if proof.held is False]:
                with self._counting:
                    self._counters.looked_up(misses=len(lost), discarded=len(lost))
                rest.request(lost)
            if rest.missing:
                yield from rest.leases()
        finally:
            rest.close()

    def residents(self, block: int) -> Residents | None:
        """Return where the block's records are in the daemon's arena, as ``ExpertSource`` says."""
        self._fork_guard.check()
        self._check_open()
        return self._arena.residents(block, self._manifest.blocks[block].array)

    def note_uses(self, block: int, experts: Sequence[int]) -> None:
        """Report uses to the daemon, as ``ExpertSource`` says."""
        distinct = dict.fromkeys(experts)
        if self._copied:
            self._copied.difference_update([ExpertKey(block, expert) for expert in distinct])
        self._link.note_uses([ExpertKey(block, expert) for expert in reversed(distinct)])
        if block in self._prefetching:
            self._prefetching.discard(block)
            self._link.prefetch(block, [])
        with self._counting:
            self._counters.looked_up(hits=len(distinct))

    def take_back_uses(self, block: int, experts: Sequence[int]) -> None:
        """Take back uses in this client's counters, as ``ExpertSource`` says. The daemon goes on counting them."""
        with self._counting:
            self._counters.looked_up(discarded=len(set(experts)))

    def reclaim(self) -> None:
        """End the leases of this thread that an exception has left open, as ``ExpertSource`` says."""
        self._fork_guard.check()
        if (misses := self._misses.get(threading.get_ident())) is not None:
            misses.close()
        if self._fallback.host is not None:
            self._fallback.host.reclaim()

    def prefetch(self, block: int, keys: Sequence[ExpertKey]) -> None:
        """Request prefetches as ``ExpertSource`` says, unless the daemon is away.

        No message is sent if all records are in the directory and no earlier request for the block may be open.
        """
        self._manifest.check_keys(block, keys)
        self._check_open()
        find = self._arena.directory.find
        if not all(find(key) for key in keys):
            self._prefetching.add(block)
        elif block in self._prefetching:
            self._prefetching.discard(block)
        else:
            return
        self._link.prefetch(block, [key.expert for key in keys])

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """Return absent keys as ``ExpertSource`` says: those that are not in the arena's directory."""
        find = self._arena.directory.find
        return [key for key in keys if find(key) is None]

    @contextmanager
    def pin(self, key: ExpertKey) -> Iterator[Lease[memoryview] | None]:
        """Yield a lease of a record to copy, as ``CopySource`` says; None if the arena does not have the record.

        The lease has a proof. No message is sent to the daemon. Raises MissingExpertError if the model has no such
        expert.
        """
        self._manifest.check_keys(key.block, [key])
        self._check_open()
        arena = self._arena
        if (place := arena.directory.find(key)) is None:
            yield None
            return
        lease, proof = arena.lease(key, *place)
        self._copied.add(key)  # before the copy is made, as a demand may find the copy at once
        yield lease
        if not proof.held:
            self._copied.discard(key)

    def note_copy_uses(self, keys: Sequence[ExpertKey]) -> None:
        """Report uses of copies, as ``CopySource`` says: each key once after its record was pinned for a copy.

        The daemon counts the reported uses as hits.
        """
        unreported = [key for key in keys if key in self._copied]
        self._copied.difference_update(unreported)
        if unreported:
            self._link.note_uses(unreported)

    def stats(self) -> TierStats:
        """Return the counters.

        The slots are those of the daemon, for all its clients. The loads are only those from the local store.
        """
        self._fork_guard.check()
        layout, fallback = self._arena.layout, self._fallback.host
        ready = 0 if self._closed_error is not None else self._arena.directory.ready
        with self._counting:
            stats = self._counters.snapshot(
                slots=layout.slots, ready=ready, leased=None, slot_bytes=layout.nbytes - layout.directory_bytes
            )
        if fallback is None:
            return stats
        reads = fallback.stats()
        return replace(stats, bytes_in=reads.bytes_in, loads=reads.loads, load_seconds=reads.load_seconds)

    @property
    def address(self) -> Address:
        """Address of the daemon: the folder of its sockets."""
        return Address(folder=self._folder)

    @property
    def away(self) -> str:
        """Why the daemon is away; "" while it is connected."""
        return "" if self._link.away_since is None else self._link.error.cause

    @property
    def connections(self) -> int:
        """Number of connections made to the daemon since the tier was opened."""
        return self._link.connections

    def close(self) -> None:
        """Close as ``ExpertSource`` says. A referenced record stays readable, but its proof raises ClosedError.

        In a forked child, only the child's own mappings and descriptors are closed.
        """
        if self._fork_guard.is_owner:
            self._closed_error = self._closed_error or ClosedError("The tier was closed.", "Load the model again.")
            self._link.close()
        self._fallback.close()
        self._arena.close()
        _opened_here.discard(self)

    def _connected(self, control: ControlConnection) -> MappedArena:
        """Map the arena of a new connection. The old arena is unmapped when its last lease ends."""
        self._arena = MappedArena.of(control, self._manifest, self._arena)
        self._fallback.error = ""
        return self._arena

    def _check_open(self) -> None:
        if self._closed_error is not None:
            raise self._closed_error.__class__(self._closed_error.cause, self._closed_error.fix)


class Misses:
    """The misses of one call of ``acquire``, all of one block. The daemon grants them, or the local store is read."""

    def __init__(self, tier: DaemonTier, block: int) -> None:
        self._tier = tier
        self._block = block
        self._thread = 0  # set by the first request
        self._requests: list[SlotRequest] = []
        self._events: SimpleQueue[LinkEvent] = SimpleQueue()
        self.missing: dict[int, None] = {}  # experts that the caller has not computed with yet

    def request(self, experts: Sequence[int]) -> None:
        """Request experts from the daemon, in one message."""
        self.missing.update(dict.fromkeys(experts))
        request = SlotRequest(self._block, dict.fromkeys(experts), self._events)
        # appended first, so that close() cancels it even if an exception interrupts what follows
        self._requests.append(request)
        self._thread = threading.get_ident()
        self._tier._misses[self._thread] = self
        self._tier._link.request(request)

    def close(self) -> None:
        """Cancel all requests. Never waits. After an interruption by an exception, it can be called again."""
        for request in self._requests:
            self._tier._link.cancel(request)
        if self._tier._misses.get(self._thread) is self:
            self._tier._misses.pop(self._thread, None)

    def leases(self) -> Generator[Lease[memoryview], None, None]:
        """Yield a lease of each missing expert, in the order in which they are granted."""
        tier = self._tier
        while self.missing:
            granted = self._wait()
            if isinstance(granted, HostTier):
                yield from self._from_fallback(granted)
                return
            expert = granted.expert
            lease, proof = granted.arena.lease(ExpertKey(self._block, expert), granted.slot, granted.generation)
            yield lease
            tier._check_open()
            if proof.held is not False:
                del self.missing[expert]
                if self.missing:  # otherwise close() cancels the request and so releases this lease
                    tier._link.release(granted.request, expert)
            else:  # the daemon that granted the slot is gone, and another one has refilled it
                with tier._counting:
                    tier._counters.discarded += 1
                tier._link.cancel(granted.request)
                self.request([expert, *granted.request.awaited])

    def _wait(self) -> SlotGranted | HostTier:
        """Return the next granted slot, or the fallback's tier if the daemon grants none in time."""
        tier, link, fallback = self._tier, self._tier._link, self._tier._fallback
        began = time.monotonic()
        deadline = began + tier._timeout
        try:
            while True:
                tier._check_open()
                away = link.away_since
                due = deadline if away is None or fallback.error else min(deadline, max(away, began - GRACE) + GRACE)
                event = _next_event(self._events, due)
                if isinstance(event, SlotGranted):
                    if event.expert in self.missing:
                        return event
                    # granted a second time, as it was requested again meanwhile
                    link.release(event.request, event.expert)
                elif isinstance(event, RequestFailed):
                    if (host := self._fail(event, deadline)) is not None:
                        return host
                elif time.monotonic() >= due:
                    if (host := fallback.open()) is not None:
                        return host
                    if time.monotonic() >= deadline:
                        raise self._timeout_error()
        finally:
            with tier._counting:
                tier._counters.waited(time.monotonic() - began)

    def _fail(self, event: RequestFailed, deadline: float) -> HostTier | None:
        """Handle a failed request: return the fallback's tier, or None after the request was sent to the daemon again.

        Raises the request's error if neither is possible, as after ``deadline`` (monotonic clock).
        """
        tier, error = self._tier, event.error
        if isinstance(error, StoreError):
            with tier._counting:
                tier._counters.failures += 1
        is_ending = isinstance(error, UnavailableError | ClosedError)
        if not is_ending and not isinstance(error, ExhaustedError):
            raise error
        if (host := tier._fallback.open()) is not None:
            return host
        if not is_ending or time.monotonic() + _RETRY >= deadline:
            raise error
        time.sleep(_RETRY)
        self.request(list(event.request.awaited))
        return None

    def _from_fallback(self, host: HostTier) -> Generator[Lease[memoryview], None, None]:
        self.close()
        first = self._tier._arena.layout.slots  # the fallback's slots are numbered after the arena's
        with closing(host.acquire([ExpertKey(self._block, expert) for expert in self.missing])) as leases:
            for lease in leases:
                yield Lease(lease.key, lease.record, first + lease.slot, lease.proof, lease.more)
                self._tier._check_open()

    def _timeout_error(self) -> UnavailableError:
        tier, link = self._tier, self._tier._link
        if link.away_since is None:
            cause = f"The daemon has not answered for {tier._timeout:g} seconds."
        else:
            cause = f"The daemon has been away for {tier._timeout:g} seconds or more: {link.error.cause}"
        return UnavailableError(f"{cause} {tier._fallback.error}".rstrip(), "Restart the daemon: moetier daemon DIR")


def _next_event(events: SimpleQueue[LinkEvent], due: float) -> LinkEvent:
    """Return the next event; None if there is none before ``due`` (monotonic clock), or within POLL_SECONDS."""
    try:
        return events.get(timeout=min(max(due - time.monotonic(), 0.0), POLL_SECONDS))
    except Empty:
        return None


_opened_here: weakref.WeakSet[DaemonTier] = weakref.WeakSet()


def _close_in_child() -> None:
    """Make every use of an inherited tier raise in a forked child.

    The child does not have the threads that a use would wait for.
    """
    for tier in list(_opened_here):
        tier._closed_error = tier._closed_error or ClosedError(
            "This is another process's tier: it was opened before this process was forked.",
            "Load the model in the process that uses it, or start child processes by spawn.",
        )


os.register_at_fork(after_in_child=_close_in_child)
