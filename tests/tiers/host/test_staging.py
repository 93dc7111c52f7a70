"""Wishes that are read beside the slots."""

from __future__ import annotations

import mmap
import random
import time
from collections.abc import Iterator
from math import inf
from pathlib import Path

import pytest
from faults import flip_bit
from geometries import two_geometries
from hypothesis import given
from hypothesis import strategies as st
from readers import GatedReader, RamReader
from stores import keys, make_plan, make_records, write_store
from threads import Task, wait_until
from tier_states import is_closed

from moetier.tiers.cache.budget import slots_for, smallest_budget
from moetier.tiers.errors import BudgetError, ChecksumError, MissingExpertError, StoreReadError
from moetier.tiers.host import prefetch, staging
from moetier.tiers.host.staging import BUFFERS, LEAST_BYTES, PIECES, SHARE, StagingBuffers, buffer_bytes, piece_bytes
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import PAGE, ExpertKey
from moetier.tiers.source import StagedPrefix
from moetier.tiers.store.folder import GROUP
from moetier.tiers.store.reader import ExpertStore
from moetier.tiers.store.shard import ShardFile

PLAN = make_plan(blocks=3, experts=4, top_k=2)
RECORDS = make_records(PLAN)
SLOT = PLAN.layouts["records"].slot_bytes
PIECE = piece_bytes(SLOT, None)
REQUESTED = ExpertKey(0, 2)


def take(tier: HostTier, block: int, *experts: int) -> list[ExpertKey]:
    arrived = []
    for lease in tier.acquire(keys(block, *experts)):
        assert bytes(lease.record) == RECORDS[lease.key]
        arrived.append(lease.key)
    tier.check_integrity()
    return arrived


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """These records are read in no time, and would have no staging buffers, nor pieces."""
    monkeypatch.setattr(prefetch, "QUICK_SECONDS", 0.0)
    monkeypatch.setattr(staging, "PIECE_SECONDS", 0.0)


@pytest.fixture
def gate() -> Iterator[GatedReader]:
    reader = GatedReader(PLAN, RECORDS, in_parts=True)
    yield reader
    reader.open()


@pytest.fixture
def tier(gate: GatedReader) -> Iterator[HostTier]:
    """Whose slots are full: two of each block, which have experts 0 and 1."""
    with HostTier(gate, slots={"records": 6}, loaders=2) as tier:
        fill(gate, tier)
        yield tier
        gate.open()


def fill(gate: GatedReader, tier: HostTier) -> None:
    gate.open()
    for block in range(3):
        take(tier, block, 0, 1)
    gate.shut()


def both_are_free(gate: GatedReader, tier: HostTier) -> bool:
    """Whether two prefetches of block 1, which is all requested and so finds no slot, fill both buffers."""
    gate.open()
    expected = tier.stats().bytes_in + 2 * buffer_bytes(SLOT)
    tier.prefetch(1, keys(1, 0, 1, 2, 3))
    wait_until(lambda: tier.stats().bytes_in >= expected)
    tier.check_integrity()
    return tier.stats().bytes_in == expected


def everything(tier: HostTier) -> bool:
    """Whether all is there that was."""
    return not any(tier.absent(keys(block, 0, 1)) for block in range(3))


@given(st.integers(1, 1 << 20), st.none() | st.floats(1e-6, 10))
def test_staging_buffers_and_pieces_are_of_whole_pages(pages: int, seconds: float | None) -> None:
    slot = pages * PAGE
    head, piece = buffer_bytes(slot), piece_bytes(slot, seconds)
    assert head % PAGE == piece % PAGE == 0
    assert head == slot if slot <= LEAST_BYTES else LEAST_BYTES <= head <= max(LEAST_BYTES, slot // SHARE + PAGE)
    assert piece_bytes(slot, None) <= piece <= head <= PIECES * piece


def test_a_piece_takes_a_millisecond_where_a_quarter_of_a_head_takes_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    slot = 64 << 20  # a head is 4 MiB
    assert piece_bytes(slot, 0.064) == 1 << 20
    assert piece_bytes(slot, 0.032) == 2 << 20
    assert piece_bytes(slot, 0.004) == 4 << 20


def test_what_is_read_quickly_goes_into_a_slot_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = RamReader(PLAN, RECORDS, in_parts=True)
    with HostTier(reader, slots={"records": 6}) as tier:
        for block in range(3):
            take(tier, block, 0, 1)
        monkeypatch.setattr(prefetch, "QUICK_SECONDS", inf)
        tier.prefetch(0, [REQUESTED])
        wait_until(lambda: not tier.absent([REQUESTED]))
        assert not reader.parts_read


def test_a_demand_reads_the_rest_while_the_piece_before_it_is_read(gate: GatedReader, tier: HostTier) -> None:
    tier.prefetch(0, [REQUESTED])
    gate.release(REQUESTED)
    wait_until(lambda: gate.parts_read == [(REQUESTED, 0, PIECE)])
    gate.wait_begun(REQUESTED)
    assert everything(tier), "a prefetch evicts nothing yet"
    demand = Task(lambda: take(tier, 0, 2))
    wait_until(lambda: gate.begun == [REQUESTED, REQUESTED])
    gate.open()
    assert demand.result() == [REQUESTED]
    assert gate.parts_read == [(REQUESTED, 0, PIECE), (REQUESTED, PIECE, 2 * PIECE)], "the rest is of one piece"
    stats = tier.stats()
    assert (stats.prefetched, stats.late, stats.useful, stats.cancelled) == (1, 1, 0, 0)
    assert (stats.misses, stats.joined) == (7, 1), "seven records were read"
    assert stats.saved_seconds > 0
    assert both_are_free(gate, tier)


def test_a_wrong_prediction_costs_no_record(gate: GatedReader, tier: HostTier) -> None:
    tier.prefetch(0, [REQUESTED])
    gate.wait_begun(REQUESTED)
    hits = tier.stats().hits
    take(tier, 0, 0, 1)
    gate.open()
    wait_until(lambda: not gate.begun)
    for block in range(3):
        take(tier, block, 0, 1)
    assert tier.stats().hits == hits + 8
    assert gate.parts_read == [(REQUESTED, 0, PIECE)], "it is not requested any more"
    assert not gate.reads[REQUESTED]


def test_what_was_read_for_a_wrong_prediction_is_there_for_a_later_one_or_makes_room(
    gate: GatedReader, tier: HostTier
) -> None:
    tier.prefetch(0, [REQUESTED])
    gate.wait_begun(REQUESTED)
    take(tier, 0, 0, 1)
    gate.release(REQUESTED)
    wait_until(lambda: len(gate.parts_read) == 1)
    tier.prefetch(0, [REQUESTED])
    gate.release(REQUESTED)
    wait_until(lambda: gate.parts_read[1:] == [(REQUESTED, PIECE, 2 * PIECE)])
    gate.wait_begun(REQUESTED)
    take(tier, 0, 0, 1)
    gate.open()
    wait_until(lambda: not gate.begun)
    assert tier.stats().cancelled == 0
    tier.prefetch(1, keys(1, 2, 3))
    wait_until(lambda: not tier.absent(keys(1, 2)))
    assert tier.stats().cancelled == 1


def test_what_is_read_to_its_end_goes_into_a_slot(gate: GatedReader, tier: HostTier) -> None:
    gate.open()
    tier.prefetch(0, [REQUESTED])
    wait_until(lambda: not tier.absent([REQUESTED]))
    tier.check_integrity()
    assert [part[1] for part in gate.parts_read] == [*range(0, SLOT, PIECE)]
    assert len(tier.absent(keys(0, 0, 1))) == 1, "which was its block's"
    assert take(tier, 0, 2) == [REQUESTED]
    stats = tier.stats()
    assert (stats.prefetched, stats.useful, stats.late, stats.joined) == (1, 1, 0, 0)


def test_more_prefetches_than_staging_buffers_all_come(gate: GatedReader) -> None:
    with HostTier(gate, slots={"records": 12 - 2}, loaders=4) as tier:
        gate.open()
        for block in range(3):
            take(tier, block, *range(4 if block < 1 else 3))
        assert BUFFERS < 3
        tier.prefetch(1, keys(1, 3))
        tier.prefetch(2, keys(2, 3))
        tier.prefetch(0, keys(0, 3))
        wait_until(lambda: not any(tier.absent(keys(block, 3)) for block in range(3)))


def test_no_piece_is_read_while_a_demand_is(gate: GatedReader, tier: HostTier) -> None:
    demand = Task(lambda: take(tier, 1, 2))
    gate.wait_begun(*keys(1, 2))
    tier.prefetch(0, [REQUESTED])
    take(tier, 2, 0, 1)  # the loaders have come by
    assert gate.begun == keys(1, 2)
    gate.release(ExpertKey(1, 2))
    demand.result()
    gate.wait_begun(REQUESTED)
    demand = Task(lambda: take(tier, 1, 3))
    gate.wait_begun(*keys(1, 3))
    gate.release(REQUESTED)
    wait_until(lambda: gate.begun == keys(1, 3))
    assert gate.parts_read == [(REQUESTED, 0, PIECE)]
    gate.release(ExpertKey(1, 3))
    demand.result()
    gate.wait_begun(REQUESTED)


def test_a_piece_that_fails_is_nobodys_but_its_demand_s(gate: GatedReader, tier: HostTier) -> None:
    gate.open()
    gate.broken.add(REQUESTED)
    tier.prefetch(0, [REQUESTED])
    wait_until(lambda: tier.stats().failures == 1)
    assert everything(tier)
    with pytest.raises(StoreReadError):
        take(tier, 0, 2)
    gate.broken.clear()
    assert take(tier, 0, 2) == [REQUESTED]


def test_a_demand_that_waits_for_a_piece_gets_its_error(gate: GatedReader, tier: HostTier) -> None:
    tier.prefetch(0, [REQUESTED])
    gate.wait_begun(REQUESTED)
    demand = Task(lambda: take(tier, 0, 2))
    wait_until(lambda: gate.begun == [REQUESTED, REQUESTED])
    gate.broken.add(REQUESTED)
    gate.open()
    with pytest.raises(StoreReadError):
        demand.result()
    gate.broken.clear()
    tier.check_integrity()
    assert take(tier, 0, 2) == [REQUESTED]
    assert both_are_free(gate, tier)


def test_closing_waits_for_a_piece(gate: GatedReader) -> None:
    tier = HostTier(gate, slots={"records": 6}, loaders=2)
    fill(gate, tier)
    tier.prefetch(0, [REQUESTED])
    gate.wait_begun(REQUESTED)
    closing = Task(tier.close)
    wait_until(lambda: is_closed(tier))
    time.sleep(0.02)
    assert closing.thread.is_alive()
    gate.open()
    closing.result()
    assert gate.parts_read == [(REQUESTED, 0, PIECE)]


def test_of_a_reader_that_reads_whole_records_they_go_into_slots_at_once() -> None:
    with HostTier(RamReader(PLAN, RECORDS), slots={"records": 6}) as tier:
        for block in range(3):
            take(tier, block, 0, 1)
        tier.prefetch(0, [REQUESTED])
        wait_until(lambda: not tier.absent([REQUESTED]))
        assert len(tier.absent(keys(0, 0, 1))) == 1


def test_what_is_full_and_finds_no_slot_is_in_nobodys_way(gate: GatedReader, tier: HostTier) -> None:
    """All of a block is requested, so that none of it may go; less of others is."""
    gate.open()
    assert both_are_free(gate, tier)
    assert everything(tier)
    tier.prefetch(0, [REQUESTED])
    wait_until(lambda: not tier.absent([REQUESTED]))
    assert tier.stats().cancelled == 1
    tier.check_integrity()


def test_what_is_full_goes_into_a_slot_when_one_is_given_back(gate: GatedReader, tier: HostTier) -> None:
    gate.open()
    held = [tier.acquire(keys(0, expert)) for expert in (0, 1)]
    for leases in held:
        next(leases)
    before = tier.stats().bytes_in
    tier.prefetch(0, [REQUESTED])
    wait_until(lambda: tier.stats().bytes_in == before + buffer_bytes(SLOT))
    assert tier.absent([REQUESTED])
    held.pop().close()
    wait_until(lambda: not tier.absent([REQUESTED]))
    held.pop().close()


def test_bytes_are_counted_once_and_wrong_ones_too(gate: GatedReader, tier: HostTier) -> None:
    gate.open()
    before = tier.stats().bytes_in
    gate.shut()
    tier.prefetch(0, [REQUESTED])
    gate.wait_begun(REQUESTED)
    take(tier, 0, 0, 1)  # it was wrong
    gate.release(REQUESTED)
    wait_until(lambda: tier.stats().bytes_in == before + PIECE)
    gate.open()
    take(tier, 0, 2)
    assert tier.stats().bytes_in == before + SLOT


def test_a_head_that_can_not_be_had_is_an_error_of_the_budget() -> None:
    with pytest.raises(BudgetError, match="beside the slots"):
        StagingBuffers(1 << 60)


# -- the real store ----------------------------------------------------------------------------------------------------


def test_staging_buffers_over_a_store_of_two_geometries(tmp_path: Path) -> None:
    plan = two_geometries()
    records = make_records(plan)
    write_store(tmp_path, plan, records)
    with (
        ExpertStore.open(tmp_path) as store,
        HostTier(store, slots=slots_for(plan, smallest_budget(plan))) as tier,
    ):
        chance = random.Random(1)
        for _ in range(300):
            block = chance.randrange(len(plan.blocks))
            requested, wanted = (chance.sample(range(4), 2) for _ in range(2))
            tier.prefetch(block, keys(block, *requested))
            time.sleep(chance.choice((0, 0, 1e-4, 1e-3)))
            if chance.random() < 0.7:
                wanted = requested
            for lease in tier.acquire(keys(block, *wanted)):
                assert bytes(lease.record) == records[lease.key]
        tier.check_integrity()
        stats = tier.stats()
        assert stats.late + stats.useful > 50
        assert stats.bytes_in > 0


def test_a_bit_that_flipped_in_a_head_is_noticed_and_named_once(tmp_path: Path) -> None:
    write_store(tmp_path, PLAN, RECORDS)
    flip_bit(ShardFile.of(tmp_path / GROUP, PLAN, 0).path, 2 * SLOT + 5)
    with ExpertStore.open(tmp_path) as store, HostTier(store, slots={"records": 6}, loaders=2) as tier:
        for block in range(3):
            take(tier, block, 0, 1)
        before = tier.stats().bytes_in
        tier.prefetch(0, [REQUESTED])
        wait_until(lambda: tier.stats().bytes_in > before or tier.stats().failures > 0)
        with pytest.raises(ChecksumError) as caught:
            take(tier, 0, 2)
        assert str(caught.value).count("expert 2") == 1


def test_a_read_that_fails_in_a_head_is_named_once(tmp_path: Path) -> None:
    write_store(tmp_path, PLAN, RECORDS)
    with ExpertStore.open(tmp_path) as store:

        def copy(view: memoryview) -> None:
            raise StoreReadError("the disk is broken.", "Mend it.")

        slot = memoryview(mmap.mmap(-1, SLOT))
        with pytest.raises(StoreReadError) as caught:
            store.read_rest(REQUESTED, slot, StagedPrefix(PIECE, copy))
        assert str(caught.value).count("expert 2") == 1
        with pytest.raises(MissingExpertError) as missing:
            store.read_part(ExpertKey(0, 4), 0, slot[:PIECE])
        assert str(missing.value).count("expert 4") == 1
