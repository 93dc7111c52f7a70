"""When a block tells of its demand: before it computes, or while it waits for reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import moetier
from moetier.runtime.moe.block import BlockDemand
from moetier.runtime.moe.experts import experts_modules

RAM = 4 << 20  # 18 of 64 experts: two or three of a block
Events = list[set[int] | list[int]]  # a demand; experts that came together


@pytest.fixture
def demand(tinymix_4bit: Path) -> Iterator[Callable[..., Events]]:
    """Demands experts of one block, and returns what happened."""
    model, _ = moetier.load(tinymix_4bit, ram=RAM, daemon=None, speculate="off")
    with model.tiers:
        module = [*experts_modules(model).values()][3]
        events: Events = []
        tiered = replace(module.tiered, on_demand=lambda block, experts: events.append({*experts}))

        def run(*experts: int) -> Events:
            events.clear()
            for leases in BlockDemand(tiered).leases(experts):
                events.append([lease.key.expert for lease in leases])
            return [*events]

        yield run


def test_where_all_are_resident_it_tells_before_it_computes(demand: Callable[..., Events]) -> None:
    demand(1, 2)
    told, together = demand(2, 1)
    assert told == {1, 2}
    assert sorted(together) == [1, 2]


def test_where_some_are_absent_it_tells_while_they_are_read(demand: Callable[..., Events]) -> None:
    for experts in ((1, 2), (4, 3), (3, 5)):
        demand(*experts)  # 3 is resident for sure, 1 is not
    assert demand(3, 1) == [[3], {1, 3}, [1]]
