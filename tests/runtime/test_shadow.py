from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moetier.runtime.shadow import Shadow

TOP_K = 2
demands = st.lists(st.tuples(st.integers(0, 1), st.sets(st.integers(0, 7), min_size=TOP_K, max_size=TOP_K)))


@given(demands, st.integers(TOP_K, 8))
def test_what_an_lru_misses(demands: list[tuple[int, set[int]]], slots: int) -> None:
    shadow, uses, missed, lacking = Shadow([slots, slots]), list[tuple[int, int]](), 0, 0
    for block, experts in demands:
        missing = sum(not _is_resident(uses, (block, expert), slots) for expert in experts)
        missed, lacking = missed + missing, lacking + (missing > 0)
        uses += [(block, expert) for expert in experts]
        shadow.demand(block, experts)
    assert shadow.misses == missed
    assert shadow.lacks == (lacking / len(demands) if demands else 1.0)


def test_what_would_be_missed_of_what_is_evicted_too_early() -> None:
    shadow = Shadow([2])
    for expert in (0, 1, 0, 1, 2, 1):  # all but the first two and the fifth find the one that would go next
        shadow.demand(0, {expert}, spared=())
    assert (shadow.misses, shadow.regrets) == (3, 1.0)
    for expert in (3, 4, 5, 6, 7, 7):
        shadow.demand(0, {expert}, spared=())
    assert (shadow.misses, shadow.regrets) == (8, 3 / 8)


def test_what_a_guess_spares_is_not_evicted_too_early() -> None:
    shadow = Shadow([2])
    for expert in (0, 1, 2, 3):
        shadow.demand(0, {expert})
    assert shadow.regrets == 0.0, "nothing was guessed"
    shadow.demand(0, {2}, spared={2, 5})  # 3 would be evicted
    shadow.demand(0, {4}, spared={6})  # ... and missed, for which 3 goes
    assert shadow.regrets == 0.0
    shadow.demand(0, {2}, spared={4})
    assert shadow.regrets == 1.0


def test_a_passage_leaves_what_is_there() -> None:
    shadow = Shadow([2])
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
