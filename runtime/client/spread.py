"""SpreadReader: reads a store from several daemons, each of which holds a share of the records in its memory.

Rendezvous hashing (Thaler and Ravishankar 1998, "Using name-based mappings to increase hit rates") gives each key its
own order in which the daemons are asked. All clients compute the same order. If a daemon is added or removed, only the
keys for which that daemon comes first move to another daemon.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

from moetier.runtime.checkpoint.experts import open_copy
from moetier.runtime.wire.address import Address, Credentials
from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import (
    CheckpointError,
    ClosedError,
    ConfigError,
    ExhaustedError,
    MoetierError,
    RefusedError,
    StoreError,
    UnavailableError,
)
from moetier.tiers.extents.reader import ExtentStore
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import ForkGuard
from moetier.tiers.manifest import Manifest
from moetier.tiers.stats import Share
from moetier.tiers.store.reader import ExpertStore

from .remote import RemoteReader

PATIENCE = 30.0  # seconds that a read waits while every daemon is away and there are no local shards
SHORTEST, LONGEST = 0.5, 30.0  # seconds between checks of a daemon that is away
_PAUSE = 0.2  # seconds before daemons that had no free slot are asked again

_log = logging.getLogger(__name__)


def rendezvous(names: Iterable[str], key: ExpertKey) -> list[str]:
    """Sort the names of daemons into the order in which they are asked for ``key``."""
    prefix = b"%d/%d/" % key
    return sorted(names, key=lambda name: blake2b(prefix + name.encode(), digest_size=8).digest())


class Peer:
    """One of several daemons, and whether it is away."""

    def __init__(self, name: str, reader: RemoteReader) -> None:
        self.name = name
        self.reader = reader
        self.records = 0  # number of records read from it
        self.bytes = 0  # bytes of these records
        self.failures = 0  # number of times it went away
        self.away: MoetierError | None = None  # the reason while it is away
        self.backoff = 0.0  # seconds between checks while it is away; 0 once it has given a record
        self.next_check = 0.0  # on the monotonic clock


class SpreadReader(Closeable):
    """RecordReader that reads from several daemons, and from the store ``local`` if no daemon gives a record.

    A read asks the daemons that are not away, in the order of its key. A daemon that fails counts as away until a
    background check finds it again, so no other read waits for it. Thread-safe. ``close`` closes all readers.
    """

    @classmethod
    def open(
        cls, addresses: Sequence[Address], credentials: Credentials, manifest: Manifest, folder: Path | None = None
    ) -> SpreadReader:
        """Connect to the daemons. Shards in the model directory ``folder`` are read if no daemon gives a record.

        Raises ConfigError if the credentials can't be used or an address is given twice, and RefusedError if a daemon
        refuses the credentials or is not trusted. If all daemons are away and there is no shard, raises the error of
        the first daemon.
        """
        if len(set(addresses)) != len(addresses):
            raise ConfigError("A daemon is named twice.", "Name each daemon once.")
        peers = [Peer(str(address), RemoteReader(address, credentials, manifest)) for address in addresses]
        reader = cls(manifest, peers, _open_shards(folder) if folder is not None else None)
        try:
            reader._check_all()
        except BaseException:
            reader.close()
            raise
        return reader

    def __init__(
        self,
        manifest: Manifest,
        peers: Sequence[Peer],
        local: ExpertStore | ExtentStore | None = None,
        *,
        patience: float = PATIENCE,
    ) -> None:
        self.manifest = manifest
        self.local = local
        self._peers = {peer.name: peer for peer in peers}
        self._patience = patience
        self._fork_guard = ForkGuard()
        self._state = threading.Condition()  # guards the peers' fields and all fields below
        self._local_records = self._local_bytes = 0  # read from the local store
        self._watcher: threading.Thread | None = None
        self._closed = False

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Callable[[], bool] | None = None) -> None:
        """Read a record into ``buffer``, as ``RecordReader`` says. Only the local store calls ``pause``.

        Raises MissingExpertError if the model has no such expert. If the local store has no intact shard of the block,
        it also raises StoreError if the daemons can't read the record, and the last error, such as ExhaustedError or
        UnavailableError, if no daemon gives the record for ``patience`` seconds.
        """
        self._fork_guard.check()
        self.manifest.check_keys(key.block, [key])
        deadline = time.monotonic() + self._patience
        while (error := self._read_from_peers(key, buffer)) is not None:
            if self.local is not None and key.block not in self.local.faults:
                self.local.read_into(key, buffer, pause)
                with self._state:
                    self._local_records += 1
                    self._local_bytes += len(buffer)
                return
            if isinstance(error, StoreError):
                raise error
            self._wait(deadline, error)

    def shares(self) -> list[Share]:
        """Return what was read from each daemon, in the order in which they were named, and from the local store."""
        with self._state:
            found = [
                Share(peer.name, peer.records, peer.bytes, peer.away.cause if peer.away else "", peer.failures)
                for peer in self._peers.values()
            ]
            if self.local is not None:
                found.append(Share("the local store", self._local_records, self._local_bytes))
        return found

    def close(self) -> None:
        """Close all readers; reads under way end with an error. Idempotent.

        In a forked child only the store's descriptors are closed.
        """
        if self._fork_guard.is_owner:
            with self._state:
                self._closed = True
                self._state.notify_all()
            for peer in self._peers.values():
                peer.reader.close()
            if self._watcher is not None:
                self._watcher.join()
        if self.local is not None:
            self.local.close()

    def _read_from_peers(self, key: ExpertKey, buffer: memoryview) -> MoetierError | None:
        """Ask the daemons for a record, in the order of its key, until one gives it. Return None if one did.

        Otherwise return the error of the last daemon that was asked. If all are away, return why the first one is.
        """
        error: MoetierError | None = None
        order = [self._peers[name] for name in rendezvous(self._peers, key)]
        for peer in order:
            with self._state:
                self._check_open()
                if peer.away is not None:
                    continue
                failures = peer.failures
            try:
                peer.reader.read_into(key, buffer)
            except (StoreError, ExhaustedError) as failure:  # the daemon answered, so it is not away
                # without the traceback: the error is kept, and its frames hold the slot
                error = failure.with_traceback(None)
                _log.warning("%s: %s", peer.name, error.cause)
            except ClosedError:
                if self._closed:
                    raise
                error = UnavailableError(f"The connection to {peer.name} was closed.", "Try again.")
            except MoetierError as failure:
                error = failure.with_traceback(None)
                self._lose(peer, error, failures)
            else:
                with self._state:
                    peer.records += 1
                    peer.bytes += len(buffer)
                    peer.backoff = 0.0
                return None
        return error or order[0].away or UnavailableError("Every daemon is away.", "Start one: moetier daemon DIR")

    def _wait(self, deadline: float, error: MoetierError) -> None:
        """Wait until a daemon comes back or may have a free slot.

        Raises ``error`` at the deadline (monotonic clock), and ClosedError once the reader is closed.
        """
        with self._state:
            self._check_open()
            if (pause := deadline - time.monotonic()) <= 0:
                raise error
            if not self._any_here():
                self._state.wait_for(lambda: self._closed or self._any_here(), pause)
            else:
                self._state.wait(min(_PAUSE, pause))

    def _any_here(self) -> bool:
        return any(peer.away is None for peer in self._peers.values())

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("The connections to the daemons were closed.", "Load the model again.")

    # -- daemons that are away ----------------------------------------------------------------------------------------

    def _check_all(self) -> None:
        """Check all daemons at once, and note those that are away. Raises as ``open`` does."""
        peers = list(self._peers.values())
        with ThreadPoolExecutor(len(peers), thread_name_prefix="moetier-check") as pool:
            errors = list(pool.map(_check, peers))
        for peer, error in zip(peers, errors, strict=True):
            if isinstance(error, ConfigError):
                raise error
            if isinstance(error, RefusedError):
                raise RefusedError(f"{peer.name}: {error.cause}", error.fix)
        if self.local is None and errors[0] is not None and all(errors):
            raise errors[0]
        for peer, error in zip(peers, errors, strict=True):
            if error is not None:
                self._lose(peer, error, peer.failures)

    def _lose(self, peer: Peer, error: MoetierError, failures: int) -> None:
        """Note that a peer is away, after a request to it failed with ``error``.

        ``failures`` is the value of ``peer.failures`` before the request. If the value has changed since, the failure
        was noted already.
        """
        with self._state:
            if peer.away is not None or peer.failures != failures or self._closed:
                return
            _log.warning("the daemon %s is away: %s", peer.name, error.cause)
            peer.failures += 1
            self._note_away(peer, error)
            if self._watcher is None:
                watcher = threading.Thread(target=self._watch, name="moetier-peers", daemon=True)
                watcher.start()
                self._watcher = watcher

    def _note_away(self, peer: Peer, error: MoetierError) -> None:
        peer.away = error
        peer.backoff = min(max(SHORTEST, 2 * peer.backoff), LONGEST)
        peer.next_check = time.monotonic() + peer.backoff
        self._state.notify_all()

    def _watch(self) -> None:
        """Check peers that are away, at growing intervals, until the reader is closed."""
        while (peer := self._next_to_check()) is not None:
            error = _check(peer)
            with self._state:
                if error is not None:
                    self._note_away(peer, error)
                else:
                    _log.warning("the daemon %s is back", peer.name)
                    peer.away = None
                    self._state.notify_all()

    def _next_to_check(self) -> Peer | None:
        """Wait until it is time to check a peer, and return that peer; None once the reader is closed."""
        with self._state:
            while not self._closed:
                away = [peer for peer in self._peers.values() if peer.away is not None]
                peer = min(away, key=lambda peer: peer.next_check, default=None)
                if peer is None:
                    self._state.wait()
                elif (pause := peer.next_check - time.monotonic()) > 0:
                    self._state.wait(pause)
                else:
                    return peer
        return None


def _check(peer: Peer) -> MoetierError | None:
    """Return why a daemon is away; None if it serves the store."""
    try:
        peer.reader.check()
    except MoetierError as error:
        return error.with_traceback(None)
    except (OSError, RuntimeError) as error:  # out of descriptors, memory or threads
        return UnavailableError(
            f"{peer.name} can't be reached: {error}.", "Free memory, or raise the limit of open files (ulimit -n)."
        )
    return None


def _open_shards(folder: Path) -> ExpertStore | ExtentStore | None:
    """Return the experts of a directory, opened; None if they can't be opened or no shard is intact."""
    with contextlib.ExitStack() as closing:
        try:
            store: ExpertStore | ExtentStore = open_copy(folder, damaged=True)
            closing.callback(store.close)
            if not store.faults and isinstance(store, ExpertStore):
                store.check_digest()
        except (StoreError, CheckpointError) as error:
            _log.info("No records are read from %s: %s", folder, error.cause)
            return None
        if len(store.faults) == len(store.manifest.blocks):
            return None
        closing.pop_all()
        return store
