"""DaemonTier: the host tier of a daemon on this machine, as one of this process.

The daemon's arena is mapped read-only. A hit is found in its directory and asks nobody; the generation of its slot
proves it afterwards. What is missing of a block is one request; while the daemon is away or full, it is read from the
local store.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType

from moetier.tiers.errors import ClosedError, ExhaustedError, StoreError, UnavailableError
from moetier.tiers.host import HostTier
from moetier.tiers.keys import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.monitor import Monitor
from moetier.tiers.source import Lease
from moetier.tiers.stats import TierCounters, TierStats

from .link import Event, Failed, Granted, Link, Request, Traffic
from .mapped import MappedArena
from .side import SideConnection
from .spare import Spare

GRACE = 1.0  # seconds that a daemon may be away until the local store is read instead
_AGAIN = 0.1  # seconds until a daemon that takes no requests is asked again


class DaemonTier:
    """An ExpertSource over a daemon of this host. Thread-safe; a forked child must open its own."""

    @classmethod
    def open(cls, folder: Path, directory: Path, manifest: Manifest, *, patience: float = 30.0) -> DaemonTier:
        """At the daemon in ``folder``, for the store of ``manifest``. The model directory ``directory`` is read only
        when the daemon is away or full; where it holds no records, a miss waits ``patience`` seconds for the daemon.

        Raises UnavailableError, UnknownModelError, RefusedError, ArenaError, ProtocolError.
        """
        side = SideConnection.open(folder, manifest.digest)
        try:
            arena = MappedArena.of(side, manifest)
            return cls(folder, manifest, side, arena, Spare(directory, manifest), patience)
        except BaseException:
            side.close()
            raise

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        side: SideConnection,
        arena: MappedArena,
        spare: Spare,
        patience: float,
    ) -> None:
        self._manifest = manifest
        self._arena = arena
        self._spare = spare
        self._patience = patience
        self._closed_error: ClosedError | None = None
        self._wished: set[int] = set()  # blocks whose wishes the daemon may still have to fulfil
        self._counters = TierCounters("daemon")
        self._counting = Monitor()  # of the counters alone; the link's threads never hold it
        self._link = Link(folder, manifest.digest, side, self._arrive)
        _open_here.add(self)

    def acquire(self, keys: Sequence[ExpertKey]) -> Generator[Lease[memoryview], None, None]:
        """As ``ExpertSource`` says; each lease has a proof, but for those of the local store. Raises MissingExpertError
        for a key that the model does not have, UnavailableError when the daemon does not answer in time, ExhaustedError
        when its slots are all leased; both only where the local store can't be read either."""
        if not keys:
            return
        block = keys[0].block
        self._manifest.check_keys(block, keys)
        self._check_open()
        arena = self._arena
        found, missing = [], []
        for key in dict.fromkeys(keys):
            place = arena.find(key)
            if place is None:
                missing.append(key.expert)
            else:
                found.append((key, *place))
        if found:
            self._link.report([place[0] for place in reversed(found)])
        if block in self._wished:
            self._wished.discard(block)
            if not missing:  # else the daemon learns of the demand by itself
                self._link.prefetch(block, [])
        self._count(hits=len(found), misses=len(missing))
        rest = _Misses(self, block)
        try:
            if missing:
                rest.want(missing)
            for key, slot, generation in found:
                lease, proof = arena.lease(key, slot, generation)
                yield lease
                self._check_open()
                if not proof.held:
                    self._count(hits=-1, misses=1, discarded=1)
                    rest.want([key.expert])
            if rest.wanted:
                yield from rest.leases()
        finally:
            rest.close()

    def prefetch(self, block: int, wishes: Sequence[ExpertKey]) -> None:
        """As ``ExpertSource`` says; while the daemon is away, no wish comes true. No message tells of wishes that are
        there already."""
        self._manifest.check_keys(block, wishes)
        self._check_open()
        find = self._arena.find
        if not all(find(key) for key in wishes):
            self._wished.add(block)
        elif block in self._wished:
            self._wished.discard(block)
        else:
            return
        self._link.prefetch(block, [key.expert for key in wishes])

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """As ``ExpertSource`` says; what the daemon is reading counts as absent."""
        find = self._arena.find
        return [key for key in keys if find(key) is None]

    def stats(self) -> TierStats:
        """Slots are the daemon's, which all its clients share; ``bytes_in`` is what was read from the local store."""
        closed = self._closed_error is not None
        with self._counting:
            self._counters.bytes_in = self._spare.bytes_in
            return self._counters.snapshot(
                slots=self._arena.plan.slots,
                ready=0 if closed else self._arena.ready,
                slot_bytes=self._arena.plan.nbytes - self._arena.plan.directory_bytes,
            )

    @property
    def traffic(self) -> Traffic:
        """What passed between this process and the daemon."""
        return self._link.traffic

    def close(self) -> None:
        """As ``ExpertSource`` says. A record stays readable while it is held; it can't be proved any more.

        In a forked child only its own maps and descriptors go.
        """
        if self._counting.home.is_here:
            self._closed_error = self._closed_error or ClosedError("The tier was closed.", "Load the model again.")
            self._link.close()
        self._spare.close()
        self._arena.close()
        _open_here.discard(self)

    def __enter__(self) -> DaemonTier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _arrive(self, side: SideConnection) -> MappedArena:
        """By the link's thread, on every connection. The old arena goes with the last lease of it."""
        self._arena = MappedArena.of(side, self._manifest, self._arena)
        self._spare.forgive()
        return self._arena

    def _check_open(self) -> None:
        if self._closed_error is not None:
            raise self._closed_error.__class__(self._closed_error.cause, self._closed_error.fix)

    def _count(self, *, hits: int = 0, misses: int = 0, discarded: int = 0, failures: int = 0) -> None:
        self._counting.post(partial(self._add, hits, misses, discarded, failures))

    def _add(self, hits: int, misses: int, discarded: int, failures: int) -> None:
        self._counters.hits += hits
        self._counters.misses += misses
        self._counters.discarded += discarded
        self._counters.failures += failures

    def _waited(self, seconds: float) -> None:
        self._counting.post(partial(self._counters.waited, seconds))

    def _leave_in_child(self) -> None:
        self._closed_error = self._closed_error or ClosedError(
            "This is another process's tier: it was opened before this process was forked.",
            "Load the model in the process that uses it, or start children by spawn.",
        )


class _Misses:
    """What one call of acquire asks the daemon for, and in the end somebody else."""

    def __init__(self, tier: DaemonTier, block: int) -> None:
        self._tier = tier
        self._block = block
        self._requests: list[Request] = []
        self._events: SimpleQueue[Event[MappedArena]] = SimpleQueue()
        self.wanted: dict[int, None] = {}  # experts that were not computed with yet

    def want(self, experts: Sequence[int]) -> None:
        """Asks the daemon, in one request."""
        self.wanted.update(dict.fromkeys(experts))
        request = Request(self._block, dict.fromkeys(experts), self._events.put)
        self._requests.append(request)  # first: whatever comes between, close() gives it back
        self._tier._link.ask(request)

    def close(self) -> None:
        """Gives back what is held and waited for. Never waits."""
        for request in self._requests:
            self._tier._link.withdraw(request)

    def leases(self) -> Generator[Lease[memoryview], None, None]:
        """Of all that is wanted, in order of arrival."""
        while self.wanted:
            granted = self._wait()
            if isinstance(granted, HostTier):
                yield from self._from_spare(granted)
                return
            expert = granted.expert
            lease, proof = granted.place.lease(ExpertKey(self._block, expert), granted.slot, granted.generation)
            yield lease
            self._tier._check_open()
            if proof.held:
                del self.wanted[expert]
                if self.wanted:  # else the request ends with it
                    self._tier._link.release(granted.request, expert)
            else:  # the daemon that granted it is gone, and another has filled its slot
                self._tier._count(discarded=1)
                self._tier._link.withdraw(granted.request)
                self.want([expert, *granted.request.awaited])

    def _wait(self) -> Granted[MappedArena] | HostTier:
        """The next lease; the local store's tier when there is none to be had in time."""
        tier, link = self._tier, self._tier._link
        began = time.monotonic()
        limit = began + tier._patience
        try:
            while True:
                tier._check_open()
                away = link.away_since
                due = limit if away is None or tier._spare.why else min(limit, max(away, began - GRACE) + GRACE)
                try:
                    event = self._events.get(timeout=max(due - time.monotonic(), 0.0))
                except Empty:
                    if (spare := tier._spare.open()) is not None:
                        return spare
                    if time.monotonic() >= limit:
                        raise self._in_vain() from None
                    continue
                if isinstance(event, Granted):
                    if event.expert in self.wanted:
                        return event
                    link.release(event.request, event.expert)  # it was asked for twice, of one daemon and the next
                elif isinstance(event, Failed) and (spare := self._fail(event, limit)) is not None:
                    return spare
        finally:
            tier._waited(time.monotonic() - began)

    def _fail(self, event: Failed, limit: float) -> HostTier | None:
        """The local store's tier, if that may help; None where the daemon was asked again."""
        if isinstance(event.error, StoreError):
            self._tier._count(failures=1)
        leaves = isinstance(event.error, UnavailableError | ClosedError)
        if not leaves and not isinstance(event.error, ExhaustedError):
            raise event.error
        if (spare := self._tier._spare.open()) is not None:
            return spare
        if not leaves or time.monotonic() + _AGAIN >= limit:
            raise event.error
        time.sleep(_AGAIN)
        self.want(list(event.request.awaited))
        return None

    def _from_spare(self, spare: HostTier) -> Generator[Lease[memoryview], None, None]:
        self.close()
        first = self._tier._arena.plan.slots  # its slots are numbered behind the arena's
        with closing(spare.acquire([ExpertKey(self._block, expert) for expert in self.wanted])) as leases:
            for lease in leases:
                yield Lease(lease.key, lease.record, first + lease.slot, lease.proof)
                self._tier._check_open()

    def _in_vain(self) -> UnavailableError:
        tier, link = self._tier, self._tier._link
        if link.away_since is None:
            what = f"The daemon has not answered for {tier._patience:g} seconds."
        else:
            what = f"The daemon has been away for {tier._patience:g} seconds and more: {link.error.cause}"
        return UnavailableError(f"{what} {tier._spare.why}".rstrip(), "Start it again: moetier daemon DIR")


_open_here: weakref.WeakSet[DaemonTier] = weakref.WeakSet()


def _leave_in_child() -> None:
    """A child's use must raise, and not wait for threads that it does not have."""
    for tier in list(_open_here):
        tier._leave_in_child()


os.register_at_fork(after_in_child=_leave_in_child)
