from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier.tiers.keys import ExpertKey
from moetier.tiers.order import ORDERS, Clairvoyant, Order, Recency, ScanResistant

KEYS = [ExpertKey(block, expert) for block in range(2) for expert in range(6)]
MAKERS: dict[str, Callable[[int], Order]] = {
    **ORDERS,
    "clairvoyant": lambda quota: Clairvoyant({key: range(i, 60, i + 1) for i, key in enumerate(KEYS)}),
}
STEPS = st.lists(st.tuples(st.sampled_from(KEYS), st.booleans(), st.booleans()), max_size=60)


@pytest.mark.parametrize("name", MAKERS)
@given(quota=st.integers(1, 12), steps=STEPS)
def test_what_every_order_keeps_to(name: str, quota: int, steps: list[tuple[ExpertKey, bool, bool]]) -> None:
    order, held = MAKERS[name](quota), set[ExpertKey]()
    for key, passing, leave in steps:
        if key not in held:
            held.add(key)
            order.add(key, passing=passing)
        elif leave:
            held.discard(key)
            order.remove(key)
        else:
            order.touch(key, passing=passing)
        assert len(order) == len(held)
        assert sorted(order) == sorted(held)
        assert sorted(order.victims(passing=False)) == sorted(held), "nothing is safe from a demand of one token"
        offered = list(order.victims(passing=True))
        assert len(set(offered)) == len(offered)
        assert set(offered) <= held
        assert offered or not held, "a passage goes on"


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_not_there_is_not_removed(name: str) -> None:
    order = MAKERS[name](4)
    order.add(KEYS[0], passing=False)
    with pytest.raises(KeyError):
        order.remove(KEYS[1])
    order.remove(KEYS[0])
    with pytest.raises(KeyError):
        order.remove(KEYS[0])


@given(st.lists(st.sampled_from(KEYS), max_size=40))
def test_recency_and_scan_without_a_passage(uses: list[ExpertKey]) -> None:
    """Both are the keys by their last use."""
    expected = sorted(set(uses), key=lambda key: max(i for i, use in enumerate(uses) if use == key))
    for order in (Recency(3), ScanResistant(3)):
        for key in uses:
            if key in set(order):
                order.touch(key, passing=False)
            else:
                order.add(key, passing=False)
        assert list(order.victims(passing=False)) == expected


def test_recency_takes_a_passage_as_any_use() -> None:
    order = Recency(2)
    for key in KEYS[:3]:
        order.add(key, passing=True)
    order.touch(KEYS[0], passing=True)
    assert list(order.victims(passing=True)) == [KEYS[1], KEYS[2], KEYS[0]]


def test_a_passage_leaves_what_it_finds() -> None:
    order = ScanResistant(8)  # room for two in passing
    settled, brought = KEYS[:4], KEYS[4:8]
    for key in settled:
        order.add(key, passing=False)
    order.touch(settled[0], passing=True)  # which changes nothing
    order.add(brought[0], passing=True)
    assert list(order.victims(passing=True)) == [brought[0], *settled]
    order.add(brought[1], passing=True)
    assert list(order.victims(passing=True)) == brought[:2], "it has its room, and evicts its own"
    assert list(order.victims(passing=False)) == [*brought[:2], *settled]
    order.touch(brought[1], passing=False)
    assert list(order.victims(passing=False)) == [brought[0], *settled, brought[1]]
    assert list(order.victims(passing=True)) == [brought[0], *settled, brought[1]]


def hits_of(order: Order, demands: Sequence[frozenset[int]], quota: int) -> int:
    held, hits = set[ExpertKey](), 0
    for now, demand in enumerate(demands):
        if isinstance(order, Clairvoyant):
            order.now = now
        wanted = {ExpertKey(0, expert) for expert in demand}
        hits += len(wanted & held)
        for key in sorted(wanted):
            if key in held:
                order.touch(key, passing=False)
        for key in sorted(wanted - held):
            if len(held) == quota:
                victim = next(victim for victim in order.victims(passing=False) if victim not in wanted)
                order.remove(victim)
                held.discard(victim)
            order.add(key, passing=False)
            held.add(key)
    return hits


def most_hits(demands: Sequence[frozenset[int]], quota: int) -> int:
    """By trying everything."""

    @cache
    def best(now: int, held: frozenset[int]) -> int:
        if now == len(demands):
            return 0
        wanted = demands[now]
        others = held - wanted
        room = min(quota - len(wanted), len(others))
        kept = combinations(sorted(others), room)
        return len(held & wanted) + max(best(now + 1, wanted | frozenset(choice)) for choice in kept)

    return best(0, frozenset())


@settings(max_examples=150, deadline=None)
@given(
    st.integers(2, 4).flatmap(
        lambda quota: st.tuples(
            st.just(quota), st.lists(st.frozensets(st.integers(0, 5), min_size=1, max_size=2), min_size=1, max_size=9)
        )
    )
)
def test_no_order_hits_more_often_than_the_clairvoyant(case: tuple[int, list[frozenset[int]]]) -> None:
    quota, demands = case
    uses = {ExpertKey(0, e): [now for now, demand in enumerate(demands) if e in demand] for e in range(6)}
    found = hits_of(Clairvoyant(uses), demands, quota)
    assert found == most_hits(demands, quota)
    for make in ORDERS.values():
        assert hits_of(make(quota), demands, quota) <= found
