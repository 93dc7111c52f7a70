"""Uses of records: what is counted, what they make of prefetches, and which record is evicted next."""

from __future__ import annotations

import time

from stores import keys

from moetier.tiers.cache.budget import Partition
from moetier.tiers.cache.policies import POLICIES
from moetier.tiers.cache.pool import SlotState
from moetier.tiers.host.demands import Pool, Purpose
from moetier.tiers.host.prefetch import PrefetchQueue
from moetier.tiers.host.uses import Uses
from moetier.tiers.layout import ExpertKey
from moetier.tiers.stats import TierCounters


class Tier:
    """One block with ``slots`` slots, in which the first experts are READY."""

    def __init__(self, slots: int = 3) -> None:
        self.pool = Pool([Partition((0,), slots)], POLICIES["lru"], first=0, slot_bytes=1)
        for key in keys(0, *range(slots)):
            self.fill(key)
        self.counters = TierCounters("host")
        self.prefetches = PrefetchQueue(self.counters, time.monotonic)
        self.uses = Uses([self.pool], self.counters, self.prefetches)

    def fill(self, key: ExpertKey) -> None:
        """Read a record into an EMPTY slot, or in place of the one that is evicted next."""
        slot = self.pool.vacancy(key.block)
        if slot is None:
            slot = self.pool.choose(key.block)
        assert slot is not None
        self.pool.begin_fill(slot, key)
        self.pool.complete_fill(slot)

    def prefetched(self, key: ExpertKey) -> None:
        self.prefetches.note_begun(key, Purpose.PREFETCH_REQUEST)
        self.prefetches.note_arrived(key)


def test_each_record_that_this_process_uses_is_a_hit_and_evicted_later() -> None:
    tier = Tier()
    tier.uses.note_found(0, [0, 1, 0])
    assert (tier.counters.snapshot().hits, tier.counters.snapshot().misses) == (2, 0)
    tier.fill(ExpertKey(0, 7))
    assert sorted(tier.pool.keys) == keys(0, 0, 1, 7), "2 was not used"


def test_a_touched_record_is_evicted_later_and_nothing_is_counted() -> None:
    tier = Tier()
    tier.prefetched(ExpertKey(0, 0))
    tier.prefetches.replace(tier.pool, 0, keys(0, 5), None)
    tier.uses.touch(0, [0, 1, 9])
    assert (tier.counters.snapshot().hits, tier.counters.snapshot().useful, tier.uses.counts()) == (0, 0, {})
    assert tier.prefetches.is_requested(ExpertKey(0, 5))
    tier.fill(ExpertKey(0, 7))
    assert sorted(tier.pool.keys) == keys(0, 0, 1, 7), "2 was not touched, and 9 is absent"


def test_a_record_that_was_evicted_since_is_a_hit_all_the_same() -> None:
    tier = Tier()
    tier.fill(ExpertKey(0, 7))
    tier.uses.note_found(0, [0, 1])
    assert tier.counters.snapshot().hits == 2
    tier.uses.note_client([ExpertKey(0, 0)])
    assert tier.counters.snapshot().hits == 3
    assert tier.pool.state_of(ExpertKey(0, 0)) is not SlotState.READY


def test_discarded_hits_are_counted_apart_and_no_count_falls() -> None:
    tier = Tier()
    tier.uses.note_found(0, [0, 1, 2])
    before = tier.uses.counts()
    tier.uses.note_discarded([0, 2, 2])
    assert (tier.counters.snapshot().hits, tier.counters.snapshot().discarded) == (3, 2)
    assert tier.uses.counts() == before, "what is saved for the warm-up never falls"


def test_a_hit_makes_a_prefetch_useful_and_ends_the_requests_of_its_block() -> None:
    for use in (
        lambda tier: tier.uses.note_found(0, [1]),
        lambda tier: tier.uses.note_client([ExpertKey(0, 1)]),
        lambda tier: tier.uses.note_copies(keys(0, 1)),
    ):
        tier = Tier()
        tier.prefetched(ExpertKey(0, 1))
        use(tier)
        use(tier)
        assert (tier.counters.snapshot().useful, tier.counters.snapshot().late) == (1, 0)
    tier = Tier()
    tier.prefetches.replace(tier.pool, 0, keys(0, 5), None)
    tier.uses.note_found(0, [1])
    assert not tier.prefetches.is_requested(ExpertKey(0, 5))


def test_uses_of_all_callers_are_counted() -> None:
    tier = Tier()
    tier.uses.note_found(0, [0, 1])
    tier.uses.note_client([ExpertKey(0, 1)])
    tier.uses.note_copies(keys(0, 1, 6))
    assert tier.uses.counts() == {(0, 0): 1, (0, 1): 3, (0, 6): 1}
    assert tier.counters.snapshot().hits == 3, "those of the tier above are hits of that tier"
