from __future__ import annotations

import contextlib
import gc
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from unittest.mock import Mock

import pytest
from host_tiers import PLAN, RECORDS, SMALLEST, take
from integrity import check_integrity
from places import HELPERS
from readers import PATIENCE, GatedReader, RamReader
from stores import keys, make_records
from threads import Task, run_all, sleeps, wait_until
from tier_states import held_lock
from two_layouts import two_layouts

from moetier.testing import in_fork
from moetier.tiers.cache.budget import slots_for, smallest_budget
from moetier.tiers.errors import ClosedError, MissingExpertError, StoreError, StoreReadError
from moetier.tiers.host.demands import Failed, SessionEvent
from moetier.tiers.host.loads import Loads
from moetier.tiers.host.tier import HostTier
from moetier.tiers.host.waiting import WaitingDemands
from moetier.tiers.host.warmup import HotSet
from moetier.tiers.layout import ExpertKey
from moetier.tiers.source import Lease


@pytest.fixture
def gate() -> Iterator[GatedReader]:
    reader = GatedReader(PLAN, RECORDS)
    yield reader
    reader.open()


# -- one caller --------------------------------------------------------------------------------------------------------


def test_arrivals_come_in_the_order_in_which_they_are_read(gate: GatedReader) -> None:
    with HostTier(gate, slots={"records": 12}) as tier:
        leases = tier.acquire(keys(0, 0, 1, 2))
        for expert in (2, 0, 1):
            gate.release(ExpertKey(0, expert))
            assert next(leases).key == ExpertKey(0, expert)
        assert next(leases, None) is None


def test_loads_begin_before_the_first_resident_is_yielded(gate: GatedReader) -> None:
    with HostTier(gate, slots={"records": 12}) as tier:
        gate.release(ExpertKey(0, 3))
        take(tier, 0, 3)
        leases = tier.acquire(keys(0, 0, 1, 2, 3))
        assert next(leases).key == ExpertKey(0, 3)
        gate.wait_begun(*keys(0, 0, 1, 2))
        gate.open()
        assert len(list(leases)) == 3


def test_a_lease_is_readable_read_only_and_numbered() -> None:
    with HostTier(RamReader(PLAN, RECORDS), slots={"records": 12}) as tier:
        first = [(lease.slot, lease.record) for lease in tier.acquire(keys(0, 0, 1))]
        again = [(lease.slot, lease.record) for lease in tier.acquire(keys(0, 0, 1))]
        assert sorted(slot for slot, _ in first) == sorted({slot for slot, _ in first})
        for slot, record in first:
            assert record.readonly
            assert len(record) == PLAN.layouts["records"].record_bytes
            assert any(record is same for other, same in again if other == slot), "who wraps a record knows it again"


def test_two_record_sizes() -> None:
    plan = two_layouts()
    records = make_records(plan)
    reader = RamReader(plan, records)
    for budget in (smallest_budget(plan), plan.stored_bytes):
        slots = slots_for(plan, budget)
        with HostTier(reader, slots=slots) as tier:
            numbers: dict[str, set[int]] = {"big": set(), "small": set()}
            for _ in range(2):
                for block, entry in enumerate(plan.blocks):
                    for lease in tier.acquire(keys(block, 0, 1, 2, 3)):
                        assert bytes(lease.record) == records[lease.key]
                        numbers[entry.array].add(lease.slot)
            assert not numbers["big"] & numbers["small"]
            stats = tier.stats()
            assert stats.slots == stats.ready == sum(slots.values())
            assert sum(stats.loads) == stats.misses >= 12
            assert (stats.load_seconds > 0, stats.leased) == (True, 0)
            assert stats.memory_bytes == sum(plan.layouts[name].slot_bytes * count for name, count in slots.items())
            check_integrity(tier)


def test_memory_that_cannot_be_had_leaves_nothing() -> None:
    """The arena is larger than the process may make files."""
    output = in_child(
        """
        import os, resource, threading
        from two_layouts import two_layouts
        from readers import RamReader
        from moetier.tiers.errors import BudgetError
        from moetier.tiers.host.tier import HostTier
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        before = os.listdir("/proc/self/fd")
        try:
            HostTier(RamReader(two_layouts(), {}), slots={"small": 2, "big": 3})
        except BudgetError as error:
            print(error.cause)
        assert os.listdir("/proc/self/fd") == before
        assert "memfd:moetier" not in open("/proc/self/maps").read()
        assert not [thread for thread in threading.enumerate() if "moetier" in thread.name]
        """
    )
    assert "122,880 bytes" in output, "a page, three big ones and two small ones"


def test_a_store_that_takes_no_listener_leaves_no_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = RamReader(PLAN, RECORDS)
    monkeypatch.setattr(RamReader, "on_fault", Mock(side_effect=OSError("lost")), raising=False)
    monkeypatch.setattr(RamReader, "is_local", False, raising=False)
    before = threading.active_count()
    with pytest.raises(OSError, match="lost"):
        HostTier(store, slots=SMALLEST)
    assert threading.active_count() == before


def test_a_tier_that_is_never_closed_does_not_keep_its_process() -> None:
    """Not even with a read under way that never ends."""
    output = in_child(
        """
        from readers import GatedReader
        from stores import make_plan
        from moetier.tiers.host.tier import HostTier
        from moetier.tiers.layout import ExpertKey
        reader = GatedReader(make_plan(), {})
        tier = HostTier(reader, slots={"records": 2})
        tier.prefetch(0, [ExpertKey(0, 0)])
        reader.wait_begun(ExpertKey(0, 0))
        print("end")
        """,
        timeout=PATIENCE / 2,  # the reader would give up after PATIENCE
    )
    assert output == "end\n"


def test_a_session_for_which_no_thread_is_to_be_had_leaves_the_tier_as_it_was() -> None:
    output = in_child(
        """
        import resource
        from queue import SimpleQueue
        from pathlib import Path
        from readers import RamReader
        from stores import make_plan, make_records
        from moetier.tiers.errors import ExhaustedError
        from moetier.tiers.host.tier import HostTier
        from moetier.tiers.layout import ExpertKey
        plan = make_plan()
        with HostTier(RamReader(plan, make_records(plan)), slots={"records": 2}) as tier:
            limits = resource.getrlimit(resource.RLIMIT_AS)
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20), limits[1]))  # a stack takes 8 MiB
            try:
                tier.session(print)
            except ExhaustedError as error:
                print(error.cause)
            resource.setrlimit(resource.RLIMIT_AS, limits)
            events = SimpleQueue()
            first, second = tier.session(events.put), tier.session(events.put, timeout=0.01)
            first.acquire(1, [ExpertKey(0, 0), ExpertKey(0, 1)])
            for _ in range(2):
                events.get(timeout=30)
            second.acquire(1, [ExpertKey(1, 0)])
            print(type(events.get(timeout=30).error).__name__)
        """
    )
    assert output == "The system gives no thread moetier-timekeeper: can't start new thread.\nExhaustedError\n"


def in_child(code: str, timeout: float = PATIENCE) -> str:
    helpers = str(HELPERS)
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([helpers, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return child.stdout


# -- several callers ---------------------------------------------------------------------------------------------------


def test_eight_callers_of_one_expert_are_one_read(gate: GatedReader) -> None:
    with HostTier(gate, slots={"records": 2}) as tier:
        tasks = [Task(lambda: take(tier, 0, 1)) for _ in range(8)]
        wait_until(lambda: tier.stats().misses == 8)
        gate.open()
        for task in tasks:
            assert task.result() == keys(0, 1)
        assert gate.reads == {ExpertKey(0, 1): 1}
        stats = tier.stats()
        assert (stats.hits, stats.misses, stats.joined) == (0, 8, 7)
        assert stats.bytes_in == PLAN.layouts["records"].slot_bytes


def test_an_error_reaches_all_waiting_callers_and_is_not_remembered(gate: GatedReader) -> None:
    with HostTier(gate, slots={"records": 4}) as tier:
        gate.broken.add(ExpertKey(0, 1))
        gate.release(ExpertKey(0, 0))
        take(tier, 0, 0)
        tasks = [Task(lambda: take(tier, 0, 0, 1)) for _ in range(5)]
        wait_until(lambda: tier.stats().misses == 6)
        gate.open()
        for task in tasks:
            with pytest.raises(StoreReadError, match="expert 1 can't be read"):
                task.result()
        check_integrity(tier)
        stats = tier.stats()
        assert (stats.failures, stats.ready) == (1, 1)
        assert gate.reads[ExpertKey(0, 1)] == 1
        assert take(tier, 0, 0, 2, 3) == keys(0, 0, 2, 3), "others are served"
        gate.broken.clear()
        assert take(tier, 0, 1) == keys(0, 1), "and this one, as soon as it can be read"


def test_an_error_of_any_class_reaches_the_caller() -> None:
    class Odd(RamReader):
        def read_into(self, key: ExpertKey, buffer: memoryview, pause: Callable[[], bool] | None = None) -> None:
            raise SystemExit(f"what {key}?")

    with HostTier(Odd(PLAN, RECORDS), slots=SMALLEST) as tier:
        for _ in range(5):  # loaders live on
            with pytest.raises(SystemExit, match="what block 0 expert 0"):
                list(tier.acquire(keys(0, 0)))
        check_integrity(tier)


def test_a_failed_read_keeps_no_hold_on_the_memory() -> None:
    """The traceback of an error names frames that held the slot's buffer."""
    reader = RamReader(PLAN, RECORDS)
    reader.broken.add(ExpertKey(0, 0))
    with HostTier(reader, slots=SMALLEST) as tier, pytest.raises(StoreReadError) as caught:
        list(tier.acquire(keys(0, 0)))
    assert "memfd:moetier-arena" not in Path("/proc/self/maps").read_text()
    assert caught.traceback


def test_a_loader_that_fails_ends_the_wait_of_all_callers(gate: GatedReader, monkeypatch: pytest.MonkeyPatch) -> None:
    events = SimpleQueue[SessionEvent]()
    with HostTier(gate, slots={"records": 12}) as tier:
        session = tier.session(events.put)
        session.acquire(1, keys(1, 0))
        gate.wait_begun(*keys(1, 0))
        sleeping = Task(lambda: list(tier.acquire(keys(0, 0))))
        wait_until(lambda: sleeps(sleeping.thread))
        monkeypatch.setattr(Loads, "take", fails)
        with pytest.raises(StoreError, match=r"has failed \(AssertionError\)"):
            list(tier.acquire(keys(0, 1)))
        with pytest.raises(StoreError, match="has failed"):
            sleeping.result()
        failed = events.get(timeout=PATIENCE)
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, StoreError)
        gate.open()


def test_a_timekeeper_that_fails_ends_the_wait_of_all_callers(
    gate: GatedReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HostTier(gate, slots=SMALLEST) as tier:
        monkeypatch.setattr(WaitingDemands, "expire", fails)
        events = SimpleQueue[SessionEvent]()
        tier.session(events.put).acquire(1, keys(0, 0, 1))
        tier.session(events.put).acquire(2, keys(0, 2, 3))  # it has a deadline, as it finds no slot
        assert {type(events.get(timeout=PATIENCE)) for _ in range(2)} == {Failed}
        assert tier.fault is not None
        gate.open()


def fails(*arguments: object) -> None:
    raise AssertionError


def test_a_closed_iterator_gives_everything_back(gate: GatedReader) -> None:
    with HostTier(gate, slots=SMALLEST) as tier:
        gate.release(ExpertKey(0, 0))
        leases = tier.acquire(keys(0, 0, 1, 2))
        assert next(leases).key == ExpertKey(0, 0)
        gate.wait_begun(ExpertKey(0, 1))
        leases.close()  # one leased, one in flight, one not begun
        check_integrity(tier)
        gate.open()
        assert set(take(tier, 1, 0, 1, 2)) == set(keys(1, 0, 1, 2))
        wait_until(lambda: gate.reads[ExpertKey(0, 1)] == 1)  # its loader may be the last to notice
        assert gate.reads[ExpertKey(0, 2)] == 0


def test_an_exception_of_the_consumer_gives_everything_back() -> None:
    with HostTier(RamReader(PLAN, RECORDS), slots=SMALLEST) as tier:

        def consume() -> None:
            for lease in tier.acquire(keys(0, 0, 1, 2)):
                raise ZeroDivisionError(lease.key)

        with pytest.raises(ZeroDivisionError):
            consume()
        assert len(take(tier, 1, 0, 1, 2)) == 3


def test_a_lost_iterator_gives_back_wherever_the_collector_finds_it() -> None:
    """It runs on nearly every allocation here, also while its thread holds the tier's lock."""
    with HostTier(RamReader(PLAN, RECORDS), slots={"records": 4}) as tier:

        def lose(block: int) -> None:
            leases = tier.acquire(keys(block, 0, 1, 2))
            next(leases)
            cycle: list[object] = [leases]
            cycle.append(cycle)

        def work() -> None:
            for number in range(40):
                lose(number % 3)
                take(tier, (number + 1) % 3, 0, 1, 2)

        threshold = gc.get_threshold()
        gc.set_threshold(1)
        try:
            run_all([work] * 2)
        finally:
            gc.set_threshold(*threshold)
        gc.collect()
        check_integrity(tier)
        assert tier.stats().leased == 0


def test_when_all_slots_are_held_a_caller_waits_until_they_are_given_back() -> None:
    with HostTier(RamReader(PLAN, RECORDS), slots=SMALLEST) as tier:
        held = tier.acquire(keys(0, 0, 1))
        next(held)
        wait_until(lambda: tier.stats().ready == 2)
        waiting = Task(lambda: take(tier, 1, 0))
        wait_until(lambda: tier.stats().misses == 3)
        assert waiting.thread.is_alive()
        check_integrity(tier)
        assert len(list(held)) < 2  # gives them back
        assert waiting.result() == keys(1, 0)
        stats = tier.stats()
        assert (stats.waits > 0, stats.wait_seconds > 0) == (True, True)


def test_ten_callers_at_the_smallest_budget_come_to_an_end() -> None:
    reader = RamReader(PLAN, RECORDS)
    with HostTier(reader, slots=SMALLEST, loaders=2) as tier:

        def caller(number: int) -> int:
            return sum(len(take(tier, (number + step) % 3, 0, 1, 2, 3)) for step in range(15))

        assert run_all([lambda n=n: caller(n) for n in range(10)]) == [60] * 10
        stats = tier.stats()
        assert stats.hits + stats.misses == 600
        assert sum(reader.reads.values()) == stats.misses - stats.joined


def test_what_is_not_there_is_not_asked_for() -> None:
    with HostTier(RamReader(PLAN, RECORDS), slots=SMALLEST) as tier:
        for block, expert in ((-1, 0), (3, 0), (0, -1), (0, 4), (0, 10**9)):
            with pytest.raises(MissingExpertError):
                list(tier.acquire(keys(block, expert)))
            with pytest.raises(MissingExpertError):
                tier.prefetch(block, keys(block, expert))
        with pytest.raises(AssertionError):
            list(tier.acquire([ExpertKey(0, 0), ExpertKey(1, 0)]))
        assert tier.stats().misses == 0
        check_integrity(tier)


# -- close -------------------------------------------------------------------------------------------------------------


def test_close_wakes_waiting_callers_and_waits_for_reads(gate: GatedReader) -> None:
    tier = HostTier(gate, slots=SMALLEST, loaders=1)
    reading = Task(lambda: take(tier, 0, 0, 1))  # one is read, one is queued
    gate.wait_begun(ExpertKey(0, 0))
    starved = Task(lambda: take(tier, 1, 0))
    wait_until(lambda: tier.stats().misses == 3)
    closer = Task(tier.close)
    for task in (reading, starved):
        with pytest.raises(ClosedError):
            task.result()
    assert closer.thread.is_alive(), "a read into its memory is under way"
    assert "memfd:moetier-arena" in Path("/proc/self/maps").read_text()
    gate.open()
    closer.result()
    assert set(gate.reads) == {ExpertKey(0, 0)}, "what was not begun is not read"
    assert "memfd:moetier-arena" not in Path("/proc/self/maps").read_text()
    check_integrity(tier)
    tier.close()
    with pytest.raises(ClosedError):
        list(tier.acquire(keys(0, 0)))
    with pytest.raises(ClosedError):
        tier.prefetch(0, keys(0, 0))
    assert tier.stats().misses == 3, "the counters outlive it"


def test_a_lease_is_readable_after_close_and_ends_with_an_error() -> None:
    tier = HostTier(RamReader(PLAN, RECORDS), slots=SMALLEST)
    leases = tier.acquire(keys(0, 0, 1))
    lease: Lease[memoryview] | None = next(leases)
    tier.close()
    assert lease is not None
    assert bytes(lease.record) == RECORDS[lease.key]
    with pytest.raises(ClosedError):
        next(leases)
    lease = None
    check_integrity(tier)


# -- another process ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("locked", [False, True], ids=["free", "locked"])
def test_a_forked_child_is_told_and_does_not_wait(locked: bool) -> None:
    """For hits, misses and prefetches, and for the next lease; also where a thread held the lock at the fork."""
    tier = HostTier(RamReader(PLAN, RECORDS), slots={"records": 12})
    take(tier, 0, 0, 1)
    leases = tier.acquire(keys(0, 0, 1))
    next(leases)
    uses: list[Callable[[], object]] = [
        lambda: list(tier.acquire(keys(0, 0))),
        lambda: list(tier.acquire(keys(1, 3))),
        lambda: tier.prefetch(1, keys(1, 0)),
        lambda: tier.warm(HotSet({ExpertKey(1, 0): 1.0}).hottest),
        lambda: next(leases),
    ]
    with held_lock(tier, ExpertKey(0, 0)) if locked else contextlib.nullcontext():
        for use in uses:
            assert re.match(r"ClosedError: .*another process's tier.*spawn", in_fork(use), re.DOTALL)
    leases.close()
    assert set(take(tier, 1, 0, 1)) == set(keys(1, 0, 1)), "the parent goes on"
    tier.close()


@pytest.mark.parametrize("locked", [False, True], ids=["free", "locked"])
def test_closing_in_a_forked_child_closes_the_childs_alone(locked: bool) -> None:
    def close() -> tuple[bool, bool]:
        tier.close()
        arena = "memfd:moetier-arena"
        descriptors = (str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())
        return arena in Path("/proc/self/maps").read_text(), any(arena in target for target in descriptors)

    with HostTier(RamReader(PLAN, RECORDS), slots={"records": 12}) as tier:
        take(tier, 0, 0)
        with held_lock(tier, ExpertKey(0, 0)) if locked else contextlib.nullcontext():
            assert in_fork(close) == "returned (False, False)"
        assert set(take(tier, 1, 0, 1)) == set(keys(1, 0, 1))


def test_what_a_forked_child_gives_up_is_the_parents_still(gate: GatedReader) -> None:
    with HostTier(gate, slots={"records": 12}, loaders=1) as tier:
        gate.release(ExpertKey(0, 0))
        leases = tier.acquire(keys(0, 0, 1, 2, 3))
        next(leases)
        gate.wait_begun(ExpertKey(0, 1))  # the others are not begun yet
        assert in_fork(leases.close) == "returned None"
        check_integrity(tier)
        gate.open()
        assert {lease.key for lease in leases} == set(keys(0, 1, 2, 3))
