from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier.tiers.cache.orders import DEFAULT_ORDER, ORDERS, Order
from moetier.tiers.cache.quotas import BlockPolicy, Group, plan_groups
from moetier.tiers.cache.slots import Slots
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Block


def blocks_of(*shapes: tuple[int, int]) -> dict[int, Block]:
    """Make blocks of (experts, top_k). Their numbers have gaps, like those of one geometry among several."""
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
    groups = plan_groups(slots, blocks)
    assert sum(group.quota for group in groups) == slots
    assert sorted(block for group in groups for block in group.blocks) == sorted(blocks)
    for group in groups:
        assert group.quota >= max(blocks[block].top_k for block in group.blocks)
        assert group.quota <= sum(blocks[block].experts for block in group.blocks) or len(group.blocks) > 1
    enough = slots >= sum(block.top_k for block in blocks.values())
    assert all(len(group.blocks) == 1 for group in groups) or not enough
    if enough:  # as even as top-k and the number of experts allow
        quotas = {group.blocks[0]: group.quota for group in groups}
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
    assert plan_groups(slots, blocks_of(*[(8, 2)] * 4)) == tuple(Group(*group) for group in expected)


def test_quotas_of_unequal_blocks() -> None:
    # the block of 2 experts can use no more: what it leaves goes to the others
    assert [g.quota for g in plan_groups(14, blocks_of((2, 1), (8, 2), (8, 2)))] == [2, 6, 6]
    # top-6 needs its six, however few the others get
    assert [g.quota for g in plan_groups(9, blocks_of((8, 1), (8, 1), (8, 6)))] == [2, 1, 6]
    # too few: the blocks that need least keep theirs, and room for the greatest top-k is left
    assert plan_groups(7, blocks_of((8, 6), (8, 1), (8, 2))) == (Group((3,), 1), Group((0, 6), 6))


@pytest.mark.parametrize("slots", [1, 17])
def test_impossible_numbers_of_slots_are_ours_to_prevent(slots: int) -> None:
    with pytest.raises(AssertionError):
        plan_groups(slots, blocks_of((8, 2), (8, 2)))


class Cache:
    """Drive slots and policy as a tier does, with loads that are done at once."""

    def __init__(
        self, count: int, blocks: Mapping[int, Block], make_order: Callable[[int], Order] = ORDERS[DEFAULT_ORDER]
    ) -> None:
        self.slots = Slots(count)
        self.groups = plan_groups(count, blocks)
        self.policy = BlockPolicy(self.slots, self.groups, make_order)

    def demand(self, block: int, experts: Iterable[int]) -> int:
        """Return the number of hits."""
        keys = [ExpertKey(block, expert) for expert in experts]
        held = [key for key in keys if self.slots.find(key) is not None]
        for key in held:
            self.slots.pin(self.slot_of(key))
        for key in keys:
            if key not in held:
                slot = self.policy.choose(block)
                assert slot is not None
                self._fill(slot, key)
                self.slots.pin(slot)
        for key in reversed(keys):
            self.policy.touch(key)
            self.slots.unpin(self.slot_of(key))
        self.slots.check_integrity()
        self.policy.check_integrity()
        return len(held)

    def prefetch(self, block: int, expert: int) -> None:
        key = ExpertKey(block, expert)
        if self.slots.find(key) is None and (slot := self.policy.choose(block)) is not None:
            self._fill(slot, key, prefetched=True)
        self.slots.check_integrity()
        self.policy.check_integrity()

    def _fill(self, slot: int, key: ExpertKey, *, prefetched: bool = False) -> None:
        if self.slots.is_ready(slot):
            self.policy.remove(slot)
            self.slots.evict(slot)
        self.slots.begin(slot, key)
        self.policy.admit(key.block, slot, prefetched=prefetched)
        self.slots.fill(slot)

    def slot_of(self, key: ExpertKey) -> int:
        slot = self.slots.find(key)
        assert slot is not None
        return slot

    def resident(self, blocks: Iterable[int]) -> set[ExpertKey]:
        return {ExpertKey(b, e) for b in blocks for e in range(16) if self.slots.find(ExpertKey(b, e)) is not None}


class Oracle:
    """Model one least-recently-used cache per group: look up against the state before, then touch from the last."""

    def __init__(self, groups: Iterable[Group]) -> None:
        self.of = {}
        for group in groups:
            cache: OrderedDict[ExpertKey, None] = OrderedDict()
            for block in group.blocks:
                self.of[block] = (cache, group.quota)

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


@settings(max_examples=200)
@given(planned(), st.data())
def test_it_is_a_least_recently_used_cache_block_by_block(
    plan: tuple[dict[int, Block], int], data: st.DataObject
) -> None:
    blocks, slots = plan
    cache = Cache(slots, blocks, ORDERS["lru"])
    oracle = Oracle(cache.groups)
    for _ in range(data.draw(st.integers(1, 40))):
        block = data.draw(st.sampled_from(sorted(blocks)))
        experts = data.draw(
            st.lists(st.integers(0, blocks[block].experts - 1), min_size=1, max_size=blocks[block].top_k, unique=True)
        )
        assert cache.demand(block, experts) == oracle.demand(block, experts)
        assert cache.resident(blocks) == oracle.resident()


@pytest.mark.parametrize("policy", ORDERS)
@settings(max_examples=100)
@given(planned(), st.data())
def test_a_prefetch_evicts_its_own_blocks_next_and_goes_first_itself(
    policy: str, plan: tuple[dict[int, Block], int], data: st.DataObject
) -> None:
    """A right prediction evicts what the demand would have evicted, wrong ones cost one record."""
    blocks, slots = plan
    cache = Cache(slots, blocks, ORDERS[policy])
    for _ in range(data.draw(st.integers(1, 40))):
        block = data.draw(st.sampled_from(sorted(blocks)))
        expert = data.draw(st.integers(0, blocks[block].experts - 1))
        before = cache.resident(blocks)
        if data.draw(st.booleans()):
            cache.demand(block, [expert])
            continue
        cache.prefetch(block, expert)
        lost = before - cache.resident(blocks)
        group = next(group for group in cache.groups if block in group.blocks)
        assert len(lost) <= 1
        assert all(key.block in group.blocks for key in lost)
        if lost:  # the group was full: the prefetch is the next to go
            slot = cache.policy.choose(block)
            assert slot == cache.slot_of(ExpertKey(block, expert))


@pytest.mark.parametrize(("per_block", "expected"), [(2, 0.249), (3, 0.374), (4, 0.498), (8, 1.0)])
def test_hit_ratio_of_uniform_routing(per_block: int, expected: float) -> None:
    """With k of 8 experts of each block cached and two used per token, the hit ratio is k/8 after the cold start."""
    blocks = blocks_of(*[(8, 2)] * 4)
    cache = Cache(per_block * 4, blocks)
    chance = random.Random(0)
    hits = sum(cache.demand(b, sorted(chance.sample(range(8), 2))) for _ in range(2000) for b in blocks)
    assert hits / (2000 * 4 * 2) == pytest.approx(expected, abs=0.01)


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


def fill(slots: Slots, policy: BlockPolicy, key: ExpertKey, *, may_borrow: bool = False) -> int:
    slot = policy.choose(key.block, may_borrow=may_borrow)
    assert slot is not None
    if slots.is_ready(slot):
        policy.remove(slot)
        slots.evict(slot)
    slots.begin(slot, key)
    policy.admit(key.block, slot)
    slots.fill(slot)
    policy.check_integrity()
    return slot


def test_held_slots_are_passed_over_and_borrowed_ones_taken_back() -> None:
    slots = Slots(4)
    policy = BlockPolicy(slots, [Group((0,), 2), Group((1,), 2)])
    held = [fill(slots, policy, ExpertKey(0, expert)) for expert in range(2)]
    for slot in held:
        slots.pin(slot)
    assert policy.choose(0) is None, "its own are held, and what is free is another's"
    borrowed = fill(slots, policy, ExpertKey(0, 2), may_borrow=True)
    assert borrowed not in held
    fill(slots, policy, ExpertKey(1, 0))
    slots.pin(borrowed)
    assert policy.choose(1) == slots.find(ExpertKey(1, 0)), "below its quota, but what was borrowed is held"
    slots.unpin(borrowed)
    assert policy.choose(1) == borrowed, "below its quota: it takes back what was borrowed"
    slots.pin(borrowed)
    other = slots.find(ExpertKey(1, 0))
    assert policy.choose(0, may_borrow=True) == other
    assert other is not None
    slots.pin(other)
    assert policy.choose(0, may_borrow=True) is None
    assert policy.choose(1, may_borrow=True) is None


def test_what_is_to_be_kept_is_not_chosen() -> None:
    slots = Slots(2)
    policy = BlockPolicy(slots, [Group((0,), 2)])
    first, second = (fill(slots, policy, ExpertKey(0, expert)) for expert in range(2))
    assert policy.choose(0) == first
    assert policy.choose(0, keep=lambda key: key.expert == 0) == second
    assert policy.choose(0, keep=lambda key: True) is None


def test_check_integrity_sees_what_is_wrong() -> None:
    slots = Slots(2)
    policy = BlockPolicy(slots, [Group((0,), 1), Group((1,), 1)])
    fill(slots, policy, ExpertKey(0, 0))
    policy._orders[1].add(ExpertKey(0, 0), scan=False)
    with pytest.raises(AssertionError):
        policy.check_integrity()
    policy._orders[1].remove(ExpertKey(0, 0))
    policy.check_integrity()
    policy._orders[0].remove(ExpertKey(0, 0))
    with pytest.raises(AssertionError):
        policy.check_integrity()
