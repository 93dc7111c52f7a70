"""Prefetches and the warm-up beside the demands of a ledger."""

from __future__ import annotations

import pytest
from integrity import check_ledger
from ledgers import arrive_all, demand, ledger_of, read_next

from moetier.tiers.host.demands import AsyncCaller
from moetier.tiers.layout import ExpertKey


def test_a_prefetch_that_yields_is_woken_when_the_load_goes_that_it_yields_to() -> None:
    wakes = 0

    def woken() -> None:
        nonlocal wakes
        wakes += 1

    ledger, pool = ledger_of(6, woken=woken)
    ledger.prefetch(1, [ExpertKey(1, 0)])
    prefetch = ledger.loads.take()
    assert prefetch is not None
    other = demand(ledger, pool, 3, 0)
    assert ledger.loads.continue_or_cancel(prefetch) is None
    before = wakes
    ledger.end(other)  # no loader had begun its load
    assert ledger.loads.continue_or_cancel(prefetch)
    assert wakes > before


def test_prefetches_yield_for_the_starved_and_are_bounded() -> None:
    ledger, pool = ledger_of(3)
    holder = demand(ledger, pool, 1, 0, 1, 2)
    arrive_all(ledger)
    assert len(holder.ready) == 3
    starved = demand(ledger, pool, 3, 0)
    ledger.prefetch(4, [ExpertKey(4, 0), ExpertKey(4, 1)])
    ledger.end(holder)
    assert ledger.loads.take() is None, "three slots could be had, but a demand is starved"
    ledger.next_leases(starved)
    load = ledger.loads.take()
    assert load is not None
    assert load.key == ExpertKey(3, 0), "demands first"
    assert ledger.loads.take() is None, "and alone: they don't share the disk with prefetches"
    ledger.loads.complete(load)
    requested = ledger.loads.take()
    assert requested is not None
    assert requested.key == ExpertKey(4, 0)
    assert ledger.loads.take() is None, "one prefetch at a time, so that a demand finds a loader"
    ledger.loads.complete(requested)
    other = ledger.loads.take()
    assert other is not None
    assert other.key == ExpertKey(4, 1)
    assert pool.slot_of(ExpertKey(4, 0)) is not None, "a prefetch does not evict what is requested"
    ledger.loads.complete(other)
    assert ledger.stats().prefetched == 2


def test_what_becomes_of_prefetches_is_counted() -> None:
    now = [0.0]
    ledger, pool = ledger_of(3, clock=lambda: now[0])

    def read(seconds: float) -> None:
        load = ledger.loads.take()
        assert load is not None
        now[0] += seconds
        ledger.loads.complete(load)

    def counts() -> tuple[int, ...]:
        found = ledger.stats()
        assert found.useful + found.late + found.wasted + found.cancelled <= found.prefetched
        return found.prefetched, found.useful, found.late, found.wasted, found.dropped

    ledger.prefetch(1, [ExpertKey(1, 0), ExpertKey(1, 1), ExpertKey(1, 2)])
    read(0.5)
    late = ledger.loads.take()
    assert late is not None
    now[0] += 0.25
    first = demand(ledger, pool, 1, 0, 1)
    assert counts() == (2, 1, 1, 0, 1), "one is there, one under way, and the third is no longer requested"
    now[0] += 0.25
    ledger.loads.complete(late)
    ledger.end(first)
    assert ledger.stats().saved_seconds == 0.75
    ledger.end(demand(ledger, pool, 1, 0, 1))
    assert counts() == (2, 1, 1, 0, 1), "each once"

    ledger.prefetch(4, [ExpertKey(4, 0)])
    read(1.0)
    ledger.prefetch(4, [ExpertKey(4, 1)])
    ledger.prefetch(4, [ExpertKey(4, 1)])
    assert counts() == (3, 1, 1, 0, 1), "what is requested again is not given up"
    others = demand(ledger, pool, 3, 0, 1, 2)
    arrive_all(ledger)
    ledger.end(others)
    assert counts() == (3, 1, 1, 1, 2), "evicted before a demand used it; and the next request found no slot"
    assert ledger.stats().saved_seconds == 0.75


def test_a_prefetch_takes_the_place_of_one_that_was_wrong() -> None:
    ledger, pool = ledger_of(6)

    def there(*keys: tuple[int, int]) -> list[bool]:
        return [pool.slot_of(ExpertKey(*key)) is not None for key in keys]

    ledger.prefetch(4, [ExpertKey(4, 0)])
    arrive_all(ledger)
    for block, experts in ((1, (0, 1)), (3, (0, 1)), (4, (1,))):
        asked = demand(ledger, pool, block, *experts)
        arrive_all(ledger)
        ledger.end(asked)
    ledger.prefetch(1, [ExpertKey(1, 2)])
    arrive_all(ledger)
    assert there((4, 0), (1, 2), (1, 0), (1, 1)) == [False, True, True, True], "and of no record of its own block"
    ledger.end(demand(ledger, pool, 1, 0))  # and not what was requested
    asked = demand(ledger, pool, 4, 2)
    arrive_all(ledger)
    ledger.end(asked)
    assert there((1, 2), (1, 0), (1, 1), (4, 1), (4, 2)) == [False, True, True, True, True], "block 4 has its slot back"
    assert ledger.stats().wasted == 2


def test_a_prefetch_takes_what_is_empty_before_what_was_wrong() -> None:
    ledger, pool = ledger_of(6)
    for key in (ExpertKey(4, 0), ExpertKey(1, 0)):
        ledger.prefetch(4, [])
        ledger.prefetch(key.block, [key])
        arrive_all(ledger)
    assert None not in (pool.slot_of(ExpertKey(4, 0)), pool.slot_of(ExpertKey(1, 0)))
    assert ledger.stats().wasted == 0


def test_a_prefetch_that_finds_no_slot_or_whose_caller_goes_is_given_up() -> None:
    ledger, _ = ledger_of(2)
    ledger.prefetch(1, [ExpertKey(1, 0), ExpertKey(1, 1), ExpertKey(1, 2)])
    assert [read_next(ledger) for _ in range(3)] == [ExpertKey(1, 0), ExpertKey(1, 1), None]
    assert (ledger.stats().prefetched, ledger.stats().dropped) == (2, 1), "two are requested still"
    caller = AsyncCaller(lambda event: None, 1)
    ledger.prefetch(3, [ExpertKey(3, 0), ExpertKey(3, 1)], caller)
    ledger.end_caller(caller)
    assert (read_next(ledger), ledger.stats().dropped) == (None, 3)


def test_a_record_that_a_client_finds_in_the_directory_was_requested_rightly() -> None:
    ledger, _ = ledger_of(3)
    ledger.prefetch(1, [ExpertKey(1, 0)])
    load = ledger.loads.take()
    assert load is not None
    ledger.loads.complete(load)
    ledger.uses.note_client([ExpertKey(1, 0)])
    assert (ledger.stats().useful, ledger.stats().late) == (1, 0)


def test_a_warm_up_fills_what_is_empty_behind_demands_and_requests() -> None:
    ledger, pool = ledger_of(6)  # two for each of three blocks
    ledger.end(demand(ledger, pool, 4, 0))  # its read has begun, and no demand waits for it now
    ledger.loads.warm(pool, [ExpertKey(1, 3), ExpertKey(1, 2), ExpertKey(1, 1)])
    ledger.loads.warm(pool, [ExpertKey(3, 0), ExpertKey(3, 1)])
    ledger.loads.warm(pool, [ExpertKey(4, 0), ExpertKey(4, 1)])
    assert read_next(ledger) == ExpertKey(1, 3), "the hottest first"
    wanted = demand(ledger, pool, 4, 0)
    begun = ledger.loads.take()
    assert begun is not None
    assert begun.key == ExpertKey(4, 0)
    assert ledger.loads.take() is None, "not while anything is read for a demand"
    ledger.loads.complete(begun)
    ledger.end(wanted)
    ledger.prefetch(3, [ExpertKey(3, 3)])
    assert [read_next(ledger) for _ in range(5)] == [(3, 3), (1, 2), (3, 0), (4, 1), None], "never beyond the quota"
    assert (
        ledger.stats().evictions,
        ledger.stats().warmed,
        ledger.stats().prefetched,
    ) == (0, 4, 1)


def test_what_was_warmed_is_evicted_before_what_was_used_and_the_hottest_last() -> None:
    ledger, pool = ledger_of(9)
    ledger.loads.warm(pool, [ExpertKey(1, 0), ExpertKey(1, 1)])
    assert [read_next(ledger), read_next(ledger)] == [(1, 0), (1, 1)]
    for expert, held in ((2, [0, 1, 2]), (3, [0, 2, 3]), (1, [1, 2, 3])):
        made = demand(ledger, pool, 1, expert)
        arrive_all(ledger)
        ledger.end(made)
        assert [e for e in range(4) if pool.slot_of(ExpertKey(1, e)) is not None] == held
    assert (ledger.stats().warmed, ledger.stats().recalled) == (2, 0)


def test_what_was_warmed_and_then_wanted_is_counted_once() -> None:
    ledger, pool = ledger_of(6)
    ledger.loads.warm(pool, [ExpertKey(1, 0), ExpertKey(1, 1)])
    assert read_next(ledger) == ExpertKey(1, 0)
    load = ledger.loads.take()
    assert load is not None
    for _ in range(2):
        made = demand(ledger, pool, 1, 0, 1)
        if load in ledger.loads:
            ledger.loads.complete(load)
        ledger.end(made)
    found = ledger.stats()
    assert (found.warmed, found.recalled) == (2, 2)
    assert (found.prefetched, found.useful, found.late) == (0, 0, 0), "it was no prediction"


def test_a_warm_up_that_yields_is_cancelled_when_a_demand_is_starved() -> None:
    ledger, pool = ledger_of(2)  # shared by three blocks
    ledger.loads.warm(pool, [ExpertKey(1, 0)])
    load = ledger.loads.take()
    assert load is not None
    assert ledger.loads.continue_or_cancel(load)
    demand(ledger, pool, 3, 0)
    assert ledger.loads.continue_or_cancel(load) is None
    starved = demand(ledger, pool, 4, 0)
    assert list(pool.starved) == [starved]
    arrive_all(ledger)
    assert ledger.loads.continue_or_cancel(load) is False
    ledger.loads.warm(pool, [ExpertKey(1, 1)])
    assert ledger.loads.take() is None, "the slot is for the demand that is starved"
    ledger.next_leases(starved)
    assert starved.loads


def test_a_pool_with_room_for_all_is_filled_once_half_of_it_is_taken() -> None:
    ledger, pool = ledger_of(12, ahead=9, loads_rest=True)
    first = demand(ledger, pool, 1, 0, 1, 2)
    arrive_all(ledger)
    second = demand(ledger, pool, 3, 0, 1)
    arrive_all(ledger)
    assert pool.counts().ready == 5, "and nothing more, as long as so little is used"
    third = demand(ledger, pool, 4, 3, 0)
    assert [read_next(ledger) for _ in range(8)] == [(4, 3), (4, 0), (1, 3), (3, 2), (3, 3), (4, 1), (4, 2), None]
    found = ledger.stats()
    assert (pool.counts().ready, found.misses, found.warmed, found.evictions) == (12, 7, 5, 0)
    for made in (first, second, third):
        ledger.end(made)
    check_ledger(ledger)


@pytest.mark.parametrize(("count", "loads_rest"), [(11, True), (12, False)])
def test_a_pool_is_not_filled_without_room_for_all_or_if_records_are_far_away(count: int, loads_rest: bool) -> None:
    ledger, pool = ledger_of(count, ahead=9, loads_rest=loads_rest)
    for block in (1, 3, 4):
        made = demand(ledger, pool, block, 0, 1, 2)
        arrive_all(ledger)
        ledger.end(made)
    assert (pool.counts().ready, ledger.stats().warmed) == (9, 0)
