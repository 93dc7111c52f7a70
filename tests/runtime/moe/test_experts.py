"""The forward against the architectures' own eager forwards, with records that arrive in any order."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from twins import BLOCK, OneSlot, inputs, pair
from unsteady import UnsteadySource

from moetier.runtime.moe.experts import experts_forward, output_bytes
from moetier.tiers.errors import ConfigError
from moetier.tiers.layout import BITS, Bits, ExpertKey
from moetier.tiers.quant.codec import decode

ODD_ONES = ["gpt_oss", "nemotron_h", "muse_spark", "inkling2", "openai_privacy_filter", "aria", "deepseek_v4"]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def mixtral(request: pytest.FixtureRequest) -> tuple[torch.dtype, Any, Any, OneSlot]:
    return request.param, *pair("mixtral", request.param)


@given(random=st.randoms(use_true_random=False), tokens=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_order_of_arrival_changes_nothing(
    mixtral: tuple[torch.dtype, Any, Any, OneSlot], random: Any, tokens: int, seed: int
) -> None:
    dtype, ordinary, twin, source = mixtral
    source.order = lambda experts: random.sample(experts, len(experts))
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
def test_kept_outputs_take_the_announced_memory(model_type: str, dtype: torch.dtype) -> None:
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
    said = output_bytes(twin, twin.tiered.layout, 400, 3, dtype)
    share = (index != index.min()).float().mean().item()  # all but those of the first expert
    assert sum(tensor.nbytes for tensor in kept) == pytest.approx(said * share, rel=0.35)


def test_each_wanted_expert_is_asked_for_once() -> None:
    ordinary, twin, source = pair("mixtral", torch.bfloat16)
    states, index, weights = inputs(ordinary, torch.bfloat16, tokens=200)
    index = index.clamp(max=5)  # nobody wants 6 and 7
    experts_forward(twin, states, index, weights)
    assert source.demands == [[ExpertKey(BLOCK, expert) for expert in range(6)]]


def test_experts_of_other_devices_are_left_out() -> None:
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


def test_nothing_is_recorded_for_a_gradient_that_is_not_needed() -> None:
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
