"""tinymix gives the same logits, bit for bit, whatever its budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model
from places import TESTS
from torch import Tensor

import moetier
from moetier.runtime.generation.compat import CACHE
from moetier.runtime.model.budgets import kv_cache_bytes
from moetier.tiers.store.reader import ShardStore

PROMPT_TOKENS = 600  # well beyond any shape at which a kernel for few rows would do
NEW_TOKENS = 4
RECORDS = 64


@pytest.fixture(scope="module")
def text() -> str:
    return (TESTS / "assets/texts/python.txt").read_text()


def logits(folder: Path, ram: int, text: str) -> Tensor:
    """[tokens, vocabulary] of a long prefill and a few decode steps."""
    model, tokenizer = moetier.load(folder, ram=ram, device="cpu")
    with model.tiers, torch.no_grad():
        assert tokenizer is not None
        tokens = tokenizer(text, return_tensors="pt").input_ids[:, : PROMPT_TOKENS + NEW_TOKENS]
        output = model(tokens[:, :PROMPT_TOKENS], use_cache=True)
        rows = [output.logits[0]]
        for position in range(PROMPT_TOKENS, PROMPT_TOKENS + NEW_TOKENS):
            output = model(tokens[:, position : position + 1], **{CACHE: output.past_key_values})
            rows.append(output.logits[0])
        (host,) = model.tiers.stats()
        assert host.slots == ram // record_bytes(folder)
    return torch.cat(rows)


def record_bytes(folder: Path) -> int:
    with ShardStore.open(folder) as store:
        return store.layout(0).slot_bytes


@pytest.mark.parametrize(
    "budgets",
    [
        pytest.param((2, 3, 17, 63), id="some"),
        pytest.param(tuple(range(2, RECORDS + 1)), id="every", marks=pytest.mark.slow),
    ],
)
def test_every_budget_gives_the_same_logits(tinymix_4bit: Path, text: str, budgets: tuple[int, ...]) -> None:
    one = record_bytes(tinymix_4bit)
    expected = logits(tinymix_4bit, RECORDS * one, text)
    assert expected.isfinite().all()
    for budget in budgets:
        assert torch.equal(logits(tinymix_4bit, budget * one, text), expected), f"{budget} records"


def test_a_prefill_reads_each_wanted_expert_once(tinymix_4bit: Path, text: str) -> None:
    model, tokenizer = moetier.load(tinymix_4bit, ram=2 * record_bytes(tinymix_4bit), device="cpu")
    wanted: list[int] = []  # distinct experts, by block
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _, inputs: wanted.append(len(inputs[1].unique())))
    with model.tiers, torch.no_grad():
        assert tokenizer is not None
        model(tokenizer(text, return_tensors="pt").input_ids[:, :PROMPT_TOKENS])
        (host,) = model.tiers.stats()
    assert sum(wanted) > 2 * len(wanted)
    assert (host.misses, host.hits, host.joined) == (sum(wanted), 0, 0)
    assert host.bytes_in == sum(wanted) * record_bytes(tinymix_4bit)


BATCH, TOKENS = 2, 17


def cached_bytes(model: Any) -> int:
    """Return the bytes of transformers' cache after a prefill, without states of a constant size."""
    ids = torch.randint(2, 250, (BATCH, TOKENS))
    with torch.no_grad():
        cache = getattr(model(input_ids=ids, use_cache=True), CACHE)
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values", "indexer_keys"))
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
