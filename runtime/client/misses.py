"""Misses: records that a client requests from the daemon, or reads from the local store while the daemon can't help."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from queue import Empty

from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import ClosedError, ExhaustedError, StoreError, UnavailableError
from moetier.tiers.host.demands import Granted
from moetier.tiers.host.tier import HostTier
from moetier.tiers.inbox import Inbox
from moetier.tiers.layout import ExpertKey, TierSlot
from moetier.tiers.locks import POLL_SECONDS
from moetier.tiers.source import Lease

from .daemon_link import Link, SlotAnswer, SlotRequest
from .disk_order import ClientDiskOrder
from .fallback import Fallback
from .uses import ClientUses

AWAY_GRACE = 1.0  # seconds that a daemon may be away before the local store is read
_RETRY = 0.1  # seconds before a request that failed because the daemon was ending is sent again


@dataclass(frozen=True, eq=False, slots=True)
class ClientContext:
    """Objects that a client's tier shares with all its misses."""

    link: Link
    fallback: Fallback
    uses: ClientUses
    timeout: float  # seconds for which a miss waits for the daemon
    check_open: Callable[[], None]  # raises ClosedError once the tier is closed
    disk_order: ClientDiskOrder = field(default_factory=ClientDiskOrder)
    by_thread: dict[int, Misses] = field(default_factory=dict)  # by thread id: the misses that hold or await its leases


class Misses(Closeable):
    """The misses of one call of ``acquire``, all of one block. The daemon grants them, or the local store is read."""

    def __init__(self, context: ClientContext, block: int, of_total: int = 0) -> None:
        """``of_total`` is that of ``ExpertSource.acquire``."""
        self._context = context
        self._block = block
        self._of_total = of_total
        self._thread = 0  # set by the first request
        self._requests: list[SlotRequest] = []
        self._answers = Inbox[SlotAnswer | None]()
        self.missing: dict[int, None] = {}  # experts that the caller has not computed with yet

    def submit(self, experts: Sequence[int]) -> None:
        """Request experts from the daemon, in one message."""
        self.missing.update(dict.fromkeys(experts))
        request = SlotRequest(self._block, dict.fromkeys(experts), self._answers, self._of_total)
        # appended first, so that close() cancels it even if an exception interrupts what follows
        self._requests.append(request)
        self._thread = threading.get_ident()
        self._context.by_thread[self._thread] = self
        self._context.link.submit(request)

    def close(self) -> None:
        """Cancel all requests. Never waits. After an interruption by an exception, it can be called again."""
        for request in self._requests:
            self._context.link.cancel(request)
        if self._context.by_thread.get(self._thread) is self:
            self._context.by_thread.pop(self._thread, None)

    def leases(self) -> Generator[Lease[memoryview], None, None]:
        """Yield a lease of each missing expert, in the order in which they are granted."""
        context = self._context
        while self.missing:
            if isinstance(granted := self._wait(), HostTier):
                yield from self._from_fallback(granted)
                return
            request, event, arena = granted
            assert isinstance(event, Granted)
            expert = event.key.expert
            lease, proof = arena.lease(event.key, event.slot, event.generation)
            yield lease
            context.check_open()
            if proof.is_valid is not False:
                del self.missing[expert]
                if self.missing:  # otherwise close() cancels the request and so releases this lease
                    context.link.release(request, expert)
            else:  # the daemon that granted the slot is gone, and another one has refilled it
                context.uses.count(discarded=1)
                context.link.cancel(request)
                self.submit([expert, *request.awaited])

    def _wait(self) -> SlotAnswer | HostTier:
        """Return the next answer that grants a slot, or the fallback's tier if the daemon grants none in time."""
        context, began = self._context, time.monotonic()
        try:
            with context.disk_order.waiting_for_records():
                return self._granted(began)
        finally:
            context.uses.count(waited=time.monotonic() - began)

    def _granted(self, began: float) -> SlotAnswer | HostTier:
        context, link, fallback = self._context, self._context.link, self._context.fallback
        deadline = began + context.timeout
        while True:
            context.check_open()
            away = link.away_since
            due = (
                deadline
                if away is None or fallback.error
                else min(deadline, max(away, began - AWAY_GRACE) + AWAY_GRACE)
            )
            answer = self._next_answer(due)
            if answer is None:
                if time.monotonic() >= due and (host := fallback.open()) is not None:
                    return host
                if time.monotonic() >= deadline:
                    raise self._timeout_error()
            elif not isinstance(answer.event, Granted):
                if (host := self._fail(answer.request, answer.event.error, deadline)) is not None:
                    return host
            elif answer.event.key.expert in self.missing:
                return answer
            else:  # granted a second time, as it was requested again meanwhile
                link.release(answer.request, answer.event.key.expert)

    def _next_answer(self, due: float) -> SlotAnswer | None:
        """Return the next answer; None if there is none before ``due`` (monotonic clock), or within POLL_SECONDS."""
        try:
            return self._answers.get(min(max(due - time.monotonic(), 0.0), POLL_SECONDS))
        except Empty:
            return None

    def _fail(self, request: SlotRequest, error: BaseException, deadline: float) -> HostTier | None:
        """Handle a failed request: return the fallback's tier, or None after the request was sent to the daemon again.

        Raises the request's error if neither is possible, as after ``deadline`` (monotonic clock).
        """
        if isinstance(error, StoreError):
            self._context.uses.count(failures=1)
        is_ending = isinstance(error, UnavailableError | ClosedError)
        if not is_ending and not isinstance(error, ExhaustedError):
            raise error
        if (host := self._context.fallback.open()) is not None:
            return host
        if not is_ending or time.monotonic() + _RETRY >= deadline:
            raise error
        time.sleep(_RETRY)
        self.submit(list(request.awaited))
        return None

    def _from_fallback(self, host: HostTier) -> Generator[Lease[memoryview], None, None]:
        self.close()
        first = self._context.fallback.first_slot
        with closing(
            host.acquire([ExpertKey(self._block, expert) for expert in self.missing], self._of_total)
        ) as leases:
            for lease in leases:
                yield lease._replace(slot=TierSlot(first + lease.slot))
                self._context.check_open()

    def _timeout_error(self) -> UnavailableError:
        link, seconds = self._context.link, f"{self._context.timeout:g} seconds"
        if link.away_since is None:
            cause = f"The daemon has not answered for {seconds}."
        else:
            cause = f"The daemon has been away for {seconds} or more: {link.error.cause}"
        return UnavailableError(
            f"{cause} {self._context.fallback.error}".rstrip(), "Restart the daemon: moetier daemon DIR"
        )
