"""When a block tells of its demand, and what its experts have given until then."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moetier
from moetier.runtime.moe.experts import experts_modules

RAM = 4 << 20  # 18 of 64 experts: two or three of a block
Told = list[tuple[set[int], Tensor | None]]


@pytest.fixture(params=[False, True], ids=["grouped", "eager"])
def block(tinymix_4bit: Path, request: pytest.FixtureRequest) -> Any:
    """The experts of one block, and what is told: experts, and what they have given."""
    model, _ = moetier.load(tinymix_4bit, ram=RAM, daemon=None, speculate="off", exact=request.param)
    with model.tiers, torch.no_grad():
        module = [*experts_modules(model).values()][3]
        told: Told = []
        hidden = torch.randn(3, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(model.dtype)

        def demanded(block: int, experts: Collection[int], so_far: Callable[[], Tensor | None]) -> None:
            part = so_far()
            told.append((set(experts), None if part is None else part.clone()))

        def run(experts: list[int], weights: list[float], rows: int = 1) -> Tensor:
            index = torch.tensor([experts] * rows)
            output: Tensor = module(hidden[:rows], index, torch.tensor([weights] * rows, dtype=model.dtype))
            return output

        module.tiered = replace(module.tiered, demanded=demanded)
        yield run, told


def test_where_all_are_there_it_tells_before_it_computes(block: Any) -> None:
    run, told = block
    run([1, 2], [0.6, 0.4])
    told.clear()
    run([2, 1], [0.6, 0.4])
    assert told == [({1, 2}, None)]


def test_while_others_are_read_it_tells_what_has_been_given(block: Any) -> None:
    run, told = block
    run([1, 2], [0.6, 0.4])
    run([4, 3], [0.5, 0.5])
    run([3, 5], [0.5, 0.5])  # 3 is there for sure, 1 is not
    told.clear()
    whole = run([3, 1], [0.6, 0.4])
    ((experts, part),) = told
    assert experts == {1, 3}
    assert part.shape == whole.shape
    alone = run([3, 1], [0.6, 0.0])
    assert torch.allclose(part.float(), alone.float(), rtol=1e-2, atol=1e-3 * float(whole.abs().max()))
    assert not torch.allclose(part.float(), whole.float(), rtol=1e-2, atol=1e-3 * float(whole.abs().max()))


def test_of_several_tokens_nothing_is_told_but_the_demand(block: Any) -> None:
    run, told = block
    run([4, 5], [0.6, 0.4], rows=3)
    assert told == [({4, 5}, None)]
