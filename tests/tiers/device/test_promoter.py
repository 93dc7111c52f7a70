"""Wishes that are promoted to the device in the background: on a device that does everything as late as is legal."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
from consumers import PLAN, RECORDS, SMALLEST, Consumer, device_of
from fake_device import FakeDevice, Order
from hypothesis import given, settings
from hypothesis import strategies as st
from integrity import check_integrity
from readers import PATIENCE, GatedReader, RamReader
from stores import keys
from threads import Task, run_all, sleeps, wait_until
from unsteady import UnsteadySource

from moetier.tiers.device.tier import DeviceTier
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey

ALL = {"records": 12}
SIZE = PLAN.layouts["records"].slot_bytes
PAUSES = [0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.1, 0.1]  # at least, of one that looks in vain
A_WHILE = 0.05  # seconds in which a promotion would have come


@pytest.fixture
def device() -> FakeDevice:
    return device_of()


@pytest.fixture
def reader() -> Iterator[GatedReader]:
    """Open, until a test shuts it."""
    gate = GatedReader(PLAN, RECORDS)
    gate.open()
    yield gate
    gate.open()


@pytest.fixture
def host(reader: GatedReader) -> Iterator[HostTier]:
    """It has room for all, and has block 0."""
    with HostTier(reader, slots=ALL) as tier:
        list(tier.acquire(keys(0, 0, 1, 2, 3)))
        yield tier


@pytest.fixture
def tier(host: HostTier, device: FakeDevice) -> Iterator[DeviceTier]:
    """Three slots for two blocks, and two for the third."""
    with contextlib.closing(DeviceTier(host, PLAN, slots={"records": 8}, device=device, promotes=True)) as tier:
        yield tier
        check_integrity(tier)


def promoted(tier: DeviceTier, count: int) -> None:
    """Wait until so many promotions have ended since the tier was opened. No demand has failed."""

    def have_ended() -> bool:
        stats = tier.stats()
        return stats.prefetched == sum(stats.loads) + stats.failures + stats.discarded == count

    wait_until(have_ended)


def idle(tier: DeviceTier) -> None:
    """Long enough for what would be wrong."""
    time.sleep(A_WHILE)
    check_integrity(tier)


# -- the orders --------------------------------------------------------------------------------------------------------

EXPERTS = st.lists(st.integers(0, 3), max_size=4, unique=True)
STEP = st.tuples(st.integers(0, 2), EXPERTS, st.integers(0, 2), EXPERTS, st.booleans())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(STEP, min_size=1, max_size=8),
    st.integers(0, 1 << 32),
    st.integers(2, 12),
    st.integers(2, 12),
    st.booleans(),
)
def test_every_computation_sees_its_record(
    program: list[tuple[int, list[int], int, list[int], bool]],
    seed: int,
    slots: int,
    host_slots: int,
    steady: bool,
) -> None:
    """Whatever is wished for, and whenever it comes; of a source whose records may be replaced, too."""
    device = device_of(seed)
    with HostTier(RamReader(PLAN, RECORDS), slots={"records": host_slots}) as host:
        source = UnsteadySource(host, seed, share=0.0 if steady else 0.3)
        tier = DeviceTier(source, PLAN, slots={"records": slots}, device=device, promotes=True)
        consumer = Consumer(tier, device)
        for block, experts, wished, wishes, waits in program:
            tier.prefetch(wished, keys(wished, *wishes))
            if waits:
                time.sleep(0.002)
            check_integrity(tier)
            consumer.run(block, experts)
        assert consumer.wrong() == 0
        assert len(consumer.seen) == sum(len(experts) for _, experts, *_ in program)
        tier.close()
        check_integrity(tier)
        stats = tier.stats()
        unused = stats.prefetched - (stats.useful + stats.late + stats.wasted)
        assert 0 <= unused <= (stats.ready if steady else stats.prefetched)
        check_integrity(host)


@pytest.mark.parametrize("forgets", [None, Order.COMPUTE_AFTER_COPY])
def test_a_hit_waits_for_the_copy_that_a_wish_began(host: HostTier, forgets: Order | None) -> None:
    wrong = 0
    for seed in range(8):
        device = device_of(seed, forgets=forgets)
        tier = DeviceTier(host, PLAN, slots={"records": 8}, device=device, promotes=True)
        consumer = Consumer(tier, device)
        device.copy_may_end.clear()
        tier.prefetch(0, keys(0, 0))
        wait_until(lambda tier=tier: tier.stats().ready == 1)  # the copy is queued
        consumer.run(0, [0])
        stats = tier.stats()
        assert (stats.hits, stats.prefetched, stats.late, stats.useful) == (1, 1, 1, 0)
        assert stats.saved_seconds > 0
        wrong += consumer.wrong()
        device.copy_may_end.set()
        tier.close()
    assert (wrong > 0) == (forgets is not None)


@pytest.mark.parametrize("forgets", [None, Order.REFILL_AFTER_COMPUTE])
def test_a_wish_refills_a_slot_after_every_use_of_it(host: HostTier, forgets: Order | None) -> None:
    wrong = 0
    for seed in range(8):
        device = device_of(seed, forgets=forgets)
        tier = DeviceTier(host, PLAN, slots={"records": 7}, device=device, promotes=True)
        consumer = Consumer(tier, device)
        tier.prefetch(0, keys(0, 0))
        promoted(tier, 1)
        consumer.run(0, [0])  # queued
        tier.prefetch(0, keys(0, 1))
        promoted(tier, 2)
        consumer.run(0, [1])
        tier.prefetch(0, keys(0, 2))
        promoted(tier, 3)
        consumer.run(0, [2])
        tier.prefetch(0, keys(0, 3))
        promoted(tier, 4)
        wrong += consumer.wrong()
        assert len(consumer.seen) == 3
        tier.close()
    assert (wrong > 0) == (forgets is not None)


@pytest.mark.parametrize("forgets", [None, Order.REUSE_AFTER_COPY])
def test_a_buffer_is_filled_again_after_its_copy(host: HostTier, forgets: Order | None) -> None:
    wrong = 0
    list(host.acquire(keys(1, 0, 1, 2, 3)))
    for seed in range(8):
        device = device_of(seed, forgets=forgets)
        tier = DeviceTier(host, PLAN, slots=ALL, device=device, promotes=True)
        consumer = Consumer(tier, device)
        for block in range(2):
            tier.prefetch(block, keys(block, 0, 1, 2, 3))
            promoted(tier, 4 * block + 4)
        for block in range(2):
            consumer.run(block, [0, 1, 2, 3])
        wrong += consumer.wrong()
        tier.close()
    assert (wrong > 0) == (forgets is not None)


def test_what_is_promoted_is_timed(tier: DeviceTier, device: FakeDevice) -> None:
    tier.prefetch(0, keys(0, 1, 2))
    wait_until(lambda: sum(tier.stats().loads) == 2)
    assert tier.stats().load_seconds > 0
    assert tier.stats().leased == 0
    leases = tier.acquire(keys(0, 1, 3))
    next(leases)
    assert tier.stats().leased == 1
    leases.close()
    assert sum(tier.stats().loads) == 2, "no copy for a demand is waited for by itself"


@pytest.mark.parametrize("seed", range(3))
def test_callers_who_demand_and_wish_on_streams_of_their_own(seed: int) -> None:
    device = device_of(seed)
    with HostTier(RamReader(PLAN, RECORDS), slots={"records": 3}) as host:
        source = UnsteadySource(host, seed, share=0.2)
        tier = DeviceTier(source, PLAN, slots={"records": 7}, device=device, promotes=True)

        def pause() -> None:
            """While nobody demands, a wish comes true."""
            for block in range(3):
                tier.prefetch(block, [])
            before = tier.stats().prefetched

            def comes_true() -> bool:
                tier.prefetch(0, tier.absent(keys(0, 0, 1, 2, 3))[:1])  # again, as the first may just be copied
                time.sleep(0.002)
                return tier.stats().prefetched > before

            wait_until(comes_true)

        together = threading.Barrier(5, pause)

        def caller(number: int) -> int:
            chance, consumer = random.Random(number), Consumer(tier, device)
            with device.stream():
                for step in range(12):
                    if step % 4 == 3:
                        together.wait(PATIENCE)
                    block = (number + step) % 3
                    ahead = (block + 1) % 3
                    tier.prefetch(ahead, keys(ahead, *chance.sample(range(4), 2)))
                    time.sleep(chance.choice([0.0, 0.001]))
                    consumer.run(block, chance.sample(range(4), chance.choice([1, 2, 2, 4])))
            return consumer.wrong()

        assert run_all([lambda n=n: caller(n) for n in range(5)]) == [0] * 5
        assert tier.stats().prefetched >= 3
        tier.close()
        check_integrity(tier)
        check_integrity(host)


# -- wishes ------------------------------------------------------------------------------------------------------------


def test_a_wish_that_the_host_can_meet_is_there_before_its_demand(tier: DeviceTier, device: FakeDevice) -> None:
    assert tier.absent(keys(0, 0, 1, 2)) == keys(0, 0, 1, 2), "it has none of them, whatever the host has"
    tier.prefetch(0, keys(0, 2, 1))
    promoted(tier, 2)
    assert tier.absent(keys(0, 0, 1, 2)) == keys(0, 0)
    consumer = Consumer(tier, device)
    consumer.run(0, [1, 2])
    assert consumer.wrong() == 0
    stats = tier.stats()
    assert (stats.hits, stats.misses, stats.prefetched, stats.useful, stats.late) == (2, 0, 2, 2, 0)
    assert stats.bytes_in == 2 * SIZE
    assert stats.saved_seconds > 0


def test_a_wish_goes_through_every_tier(tier: DeviceTier, host: HostTier, reader: GatedReader) -> None:
    """The host's own wish reads it; all of the block's, though the device takes some of them meanwhile."""
    list(host.acquire(keys(1, 0)))
    reader.shut()
    tier.prefetch(1, keys(1, 0, 1))
    wait_until(lambda: tier.absent(keys(1, 0, 1)) == keys(1, 1))
    assert tier.stats().prefetched == 1
    reader.open()
    promoted(tier, 2)
    assert host.stats().prefetched == 1
    assert tier.stats().ready == 2


def test_what_the_host_has_not_begun_is_wished_for_there_still(device: FakeDevice, reader: GatedReader) -> None:
    """Copying one record of a block cancels no request for the others."""
    with HostTier(reader, slots=ALL, loaders=1) as host:
        list(host.acquire(keys(0, 0)))
        reader.shut()
        with contextlib.closing(DeviceTier(host, PLAN, slots=ALL, device=device, promotes=True)) as tier:
            host.prefetch(1, keys(1, 0))
            reader.wait_begun(ExpertKey(1, 0))  # by the only loader
            tier.prefetch(0, keys(0, 0, 1))
            promoted(tier, 1)
            reader.open()
            promoted(tier, 2)


def test_nothing_is_promoted_unless_it_is_told_to(host: HostTier, device: FakeDevice) -> None:
    with contextlib.closing(DeviceTier(host, PLAN, slots={"records": 8}, device=device)) as tier:
        tier.prefetch(0, keys(0, 0))
        idle(tier)
        assert tier.absent(keys(0, 0)) == [], "the host has it"
        stats = tier.stats()
        assert (stats.ready, stats.prefetched) == (0, 0)


def test_a_demand_of_the_block_drops_its_wishes(tier: DeviceTier, device: FakeDevice, reader: GatedReader) -> None:
    reader.shut()
    tier.prefetch(1, keys(1, 0, 1))
    reader.wait_begun(ExpertKey(1, 0))
    reader.release(ExpertKey(1, 2))
    Consumer(tier, device).run(1, [2])
    reader.open()
    idle(tier)
    stats = tier.stats()
    assert (stats.prefetched, stats.dropped, stats.ready) == (0, 2, 1)


def test_the_latest_wishes_count(tier: DeviceTier, reader: GatedReader) -> None:
    reader.shut()
    tier.prefetch(1, keys(1, 0, 1))
    tier.prefetch(1, keys(1, 1, 2))
    reader.open()
    promoted(tier, 2)
    idle(tier)
    assert tier.absent(keys(1, 0, 1, 2, 3)) == keys(1, 0, 3)
    assert (tier.stats().prefetched, tier.stats().dropped) == (2, 1)


def test_wishes_that_never_come_true_are_not_looked_for_all_the_time(
    host: HostTier, device: FakeDevice, reader: GatedReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []
    pin = host.pin
    monkeypatch.setattr(host, "pin", lambda key: looks.append(time.monotonic()) or pin(key))
    monkeypatch.setattr(host, "prefetch", lambda block, wishes: None)  # it refuses
    with contextlib.closing(DeviceTier(host, PLAN, slots=ALL, device=device, promotes=True)) as tier:
        tier.prefetch(1, keys(1, 0))
        wait_until(lambda: len(looks) > 8)
        pauses = [after - before for before, after in itertools.pairwise(looks)]
        assert all(pause >= least for pause, least in zip(pauses[1:], PAUSES, strict=False)), pauses


# -- a demand goes first -----------------------------------------------------------------------------------------------


def test_nothing_is_promoted_while_a_demand_misses(
    tier: DeviceTier, host: HostTier, device: FakeDevice, reader: GatedReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[ExpertKey] = []
    pin = host.pin
    monkeypatch.setattr(host, "pin", lambda key: asked.append(key) or pin(key))
    reader.shut()
    consumer = Consumer(tier, device)
    demand = Task(lambda: consumer.run(1, [0]))
    reader.wait_begun(ExpertKey(1, 0))
    tier.prefetch(0, keys(0, 0, 1))  # the host has them
    idle(tier)
    assert (tier.stats().prefetched, asked) == (0, []), "nor is the host asked for it"
    reader.open()
    demand.result()
    promoted(tier, 2)
    assert consumer.wrong() == 0


def test_what_a_demand_has_brought_meanwhile_is_not_promoted(
    tier: DeviceTier, device: FakeDevice, reader: GatedReader
) -> None:
    reader.shut()
    consumer = Consumer(tier, device)
    demand = Task(lambda: consumer.run(1, [0]))
    reader.wait_begun(ExpertKey(1, 0))
    tier.prefetch(1, keys(1, 0))  # for its next turn
    reader.open()
    demand.result()
    idle(tier)
    stats = tier.stats()
    assert (stats.prefetched, stats.dropped, stats.bytes_in) == (0, 0, SIZE)
    assert consumer.wrong() == 0


def test_a_demand_that_comes_while_the_host_is_asked_goes_first(
    tier: DeviceTier, host: HostTier, device: FakeDevice, reader: GatedReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the lease is not kept meanwhile: the demand may need its slot."""
    reader.shut()
    consumer = Consumer(tier, device)
    demands: list[Task[None]] = []
    pin, is_asked = host.pin, threading.Event()

    def and_meanwhile(key: ExpertKey):  # type: ignore[no-untyped-def]
        if not demands:
            demands.append(Task(lambda: consumer.run(1, [0])))
            reader.wait_begun(ExpertKey(1, 0))
            is_asked.set()
        return pin(key)

    monkeypatch.setattr(host, "pin", and_meanwhile)
    tier.prefetch(0, keys(0, 3))
    assert is_asked.wait(PATIENCE)
    idle(tier)
    assert (tier.stats().prefetched, host.stats().leased) == (0, 0)
    reader.open()
    demands[0].result()
    promoted(tier, 1)
    assert consumer.wrong() == 0


def test_one_copy_is_under_way_at_most(tier: DeviceTier, device: FakeDevice) -> None:
    device.copy_may_end.clear()
    tier.prefetch(0, keys(0, 0, 1))
    wait_until(lambda: tier.stats().prefetched == 1)
    idle(tier)
    assert tier.stats().prefetched == 1
    assert sum(device.pending.values()) == 1
    device.copy_may_end.set()
    promoted(tier, 2)


def test_a_demand_joins_what_is_being_promoted(tier: DeviceTier, host: HostTier, device: FakeDevice) -> None:
    list(host.acquire(keys(1, 0, 1)))
    device.copy_may_begin.clear()
    tier.prefetch(0, keys(0, 1))
    wait_until(lambda: device.copying == 1)
    consumer = Consumer(tier, device)
    demand = Task(lambda: consumer.run(0, [1]))
    wait_until(lambda: sleeps(demand.thread))
    device.copy_may_begin.set()
    demand.result()
    assert consumer.wrong() == 0
    stats = tier.stats()
    assert (stats.misses, stats.joined, stats.late, stats.useful) == (1, 1, 1, 0)
    assert (stats.bytes_in, stats.ready) == (SIZE, 1)
    tier.prefetch(1, keys(1, 0, 1))
    promoted(tier, 3)
    assert tier.absent(keys(0, 1)) == []


# -- slots -------------------------------------------------------------------------------------------------------------


def test_wishes_take_their_own_blocks_slots_alone(tier: DeviceTier, host: HostTier, device: FakeDevice) -> None:
    """Of three blocks with eight slots."""
    consumer = Consumer(tier, device)
    for block in range(3):
        consumer.run(block, [0, 1])
    list(host.acquire(keys(2, 2, 3)))
    tier.prefetch(2, keys(2, 2, 3))
    promoted(tier, 2)
    assert tier.stats().evictions == 2
    assert tier.absent(keys(0, 0, 1)) == tier.absent(keys(1, 0, 1)) == [], "others keep what they have"
    consumer.run(2, [0, 1])  # they stand no longer, and were wrong
    stats = tier.stats()
    assert (stats.hits, stats.misses, stats.wasted, stats.useful) == (0, 8, 2, 0)
    assert consumer.wrong() == 0


def test_a_demand_evicts_what_is_wished_for_last(tier: DeviceTier, device: FakeDevice) -> None:
    consumer = Consumer(tier, device)
    for block in range(3):
        consumer.run(block, [0, 1])
    tier.prefetch(0, keys(0, 2, 3))
    promoted(tier, 2)
    consumer.run(1, [2, 3])
    assert tier.absent(keys(0, 2, 3)) == []
    consumer.run(0, [2, 3])
    assert tier.stats().useful == 2
    assert consumer.wrong() == 0


def test_what_is_held_is_not_evicted_by_a_wish(host: HostTier, device: FakeDevice) -> None:
    """At the smallest budget."""
    tier = DeviceTier(host, PLAN, slots=SMALLEST, device=device, promotes=True)
    consumer = Consumer(tier, device)
    consumer.run(0, [0, 1])
    holder = tier.acquire(keys(0, 0, 1))
    lease = next(holder)
    tier.prefetch(0, keys(0, 2, 3))
    idle(tier)
    stats = tier.stats()
    assert (stats.prefetched, stats.evictions, stats.dropped) == (0, 0, 2)
    device.compute(partial(consumer.look, lease))
    holder.close()
    assert consumer.wrong() == 0
    tier.close()


# -- what the host counts ----------------------------------------------------------------------------------------------


def guesses(host: HostTier) -> tuple[int, ...]:
    stats = host.stats()
    return stats.prefetched, stats.useful, stats.late, stats.wasted, stats.cancelled


def test_a_promotion_is_no_demand_of_the_host(host: HostTier, tier: DeviceTier) -> None:
    before, uses = host.stats(), host.uses.counts()
    tier.prefetch(0, keys(0, 0, 1))
    promoted(tier, 2)
    idle(tier)
    assert host.stats() == before
    assert host.uses.counts() == uses


def test_a_promotion_keeps_no_record_in_the_host(device: FakeDevice) -> None:
    with HostTier(RamReader(PLAN, RECORDS), slots={"records": 6}, policy="lru") as host:
        for expert in (0, 1):
            list(host.acquire(keys(0, expert)))
        with contextlib.closing(DeviceTier(host, PLAN, slots=ALL, device=device, promotes=True)) as tier:
            tier.prefetch(0, keys(0, 0))
            promoted(tier, 1)
        list(host.acquire(keys(0, 2)))
        assert host.absent(keys(0, 0, 1, 2)) == keys(0, 0), "it was used first"


def test_a_right_guess_is_useful_once_in_each_tier(tier: DeviceTier, host: HostTier, device: FakeDevice) -> None:
    misses = host.stats().misses
    tier.prefetch(1, keys(1, 0, 1))
    promoted(tier, 2)
    assert guesses(host) == (2, 0, 0, 0, 0), "nobody has used it yet"
    consumer = Consumer(tier, device)
    for _ in range(2):
        consumer.run(1, [0, 1])
        assert guesses(host) == (2, 2, 0, 0, 0)
        assert tier.stats().useful == 2
    assert host.stats().saved_seconds > 0
    assert (host.stats().hits, host.stats().misses) == (0, misses), "all demands were met on the device"


def test_a_right_guess_that_the_host_has_evicted_was_useful(device: FakeDevice, reader: GatedReader) -> None:
    with HostTier(reader, slots=SMALLEST) as host:
        tier = DeviceTier(host, PLAN, slots=ALL, device=device, promotes=True)
        tier.prefetch(1, keys(1, 0, 1))
        promoted(tier, 2)
        list(host.acquire(keys(2, 0, 1)))
        assert host.stats().evictions == 2
        assert guesses(host) == (2, 0, 0, 0, 0), "the device has it, and may use it"
        consumer = Consumer(tier, device)
        consumer.run(1, [1])
        assert guesses(host) == (2, 1, 0, 0, 0)
        list(host.acquire(keys(1, 0)))  # as if the device had it no more
        assert guesses(host) == (2, 1, 0, 1, 0), "it was read for nothing"
        assert consumer.wrong() == 0
        tier.close()


def test_what_the_device_has_no_slot_for_is_useful_in_the_host(host: HostTier, device: FakeDevice) -> None:
    with contextlib.closing(DeviceTier(host, PLAN, slots=SMALLEST, device=device, promotes=True)) as tier:
        consumer = Consumer(tier, device)
        consumer.run(0, [0, 1])
        with contextlib.closing(tier.acquire(keys(0, 0, 1))) as leases:
            next(leases)
            tier.prefetch(1, keys(1, 0, 1))
            wait_until(lambda: tier.stats().dropped == 2)
        hits = host.stats().hits
        consumer.run(1, [0, 1])
        assert guesses(host) == (2, 2, 0, 0, 0)
        assert (host.stats().hits - hits, tier.stats().useful) == (2, 0)
        assert consumer.wrong() == 0


def test_what_the_host_reads_is_not_joined(tier: DeviceTier, host: HostTier, reader: GatedReader) -> None:
    """So it is a wish's still: it stands back, can be cancelled, and others are promoted meanwhile."""
    reader.shut()
    tier.prefetch(1, keys(1, 0))
    reader.wait_begun(ExpertKey(1, 0))
    idle(tier)
    tier.prefetch(0, keys(0, 0, 1))
    promoted(tier, 2)
    assert host.stats().leased == 0
    tier.prefetch(1, [])
    reader.open()
    wait_until(lambda: host.stats().cancelled == 1 or host.stats().ready == 5)
    assert guesses(host) == (1, 0, 0, 0, 1)
    assert tier.stats().dropped == 1


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_copy_that_fails_leaves_nothing_behind(tier: DeviceTier, host: HostTier, device: FakeDevice) -> None:
    device.copy_error = RuntimeError("lost")
    tier.prefetch(0, keys(0, 0))
    wait_until(lambda: tier.stats().failures == 1)
    tier.prefetch(0, keys(0, 1))
    promoted(tier, 2)
    assert tier.stats().ready == 1
    wait_until(lambda: host.stats().leased == 0)
    consumer = Consumer(tier, device)
    consumer.run(0, [0, 1])
    assert consumer.wrong() == 0


def test_the_thread_survives_whatever_the_source_raises(
    tier: DeviceTier, host: HostTier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pin = host.pin

    def pin_or_fail(key: ExpertKey):  # type: ignore[no-untyped-def]
        if key.expert < 2:
            raise OSError(f"no descriptor for {key.expert}")
        return pin(key)

    monkeypatch.setattr(host, "pin", pin_or_fail)
    tier.prefetch(0, keys(0, 0, 1, 2))
    promoted(tier, 1)
    assert tier.absent(keys(0, 0, 1, 2)) == keys(0, 0, 1)
    assert tier.stats().dropped == 2, "they are given up"
    (record,) = caplog.records
    assert "OSError: no descriptor for 0" in record.getMessage()
    monkeypatch.undo()
    tier.prefetch(0, keys(0, 0, 1))
    promoted(tier, 3)


def test_a_record_that_cannot_be_read_is_wished_for_in_vain(
    tier: DeviceTier, device: FakeDevice, reader: GatedReader
) -> None:
    reader.broken.add(ExpertKey(1, 0))
    tier.prefetch(1, keys(1, 0, 1))
    wait_until(lambda: tier.absent(keys(1, 1)) == [])
    reader.broken.clear()
    tier.prefetch(1, keys(1, 0))
    promoted(tier, 2)


def test_a_record_that_was_replaced_is_not_kept(host: HostTier, device: FakeDevice) -> None:
    source = UnsteadySource(host, share=1.0)
    tier = DeviceTier(source, PLAN, slots={"records": 8}, device=device, promotes=True)
    tier.prefetch(0, keys(0, 0))
    wait_until(lambda: tier.stats().discarded == 1)
    source.share = 0.0
    consumer = Consumer(tier, device)
    consumer.run(0, [0])
    assert consumer.wrong() == 0
    stats = tier.stats()
    assert (stats.hits, stats.misses, stats.useful, stats.late) == (0, 1, 0, 0)
    tier.close()


def promoters() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "moetier-promoter"]


def test_close_ends_the_thread_and_waits_for_its_copy(host: HostTier, device: FakeDevice) -> None:
    tier = DeviceTier(host, PLAN, slots={"records": 8}, device=device, promotes=True)
    device.copy_may_begin.clear()
    tier.prefetch(0, keys(0, 0, 1, 2))
    wait_until(lambda: device.copying == 1)
    closer = Task(tier.close)
    wait_until(lambda: sleeps(closer.thread))
    assert device.locked
    device.copy_may_begin.set()
    closer.result()
    assert not device.locked
    assert not promoters()
    assert tier.stats().prefetched == 1
    tier.close()


def test_close_ends_the_thread_though_a_copy_has_failed(host: HostTier, device: FakeDevice) -> None:
    tier = DeviceTier(host, PLAN, slots={"records": 8}, device=device, promotes=True)
    tier.prefetch(0, keys(0, 0))
    promoted(tier, 1)
    list(tier.acquire(keys(1, 0)))
    device.wait_error = RuntimeError("CUDA error: unspecified launch failure")
    with pytest.raises(RuntimeError):
        tier.close()
    assert not promoters()
    tier.close()
    assert not device.locked


def test_a_source_that_was_closed_ends_it(host: HostTier, tier: DeviceTier, device: FakeDevice) -> None:
    device.copy_may_end.clear()
    tier.prefetch(0, keys(0, 0, 1))
    wait_until(lambda: tier.stats().prefetched == 1)
    host.close()
    device.copy_may_end.set()
    wait_until(lambda: not promoters())
    tier.close()
