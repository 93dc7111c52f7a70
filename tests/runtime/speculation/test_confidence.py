from __future__ import annotations

import math
import random

import pytest

from moetier.runtime.speculation.confidence import PRIOR, Confidence


def test_before_anything_is_known() -> None:
    assert Confidence(2).of(2, 0.3) == PRIOR


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.9, 1.0])
def test_it_comes_to_know_the_rate(rate: float) -> None:
    confidence, chance = Confidence(1), random.Random(0)
    found = []
    for _ in range(500):
        confidence.learn(1, 0.4, right=chance.random() < rate)
        found.append(confidence.of(1, 0.4))
    assert sum(found[100:]) / 400 == pytest.approx(rate, abs=0.05)


def test_distances_and_leads_are_told_apart() -> None:
    confidence = Confidence(2)
    for _ in range(50):
        confidence.learn(1, 0.9, right=True)
        confidence.learn(1, 0.1, right=False)
        confidence.learn(2, 0.9, right=False)
    assert confidence.of(1, 0.95) > 0.95
    assert max(confidence.of(1, 0.1), confidence.of(2, 0.9)) < 0.05
    assert confidence.of(2, 0.1) == PRIOR


def test_it_follows_a_change() -> None:
    confidence = Confidence(0)
    for right in [True] * 1000 + [False] * 200:
        confidence.learn(0, 0.5, right=right)
    assert confidence.of(0, 0.5) < 0.06


@pytest.mark.parametrize("lead", [0.0, 1e-30, 1.0, 1e30, math.inf, math.nan, -0.5])
def test_any_lead_has_a_place(lead: float) -> None:
    """Nothing may be behind; a gate with a correction of its own may choose what is not the best."""
    confidence = Confidence(0)
    confidence.learn(0, lead, right=True)
    assert PRIOR < confidence.of(0, lead) < 1
