"""SpreadReader: reads a store from several daemons, each of which holds a share of the records in its memory."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from moetier.runtime.wire.address import Address, Credentials
from moetier.tiers.errors import ClosedError, ConfigError, ExhaustedError, MoetierError, StoreError, UnavailableError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import ForkGuard
from moetier.tiers.manifest import Manifest
from moetier.tiers.stats import Share
from moetier.tiers.store.reader import ExpertStore

from .peers import Peer, Peers
from .remote import RemoteReader

PATIENCE = 30.0  # seconds that a read waits while every daemon is away and there are no local shards

_log = logging.getLogger(__name__)


class SpreadReader:
    """RecordReader over several daemons, and over ``local`` as the last resort. Thread-safe; owns them all.

    A read asks the first daemon in its key's order that is not away. A daemon that fails is away until a background
    check finds it again, so no read waits for it twice.
    """

    @classmethod
    def open(
        cls, addresses: Sequence[Address], credentials: Credentials, manifest: Manifest, folder: Path | None = None
    ) -> SpreadReader:
        """Connect to the daemons. The shards in the model directory ``folder``, if any, are the last resort.

        Raises ConfigError for credentials that can't be used, and RefusedError if a daemon refuses them or is not
        trusted, as waiting helps against neither. Raises the first daemon's error if all are away and there is no
        shard.
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
            reader._peers.check_all(needed=local is None)
        except BaseException:
            reader.close()
            raise
        return reader

    def __init__(
        self, manifest: Manifest, peers: Sequence[Peer], local: ExpertStore | None = None, *, patience: float = PATIENCE
    ) -> None:
        self.manifest = manifest
        self.local_records = self.local_bytes = 0  # read from the store
        self._peers = Peers(peers)
        self.local = local
        self._patience = patience
        self._fork_guard = ForkGuard()
        self._state = threading.Lock()  # guards the counters

    @property
    def parts(self) -> None:
        """None: it can't read parts of records."""
        return None

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Callable[[], bool] | None = None) -> None:
        """As ``RecordReader`` says; pauses only while it reads from the store.

        Raises MissingExpertError. Without local shards it also raises StoreError or ExhaustedError of a daemon, and
        UnavailableError if no daemon answers for ``patience`` seconds.
        """
        self._fork_guard.check()
        self.manifest.check_keys(key.block, [key])
        deadline = time.monotonic() + self._patience
        while True:
            error = self._read_from_peers(key, buffer)
            if error is None:
                return
            if self.local is not None and key.block not in self.local.faults:
                self.local.read_into(key, buffer, pause)
                with self._state:
                    self.local_records += 1
                    self.local_bytes += len(buffer)
                return
            if isinstance(error, StoreError):
                raise error
            self._peers.wait(deadline, error)

    def peers(self) -> list[Peer]:
        """Return the daemons with their counters, in the order in which they were named."""
        return list(self._peers)

    def shares(self) -> list[Share]:
        """Return what was read from each daemon and, last, from the local store."""
        found = self._peers.shares()
        if self.local is not None:
            with self._state:
                found.append(Share("the local store", self.local_records, self.local_bytes))
        return found

    def close(self) -> None:
        """Close all readers; reads under way end with an error. Idempotent.

        In a forked child only the store's descriptors are closed.
        """
        if self._fork_guard.is_owner:
            self._peers.close()
        if self.local is not None:
            self.local.close()

    def __enter__(self) -> SpreadReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read_from_peers(self, key: ExpertKey, buffer: memoryview) -> MoetierError | None:
        """Read a record from the first daemon that gives it.

        Return None, or the error of the last daemon that was asked, or why the first is away.
        """
        error: MoetierError | None = None
        order = self._peers.order(key)
        for peer in order:
            seen = self._peers.failures(peer)
            if seen is None:
                continue
            try:
                peer.reader.read_into(key, buffer)
            except (StoreError, ExhaustedError) as failure:  # the daemon itself is not away
                error = failure.with_traceback(None)  # the error is kept, and its frames would hold the slot
                _log.warning("%s: %s", peer.name, error.cause)
            except ClosedError:
                if self._peers.is_closed:
                    raise
                error = UnavailableError(f"The connection to {peer.name} was closed.", "Ask again.")
            except MoetierError as failure:
                error = failure.with_traceback(None)
                self._peers.lose(peer, error, seen)
            else:
                self._peers.count_read(peer, len(buffer))
                return None
        return error or order[0].away or UnavailableError("Every daemon is away.", "Start one.")


def _open_shards(folder: Path) -> ExpertStore | None:
    """Open the store of a model directory; None unless it has at least some shards."""
    with contextlib.ExitStack() as closing:
        try:
            store = closing.enter_context(ExpertStore.open(folder, damaged=True))
            if not store.faults:
                store.check_digest()
        except StoreError as error:
            _log.info("%s is not read from: %s", folder, error.cause)
            return None
        if len(store.faults) == len(store.manifest.blocks):
            return None
        closing.pop_all()
        return store
