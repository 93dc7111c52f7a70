"""Estimates from what was measured: the rate of fetches, the time of computations, and recent uses."""

from __future__ import annotations

import pytest

from moetier.runtime.client import costs
from moetier.runtime.client.costs import HORIZON, RATE, FetchRate, OutputSeconds, RecentUses, earns_slot


def test_fetches_at_the_same_time_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(costs.time, "monotonic", lambda: now)
    rate = FetchRate()
    assert rate.value == RATE
    rate.begin()
    now = 1.0
    rate.begin()
    now = 2.0
    rate.end(300)
    now = 4.0
    rate.end(100)
    assert rate.value == 100
    now = 100.0  # nothing is under way
    rate.begin()
    now = 101.0
    rate.end(0)  # it failed
    assert rate.value == 80


def test_the_rate_follows_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(costs.time, "monotonic", lambda: now)
    rate = FetchRate()
    for speed in (100e6, 10e6):
        for _ in range(100):
            rate.begin()
            now += 10e6 / speed
            rate.end(10_000_000)
        assert rate.value == pytest.approx(speed, rel=0.01)


def test_a_slow_computation_is_an_exception_unless_others_follow() -> None:
    seconds = OutputSeconds()
    seconds.add(1.0, 8)  # the first, in which connections are made
    assert seconds.value == 0
    for _ in range(3):
        seconds.add(0.008, 8)
    assert seconds.value == pytest.approx(0.001)
    seconds.add(8.0, 8)
    assert seconds.value == pytest.approx(0.0015)
    for _ in range(20):
        seconds.add(8.0, 8)
    assert seconds.value == pytest.approx(1.0)
    for _ in range(200):
        seconds.fade()
    assert seconds.value < 0.001, "it is tried again"


def test_uses_are_forgotten() -> None:
    uses = RecentUses(3)
    for _ in range(20 * HORIZON):
        uses.add([(0, 1)], 1)
    assert uses.of(0) == pytest.approx(HORIZON, rel=0.01)
    uses.add([(1, 50)], 50)
    assert uses.of(1) == pytest.approx(50)
    for _ in range(HORIZON):
        uses.add([(2, 1)], 1)
    assert uses.of(1) == pytest.approx(50 / 2.718, rel=0.01)
    for _ in range(400):  # numbers stay finite
        uses.add([(2, 1)], HORIZON)
    assert 0 <= uses.of(1) < 1e-9
    assert uses.of(2) > 0


def test_an_expert_is_fetched_once_computing_it_has_cost_as_much() -> None:
    assert not earns_slot(100, 0, 100)
    assert earns_slot(135, 0, 100)
    assert not earns_slot(70, 35, 10), "counts fluctuate"
    assert earns_slot(70, 25, 10)
    uses = RecentUses(8)
    for token in range(2_400):  # a record so large that its fetch takes as long as 300 computations
        uses.add([(token % 4, 1)], 1)
    assert earns_slot(uses.of(1), 0, 300)
    assert not earns_slot(uses.of(1), uses.of(2), 3)
