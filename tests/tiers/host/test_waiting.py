"""Demands that wait for slots: their order, and when they are woken."""

from __future__ import annotations

import weakref

from ledgers import arrive_all, demand, ledger_of
from stores import layout_of, make_plan

from moetier.tiers.arena.directory import Directory
from moetier.tiers.arena.layout import ArenaLayout
from moetier.tiers.host.demands import AsyncCaller, Demand, ThreadCaller
from moetier.tiers.host.ledger import Ledger
from moetier.tiers.host.loads import LoadLimits
from moetier.tiers.host.waiting import Notifier
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import Monitor


def test_starved_demands_are_served_in_order_before_all_other_reads() -> None:
    ledger, pool = ledger_of(2)
    greedy = demand(ledger, pool, 1, 0, 1, 2, 3)
    first = demand(ledger, pool, 3, 0, 1)
    second = demand(ledger, pool, 4, 0)
    assert list(pool.starved) == [first, second]
    arrive_all(ledger)
    ledger.next_leases(greedy)
    ledger.next_leases(greedy)  # a slot is free, and it may not have it
    ledger.next_leases(second)
    assert not second.loads
    assert not greedy.loads
    ledger.next_leases(first)
    assert [load.key for load in first.loads] == [ExpertKey(3, 0)], "one, for another demand is starved"
    assert list(pool.starved) == [second]
    ledger.release(greedy)
    ledger.next_leases(first)
    ledger.next_leases(second)
    assert len(first.loads) == 1
    assert [load.key for load in second.loads] == [ExpertKey(4, 0)]
    assert not pool.starved


def test_when_the_first_of_the_starved_goes_the_next_is_woken() -> None:
    wakes = 0

    def woken() -> None:
        nonlocal wakes
        wakes += 1

    ledger, pool = ledger_of(2, woken=woken)
    holder = demand(ledger, pool, 1, 0, 1)
    arrive_all(ledger)
    first, second = demand(ledger, pool, 3, 0), demand(ledger, pool, 4, 0)
    ledger.end(holder)
    ledger.next_leases(second)
    assert not second.loads, "it was woken too, but is not the first"
    before = wakes
    ledger.end(first)
    assert wakes > before
    ledger.next_leases(second)
    assert second.loads


def test_a_caller_whose_blocks_slots_are_all_held_borrows_and_gives_back() -> None:
    ledger, pool = ledger_of(6)  # two for each of three blocks
    holder = demand(ledger, pool, 1, 0, 1)
    caller = demand(ledger, pool, 1, 2, 3)
    assert len(caller.loads) == 1, "one to get on with; more would be at the cost of other blocks"
    assert caller.pending
    arrive_all(ledger)
    for made in (holder, caller):
        ledger.end(made)
    for block in (3, 4):
        made = demand(ledger, pool, block, 0, 1)
        arrive_all(ledger)
        ledger.end(made)
    held = [ExpertKey(b, e) for b in (1, 3, 4) for e in range(4) if pool.slot_of(ExpertKey(b, e)) is not None]
    assert held == [(1, 0), (1, 2), (3, 0), (3, 1), (4, 0), (4, 1)], "each block is back to its two"


def test_callers_that_come_again_and_again_overtake_no_caller_for_ever() -> None:
    """However many wait: a caller that was served is behind them, also when it wanted nothing in between."""
    manifest = make_plan(blocks=1, experts=1000, layout=layout_of(32, 16))
    layout = ArenaLayout.of(manifest, {"records": 1000})
    directory = Directory.create(memoryview(bytearray(layout.directory_bytes)), layout)
    ledger = Ledger(
        manifest,
        layout,
        directory,
        Notifier(Monitor()),
        LoadLimits(ahead=4, prefetches=1),
        policy="lru",
        loads_rest=False,
    )
    pool = ledger.slots.pools["records"]
    experts = iter(range(1000))

    def ask(caller: ThreadCaller | AsyncCaller) -> None:
        ledger.begin(Demand(pool, 0, caller), [ExpertKey(0, next(experts))])

    def serve() -> ThreadCaller | AsyncCaller:
        load = ledger.loads.take()
        assert load is not None
        (demand,) = load.waiters
        ledger.loads.complete(load)
        ledger.end(demand)
        return demand.caller

    waiting = {ThreadCaller(number) for number in range(2, 202)}
    for caller in waiting:
        ask(caller)
    for step in range(len(waiting) + 2):
        ask(ThreadCaller(step % 2))
        waiting.discard(serve())
    assert not waiting
    while list(ledger.loads):
        serve()
    once = weakref.WeakSet[AsyncCaller]()
    for _ in range(100):
        caller = AsyncCaller(lambda event: None, max_leases=1)
        once.add(caller)
        ask(caller)
        assert serve() is caller
        ledger.end_caller(caller)
    del caller
    assert len(once) <= 2, "callers that come once are not kept"
