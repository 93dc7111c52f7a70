"""Attention of one token in one call, beside the architecture's own; and which architectures get it."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FURTHER, REQUIRED, tiny_model
from torch import Tensor
from transformers import DynamicCache

from moetier.runtime.generation.compat import CACHE
from moetier.runtime.kernels.attention import use_decode_attention
from moetier.runtime.kernels.growing_cache import TOKENS, GrowingLayer, use_growing_layers
from moetier.runtime.kernels.norm import use_quick_norms
from moetier.runtime.kernels.quick_attention import OneTokenAttention, QuickAttention, use_quick_attention
from moetier.runtime.kernels.row import use_row_weights
from moetier.runtime.model.load import load

BF16 = torch.bfloat16
# types whose attention is computed in one call, with heads of 32 numbers
QUICK = {
    "dots1", "exaone_moe", "flex_olmo", "granitemoe", "granitemoeshared", "hy_v3", "kolibri1", "lara_mini", "minimax",
    "minimax_m2", "mixtral", "phimoe", "qwen3_moe", "solar_open",
}  # fmt: skip


def pair(model_type: str, **changes: Any) -> tuple[Any, Any]:
    """A model with quick attention, and the same without it."""
    model = tiny_model(model_type, BF16, **{"head_dim": 32} | changes)
    model.set_attn_implementation("sdpa")
    use_decode_attention(model)
    use_growing_layers(model)
    use_quick_norms(model)
    plain = copy.deepcopy(model)
    for one in (model, plain):
        use_row_weights(one)
    use_quick_attention(model)
    return model, plain


def quick(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, QuickAttention)]


class Calls:
    """How many tokens were computed in one call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        of = OneTokenAttention.of

        def counted(attention: OneTokenAttention, *arguments: Any, **named: Any) -> Tensor | None:
            found = of(attention, *arguments, **named)
            self.count += found is not None
            return found

        monkeypatch.setattr(OneTokenAttention, "of", counted)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@torch.inference_mode()
def decode(model: Any, ids: list[int], cache: Any = None) -> tuple[Tensor, Any]:
    """Logits [tokens, vocabulary] of tokens that are given one by one, and the cache."""
    found = []
    for token in ids:
        output = model(torch.tensor([[token]]), **{CACHE: cache}, use_cache=True)
        found.append(output.logits[0, -1].float())
        cache = output.past_key_values
    return torch.stack(found), cache


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_a_model_says_what_it_says_without(model_type: str, calls: Calls) -> None:
    model, plain = pair(model_type, **({"sliding_window": None} if model_type == "mixtral" else {}))
    assert len(quick(model)) == model.config.num_hidden_layers
    ids = [5, 17, 200, 31, 99, 4, 4, 120]
    with torch.inference_mode():
        prompt = torch.tensor([ids[:3]])
        caches = [one(prompt, use_cache=True).past_key_values for one in (model, plain)]
    calls.count = 0
    found, cache = decode(model, ids, caches[0])
    # a cache that the model has made grows in place from its second use on
    assert calls.count == (len(ids) - 1) * model.config.num_hidden_layers
    wanted, other = decode(plain, ids, caches[1])
    assert torch.equal(found, wanted)
    for own, theirs in zip(cache.layers, other.layers, strict=True):
        assert own.get_seq_length() == theirs.get_seq_length() == 11
        assert torch.equal(own.keys, theirs.keys)
        assert torch.equal(own.values, theirs.values)


@pytest.mark.parametrize("model_type", sorted(REQUIRED | FURTHER))
def test_which_architectures_get_it(model_type: str) -> None:
    try:
        model, _ = pair(model_type)
    except (TypeError, ValueError):
        pytest.skip("no heads of 32 numbers")
    assert bool(quick(model)) is (model_type in QUICK)


def test_the_number_of_threads_changes_no_bits() -> None:
    model, _ = pair("qwen3_moe")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(decode(model, [5, 6, 7, 8])[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_cache_that_is_full_grows(calls: Calls) -> None:
    model, plain = pair("qwen3_moe")
    ids = [token % 200 for token in range(TOKENS + 3)]
    found, cache = decode(model, ids)
    assert torch.equal(found, decode(plain, ids)[0])
    assert cache.layers[0].keys.shape[-2] == TOKENS + 3
    # transformers computes the first tokens of a cache and of more memory
    assert 0 < calls.count < len(ids) * model.config.num_hidden_layers


def test_two_caches_that_go_on_from_one() -> None:
    model, _ = pair("qwen3_moe")
    _, cache = decode(model, [5, 6, 7])
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    first, _ = decode(model, [8, 9], cache)
    second, _ = decode(model, [8, 9], forked)
    assert torch.equal(first, second)
    assert cache.layers[0].get_seq_length() == forked.layers[0].get_seq_length() == 5


def test_hooks_and_replaced_parts_are_called(calls: Calls) -> None:
    model, _ = pair("mixtral", sliding_window=None)
    module = model.model.layers[0].self_attn
    _, cache = decode(model, [5, 6])
    _, cache = decode(model, [7], cache)
    expected, _ = decode(model, [7], copy.deepcopy(cache))
    seen: list[Any] = []
    hook = module.v_proj.register_forward_hook(lambda *_: seen.append(1))
    calls.count = 0
    found, _ = decode(model, [7], copy.deepcopy(cache))
    hook.remove()
    assert seen == [1]
    assert calls.count == model.config.num_hidden_layers - 1
    assert torch.equal(found, expected)
    module.v_proj = torch.nn.Sequential(module.v_proj, torch.nn.Identity())
    calls.count = 0
    decode(model, [7], copy.deepcopy(cache))
    assert calls.count == model.config.num_hidden_layers - 1


def test_other_inputs_are_the_architectures(calls: Calls) -> None:
    model, plain = pair("mixtral")
    ids, calls.count = torch.tensor([[5, 6, 7], [8, 9, 10]]), 0
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, plain(ids).logits)
        padded = torch.tensor([[0, 1, 1], [1, 1, 1]])
        caches = [one(ids, attention_mask=padded, use_cache=True).past_key_values for one in (model, plain)]
        more = torch.cat([padded, torch.ones(2, 1, dtype=torch.int64)], 1)
        logits = [
            one(ids[:, :1], attention_mask=more, **{CACHE: cache}).logits
            for one, cache in zip((model, plain), caches, strict=True)
        ]
    assert torch.equal(*logits)
    assert calls.count == 0
    model(ids[:1, :1], **{CACHE: DynamicCache()}).logits.sum().backward()
    assert calls.count == 0


def test_an_attention_that_does_more_is_not_taken_for_another() -> None:
    model, _ = pair("mixtral", sliding_window=None)
    for factor in (1.0, 1.05):
        module = copy.deepcopy(model.model.layers[0].self_attn)
        (kind,) = type(module).__bases__[1:]

        @functools.wraps(kind.forward)
        def forward(self: Any, *arguments: Any, kind: Any = kind, factor: float = factor, **named: Any) -> Any:
            found, weights = kind.forward(self, *arguments, **named)
            return found * factor, weights

        module.__class__ = type("LoudAttention", (kind,), {"forward": forward, "__module__": kind.__module__})
        own = copy.copy(model)
        own._modules = {"attention": module, "rotary": model.model.rotary_emb}
        use_row_weights(own)
        use_quick_attention(own)
        assert isinstance(module, QuickAttention) is (factor == 1.0)


def test_a_cache_of_another_kind_is_left_alone(calls: Calls) -> None:
    model, plain = pair("mixtral")
    with torch.inference_mode():
        for one in (model, plain):
            one.set_attn_implementation("eager")
    calls.count = 0
    assert torch.equal(decode(model, [5, 6, 7])[0], decode(plain, [5, 6, 7])[0])
    assert calls.count == 0


@pytest.mark.parametrize("exact", [False, True])
def test_a_quantised_models_attention_is_such(tinymix_4bit: Path, exact: bool, calls: Calls) -> None:
    model, _ = load(tinymix_4bit, daemon=None, exact=exact, device="cpu")
    with model.tiers:
        assert bool(quick(model)) is not exact
        _, cache = decode(model, [5, 6, 7, 8])
        assert bool(calls.count) is not exact
        assert any(isinstance(layer, GrowingLayer) for layer in cache.layers) is not exact
