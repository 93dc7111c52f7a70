"""How much memory keys and values get, which context it holds, and what other states take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model
from transformers import MixtralConfig

import moetier
from moetier.runtime.config import TierConfig
from moetier.runtime.engine.model_runner import cache_layers, cache_of
from moetier.runtime.generation.compat import CACHE
from moetier.runtime.kernels.layer.attention import use_causal_attention
from moetier.runtime.kernels.layer.paged_cache import PagedCache, PageMemory
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS
from moetier.runtime.model.budgets import kv_cache_bytes
from moetier.runtime.model.context import has_states
from moetier.runtime.model.kv_budget import MIN_PAGES, WITH_STATES, KVBudget, state_bytes

MiB = 1 << 20
MODEL_LENGTH = 40960


def budget(room: int = 400 * MiB, *, page_bytes: int = MiB, experts: int = 1000 * MiB, **options: Any) -> KVBudget:
    config = MixtralConfig(max_position_embeddings=MODEL_LENGTH)
    return KVBudget.of(config, TierConfig.of(**options), page_bytes=page_bytes, room=room, experts=experts)


@pytest.mark.parametrize(
    ("options", "pages", "context"),
    [
        ({}, 100, 100 * PAGE_TOKENS),  # a quarter of the room
        ({"kv_cache": "50%"}, 200, 200 * PAGE_TOKENS),
        ({"kv_cache": 10 * MiB}, 10, 10 * PAGE_TOKENS),
        ({"kv_cache": 10 * MiB, "context": 100}, 10, 100),
        ({"kv_cache": 10 * MiB, "context": 4096}, 10, 10 * PAGE_TOKENS),
        ({"context": 100}, 2, 100),
        ({"context": 8192}, 128, 8192),  # more than a quarter, as it is asked for
        ({"context": 4096, "sequences": 4}, 100, 4096),
        ({"context": 512, "sequences": 4}, 32, 512),
        ({"sequences": 4}, 100, 100 * PAGE_TOKENS),
        ({"ram": 300 * MiB}, 50, 50 * PAGE_TOKENS),  # half of what the experts leave
        ({"ram": "90%"}, 100, 100 * PAGE_TOKENS),  # of what keys and values leave
        ({"ram": 4000 * MiB}, MIN_PAGES, MIN_PAGES * PAGE_TOKENS),
    ],
)
def test_options(options: dict[str, Any], pages: int, context: int) -> None:
    found = budget(**options)
    assert (found.pages, found.context, found.nbytes) == (pages, context, pages * MiB)


def test_no_more_than_the_models_length_is_reserved() -> None:
    assert budget(room=1 << 40).context == MODEL_LENGTH
    assert budget(room=1 << 40).pages == MODEL_LENGTH // PAGE_TOKENS
    assert budget(room=1 << 40, sequences=8).pages == 8 * MODEL_LENGTH // PAGE_TOKENS


def test_eight_bits_take_about_half_the_memory(tinymix_4bit: Path) -> None:
    pages = []
    for bits in (16, 8):
        model, _ = moetier.load(tinymix_4bit, daemon=None, kv_bits=bits)
        with model.tiers:
            pages.append(model.tiers.kv.page_bytes)
    assert 0.5 < pages[1] / pages[0] < 0.532  # heads of 32 numbers, and a scale for each


def test_snapshots_of_states_have_room_besides() -> None:
    config = MixtralConfig(max_position_embeddings=MODEL_LENGTH)
    options = TierConfig.of(context=512, sequences=4)
    found = KVBudget.of(config, options, page_bytes=MiB, room=1 << 40, experts=0, has_snapshots=True)
    assert (found.pages, found.context) == (WITH_STATES * 32, 512)


def test_a_model_without_keys_and_values_has_the_context_that_is_asked_for() -> None:
    assert budget(page_bytes=0, context=1000).context == 1000
    assert budget(page_bytes=0).nbytes == 0


def test_the_cost_is_told() -> None:
    assert budget().describe(6400) == "a context of 6,400 tokens (100 MiB for keys and values)"


def test_a_loaded_model_has_the_budget(tinymix_4bit: Path) -> None:
    model, _ = moetier.load(tinymix_4bit, daemon=None, kv_cache="2MiB")
    with model.tiers:
        assert (
            model.tiers.kv.context
            == PAGE_TOKENS * model.tiers.kv.pages
            == PAGE_TOKENS * (2 * MiB // model.tiers.kv.page_bytes)
        )


QUICK_STATES = {"kimi_linear", "nemotron_h", "qwen3_next", "inkling", "lfm2_moe", "zaya"}
OTHER_STATES = {
    "bailing_hybrid", "glm5_next", "granitemoehybrid", "inkling2", "inkling2_loop", "lara_mini", "qwen3_5_moe",
    "qwen4_exp",
}  # fmt: skip


@pytest.mark.parametrize(
    "model_type",
    [*sorted(QUICK_STATES), *(pytest.param(each, marks=pytest.mark.slow) for each in sorted(OTHER_STATES))],
)
def test_bytes_of_states_are_little_more_than_what_is_kept(model_type: str) -> None:
    """They are known before anything is computed."""
    model = tiny_model(model_type, torch.bfloat16)
    use_causal_attention(model)
    cache = cache_of(model, 64, bits=16)
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=True, **{CACHE: cache})
    kept = sum(part.nbytes for part in cache.state().values())
    assert has_states(model)
    # inputs of convolutions count twice where they are in bf16, and not all are kept: they are few in large models
    assert kept <= state_bytes(model) <= (8 if model_type == "zaya" else 2) * kept


QUICK_INDEX = {"glm5_next", "glm_moe_dsa", "qwen4_exp"}
OTHER_INDEX = {"axk2", "deepseek_v32", "dots3_note", "hy_v4", "hy_v4_vl", "mistral_large4"}


@pytest.mark.parametrize(
    "model_type",
    [*sorted(QUICK_INDEX), *(pytest.param(each, marks=pytest.mark.slow) for each in sorted(OTHER_INDEX))],
)
def test_a_page_with_an_index_takes_no_more_than_its_budget(model_type: str) -> None:
    model = tiny_model(model_type, torch.bfloat16)
    use_causal_attention(model)
    memory = PageMemory(1)
    cache = PagedCache(memory, cache_layers(model))
    cache.resume_at([0], 0)
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=True, **{CACHE: cache})
    assert 0 < memory.page_bytes <= kv_cache_bytes(model.config, PAGE_TOKENS)


def test_a_model_without_states_has_none() -> None:
    assert state_bytes(tiny_model("mixtral", torch.bfloat16)) == 0
