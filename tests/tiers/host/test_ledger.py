"""The ledger: leases, loads and evictions for demands, one transition after the other."""

from __future__ import annotations

from cuts import cut
from integrity import check_ledger
from ledgers import arrive_all, demand, ledger_of

from moetier.tiers.layout import ExpertKey


def test_no_more_than_ahead_is_in_flight() -> None:
    ledger, pool = ledger_of(12, ahead=3)
    caller = demand(ledger, pool, 1, 0, 1, 2, 3)
    assert len(caller.loads) == 3
    arrive_all(ledger)
    ledger.next_leases(caller)
    assert len(caller.loads) == 1


def test_what_is_given_first_is_evicted_last() -> None:
    ledger, pool = ledger_of(6)
    for experts in ((0, 1), (2, 3)):
        caller = demand(ledger, pool, 1, *experts)
        arrive_all(ledger)
        ledger.end(caller)
    caller = demand(ledger, pool, 1, 2, 3)
    ledger.end(caller)
    demand(ledger, pool, 1, 0)
    assert pool.slot_of(ExpertKey(1, 2)) is not None
    assert pool.slot_of(ExpertKey(1, 3)) is None


def test_what_a_loader_has_begun_goes_on_when_its_caller_is_gone_and_no_more() -> None:
    ledger, pool = ledger_of(3)
    caller, other = demand(ledger, pool, 1, 0, 1, 2), demand(ledger, pool, 1, 2)
    begun = ledger.loads.take()
    assert begun is not None
    assert begun.key == ExpertKey(1, 0)
    ledger.end(caller)
    check_ledger(ledger)
    assert pool.slot_of(ExpertKey(1, 1)) is None
    wanted = ledger.loads.take()
    assert wanted is not None
    assert wanted.key == ExpertKey(1, 2), "somebody else wants it"
    assert ledger.loads.take() is None
    ledger.loads.complete(begun)
    ledger.loads.complete(wanted)
    slot = pool.slot_of(ExpertKey(1, 0))
    assert slot is not None
    assert pool.is_evictable(slot)
    assert list(other.ready) == [pool.slot_of(ExpertKey(1, 2))]


def test_a_record_whose_arrival_was_cut_is_looked_for_again() -> None:
    number = 0
    while True:
        ledger, pool = ledger_of(6)
        caller = demand(ledger, pool, 1, 0)
        load = ledger.loads.take()
        assert load is not None
        is_cut = cut(lambda: ledger.loads.complete(load), number) is not None  # noqa: B023
        if not is_cut:
            break
        ledger.repair()
        check_ledger(ledger)
        number += 1
        if load in list(ledger.loads):  # it counts as being read still
            continue
        slots, is_last = ledger.next_leases(caller) or ([], False)
        if not slots:
            arrive_all(ledger)
            slots, is_last = ledger.next_leases(caller) or ([], False)
        assert ([pool.key(slot) for slot in slots], is_last) == ([ExpertKey(1, 0)], True), number
    assert number > 5


def test_evictions_are_counted() -> None:
    ledger, pool = ledger_of(2)
    for expert in (0, 1, 2, 3, 3):
        caller = demand(ledger, pool, 1, expert)
        arrive_all(ledger)
        ledger.end(caller)
    assert ledger.stats().evictions == 2
    assert (ledger.stats().hits, ledger.stats().misses) == (1, 4)


def test_uses_are_counted_of_demands_and_of_what_clients_found() -> None:
    ledger, pool = ledger_of(6)
    ledger.end(demand(ledger, pool, 1, 3))
    demand(ledger, pool, 1, 0, 1, 0)
    ledger.uses.note_client([ExpertKey(1, 0)])
    ledger.uses.note_copies([ExpertKey(0, 2)])
    assert ledger.uses.counts() == {(1, 3): 1, (1, 0): 2, (1, 1): 1, (0, 2): 1}
