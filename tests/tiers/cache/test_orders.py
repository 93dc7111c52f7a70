from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier.tiers.cache.orders import ORDERS, Frequency, Order, Recency, ScanResistant
from moetier.tiers.layout import ExpertKey
from moetier.tools.lab.simulation import Clairvoyant

KEYS = [ExpertKey(block, expert) for block in range(2) for expert in range(6)]
MAKERS: dict[str, Callable[[int], Order]] = {
    **ORDERS,
    "clairvoyant": lambda quota: Clairvoyant({key: range(i, 60, i + 1) for i, key in enumerate(KEYS)}),
}
STEPS = st.lists(st.tuples(st.sampled_from(KEYS), st.booleans(), st.booleans()), max_size=60)


@pytest.mark.parametrize("name", MAKERS)
@given(quota=st.integers(1, 12), steps=STEPS)
def test_what_every_order_keeps_to(name: str, quota: int, steps: list[tuple[ExpertKey, bool, bool]]) -> None:
    """A ``rare`` step removes a key that is there, and adds one that is not by a prefetch."""
    order, held = MAKERS[name](quota), set[ExpertKey]()
    for key, scan, rare in steps:
        if key not in held:
            held.add(key)
            if rare:
                order.add(key, scan=False)
                order.demote(key)
            else:
                order.add(key, scan=scan)
                order.touch(key, scan=scan)
        elif rare:
            held.discard(key)
            order.remove(key)
        else:
            order.touch(key, scan=scan)
        assert len(order) == len(held)
        assert sorted(order) == sorted(held)
        assert sorted(order.victims(scan=False)) == sorted(held), "nothing is safe from a demand of one token"
        offered = list(order.victims(scan=True))
        assert len(set(offered)) == len(offered)
        assert set(offered) <= held
        assert offered or not held, "a scan goes on"


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_not_there_is_not_removed(name: str) -> None:
    order = MAKERS[name](4)
    order.add(KEYS[0], scan=False)
    with pytest.raises(KeyError):
        order.remove(KEYS[1])
    order.remove(KEYS[0])
    with pytest.raises(KeyError):
        order.remove(KEYS[0])


@given(st.lists(st.sampled_from(KEYS), max_size=40))
def test_recency_and_scan_without_a_scan(uses: list[ExpertKey]) -> None:
    """Both orders are then the keys by their last use."""
    expected = sorted(set(uses), key=lambda key: max(i for i, use in enumerate(uses) if use == key))
    for order in (Recency(3), ScanResistant(3)):
        for key in uses:
            use(order, key)
        assert list(order.victims(scan=False)) == expected


USES = st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(["use", "use", "use", "leave", "learn"])), max_size=80)


def check_counts(order: Order, uses: Sequence[ExpertKey]) -> None:
    """Compute counts by the definition: a use counts half as much when it is 30 uses old."""
    counts = [sum(2 ** (-age / 30) for age, use in enumerate(reversed(uses)) if use == key) for key in order]
    assert counts == pytest.approx(sorted(counts), rel=1e-9, abs=0)
    assert list(order.victims(scan=False)) == list(order.victims(scan=True)) == list(order)


@given(USES)
def test_frequency_by_its_definition(steps: list[tuple[ExpertKey, str]]) -> None:
    """It does not matter whether the record stayed all the time."""
    order, uses = Frequency(12), list[ExpertKey]()
    for key, what in steps:
        if what == "use":
            use(order, key)
            uses.append(key)
        elif what == "leave" and key in set(order):
            order.remove(key)
        elif what == "learn" and key not in set(order):
            order.add(key, scan=False)
        check_counts(order, uses)


def test_frequency_by_its_definition_in_the_long_run() -> None:
    """Use some keys more than others, and other keys every 200 uses."""
    order, uses, chance = Frequency(12), list[ExpertKey](), random.Random(0)
    for now in range(1000):
        turn = now // 200
        key = chance.choices([*KEYS[turn:], *KEYS[:turn]], range(1, 13))[0]
        use(order, key)
        uses.append(key)
        if now % 10 == 0:
            check_counts(order, uses)


def test_what_was_evicted_comes_back_with_the_uses_it_had() -> None:
    order = Frequency(2)
    often, seldom = KEYS[:2]
    for key in (often, often, often, seldom):
        use(order, key)
    order.remove(often)
    for key in (often, seldom):
        use(order, key)
    assert list(order.victims(scan=False)) == [seldom, often], "as if it had never been away"
    order.remove(often)
    order.add(often, scan=False)
    assert list(order.victims(scan=False)) == [seldom, often], "before it is used, too"


@pytest.mark.parametrize("make", ORDERS.values(), ids=ORDERS)
def test_what_a_prefetch_brings_goes_first_until_it_is_used(make: Callable[[int], Order]) -> None:
    """This holds even for the most used key of all before its eviction."""
    order = make(4)
    for key in (KEYS[0], KEYS[0], KEYS[0], KEYS[1], KEYS[2]):
        use(order, key)
    order.remove(KEYS[0])
    for key in (KEYS[0], KEYS[3]):
        order.add(key, scan=False)
        order.demote(key)
        assert next(order.victims(scan=False)) == key
    for key in (KEYS[0], KEYS[3]):
        use(order, key)
    found = list(order.victims(scan=False))
    assert found == ([*KEYS[1:4], KEYS[0]] if make is Frequency else [KEYS[1], KEYS[2], KEYS[0], KEYS[3]])


def test_recency_takes_a_scan_as_any_use() -> None:
    order = Recency(2)
    for key in (*KEYS[:3], KEYS[0]):
        use(order, key, scan=True)
    assert list(order.victims(scan=True)) == [KEYS[1], KEYS[2], KEYS[0]]


@pytest.mark.parametrize("make", [ScanResistant, Frequency])
def test_a_scan_leaves_what_it_finds(make: Callable[[int], Order]) -> None:
    order = make(8)  # room for two in scan
    settled, brought = KEYS[:4], KEYS[4:8]
    for key in settled:
        use(order, key)
    for _ in range(3):
        use(order, settled[0], scan=True)  # which changes nothing
    use(order, brought[0], scan=True)
    assert list(order.victims(scan=True)) == [brought[0], *settled]
    use(order, brought[1], scan=True)
    assert list(order.victims(scan=True)) == brought[:2], "it has its room, and evicts its own"
    assert list(order.victims(scan=False)) == [*brought[:2], *settled]
    order.touch(brought[1], scan=False)
    assert list(order.victims(scan=False)) == [brought[0], *settled, brought[1]]
    assert list(order.victims(scan=True)) == [brought[0], *settled, brought[1]]


def use(order: Order, key: ExpertKey, *, scan: bool = False) -> None:
    """Add and touch a key as a demand does."""
    if key not in set(order):
        order.add(key, scan=scan)
    order.touch(key, scan=scan)


def hits_of(order: Order, demands: Sequence[frozenset[int]], quota: int) -> int:
    held, hits = set[ExpertKey](), 0
    for now, demand in enumerate(demands):
        if isinstance(order, Clairvoyant):
            order.now = now
        wanted = {ExpertKey(0, expert) for expert in demand}
        hits += len(wanted & held)
        for key in sorted(wanted):
            if key in held:
                use(order, key)
        for key in sorted(wanted - held):
            if len(held) == quota:
                victim = next(victim for victim in order.victims(scan=False) if victim not in wanted)
                order.remove(victim)
                held.discard(victim)
            use(order, key)
            held.add(key)
    return hits


def most_hits(demands: Sequence[frozenset[int]], quota: int) -> int:
    """Find the best result by trying all evictions."""

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
