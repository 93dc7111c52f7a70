from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from integrity import check_pool
from stores import make_plan
from two_layouts import two_layouts

from moetier.tiers.cache.budget import Partition, partitions_of, slot_ranges, slots_for, smallest_budget
from moetier.tiers.cache.policies import DEFAULT_POLICY, POLICIES, Policy
from moetier.tiers.cache.pool import SlotPool
from moetier.tiers.errors import BudgetError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Block, Manifest


def cost(manifest: Manifest, slots: dict[str, int]) -> int:
    return sum(manifest.layouts[name].slot_bytes * count for name, count in slots.items())


def test_one_layout() -> None:
    plan = make_plan(blocks=3, experts=4, top_k=2)
    slot = plan.layouts["records"].slot_bytes
    assert smallest_budget(plan) == 2 * slot, "exactly one block's top-k records"
    assert plan.stored_bytes == 12 * slot
    assert slots_for(plan, 2 * slot) == {"records": 2}
    assert slots_for(plan, 5 * slot - 1) == {"records": 4}
    assert slots_for(plan, 12 * slot) == {"records": 12}
    assert slots_for(plan, 1 << 50) == {"records": 12}, "one slot for each record at most"


def test_two_layouts() -> None:
    plan = two_layouts()
    assert slot_ranges(plan) == {"big": (3, 8), "small": (2, 12)}
    assert plan.members["big"].keys() == {0, 2}
    smallest, largest = smallest_budget(plan), plan.stored_bytes
    assert slots_for(plan, smallest) == {"big": 3, "small": 2}
    assert slots_for(plan, largest) == {"big": 8, "small": 12}
    middle = slots_for(plan, (smallest + largest) // 2)
    assert 3 < middle["big"] < 8
    assert 2 < middle["small"] < 12


@pytest.mark.parametrize("plan", [make_plan(), two_layouts()], ids=["one", "two"])
def test_too_small_is_refused_with_what_works(plan: Manifest) -> None:
    with pytest.raises(BudgetError) as caught:
        slots_for(plan, smallest_budget(plan) - 1)
    assert f"{smallest_budget(plan) - 1:,}" in caught.value.cause
    assert f"{smallest_budget(plan):,}" in caught.value.fix
    assert f"{plan.stored_bytes:,}" in caught.value.fix


@given(st.data(), st.sampled_from([make_plan(), two_layouts()]))
def test_a_budget_is_never_exceeded_and_never_wasted(data: st.DataObject, plan: Manifest) -> None:
    budget = data.draw(st.integers(smallest_budget(plan), plan.stored_bytes + 10_000))
    slots = dict(slots_for(plan, budget))
    assert cost(plan, slots) <= budget
    for name, (least, most) in slot_ranges(plan).items():
        assert least <= slots[name] <= most
        assert slots[name] == most or cost(plan, slots) + plan.layouts[name].slot_bytes > budget


def blocks_of(*shapes: tuple[int, int]) -> dict[int, Block]:
    """Make blocks of (experts, top_k). Their numbers have gaps, like those of one record layout among several."""
    return {3 * i: Block(f"layers.{i}", "records", i, experts, k) for i, (experts, k) in enumerate(shapes)}


SHAPES = st.lists(
    st.integers(1, 12).flatmap(lambda experts: st.tuples(st.just(experts), st.integers(1, experts))),
    min_size=1,
    max_size=6,
)


@st.composite
def planned(draw: st.DrawFn) -> tuple[dict[int, Block], int]:
    blocks = blocks_of(*draw(SHAPES))
    least = max(block.top_k for block in blocks.values())
    return blocks, draw(st.integers(least, sum(block.experts for block in blocks.values())))


@given(planned())
def test_every_plan_adds_up(plan: tuple[dict[int, Block], int]) -> None:
    blocks, slots = plan
    partitions = partitions_of(slots, blocks)
    assert sum(partition.quota for partition in partitions) == slots
    assert sorted(block for partition in partitions for block in partition.blocks) == sorted(blocks)
    for partition in partitions:
        assert partition.quota >= max(blocks[block].top_k for block in partition.blocks)
        assert partition.quota <= sum(blocks[block].experts for block in partition.blocks) or len(partition.blocks) > 1
    enough = slots >= sum(block.top_k for block in blocks.values())
    assert all(len(partition.blocks) == 1 for partition in partitions) or not enough
    if enough:  # as even as top-k and the number of experts allow
        quotas = {partition.blocks[0]: partition.quota for partition in partitions}
        for low in blocks:
            for high in blocks:
                if quotas[low] + 1 < quotas[high]:
                    assert quotas[low] == blocks[low].experts or quotas[high] == blocks[high].top_k


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        (2, [((0, 3, 6, 9), 2)]),
        (3, [((0, 3, 6, 9), 3)]),
        (4, [((0,), 2), ((3, 6, 9), 2)]),
        (5, [((0,), 2), ((3, 6, 9), 3)]),
        (7, [((0,), 2), ((3,), 2), ((6, 9), 3)]),
        (8, [((0,), 2), ((3,), 2), ((6,), 2), ((9,), 2)]),
        (10, [((0,), 3), ((3,), 3), ((6,), 2), ((9,), 2)]),
        (32, [((0,), 8), ((3,), 8), ((6,), 8), ((9,), 8)]),
    ],
)
def test_quotas_of_four_equal_blocks(slots: int, expected: list[tuple[tuple[int, ...], int]]) -> None:
    assert partitions_of(slots, blocks_of(*[(8, 2)] * 4)) == tuple(Partition(*partition) for partition in expected)


def test_quotas_of_unequal_blocks() -> None:
    # the block of 2 experts can use no more: what it leaves goes to the others
    assert [g.quota for g in partitions_of(14, blocks_of((2, 1), (8, 2), (8, 2)))] == [2, 6, 6]
    # top-6 needs its six, however few the others get
    assert [g.quota for g in partitions_of(9, blocks_of((8, 1), (8, 1), (8, 6)))] == [2, 1, 6]
    # too few: the blocks that need least keep theirs, and room for the greatest top-k is left
    assert partitions_of(7, blocks_of((8, 6), (8, 1), (8, 2))) == (Partition((3,), 1), Partition((0, 6), 6))


@pytest.mark.parametrize("slots", [1, 17])
def test_impossible_numbers_of_slots_are_ours_to_prevent(slots: int) -> None:
    with pytest.raises(AssertionError):
        partitions_of(slots, blocks_of((8, 2), (8, 2)))


class Cache:
    """Drive a pool as a tier does, with loads that are done at once."""

    def __init__(
        self, count: int, blocks: Mapping[int, Block], make_policy: Callable[[int], Policy] = POLICIES[DEFAULT_POLICY]
    ) -> None:
        self.partitions = partitions_of(count, blocks)
        self.pool = SlotPool(self.partitions, make_policy)

    def demand(self, block: int, experts: Iterable[int]) -> int:
        """Return the number of hits."""
        keys = [ExpertKey(block, expert) for expert in experts]
        slots = {key: slot for key in keys if (slot := self.pool.pin_ready(key)) is not None}
        hits = len(slots)
        for key in keys:
            if key not in slots:
                slot = self.pool.choose(block)
                assert slot is not None
                self._fill(slot, key)
                self.pool.pin(slot)
                slots[key] = slot
        self.pool.partitions.touch(reversed(keys))
        for slot in slots.values():
            self.pool.unpin(slot)
        check_pool(self.pool)
        return hits

    def prefetch(self, block: int, expert: int) -> None:
        key = ExpertKey(block, expert)
        if self.pool.slot_of(key) is None and (slot := self.pool.choose(block)) is not None:
            self._fill(slot, key, is_prefetch=True)
        check_pool(self.pool)

    def _fill(self, slot: int, key: ExpertKey, *, is_prefetch: bool = False) -> None:
        self.pool.begin_fill(slot, key, is_prefetch=is_prefetch)
        self.pool.complete_fill(slot)

    def resident(self, blocks: Iterable[int]) -> set[ExpertKey]:
        return {key for key in self.pool.keys if key.block in blocks}


class Oracle:
    """Model one least-recently-used cache per partition: look up against the state before, then touch from the last."""

    def __init__(self, partitions: Iterable[Partition]) -> None:
        self.of = {}
        for partition in partitions:
            cache: OrderedDict[ExpertKey, None] = OrderedDict()
            for block in partition.blocks:
                self.of[block] = (cache, partition.quota)

    def demand(self, block: int, experts: Iterable[int]) -> int:
        cache, quota = self.of[block]
        keys = [ExpertKey(block, expert) for expert in experts]
        hits = sum(key in cache for key in keys)
        for key in reversed(keys):
            cache[key] = None
            cache.move_to_end(key)
            if len(cache) > quota:
                cache.popitem(last=False)
        return hits

    def resident(self) -> set[ExpertKey]:
        return {key for cache, _ in self.of.values() for key in cache}


@settings(max_examples=60)
@given(planned(), st.data())
def test_it_is_a_least_recently_used_cache_block_by_block(
    plan: tuple[dict[int, Block], int], data: st.DataObject
) -> None:
    blocks, slots = plan
    cache = Cache(slots, blocks, POLICIES["lru"])
    oracle = Oracle(cache.partitions)
    for _ in range(data.draw(st.integers(1, 40))):
        block = data.draw(st.sampled_from(sorted(blocks)))
        experts = data.draw(
            st.lists(st.integers(0, blocks[block].experts - 1), min_size=1, max_size=blocks[block].top_k, unique=True)
        )
        assert cache.demand(block, experts) == oracle.demand(block, experts)
        assert cache.resident(blocks) == oracle.resident()


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=40)
@given(planned(), st.data())
def test_a_prefetch_evicts_its_own_blocks_next_and_goes_first_itself(
    policy: str, plan: tuple[dict[int, Block], int], data: st.DataObject
) -> None:
    """A right prediction evicts what the demand would have evicted, wrong ones cost one record."""
    blocks, slots = plan
    cache = Cache(slots, blocks, POLICIES[policy])
    for _ in range(data.draw(st.integers(1, 40))):
        block = data.draw(st.sampled_from(sorted(blocks)))
        expert = data.draw(st.integers(0, blocks[block].experts - 1))
        before = cache.resident(blocks)
        if data.draw(st.booleans()):
            cache.demand(block, [expert])
            continue
        cache.prefetch(block, expert)
        lost = before - cache.resident(blocks)
        partition = next(partition for partition in cache.partitions if block in partition.blocks)
        assert len(lost) <= 1
        assert all(key.block in partition.blocks for key in lost)
        if lost:  # the partition was full: the prefetch is the next to go
            assert cache.pool.choose(block) == cache.pool.slot_of(ExpertKey(block, expert))


@pytest.mark.parametrize(("per_block", "expected"), [(2, 0.249), (3, 0.374), (4, 0.498), (8, 1.0)])
def test_hit_ratio_of_uniform_routing(per_block: int, expected: float) -> None:
    """With k of 8 experts of each block cached and two used per token, the hit ratio is k/8 after the cold start."""
    blocks = blocks_of(*[(8, 2)] * 4)
    cache = Cache(per_block * 4, blocks)
    chance = random.Random(0)
    hits = sum(cache.demand(b, sorted(chance.sample(range(8), 2))) for _ in range(1000) for b in blocks)
    assert hits / (1000 * 4 * 2) == pytest.approx(expected, abs=0.01)


def test_hit_ratio_of_sticky_routing_beats_chance() -> None:
    """Keeping recent experts pays where a token often uses those of the token before."""
    blocks = blocks_of(*[(8, 2)] * 4)
    cache, chance = Cache(8, blocks), random.Random(0)
    last, hits = {block: [0, 1] for block in blocks}, 0
    for _ in range(1000):
        for block in blocks:
            if chance.random() < 0.5:
                last[block] = sorted(chance.sample(range(8), 2))
            hits += cache.demand(block, last[block])
    assert hits / 8000 == pytest.approx(0.5 + 0.5 * 0.25, abs=0.02)


def test_with_fewer_slots_than_one_token_needs_the_kept_blocks_still_hit() -> None:
    """A global LRU of the same size hits nothing: at each block's turn the others have evicted its records."""
    blocks = blocks_of(*[(8, 2)] * 4)
    cache = Cache(6, blocks)
    everyone: OrderedDict[ExpertKey, None] = OrderedDict()
    hits, global_hits = 0, 0
    for _ in range(10):
        for block in blocks:
            hits += cache.demand(block, [0, 1])
            for key in (ExpertKey(block, 0), ExpertKey(block, 1)):
                global_hits += key in everyone
                everyone[key] = None
                everyone.move_to_end(key)
                if len(everyone) > 6:
                    everyone.popitem(last=False)
    assert global_hits == 0
    assert hits == 2 * 2 * 9, "two blocks of four keep their two, from the second token on"
