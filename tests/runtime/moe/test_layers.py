"""A decoder layer for one token in two calls, beside the architecture's own; and which architectures get it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from architectures import TINY, TYPES, tiny_model
from comparison import convert_tiny
from torch import Tensor
from transformers import DynamicCache, StaticCache

import moetier
from moetier.runtime.generation.compat import CACHE
from moetier.runtime.kernels.layer.attention import use_causal_attention
from moetier.runtime.kernels.layer.growing_cache import TOKENS, use_growing_layers
from moetier.runtime.kernels.layer.norm import use_quick_norms
from moetier.runtime.kernels.products.row import use_row_weights
from moetier.runtime.moe import layers
from moetier.runtime.moe import quick as quick_way
from moetier.runtime.moe.experts import experts_modules
from moetier.runtime.moe.layer_forms import LayerForm, find_form
from moetier.runtime.moe.layers import OneTokenLayer, QuickLayer, use_quick_layers
from moetier.runtime.moe.routers import use_quick_routers
from moetier.runtime.moe.snapshot import MAX_TRIALS
from moetier.runtime.trace.recorder import Recorder
from moetier.tiers.layout import Bits

Converted = Callable[..., Path]
BF16 = torch.bfloat16
IDS = [5, 17, 200, 31, 99, 4, 4, 120]
STEPS = len(IDS) - 1  # the first token finds a cache of transformers, which has no room yet
# types with layers that are computed so, with heads of 32 or 64 numbers; and whether their router and experts are too
QUICK = {
    "aria": True, "deepseek_ocr2": True, "dots1": True, "exaone_moe": True, "glm4_moe": True, "gpt_oss": True,
    "granitemoe": True, "hy_v3": True, "mellum": True, "minimax_m2": True, "minimax_m3_vl": False,
    "mixtral": True, "olmoe": True, "qwen2_moe": False, "qwen3_moe": True, "qwen3_vl_moe": True, "solar_open": True,
    "unlimited_ocr": True,
}  # fmt: skip
# some of these, which have the size of heads in their configuration
CONVERTED = [
    "dots1", "exaone_moe", "gpt_oss", "granitemoe", "hy_v3", "minimax_m2", "mixtral", "qwen3_moe", "solar_open",
]  # fmt: skip
# what configurations of these types have
CHANGES: dict[str, dict[str, Any]] = {"granitemoe": {"residual_multiplier": 0.22}}
WIDE: dict[str, int] = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
WIDER = {"glm4_moe": {"num_attention_heads": 1, "num_key_value_heads": 1}}
# types whose tiny models can't have such heads, or can't decode tokens one by one
NOT_WIDE = {"ernie4_5_vl_moe", "glm4v_moe", "mimo_v2_flash", "openai_privacy_filter", "qwen3_omni_moe", "qwen4_exp"}


def wide(model_type: str) -> Any:
    """A tiny model with wider heads, as it is loaded where records are multiplied; but its experts are in it."""
    with patch.dict(TINY, WIDE | WIDER.get(model_type, {})):
        model: Any = tiny_model(model_type, BF16)
    if model._supports_sdpa:
        model.set_attn_implementation("sdpa")
    for use in (use_causal_attention, use_growing_layers, use_quick_norms, use_row_weights):
        use(model)
    use_quick_routers(model)
    use_quick_layers(model)
    return model


@pytest.mark.parametrize("model_type", TYPES)
def test_which_architectures_have_such_layers(model_type: str, forms: list[LayerForm]) -> None:
    if model_type in NOT_WIDE:
        pytest.skip("its sizes belong together")
    model = wide(model_type)
    decode(model, IDS[:3])
    assert bool(forms) is (model_type in QUICK)
    assert any(form.router for form in forms) is QUICK.get(model_type, False)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """Return the model directory of a tiny model whose experts have 4 bits."""

    @cache
    def make(model_type: str, trunk_bits: Bits = 4) -> Path:
        changes: dict[str, Any] = {"head_dim": 32} | CHANGES.get(model_type, {})
        sizes = {name: 64 for name in TINY if name.endswith("intermediate_size")}
        folder = tmp_path_factory.mktemp(model_type)
        with patch.dict(TINY, sizes):
            return convert_tiny(model_type, BF16, folder, bits=4, trunk_bits=trunk_bits, fast=True, **changes)[1]

    return make


def load(directory: Path, **options: Any) -> Any:
    return moetier.load(directory, daemon=None, device="cpu", **options)[0]


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[LayerForm]:
    """The forms that trials find. Layers that differ only in their weights are tried once."""
    found: list[LayerForm] = []

    def tried(*given: Any) -> LayerForm | None:
        if (form := find_form(*given)) is not None:
            found.append(form)
        return form

    monkeypatch.setattr(layers, "find_form", tried)
    return found


class Calls:
    """How many layers were computed in two calls, which, and a way to compute without."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.is_off, compute = 0, False, OneTokenLayer.compute
        self.layers: set[Any] = set()

        def counted(layer: OneTokenLayer, module: Any, *arguments: Any, **named: Any) -> Tensor | None:
            found = None if self.is_off else compute(layer, module, *arguments, **named)
            if isinstance(module, QuickLayer) and found is not None:
                self.count += 1
                self.layers.add(module)
            return found

        monkeypatch.setattr(OneTokenLayer, "compute", counted)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.fixture
def model(converted: Converted, calls: Calls) -> Iterator[Any]:
    found = load(converted("qwen3_moe"), speculate="off")
    with found.tiers:
        yield found


def quick(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, QuickLayer)]


@torch.inference_mode()
def decode(model: Any, ids: list[int], cache: Any = None, **more: Any) -> tuple[Tensor, Any]:
    """Logits [tokens, vocabulary] of tokens that are given one by one, and the cache."""
    found = []
    for token in ids:
        output = model(torch.tensor([[token]]), **{CACHE: cache}, use_cache=True, **more)
        found.append(output.logits[0, -1].float())
        cache = output.past_key_values
    return torch.stack(found), cache


def both(model: Any, calls: Calls, ids: list[int] = IDS, **more: Any) -> tuple[Tensor, int]:
    """The logits of a model, which must be those without quick layers; and how many layers were quick."""
    with torch.inference_mode():
        caches = [model(torch.tensor([[7, 8, 9]]), use_cache=True).past_key_values for _ in range(2)]
    calls.count = 0
    found, cache = decode(model, ids, caches[0], **more)
    count, calls.is_off = calls.count, True
    wanted, other = decode(model, ids, caches[1], **more)
    calls.is_off = False
    assert torch.equal(found, wanted)
    for own, theirs in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(own.keys, theirs.keys)
        assert torch.equal(own.values, theirs.values)
    return found, count


@pytest.mark.parametrize("model_type", CONVERTED)
def test_a_model_says_what_it_says_without(
    model_type: str, converted: Converted, calls: Calls, forms: list[LayerForm]
) -> None:
    """Beyond a sliding window of 16 tokens, too."""
    model = load(converted(model_type))
    with model.tiers:
        _, count = both(model, calls, IDS * 2)
    assert count == (len(IDS * 2) - 1) * len(calls.layers) > 0
    assert any(form.router for form in forms) is QUICK[model_type]


def test_with_room_for_one_block_and_speculation(converted: Converted, calls: Calls) -> None:
    model = load(converted("qwen3_moe"), speculate="always", ram=49152)  # bytes of six records
    with model.tiers:
        _, count = both(model, calls)
        assert count == STEPS * model.config.num_hidden_layers
        assert sum(model.tiers.speculation.stats().guesses)
        assert model.tiers.host.stats().misses


def test_the_number_of_threads_changes_no_bits(model: Any, calls: Calls) -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(both(model, calls)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_trace_sees_the_same(model: Any, calls: Calls) -> None:
    traces = []
    for is_off in (False, True):
        calls.is_off, calls.count = is_off, 0
        with Recorder(model) as recorder:
            decode(model, IDS)
            recorder.end_sequence(IDS, n_prefill=1)
            traces.append(recorder.trace())
        assert bool(calls.count) is not is_off
    for name in ("experts", "weights", "probabilities", "predictions", "prediction_probabilities"):
        one, two = (getattr(trace, name) for trace in traces)
        assert (one == two).all()


def test_what_transformers_records_is_the_same(model: Any, calls: Calls) -> None:
    _, cache = decode(model, IDS)
    outputs, asked = [], {"output_hidden_states": True, "output_router_logits": True}
    with torch.inference_mode():
        for is_off in (False, True):
            calls.is_off, calls.count = is_off, 0
            outputs.append(model(torch.tensor([[5]]), **{CACHE: copy.deepcopy(cache)}, **asked))
    for name in ("logits", "hidden_states", "router_logits"):
        one, two = (output[name] for output in outputs)
        assert len(one) == len(two)
        assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))
    assert len(outputs[0].router_logits) == model.config.num_hidden_layers


@pytest.mark.parametrize("part", ["mlp", "mlp.gate", "mlp.experts", "self_attn.v_proj", "input_layernorm"])
def test_hooks_are_called(model: Any, part: str, calls: Calls) -> None:
    _, cache = decode(model, IDS)
    expected, _ = decode(model, [7], copy.deepcopy(cache))
    seen: list[Any] = []
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        hook = getattr(model.model.layers[0].get_submodule(part), register)(lambda *_: seen.append(1))
        calls.count = 0
        assert torch.equal(decode(model, [7], copy.deepcopy(cache))[0], expected)
        hook.remove()
        assert calls.count == model.config.num_hidden_layers - 1
    assert len(seen) == 2
    calls.count = 0
    assert torch.equal(decode(model, [7], copy.deepcopy(cache))[0], expected)
    assert calls.count == model.config.num_hidden_layers


def test_replaced_parts_are_used(model: Any, calls: Calls, forms: list[LayerForm]) -> None:
    before, count = both(model, calls)
    layer = model.model.layers[1]
    layer.mlp.gate.weight.data = torch.roll(layer.mlp.gate.weight.data, 1, 0)
    rolled, _ = both(model, calls)
    layer.post_attention_layernorm.weight = torch.nn.Parameter(2 * layer.post_attention_layernorm.weight)
    doubled, again = both(model, calls)
    assert not torch.equal(before, rolled)
    assert not torch.equal(rolled, doubled)
    assert count == again
    assert all(form.router for form in forms)
    forms.clear()
    layer.mlp.gate = torch.nn.Sequential(layer.mlp.gate)
    assert both(model, calls)[1] == count
    assert [form.router for form in forms] == [""]


@pytest.mark.parametrize(
    ("model_type", "part", "name", "value"),
    [
        ("qwen3_moe", "mlp.gate", "top_k", 2),
        ("qwen3_moe", "mlp.gate", "norm_topk_prob", True),
        ("dots1", "mlp.gate", "routed_scaling_factor", 0.5),
        ("qwen3_moe", "self_attn", "scaling", 0.5),
        ("qwen3_moe", "input_layernorm", "variance_epsilon", 2.0),
        ("qwen3_moe", "post_attention_layernorm", "variance_epsilon", 2.0),
        ("qwen3_moe", "self_attn.q_norm", "variance_epsilon", 2.0),
        ("granitemoe", "", "residual_multiplier", 0.5),
        ("granitemoe", "self_attn", "scaling", 0.5),
        ("qwen3_moe", "self_attn.config", "num_experts_per_tok", 2),  # the gate has its own
        ("olmoe", "self_attn.config", "clip_qkv", 0.1),
    ],
)
def test_numbers_that_are_changed_count(
    model_type: str, part: str, name: str, value: float, forms: list[LayerForm]
) -> None:
    model = wide(model_type)
    plain = copy.deepcopy(model)  # its matrices are not read by compiled code
    before, _ = decode(model, IDS)
    assert forms
    for each in (model, plain):
        holder = attrgetter(part)(each.model.layers[1]) if part else each.model.layers[1]
        assert getattr(holder, name) != value
        setattr(holder, name, value)
    after, own = decode(model, IDS)
    wanted, others = decode(plain, IDS)
    assert torch.equal(after, wanted)
    assert all(torch.equal(one.values, two.values) for one, two in zip(own.layers, others.layers, strict=True))
    assert torch.equal(after, before) is (name == "num_experts_per_tok")


@pytest.mark.parametrize("part", ["mlp.gate", "mlp.experts"])
def test_a_number_that_becomes_a_tensor_counts(model: Any, part: str, calls: Calls) -> None:
    holder = model.model.layers[1].get_submodule(part)
    holder.factor = 2.0
    before, count = both(model, calls)
    holder.factor = torch.ones(2)
    after, again = both(model, calls)
    assert torch.equal(before, after)
    assert again == count


@pytest.mark.parametrize("part", ["", "mlp.gate", "mlp.experts"])
def test_a_number_that_changes_with_each_token_ends_trials(
    model: Any, part: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a counter of calls: else each token would wait for a trial."""
    spies = Mock(wraps=layers.find_form), Mock(wraps=quick_way.activation_of)
    monkeypatch.setattr(layers, "find_form", spies[0])
    monkeypatch.setattr(quick_way, "activation_of", spies[1])

    def trials() -> int:
        return sum(spy.call_count for spy in spies)

    layer = model.model.layers[1]
    holder = layer.get_submodule(part)
    holder.count = 0
    both(model, calls)
    layer.register_forward_pre_hook(lambda *_: setattr(holder, "count", holder.count + 1))
    before = trials()
    decode(model, IDS * 3)
    after = trials()
    assert before < after <= before + 2 * MAX_TRIALS
    assert both(model, calls)[1] == STEPS * (model.config.num_hidden_layers - 1)
    assert trials() == after


@pytest.mark.parametrize(("name", "value"), [("limit", 0.1), ("alpha", 0.5), ("act_fn", torch.nn.GELU())])
def test_other_activations_of_experts_count(name: str, value: Any, converted: Converted, calls: Calls) -> None:
    """Those of a prompt, too."""
    model = load(converted("qwen3_moe" if name == "act_fn" else "gpt_oss"))
    found = []
    with model.tiers:
        for _ in range(2):
            prompt = model(torch.tensor([IDS])).logits
            found.append((prompt, decode(model, IDS)[0]))
            setattr(model.model.layers[1].mlp.experts, name, value)
    for before, after in zip(*found, strict=True):
        assert not torch.equal(before, after)
    assert calls.count


def test_a_matrix_of_another_kind_is_the_architectures(converted: Converted, calls: Calls) -> None:
    """Such as a bf16 matrix that is not read by compiled code, or a record in place of the one that is."""
    for trunk_bits, name in ((16, "weight"), (4, "record")):
        model = load(converted("qwen3_moe", trunk_bits))
        with model.tiers:
            before, count = both(model, calls)
            module = model.model.layers[1].self_attn.v_proj
            stored = getattr(module, name).detach().clone()
            setattr(module, name, stored if name == "record" else torch.nn.Parameter(2 * stored, requires_grad=False))
            if name == "record":
                stored.zero_()
            after, fewer = both(model, calls)
        assert not torch.equal(before, after)
        assert fewer == count - STEPS


def test_a_replaced_block_is_called(model: Any, calls: Calls) -> None:
    before, count = both(model, calls)
    layer = model.model.layers[1]
    block, kind = layer.mlp, type(layer.mlp)
    layer.mlp = torch.nn.Sequential(block)
    wrapped, wrapped_count = both(model, calls)
    assert torch.equal(before, wrapped)
    layer.mlp = block
    assert both(model, calls)[1] == count
    block.__class__ = type("Loud", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})
    loud, again = both(model, calls)
    assert not torch.equal(before, loud)
    assert wrapped_count == again == count


@pytest.mark.parametrize("part", ["self_attn", "input_layernorm", "mlp.gate", "self_attn.q_norm"])
def test_a_part_that_does_more_is_not_taken_for_another(part: str, model: Any, calls: Calls) -> None:
    """Whether its class is another from the start, or only after some tokens."""
    before, count = both(model, calls)
    module = model.model.layers[1].get_submodule(part)
    kind = type(module)

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        found = kind.forward(self, *arguments, **named)
        return (found[0] * 1.5, *found[1:]) if isinstance(found, tuple) else found * 1.5

    module.__class__ = type("Loud", (kind,), {"forward": forward})
    loud, fewer = both(model, calls)
    assert not torch.equal(before, loud) or part == "mlp.gate"  # logits change nothing
    assert fewer < count or part == "mlp.gate"
    module.__class__ = kind
    again, _ = both(model, calls)
    assert torch.equal(before, again)


def test_what_a_limit_would_change_is_not_left_out(model: Any, calls: Calls) -> None:
    """An attention that clamps large numbers does so in a trial."""
    _, count = both(model, calls)
    module = model.model.layers[1].self_attn
    kind = type(module)

    def forward(self: Any, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        return kind.forward(self, hidden_states.clamp(-20, 20), *arguments, **named)

    module.__class__ = type("Limited", (kind,), {"forward": forward})
    assert both(model, calls)[1] == count - STEPS


def test_other_inputs_are_the_architectures(model: Any, calls: Calls) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    decode(model, IDS)
    calls.count = 0
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], **{CACHE: cache})
        static = StaticCache(config=model.config, max_cache_len=16)
        model(ids[:1, :1], **{CACHE: static})
        model(ids[:1, :1], **{CACHE: static})
    assert calls.count == 0
    model(ids[:1, :1], **{CACHE: DynamicCache()})
    model.train()
    decode(model, IDS)
    model.eval()
    assert calls.count == 0


def test_generated_texts_are_the_same(model: Any, calls: Calls) -> None:
    found = []
    for is_off in (False, True):
        calls.is_off = is_off
        found.append(model.generate(torch.tensor([IDS]), max_new_tokens=12, do_sample=False).tolist())
    assert found[0] == found[1]
    assert calls.count


def test_a_layer_that_does_more_is_not_taken_for_another(model: Any, calls: Calls) -> None:
    """A layer is tried with its first token."""
    layer = model.model.layers[0]
    (kind,) = type(layer).__bases__[1:]

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        return kind.forward(self, *arguments, **named) * 1.05

    layer.__class__ = type("Loud", (QuickLayer, type("LoudLayer", (kind,), {"forward": forward})), {})
    assert both(model, calls)[1] == STEPS * (model.config.num_hidden_layers - 1)


def test_a_factor_that_is_1_in_a_trial_is_not_left_out(model: Any, calls: Calls) -> None:
    """A layer with one is computed as before, and a block with one is called."""

    def scaled(kind: Any) -> Any:
        def forward(self: Any, *arguments: Any, **named: Any) -> Any:
            return kind.forward(self, *arguments, **named) * self.factor

        return type("Scaled", (kind,), {"forward": forward})

    first, second = model.model.layers[:2]
    first.__class__ = type("Quick", (QuickLayer, scaled(type(first).__bases__[1])), {})
    second.mlp.__class__ = scaled(type(second.mlp))
    first.factor, second.mlp.factor = (torch.nn.Parameter(torch.ones(())) for _ in range(2))
    for factor in (1, 2):
        first.factor.data.fill_(factor)
        second.mlp.factor.data.fill_(factor)
        assert both(model, calls)[1] == STEPS * (model.config.num_hidden_layers - 1)


def test_in_another_type_a_layer_is_tried_again(model: Any, calls: Calls) -> None:
    both(model, calls)
    torch.nn.Module.float(model)
    assert model(torch.tensor([IDS])).logits.dtype == torch.float32
    assert both(model, calls)[1] == STEPS * model.config.num_hidden_layers


def test_who_waits_for_routing_gets_it_before_the_experts(model: Any) -> None:
    decode(model, IDS)
    order: list[str] = []
    modules = [*experts_modules(model).values()]

    def on_demand(block: int, experts: Any) -> None:
        order.append(f"demanded {block} {len(experts)}")

    for module in modules:
        module.tiered = replace(module.tiered, on_demand=on_demand)
    decode(model, [5])
    assert order[-len(modules) :] == [f"demanded {i} {model.config.num_experts_per_tok}" for i in range(len(modules))]


def test_a_cache_that_is_full_grows(model: Any, calls: Calls) -> None:
    ids = [token % 200 for token in range(TOKENS + 3)]
    _, count = both(model, calls, ids)
    # transformers computes the first tokens of a cache and of more memory
    assert count == (len(ids) - 2) * model.config.num_hidden_layers


def test_two_caches_that_go_on_from_one(model: Any) -> None:
    _, cache = decode(model, [5, 6, 7])
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    first, _ = decode(model, [8, 9], cache)
    second, _ = decode(model, [8, 9], forked)
    assert torch.equal(first, second)
    assert cache.layers[0].get_seq_length() == forked.layers[0].get_seq_length() == 5


def test_padding_is_the_architectures(model: Any, calls: Calls) -> None:
    ids, padded = torch.tensor([[5, 6, 7]]), torch.tensor([[0, 1, 1]])
    calls.count = 0
    with torch.inference_mode():
        cache = model(ids, attention_mask=padded, use_cache=True).past_key_values
        for _ in range(2):
            padded = torch.cat([padded, torch.ones(1, 1, dtype=torch.int64)], 1)
            model(ids[:, :1], attention_mask=padded, **{CACHE: cache})
    assert calls.count == 0


@pytest.mark.parametrize("exact", [False, True])
def test_only_a_model_with_products_of_records_has_them(tinymix_4bit: Path, exact: bool) -> None:
    model, _ = moetier.load(tinymix_4bit, daemon=None, exact=exact, device="cpu")
    with model.tiers:
        assert bool(quick(model)) is not exact


@pytest.mark.parametrize(("model_type", "asked"), [("gpt_oss", "eager"), ("qwen3_moe", "sdpa")])
def test_an_attention_that_was_asked_for_stays(model_type: str, asked: str, converted: Converted, calls: Calls) -> None:
    model = load(converted(model_type), attn_implementation=asked)
    with model.tiers:
        assert model.config._attn_implementation == asked
        decode(model, IDS[:3])
    assert not calls.count
