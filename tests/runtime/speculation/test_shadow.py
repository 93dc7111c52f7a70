from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetier.runtime.speculation.shadow import Shadow
from moetier.tiers.cache.orders import ORDERS
from moetier.tiers.layout import ExpertKey
from moetier.tools.lab.simulation import SimulatedTier

TOP_K = 2
demands = st.lists(
    st.tuples(st.integers(0, 1), st.lists(st.integers(0, 7), min_size=TOP_K, max_size=TOP_K, unique=True))
)


@pytest.mark.parametrize("policy", ["lru", "scan"])
@given(demands=demands, slots=st.integers(TOP_K, 8))
def test_what_an_lru_misses(policy: str, demands: list[tuple[int, list[int]]], slots: int) -> None:
    shadow, uses, missed, lacking = Shadow([slots, slots], policy), list[tuple[int, int]](), 0, 0
    for block, experts in demands:
        missing = sum(not _is_resident(uses, (block, expert), slots) for expert in experts)
        missed, lacking = missed + missing, lacking + (missing > 0)
        uses += [(block, expert) for expert in reversed(experts)]
        shadow.demand(block, experts)
    assert shadow.misses == missed
    assert shadow.lacks == (lacking / len(demands) if demands else 1.0)


@pytest.mark.parametrize("policy", ORDERS)
@given(demands=demands, slots=st.integers(TOP_K, 8))
def test_what_a_tier_misses(policy: str, demands: list[tuple[int, list[int]]], slots: int) -> None:
    shadow, tiers = Shadow([slots, slots], policy), [SimulatedTier(block, slots, ORDERS[policy]) for block in range(2)]
    for block, experts in demands:
        before = shadow.misses
        shadow.demand(block, experts)
        missed = tiers[block].demand([ExpertKey(block, expert) for expert in experts])
        assert shadow.misses - before == len(missed)


def test_what_would_be_missed_of_what_is_evicted_too_early() -> None:
    shadow = Shadow([2], "lru", sampled=1.0)
    for expert in (0, 1, 0, 1, 2, 1):  # all but the first two and the fifth find the one that would go next
        shadow.demand(0, {expert}, spared=())
    assert (shadow.misses, shadow.regrets) == (3, 1.0)
    for expert in (3, 4, 5, 6, 7, 7):
        shadow.demand(0, {expert}, spared=())
    assert (shadow.misses, shadow.regrets) == (8, 3 / 8)


@pytest.mark.parametrize(("policy", "once", "later"), [("lru", 1.0, 0.5), ("scan", 1.0, 0.5), ("lrfu", 0.0, 0.5)])
def test_what_goes_next_is_what_the_tier_would_evict(policy: str, once: float, later: float) -> None:
    shadow = Shadow([2], policy, sampled=1.0)
    for expert in (0, 0, 0, 1):  # the one more often, the other later
        shadow.demand(0, {expert})
    shadow.demand(0, {0}, spared=())  # which an LRU would evict next
    shadow.demand(0, {2}, spared=())  # of either 1 goes
    assert (shadow.misses, shadow.regrets) == (3, once)
    shadow.demand(0, {2}, spared=())  # which has been used least
    shadow.demand(0, {3}, spared=())
    assert (shadow.misses, shadow.regrets) == (4, later)


@pytest.mark.parametrize("policy", ORDERS)
def test_what_a_guess_spares_is_not_evicted_too_early(policy: str) -> None:
    shadow = Shadow([2], policy, sampled=1.0)
    for expert in (0, 1, 2, 3):
        shadow.demand(0, {expert})
    assert shadow.regrets == 0.0, "nothing was guessed"
    shadow.demand(0, {2}, spared={2, 5})  # 3 would be evicted
    shadow.demand(0, {4}, spared={6})  # ... and missed, for which 3 goes
    assert shadow.regrets == 0.0
    shadow.demand(0, {2}, spared={4})
    assert shadow.regrets == 1.0


def test_a_share_of_the_guesses_says_what_is_regretted() -> None:
    every, some = (Shadow([4], sampled=sampled) for sampled in (1.0, 0.3))
    chance = Random(1)
    for _ in range(3000):
        used = set(chance.choices(range(8), range(8, 0, -1), k=2))
        for shadow in (every, some):
            shadow.demand(0, used, spared=())
    assert some.misses == every.misses
    assert 0 < some.regrets == pytest.approx(every.regrets, rel=0.15)
    assert 0.25 < some._guessed / every._guessed < 0.35


@pytest.mark.parametrize("policy", ORDERS)
def test_a_passage_leaves_what_is_there(policy: str) -> None:
    shadow = Shadow([2], policy, sampled=1.0)
    for experts in ({0, 1}, {2, 3, 4}, {0, 1}):
        shadow.demand(0, experts)
    assert shadow.misses == 2


def _is_resident(uses: list[tuple[int, int]], wanted: tuple[int, int], slots: int) -> bool:
    """By the definition: used, and fewer than ``slots`` others of its block since. A block's demand is at once."""
    others: set[int] = set()
    for block, expert in reversed(uses):
        if (block, expert) == wanted:
            return len(others) < slots
        if block == wanted[0]:
            others.add(expert)
    return False
