"""Prefetches, copies for the tier above and the warm-up, with the threads of a host tier."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from host_tiers import PLAN, RECORDS, SMALLEST, take
from integrity import check_integrity
from readers import PATIENCE, GatedReader, RamReader
from stores import keys
from threads import Task, sleeps, wait_until
from tier_states import is_closed

from moetier.tiers.errors import ClosedError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.host.warmup import HotSet
from moetier.tiers.layout import ExpertKey


@pytest.fixture
def gate() -> Iterator[GatedReader]:
    reader = GatedReader(PLAN, RECORDS)
    yield reader
    reader.open()


def test_a_prefetch_is_there_when_the_demand_comes() -> None:
    with HostTier(RamReader(PLAN, RECORDS), slots={"records": 6}) as tier:
        tier.prefetch(1, keys(1, 2, 3))
        wait_until(lambda: tier.stats().ready == 2)
        assert set(take(tier, 1, 2, 3)) == set(keys(1, 2, 3))
        stats = tier.stats()
        assert (stats.hits, stats.misses, stats.prefetched) == (2, 0, 2)


def test_a_demand_joins_a_prefetch_that_is_being_read(gate: GatedReader) -> None:
    with HostTier(gate, slots={"records": 6}) as tier:
        tier.prefetch(0, keys(0, 2))
        gate.wait_begun(ExpertKey(0, 2))
        task = Task(lambda: take(tier, 0, 2))
        wait_until(lambda: tier.stats().misses == 1)
        gate.open()
        assert task.result() == keys(0, 2)
        assert gate.reads[ExpertKey(0, 2)] == 1
        assert tier.stats().joined == 1


def test_a_demand_comes_before_prefetches_and_finds_a_loader(gate: GatedReader) -> None:
    with HostTier(gate, slots={"records": 12}, loaders=2) as tier:
        tier.prefetch(0, keys(0, 0, 1, 2, 3))
        gate.wait_begun(ExpertKey(0, 0))
        task = Task(lambda: take(tier, 1, 0))
        gate.wait_begun(ExpertKey(1, 0))
        assert gate.begun == [*keys(0, 0), *keys(1, 0)], "one of two loaders is kept for demands"
        gate.release(ExpertKey(1, 0))
        task.result()
        gate.open()
        wait_until(lambda: tier.stats().prefetched == 4)


def test_new_prefetches_replace_those_not_begun_and_a_demand_clears_them(gate: GatedReader) -> None:
    with HostTier(gate, slots={"records": 12}, loaders=1) as tier:
        tier.prefetch(0, keys(0, 0, 1))
        gate.wait_begun(ExpertKey(0, 0))
        tier.prefetch(0, keys(0, 2))
        tier.prefetch(1, keys(1, 0, 1))
        task = Task(lambda: take(tier, 1, 3))
        wait_until(lambda: tier.stats().misses == 1)
        gate.open()
        task.result()
        wait_until(lambda: tier.stats().prefetched == 2)
        take(tier, 2, 0)  # one loader: whatever was left to read has been read by now
        assert set(gate.reads) == {ExpertKey(0, 0), ExpertKey(0, 2), ExpertKey(1, 3), ExpertKey(2, 0)}


def test_a_prefetch_evicts_neither_what_is_held_nor_what_is_requested_nor_other_blocks() -> None:
    with HostTier(RamReader(PLAN, RECORDS), slots={"records": 6}) as tier:
        for block in range(3):
            take(tier, block, 0, 1)
        held = tier.acquire(keys(0, 0))
        next(held)
        tier.prefetch(0, keys(0, 1, 2, 3))  # the block's two slots: one is held, the other is requested
        take(tier, 1, 0, 1)
        take(tier, 2, 0, 1)
        assert tier.stats().prefetched == 0
        tier.prefetch(0, keys(0, 3))
        wait_until(lambda: tier.stats().prefetched == 1)
        held.close()
        hits = tier.stats().hits
        for block, experts in ((0, (0, 3)), (1, (0, 1)), (2, (0, 1))):
            wait_until(lambda: tier.stats().ready == 6)
            take(tier, block, *experts)
        assert tier.stats().hits == hits + 6


@contextlib.contextmanager
def standing_back(gate: GatedReader) -> Iterator[tuple[HostTier, Task[list[ExpertKey]]]]:
    """A tier, and its demand for a record that is being read; a prefetch of another could go on, but for that."""
    with HostTier(gate, slots={"records": 12}, loaders=2) as tier:
        tier.prefetch(0, keys(0, 0))
        gate.wait_begun(*keys(0, 0))
        task = Task(lambda: take(tier, 1, 0))
        gate.wait_begun(*keys(1, 0))
        gate.release(ExpertKey(0, 0))
        yield tier, task


def test_a_prefetch_that_is_being_read_yields_while_demands_are(gate: GatedReader) -> None:
    with standing_back(gate) as (_, task):
        time.sleep(0.05)
        assert not gate.reads, "it could go on, but for the demand"
        gate.release(ExpertKey(1, 0))
        task.result()
        wait_until(lambda: gate.reads[ExpertKey(0, 0)] == 1)


def test_a_prefetch_that_yields_goes_on_when_a_demand_joins_it(gate: GatedReader) -> None:
    with standing_back(gate) as (tier, task):
        time.sleep(0.05)
        assert take(tier, 0, 0) == keys(0, 0)
        gate.open()
        task.result()


def test_a_prefetch_that_yields_is_cancelled_when_its_block_wants_others(gate: GatedReader) -> None:
    with HostTier(gate, slots={"records": 12}, loaders=2) as tier:
        tier.prefetch(0, keys(0, 0))
        gate.wait_begun(*keys(0, 0))
        task = Task(lambda: take(tier, 0, 1))
        gate.wait_begun(*keys(0, 1))
        gate.open()
        task.result()
        wait_until(lambda: tier.stats().cancelled == 1)
        assert set(gate.reads) == {ExpertKey(0, 1)}
        check_integrity(tier)
        assert tier.absent(keys(0, 0, 1)) == keys(0, 0)
        assert take(tier, 0, 0, 1) == keys(0, 1, 0)


def loaders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("moetier-loader")]


def test_a_demand_joins_a_yielding_prefetch_that_another_demand_joined_and_left(gate: GatedReader) -> None:
    """The other one leaves before the loader, which it has woken, looks whether there is a demand."""
    with standing_back(gate) as (tier, task), contextlib.closing(tier.session(lambda event: None)) as session:
        wait_until(lambda: sleeps(task.thread) and any(sleeps(thread) for thread in loaders()))
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1000.0)  # no other thread runs until this one waits
        try:
            session.acquire(1, keys(0, 0))
            session.end(1)
        finally:
            sys.setswitchinterval(interval)
        time.sleep(0.02)  # until the loader has looked
        second = Task(lambda: take(tier, 0, 0))
        try:
            assert second.result(PATIENCE / 6) == keys(0, 0)
        finally:
            gate.open()
        task.result()


def test_a_demand_for_a_prefetch_that_is_being_cancelled_is_read() -> None:
    ending, join = threading.Event(), threading.Event()

    class Reader(GatedReader):
        def read_into(self, key: ExpertKey, buffer: memoryview, pause: Callable[[], bool] | None = None) -> None:
            try:
                super().read_into(key, buffer, pause)
            except BaseException:  # the loader has found that it is unwanted
                ending.set()
                assert join.wait(PATIENCE)
                raise

    gate = Reader(PLAN, RECORDS)
    with HostTier(gate, slots={"records": 12}, loaders=2) as tier:
        tier.prefetch(0, keys(0, 0))
        gate.wait_begun(*keys(0, 0))
        tier.prefetch(0, [])
        gate.open()
        assert ending.wait(PATIENCE)
        task = Task(lambda: take(tier, 0, 0))
        wait_until(lambda: tier.stats().misses == 1)
        join.set()
        assert task.result(PATIENCE / 6) == keys(0, 0)


def test_what_is_being_read_is_absent_and_not_lent(gate: GatedReader) -> None:
    with HostTier(gate, slots={"records": 12}, loaders=2) as tier:
        tier.prefetch(0, keys(0, 0))
        gate.wait_begun(*keys(0, 0))
        assert tier.absent(keys(0, 0, 1)) == keys(0, 0, 1)
        with tier.pin(ExpertKey(0, 0)) as lease:
            assert lease is None
        tier.prefetch(0, [])
        gate.open()
        wait_until(lambda: tier.stats().cancelled == 1)


def test_a_loan_takes_no_prefetches_away(gate: GatedReader) -> None:
    gate.release(ExpertKey(0, 3))
    with HostTier(gate, slots={"records": 12}, loaders=1) as tier:
        take(tier, 0, 3)
        task = Task(lambda: take(tier, 1, 0))
        gate.wait_begun(*keys(1, 0))  # by the only loader
        tier.prefetch(0, keys(0, 0, 1))
        with tier.pin(ExpertKey(0, 3)) as lease:
            assert lease is not None
        gate.open()
        task.result()
        wait_until(lambda: tier.stats().prefetched == 2)
        assert tier.stats().cancelled == 0


def test_nothing_is_lent_while_a_demand_finds_no_slot() -> None:
    with HostTier(RamReader(PLAN, RECORDS), slots=SMALLEST) as tier:
        first, second = (tier.acquire(keys(0, expert)) for expert in (0, 1))
        held = [next(first), next(second)]
        with tier.pin(ExpertKey(0, 0)) as lease:
            assert lease is not None
            assert lease.record is held[0].record
            assert lease.slot == held[0].slot
        task = Task(lambda: take(tier, 1, 0))
        wait_until(lambda: sleeps(task.thread))
        with tier.pin(ExpertKey(0, 0)) as lease:
            assert lease is None
        first.close()
        task.result()
        second.close()
        check_integrity(tier)


def test_closing_ends_what_stands_back(gate: GatedReader) -> None:
    with standing_back(gate) as (tier, task):
        closing = Task(tier.close)
        with pytest.raises(ClosedError):
            task.result()
        gate.open()
        closing.result()


@pytest.mark.parametrize("loaders", [1, 2])
def test_a_warm_up_ends_with_the_tier(gate: GatedReader, loaders: int) -> None:
    tier = HostTier(gate, slots={"records": 12}, loaders=loaders)
    tier.warm(HotSet(dict.fromkeys(RECORDS, 1.0)).hottest)
    gate.wait_begun(*keys(0, 0))
    closing = Task(tier.close)
    wait_until(lambda: is_closed(tier))
    gate.open()
    closing.result()
    assert len(gate.reads) <= 1
    with pytest.raises(ClosedError):
        tier.warm(HotSet().hottest)


def test_a_warm_up_reads_nothing_twice_and_evicts_nothing() -> None:
    reader = RamReader(PLAN, RECORDS)
    with HostTier(reader, slots={"records": 6}) as tier:
        take(tier, 0, 3)
        hot = HotSet({ExpertKey(b, e): e + 1.0 for b in range(3) for e in range(4)})
        tier.warm(hot.hottest)
        wait_until(lambda: tier.stats().ready == 6)
        tier.warm(hot.hottest)
        assert tier.absent(list(RECORDS)) == [ExpertKey(b, e) for b in range(3) for e in (0, 1)], "each block's hottest"
        assert set(reader.reads.values()) == {1}
        stats = tier.stats()
        assert (stats.evictions, stats.warmed, stats.recalled, stats.prefetched) == (0, 5, 0, 0)
        take(tier, 1, 3, 0)
        assert tier.stats().recalled == 1


def test_a_prefetch_that_cannot_be_read_affects_no_demand() -> None:
    reader = RamReader(PLAN, RECORDS)
    reader.broken.add(ExpertKey(0, 0))
    with HostTier(reader, slots={"records": 6}) as tier:
        tier.prefetch(0, keys(0, 0))
        wait_until(lambda: tier.stats().failures == 1)
        check_integrity(tier)
        reader.broken.clear()
        assert take(tier, 0, 0) == keys(0, 0)
