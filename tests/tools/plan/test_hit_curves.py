"""Bundled curves are what their command makes, and are read as curves are."""

from __future__ import annotations

import json
import runpy
from itertools import pairwise

import pytest
from places import ROOT

from moetier.tools.plan.hit_curves import HitCurve, hit_curves, nearest_curve


def test_they_are_what_the_command_makes() -> None:
    """Of the smallest trace; the others take half a minute."""
    name = "gptoss_120b_top2_bigmoeonedge"
    made = runpy.run_path(str(ROOT / "tests/measurements/hit_curves.py"))["curve_of"](
        ROOT / f"tests/assets/traces/{name}.npz"
    )
    bundled = json.loads((ROOT / "tools/plan/hit_curves.json").read_text())["curves"]
    assert made in bundled
    assert {curve["trace"] for curve in bundled} == {path.stem for path in (ROOT / "tests/assets/traces").glob("*.npz")}


@pytest.mark.parametrize("curve", hit_curves(), ids=lambda curve: curve.trace)
def test_more_slots_hit_more(curve: HitCurve) -> None:
    found = [curve.at(share / 100) for share in range(101)]
    assert all(low <= high for low, high in pairwise(found))
    assert (found[0], found[-1]) == (0.0, 1.0)


def test_between_two_points_it_is_straight() -> None:
    curve = HitCurve("", 4, 1, (0.25, 0.5, 1.0), (0.4, 0.6, 1.0))
    assert [curve.at(share) for share in (0.125, 0.25, 0.375, 0.75, 2.0)] == pytest.approx([0.2, 0.4, 0.5, 0.8, 1.0])


@pytest.mark.parametrize(
    ("experts", "top_k", "trace"),
    [(8, 2, "mixtral"), (32, 4, "gptoss_20b"), (128, 2, "gptoss_120b"), (16, 2, "mixtral")],
)
def test_the_nearest(experts: int, top_k: int, trace: str) -> None:
    assert nearest_curve(experts, top_k).trace.startswith(trace)
