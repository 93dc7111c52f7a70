"""SpreadStore: reads a store from several daemons, each of which holds a share of the records in its memory."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from moetier.runtime.stores.registry import open_store
from moetier.runtime.wire.address import Address, Credentials
from moetier.tiers.closeable import closed_on_error
from moetier.tiers.errors import (
    BudgetError,
    CheckpointError,
    ChecksumError,
    ClosedError,
    ConfigError,
    ExhaustedError,
    MoetierError,
    StoreError,
    UnavailableError,
)
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import ForkGuard
from moetier.tiers.manifest import Manifest
from moetier.tiers.stats import Share, ShareCounts
from moetier.tiers.store.base import Pause, Store

from .costs import FetchRate
from .fallback import AWAY_TIMEOUT
from .peers import Peer, Peers
from .remote import RemoteStore

_log = logging.getLogger(__name__)


class SpreadStore(Store):
    """Store that reads from several daemons, and from the store ``local`` if no daemon gives a record.

    A read asks the daemons that are not away, in the order of its key. A daemon that fails counts as away until a
    background check finds it again, so no other read waits for it. ``close`` closes their connections.
    """

    @classmethod
    def open(
        cls, addresses: Sequence[Address], credentials: Credentials, manifest: Manifest, directory: Path | None = None
    ) -> SpreadStore:
        """Connect to the daemons. Shards in the model directory ``directory`` are read if no daemon gives a record.

        An address with ``is_dns_name`` stands for all daemons of the name; the store notices when they change.

        Raises ConfigError if the credentials can't be used or an address is given twice, and RefusedError if a daemon
        refuses the credentials or is not trusted. If all daemons are away and there is no shard, raises the error of
        the first daemon.
        """
        if len(set(addresses)) != len(addresses):
            raise ConfigError("A daemon is named twice.", "Name each daemon once.")
        single = [address for address in addresses if not address.is_dns_name]
        store = cls(
            manifest,
            [Peer(str(address), RemoteStore(address, credentials, manifest)) for address in single],
            names=[address for address in addresses if address.is_dns_name],
            credentials=credentials,
        )
        with closed_on_error(store):
            store.local = _open_local(directory) if directory is not None else None
            store.peers.check_all(needed=store.local is None)
        return store

    def __init__(
        self,
        manifest: Manifest,
        peers: Sequence[Peer],
        local: Store | None = None,
        *,
        timeout: float = AWAY_TIMEOUT,
        names: Sequence[Address] = (),
        credentials: Credentials | None = None,
    ) -> None:
        """Read from ``peers``, and from the daemons of the DNS names ``names``, to which this store connects."""
        self.manifest = manifest
        self.local = local
        self.peers = Peers(manifest, peers, names, credentials or Credentials())
        self._places = [*(peer.name for peer in peers), *map(str, names)]
        self.rate = FetchRate()
        self._timeout = timeout
        self._fork_guard = ForkGuard()
        self._counting = threading.Lock()  # guards: ``_from_local``
        self._from_local = ShareCounts()

    @property
    def where(self) -> str:
        """The names of the daemons."""
        return f"the daemons {', '.join(self._places)}"

    def on_fault(self, watcher: Callable[[ChecksumError], None]) -> None:
        """Register ``watcher`` with the local store. Records of daemons are all checked."""
        if self.local is not None:
            self.local.on_fault(watcher)

    def on_failover(self, watcher: Callable[[], None]) -> None:
        """Register ``watcher`` with the local store. It is not called if a daemon was away: ``shares`` says so."""
        if self.local is not None:
            self.local.on_failover(watcher)

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Pause | None = None) -> None:
        """Read a record from a daemon, or from the local store, which alone calls ``pause``.

        If the local store can't read the block, raises StoreError if the daemons can't read the record, and the last
        error, such as ExhaustedError or UnavailableError, if no daemon gives the record for ``timeout`` seconds.
        """
        self._fork_guard.check()
        self.manifest.check_keys(key.block, [key])
        deadline = time.monotonic() + self._timeout
        while (error := self._read_from_peers(key, buffer)) is not None:
            if self.local is not None and key.block not in self.local.faults:
                self.local.read_into(key, buffer, pause)
                with self._counting:
                    self._from_local.count(records=1, bytes=buffer.nbytes)
                return
            if isinstance(error, StoreError):
                raise error
            self.peers.wait(deadline, error)

    def shares(self) -> list[Share]:
        """Return what was read from each daemon, in the order in which they were named, and from the local store."""
        shares = self.peers.shares()
        if self.local is not None:
            with self._counting:
                shares.append(self._from_local.share("the local store"))
        return shares

    def close(self) -> None:
        """Close all connections; reads under way end with an error. Idempotent.

        In a forked child only the store's descriptors are closed.
        """
        with contextlib.ExitStack() as closing:
            if self.local is not None:
                closing.callback(self.local.close)
            if self._fork_guard.is_owner:
                self.peers.close()

    def _read_from_peers(self, key: ExpertKey, buffer: memoryview) -> MoetierError | None:
        """Ask the daemons for a record, in the order of its key, until one gives it. Return None if one did.

        Otherwise return the error of the last daemon that was asked. If all are away, return why the first one is.
        """
        error: MoetierError | None = None
        order = self.peers.order(key)
        for peer in order:
            self.peers.check_open()
            failures = peer.failures
            if peer.away is not None:
                continue
            brought = 0
            self.rate.begin()
            try:
                peer.store.read_into(key, buffer)
                brought = buffer.nbytes
            except (StoreError, ExhaustedError, BudgetError) as failure:  # the daemon answered, so it is not away
                # without the traceback: the error is kept, and its frames hold the slot
                error = failure.with_traceback(None)
                _log.warning("%s: %s", peer.name, error.cause)
            except ClosedError:
                self.peers.check_open()
                error = UnavailableError(f"The connection to {peer.name} was closed.", "Try again.")
            except MoetierError as failure:
                error = failure.with_traceback(None)
                self.peers.lose(peer, error, failures)
            else:
                self.peers.count_record(peer, buffer.nbytes)
                return None
            finally:
                self.rate.end(brought)
        if error is None and order and (away := order[0].away) is not None:
            error = away.fresh()
        return error or UnavailableError("Every daemon is away.", "Start one: moetier daemon DIR")


def _open_local(directory: Path) -> Store | None:
    """Return the store of a directory, without mirrors; None if it can't be opened or can't read any block."""
    with contextlib.ExitStack() as closing:
        try:
            store = closing.enter_context(open_store(directory, damaged=True))
            if not store.faults:
                store.check_digest()
        except (StoreError, CheckpointError) as error:
            _log.info("No records are read from %s: %s", directory, error.cause)
            return None
        if len(store.faults) == len(store.manifest.blocks):
            return None
        closing.pop_all()
        return store
