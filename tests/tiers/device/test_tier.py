from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from consumers import PLAN, RECORDS, SMALLEST, Consumer, device_of, record_bytes
from fake_device import Order
from hypothesis import given, settings
from hypothesis import strategies as st
from integrity import check_integrity
from readers import GatedReader, RamReader
from stores import keys, make_plan, make_records, make_store
from threads import Task, run_all, sleeps, wait_until
from two_layouts import two_layouts
from unsteady import UnsteadySource

from moetier.runtime.devices.cuda import CudaStreams
from moetier.testing import in_fork
from moetier.tiers.cache.budget import slots_for, smallest_budget
from moetier.tiers.device.tier import DeviceTier
from moetier.tiers.device.views import HostViews
from moetier.tiers.errors import BudgetError, ClosedError, StoreReadError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey, RecordLayout
from moetier.tiers.store.reader import ShardStore
from moetier.tiers.text import format_bytes


@pytest.fixture
def reader() -> RamReader:
    return RamReader(PLAN, RECORDS)


@pytest.fixture
def host(reader: RamReader) -> Iterator[HostTier]:
    with HostTier(reader, slots=SMALLEST) as tier:
        yield tier


# -- the three orders --------------------------------------------------------------------------------------------------

PROGRAM = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(PROGRAM, st.integers(0, 1 << 32), st.integers(2, 12), st.integers(2, 12))
def test_every_computation_sees_its_record(
    program: list[tuple[int, list[int]]], seed: int, slots: int, host_slots: int
) -> None:
    device = device_of(seed)
    with HostTier(RamReader(PLAN, RECORDS), slots={"records": host_slots}) as host:
        tier = DeviceTier(host, PLAN, slots={"records": slots}, device=device)
        consumer = Consumer(tier, device)
        for block, experts in program:
            consumer.run(block, experts)
        assert consumer.wrong() == 0
        assert len(consumer.seen) == sum(len(experts) for _, experts in program)
        tier.close()


@pytest.mark.parametrize("forgets", [None, *Order])
def test_the_fake_sees_each_order_that_is_broken(forgets: Order | None) -> None:
    """Broken on purpose, each of the three gives wrong bytes; kept, none does."""
    wrong = 0
    for seed in range(5):
        device = device_of(seed, forgets=forgets)
        with HostTier(RamReader(PLAN, RECORDS), slots=SMALLEST) as host:
            tier = DeviceTier(host, PLAN, slots=SMALLEST, device=device)
            consumer = Consumer(tier, device)
            for block in (0, 1, 2, 0):
                consumer.run(block, [0, 1, 2, 3])
            wrong += consumer.wrong()
            tier.close()
    assert (wrong > 0) == (forgets is not None)


def test_a_hit_waits_for_a_copy_that_another_stream_began(host: HostTier) -> None:
    device = device_of()
    tier = DeviceTier(host, PLAN, slots={"records": 12}, device=device)
    consumer = Consumer(tier, device)
    first = tier.acquire(keys(0, 0))
    next(first)  # the copy is queued, and nothing has run
    with device.stream():
        consumer.run(0, [0])
    first.close()
    assert consumer.wrong() == 0
    assert tier.stats().hits == 1
    tier.close()


def test_a_refill_waits_for_every_stream_that_used_the_slot(host: HostTier) -> None:
    for seed in range(20):
        device = device_of(seed)
        tier = DeviceTier(host, PLAN, slots=SMALLEST, device=device)
        consumer = Consumer(tier, device)
        for _ in range(3):
            with device.stream():
                consumer.run(0, [0, 1])
        consumer.run(1, [0, 1, 2, 3])
        assert consumer.wrong() == 0
        tier.close()


def test_a_refill_waits_once_for_each_use_and_not_for_those_before(host: HostTier) -> None:
    device = device_of()
    tier = DeviceTier(host, PLAN, slots=SMALLEST, device=device)
    consumer = Consumer(tier, device)
    for expert in (0, 1, 2, 3) * 3:
        with device.stream():
            consumer.run(0, [expert])
            consumer.run(0, [expert])
    assert device.copies.waits == 10, "twelve copies, the first two into empty slots; two uses each, on one stream"
    assert consumer.wrong() == 0
    tier.close()


# -- what goes on at the same time -----------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [2, 12])
def test_the_next_record_is_copied_while_one_is_computed_on(reader: RamReader, slots: int) -> None:
    """Its copy is queued before the computation is, and the caller waits for neither."""
    device = device_of()
    with HostTier(reader, slots={"records": 12}) as host:
        list(host.acquire(keys(0, 0, 1)))
        tier = DeviceTier(host, PLAN, slots={"records": slots}, device=device)
        consumer = Consumer(tier, device)
        queued = []
        for lease in tier.acquire(keys(0, 0, 1)):
            queued.append(sum(device.pending.values()))
            assert device.waits_of_the_host == 0
            device.compute(lambda lease=lease: consumer.look(lease))
        assert queued == [2, 2]
        assert device.waits_of_the_host == 0
        assert consumer.wrong() == 0
        tier.close()


def test_a_slot_that_is_computed_on_is_refilled_without_a_wait_of_the_host() -> None:
    """All slots are in use: each copy waits for the computation on what was there before, on the device."""
    plan = make_plan(blocks=1, experts=8, top_k=4)
    records = make_records(plan)
    device = device_of()
    with HostTier(RamReader(plan, records), slots={"records": 8}) as host:
        list(host.acquire(keys(0, 0, 1, 2, 3, 4, 5, 6, 7)))
        tier = DeviceTier(host, plan, slots={"records": 4}, device=device)
        for experts in ((0, 1, 2, 3), (4, 5, 6, 7)):
            waits, queued, seen = device.waits_of_the_host, [], []
            for lease in tier.acquire(keys(0, *experts)):
                queued.append(sum(device.pending.values()))
                assert device.waits_of_the_host == waits
                device.compute(lambda lease=lease, seen=seen: seen.append((lease.key, record_bytes(lease.record))))
            assert queued == [2, 3, 4, 4]
            device.finish()
            assert [key.expert for key, data in seen if data == records[key]] == list(experts)
        tier.close()


def test_what_another_process_may_replace_is_not_waited_for_either(host: HostTier) -> None:
    """It is proved when it is in a buffer, before it has come to the device."""
    device = device_of()
    source = UnsteadySource(host, share=0.0)
    tier = DeviceTier(source, PLAN, slots=SMALLEST, device=device)
    consumer = Consumer(tier, device)
    consumer.run(0, [0, 1])
    assert sum(device.pending.values()) == 2
    assert device.waits_of_the_host == source.unasked == 0
    assert consumer.wrong() == 0
    tier.close()


# -- records that are made ready on the device ------------------------------------------------------------------------


@pytest.mark.parametrize("promotes", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_arranged_is_seen_by_every_computation(seed: int, promotes: bool) -> None:
    """And the record's own bytes are what came over the link."""
    device, came = device_of(seed), []

    def arrange(record: torch.Tensor, layout: RecordLayout) -> None:
        assert layout == PLAN.layouts["records"]
        came.append(record_bytes(record))
        record.bitwise_not_()

    with HostTier(RamReader(PLAN, RECORDS), slots={"records": 4}) as host:
        tier = DeviceTier(host, PLAN, slots={"records": 4}, device=device, arrange=arrange, promotes=promotes)
        seen: list[tuple[ExpertKey, bytes]] = []
        for step in range(12):
            block = step % 3
            with device.stream():
                for lease in tier.acquire(keys(block, step % 4, (step + 1) % 4, (step + 2) % 4)):
                    device.compute(lambda lease=lease: seen.append((lease.key, record_bytes(lease.record))))
                    check_integrity(tier)
            tier.prefetch((block + 1) % 3, keys((block + 1) % 3, (step + 1) % 4))
        device.finish()
        assert len(seen) == 36
        assert all(data == bytes(255 - byte for byte in RECORDS[key]) for key, data in seen)
        assert set(came) <= set(RECORDS.values())
        tier.close()


@pytest.mark.parametrize("seed", range(8))
def test_a_refill_waits_for_the_arrangement_of_what_nobody_computed_on(seed: int) -> None:
    device = device_of(seed)
    with HostTier(RamReader(PLAN, RECORDS), slots={"records": 12}) as host:
        list(host.acquire(keys(0, 0, 1)))
        tier = DeviceTier(
            host, PLAN, slots=SMALLEST, device=device, arrange=lambda record, layout: record.bitwise_not_()
        )
        leases = tier.acquire(keys(0, 0, 1))
        next(leases)  # the other one's copy is queued too
        leases.close()
        seen: list[tuple[ExpertKey, bytes]] = []
        for lease in tier.acquire(keys(1, 2, 3)):
            device.compute(lambda lease=lease: seen.append((lease.key, record_bytes(lease.record))))
        device.finish()
        assert [key for key, data in seen if data == bytes(255 - byte for byte in RECORDS[key])] == keys(1, 2, 3)
        tier.close()


def test_what_cannot_be_arranged_leaves_nothing_behind(host: HostTier) -> None:
    device, broken = device_of(), [True]

    def arrange(record: torch.Tensor, layout: RecordLayout) -> None:
        pass

    def run(stream: object, work: object, original: object = device.run) -> None:
        if broken:
            broken.clear()
            raise torch.OutOfMemoryError("full")
        original(stream, work)  # type: ignore[operator]

    device.run = run  # type: ignore[method-assign, assignment]
    tier = DeviceTier(host, PLAN, slots=SMALLEST, device=device, arrange=arrange)
    consumer = Consumer(tier, device)
    with pytest.raises(torch.OutOfMemoryError):
        consumer.run(0, [0])
    check_integrity(tier)
    consumer.run(0, [0])
    assert consumer.wrong() == 0
    tier.close()


# -- cache -------------------------------------------------------------------------------------------------------------


def test_what_the_device_holds_is_not_asked_of_the_host(host: HostTier) -> None:
    device = device_of()
    tier = DeviceTier(host, PLAN, slots={"records": 6}, device=device)
    consumer = Consumer(tier, device)
    for _ in range(3):
        for block in range(3):
            consumer.run(block, [1, 3])
    stats = tier.stats()
    assert (stats.name, stats.slots, stats.ready, stats.hits, stats.misses) == ("device", 6, 6, 12, 6)
    assert stats.bytes_in == stats.memory_bytes == 6 * PLAN.layouts["records"].slot_bytes
    assert stats.evictions == 0
    assert host.stats().misses == 6
    assert host.stats().hits == 0
    assert consumer.wrong() == 0
    tier.close()


def test_what_is_given_first_is_evicted_last(host: HostTier) -> None:
    device = device_of()
    tier = DeviceTier(host, PLAN, slots={"records": 6}, device=device)  # two for each block
    consumer = Consumer(tier, device)
    consumer.run(0, [2, 3])
    consumer.run(0, [2, 3])
    consumer.run(0, [0])
    misses = tier.stats().misses
    consumer.run(0, [2])
    assert tier.stats().misses == misses
    consumer.run(0, [3])
    assert tier.stats().misses == misses + 1
    tier.close()


def test_what_a_demand_brings_is_used(host: HostTier) -> None:
    device = device_of()
    tier = DeviceTier(host, PLAN, slots={"records": 6}, device=device, policy="lrfu")  # two for each block
    consumer = Consumer(tier, device)
    for expert in (0, 0, 1, 2, 1):  # the one with two uses of late has missed twice; 2 went for it
        consumer.run(0, [expert])
    consumer.run(0, [3])
    hits = tier.stats().hits
    consumer.run(0, [1])
    assert tier.stats().hits == hits + 1, "0 went, whose uses are older"
    assert consumer.wrong() == 0
    tier.close()


@pytest.mark.parametrize(("policy", "kept"), [("lrfu", True), ("scan", True), ("lru", False)])
@pytest.mark.parametrize("promotes", [False, True])
def test_a_passage_leaves_what_decoding_needs(policy: str, kept: bool, promotes: bool) -> None:
    """A prefill of all experts in each block, of which half have slots."""
    plan = make_plan(blocks=3, experts=8, top_k=2)
    records = make_records(plan)
    device = device_of()
    with HostTier(RamReader(plan, records), slots={"records": 24}) as host:
        tier = DeviceTier(host, plan, slots={"records": 12}, device=device, policy=policy, promotes=promotes)
        seen: list[tuple[ExpertKey, bytes]] = []

        def run(block: int, *experts: int) -> None:
            last = -1
            for lease in tier.acquire(keys(block, *experts)):
                device.compute(lambda lease=lease: seen.append((lease.key, record_bytes(lease.record))))
                check_integrity(tier)
                assert lease.slot != last, "the copy would wait for the computation"
                last = lease.slot

        for block in range(3):
            run(block, 0, 1)
            run(block, 2, 3)
        for block in range(3):
            run(block, *range(8))
        hits = tier.stats().hits
        for block in range(3):
            run(block, 0, 1)
            run(block, 2, 3)
        device.finish()
        assert all(data == records[key] for key, data in seen)
        assert len(seen) == 3 * 16
        assert (tier.stats().hits - hits >= 3 * 2) == kept
        tier.close()


def test_two_record_sizes() -> None:
    plan = two_layouts()
    records = make_records(plan)
    device = device_of()
    for budget in (smallest_budget(plan), plan.stored_bytes):
        slots = slots_for(plan, budget)
        with HostTier(RamReader(plan, records), slots=slots) as host:
            tier = DeviceTier(host, plan, slots=slots, device=device)
            slot_numbers: dict[str, set[int]] = {"big": set(), "small": set()}
            for _ in range(2):
                for block, entry in enumerate(plan.blocks):
                    for lease in tier.acquire(keys(block, 0, 1, 2, 3)):
                        slot_numbers[entry.array].add(lease.slot)
                        assert lease.record.shape == (plan.layout(block).record_bytes,)
                        assert lease.record.dtype == torch.uint8
                        device.finish()
                        assert record_bytes(lease.record) == records[lease.key]
            assert not slot_numbers["big"] & slot_numbers["small"]
            assert tier.stats().slots == sum(slots.values())
            tier.close()


def test_two_callers_of_one_expert_are_one_copy() -> None:
    """The second finds it on the device when the host has it for both."""
    gate = GatedReader(PLAN, RECORDS)
    device = device_of()
    with HostTier(gate, slots=SMALLEST) as host:
        tier = DeviceTier(host, PLAN, slots=SMALLEST, device=device)
        tasks = [Task(lambda: [lease.key for lease in tier.acquire(keys(0, 1))]) for _ in range(4)]
        wait_until(lambda: host.stats().misses == 4)
        gate.open()
        for task in tasks:
            assert task.result() == keys(0, 1)
        stats = tier.stats()
        assert (stats.misses, stats.joined, stats.bytes_in) == (4, 3, PLAN.layouts["records"].slot_bytes)
        tier.close()


def test_callers_share_two_slots_on_streams_of_their_own(reader: RamReader) -> None:
    device = device_of()
    with HostTier(reader, slots=SMALLEST) as host:
        tier = DeviceTier(host, PLAN, slots=SMALLEST, device=device)

        def caller(number: int) -> int:
            consumer = Consumer(tier, device)
            with device.stream():
                for step in range(8):
                    consumer.run((number + step) % 3, [0, 1, 2, 3])
            return consumer.wrong()

        assert run_all([lambda n=n: caller(n) for n in range(6)]) == [0] * 6
        stats = tier.stats()
        assert stats.hits + stats.misses == 6 * 8 * 4
        check_integrity(tier)
        check_integrity(host)
        tier.close()


@pytest.mark.parametrize("end", ["next", "close"])
def test_a_caller_waits_for_a_slot_that_another_computes_on(reader: RamReader, end: str) -> None:
    """With a lease of the host in its hand."""
    device = device_of()
    with HostTier(reader, slots={"records": 12}) as host:
        tier = DeviceTier(host, PLAN, slots=SMALLEST, device=device)
        consumer = Consumer(tier, device)
        consumer.run(0, [0, 1])
        holder = tier.acquire(keys(0, 0, 1))
        next(holder)
        waiting = Task(lambda: consumer.run(1, [2]))
        wait_until(lambda: sleeps(waiting.thread))
        if end == "next":  # leases that were available together end together
            assert len(list(holder)) == 1
        else:
            holder.close()
        waiting.result()
        assert consumer.wrong() == 0
        assert len(consumer.seen) == 3
        holder.close()
        check_integrity(tier)
        tier.close()


def test_who_waits_for_a_copy_gets_it_when_it_is_queued(reader: RamReader) -> None:
    """And not only when the one that began it is done with its lease."""
    device = device_of()
    with HostTier(reader, slots={"records": 12}) as host:
        tier = DeviceTier(host, PLAN, slots=SMALLEST, device=device)
        consumer = Consumer(tier, device)
        device.copy_may_begin.clear()
        leases = tier.acquire(keys(0, 3))
        first = Task(lambda: next(leases))
        wait_until(lambda: device.copying == 1)
        second = Task(lambda: consumer.run(0, [3]))
        wait_until(lambda: sleeps(second.thread))
        device.copy_may_begin.set()
        second.result()
        assert first.result().key == ExpertKey(0, 3)
        assert consumer.wrong() == 0
        assert tier.stats().joined == 1
        leases.close()
        tier.close()


def test_who_waits_for_a_copy_that_fails_copies_for_itself(reader: RamReader) -> None:
    device = device_of()
    with HostTier(reader, slots={"records": 12}) as host:
        tier = DeviceTier(host, PLAN, slots=SMALLEST, device=device)
        consumer = Consumer(tier, device)
        device.copy_may_begin.clear()
        device.copy_error = RuntimeError("lost")
        first = Task(lambda: consumer.run(0, [3]))
        wait_until(lambda: device.copying == 1)
        second = Task(lambda: consumer.run(0, [3]))
        wait_until(lambda: sleeps(second.thread))
        device.copy_may_begin.set()
        with pytest.raises(RuntimeError, match="lost"):
            first.result()
        second.result()
        assert consumer.wrong() == 0
        assert len(consumer.seen) == 1
        tier.close()


def test_a_lease_of_the_host_ends_before_the_copy(host: HostTier) -> None:
    """The host may refill its slot, as the bytes are in a buffer."""
    device = device_of()
    tier = DeviceTier(host, PLAN, slots=SMALLEST, device=device)
    consumer = Consumer(tier, device)
    consumer.run(0, [0, 1])
    assert sum(device.pending.values()) == 2, "no copy has run"
    assert host.stats().leased == 0
    list(host.acquire(keys(1, 0, 1, 2, 3)))
    assert consumer.wrong() == 0
    check_integrity(host)
    tier.close()


# -- wishes ------------------------------------------------------------------------------------------------------------


def test_wishes_go_to_the_host_for_what_the_device_lacks(host: HostTier, reader: RamReader) -> None:
    device = device_of()
    tier = DeviceTier(host, PLAN, slots={"records": 12}, device=device)
    Consumer(tier, device).run(0, [0])
    Consumer(tier, device).run(1, [0, 1, 2])  # the host has two slots: it has nothing of block 0 now
    before = reader.reads.copy()
    tier.prefetch(0, keys(0, 0, 1))
    wait_until(lambda: host.stats().prefetched == 1 and host.stats().ready == 2)
    list(host.acquire(keys(2, 0)))
    assert reader.reads - before == {ExpertKey(0, 1): 1, ExpertKey(2, 0): 1}
    assert tier.stats().ready == 4, "the device takes nothing by itself"
    tier.close()


def test_a_demand_that_the_device_meets_clears_the_hosts_wishes_too() -> None:
    gate = GatedReader(PLAN, RECORDS)
    device = device_of()
    with HostTier(gate, slots={"records": 12}, loaders=1) as host:
        tier = DeviceTier(host, PLAN, slots={"records": 12}, device=device)
        gate.release(ExpertKey(0, 0))
        Consumer(tier, device).run(0, [0])
        tier.prefetch(0, keys(0, 1, 2))
        gate.wait_begun(ExpertKey(0, 1))
        Consumer(tier, device).run(0, [0])
        gate.open()
        list(host.acquire(keys(1, 0)))  # one loader: what it had to do before is done
        assert gate.reads[ExpertKey(0, 2)] == 0
        tier.close()


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_device_that_is_too_full_gets_fewer_slots_and_the_same_bytes(host: HostTier) -> None:
    size = PLAN.layouts["records"].slot_bytes
    device = device_of(capacity=5 * size)
    with pytest.warns(RuntimeWarning, match="room for 4 experts, not for 12") as caught:
        tier = DeviceTier(host, PLAN, slots={"records": 12}, device=device)
    assert len(caught) == 1
    assert tier.stats().slots == 4
    consumer = Consumer(tier, device)
    for block in range(3):
        consumer.run(block, [0, 1, 2, 3])
    assert consumer.wrong() == 0
    assert len(consumer.seen) == 12
    tier.close()


def test_a_device_without_room_for_one_token_is_refused(host: HostTier) -> None:
    size = PLAN.layouts["records"].slot_bytes
    device = device_of(capacity=2 * size - 1)
    with pytest.raises(BudgetError, match=f"no room .* one block: {format_bytes(2 * size)}") as caught:
        DeviceTier(host, PLAN, slots={"records": 12}, device=device)
    assert caught.tb is not None
    assert not device.locked, "the buffers are released, though the error is kept"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DeviceTier(host, PLAN, slots=SMALLEST, device=device_of(capacity=2 * size)).close()


def test_memory_that_cannot_be_page_locked_is_copied_all_the_same(host: HostTier) -> None:
    device = device_of(locks_pages=False)
    with pytest.warns(RuntimeWarning, match="No memory can be page-locked") as caught:
        tier = DeviceTier(host, PLAN, slots=SMALLEST, device=device)
    assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]
    consumer = Consumer(tier, device)
    for block in (0, 1, 2, 0):
        consumer.run(block, [0, 1, 2, 3])
    assert consumer.wrong() == 0
    tier.close()


def test_a_copy_that_fails_leaves_nothing_behind(host: HostTier) -> None:
    device = device_of()
    tier = DeviceTier(host, PLAN, slots=SMALLEST, device=device)
    device.copy_error = RuntimeError("the device is gone")
    with pytest.raises(RuntimeError, match="gone"):
        Consumer(tier, device).run(0, [0, 1])
    check_integrity(tier)
    check_integrity(host)
    assert host.stats().leased == 0
    assert (tier.stats().failures, tier.stats().ready) == (1, 0)
    consumer = Consumer(tier, device)
    consumer.run(0, [0, 1, 2, 3])
    assert consumer.wrong() == 0
    tier.close()


def test_an_error_of_the_store_passes_through(host: HostTier, reader: RamReader) -> None:
    device = device_of()
    tier = DeviceTier(host, PLAN, slots=SMALLEST, device=device)
    reader.broken.add(ExpertKey(0, 1))
    with pytest.raises(StoreReadError):
        Consumer(tier, device).run(0, [1])
    check_integrity(tier)
    reader.broken.clear()
    consumer = Consumer(tier, device)
    consumer.run(0, [1])
    assert consumer.wrong() == 0
    tier.close()


def test_close_waits_for_copies_and_wakes_who_waits(host: HostTier) -> None:
    device = device_of()
    tier = DeviceTier(host, PLAN, slots=SMALLEST, device=device)
    holders = [tier.acquire(keys(0, expert)) for expert in (0, 1)]
    for holder in holders:
        next(holder)
    device.finish()
    for holder in holders:  # the host's leases end, the device's slots stay pinned by other readers
        holder.close()
    readers = [tier.acquire(keys(0, 0, 1)) for _ in range(2)]
    held = next(readers[0])
    waiting = Task(lambda: list(tier.acquire(keys(1, 2))))
    wait_until(lambda: host.stats().ready == 2 and host.stats().misses == 3)
    wait_until(lambda: sleeps(waiting.thread))
    tier.close()
    with pytest.raises(ClosedError):
        waiting.result()
    assert record_bytes(held.record) == RECORDS[held.key], "a lease stays usable"
    with pytest.raises(ClosedError):
        next(readers[0])
    with pytest.raises(ClosedError):
        next(readers[1])
    tier.close()
    with pytest.raises(ClosedError):
        tier.prefetch(0, keys(0, 0))
    assert tier.stats().misses == 3


def test_close_waits_for_a_copy_that_is_being_begun(host: HostTier) -> None:
    device = device_of()
    tier = DeviceTier(host, PLAN, slots=SMALLEST, device=device)
    device.copy_may_begin.clear()
    caller = Task(lambda: list(tier.acquire(keys(0, 0))))
    wait_until(lambda: bool(device.locked))
    wait_until(lambda: device.copying == 1)
    closer = Task(tier.close)
    wait_until(lambda: sleeps(closer.thread))
    assert device.locked, "the buffers are still there"
    device.copy_may_begin.set()
    closer.result()
    assert not device.locked
    with pytest.raises(ClosedError):
        caller.result()


def test_close_lets_go_of_the_hosts_memory_when_it_has_been_copied(host: HostTier) -> None:
    device = device_of()
    tier = DeviceTier(host, PLAN, slots=SMALLEST, device=device)
    leases = tier.acquire(keys(0, 0))
    lease = next(leases)
    assert any(device.pending.values())
    tier.close()
    assert not any(device.pending.values())
    assert record_bytes(lease.record) == RECORDS[lease.key]
    leases.close()


def test_memory_that_the_host_has_given_up_is_let_go_of(host: HostTier) -> None:
    """As a daemon's client does, when a new daemon comes with an arena of its own."""
    device, spare = device_of(), HostTier(RamReader(PLAN, RECORDS), slots=SMALLEST)
    source = UnsteadySource(spare, share=0.0)
    tier = DeviceTier(source, PLAN, slots={"records": 6}, device=device)
    consumer = Consumer(tier, device)
    for block in range(3):
        consumer.run(block, [0, 1])
    source.source = host
    spare.close()
    for _ in range(2):
        for block in range(3):
            consumer.run(block, [0, 1, 2, 3])
    assert consumer.wrong() == 0
    del consumer
    assert Path("/proc/self/maps").read_text().count("/memfd:moetier-arena") == 1
    tier.close()


# -- a CPU's tier ------------------------------------------------------------------------------------------------------


def test_on_a_cpu_records_are_the_hosts_own_memory(host: HostTier) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        views = HostViews(host)
        seen: dict[int, torch.Tensor] = {}
        for _ in range(2):
            for block in range(3):
                for lease in views.acquire(keys(block, 0, 1, 2, 3)):
                    assert lease.record.data_ptr() % 4096 == 0
                    assert record_bytes(lease.record) == RECORDS[lease.key]
                    assert seen.setdefault(lease.slot, lease.record) is lease.record, "made once for each slot"
        assert len(seen) == 2
        assert views.stats() == host.stats()
        views.close()
        del seen, lease


class Attached:
    """A source that goes on with another tier's memory, as a client does that attaches to a new arena."""

    def __init__(self, tier: HostTier) -> None:
        self.tier = tier

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tier, name)


def test_views_follow_a_source_whose_memory_changes() -> None:
    source = Attached(HostTier(RamReader(PLAN, RECORDS), slots=SMALLEST))
    views = HostViews(source)
    first = [lease.record for lease in views.acquire(keys(0, 0))]
    before, source.tier = source.tier, HostTier(RamReader(PLAN, RECORDS), slots=SMALLEST)
    second = [lease.record for lease in views.acquire(keys(0, 1))]
    assert first[0].data_ptr() != second[0].data_ptr()
    assert record_bytes(second[0]) == RECORDS[ExpertKey(0, 1)]
    views.close()
    before.close()
    source.tier.close()


# -- a real one --------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda(tmp_path: Path) -> None:
    records = make_store(tmp_path)
    cuda = torch.device("cuda")
    assert CudaStreams(cuda).page_locked(4096).is_pinned()
    with ShardStore.open(tmp_path) as store, HostTier(store, slots=SMALLEST) as host:
        tier = DeviceTier(host, store.manifest, slots=SMALLEST, device=CudaStreams(cuda))

        def caller(number: int) -> int:
            copies: list[tuple[ExpertKey, torch.Tensor]] = []
            with torch.cuda.stream(torch.cuda.Stream()):
                for step in range(20):
                    leases = tier.acquire(keys((number + step) % 3, 0, 1, 2, 3))
                    copies += [(lease.key, lease.record.clone()) for lease in leases]  # queued on this stream
                torch.cuda.current_stream().synchronize()
            return sum(record_bytes(copy) == records[key] for key, copy in copies)

        assert run_all([lambda n=n: caller(n) for n in range(4)]) == [80] * 4
        tier.close()


# -- records that another process may replace --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_record_that_was_replaced_while_it_was_copied_is_copied_again(host: HostTier, seed: int) -> None:
    device, unsteady = device_of(seed), UnsteadySource(host, seed)
    tier = DeviceTier(unsteady, PLAN, slots={"records": 5}, device=device)
    consumer = Consumer(tier, device)
    for block in (0, 1, 2, 0, 2):
        consumer.run(block, [3, 0, 1])
    assert consumer.wrong() == 0
    assert len(consumer.seen) == 15
    assert tier.stats().discarded == unsteady.broken > 0
    assert unsteady.unasked == 0
    tier.close()


def test_a_forked_child_leaves_the_device_and_the_state_alone(host: HostTier) -> None:
    """The garbage collector may close an iterator in the child that was open at the fork."""
    device = device_of()
    tier = DeviceTier(host, PLAN, slots=SMALLEST, device=device)
    with contextlib.closing(tier), contextlib.closing(tier.acquire(keys(0, 0, 1))) as leases:
        next(leases)
        stream = device.current_stream()

        def close() -> bool:
            before = len(stream.queue), len(device.copies.queue), device.waits_of_the_host
            leases.close()
            return (len(stream.queue), len(device.copies.queue), device.waits_of_the_host) == before

        assert in_fork(close) == "returned True"
