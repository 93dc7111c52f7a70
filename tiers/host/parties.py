"""Takes the steps of callers that are told instead of woken, as a thread that acquires takes its own."""

from __future__ import annotations

import time

from .ledger import Ledger
from .requests import Demand


class Parties:
    """Over a ledger, whose lock is held. To be served whenever it has been woken."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._waiting = ledger.waiting

    def serve(self) -> None:
        """Goes on with every demand of a party that can: grants what is ready, refuses what has failed."""
        while True:
            while (demand := self._waiting.take_stirred()) is not None:
                self._go_on(demand)
            if not any(self._feed(demand) for demand in self._waiting.firsts()):
                return

    def expire(self) -> float | None:
        """Refuses the demands that have waited for too long. Returns the time of the next, None if nobody waits."""
        until = self._waiting.expire()
        self.serve()
        return until

    def _go_on(self, demand: Demand) -> None:
        party = demand.party
        assert party is not None
        if demand.error is None and demand.pending:
            self._ledger.advance(demand)
        if demand.error is not None:
            self._ledger.leave(demand)
            party.refuse(demand, demand.error)
            return
        if demand.ready and demand.stands_since is not None:
            self._ledger.counters.waited(time.monotonic() - demand.stands_since)
            demand.stands_since = None
        while demand.ready:
            party.grant(demand, self._ledger.take(demand))
        if demand.is_over:
            self._ledger.leave(demand)
        elif not demand.held and demand.stands_since is None:
            demand.stands_since = time.monotonic()

    def _feed(self, demand: Demand) -> bool:
        """Whether the first of the hungry is fed now."""
        self._go_on(demand)
        return not demand.is_idle
