"""The forward against the architectures' own eager forwards, with records that arrive in any order."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from architectures import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from unsteady import UnsteadySource

from moetier.runtime.experts import EXPERT_PARAMETERS, TieredBlock, early_bytes, experts_forward, experts_modules
from moetier.runtime.kernels import Kernels
from moetier.tiers.errors import ConfigError
from moetier.tiers.keys import BITS, Bits, ExpertKey, RecordLayout
from moetier.tiers.quantize import decode, encode, layout_for
from moetier.tiers.source import Lease
from moetier.tiers.stats import TierCounters, TierStats

BLOCK = 5
CPU = torch.device("cpu")
ODD_ONES = ["gpt_oss", "nemotron_h", "muse_spark", "inkling2", "openai_privacy_filter", "aria", "deepseek_v4"]


class OneSlot:
    """An ExpertSource with a single slot, which the next record overwrites: what is kept of a lease is lost."""

    def __init__(self, records: Sequence[Tensor], order: Callable[[list[int]], Iterable[int]]) -> None:
        self.records = records
        self.order = order
        self.slot = torch.zeros_like(records[0])
        self.demands: list[list[ExpertKey]] = []
        self.open = 0  # iterators that were neither exhausted nor closed

    def acquire(self, keys: Sequence[ExpertKey]) -> Generator[Lease[Tensor], None, None]:
        self.demands.append(list(keys))
        self.open += 1
        try:
            for expert in self.order([key.expert for key in keys]):
                self.slot.copy_(self.records[expert])
                yield Lease(ExpertKey(BLOCK, expert), self.slot, 0)
                self.slot.fill_(0xA5)
        finally:
            self.open -= 1

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        raise NotImplementedError

    def prefetch(self, block: int, wishes: Sequence[ExpertKey]) -> None:
        raise AssertionError("nobody wishes here")

    def stats(self) -> TierStats:
        return TierCounters("one slot").snapshot(slots=1, ready=0, slot_bytes=len(self.slot))

    def close(self) -> None:
        pass


def records_of(module: Any, bits: Bits) -> tuple[RecordLayout, list[Tensor]]:
    parameters = {name: p for name, p in module.named_parameters(recurse=False) if name in EXPERT_PARAMETERS}
    shapes = {name: (tuple(p.shape[1:]), str(p.dtype).removeprefix("torch.")) for name, p in parameters.items()}
    layout = layout_for(shapes, bits=bits, transposed=module.is_transposed)
    records = []
    for expert in range(module.num_experts):
        record = np.zeros(layout.record_bytes, np.uint8)
        encode({name: p[expert].detach() for name, p in parameters.items()}, layout, record, fast=True)
        records.append(torch.from_numpy(record))
    return layout, records


def pair(
    model_type: str,
    dtype: torch.dtype,
    *,
    bits: Bits = 16,
    order: Callable[[list[int]], Iterable[int]] = lambda experts: experts,
) -> tuple[Any, Any, OneSlot]:
    """The first Experts module of a tiny model, its twin without parameters, and the source of the twin."""
    ordinary = next(iter(experts_modules(tiny_model(model_type, dtype)).values()))
    layout, records = records_of(ordinary, bits)
    twin = copy.deepcopy(ordinary)
    for name in EXPERT_PARAMETERS:
        twin._parameters.pop(name, None)
    source = OneSlot(records, order)
    twin.tiered = TieredBlock(BLOCK, layout, source, Kernels(CPU), CPU)
    return ordinary, twin, source


def inputs(module: Any, dtype: torch.dtype, *, tokens: int = 13, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    width = module.down_proj.shape[2 if module.is_transposed else 1]
    index = torch.rand(tokens, module.num_experts, generator=random).topk(3).indices
    return torch.randn(tokens, width, generator=random).to(dtype), index, torch.rand(tokens, 3, generator=random)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@given(random=st.randoms(use_true_random=False), tokens=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_order_of_arrival_changes_nothing(dtype: torch.dtype, random: Any, tokens: int, seed: int) -> None:
    ordinary, twin, source = pair("mixtral", dtype, order=lambda experts: random.sample(experts, len(experts)))
    given_to = inputs(ordinary, dtype, tokens=tokens, seed=seed)
    with torch.no_grad():
        assert torch.equal(experts_forward(twin, *given_to), ordinary(*given_to))
    assert source.open == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model_type", ODD_ONES)
def test_architectures_that_compute_otherwise(model_type: str, dtype: torch.dtype) -> None:
    """Transposed, biased, interleaved, without a gate, normed, summed up in fp32: the last expert arrives first."""
    ordinary, twin, _ = pair(model_type, dtype, order=lambda experts: experts[::-1])
    given_to = inputs(ordinary, dtype)
    with torch.no_grad():
        expected = ordinary(*given_to)
        assert torch.equal(experts_forward(twin, *given_to), expected)
    assert expected.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bits", [bits for bits in BITS if bits < 16])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_quantised_experts_are_eager_ones_with_the_decoded_weights(
    model_type: str, bits: Bits, dtype: torch.dtype
) -> None:
    ordinary, twin, source = pair(model_type, dtype, bits=bits, order=lambda experts: experts[::-1])
    given_to = inputs(ordinary, dtype)
    with torch.no_grad():
        exact = ordinary(*given_to)
        for expert, record in enumerate(source.records):
            for projection in twin.tiered.layout.projections:
                assert projection.bits == bits
                decode(record, twin.tiered.layout, projection.name, getattr(ordinary, projection.name)[expert])
        assert torch.equal(experts_forward(twin, *given_to), ordinary(*given_to))
        assert not torch.equal(exact, ordinary(*given_to))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "nemotron_h", "inkling2"])
def test_what_comes_early_takes_what_was_said(model_type: str, dtype: torch.dtype) -> None:
    """The first expert arrives last: when it does, every other one's output is kept."""
    kept: list[Tensor] = []

    def order(experts: list[int]) -> Iterator[int]:
        before = {id(thing) for thing in gc.get_objects()}
        yield from experts[:0:-1]
        news = (thing for thing in gc.get_objects() if id(thing) not in before and type(thing) is Tensor)
        kept.extend(tensor for tensor in news if tensor.is_floating_point() and tensor.dim() == 2)
        yield experts[0]

    ordinary, twin, _ = pair(model_type, dtype, order=order)
    states, index, weights = inputs(ordinary, dtype, tokens=400)
    experts_forward(twin, states, index, weights)
    said = early_bytes(twin, twin.tiered.layout, 400, 3, dtype)
    share = (index != index.min()).float().mean().item()  # all but those of the first expert
    assert sum(tensor.nbytes for tensor in kept) == pytest.approx(said * share, rel=0.35)


def test_each_wanted_expert_is_asked_for_once() -> None:
    ordinary, twin, source = pair("mixtral", torch.bfloat16)
    states, index, weights = inputs(ordinary, torch.bfloat16, tokens=200)
    index = index.clamp(max=5)  # nobody wants 6 and 7
    experts_forward(twin, states, index, weights)
    assert source.demands == [[ExpertKey(BLOCK, expert) for expert in range(6)]]


def test_experts_that_are_computed_elsewhere_are_left_out() -> None:
    """Expert parallelism marks them with the number of experts."""
    ordinary, twin, source = pair("mixtral", torch.bfloat16)
    states, index, weights = inputs(ordinary, torch.bfloat16)
    index[::2, 1] = ordinary.num_experts
    with torch.no_grad():
        assert torch.equal(experts_forward(twin, states, index, weights), ordinary(states, index, weights))
    assert all(key.expert < ordinary.num_experts for key in source.demands[0])


def test_no_token_for_any_expert_gives_zeros() -> None:
    ordinary, twin, _ = pair("mixtral", torch.bfloat16)
    states, index, weights = inputs(ordinary, torch.bfloat16)
    assert not experts_forward(twin, states, torch.full_like(index, ordinary.num_experts), weights).any()


def test_a_failure_while_computing_gives_the_lease_back() -> None:
    ordinary, twin, source = pair("mixtral", torch.bfloat16)
    states, index, weights = inputs(ordinary, torch.bfloat16)
    with pytest.raises(RuntimeError, match="shapes"):
        experts_forward(twin, states[:, :-1], index, weights)
    assert source.open == 0


@pytest.mark.parametrize("wanted", ["states", "weights"])
def test_a_gradient_is_refused_and_not_lost(wanted: str) -> None:
    ordinary, twin, _ = pair("mixtral", torch.float32)
    states, index, weights = inputs(ordinary, torch.float32)
    {"states": states, "weights": weights}[wanted].requires_grad_()
    out = experts_forward(twin, states, index, weights)
    assert torch.equal(out, ordinary(states, index, weights))
    with pytest.raises(ConfigError, match="gradient"):
        out.sum().backward()
    with torch.no_grad():
        assert torch.equal(experts_forward(twin, states, index, weights), ordinary(states, index, weights))
    with torch.inference_mode():
        assert not experts_forward(twin, states, index, weights).requires_grad


def test_nothing_is_recorded_for_a_gradient_that_nobody_wants() -> None:
    """Not for the parameters of a norm behind the experts either."""
    ordinary, twin, _ = pair("muse_spark", torch.float32)
    assert not experts_forward(twin, *inputs(ordinary, torch.float32)).requires_grad


def test_a_model_that_was_moved_says_so() -> None:
    ordinary, twin, _ = pair("mixtral", torch.bfloat16)
    states, index, weights = inputs(ordinary, torch.bfloat16)
    with pytest.raises(ConfigError, match="moved to meta; its experts are on cpu"):
        experts_forward(twin, states.to("meta"), index, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_was_computed_on_a_replaced_record_is_not_used(dtype: torch.dtype) -> None:
    ordinary, twin, source = pair("mixtral", dtype)
    unsteady = UnsteadySource(source)
    twin.tiered = replace(twin.tiered, source=unsteady)
    for seed in range(10):
        given_to = inputs(ordinary, dtype, seed=seed)
        with torch.no_grad():
            assert torch.equal(experts_forward(twin, *given_to), ordinary(*given_to))
    assert unsteady.broken > 10
    assert unsteady.unasked == 0
