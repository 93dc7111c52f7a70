from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetier.runtime.speculation.controller import GhostCache
from moetier.tiers.cache.policies import POLICIES
from moetier.tiers.layout import ExpertKey
from moetier.tools.lab.simulation import SimulatedTier

TOP_K = 2
demands = st.lists(
    st.tuples(st.integers(0, 1), st.lists(st.integers(0, 7), min_size=TOP_K, max_size=TOP_K, unique=True))
)


@pytest.mark.parametrize("policy", ["lru", "scan"])
@given(demands=demands, slots=st.integers(TOP_K, 8))
def test_it_misses_what_an_lru_misses(policy: str, demands: list[tuple[int, list[int]]], slots: int) -> None:
    ghost, uses, missed = GhostCache(2, slots, policy), list[tuple[int, int]](), 0
    for block, experts in demands:
        missed += sum(not _is_resident(uses, (block, expert), slots) for expert in experts)
        uses += [(block, expert) for expert in reversed(experts)]
        ghost.demand(block, experts)
    assert ghost.misses == missed


@pytest.mark.parametrize("policy", POLICIES)
@given(demands=demands, slots=st.integers(TOP_K, 8))
def test_it_misses_what_a_tier_misses(policy: str, demands: list[tuple[int, list[int]]], slots: int) -> None:
    ghost, tiers = (
        GhostCache(2, slots, policy),
        [SimulatedTier.of_block(block, slots, POLICIES[policy]) for block in range(2)],
    )
    for block, experts in demands:
        before = ghost.misses
        ghost.demand(block, experts)
        missed = tiers[block].demand([ExpertKey(block, expert) for expert in experts])
        assert ghost.misses - before == len(missed)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_scan_evicts_nothing(policy: str) -> None:
    ghost = GhostCache(1, 2, policy)
    for experts in ({0, 1}, {2, 3, 4}, {0, 1}):
        ghost.demand(0, experts)
    assert ghost.misses == 2


def _is_resident(uses: list[tuple[int, int]], wanted: tuple[int, int], slots: int) -> bool:
    """By the definition: used, and fewer than ``slots`` others of its block since. A block's demand is at once."""
    others: set[int] = set()
    for block, expert in reversed(uses):
        if (block, expert) == wanted:
            return len(others) < slots
        if block == wanted[0]:
            others.add(expert)
    return False
