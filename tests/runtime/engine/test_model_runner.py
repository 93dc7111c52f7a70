"""Models of all types generate through the engine what ``generate()`` gives, alone and one beside another."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from architectures import FEW_REQUIRED, FURTHER, tiny_model

from moetier.runtime.engine.engine import Engine
from moetier.runtime.engine.model_runner import ModelRunner
from moetier.runtime.engine.packed_runner import PackedRunner, can_pack
from moetier.runtime.engine.sampling import generates_itself
from moetier.runtime.engine.sequence import Request
from moetier.runtime.kernels.layer.attention import use_causal_attention
from moetier.runtime.model.context import can_resume

LENGTHS = (23, 70, 9)  # of prompts: windows of tiny models have 16 tokens, and pages 64
NEW_TOKENS = 12
GREEDY = {"do_sample": False}
# of REQUIRED, those whose tokens can be packed; others have latent keys, states, or masks of their own
PACKED = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "glm4_moe", "minimax_m2", "ernie4_5_moe"}


def prompts() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randint(2, 250, (1, length), generator=random) for length in LENGTHS]


def wanted(model: Any) -> list[list[int]]:
    return [
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)[
            0, ids.shape[1] :
        ].tolist()
        for ids in prompts()
    ]


def small_model(model_type: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny_model(model_type, torch.float32)
        if not generates_itself(model):
            use_causal_attention(model)
    return model


@pytest.mark.parametrize(
    "model_type", [*FEW_REQUIRED, *(pytest.param(each, marks=pytest.mark.slow) for each in sorted(FURTHER))]
)
def test_every_type_generates_through_the_engine_what_generate_gives(model_type: str) -> None:
    model = small_model(model_type)
    if generates_itself(model):
        pytest.skip("it has a generate() of its own, or none")
    packs, pages = can_pack(model, near=0.01), 12
    if model_type in PACKED:
        assert packs
    pass_tokens = 10 if packs and can_pack(model, near=0.01, in_lockstep=True) else 200
    runner = (
        PackedRunner(model, pages, later_chunk=32, packs=True, pass_tokens=pass_tokens)
        if packs
        else ModelRunner(model, pages)
    )
    expected = wanted(model)
    with Engine(runner, pages=pages, max_sequences=3, chunk=32, context=200) as engine:
        # the second time after pages of the first; or the third time after a snapshot of the second
        for _ in range(2 if runner.state_memory is None else 3):
            streams = [engine.stream(Request(tuple(ids[0].tolist()), NEW_TOKENS, GREEDY)) for ids in prompts()]
            assert [[*stream] for stream in streams] == expected
        assert bool(streams[1].sequence.cached) == can_resume(model)
