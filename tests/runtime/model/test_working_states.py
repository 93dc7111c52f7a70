"""The bytes of a sequence's state are known before anything is computed."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny_model

from moetier.runtime.engine.model_runner import cache_of
from moetier.runtime.generation.compat import CACHE
from moetier.runtime.kernels.layer.attention import use_causal_attention
from moetier.runtime.model.context import has_states
from moetier.runtime.model.working_states import state_bytes

QUICK = {"kimi_linear", "nemotron_h", "qwen3_next", "inkling", "lfm2_moe", "zaya"}
OTHERS = {
    "bailing_hybrid", "glm5_next", "granitemoehybrid", "inkling2", "inkling2_loop", "lara_mini", "qwen3_5_moe",
    "qwen4_exp",
}  # fmt: skip


@pytest.mark.parametrize(
    "model_type", [*sorted(QUICK), *(pytest.param(each, marks=pytest.mark.slow) for each in sorted(OTHERS))]
)
def test_they_are_little_more_than_what_is_kept(model_type: str) -> None:
    model = tiny_model(model_type, torch.bfloat16)
    use_causal_attention(model)
    cache = cache_of(model, 64, bits=16)
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=True, **{CACHE: cache})
    kept = sum(part.nbytes for part in cache.state().values())
    assert has_states(model)
    # inputs of convolutions count twice where they are in bf16, and not all are kept: they are few in large models
    assert kept <= state_bytes(model) <= (8 if model_type == "zaya" else 2) * kept


def test_a_model_without_states_has_none() -> None:
    assert state_bytes(tiny_model("mixtral", torch.bfloat16)) == 0
