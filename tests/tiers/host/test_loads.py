"""Loads of records: which one a loader reads next, and how a load ends."""

from __future__ import annotations

import time

import pytest
from integrity import check_loads
from stores import keys, layout_of, make_plan

from moetier.tiers.arena.directory import Directory
from moetier.tiers.arena.layout import ArenaLayout
from moetier.tiers.cache.budget import partitions_of
from moetier.tiers.cache.policies import POLICIES
from moetier.tiers.cache.pool import SlotState
from moetier.tiers.errors import ClosedError, StoreReadError
from moetier.tiers.host.demands import Demand, Load, Pool, Purpose, ThreadCaller
from moetier.tiers.host.loads import FairQueue, LoadLimits, Loads
from moetier.tiers.host.prefetch import PrefetchQueue
from moetier.tiers.host.waiting import Notifier, WaitingDemands
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import Monitor
from moetier.tiers.stats import TierCounters

MANIFEST = make_plan(blocks=2, experts=4)
ERROR = StoreReadError("The disk has failed.", "Replace it.")
A, B, C, D = keys(0, 0, 1, 2, 3)


class Tier:
    """The parts of a host tier that loads belong to, with 8 slots and without a thread."""

    def __init__(self, prefetches: int = 1, *, loads_rest: bool = False) -> None:
        layout = ArenaLayout.of(MANIFEST, {"records": 8})
        notifier = Notifier(Monitor())
        self.pool = Pool(
            partitions_of(8, MANIFEST.members["records"]),
            POLICIES["lru"],
            first=0,
            slot_bytes=layout.regions[0].slot_bytes,
        )
        self.directory = Directory.create(memoryview(bytearray(layout.directory_bytes)), layout)
        self.counters = TierCounters("host")
        self.prefetches = PrefetchQueue(self.counters, time.monotonic)
        waiting = WaitingDemands(notifier, time.monotonic)
        rest = {self.pool: MANIFEST.members["records"]} if loads_rest else {}
        limits = LoadLimits(8, prefetches)
        self.loads = Loads(self.directory, self.counters, self.prefetches, waiting, notifier, limits, rest)

    def demand(self, *wanted: ExpertKey, caller: int = 0) -> Demand:
        """A demand that waits for the loads of ``wanted``, which it begins if there are none."""
        demand = Demand(self.pool, wanted[0].block, ThreadCaller(caller))
        for key in wanted:
            if key in [load.key for load in self.loads]:
                self.loads.join(demand, key)
            else:
                assert self.loads.begin_for(demand, key)
        check_loads(self.loads)
        return demand

    def take(self) -> Load:
        load = self.loads.take()
        assert load is not None
        return load

    def leave(self, demand: Demand) -> None:
        """End the demand's waits, as the ledger does."""
        for load in list(demand.loads):
            demand.loads.remove(load)
            self.pool.unpin(load.slot)
            self.loads.withdraw(demand, load)
        check_loads(self.loads)


def test_callers_are_served_in_turn_and_each_load_once() -> None:
    tier = Tier()
    tier.demand(A, B, C, caller=1)
    tier.demand(D, C, caller=2)
    assert [tier.take().key for _ in range(4)] == [D, A, C, B], "the caller that came last was served longest ago"
    assert tier.loads.take() is None


def test_a_caller_that_did_not_wait_comes_first() -> None:
    pool = Tier().pool
    queue = FairQueue()
    first, second, third = (Load(pool, key, 0) for key in (A, B, C))
    queue.add("busy", first)
    assert queue.pop() is first
    queue.add("busy", second)
    queue.add("new", third)
    assert queue.pop() is third
    assert queue.pop() is second
    queue.add("busy", first)
    queue.clear()
    assert queue.pop() is None


def test_a_complete_load_is_ready_for_all_who_wait_and_in_the_directory() -> None:
    tier = Tier()
    first, second = tier.demand(A, caller=1), tier.demand(A, caller=2)
    load = tier.take()
    assert tier.directory.find(A) is None
    tier.loads.complete(load, 0.25)
    assert list(first.ready) == list(second.ready) == [load.slot]
    assert not first.loads
    assert not [*tier.loads]
    found = tier.directory.find(A)
    assert found is not None
    assert found[0] == load.slot
    assert tier.pool.state_of(A) is SlotState.READY
    assert (tier.counters.snapshot().bytes_in, tier.counters.snapshot().load_seconds) == (tier.pool.slot_bytes, 0.25)


def test_a_failed_load_tells_all_who_wait_and_the_record_can_be_read_again() -> None:
    tier = Tier()
    first, second = tier.demand(A, caller=1), tier.demand(A, B, caller=2)
    load = tier.take()
    tier.loads.fail(load, ERROR)
    tier.loads.fail(load, ERROR)
    assert repr(first.error) == repr(second.error) == repr(ERROR)
    assert first.error is not second.error, "each thread raises an error of its own"
    assert [waited.key for waited in second.loads] == [B]
    assert tier.counters.snapshot().failures == 1
    assert tier.pool.slot_of(A) is None
    tier.loads.complete(tier.take())
    tier.demand(A)
    assert tier.take().key == A


def test_a_load_is_cancelled_with_its_last_demand_unless_it_was_taken() -> None:
    tier = Tier()
    first, second = tier.demand(A), tier.demand(A, caller=1)
    tier.leave(first)
    assert [load.key for load in tier.loads] == [A]
    tier.leave(second)
    assert not [*tier.loads]
    assert tier.pool.slot_of(A) is None
    assert tier.loads.take() is None
    third = tier.demand(B)
    load = tier.take()
    tier.leave(third)
    tier.loads.complete(load)
    assert tier.pool.state_of(B) is SlotState.READY


def test_prefetches_are_read_while_no_demand_is_and_no_more_than_allowed() -> None:
    tier = Tier(prefetches=2)
    tier.prefetches.replace(tier.pool, 0, [A, B, C], None)
    demand = tier.demand(D)
    assert tier.take().key == D
    assert tier.loads.take() is None, "a record is being read for a demand"
    tier.leave(demand)
    for load in list(tier.loads):
        tier.loads.complete(load)
    assert [tier.take().key, tier.take().key] == [A, B]
    assert tier.loads.take() is None, "two are being read"


def test_the_read_of_a_prefetch_yields_to_demands_goes_on_for_one_and_ends_unwanted() -> None:
    tier = Tier()
    tier.prefetches.replace(tier.pool, 0, [A], None)
    load = tier.take()
    assert tier.loads.continue_or_cancel(load) is True
    other = tier.demand(B)
    assert tier.loads.continue_or_cancel(load) is None
    joined = tier.demand(A)
    assert tier.loads.continue_or_cancel(load) is True
    tier.leave(joined)
    tier.leave(other)
    assert tier.loads.continue_or_cancel(load) is True
    tier.prefetches.replace(tier.pool, 0, [], None)
    assert tier.loads.continue_or_cancel(load) is False
    assert (tier.counters.snapshot().late, tier.counters.snapshot().cancelled) == (1, 0), (
        "each prefetch has one outcome"
    )
    assert tier.pool.slot_of(A) is None


def test_a_pool_with_room_for_all_is_filled_once_half_was_read() -> None:
    tier = Tier(loads_rest=True)
    for key in (A, B, C):
        tier.demand(key)
        tier.loads.complete(tier.take())
    assert tier.loads.take() is None
    tier.demand(D)
    tier.loads.complete(tier.take())
    for key in keys(1, 0, 1, 2, 3):
        load = tier.take()
        assert (load.key, load.purpose) == (key, Purpose.WARMUP)
        tier.loads.complete(load)
    assert tier.counters.snapshot().warmed == 4
    assert tier.loads.take() is None


def test_closing_fails_what_was_not_begun_and_lets_reads_end() -> None:
    tier = Tier()
    demand = tier.demand(A, B)
    tier.prefetches.replace(tier.pool, 1, keys(1, 0), None)
    load = tier.take()
    error = ClosedError("It was closed.", "Open it again.")
    tier.loads.close(error)
    assert repr(demand.error) == repr(error)
    assert [waiting.key for waiting in tier.loads] == [A]
    tier.loads.complete(load)
    assert tier.loads.take() is None
    assert tier.counters.snapshot().failures == 0, "closing is no failure of a read"


@pytest.mark.parametrize(("columns", "prefetches"), [(32, 1), (1 << 16, 3)], ids=["small", "in pieces"])
def test_prefetches_leave_a_loader_to_demands_or_are_one_at_a_time(columns: int, prefetches: int) -> None:
    layout = ArenaLayout.of(make_plan(layout=layout_of(64, columns)), {"records": 4})
    assert LoadLimits.of(4, layout) == LoadLimits(ahead=8, prefetches=prefetches)
