"""The slots of a host tier: a pool for each record layout."""

from __future__ import annotations

from ledgers import MANIFEST

from moetier.tiers.arena.layout import ArenaLayout
from moetier.tiers.host.slots import HostSlots
from moetier.tiers.layout import ExpertKey, PoolSlot, TierSlot


def slots_of(**counts: int) -> HostSlots:
    return HostSlots(MANIFEST, ArenaLayout.of(MANIFEST, counts), "lrfu")


def test_records_of_a_reclaimed_arena_are_ready_and_others_are_not() -> None:
    slots = slots_of(big=3, small=4)
    block, key = next(
        (block, ExpertKey(block, 1)) for block, each in enumerate(MANIFEST.blocks) if each.array == "small"
    )
    slots.recover({TierSlot(3 + 2): key})
    assert slots.is_ready(key)
    assert slots.slot_of(key) == 2, "numbered within its pool"
    assert not slots.is_ready(ExpertKey(block, 0))
    assert slots.slot_of(ExpertKey(block, 0)) is None
    assert slots.contents() == [(None, False)] * 5 + [(key, False)] + [(None, False)]


def test_each_pool_divides_its_own_slots_among_its_blocks() -> None:
    slots = slots_of(big=3, small=4)
    for array, count in (("big", 3), ("small", 4)):
        quotas = [quota for quota, block in zip(slots.quotas(), MANIFEST.blocks, strict=True) if block.array == array]
        assert 0 < max(quotas) <= count
    assert slots.starved() == []


def test_a_repair_frees_what_no_load_fills_and_no_demand_holds() -> None:
    slots = slots_of(big=3, small=4)
    key = next(ExpertKey(block, 0) for block, each in enumerate(MANIFEST.blocks) if each.array == "small")
    pool = slots.pools["small"]
    pool.begin_fill(PoolSlot(3 - pool.first), key)
    assert slots.contents()[3] == (key, True)
    slots.repair([], [])
    assert slots.contents() == [(None, False)] * 7
