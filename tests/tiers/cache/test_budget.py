from __future__ import annotations

import pytest
from geometries import two_geometries
from hypothesis import given
from hypothesis import strategies as st
from stores import make_plan

from moetier.tiers.cache.budget import slot_ranges, slots_for, smallest_budget
from moetier.tiers.errors import BudgetError
from moetier.tiers.manifest import Manifest


def cost(manifest: Manifest, slots: dict[str, int]) -> int:
    return sum(manifest.layouts[name].slot_bytes * count for name, count in slots.items())


def test_one_geometry() -> None:
    plan = make_plan(blocks=3, experts=4, top_k=2)
    slot = plan.layouts["records"].slot_bytes
    assert smallest_budget(plan) == 2 * slot, "exactly one block's top-k records"
    assert plan.stored_bytes == 12 * slot
    assert slots_for(plan, 2 * slot) == {"records": 2}
    assert slots_for(plan, 5 * slot - 1) == {"records": 4}
    assert slots_for(plan, 12 * slot) == {"records": 12}
    assert slots_for(plan, 1 << 50) == {"records": 12}, "one slot for each record at most"


def test_two_geometries() -> None:
    plan = two_geometries()
    assert slot_ranges(plan) == {"big": (3, 8), "small": (2, 12)}
    assert plan.members["big"].keys() == {0, 2}
    smallest, largest = smallest_budget(plan), plan.stored_bytes
    assert slots_for(plan, smallest) == {"big": 3, "small": 2}
    assert slots_for(plan, largest) == {"big": 8, "small": 12}
    middle = slots_for(plan, (smallest + largest) // 2)
    assert 3 < middle["big"] < 8
    assert 2 < middle["small"] < 12


@pytest.mark.parametrize("plan", [make_plan(), two_geometries()], ids=["one", "two"])
def test_too_small_is_refused_with_what_works(plan: Manifest) -> None:
    with pytest.raises(BudgetError) as caught:
        slots_for(plan, smallest_budget(plan) - 1)
    assert f"{smallest_budget(plan) - 1:,}" in caught.value.cause
    assert f"{smallest_budget(plan):,}" in caught.value.fix
    assert f"{plan.stored_bytes:,}" in caught.value.fix


@given(st.data(), st.sampled_from([make_plan(), two_geometries()]))
def test_a_budget_is_never_exceeded_and_never_wasted(data: st.DataObject, plan: Manifest) -> None:
    budget = data.draw(st.integers(smallest_budget(plan), plan.stored_bytes + 10_000))
    slots = dict(slots_for(plan, budget))
    assert cost(plan, slots) <= budget
    for name, (least, most) in slot_ranges(plan).items():
        assert least <= slots[name] <= most
        assert slots[name] == most or cost(plan, slots) + plan.layouts[name].slot_bytes > budget
