"""Who waits for a slot of the host tier, and who is to be told of one. Part of the ledger: its owner's lock is held."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator

from moetier.tiers.errors import ExhaustedError

from .requests import Demand, Pool


class Waiting:
    """``wake`` wakes the callers that sleep, and has the parties served soon; ``ring`` wakes a loader, ``watch``
    whoever calls ``expire`` in time."""

    def __init__(
        self,
        *,
        wake: Callable[[], None],
        ring: Callable[[], None],
        watch: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self.wake = wake
        self._ring = ring
        self._watch = watch
        self._clock = clock
        self._stirred: dict[Demand, None] = {}  # of parties: those that may go on
        self._deadlines: dict[Demand, float] = {}  # of parties: those that have nothing
        self._pools: dict[Pool, None] = {}  # where some of the hungry may be a party's

    # -- the hungry ---------------------------------------------------------------------------------------------------

    def starve(self, demand: Demand) -> None:
        """It is idle, and lacks a slot: behind the others who do."""
        party, hungry = demand.party, demand.pool.hungry
        if party is not None:
            self._pools[demand.pool] = None
            if demand not in self._deadlines:
                self._deadlines[demand] = self._clock() + demand.patience
                self._watch()
        if demand not in hungry and not (party is not None and party.is_full):
            hungry.append(demand)

    def feed(self, demand: Demand) -> None:
        """It is hungry no longer, if it was."""
        hungry = demand.pool.hungry
        if demand in hungry:
            hungry.remove(demand)
            self.wake()  # the next in the row may find a slot too
            self._ring()  # wishes stand back while somebody is hungry

    def firsts(self) -> Iterator[Demand]:
        """The first of each pool's hungry, where that is a party's: anybody else, woken, comes by himself."""
        for pool in list(self._pools):
            if not any(demand.party for demand in pool.hungry):
                del self._pools[pool]
            elif pool.hungry[0].party is not None:
                yield pool.hungry[0]

    # -- parties ------------------------------------------------------------------------------------------------------

    def stir(self, demand: Demand) -> None:
        """A party's demand: perhaps it can go on."""
        self._stirred[demand] = None

    def take_stirred(self) -> Demand | None:
        """The first of those that may go on."""
        demand = next(iter(self._stirred), None)
        if demand is not None:
            del self._stirred[demand]
        return demand

    def count(self, demand: Demand, change: int) -> None:
        """One slot more or less that a party's demand holds or claims."""
        party = demand.party
        if party is None:
            return
        was_full = party.is_full
        party.outstanding += change
        if change > 0:
            self._deadlines.pop(demand, None)
        if party.is_full and not was_full:  # nobody is to wait behind who may not take
            for other in party.demands:
                self.feed(other)
        elif was_full and not party.is_full:
            # whoever has nothing first, and of those who has waited the longest: a request for many keys holds up none
            for other in sorted(party.demands, key=lambda other: self._deadlines.get(other, math.inf)):
                if other.pending:
                    self.stir(other)
            self.wake()

    def expire(self) -> float | None:
        """Fails the demands of parties that have waited for too long, and stirs them. Returns the time of the next,
        None if nobody waits."""
        now = self._clock()
        for demand in [demand for demand, deadline in self._deadlines.items() if deadline <= now]:
            del self._deadlines[demand]
            demand.error = _exhausted(demand)
            self.stir(demand)
        return min(self._deadlines.values(), default=None)

    def forget(self, demand: Demand) -> None:
        """It is over."""
        self._stirred.pop(demand, None)
        self._deadlines.pop(demand, None)

    def mend(self, demands: Collection[Demand], pools: Iterable[Pool]) -> None:
        """After a step that was cut: all callers look again."""
        for pool in pools:
            waiting = [demand for demand in pool.hungry if demand in demands and demand.pending and demand.is_idle]
            pool.hungry.clear()
            pool.hungry.extend(dict.fromkeys(waiting))
            self._pools[pool] = None
        for demand in list(self._deadlines):
            if demand not in demands or not (demand.pending and demand.is_idle):
                del self._deadlines[demand]
        self._stirred.clear()
        for demand in demands:
            if demand.party is not None:
                demand.party.outstanding = sum(other.outstanding for other in demand.party.demands)
                self.stir(demand)
        self.wake()

    def check_integrity(self, demands: Collection[Demand]) -> None:
        """Asserts that of all demands no party's is forgotten, and that none waits that could go on."""
        for party in {demand.party for demand in demands if demand.party is not None}:
            assert party.demands.keys() == {demand for demand in demands if demand.party is party}
            assert party.outstanding == sum(demand.outstanding for demand in party.demands) <= party.leases
            for demand in party.demands:
                stirred = demand in self._stirred
                assert stirred or not demand.ready, "who is told does not have to ask"
                assert stirred or not demand.is_over
                waits = bool(demand.pending) and demand.is_idle
                assert stirred or waits == (demand in self._deadlines)
                assert not party.is_full or demand not in demand.pool.hungry
                assert stirred or party.is_full or not waits or demand in demand.pool.hungry
        assert all(demand in demands for demand in (*self._stirred, *self._deadlines))


def _exhausted(demand: Demand) -> ExhaustedError:
    party = demand.party
    if party is not None and party.is_full:
        return ExhaustedError(
            f"The client holds all {party.leases} leases that it may: none was given back in {demand.patience:g} s.",
            "Release some, or give it more (moetier daemon --leases).",
        )
    return ExhaustedError(
        f"All slots of the host tier are leased: none came free in {demand.patience:g} seconds.",
        "Try again, give the daemon more memory, or have fewer clients at a time.",
    )
