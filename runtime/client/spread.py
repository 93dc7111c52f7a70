"""SpreadReader: reads a store from several daemons, each of which holds a share of the records in its memory.

Rendezvous hashing (Thaler and Ravishankar 1998, "Using name-based mappings to increase hit rates") gives each key its
own order in which the daemons are asked. All clients compute the same order. If a daemon is added or removed, only the
keys for which that daemon comes first move to another daemon.

The daemons are named one by one, or by a host name that stands for a daemon at each of its IP addresses. Such names are
resolved again every RESOLVE_SECONDS, and whenever a daemon fails.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from pathlib import Path

from moetier.runtime.checkpoint.experts import open_copy
from moetier.runtime.wire.address import Address, Credentials
from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import (
    BudgetError,
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

from .costs import FetchRate
from .remote import RemoteReader

PATIENCE = 30.0  # seconds that a read waits while every daemon is away and there are no local shards
SHORTEST, LONGEST = 0.5, 30.0  # seconds between checks of a daemon that is away
RESOLVE_SECONDS = 30.0  # between two resolutions of a name while no daemon fails
RESOLVE_AGAIN = 2.0  # seconds after a resolution that failed
_PAUSE = 0.2  # seconds before daemons that had no free slot are asked again
_RESOLVER = 5.0  # longest time in seconds that ``close`` waits for the system's resolver, which can't be interrupted

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
        self.counts = Counter[str]()  # fields of Share; those of all former daemons once it is one of them
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

        An address with ``is_group`` stands for all of its daemons: the reader notices when daemons come and go.

        Raises ConfigError if the credentials can't be used or an address is given twice, and RefusedError if a daemon
        refuses the credentials or is not trusted. If all daemons are away and there is no shard, raises the error of
        the first daemon.
        """
        if len(set(addresses)) != len(addresses):
            raise ConfigError("A daemon is named twice.", "Name each daemon once.")
        single = [address for address in addresses if not address.is_group]
        reader = cls(
            manifest,
            [Peer(str(address), RemoteReader(address, credentials, manifest)) for address in single],
            _open_shards(folder) if folder is not None else None,
            groups=[address for address in addresses if address.is_group],
            credentials=credentials,
        )
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
        groups: Sequence[Address] = (),
        credentials: Credentials | None = None,
    ) -> None:
        """Read from ``peers``, and from the daemons of ``groups``, to which this reader connects by itself."""
        self.manifest = manifest
        self.local = local
        self._peers = {peer.name: peer for peer in peers}  # replaced, never changed
        self._orders: dict[ExpertKey, list[Peer]] = {}  # what ``order`` has returned; replaced after ``_peers``
        self.rate = FetchRate()
        self._single = frozenset(self._peers)
        self._groups: dict[Address, list[Address]] = {group: [] for group in groups}  # from groups to their daemons
        self._credentials = credentials or Credentials()
        self._patience = patience
        self._fork_guard = ForkGuard()
        self._state = threading.Condition()  # guards the peers' fields and all fields below
        self._from_local = Counter[str]()
        self._from_former = Counter[str]()  # of daemons that their group no longer has
        self._next_resolve = 0.0  # on the monotonic clock
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
                    self._from_local.update(records=1, bytes=len(buffer))
                return
            if isinstance(error, StoreError):
                raise error
            self._wait(deadline, error)

    @property
    def peers(self) -> list[Peer]:
        """All daemons, also those that are away."""
        return list(self._peers.values())

    def order(self, key: ExpertKey) -> list[Peer]:
        """Return the daemons in the order in which they are asked for ``key``, also those that are away."""
        orders, peers = self._orders, self._peers
        if (found := orders.get(key)) is None:
            found = orders[key] = [peers[name] for name in rendezvous(peers, key)]
        return found

    def count_computed(self, peer: Peer, rows: int, nbytes: int) -> None:
        """Count a computation of a daemon: rows of outputs, and the bytes that were sent for it both ways."""
        with self._state:
            peer.counts.update(computed=rows, computed_bytes=nbytes)

    def shares(self) -> list[Share]:
        """Return what was read from each daemon, in the order in which they were named, and from the local store."""
        with self._state:
            found = [
                _share(peer.name, peer.counts, peer.away.cause if peer.away else "", peer.failures)
                for peer in self._peers.values()
            ]
            if self._from_former:
                found.append(_share("former daemons", self._from_former))
            if self.local is not None:
                found.append(_share("the local store", self._from_local))
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
                self._watcher.join(_RESOLVER)
        if self.local is not None:
            self.local.close()

    def _read_from_peers(self, key: ExpertKey, buffer: memoryview) -> MoetierError | None:
        """Ask the daemons for a record, in the order of its key, until one gives it. Return None if one did.

        Otherwise return the error of the last daemon that was asked. If all are away, return why the first one is.
        """
        error: MoetierError | None = None
        order = self.order(key)
        for peer in order:
            with self._state:
                self._check_open()
                if peer.away is not None:
                    continue
                failures = peer.failures
            brought = 0
            self.rate.begin()
            try:
                peer.reader.read_into(key, buffer)
                brought = len(buffer)
            except (StoreError, ExhaustedError, BudgetError) as failure:  # the daemon answered, so it is not away
                # without the traceback: the error is kept, and its frames hold the slot
                error = failure.with_traceback(None)
                _log.warning("%s: %s", peer.name, error.cause)
            except ClosedError:
                if self._closed:
                    raise
                error = UnavailableError(f"The connection to {peer.name} was closed.", "Try again.")
            except MoetierError as failure:
                error = failure.with_traceback(None)
                self.lose(peer, error, failures)
            else:
                with self._state:
                    peer.counts.update(records=1, bytes=len(buffer))
                    peer.backoff = 0.0
                return None
            finally:
                self.rate.end(brought)
        away = order[0].away if order else None
        return error or away or UnavailableError("Every daemon is away.", "Start one: moetier daemon DIR")

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
        """Resolve the groups, check all daemons at once, and note those that are away. Raises as ``open`` does."""
        unknown = self._resolve()
        peers = list(self._peers.values())
        with ThreadPoolExecutor(max(len(peers), 1), thread_name_prefix="moetier-check") as pool:
            errors = list(pool.map(_check, peers))
        for peer, error in zip(peers, errors, strict=True):
            if isinstance(error, ConfigError):
                raise error
            if isinstance(error, RefusedError):
                raise RefusedError(f"{peer.name}: {error.cause}", error.fix)
        failed = [error for error in (*errors, *unknown) if error is not None]
        if self.local is None and len(failed) == len(errors) + len(unknown):
            raise failed[0]
        for error in unknown:
            _log.warning("%s", error.cause)
        for peer, error in zip(peers, errors, strict=True):
            if error is not None:
                self.lose(peer, error, peer.failures)
        if self._groups:
            self._start_watcher()

    def lose(self, peer: Peer, error: MoetierError, failures: int) -> None:
        """Note that a peer is away, after a request to it failed with ``error``.

        ``failures`` is the value of ``peer.failures`` before the request. If the value has changed since, the failure
        was noted already.
        """
        with self._state:
            is_former = self._peers.get(peer.name) is not peer
            if peer.away is not None or peer.failures != failures or self._closed or is_former:
                return
            _log.warning("the daemon %s is away: %s", peer.name, error.cause)
            peer.failures += 1
            self._note_away(peer, error)
            self._start_watcher()

    def _note_away(self, peer: Peer, error: MoetierError) -> None:
        peer.away = error
        peer.backoff = min(max(SHORTEST, 2 * peer.backoff), LONGEST)
        peer.next_check = time.monotonic() + peer.backoff
        self._next_resolve = 0.0  # another daemon may have taken its place
        self._state.notify_all()

    def _start_watcher(self) -> None:
        with self._state:
            if self._watcher is None and not self._closed:
                watcher = threading.Thread(target=self._watch, name="moetier-peers", daemon=True)
                watcher.start()
                self._watcher = watcher

    def _watch(self) -> None:
        """Check peers that are away, at growing intervals, and resolve groups, until the reader is closed."""
        while (task := self._next_task()) is not None:
            task()

    def _next_task(self) -> Callable[[], object] | None:
        """Wait until it is time to check a peer or to resolve the groups, and return that task; None once closed."""
        with self._state:
            while not self._closed:
                tasks: list[tuple[float, Callable[[], object]]] = [
                    (peer.next_check, partial(self._check_again, peer))
                    for peer in self._peers.values()
                    if peer.away is not None
                ]
                if self._groups:
                    tasks.append((self._next_resolve, self._resolve_again))
                if not tasks:
                    self._state.wait()
                    continue
                due, task = min(tasks, key=lambda task: task[0])
                if (pause := due - time.monotonic()) <= 0:
                    return task
                self._state.wait(pause)
        return None

    def _check_again(self, peer: Peer) -> None:
        error = _check(peer)
        with self._state:
            if error is not None:
                self._note_away(peer, error)
            else:
                _log.warning("the daemon %s is back", peer.name)
                peer.away = None
                self._state.notify_all()

    # -- daemons that come and go -------------------------------------------------------------------------------------

    def _resolve_again(self) -> None:
        """Resolve the groups, and check daemons that have come."""
        self._resolve()
        for peer in self._peers.values():
            if peer.reader.computes is None and peer.away is None:
                with contextlib.suppress(MoetierError):  # the next read will notice it
                    peer.reader.check(again=False)

    def _resolve(self) -> list[UnavailableError]:
        """Resolve the groups: connect to daemons that have come, and disconnect from those that have gone.

        A group that can't be resolved keeps its daemons. Return the errors of such groups.
        """
        errors = []
        for group in self._groups:
            try:
                self._groups[group] = group.resolve()
            except UnavailableError as error:
                errors.append(error.with_traceback(None))
        listed = {str(address): address for found in self._groups.values() for address in found}
        with self._state:
            self._next_resolve = time.monotonic() + (RESOLVE_AGAIN if errors else RESOLVE_SECONDS)
            if self._closed:
                return errors
            peers = {name: peer for name, peer in self._peers.items() if name in self._single or name in listed}
            former = [peer for name, peer in self._peers.items() if name not in peers]
            new = {
                name: Peer(name, RemoteReader(address, self._credentials, self.manifest))
                for name, address in listed.items()
                if name not in peers
            }
            self._peers = peers | new
            self._orders = {}
            for peer in former:
                self._from_former.update(peer.counts)
                peer.counts = self._from_former  # calls may be under way
            self._state.notify_all()
        for peer in former:
            _log.info("the daemon %s has gone", peer.name)
            peer.reader.close()
        for name in new:
            _log.info("the daemon %s has come", name)
        return errors


def _share(place: str, counts: Counter[str], away: str = "", lost: int = 0) -> Share:
    return Share(place, counts["records"], counts["bytes"], away, lost, counts["computed"], counts["computed_bytes"])


def _check(peer: Peer) -> MoetierError | None:
    """Return why a daemon is away; None if it serves the store."""
    try:
        peer.reader.check()
    except MoetierError as error:
        return error.with_traceback(None)
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
