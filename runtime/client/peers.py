"""Peers: several daemons that hold the same store, the order in which each key asks them, and which are away.

The order is that of rendezvous hashing (Thaler and Ravishankar 1998, "Using name-based mappings to increase hit
rates"). All clients agree on it, and a daemon that comes or goes moves only its own keys.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b

from moetier.tiers.errors import ClosedError, ConfigError, MoetierError, RefusedError, UnavailableError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.stats import Share

from .remote import RemoteReader

SHORTEST, LONGEST = 0.5, 30.0  # seconds between checks of a daemon that is away
_PAUSE = 0.2  # seconds before daemons that had no free slot are asked again

_log = logging.getLogger(__name__)


def rendezvous(names: Iterable[str], key: ExpertKey) -> list[str]:
    """Sort names into a key's own order."""
    prefix = b"%d/%d/" % key
    return sorted(names, key=lambda name: blake2b(prefix + name.encode(), digest_size=8).digest())


class Peer:
    """One of several daemons, and whether it is away."""

    def __init__(self, name: str, reader: RemoteReader) -> None:
        self.name = name
        self.reader = reader
        self.records = 0  # read from it
        self.bytes = 0  # of them
        self.failures = 0  # number of times it went away
        self.away: MoetierError | None = None  # the reason while it is away
        self.backoff = 0.0  # seconds between checks while it is away; 0 once it has given a record
        self.next_check = 0.0  # on the monotonic clock


class Peers:
    """Several daemons. Thread-safe; owns their readers.

    A background thread checks the daemons that are away, at growing intervals.
    """

    def __init__(self, peers: Sequence[Peer]) -> None:
        self._peers = {peer.name: peer for peer in peers}
        self._state = threading.Condition()  # guards the peers' fields and the two below
        self._watcher: threading.Thread | None = None
        self._closed = False

    def __iter__(self) -> Iterator[Peer]:
        """Iterate in the order in which they were named."""
        return iter(self._peers.values())

    def order(self, key: ExpertKey) -> list[Peer]:
        """Return the peers in the order in which they are asked for a key."""
        return [self._peers[name] for name in rendezvous(self._peers, key)]

    def failures(self, peer: Peer) -> int | None:
        """Return how often a peer has gone away; None while it is away. Raises ClosedError."""
        with self._state:
            if self._closed:
                raise _closed_error()
            return peer.failures if peer.away is None else None

    def count_read(self, peer: Peer, nbytes: int) -> None:
        """Count a record of ``nbytes`` that a peer gave."""
        with self._state:
            peer.records += 1
            peer.bytes += nbytes
            peer.backoff = 0.0

    def lose(self, peer: Peer, error: MoetierError, seen: int) -> None:
        """Note that a peer failed. ``seen`` is its ``failures`` when it was asked: it may have come back since."""
        with self._state:
            if peer.away is not None or peer.failures != seen or self._closed:
                return
            _log.warning("the daemon %s is away: %s", peer.name, error.cause)
            peer.failures += 1
            peer.away = error
            peer.backoff = min(max(SHORTEST, 2 * peer.backoff), LONGEST)
            peer.next_check = time.monotonic() + peer.backoff
            if self._watcher is None:
                watcher = threading.Thread(target=self._watch, name="moetier-peers", daemon=True)
                watcher.start()
                self._watcher = watcher
            self._state.notify_all()

    def check_all(self, *, needed: bool) -> None:
        """Check all peers at once.

        Raises RefusedError if one refuses this client, and the first peer's error if all are away and one is
        ``needed``.
        """
        with ThreadPoolExecutor(len(self._peers), thread_name_prefix="moetier-check") as pool:
            errors = list(pool.map(_check, self))
        for peer, error in zip(self, errors, strict=True):
            if isinstance(error, RefusedError):
                raise RefusedError(f"{peer.name}: {error.cause}", error.fix)
        if all(errors) and needed:
            raise next(error for error in errors if error is not None)
        for peer, error in zip(self, errors, strict=True):
            if error is not None:
                self.lose(peer, error, peer.failures)

    def wait(self, deadline: float, error: MoetierError) -> None:
        """Wait until a peer comes back or may have a free slot. Raises ``error`` at the deadline, ClosedError."""
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

    def shares(self) -> list[Share]:
        """Return what was read from each peer."""
        with self._state:
            return [
                Share(
                    peer.name,
                    peer.records,
                    peer.bytes,
                    peer.away.cause if peer.away is not None else "",
                    peer.failures,
                )
                for peer in self
            ]

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    def close(self) -> None:
        """Close all readers; callers that wait get a ClosedError. Idempotent."""
        with self._state:
            self._closed = True
            self._state.notify_all()
            watcher, self._watcher = self._watcher, None
        for peer in self:
            peer.reader.close()
        if watcher is not None:
            watcher.join()

    def _watch(self) -> None:
        """Check peers that are away until none is, or the reader is closed."""
        while True:
            with self._state:
                while True:
                    if self._closed:
                        return
                    away = [peer for peer in self._peers.values() if peer.away is not None]
                    if not away:
                        self._watcher = None
                        return
                    peer = min(away, key=lambda peer: peer.next_check)
                    pause = peer.next_check - time.monotonic()
                    if pause <= 0:
                        break
                    self._state.wait(pause)
            self._check_again(peer)

    def _check_again(self, peer: Peer) -> None:
        error: MoetierError | None = None
        try:
            peer.reader.check()
        except MoetierError as failure:
            error = failure.with_traceback(None)
        except (OSError, RuntimeError) as failure:  # out of descriptors, memory or threads
            error = UnavailableError(f"{peer.name} can't be reached: {failure}.", "Free what is short.")
        with self._state:
            if error is None:
                if peer.away is not None:
                    _log.warning("the daemon %s is back", peer.name)
                peer.away = None
            else:
                peer.away = error
                peer.backoff = min(2 * peer.backoff, LONGEST)
                peer.next_check = time.monotonic() + peer.backoff
            self._state.notify_all()


def _check(peer: Peer) -> MoetierError | None:
    try:
        peer.reader.check()
    except ConfigError:
        raise
    except MoetierError as error:
        return error
    return None


def _closed_error() -> ClosedError:
    return ClosedError("The daemons' reader was closed.", "Load the model again.")
