"""Peers: several daemons, and which of them are away."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from moetier.tiers.errors import ClosedError, ConfigError, MoetierError, RefusedError, UnavailableError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.source import RecordReader
from moetier.tiers.stats import Share

from .rendezvous import rendezvous

SHORTEST, LONGEST = 0.5, 30.0  # seconds between two looks at a daemon that is away
_PAUSE = 0.2  # seconds before daemons are asked again that had no slot to spare

_log = logging.getLogger(__name__)


class CheckedReader(RecordReader, Protocol):
    """A RecordReader that may go and return."""

    def check(self) -> None:
        """Raises a MoetierError while it is away."""
        ...

    def close(self) -> None: ...


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


class Peers:
    """Thread-safe; closes their readers. One that is lost is away until a look at it, in a thread of its own and after
    a growing pause, finds it again."""

    def __init__(self, peers: Sequence[Peer]) -> None:
        assert peers
        self._peers = {peer.name: peer for peer in peers}
        self._state = threading.Condition()  # guards the peers' fields and the two below
        self._watcher: threading.Thread | None = None
        self._closed = False

    def __iter__(self) -> Iterator[Peer]:
        """In the order in which they were named."""
        return iter(self._peers.values())

    def order(self, key: ExpertKey) -> list[Peer]:
        """In which they are asked for a key."""
        return [self._peers[name] for name in rendezvous(self._peers, key)]

    def failures(self, peer: Peer) -> int | None:
        """How often it has gone away; None while it is. Raises ClosedError."""
        with self._state:
            if self._closed:
                raise _closed_error()
            return peer.failures if peer.away is None else None

    def gave(self, peer: Peer, nbytes: int) -> None:
        """A record of so many bytes."""
        with self._state:
            peer.records += 1
            peer.bytes += nbytes
            peer.backoff = 0.0

    def lose(self, peer: Peer, error: MoetierError, seen: int) -> None:
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
                watcher = threading.Thread(target=self._watch, name="moetier-spread", daemon=True)
                watcher.start()
                self._watcher = watcher
            self._state.notify_all()

    def look_at_all(self, *, needed: bool) -> None:
        """Raises what one refuses, and the first one's error where not one can be used and one is ``needed``."""
        with ThreadPoolExecutor(len(self._peers), thread_name_prefix="moetier-look") as pool:
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
        """For one to come back, or to have a slot to spare. Raises ``error`` behind the deadline, ClosedError."""
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
        """What came from each."""
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
        return self._closed

    def close(self) -> None:
        """Who waits gets a ClosedError. Idempotent."""
        with self._state:
            self._closed = True
            self._state.notify_all()
            watcher, self._watcher = self._watcher, None
        for peer in self:
            peer.reader.close()
        if watcher is not None:
            watcher.join()

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
