"""DaemonTier: the host tier of a daemon on this machine, used like a tier of this process.

The daemon's arena is mapped read-only. A hit is found in the arena's directory, without a message to the daemon; the
slot's generation proves afterwards that the record was not replaced meanwhile. All misses of a block are sent in one
request (``misses``). While the daemon is away or full, misses are read from the local store.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from moetier.runtime.wire.address import Address
from moetier.runtime.wire.control import ControlConnection
from moetier.tiers.arena.directory import Placement
from moetier.tiers.closeable import Closeable, closed_on_error
from moetier.tiers.errors import ClosedError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import ForkGuard
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import Lease, Residents
from moetier.tiers.stats import TierStats

from .daemon_link import Link
from .disk_order import ClientDiskOrder
from .fallback import AWAY_TIMEOUT, Fallback
from .mapped_arena import MappedArena
from .misses import ClientContext, Misses
from .uses import ClientUses


class DaemonTier(Closeable):
    """Source of experts in the memory of a daemon on this machine; a ``CopySource``.

    Thread-safe. A forked child can't use it. Spawn a child that needs a tier: gRPC may abort in a forked child of a
    process that has one. If an exception from outside, such as Ctrl-C, interrupts a method, ``release_leases`` ends the
    leases that it has left open.
    """

    @classmethod
    def open(cls, folder: Path, location: Path, manifest: Manifest, *, timeout: float = AWAY_TIMEOUT) -> DaemonTier:
        """Connect to the daemon in ``folder``, as a client of the store with ``manifest``.

        The store at ``location`` is read only while the daemon is away or full. If it holds no records, a miss
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
            return cls(folder, manifest, control, Fallback(location, manifest), timeout)

    def __init__(
        self, folder: Path, manifest: Manifest, control: ControlConnection, fallback: Fallback, timeout: float
    ) -> None:
        self._folder = folder
        self._manifest = manifest
        self._fallback = fallback
        self._fork_guard = ForkGuard()
        self._is_closed = False
        self._arena = MappedArena.of(control, manifest)
        with closed_on_error(self._arena):
            self._link = Link(folder, manifest.digest, control, self._connected)
        self.uses = ClientUses(self._link)
        self._context = ClientContext(self._link, fallback, self.uses, timeout, self._check_open)

    def acquire(self, keys: Sequence[ExpertKey], of_total: int = 0) -> Generator[Lease[memoryview], None, None]:
        """Yield leases as ``ExpertSource`` specifies. Each has a proof, unless its record is from the local store.

        Raises MissingExpertError for a key that the model does not have. If the local store can't be read, also raises
        UnavailableError if the daemon does not answer in time, and ExhaustedError if all its slots are leased.
        """
        if not keys:
            return
        block = keys[0].block
        self._manifest.check_keys(block, keys)
        self._check_open()
        arena = self._arena
        placements = {key: arena.directory.find(key) for key in keys}
        cached = {key: placement for key, placement in placements.items() if placement is not None}
        missing = [key for key in placements if key not in cached]
        self.uses.note_demand(block, [*cached], missing, is_part=of_total > 0)
        with Misses(self._context, block, of_total) as misses:
            if missing:
                misses.submit([key.expert for key in missing])
            yield from self._lease_cached(arena, cached, misses)
            yield from misses.leases()

    def _lease_cached(
        self, arena: MappedArena, cached: Mapping[ExpertKey, Placement], misses: Misses
    ) -> Iterator[Lease[memoryview]]:
        """Yield leases of ``cached`` records, which the arena has. Request those again that were replaced meanwhile."""
        proofs = []
        for number, (key, placement) in enumerate(cached.items(), 1):
            lease, proof = arena.lease(key, *placement, more=number < len(cached))
            proofs.append((key.expert, proof))
            yield lease
            if self._is_closed:
                self._check_open()
        if lost := [expert for expert, proof in proofs if proof.is_valid is False]:
            self.uses.note_lost(len(lost))
            misses.submit(lost)

    def residents(self, block: int) -> Residents | None:
        """Return where the block's records are in the daemon's arena, as ``ExpertSource`` specifies."""
        self._check_open()
        return self._arena.residents(block, self._manifest.blocks[block].array)

    def release_leases(self) -> None:
        """Release the leases of this thread that an exception has left open, as ``ExpertSource`` specifies."""
        self._fork_guard.check()
        if (misses := self._context.by_thread.get(threading.get_ident())) is not None:
            misses.close()
        if self._fallback.host is not None:
            self._fallback.host.release_leases()

    def prefetch(self, block: int, keys: Sequence[ExpertKey]) -> None:
        """Request prefetches as ``ExpertSource`` specifies, unless the daemon is away.

        No message is sent if all records are in the directory and no earlier request for the block may be open. While a
        page of keys and values is read, nothing new is requested.
        """
        self._manifest.check_keys(block, keys)
        self._check_open()
        if self.disk_order.is_reading_page:
            keys = ()
        self.uses.prefetch(block, [key.expert for key in keys], is_needed=bool(self.absent(keys)))

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """Return absent keys as ``ExpertSource`` specifies: those that are not in the arena's directory."""
        return [key for key in keys if self._arena.directory.find(key) is None]

    @contextmanager
    def pin(self, key: ExpertKey) -> Iterator[Lease[memoryview] | None]:
        """Yield a lease of a record to copy, as ``CopySource`` specifies; None if the arena does not have the record.

        The lease has a proof. No message is sent to the daemon. Raises MissingExpertError if the model has no such
        expert.
        """
        self._manifest.check_keys(key.block, [key])
        self._check_open()
        arena = self._arena
        if (placement := arena.directory.find(key)) is None:
            yield None
            return
        lease, proof = arena.lease(key, *placement)
        with ExitStack() as undo:
            undo.callback(self.uses.forget_copy, key)
            self.uses.note_copy(key)  # before the copy is made, as a demand may find the copy at once
            yield lease
            if proof.is_valid:
                undo.pop_all()

    def stats(self) -> TierStats:
        """Return the counters.

        The slots are those of the daemon, for all its clients. The loads are only those from the local store.
        """
        self._fork_guard.check()
        layout, fallback = self._arena.layout, self._fallback.host
        ready = 0 if self._is_closed else self._arena.directory.ready
        stats = self.uses.stats(slots=layout.slots, ready=ready, memory_bytes=layout.nbytes - layout.directory_bytes)
        if fallback is None:
            return stats
        reads = fallback.stats()
        return replace(stats, bytes_in=reads.bytes_in, loads=reads.loads, load_seconds=reads.load_seconds)

    @property
    def disk_order(self) -> ClientDiskOrder:
        """When pages of keys and values may be read and written."""
        return self._context.disk_order

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
        """Close as ``ExpertSource`` specifies. A referenced record stays readable, but its proof raises ClosedError.

        In a forked child, only the child's own mappings and descriptors are closed.
        """
        with ExitStack() as closing:
            closing.callback(self._arena.close)
            closing.callback(self._fallback.close)
            if self._fork_guard.is_owner:
                self._is_closed = True
                self._link.close()

    def _connected(self, control: ControlConnection) -> MappedArena:
        """Map the arena of a new connection. The old arena is unmapped when its last lease ends."""
        self._arena = MappedArena.of(control, self._manifest, self._arena)
        self._fallback.try_again()
        return self._arena

    def _check_open(self) -> None:
        self._fork_guard.check()
        if self._is_closed:
            raise ClosedError("The tier of this model was closed.", "Load the model again.")
