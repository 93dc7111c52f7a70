"""DaemonTier: the host tier of a daemon on this machine, as one of this process.

The daemon's arena is mapped read-only. A hit is found in its directory and asks nobody; the generation of its slot
proves it afterwards. What is missing of a block is one request; while the daemon is away or full, it is read from the
local store.
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

from .counts import Counts
from .link import Link
from .misses import Misses, Ways
from .spare import Spare
from .traffic import Traffic
from .view import MappedArena


class DaemonTier:
    """A Lender over a daemon of this host. Thread-safe; a forked child must open its own."""

    @classmethod
    def open(cls, folder: Path, directory: Path, manifest: Manifest, *, patience: float = 30.0) -> DaemonTier:
        """At the daemon in ``folder``, for the store of ``manifest``. The model directory ``directory`` is read only
        when the daemon is away or full; where it holds no records, a miss waits ``patience`` seconds for the daemon.

        Raises UnavailableError, UnknownModelError, RefusedError, ArenaError, ProtocolError.
        """
        side = ControlConnection.open(folder, manifest.digest)
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
        side: ControlConnection,
        arena: MappedArena,
        spare: Spare,
        patience: float,
    ) -> None:
        self._folder = folder
        self._manifest = manifest
        self._arena = arena
        self._spare = spare
        self._fork_guard = ForkGuard()
        self._closed_error: ClosedError | None = None
        self._wished: set[int] = set()  # blocks whose wishes the daemon may still have to fulfil
        self._borrowed: set[ExpertKey] = set()  # of which no demand has been told
        self._misses: dict[int, Misses] = {}  # by thread: what it waits for
        self._counts = Counts("daemon")
        self._link = Link(folder, manifest.digest, side, self._arrive)
        self._ways = Ways(self._link, spare, patience, self._counts, self._check_open, lambda: self._arena.plan.slots)
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
        self._borrowed.difference_update(keys)  # of this demand the daemon hears anyhow
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
        self._counts.add(hits=len(found), misses=len(missing))
        rest = Misses(self._ways, block, self._misses)
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
                self._counts.add(hits=-len(lost), misses=len(lost), discarded=len(lost))
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
        self._spare.reclaim()

    def prefetch(self, block: int, keys: Sequence[ExpertKey]) -> None:
        """As ``ExpertSource`` says; while the daemon is away, no wish comes true. No message tells of wishes that are
        there already."""
        self._manifest.check_keys(block, keys)
        self._check_open()
        find = self._arena.find
        if not all(find(key) for key in keys):
            self._wished.add(block)
        elif block in self._wished:
            self._wished.discard(block)
        else:
            return
        self._link.prefetch(block, [key.expert for key in keys])

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """As ``ExpertSource`` says: those that the directory does not show."""
        find = self._arena.find
        return [key for key in keys if find(key) is None]

    def pace(self, block: int) -> Pace | None:
        """None: a daemon does not tell its clients how long its reads take."""
        return None

    @contextmanager
    def borrow(self, key: ExpertKey) -> Iterator[Lease[memoryview] | None]:
        """As ``Lender`` says: what the directory shows, with a proof, and nothing of the local store. The daemon does
        not hear of it. Raises MissingExpertError."""
        self._manifest.check_keys(key.block, [key])
        self._check_open()
        arena = self._arena
        place = arena.find(key)
        if place is None:
            yield None
            return
        lease, proof = arena.lease(key, *place)
        self._borrowed.add(key)  # first: a demand may find the copy at once
        yield lease
        if not (proof.was_asked and proof.held):
            self._borrowed.discard(key)

    def used(self, keys: Sequence[ExpertKey]) -> None:
        """As ``Lender`` says, once of each that was borrowed: to the daemon it is a record that was found in the
        directory, and so a hit. Of others the daemon does not hear."""
        told = [key for key in keys if key in self._borrowed]
        self._borrowed.difference_update(told)
        if told:
            self._link.report(told)

    def stats(self) -> TierStats:
        """Slots are the daemon's, which all its clients share; ``bytes_in`` and loads are reads of the local store."""
        closed = self._closed_error is not None
        return self._counts.snapshot(
            slots=self._arena.plan.slots,
            ready=0 if closed else self._arena.ready,
            slot_bytes=self._arena.plan.nbytes - self._arena.plan.directory_bytes,
            reads=self._spare.stats(),
        )

    @property
    def address(self) -> Address:
        return Address(folder=self._folder)

    @property
    def away(self) -> str:
        """Why the daemon is away now; "" while it is here."""
        return "" if self._link.away_since is None else self._link.error.cause

    @property
    def traffic(self) -> Traffic:
        """What passed between this process and the daemon."""
        return self._link.traffic

    def close(self) -> None:
        """As ``ExpertSource`` says. A record stays readable while it is held; it can't be proved any more.

        In a forked child only its own maps and descriptors go.
        """
        if self._fork_guard.is_owner:
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

    def _arrive(self, side: ControlConnection) -> MappedArena:
        """By the link's thread, on every connection. The old arena goes with the last lease of it."""
        self._arena = MappedArena.of(side, self._manifest, self._arena)
        self._spare.forgive()
        return self._arena

    def _check_open(self) -> None:
        if self._closed_error is not None:
            raise self._closed_error.__class__(self._closed_error.cause, self._closed_error.fix)

    def _leave_in_child(self) -> None:
        self._closed_error = self._closed_error or ClosedError(
            "This is another process's tier: it was opened before this process was forked.",
            "Load the model in the process that uses it, or start children by spawn.",
        )


_open_here: weakref.WeakSet[DaemonTier] = weakref.WeakSet()


def _leave_in_child() -> None:
    """A child's use must raise, and not wait for threads that it does not have."""
    for tier in list(_open_here):
        tier._leave_in_child()


os.register_at_fork(after_in_child=_leave_in_child)
