"""Misses: what one call of acquire asks the daemon for, and in the end somebody else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from moetier.tiers.errors import ClosedError, ExhaustedError, StoreError, UnavailableError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.interrupts import POLL_SECONDS, interruptible
from moetier.tiers.layout import ExpertKey
from moetier.tiers.source import Lease

from .counts import Counts
from .link import Link
from .requests import Event, Failed, Granted, Request
from .spare import Spare
from .view import MappedArena

GRACE = 1.0  # seconds that a daemon may be away until the local store is read instead
_AGAIN = 0.1  # seconds until a daemon that takes no requests is asked again


@dataclass(frozen=True, slots=True)
class Ways:
    """Of one tier, to what its directory does not show."""

    link: Link[MappedArena]
    spare: Spare
    patience: float  # seconds that a miss waits for the daemon where there is no spare
    counts: Counts
    check_open: Callable[[], None]  # raises ClosedError when the tier is closed
    slots: Callable[[], int]  # of the arena that is mapped now


class Misses:
    """Of one block. ``close`` gives back what it still holds. ``register`` knows it by its thread until then."""

    def __init__(self, ways: Ways, block: int, register: dict[int, Misses]) -> None:
        self._ways = ways
        self._block = block
        self._register = register
        self._thread = 0  # until it wants something
        self._requests: list[Request] = []
        self._events: SimpleQueue[Event[MappedArena]] = SimpleQueue()
        self.wanted: dict[int, None] = {}  # experts that were not computed with yet

    def want(self, experts: Sequence[int]) -> None:
        """Asks the daemon, in one request."""
        self.wanted.update(dict.fromkeys(experts))
        request = Request(self._block, dict.fromkeys(experts), self._events.put)
        self._requests.append(request)  # first: whatever comes between, close() gives it back
        self._thread = threading.get_ident()
        self._register[self._thread] = self
        self._ways.link.ask(request)

    def close(self) -> None:
        """Gives back what is held and waited for. Never waits. What an exception has cut can be repeated."""
        for request in self._requests:
            self._ways.link.withdraw(request)
        if self._register.get(self._thread) is self:
            self._register.pop(self._thread, None)

    def leases(self) -> Generator[Lease[memoryview], None, None]:
        """Of all that is wanted, in order of arrival."""
        while self.wanted:
            granted = self._wait()
            if isinstance(granted, HostTier):
                yield from self._from_spare(granted)
                return
            expert = granted.expert
            lease, proof = granted.place.lease(ExpertKey(self._block, expert), granted.slot, granted.generation)
            yield lease
            self._ways.check_open()
            if proof.held:
                del self.wanted[expert]
                if self.wanted:  # else the request ends with it
                    self._ways.link.release(granted.request, expert)
            else:  # the daemon that granted it is gone, and another has filled its slot
                self._ways.counts.add(discarded=1)
                self._ways.link.withdraw(granted.request)
                self.want([expert, *granted.request.awaited])

    def _wait(self) -> Granted[MappedArena] | HostTier:
        """The next lease; the local store's tier when there is none to be had in time."""
        ways, link = self._ways, self._ways.link
        began = time.monotonic()
        limit = began + ways.patience
        try:
            while True:
                ways.check_open()
                away = link.away_since
                due = limit if away is None or ways.spare.why else min(limit, max(away, began - GRACE) + GRACE)
                try:
                    event = _take(self._events, max(due - time.monotonic(), 0.0))
                except Empty:
                    if time.monotonic() < due:
                        continue
                    if (spare := ways.spare.open()) is not None:
                        return spare
                    if time.monotonic() >= limit:
                        raise self._in_vain() from None
                    continue
                if isinstance(event, Granted):
                    if event.expert in self.wanted:
                        return event
                    link.release(event.request, event.expert)  # it was asked for twice, of one daemon and the next
                elif isinstance(event, Failed) and (spare := self._fail(event, limit)) is not None:
                    return spare
        finally:
            ways.counts.waited(time.monotonic() - began)

    def _fail(self, event: Failed, limit: float) -> HostTier | None:
        """The local store's tier, if that may help; None where the daemon was asked again."""
        if isinstance(event.error, StoreError):
            self._ways.counts.add(failures=1)
        leaves = isinstance(event.error, UnavailableError | ClosedError)
        if not leaves and not isinstance(event.error, ExhaustedError):
            raise event.error
        if (spare := self._ways.spare.open()) is not None:
            return spare
        if not leaves or time.monotonic() + _AGAIN >= limit:
            raise event.error
        _sleep(_AGAIN)
        self.want(list(event.request.awaited))
        return None

    def _from_spare(self, spare: HostTier) -> Generator[Lease[memoryview], None, None]:
        self.close()
        first = self._ways.slots()  # its slots are numbered behind the arena's
        with closing(spare.acquire([ExpertKey(self._block, expert) for expert in self.wanted])) as leases:
            for lease in leases:
                yield Lease(lease.key, lease.record, first + lease.slot, lease.proof, lease.more)
                self._ways.check_open()

    def _in_vain(self) -> UnavailableError:
        ways, link = self._ways, self._ways.link
        if link.away_since is None:
            what = f"The daemon has not answered for {ways.patience:g} seconds."
        else:
            what = f"The daemon has been away for {ways.patience:g} seconds and more: {link.error.cause}"
        return UnavailableError(f"{what} {ways.spare.why}".rstrip(), "Start it again: moetier daemon DIR")


@interruptible
def _take(events: SimpleQueue[Event[MappedArena]], seconds: float) -> Event[MappedArena]:
    """Raises Empty."""
    return events.get(timeout=min(seconds, POLL_SECONDS))


@interruptible
def _sleep(seconds: float) -> None:
    time.sleep(seconds)
