from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier.tiers.cache.policies import POLICIES, Lrfu, Lru, Policy, ScanLru
from moetier.tiers.layout import ExpertKey
from moetier.tools.traces.simulation import Clairvoyant

KEYS = [ExpertKey(block, expert) for block in range(2) for expert in range(6)]
MAKERS: dict[str, Callable[[int], Policy]] = {
    **POLICIES,
    "clairvoyant": lambda quota: Clairvoyant({key: range(i, 60, i + 1) for i, key in enumerate(KEYS)}),
}
STEPS = st.lists(st.tuples(st.sampled_from(KEYS), st.booleans(), st.booleans()), max_size=60)


@pytest.mark.parametrize("name", MAKERS)
@given(quota=st.integers(1, 12), steps=STEPS)
def test_what_every_policy_keeps_to(name: str, quota: int, steps: list[tuple[ExpertKey, bool, bool]]) -> None:
    """A ``rare`` step removes a key that is there, and adds one that is not by a prefetch."""
    policy, held = MAKERS[name](quota), set[ExpertKey]()
    for key, is_scan, rare in steps:
        if key not in held:
            held.add(key)
            if rare:
                policy.add(key, is_scan=False)
                policy.demote(key)
            else:
                policy.add(key, is_scan=is_scan)
                policy.touch(key, is_scan=is_scan)
        elif rare:
            held.discard(key)
            policy.remove(key)
        else:
            policy.touch(key, is_scan=is_scan)
        assert len(policy) == len(held)
        assert sorted(policy) == sorted(held)
        assert sorted(policy.victims(is_scan=False)) == sorted(held), "nothing is safe from a demand of one token"
        scanned = list(policy.scanned())
        assert scanned == list(policy.victims(is_scan=False))[: len(scanned)], "they are evicted first"
        offered = list(policy.victims(is_scan=True))
        assert len(set(offered)) == len(offered)
        assert set(offered) <= held
        assert offered or not held, "a scan goes on"


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_not_there_is_not_removed(name: str) -> None:
    policy = MAKERS[name](4)
    policy.add(KEYS[0], is_scan=False)
    with pytest.raises(KeyError):
        policy.remove(KEYS[1])
    policy.remove(KEYS[0])
    with pytest.raises(KeyError):
        policy.remove(KEYS[0])


@given(st.lists(st.sampled_from(KEYS), max_size=40))
def test_recency_and_scan_without_a_scan(uses: list[ExpertKey]) -> None:
    """Both then evict the key whose last use is the longest ago."""
    expected = sorted(set(uses), key=lambda key: max(i for i, use in enumerate(uses) if use == key))
    for policy in (Lru(3), ScanLru(3)):
        for key in uses:
            use(policy, key)
        assert list(policy.victims(is_scan=False)) == expected


USES = st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(["use", "use", "use", "leave", "learn"])), max_size=80)


def check_counts(policy: Policy, uses: Sequence[ExpertKey]) -> None:
    """Compute counts by the definition: a use counts half as much when it is 30 uses old."""
    counts = [sum(2 ** (-age / 30) for age, use in enumerate(reversed(uses)) if use == key) for key in policy]
    assert counts == pytest.approx(sorted(counts), rel=1e-9, abs=0)
    assert list(policy.victims(is_scan=False)) == list(policy.victims(is_scan=True)) == list(policy)


@given(USES)
def test_frequency_by_its_definition(steps: list[tuple[ExpertKey, str]]) -> None:
    """It does not matter whether the record stayed all the time."""
    policy, uses = Lrfu(12), list[ExpertKey]()
    for key, what in steps:
        if what == "use":
            use(policy, key)
            uses.append(key)
        elif what == "leave" and key in set(policy):
            policy.remove(key)
        elif what == "learn" and key not in set(policy):
            policy.add(key, is_scan=False)
        check_counts(policy, uses)


def test_frequency_by_its_definition_in_the_long_run() -> None:
    """Use some keys more than others, and other keys every 200 uses."""
    policy, uses, chance = Lrfu(12), list[ExpertKey](), random.Random(0)
    for now in range(1000):
        turn = now // 200
        key = chance.choices([*KEYS[turn:], *KEYS[:turn]], range(1, 13))[0]
        use(policy, key)
        uses.append(key)
        if now % 10 == 0:
            check_counts(policy, uses)


def test_what_was_evicted_comes_back_with_the_uses_it_had() -> None:
    policy = Lrfu(2)
    often, seldom = KEYS[:2]
    for key in (often, often, often, seldom):
        use(policy, key)
    policy.remove(often)
    for key in (often, seldom):
        use(policy, key)
    assert list(policy.victims(is_scan=False)) == [seldom, often], "as if it had never been away"
    policy.remove(often)
    policy.add(often, is_scan=False)
    assert list(policy.victims(is_scan=False)) == [seldom, often], "before it is used, too"


@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_what_a_prefetch_brings_goes_first_until_it_is_used(make: Callable[[int], Policy]) -> None:
    """This holds even for the most used key of all before its eviction."""
    policy = make(4)
    for key in (KEYS[0], KEYS[0], KEYS[0], KEYS[1], KEYS[2]):
        use(policy, key)
    policy.remove(KEYS[0])
    for key in (KEYS[0], KEYS[3]):
        policy.add(key, is_scan=False)
        policy.demote(key)
        assert next(policy.victims(is_scan=False)) == key
    for key in (KEYS[0], KEYS[3]):
        use(policy, key)
    found = list(policy.victims(is_scan=False))
    assert found == ([*KEYS[1:4], KEYS[0]] if make is Lrfu else [KEYS[1], KEYS[2], KEYS[0], KEYS[3]])


def test_recency_takes_a_scan_as_any_use() -> None:
    policy = Lru(2)
    for key in (*KEYS[:3], KEYS[0]):
        use(policy, key, is_scan=True)
    assert list(policy.victims(is_scan=True)) == [KEYS[1], KEYS[2], KEYS[0]]


@pytest.mark.parametrize("make", [ScanLru, Lrfu])
def test_a_scan_leaves_what_it_finds(make: Callable[[int], Policy]) -> None:
    policy = make(8)  # room for two in scan
    settled, brought = KEYS[:4], KEYS[4:8]
    for key in settled:
        use(policy, key)
    for _ in range(3):
        use(policy, settled[0], is_scan=True)  # which changes nothing
    use(policy, brought[0], is_scan=True)
    assert list(policy.victims(is_scan=True)) == [brought[0], *settled]
    use(policy, brought[1], is_scan=True)
    assert list(policy.victims(is_scan=True)) == brought[:2], "it has its room, and evicts its own"
    assert list(policy.victims(is_scan=False)) == [*brought[:2], *settled]
    policy.touch(brought[1], is_scan=False)
    assert list(policy.victims(is_scan=False)) == [brought[0], *settled, brought[1]]
    assert list(policy.victims(is_scan=True)) == [brought[0], *settled, brought[1]]


def use(policy: Policy, key: ExpertKey, *, is_scan: bool = False) -> None:
    """Add and touch a key as a demand does."""
    if key not in set(policy):
        policy.add(key, is_scan=is_scan)
    policy.touch(key, is_scan=is_scan)


def hits_of(policy: Policy, demands: Sequence[frozenset[int]], quota: int) -> int:
    held, hits = set[ExpertKey](), 0
    for now, demand in enumerate(demands):
        if isinstance(policy, Clairvoyant):
            policy.now = now
        wanted = {ExpertKey(0, expert) for expert in demand}
        hits += len(wanted & held)
        for key in sorted(wanted):
            if key in held:
                use(policy, key)
        for key in sorted(wanted - held):
            if len(held) == quota:
                victim = next(victim for victim in policy.victims(is_scan=False) if victim not in wanted)
                policy.remove(victim)
                held.discard(victim)
            use(policy, key)
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
def test_no_policy_hits_more_often_than_the_clairvoyant(case: tuple[int, list[frozenset[int]]]) -> None:
    quota, demands = case
    uses = {ExpertKey(0, e): [now for now, demand in enumerate(demands) if e in demand] for e in range(6)}
    found = hits_of(Clairvoyant(uses), demands, quota)
    assert found == most_hits(demands, quota)
    for make in POLICIES.values():
        assert hits_of(make(quota), demands, quota) <= found
