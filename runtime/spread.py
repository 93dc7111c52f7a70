"""SpreadReader: the records of a store that several daemons hold a share of, each in its own memory.

Every key has its own order of the daemons, by rendezvous hashing (Thaler & Ravishankar 1998, "Using name-based mappings
to increase hit rates"): all clients agree on it, and a daemon that goes or comes moves its own keys alone.
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
from types import TracebackType
from typing import Protocol, TypeVar

from moetier.tiers.errors import (
    ClosedError,
    ConfigError,
    ExhaustedError,
    MoetierError,
    RefusedError,
    StoreError,
    UnavailableError,
)
from moetier.tiers.keys import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.monitor import Home
from moetier.tiers.source import RecordReader
from moetier.tiers.store import ExpertStore

from .address import Address, Credentials
from .remote import RemoteReader
from .share import Share

SHORTEST, LONGEST = 0.5, 30.0  # seconds between two looks at a daemon that is away
PATIENCE = 30.0  # seconds that a read waits while every daemon is away, and there is nothing else to read from
_PAUSE = 0.2  # seconds before daemons are asked again that had no slot to spare

Name = TypeVar("Name", bound=str)

_log = logging.getLogger(__name__)


class CheckedReader(RecordReader, Protocol):
    """A RecordReader that may go and return."""

    def check(self) -> None:
        """Raises a MoetierError while it is away."""
        ...

    def close(self) -> None: ...


def rendezvous(names: Iterable[Name], key: ExpertKey) -> list[Name]:
    """``names`` in a key's own order."""
    place = b"%d/%d/" % key
    return sorted(names, key=lambda name: blake2b(place + name.encode(), digest_size=8).digest())


class Peer:
    """One daemon among several, and whether it is away."""

    def __init__(self, name: str, reader: CheckedReader) -> None:
        self.name = name
        self.reader = reader
        self.records = 0  # that it gave
        self.bytes = 0  # of them
        self.failures = 0  # times that it went away
        self.away: MoetierError | None = None  # why
        self.backoff = 0.0  # seconds from the last look to the next; 0 once it has given a record
        self.next_look = 0.0  # on the monotonic clock


class SpreadReader:
    """A RecordReader over ``peers``, and at last over ``local``, where there is one. Thread-safe; it owns them all.

    A read asks the first daemon in its key's order that is not away. One that fails is away until a look at it, in a
    thread of its own and after a growing pause, finds it again: no read waits for it twice.
    """

    @classmethod
    def open(
        cls, addresses: Sequence[Address], credentials: Credentials, manifest: Manifest, folder: Path | None = None
    ) -> SpreadReader:
        """``folder`` is the model directory; its shards are the last resort, where it has any.

        Raises ConfigError for credentials that can't be used, and RefusedError where a daemon refuses them, or is not
        trusted: waiting mends neither. Where not one daemon can be used and there is no shard: the error of the first.
        """
        if len(set(addresses)) != len(addresses):
            raise ConfigError("A daemon is named twice.", "Name each once.")
        with contextlib.ExitStack() as undo:
            peers = []
            for address in addresses:
                remote = RemoteReader(address, credentials, manifest)
                undo.callback(remote.close)
                peers.append(Peer(str(address), remote))
            local = _open_shards(folder) if folder is not None else None
            if local is not None:
                undo.callback(local.close)
            reader = cls(manifest, peers, local)
            undo.pop_all()
        try:
            reader._look_at_all()
        except BaseException:
            reader.close()
            raise
        return reader

    def __init__(
        self, manifest: Manifest, peers: Sequence[Peer], local: ExpertStore | None = None, *, patience: float = PATIENCE
    ) -> None:
        assert peers
        self.manifest = manifest
        self.local_records = self.local_bytes = 0  # that came from the store
        self._peers = {peer.name: peer for peer in peers}
        self._local = local
        self._patience = patience
        self._home = Home()
        self._state = threading.Condition()  # guards the peers' fields and all below
        self._watcher: threading.Thread | None = None
        self._closed = False

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Callable[[], bool] | None = None) -> None:
        """As ``RecordReader`` says; pauses where it reads from the store. Raises MissingExpertError; with nothing else
        to read from StoreError or ExhaustedError as the daemons tell them, and UnavailableError when none answers for
        ``patience`` seconds."""
        self._home.check()
        self.manifest.check_keys(key.block, [key])
        deadline = time.monotonic() + self._patience
        while True:
            error = self._read_from_peers(key, buffer)
            if error is None:
                return
            if self._local is not None and key.block not in self._local.faults:
                self._local.read_into(key, buffer, pause)
                with self._state:
                    self.local_records += 1
                    self.local_bytes += len(buffer)
                return
            if isinstance(error, StoreError):
                raise error
            self._wait(deadline, error)

    def peers(self) -> list[Peer]:
        """With their counters, in the order in which they were named."""
        return list(self._peers.values())

    def shares(self) -> list[Share]:
        """What came from each daemon, and at last from the store, where there is one."""
        with self._state:
            found = [
                Share(peer.name, peer.records, peer.bytes, peer.away.cause if peer.away is not None else "")
                for peer in self._peers.values()
            ]
            if self._local is not None:
                found.append(Share("the local store", self.local_records, self.local_bytes))
            return found

    def close(self) -> None:
        """Idempotent. Reads under way end with an error. In a forked child only the store's descriptors go."""
        if self._home.is_here:
            with self._state:
                self._closed = True
                self._state.notify_all()
                watcher, self._watcher = self._watcher, None
            for peer in self._peers.values():
                peer.reader.close()
            if watcher is not None:
                watcher.join()
        if self._local is not None:
            self._local.close()

    def __enter__(self) -> SpreadReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read_from_peers(self, key: ExpertKey, buffer: memoryview) -> MoetierError | None:
        """None when one gave the record; else the error of the last that was asked, or why the first is away."""
        error: MoetierError | None = None
        order = rendezvous(self._peers, key)
        for name in order:
            peer = self._peers[name]
            with self._state:
                if self._closed:
                    raise _closed_error()
                if peer.away is not None:
                    continue
                seen = peer.failures
            try:
                peer.reader.read_into(key, buffer)
            except (StoreError, ExhaustedError) as failure:  # of this record, or of now: it has not gone away
                error = failure.with_traceback(None)  # it is kept, and its frames would hold the slot
                _log.warning("%s: %s", name, error.cause)
            except ClosedError:
                with self._state:
                    if self._closed:
                        raise
                error = UnavailableError(f"The connection to {name} was closed.", "Ask again.")
            except MoetierError as failure:  # a DaemonError, or whatever else one may tell
                error = failure.with_traceback(None)
                self._lose(peer, error, seen)
            else:
                with self._state:
                    peer.records += 1
                    peer.bytes += len(buffer)
                    peer.backoff = 0.0
                return None
        return error or self._peers[order[0]].away or UnavailableError("Every daemon is away.", "Start one.")

    def _lose(self, peer: Peer, error: MoetierError, seen: int) -> None:
        """``seen`` is how often it had gone away when it was asked: it may be back since."""
        with self._state:
            if peer.away is not None or peer.failures != seen or self._closed:
                return
            _log.warning("the daemon %s is away: %s", peer.name, error.cause)
            peer.failures += 1
            peer.away = error
            peer.backoff = min(max(SHORTEST, 2 * peer.backoff), LONGEST)
            peer.next_look = time.monotonic() + peer.backoff
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, name="moetier-spread", daemon=True)
                self._watcher.start()
            self._state.notify_all()

    def _watch(self) -> None:
        """Looks at those that are away until none is, or the reader is closed."""
        while True:
            with self._state:
                while True:
                    if self._closed:
                        return
                    away = [peer for peer in self._peers.values() if peer.away is not None]
                    if not away:
                        self._watcher = None
                        return
                    peer = min(away, key=lambda peer: peer.next_look)
                    pause = peer.next_look - time.monotonic()
                    if pause <= 0:
                        break
                    self._state.wait(pause)
            self._look(peer)

    def _look(self, peer: Peer) -> None:
        error: MoetierError | None = None
        try:
            peer.reader.check()
        except MoetierError as failure:
            error = failure.with_traceback(None)
        except (OSError, RuntimeError) as failure:  # no descriptor to be had, no memory, no thread
            error = UnavailableError(f"{peer.name} can't be reached: {failure}.", "Free what is short.")
        with self._state:
            if error is None:
                if peer.away is not None:
                    _log.warning("the daemon %s is back", peer.name)
                peer.away = None
            else:
                peer.away = error
                peer.backoff = min(2 * peer.backoff, LONGEST)
                peer.next_look = time.monotonic() + peer.backoff
            self._state.notify_all()

    def _look_at_all(self) -> None:
        """Raises what one refuses, and the first one's error where nothing is left to read from."""
        with ThreadPoolExecutor(len(self._peers), thread_name_prefix="moetier-look") as pool:
            errors = list(pool.map(_check, self._peers.values()))
        for peer, error in zip(self._peers.values(), errors, strict=True):
            if isinstance(error, RefusedError):
                raise RefusedError(f"{peer.name}: {error.cause}", error.fix)
        if all(errors) and self._local is None:
            raise next(error for error in errors if error is not None)
        for peer, error in zip(self._peers.values(), errors, strict=True):
            if error is not None:
                self._lose(peer, error, peer.failures)

    def _wait(self, deadline: float, error: MoetierError) -> None:
        """For a daemon to come back, or to have a slot to spare. Raises ``error`` behind the deadline."""
        with self._state:
            pause = deadline - time.monotonic()
            if self._closed:
                raise _closed_error()
            if pause <= 0:
                raise error
            if all(peer.away is not None for peer in self._peers.values()):
                self._state.wait_for(
                    lambda: self._closed or any(peer.away is None for peer in self._peers.values()), pause
                )
            else:
                self._state.wait(min(_PAUSE, pause))


def _check(peer: Peer) -> MoetierError | None:
    try:
        peer.reader.check()
    except ConfigError:
        raise
    except MoetierError as error:
        return error
    return None


def _open_shards(folder: Path) -> ExpertStore | None:
    """The store of a model directory, where it has at least some of its shards."""
    try:
        store = ExpertStore.open(folder, damaged=True)
    except StoreError as error:
        _log.info("%s is not read from: %s", folder, error.cause)
        return None
    if len(store.faults) == len(store.manifest.blocks):
        store.close()
        return None
    return store


def _closed_error() -> ClosedError:
    return ClosedError("The daemons' reader was closed.", "Load the model again.")
