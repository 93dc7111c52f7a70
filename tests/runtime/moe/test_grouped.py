"""Experts that are computed together: the same bits in whatever groups they come, and whatever of a group is lost."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import cache, partial
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from twins import BLOCK, CPU, inputs, pair

from moetier.runtime.kernels.experts.expert_products import BATCH_OUTPUTS
from moetier.runtime.kernels.products.api import Kernels
from moetier.runtime.kernels.products.packed import PackedKernels
from moetier.runtime.moe import grouped
from moetier.runtime.moe.block import TieredBlock
from moetier.runtime.moe.experts import experts_forward
from moetier.tiers.layout import ExpertKey
from moetier.tiers.source import Lease, NoUses

KINDS = ["mixtral", "gpt_oss", "nemotron_h", "muse_spark", "aria"]  # plain; biased; no gate; normed; transposed


class Groups:
    """An ExpertSource that gives leases in groups, in any order; some show garbage, do not hold, and come again. What
    is kept of a group is lost when the next comes."""

    def __init__(self, records: Sequence[Tensor], random: Random, broken: float = 0.0) -> None:
        self.uses = NoUses()
        self.records = records
        self.random = random
        self.broken = broken
        self.lost = 0
        self.requested = dict[int, list[ExpertKey]]()  # by block, the latest prefetch request

    def residents(self, block: int) -> None:
        return None

    def absent(self, keys: Sequence[ExpertKey]) -> Sequence[ExpertKey]:
        return keys

    def prefetch(self, block: int, keys: Sequence[ExpertKey]) -> None:
        self.requested[block] = [*keys]

    def acquire(self, keys: Sequence[ExpertKey], of_total: int = 0) -> Generator[Lease[Tensor], None, None]:
        left = list(keys)
        self.random.shuffle(left)
        while left:
            group = [left.pop() for _ in range(self.random.randint(1, len(left)))]
            answers: list[list[bool]] = []
            copies = []
            for number, key in enumerate(group, 1):
                breaks = self.random.random() < self.broken
                record = torch.full_like(self.records[0], 0x3C) if breaks else self.records[key.expert].clone()
                copies.append(record)
                answers.append([not breaks])
                yield Lease(key, record, 0, partial(list.pop, answers[-1]), number < len(group))
            for key, record, answer in zip(group, copies, answers, strict=True):
                assert not answer, "each lease is proved"
                if torch.equal(record, torch.full_like(record, 0x3C)):
                    left.append(key)
                    self.lost += 1
                record.fill_(0xA5)


@cache
def ways(model_type: str, dtype: torch.dtype) -> tuple[Any, Any, Sequence[Tensor]]:
    """The ordinary module, its twin, whose source each test sets, and the twin's records."""
    ordinary, twin, source = pair(model_type, dtype, bits=4)
    return ordinary, twin, source.records


def computed(twin: Any, kernels: Kernels, source: Any, given_to: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    twin.tiered = TieredBlock(BLOCK, twin.tiered.layout, source, kernels, CPU)
    with torch.no_grad():
        return experts_forward(twin, *given_to)


@pytest.mark.parametrize("model_type", KINDS)
@given(seed=st.integers(0, 10_000), tokens=st.sampled_from([1, 1, 2, 7, 40]), outputs=st.sampled_from([1, 9, 4096]))
@settings(max_examples=12, deadline=None)
def test_groups_change_nothing(model_type: str, seed: int, tokens: int, outputs: int) -> None:
    ordinary, twin, records = ways(model_type, torch.bfloat16)
    given_to = inputs(ordinary, torch.bfloat16, tokens=tokens, seed=seed)
    steady = Groups(records, Random(seed))
    expected = computed(twin, PackedKernels(), steady, given_to)
    assert expected.isfinite().all()
    for number in range(3):
        unsteady = Groups(records, Random(seed + number), broken=0.4)
        with patch.object(grouped, "GROUP_OUTPUTS", outputs):
            assert torch.equal(computed(twin, PackedKernels(), unsteady, given_to), expected)
    exact = computed(twin, Kernels(), Groups(records, Random(seed)), given_to).float()
    assert float((expected.float() - exact).norm() / exact.norm()) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, BATCH_OUTPUTS + 50])
def test_no_token_and_more_than_go_together(tokens: int, dtype: torch.dtype) -> None:
    """Of so many every one wants the same experts: one's rows are cut."""
    ordinary, twin, records = ways("mixtral", dtype)
    states, index, weights = inputs(ordinary, dtype, tokens=tokens)
    index = index.clone()
    index[:] = torch.tensor([2, 0, 1])
    quick = computed(twin, PackedKernels(), Groups(records, Random(1)), (states, index, weights))
    exact = computed(twin, Kernels(), Groups(records, Random(1)), (states, index, weights))
    assert quick.shape == exact.shape == states.shape
    assert quick.dtype == dtype
    assert float((quick.float() - exact.float()).norm()) <= 0.03 * float(exact.float().norm())


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("chosen", [(1, 1, 1), (2, 0, 2), (0, 1, 1_000_000)], ids=str)
def test_an_expert_twice_and_one_of_another_device(tokens: int, chosen: tuple[int, ...]) -> None:
    ordinary, twin, records = ways("mixtral", torch.float32)
    states, index, weights = inputs(ordinary, torch.float32, tokens=tokens)
    index = torch.tensor([chosen] * tokens)
    quick = computed(twin, PackedKernels(), Groups(records, Random(1)), (states, index, weights))
    exact = computed(twin, Kernels(), Groups(records, Random(1)), (states, index, weights))
    assert float((quick - exact).norm() / exact.norm()) < 0.03


@pytest.mark.parametrize("tokens", [1, 5])
def test_tokens_whose_experts_are_all_elsewhere_get_zeros(tokens: int) -> None:
    """With expert parallelism, a number of ``num_experts`` means an expert of another device."""
    ordinary, twin, records = ways("mixtral", torch.bfloat16)
    states, index, weights = inputs(ordinary, torch.bfloat16, tokens=tokens)
    index = torch.full_like(index, twin.num_experts)
    found = computed(twin, PackedKernels(), Groups(records, Random(1)), (states, index, weights))
    assert torch.equal(found, torch.zeros_like(states))


def test_a_demand_in_several_groups_is_noted_once_with_all_experts_after_the_first_group() -> None:
    ordinary, twin, records = ways("mixtral", torch.bfloat16)
    states, index, weights = inputs(ordinary, torch.bfloat16, tokens=40)
    source, noted = Groups(records, Random(1)), list[tuple[int, list[int], int]]()
    acquired, acquire = list[list[int]](), source.acquire

    def seen(keys: Sequence[ExpertKey], of_total: int = 0) -> Generator[Lease[Tensor], None, None]:
        acquired.append([key.expert for key in keys])
        return acquire(keys, of_total)

    source.acquire = seen  # type: ignore[method-assign]
    twin.tiered = TieredBlock(
        BLOCK,
        twin.tiered.layout,
        source,  # type: ignore[arg-type]
        PackedKernels(),
        CPU,
        lambda block, experts: noted.append((block, [*experts], len(acquired))),
    )
    with torch.no_grad(), patch.object(grouped, "GROUP_OUTPUTS", 9):
        experts_forward(twin, states, index, weights)
    used = sorted({*index.flatten().tolist()})
    assert len(acquired) > 1
    assert acquired[0] != used
    assert noted == [(BLOCK, used, 1)]


@pytest.mark.parametrize("most", [None, 2], ids=["all experts", "few experts"])
def test_the_next_blocks_experts_are_requested_after_a_prompt_that_uses_nearly_all(most: int | None) -> None:
    ordinary, twin, records = ways("mixtral", torch.bfloat16)
    states, index, weights = inputs(ordinary, torch.bfloat16, tokens=40)
    assert {*index.flatten().tolist()} == {*range(len(records))}
    source, following = Groups(records, Random(1)), [ExpertKey(BLOCK + 1, expert) for expert in range(5)]
    layout = twin.tiered.layout
    twin.tiered = TieredBlock(BLOCK, layout, source, PackedKernels(), CPU, following=following)  # type: ignore[arg-type]
    with torch.no_grad(), patch.object(grouped, "GROUP_OUTPUTS", 9):
        experts_forward(twin, states, index if most is None else index % most, weights)
    assert source.requested == {BLOCK: [], **({BLOCK + 1: following} if most is None else {})}
