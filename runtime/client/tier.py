"""DaemonTier: the host tier of a daemon on this machine, used like one of this process.

The daemon's arena is mapped read-only. A hit is found in its directory without a message; the generation of its slot
proves afterwards that it held. The misses of a block are one request. While the daemon is away or full, misses are read
from the local store.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from moetier.runtime.wire.address import Address
from moetier.runtime.wire.control import ControlConnection
from moetier.tiers.errors import ClosedError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import ForkGuard
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import Lease, Pace
from moetier.tiers.stats import TierStats

from .link import Link
from .misses import ClientCounters, Fallback, MissContext, Misses
from .view import MappedArena


class DaemonTier:
    """Lender over a daemon of this host. Thread-safe; a forked child must open its own."""

    @classmethod
    def open(cls, folder: Path, directory: Path, manifest: Manifest, *, patience: float = 30.0) -> DaemonTier:
        """Connect to the daemon in ``folder`` for the store of ``manifest``.

        The model directory ``directory`` is read only while the daemon is away or full. If it holds no records, a miss
        waits ``patience`` seconds for the daemon.

        Raises UnavailableError, UnknownModelError, RefusedError, ArenaError, ProtocolError.
        """
        control = ControlConnection.open(folder, manifest.digest)
        try:
            arena = MappedArena.of(control, manifest)
            return cls(folder, manifest, control, arena, Fallback(directory, manifest), patience)
        except BaseException:
            control.close()
            raise

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        control: ControlConnection,
        arena: MappedArena,
        fallback: Fallback,
        patience: float,
    ) -> None:
        self._folder = folder
        self._manifest = manifest
        self._arena = arena
        self._fallback = fallback
        self._fork_guard = ForkGuard()
        self._closed_error: ClosedError | None = None
        self._prefetching: set[int] = set()  # blocks whose prefetch requests the daemon may still have to serve
        self._borrowed: set[ExpertKey] = set()  # pinned for a copy, and not reported as used since
        self._misses: dict[int, Misses] = {}  # those under way, by thread
        self._counters = ClientCounters("daemon")
        self._link = Link(folder, manifest.digest, control, self._arrive)
        self._miss_context = MissContext(
            self._link, fallback, patience, self._counters, self._check_open, lambda: self._arena.plan.slots
        )
        _opened_here.add(self)

    def acquire(self, keys: Sequence[ExpertKey]) -> Generator[Lease[memoryview], None, None]:
        """As ``ExpertSource`` says; each lease has a proof, except those of the local store.

        Raises MissingExpertError for a key that the model does not have. If the local store can't be read either,
        raises UnavailableError if the daemon does not answer in time, and ExhaustedError if all its slots are leased.
        """
        if not keys:
            return
        block = keys[0].block
        self._manifest.check_keys(block, keys)
        self._check_open()
        arena = self._arena
        self._borrowed.difference_update(keys)  # the daemon learns of this demand anyhow
        found, missing = [], []
        for key in dict.fromkeys(keys):
            place = arena.find(key)
            if place is None:
                missing.append(key.expert)
            else:
                found.append((key, *place))
        if found:
            self._link.report([place[0] for place in reversed(found)])
        if block in self._prefetching:
            self._prefetching.discard(block)
            if not missing:  # otherwise the request tells the daemon of the demand
                self._link.prefetch(block, [])
        self._counters.add(hits=len(found), misses=len(missing))
        rest = Misses(self._miss_context, block, self._misses)
        try:
            if missing:
                rest.want(missing)
            proofs = []
            for number, (key, slot, generation) in enumerate(found, 1):
                lease, proof = arena.lease(key, slot, generation, more=number < len(found))
                proofs.append((key.expert, proof))
                yield lease
                self._check_open()
            if lost := [expert for expert, proof in proofs if not proof.held]:
                self._counters.add(hits=-len(lost), misses=len(lost), discarded=len(lost))
                rest.want(lost)
            if rest.wanted:
                yield from rest.leases()
        finally:
            rest.close()

    def reclaim(self) -> None:
        """As ``ExpertSource`` says."""
        self._fork_guard.check()
        if (misses := self._misses.get(threading.get_ident())) is not None:
            misses.close()
        self._fallback.reclaim()

    def prefetch(self, block: int, keys: Sequence[ExpertKey]) -> None:
        """As ``ExpertSource`` says; does nothing while the daemon is away. No message is sent if all are there."""
        self._manifest.check_keys(block, keys)
        self._check_open()
        find = self._arena.find
        if not all(find(key) for key in keys):
            self._prefetching.add(block)
        elif block in self._prefetching:
            self._prefetching.discard(block)
        else:
            return
        self._link.prefetch(block, [key.expert for key in keys])

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """As ``ExpertSource`` says: return the keys that are not in the directory."""
        find = self._arena.find
        return [key for key in keys if find(key) is None]

    def pace(self, block: int) -> Pace | None:
        """Return None: a daemon does not tell its clients how long its reads take."""
        return None

    @contextmanager
    def borrow(self, key: ExpertKey) -> Iterator[Lease[memoryview] | None]:
        """As ``Lender`` says: pin a record in the directory, with a proof; never one of the local store.

        The daemon is not told. Raises MissingExpertError.
        """
        self._manifest.check_keys(key.block, [key])
        self._check_open()
        arena = self._arena
        place = arena.find(key)
        if place is None:
            yield None
            return
        lease, proof = arena.lease(key, *place)
        self._borrowed.add(key)  # before the copy: a demand may find that at once
        yield lease
        if not (proof.was_asked and proof.held):
            self._borrowed.discard(key)

    def used(self, keys: Sequence[ExpertKey]) -> None:
        """As ``Lender`` says: report each key once that was pinned for a copy. To the daemon it is a hit."""
        told = [key for key in keys if key in self._borrowed]
        self._borrowed.difference_update(told)
        if told:
            self._link.report(told)

    def stats(self) -> TierStats:
        """Return the counters. Slots are the daemon's, shared by its clients; loads are reads of the local store."""
        closed = self._closed_error is not None
        return self._counters.snapshot(
            slots=self._arena.plan.slots,
            ready=0 if closed else self._arena.ready,
            slot_bytes=self._arena.plan.nbytes - self._arena.plan.directory_bytes,
            reads=self._fallback.stats(),
        )

    @property
    def address(self) -> Address:
        """Address of the daemon, by the folder of its sockets."""
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
        """As ``ExpertSource`` says. A record stays readable while it is referenced, but can't be proved any more.

        In a forked child only the child's maps and descriptors are closed.
        """
        if self._fork_guard.is_owner:
            self._closed_error = self._closed_error or ClosedError("The tier was closed.", "Load the model again.")
            self._link.close()
        self._fallback.close()
        self._arena.close()
        _opened_here.discard(self)

    def __enter__(self) -> DaemonTier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _arrive(self, control: ControlConnection) -> MappedArena:
        """Map a new connection's arena. The old one is unmapped with its last lease."""
        self._arena = MappedArena.of(control, self._manifest, self._arena)
        self._fallback.retry()
        return self._arena

    def _check_open(self) -> None:
        if self._closed_error is not None:
            raise self._closed_error.__class__(self._closed_error.cause, self._closed_error.fix)

    def _close_in_child(self) -> None:
        self._closed_error = self._closed_error or ClosedError(
            "This is another process's tier: it was opened before this process was forked.",
            "Load the model in the process that uses it, or start children by spawn.",
        )


_opened_here: weakref.WeakSet[DaemonTier] = weakref.WeakSet()


def _close_in_child() -> None:
    """Let use in a forked child raise, rather than wait for threads that the child does not have."""
    for tier in list(_opened_here):
        tier._close_in_child()


os.register_at_fork(after_in_child=_close_in_child)
