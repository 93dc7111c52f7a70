"""Tokens whose experts are all in memory: computed without a lease, and again if a record is replaced meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import convert_tiny, smallest_ram
from torch import Tensor

import moetier
from moetier.runtime.moe import grouped, quick
from moetier.runtime.moe.experts import experts_modules
from moetier.runtime.stores.registry import read_manifest
from moetier.tiers.errors import ClosedError
from moetier.tiers.layout import ExpertKey

BLOCK = 0


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Any]:
    """A mixtral at 4 bits, with room for one block's top-k records."""
    _, directory = convert_tiny("mixtral", torch.bfloat16, tmp_path, bits=4)
    found, _ = moetier.load(directory, ram=smallest_ram(directory), daemon=None, speculate="off")
    with found.tiers:
        yield found


def compute(model: Any, experts: list[int], on_demand: Callable[..., None] | None = None) -> Tensor:
    module = [*experts_modules(model).values()][BLOCK]
    module.tiered = replace(module.tiered, on_demand=on_demand)
    x = torch.randn(1, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    weights = torch.linspace(0.2, 0.8, len(experts))[None]
    found: Tensor = module(x, torch.tensor([experts]), weights)
    return found


def acquire(model: Any, *experts: int) -> None:
    for lease in model.tiers.source.acquire([ExpertKey(BLOCK, expert) for expert in experts]):
        assert lease.validate()


def test_what_is_in_memory_takes_no_lease(model: Any) -> None:
    """While another caller is between two leases of the same records, the state of the tier is not touched."""
    read = compute(model, [0, 1])
    before = model.tiers.host.stats()
    demands: list[tuple[Any, ...]] = []
    assert torch.equal(compute(model, [0, 1], lambda *arguments: demands.append(arguments)), read)
    after = model.tiers.host.stats()
    assert demands == [(BLOCK, [0, 1])]
    assert (after.hits - before.hits, after.misses - before.misses, after.loads) == (2, 0, before.loads)


def test_records_that_are_replaced_meanwhile_are_read_again(model: Any) -> None:
    """``on_demand`` is called when the records have been found, and before they are used."""
    expected = compute(model, [0, 1])
    before, calls = model.tiers.host.stats(), []

    def replace_them(*arguments: Any) -> None:
        calls.append(arguments)
        acquire(model, 2, 3)  # there is not room for four

    assert torch.equal(compute(model, [0, 1], replace_them), expected)
    assert len(calls) == 1
    after = model.tiers.host.stats()
    assert after.discarded - before.discarded == 2
    assert after.hits + after.misses - before.hits - before.misses == 6, (
        "0 and 1, which were discarded, 2 and 3, and 0 and 1 again"
    )


def few_tokens(model: Any, on_demand: Callable[..., None] | None = None) -> Tensor:
    """Compute three tokens with the experts 0 and 1."""
    module = [*experts_modules(model).values()][BLOCK]
    module.tiered = replace(module.tiered, on_demand=on_demand)
    x = torch.randn(3, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    weights = torch.linspace(0.2, 0.8, 6).reshape(3, 2)
    with torch.no_grad():
        found: Tensor = module(x, torch.tensor([[0, 1], [1, 0], [0, 1]]), weights)
    return found


def test_a_few_tokens_take_no_lease_and_have_the_bits_of_those_that_do(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire(model, 0, 1)
    with monkeypatch.context() as leased:
        leased.setattr(quick, "BATCH_OUTPUTS", 4)
        expected = few_tokens(model)
    monkeypatch.setattr(type(model.tiers.source), "acquire", None)
    before, demands = model.tiers.host.stats(), list[tuple[Any, ...]]()
    assert torch.equal(few_tokens(model, lambda *arguments: demands.append(arguments)), expected)
    after = model.tiers.host.stats()
    assert demands == [(BLOCK, [0, 1])]
    assert (after.hits - before.hits, after.misses - before.misses) == (2, 0)


def test_a_few_tokens_are_computed_again_if_records_are_replaced_meanwhile(model: Any) -> None:
    acquire(model, 0, 1)
    expected, calls = few_tokens(model), []

    def replace_them(*arguments: Any) -> None:
        calls.append(arguments)
        acquire(model, 2, 3)  # there is not room for four

    before = model.tiers.host.stats()
    assert torch.equal(few_tokens(model, replace_them), expected)
    assert len(calls) == 1
    assert model.tiers.host.stats().discarded - before.discarded == 2


def test_experts_of_the_last_tokens_of_a_long_prompt_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that needs all experts keeps the first ones and the last ones without them."""
    _, directory = convert_tiny("mixtral", torch.bfloat16, tmp_path, bits=4, num_local_experts=64)
    monkeypatch.setattr(grouped, "GROUP_OUTPUTS", 16)
    half = read_manifest(directory).stored_bytes // 2
    model, _ = moetier.load(directory, ram=half, daemon=None, speculate="off")
    with model.tiers, torch.no_grad():
        module, tokens = [*experts_modules(model).values()][BLOCK], 400
        index = torch.stack([torch.arange(tokens) % 32 * 2, torch.arange(tokens) % 32 * 2 + 1], 1)
        index[-grouped.RECENT :] = torch.tensor([40, 41])
        states = torch.ones(tokens, model.config.hidden_size, dtype=model.dtype)
        for each in (*experts_modules(model).values(), module):  # all slots are in use before
            each(states, index, torch.ones(tokens, 2) / 2)
        ready = model.tiers.host.ready_experts(BLOCK)
    assert len(ready) < 64
    assert {40, 41} <= {*ready}


def test_some_in_memory_and_some_not(model: Any) -> None:
    alone = [compute(model, [expert]) for expert in range(3)]
    for experts in ([0, 1], [1, 2], [2, 0], [2, 2]):
        weights = torch.linspace(0.2, 0.8, 2)
        wanted = sum(weight * alone[expert].float() / 0.2 for weight, expert in zip(weights, experts, strict=True))
        assert torch.allclose(compute(model, experts).float(), wanted, rtol=0.05, atol=0.01)


def test_an_expert_of_another_device_adds_nothing(model: Any) -> None:
    assert torch.equal(compute(model, [1, 1_000_000]), compute(model, [1]))


@pytest.mark.parametrize("length", [0, 3])
def test_shapes_that_do_not_fit_are_refused(model: Any, length: int) -> None:
    module = [*experts_modules(model).values()][BLOCK]
    x = torch.zeros(1, model.config.hidden_size, dtype=model.dtype)
    with pytest.raises(ValueError, match="shapes"):
        module(x, torch.tensor([[0, 1]]), torch.ones(1, length))
    with pytest.raises(ValueError, match="shapes"):
        module(x[:, 1:], torch.tensor([[0, 1]]), torch.ones(1, 2))


def test_a_closed_tier_is_told(model: Any) -> None:
    compute(model, [0, 1])
    model.tiers.close()
    with pytest.raises(ClosedError):
        compute(model, [0, 1])
