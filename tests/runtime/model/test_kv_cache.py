from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import tiny_model

from moetier.runtime.generation.compat import CACHE
from moetier.runtime.model.budgets import kv_cache_bytes

BATCH, TOKENS = 2, 17


def cached_bytes(model: Any) -> int:
    """What transformers holds after a prefill, states of a constant size left out."""
    ids = torch.randint(2, 250, (BATCH, TOKENS))
    with torch.no_grad():
        cache = getattr(model(input_ids=ids, use_cache=True), CACHE)
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "model_type",
    ["qwen3_moe", "deepseek_v3", "glm_moe_dsa", "qwen3_next", "kimi_linear", "nemotron_h", "qwen3_5_moe", "lfm2_moe"],
)
def test_it_is_what_transformers_holds(model_type: str, dtype: torch.dtype) -> None:
    """Grouped, latent, indexed and hybrid attention; in a part of an image-text model."""
    model = tiny_model(model_type, dtype)
    assert kv_cache_bytes(model.config, TOKENS, BATCH, dtype) == cached_bytes(model) > 0


@pytest.mark.parametrize("model_type", ["gemma4", "gpt_oss", "cohere2_moe", "mixtral"])
def test_windows_are_counted_up_to_their_length(model_type: str) -> None:
    """transformers keeps one token less; layers of gemma4 differ in their heads."""
    model = tiny_model(model_type, torch.bfloat16)
    held = cached_bytes(model)
    assert held <= kv_cache_bytes(model.config, TOKENS, BATCH) <= held * TOKENS / 15


def test_a_window_bounds_what_long_contexts_take() -> None:
    config = tiny_model("cohere2_moe", torch.bfloat16).config
    assert kv_cache_bytes(config, 10_000) == kv_cache_bytes(config, 16)
