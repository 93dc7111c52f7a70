"""Counters of a tier, apart from any tier."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetier.proto import expert_store_pb2 as pb
from moetier.tiers.stats import LOAD_BOUNDS, TierCounters, TierStats


def stats_of(counters: TierCounters) -> TierStats:
    return counters.snapshot(slots=2, ready=1, leased=1, memory_bytes=8)


@given(st.lists(st.floats(0, 100)))
def test_each_load_is_in_one_bucket(seconds: list[float]) -> None:
    counters = TierCounters("host")
    for each in [*seconds, *LOAD_BOUNDS]:  # a bound is the last of its own bucket
        counters.count_load(each)
    stats = stats_of(counters)
    assert len(stats.loads) == len(stats.load_bounds) + 1
    below = [sum(each <= bound for each in [*seconds, *LOAD_BOUNDS]) for bound in (*LOAD_BOUNDS, float("inf"))]
    assert [sum(stats.loads[: number + 1]) for number in range(len(below))] == below


def test_a_snapshot_stays_as_it_was() -> None:
    counters = TierCounters("host")
    before = stats_of(counters)
    counters.count_load(0.003)
    counters.count_wait(0.5)
    counters.count_wait(0.25)
    after = stats_of(counters)
    assert (sum(before.loads), before.waits, before.wait_median) == (0, 0, 0.0)
    assert (sum(after.loads), after.load_seconds) == (1, 0.003)
    assert (after.waits, after.wait_seconds, after.wait_median) == (2, 0.75, 0.375)
    with pytest.raises(FrozenInstanceError):
        after.waits = 3  # type: ignore[misc]


def test_the_contract_has_every_counter() -> None:
    counted = asdict(stats_of(TierCounters("host")))
    assert counted.keys() == {field.name for field in pb.Tier.DESCRIPTOR.fields}
    tier = pb.Tier(**counted)
    assert all(type(value)(getattr(tier, name)) == value for name, value in counted.items())
