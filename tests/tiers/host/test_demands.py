"""A demand: its keys go through pending, loads, ready and leased, and each slot that it holds is told back."""

from __future__ import annotations

import itertools

from cuts import cut
from ledgers import ledger_of

from moetier.tiers.errors import ClosedError, StoreReadError
from moetier.tiers.host.demands import AsyncCaller, Demand, Load, Purpose, ThreadCaller
from moetier.tiers.layout import ExpertKey, PoolSlot

A, B, C = (ExpertKey(1, expert) for expert in range(3))


def a_demand() -> Demand:
    _, pool = ledger_of(6)
    demand = Demand(pool, 1, ThreadCaller(1))
    demand.begin([A, B, C], is_scan=False)
    return demand


def test_each_key_is_in_one_place_until_its_lease_ends() -> None:
    demand = a_demand()
    load = Load(demand.pool, B, PoolSlot(4))
    demand.hold(A, PoolSlot(3), is_hit=True)
    demand.wait_for(load)
    assert (list(demand.pending), demand.loads, list(demand.ready)) == ([C], [load], [3])
    demand.complete(load)
    assert demand.slots == [3, 4]
    assert demand.lease(1) == [3]
    assert demand.lease(5) == [4]
    assert demand.release([PoolSlot(4), PoolSlot(5), None]) == [4], "the others are not leased"
    assert demand.clear() == ([3], [])
    assert demand.is_over


def test_hits_are_those_of_the_slots_that_are_ready_still() -> None:
    demand = a_demand()
    demand.hold(A, PoolSlot(0), is_hit=True)
    demand.hold(B, PoolSlot(1), is_hit=True)
    demand.lease(1)
    assert (list(demand.hits), list(demand.arrived)) == ([1], [])
    demand.hold(C, PoolSlot(2))
    assert demand.ready == [1, 2]
    assert demand.lease(2) == [1, 2]
    assert demand.ready == []


def test_an_exception_while_slots_are_leased_loses_none_of_them() -> None:
    for number in itertools.count():
        demand = a_demand()
        for key, slot in zip((A, B, C), range(3), strict=True):
            demand.hold(key, PoolSlot(slot), is_hit=key is not C)
        has_been_cut = cut(lambda demand=demand: demand.lease(2), number) is not None
        assert sorted(demand.slots) == [0, 1, 2]
        demand.lease(5)
        assert (sorted(demand.leased), demand.ready) == ([0, 1, 2], [])
        assert sorted(demand.clear()[0]) == [0, 1, 2], "each once"
        if not has_been_cut:
            break
    assert number > 4


def test_a_slot_that_an_interrupted_lease_has_left_in_two_places_is_held_once() -> None:
    demand = a_demand()
    demand.hold(A, PoolSlot(3))
    demand.leased[PoolSlot(3)] = None  # and ``popleft`` was not reached
    assert demand.slots == [3]
    assert demand.lease(1) == [3]
    assert demand.clear() == ([3], [])


def test_the_first_error_stays_and_each_demand_gets_its_own() -> None:
    demand, error = a_demand(), StoreReadError("The disk has failed.", "Replace it.")
    load = Load(demand.pool, A, PoolSlot(0))
    demand.wait_for(load)
    demand.lose(load, error)
    demand.fail(ClosedError("It was closed.", "Open it."))
    assert not demand.loads
    assert repr(demand.error) == repr(error)
    assert demand.error is not error, "its frames would keep slots"


def test_a_wait_is_as_long_as_from_its_first_beginning() -> None:
    demand = a_demand()
    demand.begin_wait(10.0)
    demand.begin_wait(11.0)
    assert demand.end_wait(12.5) == 2.5
    assert demand.waits_since is None


def test_a_prefetch_is_for_demands_once_one_waits() -> None:
    demand = a_demand()
    load = Load(demand.pool, A, PoolSlot(0), Purpose.WARMUP)
    assert load.is_prefetch
    assert not load.is_for_demands
    load.waiters.append(demand)
    assert load.is_for_demands


def test_a_caller_is_full_with_all_that_its_demands_hold_or_claim() -> None:
    caller = AsyncCaller(lambda event: None, max_leases=2)
    demand = a_demand()
    caller.register(demand)
    demand.hold(A, PoolSlot(0))
    assert not caller.is_full
    demand.wait_for(Load(demand.pool, B, PoolSlot(1)))
    assert caller.is_full
    slots, _ = demand.clear()
    assert not caller.is_full
    assert caller.was_full(len(slots))
