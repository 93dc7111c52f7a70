"""Partitions: their quotas, what they lend, and the order in which their records are evicted."""

from __future__ import annotations

from stores import keys

from moetier.tiers.cache.budget import Partition
from moetier.tiers.cache.policies import POLICIES, Partitions
from moetier.tiers.layout import ExpertKey


def two(**held: int) -> Partitions:
    """Block 0 with a quota of 2, and blocks 1 and 2 with one of 3; each block holds its first experts."""
    partitions = Partitions([Partition((0,), 2), Partition((1, 2), 3)], POLICIES["lru"])
    for block, count in held.items():
        for key in keys(int(block.removeprefix("b")), *range(count)):
            partitions.add(key)
    return partitions


def test_blocks_of_a_partition_share_its_quota() -> None:
    partitions = two(b1=2)
    assert partitions.slot_count == 5
    assert [partitions.quota(block) for block in range(3)] == [2, 3, 3]
    assert partitions.has_room(2)
    partitions.add(ExpertKey(2, 0))
    assert not partitions.has_room(1)
    assert [*partitions.victims(2)] == [*keys(1, 0, 1), ExpertKey(2, 0)]


def test_what_is_used_is_evicted_later_and_what_is_prefetched_first() -> None:
    partitions = two(b0=2)
    partitions.touch(keys(0, 0))
    partitions.add(ExpertKey(0, 7), is_prefetch=True)
    assert [*partitions.victims(0)] == keys(0, 7, 1, 0)
    partitions.remove(ExpertKey(0, 7))
    assert [*partitions.victims(0)] == keys(0, 1, 0)


def test_a_partition_above_its_quota_gives_back_first() -> None:
    partitions = two(b0=2, b1=2)
    assert [*partitions.borrowed()] == []
    partitions = two(b0=4, b1=4)
    assert [*partitions.borrowed()] == [*partitions.all_victims()] == [*keys(0, *range(4)), *keys(1, *range(4))]


def test_a_repair_leaves_the_keys_with_slots() -> None:
    partitions = two(b0=2, b1=1)
    partitions.repair([*keys(0, 1, 3), ExpertKey(2, 0)])
    assert [*partitions.all_victims()] == [*keys(0, 1, 3), ExpertKey(2, 0)]
