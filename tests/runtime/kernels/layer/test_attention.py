"""One token's attention, beside torch's own on numbers in fp32; and which models get it."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from architectures import tiny_model
from comparison import convert_tiny
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM, Gemma4ForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from moetier.runtime.generation.compat import CACHE
from moetier.runtime.kernels.jit.team import Kernel
from moetier.runtime.kernels.layer import attention
from moetier.runtime.kernels.layer.attention import NAME, WITH_SINKS, _fits, causal_attention, use_causal_attention
from moetier.runtime.kernels.layer.attention_piece import PIECE
from moetier.runtime.kernels.layer.growing_cache import use_growing_layers
from moetier.runtime.kernels.layer.masks import Band, with_band
from moetier.runtime.model.load import load


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "bool", "added"])
@pytest.mark.parametrize(
    ("heads", "key_heads", "width", "values"),
    [(4, 4, 16, 16), (8, 2, 64, 64), (6, 1, 48, 32), (5, 1, 80, 16), (12, 1, 192, 128)],
)
@pytest.mark.parametrize("length", [1, 15, 16, 77])
def test_it_is_what_torch_says(
    heads: int, key_heads: int, width: int, values: int, length: int, mask: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    query = torch.randn(3, heads, 1, width).to(dtype)
    key, value = torch.randn(3, key_heads, length, width).to(dtype), torch.randn(3, key_heads, length, values).to(dtype)
    allowed = (torch.rand(3, 1, 1, length) < 0.6) | (torch.arange(length) == 0)
    given: Tensor | None = None if mask == "none" else allowed
    if mask == "added":
        given = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    with torch.inference_mode():
        found, _ = causal_attention(nn.Module(), query, key, value, given, scaling=0.2)
    assert found.shape == (3, 1, heads, values)
    expected = scaled_dot_product_attention(
        query.float(),
        key.float(),
        value.float(),
        None if mask == "none" else allowed,
        scale=0.2,
        enable_gqa=True,
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # the result is rounded to bf16
    torch.testing.assert_close(found.float(), expected.transpose(1, 2), atol=tolerance, rtol=tolerance)


LENGTHS = [PIECE - 1, PIECE, PIECE + 1, PIECE + 17, 2 * PIECE, 3 * PIECE + 5]
MASKS = {
    "no mask": lambda length: None,
    "padding": lambda length: torch.arange(length) >= length - 3,  # whole pieces are masked
    "a window": lambda length: (torch.arange(length) // 50) % 9 == 1,
    "-inf": lambda length: torch.zeros(length).masked_fill(torch.arange(length) < length - 3, -math.inf),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_contexts_are_divided_into_pieces(dtype: torch.dtype, length: int, mask: str) -> None:
    query, key, value = attended(length, dtype)
    given = None if (row := MASKS[mask](length)) is None else row.expand(2, 1, 1, length)
    with torch.inference_mode():
        found, _ = causal_attention(nn.Module(), query, key, value, given)
    expected = scaled_dot_product_attention(
        query.double(),
        key.double(),
        value.double(),
        given if given is None or given.dtype == torch.bool else given.double(),
        enable_gqa=True,
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), expected.transpose(1, 2), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("sink", [-40.0, 0.0, 3.0, 40.0, math.nan])
@pytest.mark.parametrize("length", [1, 17, PIECE + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_take_their_share(dtype: torch.dtype, length: int, sink: float) -> None:
    """Three heads share a head of keys. ``sink``: of every second head; NaN: it has none, as -inf says."""
    query, key, value = attended(length, dtype)
    sinks = torch.randn(6).to(dtype)
    sinks[::2] = -math.inf if math.isnan(sink) else sink
    with torch.inference_mode():
        found, _ = causal_attention(nn.Module(), query, key, value, None, scaling=0.25, s_aux=sinks)
    keys, values = (tensor.double().repeat_interleave(3, dim=1) for tensor in (key, value))
    scores = 0.25 * query.double() @ keys.transpose(2, 3)
    scores = torch.cat([scores, sinks.double().view(1, 6, 1, 1).expand(2, 6, 1, 1)], -1)
    expected = scores.softmax(-1)[..., :-1] @ values
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), expected.transpose(1, 2), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("gpt_oss", WITH_SINKS),
        ("granitemoe_swa", WITH_SINKS),
        ("deepseek_v4", "eager"),
    ],
)
def test_an_architectures_own_function_is_replaced_if_it_has_sinks(kind: str, expected: str) -> None:
    """And if its code gives the mask on as it is: DeepSeek-V4 hides compressed tokens by extending it."""
    model = _tiny(kind, "cpu")
    use_causal_attention(model)
    assert model.config._attn_implementation == expected


def test_an_own_function_that_is_asked_for_by_name_stays() -> None:
    """hy_v4 hides tokens that its indexer does not choose, if it computes so."""
    model = tiny_model("hy_v4", torch.float32)
    use_causal_attention(model)
    assert model.config._attn_implementation == "eager"


@torch.inference_mode()
def test_a_model_with_sinks_says_the_same_as_with_its_own_function() -> None:
    """A prompt and single tokens, beyond a window of 16."""
    own = tiny_model("gpt_oss", torch.float32, head_dim=32)
    model = copy.deepcopy(own)
    use_causal_attention(model)
    use_growing_layers(model)
    caches: list[Any] = [None, None]
    for ids in ([5, 6, 7, 8, 9], *([token] for token in range(40, 70)), [3, 4, 5], [6]):
        found = []
        for number, one in enumerate((own, model)):
            output = one(torch.tensor([ids]), **{CACHE: caches[number]}, use_cache=True)
            caches[number] = output[CACHE]
            found.append(output.logits)
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [0, 1, 50])
def test_a_prompt_with_sinks_is_computed_some_tokens_at_a_time(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no mask, with one row for all tokens, and with a row for each."""
    torch.manual_seed(0)
    layer = tiny_model("gpt_oss", torch.float32).model.layers[0].self_attn
    heads, key_heads, width = layer.config.num_attention_heads, layer.config.num_key_value_heads, layer.head_dim
    query, keys = torch.randn(2, heads, 50, width), torch.randn(2, key_heads, 50, width)
    mask = -10 * torch.rand(2, 1, rows, 50) if rows else None
    given = {"scaling": 0.2, "dropout": 0.0, "s_aux": layer.sinks}
    with torch.inference_mode():
        expected, _ = eager_attention_forward(layer, query, keys, keys, mask, **given)
        monkeypatch.setattr(attention, "SLICE_BYTES", 7 * 2 * heads * 50 * attention.SCORE_BYTES)
        found, weights = attention.sink_attention(layer, query, keys, keys, mask, **given)
    assert weights is None, "computed in slices"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_tokens_with_sinks_that_attend_to_all_do_so() -> None:
    """transformers makes no mask for SDPA, as it makes none for a causal prompt."""
    layer = copy.deepcopy(tiny_model("gpt_oss", torch.float32).model.layers[0].self_attn)
    layer.is_causal = False
    heads, key_heads, width = layer.config.num_attention_heads, layer.config.num_key_value_heads, layer.head_dim
    query, keys = torch.randn(2, heads, 5, width), torch.randn(2, key_heads, 5, width)
    mask = torch.zeros(2, 1, 5, 5)
    with_band(mask, Band(0, 5))
    given = {"scaling": 0.2, "dropout": 0.0, "s_aux": layer.sinks}
    with torch.inference_mode():
        expected, _ = eager_attention_forward(layer, query, keys, keys, mask, **given)
        computed, _ = attention.sink_attention(layer, query, keys, keys, mask, **given)
    assert torch.equal(computed, expected)


def test_an_own_function_that_shall_return_weights_stays() -> None:
    model = tiny_model("gpt_oss", torch.float32)
    model.config.output_attentions = True
    use_causal_attention(model)
    with torch.inference_mode():
        weights = model(torch.tensor([[5]])).attentions
    assert len(weights) == model.config.num_hidden_layers


def test_an_own_function_that_does_more_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _tiny("gpt_oss", "cpu")
    code = sys.modules[type(model).__module__]
    own = code.eager_attention_forward  # type: ignore[attr-defined]
    monkeypatch.setattr(code, "eager_attention_forward", lambda *given, **named: (own(*given, **named)[0] * 1.2, None))
    use_causal_attention(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("length", [*LENGTHS, 20 * PIECE + 9])
def test_the_number_of_threads_changes_no_bit(length: int) -> None:
    query, key, value = attended(length, torch.bfloat16)
    before, found = torch.get_num_threads(), []
    try:
        with torch.inference_mode():
            for threads in (1, 2, 3, 4):
                torch.set_num_threads(threads)
                # again and again, because other threads take other pieces and finish in another order
                found += [causal_attention(nn.Module(), query, key, value, None)[0] for _ in range(20)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)


def test_one_head_of_keys_uses_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, run = [], Kernel.run
    monkeypatch.setattr(Kernel, "run", lambda kernel, context, most: asked.append(most) or run(kernel, context, most))
    query, key, value = torch.randn(1, 4, 1, 64), torch.randn(1, 1, 9 * PIECE, 64), torch.randn(1, 1, 9 * PIECE, 64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        with torch.inference_mode():
            causal_attention(nn.Module(), query, key, value, None)
    finally:
        torch.set_num_threads(before)
    assert asked == [4]


def test_a_sequence_does_not_depend_on_others() -> None:
    query, key, value = attended(2 * PIECE + 1, torch.float32)
    with torch.inference_mode():
        both, _ = causal_attention(nn.Module(), query, key, value, None)
        for i in range(2):
            alone, _ = causal_attention(nn.Module(), query[i : i + 1], key[i : i + 1], value[i : i + 1], None)
            assert torch.equal(alone[0], both[i])


def attended(length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Query, keys and values of two sequences. The largest scores are anywhere."""
    torch.manual_seed(length)
    query = 3 * torch.randn(2, 6, 1, 32)
    key, value = torch.randn(2, 2, length, 32), torch.randn(2, 2, length, 48)
    return query.to(dtype), key.to(dtype), value.to(dtype)


@pytest.mark.parametrize("has_mask", [False, True])
def test_several_tokens_attend_to_those_before_them(has_mask: bool) -> None:
    """Without a mask, the new tokens are the last ones. torch takes them for the first ones."""
    query, key = torch.randn(1, 4, 5, 16), torch.randn(1, 4, 8, 16)
    mask = torch.ones(5, 8, dtype=torch.bool).tril(3)
    with torch.inference_mode():
        computed, _ = causal_attention(nn.Module(), query, key, key, mask[None, None] if has_mask else None)
        expected = scaled_dot_product_attention(query, key, key, attn_mask=mask)
    torch.testing.assert_close(computed, expected.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_a_module_that_is_not_causal_attends_to_all() -> None:
    module = nn.Module()
    module.is_causal = False
    query, key = torch.randn(1, 4, 5, 16), torch.randn(1, 4, 8, 16)
    with torch.inference_mode():
        computed, _ = causal_attention(module, query, key, key, None)
        expected = scaled_dot_product_attention(query, key, key)
    torch.testing.assert_close(computed, expected.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_keys_and_values_lie_where_a_cache_has_them() -> None:
    """Parts of larger tensors, and one head for many."""
    torch.manual_seed(0)
    query, room = torch.randn(2, 6, 1, 32), torch.randn(2, 50, 2, 3, 32)
    key, value = room[:, 7:40, 0].transpose(1, 2), room[:, 7:40, 1].transpose(1, 2)  # [2, 3, 33, 32]
    shared = torch.randn(1, 1, 33, 32).expand(2, 3, 33, 32)
    with torch.inference_mode():
        for values in (value, shared):
            found, _ = causal_attention(nn.Module(), query, key, values, None)
            expected = scaled_dot_product_attention(query, key, values, enable_gqa=True)
            torch.testing.assert_close(found, expected.transpose(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wrong", ["width", "length", "mask"])
def test_what_does_not_fit_is_not_read(wrong: str) -> None:
    key = torch.randn(1, 4, 9, 16)
    query = torch.randn(1, 4, 1, 32 if wrong == "width" else 16)
    value = torch.randn(1, 4, 5 if wrong == "length" else 9, 16)
    mask = torch.ones(1, 1, 3, 9, dtype=torch.bool) if wrong == "mask" else None
    assert _fits(torch.randn(1, 4, 1, 16), key, key, None)
    assert not _fits(query, key, value, mask), "torch is to say what it thinks of that"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_model_says_the_same_as_with_sdpa(tinymix_4bit: Path, cache: str) -> None:
    """Two sequences, one of them padded on the left; step by step. In fp32, where a router hardly ever changes its mind
    over the last bits."""
    model, _ = load(tinymix_4bit, daemon=None, dtype=torch.float32)
    with model.tiers, torch.inference_mode():
        found = {}
        for way in (NAME, "sdpa"):
            model.set_attn_implementation(way)
            found[way] = model.generate(
                torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]),
                attention_mask=torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
                cache_implementation=cache,
                **{"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True},
            )
    assert torch.equal(found[NAME].sequences, found["sdpa"].sequences)
    for ours, theirs in zip(found[NAME].logits, found["sdpa"].logits, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.002


def test_a_gradient_flows() -> None:
    query, key = torch.randn(1, 4, 1, 16, requires_grad=True), torch.randn(1, 4, 3, 16)
    found, _ = causal_attention(nn.Module(), query, key, key, None)
    found.sum().backward()
    assert query.grad is not None


def test_a_quantised_model_attends_so(tinymix_4bit: Path) -> None:
    for exact, expected in ((False, NAME), (True, "sdpa")):
        model, _ = load(tinymix_4bit, daemon=None, exact=exact)
        with model.tiers:
            assert model.config._attn_implementation == expected


def test_an_unquantised_one_does_not(tmp_path: Path) -> None:
    _, directory = convert_tiny("mixtral", torch.bfloat16, tmp_path)
    model, _ = load(directory, daemon=None)
    with model.tiers:
        assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("kind", "expected"), [("mixtral", NAME), ("gemma4_text", "sdpa")])
def test_a_model_that_names_sdpa_keeps_it(kind: str, expected: str) -> None:
    """Gemma 4 asks for its name before it leaves out tokens."""
    model = _tiny(kind)
    use_causal_attention(model)
    assert model.config._attn_implementation == expected


def test_a_class_of_the_users_own_is_what_it_is_made_of() -> None:
    class Own(Gemma4ForCausalLM):
        pass

    with torch.device("meta"):
        model = Own(AutoConfig.for_model("gemma4_text", num_hidden_layers=1))
    use_causal_attention(model)
    assert model.config._attn_implementation == "sdpa"


def _tiny(kind: str, device: str = "meta") -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 99} if device == "cpu" else {}
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, num_hidden_layers=1, **sizes))


@torch.inference_mode()
def test_chunks_of_a_padded_batch_that_are_padding_only(tinymix_4bit: Path) -> None:
    """They attend to nothing, and what they leave in the cache must be numbers."""
    model, _ = load(tinymix_4bit, daemon=None, dtype=torch.float32)
    ids = torch.tensor([[0] * 9 + [5, 6, 7], [0] * 9 + [8, 9, 10]])
    given = {"attention_mask": (ids > 0).long(), "max_new_tokens": 3, "do_sample": False}
    with model.tiers:
        whole = model.generate(ids, **given)
        for chunk in (1, 4):
            assert torch.equal(model.generate(ids, prefill_chunk_size=chunk, **given), whole)


def without_source(base: type[Any]) -> type[Any]:
    """A class of a module whose source can't be read, as in a notebook or a frozen program."""
    module = ModuleType("without_source")
    vars(module).update({"Base": base, "eager_attention_forward": eager_attention_forward})
    exec(
        "class Own(Base):\n    def forward(self, *given, **named):\n        return super().forward(*given, **named)",
        vars(module),
    )
    found: type[Any] = module.Own
    sys.modules[module.__name__] = module
    return found


@pytest.fixture
def forgets_modules() -> Iterator[None]:
    yield
    sys.modules.pop("without_source", None)


@pytest.mark.usefixtures("forgets_modules")
def test_what_has_no_source_keeps_its_own_function() -> None:
    model = _tiny("mixtral")
    model.__class__ = without_source(type(model))
    use_causal_attention(model)
    assert model.config._attn_implementation == "sdpa"
    model = _tiny("gpt_oss", "cpu")
    layer = model.model.layers[0].self_attn
    layer.__class__ = without_source(type(layer))
    use_causal_attention(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("fault", ["sinks", "function"])
def test_sinks_of_another_kind_stay_with_their_own_function(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _tiny("gpt_oss", "cpu")
    if fault == "sinks":
        layer = model.model.layers[0].self_attn
        layer.sinks = nn.Parameter(layer.sinks.detach()[None])
    else:
        monkeypatch.setattr(sys.modules[type(model).__module__], "eager_attention_forward", lambda query: query)
    use_causal_attention(model)
    assert model.config._attn_implementation == "eager"


def test_sinks_and_masks_that_compiled_code_does_not_read_are_computed_as_by_their_own_function() -> None:
    layer = tiny_model("gpt_oss", torch.float32).model.layers[0].self_attn
    heads, key_heads, width = layer.config.num_attention_heads, layer.config.num_key_value_heads, layer.head_dim
    query, keys = torch.randn(2, heads, 5, width), torch.randn(2, key_heads, 5, width)
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    added = torch.zeros(1, 1, 5, 5).masked_fill(~allowed, torch.finfo(torch.float32).min)
    given = {"scaling": 0.2, "dropout": 0.0}
    with torch.inference_mode():
        for sinks, queries, mask in ((layer.sinks, query, allowed), (layer.sinks[:1], query[:, :, :1], None)):
            expected, _ = eager_attention_forward(
                layer, queries, keys, keys, None if mask is None else added, **given, s_aux=layer.sinks.expand(heads)
            )
            if mask is None:
                sinks = layer.sinks.double()  # which compiled code does not take
            found, _ = attention.sink_attention(layer, queries, keys, keys, mask, **given, s_aux=sinks)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, check_dtype=False)


def test_numbers_of_a_query_may_lie_apart() -> None:
    query, key = torch.randn(1, 4, 1, 32)[..., ::2], torch.randn(1, 4, 9, 16)
    assert query.stride(3) == 2
    with torch.inference_mode():
        found, _ = causal_attention(nn.Module(), query, key, key, None)
        expected = scaled_dot_product_attention(query, key, key)
    torch.testing.assert_close(found, expected.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_many_tokens_that_need_no_same_bits_are_computed_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor on which torch is faster."""
    monkeypatch.setattr(attention, "prefers_torch", lambda: True)
    module = nn.Module()
    module.same_bits = False
    query, key = torch.randn(1, 4, 70, 16).bfloat16(), torch.randn(1, 4, 80, 16).bfloat16()
    expected = scaled_dot_product_attention(
        query.float(), key.float(), key.float(), attn_mask=torch.ones(70, 80, dtype=torch.bool).tril(10)
    )
    with torch.inference_mode():
        found, _ = causal_attention(module, query, key, key, None)
    torch.testing.assert_close(found.float(), expected.transpose(1, 2), atol=1e-2, rtol=1e-2)
