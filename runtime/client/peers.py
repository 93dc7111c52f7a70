"""Peers: the daemons that hold a share of the records each, their order for a key, and which of them are away.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from hashlib import blake2b

from moetier.runtime.wire.address import Address, Credentials
from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import ClosedError, ConfigError, ExhaustedError, MoetierError, RefusedError, UnavailableError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.stats import Share, ShareCounts
from moetier.tiers.threads import start_thread

from .remote import RemoteStore

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
    """One of several daemons, and whether it is away. ``Peers`` calls the methods that change it, under its lock."""

    def __init__(self, name: str, store: RemoteStore) -> None:
        self.name = name
        self.store = store
        self.counts = ShareCounts()  # daemons that have left their DNS name share one
        self.failures = 0  # number of times it went away
        self.away: MoetierError | None = None  # the reason while it is away
        self.backoff = 0.0  # seconds between checks while it is away; 0 once it has given a record
        self.next_check = 0.0  # on the monotonic clock

    def note_away(self, error: MoetierError, *, is_failure: bool = False) -> None:
        """Note that the daemon is away, and when to check it again. ``is_failure``: it was not away before."""
        self.failures += is_failure
        self.away = error
        self.backoff = min(max(SHORTEST, 2 * self.backoff), LONGEST)
        self.next_check = time.monotonic() + self.backoff

    def note_back(self) -> None:
        """Note that the daemon serves the store again."""
        self.away = None

    def note_record(self, nbytes: int) -> None:
        """Count a record that the daemon has given. The next time that it is away, it is checked soon."""
        self.counts.count(records=1, bytes=nbytes)
        self.backoff = 0.0

    def share(self) -> Share:
        """Return what the daemon has given."""
        return self.counts.share(self.name, self.away.cause if self.away else "", self.failures)

    def leave(self, former: ShareCounts) -> None:
        """Count what calls under way still give among ``former`` daemons, which have got the counts."""
        self.counts = former


class Peers(Closeable):
    """All daemons, also those that are away. Thread-safe. ``close`` closes their stores.

    A daemon that fails counts as away until a background check finds it again, so no other call waits for it.
    """

    def __init__(
        self, manifest: Manifest, peers: Sequence[Peer], names: Sequence[Address], credentials: Credentials
    ) -> None:
        """``names`` are DNS names, each of several daemons. This object connects to them, with ``credentials``."""
        self._manifest = manifest
        self._peers = {peer.name: peer for peer in peers}  # replaced, never changed
        self._orders: dict[ExpertKey, list[Peer]] = {}  # what ``order`` has returned; replaced after ``_peers``
        self._single = frozenset(self._peers)
        self._names: dict[Address, list[Address]] = {name: [] for name in names}  # from DNS names to their daemons
        self._credentials = credentials
        self._state = threading.Condition()  # guards: what changes in each Peer, and the fields below
        self._former = ShareCounts()  # of daemons that have left their DNS name
        self._next_resolve = 0.0  # on the monotonic clock
        self._watcher: threading.Thread | None = None
        self._is_closed = False

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._peers.values())

    def order(self, key: ExpertKey) -> list[Peer]:
        """Return the daemons in the order in which they are asked for ``key``, also those that are away."""
        orders, peers = self._orders, self._peers
        if (ordered := orders.get(key)) is None:
            ordered = orders[key] = [peers[name] for name in rendezvous(peers, key)]
        return ordered

    def count_record(self, peer: Peer, nbytes: int) -> None:
        """Count a record that a daemon has given."""
        with self._state:
            peer.note_record(nbytes)

    def count_computed(self, peer: Peer, outputs: int, nbytes: int) -> None:
        """Count ``outputs`` that a daemon has computed, and the bytes that were sent for them in both directions."""
        with self._state:
            peer.counts.count(computed=outputs, computed_bytes=nbytes)

    def shares(self) -> list[Share]:
        """Return the records and outputs that each daemon has given, in the order of the daemons' names in the options.

        Those of daemons that have left their DNS name come last, as one share.
        """
        with self._state:
            shares = [peer.share() for peer in self]
            if self._former != ShareCounts():
                shares.append(self._former.share("former daemons"))
        return shares

    def check_open(self) -> None:
        """Raise ClosedError once the connections were closed."""
        if self._is_closed:
            raise ClosedError("The connections to the daemons were closed.", "Load the model again.")

    def close(self) -> None:
        """Close all stores; calls under way end with an error. Idempotent."""
        with self._state:
            self._is_closed = True
            self._state.notify_all()
        for peer in self:
            peer.store.close()
        if self._watcher is not None:
            self._watcher.join(_RESOLVER)

    def wait(self, deadline: float, error: MoetierError) -> None:
        """Wait until a daemon comes back or may have a free slot.

        Raises ``error`` at the deadline (monotonic clock), and ClosedError once the store is closed.
        """
        with self._state:
            self.check_open()
            if (pause := deadline - time.monotonic()) <= 0:
                raise error
            if not self._any_connected():
                self._state.wait_for(lambda: self._is_closed or self._any_connected(), pause)
            else:
                self._state.wait(min(_PAUSE, pause))

    def _any_connected(self) -> bool:
        return any(peer.away is None for peer in self)

    # -- daemons that are away ----------------------------------------------------------------------------------------

    def check_all(self, *, needed: bool) -> None:
        """Resolve the DNS names, check all daemons at once, and note those that are away.

        Raises ConfigError or RefusedError as ``SpreadStore.open``. If all are away and ``needed``, raises the error of
        the first.
        """
        unknown = self._resolve()
        peers = list(self)
        with ThreadPoolExecutor(max(len(peers), 1), thread_name_prefix="moetier-check") as pool:
            errors = list(pool.map(_check, peers))
        for peer, error in zip(peers, errors, strict=True):
            if isinstance(error, ConfigError):
                raise error
            if isinstance(error, RefusedError):
                raise RefusedError(f"{peer.name}: {error.cause}", error.fix)
        failed = [error for error in (*errors, *unknown) if error is not None]
        if needed and len(failed) == len(errors) + len(unknown):
            raise failed[0]
        for error in unknown:
            _log.warning("%s", error.cause)
        for peer, error in zip(peers, errors, strict=True):
            if error is not None:
                self.lose(peer, error, peer.failures)
        if self._names:
            self._start_watcher()

    def lose(self, peer: Peer, error: MoetierError, failures: int) -> None:
        """Note that a peer is away, after a request to it failed with ``error``.

        ``failures`` is the value of ``peer.failures`` before the request. If the value has changed since, the failure
        was noted already.
        """
        with self._state:
            is_former = self._peers.get(peer.name) is not peer
            if peer.away is not None or peer.failures != failures or self._is_closed or is_former:
                return
            _log.warning("the daemon %s is away: %s", peer.name, error.cause)
            self._note_away(peer, error, is_failure=True)
        self._start_watcher()

    def _note_away(self, peer: Peer, error: MoetierError, *, is_failure: bool = False) -> None:
        """Note that a peer is away, as ``Peer.note_away`` does. The caller holds ``_state``."""
        peer.note_away(error, is_failure=is_failure)
        self._next_resolve = 0.0  # another daemon may have taken its place
        self._state.notify_all()

    def _start_watcher(self) -> None:
        with self._state:
            if self._watcher is None and not self._is_closed:
                try:
                    self._watcher = start_thread("moetier-peers", self._watch)
                except ExhaustedError as error:  # the next failure of a peer tries it again
                    _log.warning("no thread can be started that checks daemons that are away: %s", error.cause)

    def _watch(self) -> None:
        """Check peers that are away, at growing intervals, and resolve DNS names, until the store is closed."""
        while (task := self._next_task()) is not None:
            task()

    def _next_task(self) -> Callable[[], object] | None:
        """Wait until it is time to check a peer or to resolve DNS names, and return that task; None once closed."""
        with self._state:
            while not self._is_closed:
                tasks: list[tuple[float, Callable[[], object]]] = [
                    (peer.next_check, partial(self._check_again, peer)) for peer in self if peer.away is not None
                ]
                if self._names:
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
                peer.note_back()
                self._state.notify_all()

    # -- daemons that come and go -------------------------------------------------------------------------------------

    def _resolve_again(self) -> None:
        """Resolve the DNS names, and check daemons that were added."""
        self._resolve()
        for peer in self:
            if peer.store.computes is None and peer.away is None:
                with contextlib.suppress(MoetierError):  # the next read will notice it
                    peer.store.probe(again=False)

    def _resolve(self) -> list[UnavailableError]:
        """Resolve the DNS names: connect to daemons that were added, and disconnect from those that were removed.

        A name that can't be resolved keeps its daemons. Return the errors of such names.
        """
        errors = []
        for dns_name in self._names:
            try:
                self._names[dns_name] = dns_name.resolve()
            except UnavailableError as error:
                errors.append(error.with_traceback(None))
        listed = {str(address): address for addresses in self._names.values() for address in addresses}
        with self._state:
            self._next_resolve = time.monotonic() + (RESOLVE_AGAIN if errors else RESOLVE_SECONDS)
            if self._is_closed:
                return errors
            peers = {name: peer for name, peer in self._peers.items() if name in self._single or name in listed}
            former = [peer for name, peer in self._peers.items() if name not in peers]
            new = {
                name: Peer(name, RemoteStore(address, self._credentials, self._manifest))
                for name, address in listed.items()
                if name not in peers
            }
            self._peers = peers | new
            self._orders = {}
            for peer in former:
                self._former.count(**asdict(peer.counts))
                peer.leave(self._former)
            self._state.notify_all()
        for peer in former:
            _log.info("the daemon %s has gone", peer.name)
            peer.store.close()
        for name in new:
            _log.info("the daemon %s has come", name)
        return errors


def _check(peer: Peer) -> MoetierError | None:
    """Return why a daemon is away; None if it serves the store."""
    try:
        peer.store.probe()
    except MoetierError as error:
        return error.with_traceback(None)
    return None
