from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import keys

from moetier.tiers.cache.budget import Partition
from moetier.tiers.cache.policies import POLICIES
from moetier.tiers.host.demands import AsyncCaller, Demand, Pool, ThreadCaller
from moetier.tiers.host.prefetch import PrefetchQueue
from moetier.tiers.layout import ExpertKey, PoolSlot
from moetier.tiers.stats import TierCounters

CALLERS = tuple(AsyncCaller(lambda event: None, 1) for _ in range(3))
FIRST, SECOND, THIRD = CALLERS


def make_pool() -> Pool:
    """More slots for each block than it has experts."""
    return Pool([Partition((block,), 20) for block in range(10)], POLICIES["lru"], first=0, slot_bytes=1)


class Queue:
    """A prefetch queue whose records are begun and never arrive in a slot, so that each has a place."""

    def __init__(self) -> None:
        self.counters = TierCounters("host")
        self.queue = PrefetchQueue(self.counters, time.monotonic)
        self.pool = make_pool()

    def request(self, caller: AsyncCaller, block: int, wanted: list[ExpertKey], pool: Pool | None = None) -> int:
        """Returns how many requests were dropped."""
        before = self.counters.snapshot().dropped
        self.queue.replace(pool or self.pool, block, wanted, caller)
        return self.counters.snapshot().dropped - before

    def cancel(self, caller: AsyncCaller) -> int:
        before = self.counters.snapshot().dropped
        self.queue.cancel(caller)
        return self.counters.snapshot().dropped - before

    def take(self, count: int = 100) -> list[ExpertKey]:
        found: list[ExpertKey] = []
        while len(found) < count and (read := self.queue.next_read()) is not None:
            found.append(read.key)
        return found


def test_a_callers_blocks_come_in_their_order_and_callers_by_turns() -> None:
    queue = Queue()
    queue.request(FIRST, 1, keys(1, 5, 6))
    queue.request(FIRST, 2, keys(2, 7))
    queue.request(SECOND, 3, keys(3, 8, 9))
    assert queue.take() == [*keys(1, 5), *keys(3, 8), *keys(1, 6), *keys(3, 9), *keys(2, 7)]
    assert not queue.queue.unbegun


def test_a_caller_is_known_by_its_latest_requests() -> None:
    queue = Queue()
    assert queue.request(FIRST, 1, keys(1, 5, 6, 7)) == 0
    assert queue.take(1) == keys(1, 5)
    assert queue.request(FIRST, 1, keys(1, 7, 8)) == 1, "only the 6 was waiting and is not requested any more"
    assert queue.take() == keys(1, 7, 8)
    assert all(map(queue.queue.is_requested, keys(1, 7, 8))), "until they are replaced"
    assert not any(map(queue.queue.is_requested, keys(1, 5, 6)))
    assert queue.request(FIRST, 1, []) == 0
    assert not any(map(queue.queue.is_requested, keys(1, 7, 8)))


def test_requests_wait_while_a_demand_of_their_pool_is_starved() -> None:
    queue, other = Queue(), make_pool()
    queue.request(FIRST, 1, keys(1, 5))
    queue.request(FIRST, 2, keys(2, 6), other)
    queue.pool.starved.append(Demand(queue.pool, 0, ThreadCaller(0)))
    assert queue.take() == keys(2, 6)
    assert queue.queue.unbegun == 1
    queue.pool.starved.clear()
    assert queue.take() == keys(1, 5)


def test_a_request_for_more_than_the_block_keeps_takes_scanned_records_of_all_blocks_and_then_none() -> None:
    queue = Queue()
    queue.pool = Pool([Partition((block,), 3) for block in range(2)], POLICIES["scan"], first=0, slot_bytes=1)
    held = [*keys(0, 0, 1, 2), *keys(1, 0, 1, 2)]
    for key in held:  # expert 2 of each block was loaded by a scan
        slot = queue.pool.choose(key.block)
        assert slot is not None
        queue.pool.begin_fill(slot, key, is_scan=key.expert == 2)
        queue.pool.complete_fill(slot)
    queue.request(FIRST, 1, keys(1, 0, 1, 2, 3, 4, 5))
    assert queue.counters.snapshot().dropped == 0
    read = queue.queue.next_read()
    assert read is not None
    assert (read.key, queue.pool.key(read.slot), read.is_scan) == (ExpertKey(1, 3), ExpertKey(0, 2), True)
    queue.pool.begin_fill(read.slot, read.key, is_scan=True, is_prefetch=True)
    assert queue.queue.next_read() is None, "the other records are in use, or will be"
    assert queue.counters.snapshot().dropped == 2


def test_requests_of_a_scan_stay_those_of_a_scan_until_there_are_none() -> None:
    queue = Queue()
    queue.pool = Pool([Partition((block,), 2) for block in range(2)], POLICIES["scan"], first=0, slot_bytes=1)
    queue.request(FIRST, 1, keys(1, 0, 1, 2))
    queue.request(FIRST, 1, keys(1, 2))
    read = queue.queue.next_read()
    assert read is not None
    assert read.is_scan, "few of its records are left"
    queue.request(FIRST, 1, [])
    queue.request(FIRST, 1, keys(1, 1))
    read = queue.queue.next_read()
    assert read is not None
    assert not read.is_scan
    queue.queue.begin_scan(queue.pool, 1, FIRST)
    queue.request(FIRST, 1, keys(1, 0))
    read = queue.queue.next_read()
    assert read is not None
    assert read.is_scan, "its demand is a scan"


def test_a_prediction_does_not_wait_for_the_requests_of_a_scan() -> None:
    queue = Queue()
    queue.request(FIRST, 1, keys(1, *range(21)))
    queue.request(FIRST, 2, keys(2, 5))
    assert queue.take(1) == keys(2, 5)


@pytest.mark.parametrize("policy", ["scan", "lrfu"])
def test_long_prompts_one_after_the_other_evict_no_more_than_the_first(policy: str) -> None:
    """Each block's experts are requested, then demanded one by one, as a prompt does it."""
    queue, experts, quota = Queue(), 32, 16
    queue.pool = pool = Pool([Partition((b,), quota) for b in range(4)], POLICIES[policy], first=0, slot_bytes=1)
    hot = [ExpertKey(block, expert) for block in range(4) for expert in range(0, experts, 2)]

    def load(key: ExpertKey, *, is_scan: bool, slot: PoolSlot | None, is_prefetch: bool = False) -> None:
        assert slot is not None
        pool.begin_fill(slot, key, is_scan=is_scan, is_prefetch=is_prefetch)
        pool.complete_fill(slot)

    def prefetch() -> None:
        while (read := queue.queue.next_read()) is not None:
            load(read.key, is_scan=read.is_scan, slot=read.slot, is_prefetch=True)

    for key in hot:
        load(key, is_scan=False, slot=pool.choose(key.block))
        pool.partitions.touch([key])
    kept = []
    for _ in range(3):
        for block in range(4):
            for expert in range(experts):
                queue.queue.begin_scan(pool, block, FIRST)
                left = [ExpertKey(block, each) for each in range(expert, experts)]
                here = [key for key in left if pool.slot_of(key) is not None]
                queue.request(FIRST, block, [*[key for key in left if key not in here][:6], *here])
                prefetch()
                if pool.slot_of(left[0]) is None:
                    load(left[0], is_scan=True, slot=pool.choose(block, is_scan=True, keep=queue.queue.is_requested))
            queue.request(FIRST, block, [])
            queue.request(
                FIRST, block + 1, [ExpertKey(block + 1, each) for each in range(experts)] if block < 3 else []
            )
            prefetch()
        kept.append(sum(pool.slot_of(key) is not None for key in hot))
    assert kept[0] >= len(hot) * 7 // 8
    assert kept[2] == kept[0]


class Counting(ExpertKey):
    """A key that counts how often any is compared."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        Counting.compared += 1
        return tuple.__eq__(self, other)

    __hash__ = ExpertKey.__hash__


def test_many_requests_are_replaced_in_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counting, "compared", 0)
    queue = Queue()
    queue.pool = Pool([Partition((1,), 4000)], POLICIES["lru"], first=0, slot_bytes=1)
    wanted: list[ExpertKey] = [Counting(1, expert) for expert in range(3000)]
    queue.request(FIRST, 1, wanted[:2000])
    assert queue.request(FIRST, 1, wanted[1000:]) == 1000
    assert Counting.compared < 20_000, "not each with each"


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("request"), st.integers(0, 2), st.integers(0, 2), st.lists(st.integers(0, 4))),
        st.tuples(st.just("cancel"), st.integers(0, 2), st.just(0), st.just([])),
        st.tuples(st.just("take"), st.just(0), st.just(0), st.just([])),
    ),
    max_size=40,
)


@given(ACTIONS)
def test_nothing_is_lost_and_nothing_comes_twice(actions: list[tuple[str, int, int, list[int]]]) -> None:
    queue = Queue()
    for block in range(3):  # expert 0 has a slot
        queue.pool.begin_fill(block, ExpertKey(block, 0))
    waiting: dict[tuple[int, int], list[ExpertKey]] = {}
    latest: dict[tuple[int, int], list[ExpertKey]] = {}
    for action, caller, block, experts in actions:
        if action == "request":
            wanted = list(dict.fromkeys(keys(block, *experts)))
            before = waiting.get((caller, block), [])
            assert queue.request(CALLERS[caller], block, wanted) == len(set(before) - set(wanted))
            latest[caller, block] = wanted
            waiting[caller, block] = [key for key in wanted if key.expert]
        elif action == "cancel":
            assert queue.cancel(CALLERS[caller]) == sum(len(found) for of, found in waiting.items() if of[0] == caller)
            waiting = {of: found for of, found in waiting.items() if of[0] != caller}
            latest = {of: found for of, found in latest.items() if of[0] != caller}
        elif taken := queue.take(1):
            firsts = [found for found in waiting.values() if found[:1] == taken]
            assert firsts
            firsts[0].pop(0)
            if len(firsts) > 1:  # the same of several callers: it was taken for any of them
                return
        assert queue.queue.unbegun == sum(map(len, waiting.values()))
        every = {key for found in latest.values() for key in found}
        assert all(
            queue.queue.is_requested(ExpertKey(b, e)) == (ExpertKey(b, e) in every) for b in range(3) for e in range(5)
        )
    assert sorted(queue.take()) == sorted(key for found in waiting.values() for key in found)
