"""Prompts in chunks: only of models that go on in the middle of one, and those give what they give for the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import TYPES, tiny_model
from comparison import GENERATES_OTHERWISE

from moetier.runtime.generation.decoding import chunks_of

CHUNK = 5


def first_logits(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    logits: torch.Tensor = found.logits[0]
    return logits


@pytest.mark.parametrize("model_type", TYPES)
def test_chunks_give_what_the_whole_gives(model_type: str) -> None:
    model = tiny_model(model_type, torch.float32)
    if model_type in GENERATES_OTHERWISE or not model.can_generate():
        pytest.skip("it generates no text")
    ids = torch.randint(2, 250, (1, 17), generator=torch.Generator().manual_seed(1))
    options = chunks_of(model, 17, CHUNK)
    assert options in ({}, {"prefill_chunk_size": CHUNK})
    if options:
        torch.testing.assert_close(first_logits(model, ids, **options), first_logits(model, ids), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "resumes"),
    [
        *((name, True) for name in ("mixtral", "qwen3_moe", "gpt_oss", "qwen3_next", "nemotron_h", "deepseek_v32")),
        *((name, True) for name in ("glm5_next", "qwen4_exp", "mistral_large4")),
        *((name, False) for name in ("deepseek_v4", "jamba", "minimax", "unlimited_ocr")),
    ],
)
def test_which_models_can_resume(model_type: str, resumes: bool) -> None:
    model = tiny_model(model_type, torch.float32)
    assert bool(chunks_of(model, 17, CHUNK)) == resumes
    assert chunks_of(model, CHUNK, CHUNK) == {}
