"""Estimates of the time for a token and for a prompt follow from sizes and rates."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from itertools import pairwise

import pytest
from places import ROOT
from two_layouts import two_layouts

from moetier.tools.plan.choices import Choice
from moetier.tools.plan.estimate import Caching, Cost, HitCurve, hit_curves, nearest_curve, prompt_cost, token_cost
from moetier.tools.plan.speeds import DiskRate, MachineRates

MANIFEST = two_layouts()  # top-3 of 4 in two blocks, top-2 of 4 in three
ALL = {"big": 8, "small": 12}
RATES = MachineRates(DiskRate(1e9, 2e9, 4), 1e10, {16: 5e9, 4: 5e9}, {16: 1e11, 4: 1e11}, 5e9, 0.0)
CHOICE = Choice(4, 16, MANIFEST, trunk_bytes=0, matrices=(), plain_bytes=1_000_000, layers=5)


def test_reads_in_flight_make_a_disk_quicker() -> None:
    disk = DiskRate(1.0, 4.0, 4)
    assert [disk.at(reads) for reads in (0.1, 1, 2, 4, 100)] == pytest.approx([1, 1, 2, 4, 4])


def test_what_is_all_in_memory_is_read_no_more() -> None:
    caching = Caching.of(MANIFEST, ALL)
    assert caching.mean(MANIFEST) == 1.0
    cost, read = token_cost(CHOICE, caching, RATES, 0)
    assert (cost.disk, read) == (0, 0)
    experts = sum(block.top_k * MANIFEST.layout(number).payload_bytes for number, block in enumerate(MANIFEST.blocks))
    assert cost.seconds == pytest.approx((experts + CHOICE.plain_bytes) / 5e9)


def test_blocks_that_share_slots_hit_nothing() -> None:
    caching = Caching.of(MANIFEST, {"big": 3, "small": 12})
    assert caching.hit_ratios == (0.0, 1.0, 0.0, 1.0, 1.0)
    _, read = token_cost(CHOICE, caching, RATES, 0)
    assert read == 6 * MANIFEST.layouts["big"].slot_bytes


def test_what_it_is_bound_by() -> None:
    none = Caching.of(MANIFEST, {"big": 3, "small": 2})
    whole = Caching.of(MANIFEST, ALL)
    slow = replace(RATES, disk=DiskRate(1e6, 1e6, 4))
    assert token_cost(CHOICE, none, slow, 0)[0].by == "disk"
    assert token_cost(CHOICE, whole, replace(RATES, memory=5e9), 0)[0].by == "memory"
    assert token_cost(CHOICE, whole, replace(RATES, operation=1e-3), 0)[0].by == "compute"


def test_a_long_context_takes_longer() -> None:
    whole = Caching.of(MANIFEST, ALL)
    short, long = (token_cost(CHOICE, whole, RATES, size)[0].seconds for size in (0, 10_000_000_000))
    assert long - short == pytest.approx(1.0)


def test_a_first_prompt_reads_every_expert_once() -> None:
    whole = Caching.of(MANIFEST, ALL)
    few = Caching.of(MANIFEST, {"big": 3, "small": 2})
    for caching in (whole, few):
        cost = prompt_cost(CHOICE, caching, RATES)
        assert cost.disk == pytest.approx(MANIFEST.stored_bytes / 2e9)
    busy = replace(RATES, operation=1e-6)  # what passes through few slots costs more around each read
    assert prompt_cost(CHOICE, few, busy).overhead > prompt_cost(CHOICE, whole, busy).overhead


def test_reads_and_products_of_a_prompt_overlap_and_those_of_a_token_do_not() -> None:
    assert Cost(3.0, 1.0, 1.0, 0.0, overlaps=True).seconds == 3.0
    assert Cost(3.0, 1.0, 1.0, 0.0, overlaps=False).seconds == 5.0


# bundled hit curves


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
