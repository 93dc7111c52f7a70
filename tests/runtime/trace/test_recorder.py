from __future__ import annotations

import itertools
import mmap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from architectures import TYPES, model_class, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ASSETS
from torch import Tensor

import moetier
from moetier.runtime.generation.compat import CACHE
from moetier.runtime.moe.experts import experts_modules
from moetier.runtime.trace.recall import of_popularity, of_predictions, of_previous_token
from moetier.runtime.trace.recorder import UNFINISHED, Recorder, pieces_of
from moetier.runtime.trace.trace import NO_EXPERT, Trace
from moetier.tiers.errors import UnsupportedModelError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.quant.codec import decode
from moetier.tiers.store.reader import ShardStore

BF16 = torch.bfloat16
PROMPTS = ("def read_lines(path):\n", "La mattina seguente, don Rodrigo si")
NEW = 6
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}

# type -> look-aheads of its tiny model, where they are not the two that a model of three blocks has
FEWER: dict[str, tuple[int, ...]] = {"nemotron_h": (), "zaya": ()} | dict.fromkeys(
    (  # their first layer is dense
        "afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "deepseek_ocr2", "deepseek_v2", "deepseek_v3",
        "deepseek_v32", "dots1", "dots3_note", "ernie4_5_moe", "ernie4_5_vl_moe", "exaone_moe", "flint",
        "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm5_next", "glm_moe_dsa", "hy_v3", "hy_v4", "hy_v4_vl",
        "kimi_linear", "laguna", "lfm2_moe", "mimo_v2_flash", "mistral4", "mistral_large4", "unlimited_ocr",
    ), (1,),
)  # fmt: skip
# type -> its blocks that text does not pass
IDLE = {"dots3_note": {2}, "ernie4_5_vl_moe": {1, 3}, "qwen3_omni_moe": {3, 4, 5}}


@pytest.fixture(scope="module")
def plain(tinymix: Path, tinymix_4bit: Path) -> Any:
    """transformers' own model, in memory, with the weights that the 4-bit records hold."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tinymix, dtype=BF16, experts_implementation="eager")
    with ShardStore.open(tinymix_4bit) as store, torch.no_grad():
        for block, module in enumerate(experts_modules(model).values()):
            layout = store.layout(block)
            with mmap.mmap(-1, layout.slot_bytes) as slot:
                for expert in range(module.num_experts):
                    store.read_into(ExpertKey(block, expert), memoryview(slot))
                    record = torch.from_numpy(np.frombuffer(slot[: layout.record_bytes], np.uint8).copy())
                    for name in ("gate_up_proj", "down_proj"):
                        decode(record, layout, name, getattr(module, name)[expert])
    return model.eval()


@pytest.fixture(scope="module")
def tokenized(tinymix: Path) -> list[Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tinymix)
    return [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def recorded(tinymix_4bit: Path, tokenized: list[Tensor]) -> tuple[Trace, list[list[int]]]:
    """The trace of a tiered model with room for a quarter of its experts, and the new tokens of each prompt."""
    model, _ = moetier.load(tinymix_4bit, ram="3520KiB", daemon=None, exact=True)
    new = []
    with model.tiers, Recorder(model) as recorder:
        for ids in tokenized:
            out = model.generate(ids, **GREEDY)[0].tolist()
            recorder.end_sequence(out[:-1], n_prefill=ids.shape[1])
            new.append(out[ids.shape[1] :])
        return recorder.trace(model="tinymix", digest=model.tiers.manifest.digest), new


def passes(trace: Trace) -> Iterator[tuple[range, Tensor, bool]]:
    """Tokens that go through the model together, their ids [1, T], and whether they begin a sequence."""
    assert trace.token_ids is not None
    for tokens, prompt in zip(trace.sequences, trace.n_prefill, strict=True):
        starts = [tokens.start, *range(tokens.start + prompt, tokens.stop), tokens.stop]
        for start, stop in itertools.pairwise(starts):
            ids = torch.from_numpy(trace.token_ids[start:stop].astype(np.int64))
            yield range(start, stop), ids[None], start == tokens.start


@torch.no_grad()
def test_the_routing_is_that_of_the_plain_model(plain: Any, recorded: tuple[Trace, list[list[int]]]) -> None:
    """By its own router logits, pass by pass with a cache, as generation does it."""
    trace, _ = recorded
    assert (trace.tokens, trace.block_count, trace.top_k) == (sum(map(len, trace.sequences)), 8, 2)
    assert trace.weights is not None
    assert trace.probabilities is not None
    cache = None
    for tokens, ids, first in passes(trace):
        cache = transformers.DynamicCache(config=plain.config) if first else cache
        out = plain(input_ids=ids, **{CACHE: cache}, output_router_logits=True)
        for block, logits in enumerate(out.router_logits):
            probabilities = logits.float().softmax(-1)
            weights, experts = probabilities.topk(2, dim=-1)
            weights = (weights / weights.sum(-1, keepdim=True)).to(BF16)
            span = slice(tokens.start, tokens.stop)
            assert np.array_equal(trace.experts[span, block], experts.numpy())
            assert np.array_equal(trace.probabilities[span, block], probabilities.half().numpy())
            assert np.allclose(trace.weights[span, block], weights.float().numpy(), rtol=2**-8)


@torch.no_grad()
def test_predictions_are_those_of_the_plain_models_gates(plain: Any, recorded: tuple[Trace, list[list[int]]]) -> None:
    """Each norm and gate called as transformers calls them, on what earlier layers had at their MoE part's entry."""
    trace, _ = recorded
    assert trace.lookaheads == (1, 2)
    assert trace.predictions is not None
    assert trace.prediction_probabilities is not None
    layers, entries = plain.model.layers, dict[int, Tensor]()
    hooks = [
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, given, block=block: entries.update({block: given[0]})
        )
        for block, layer in enumerate(layers)
    ]
    cache, checked = None, 0
    for tokens, ids, first in passes(trace):
        cache = transformers.DynamicCache(config=plain.config) if first else cache
        plain(input_ids=ids, **{CACHE: cache})
        span, here = slice(tokens.start, tokens.stop), dict(entries)
        for ahead, lookahead in enumerate(trace.lookaheads):
            for block in range(8):
                found = trace.predictions[ahead, span, block]
                told = trace.prediction_probabilities[ahead, span, block]
                if block < lookahead:
                    assert (found == NO_EXPERT).all()
                    assert (told == 0).all()
                    continue
                states = layers[block].post_attention_layernorm(here[block - lookahead])[0]
                best = (states @ layers[block].mlp.gate.weight.T).float().softmax(-1).topk(2)
                assert np.array_equal(found, best.indices.numpy())
                assert np.array_equal(told, best.values.half().numpy())
                checked += 1
    for hook in hooks:
        hook.remove()
    assert checked == 2 * NEW * (7 + 6)
    assert len({tuple(row) for row in trace.predictions[0, :, 7]}) > 4, "guesses that differ from token to token"


def test_recording_changes_no_token(recorded: tuple[Trace, list[list[int]]], plain: Any, tinymix_4bit: Path) -> None:
    trace, new = recorded
    model, tokenizer = moetier.load(tinymix_4bit, daemon=None, exact=True)
    assert tokenizer is not None
    with model.tiers:
        for prompt, expected in zip(PROMPTS, new, strict=True):
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            for other in (model, plain):
                assert other.generate(ids, **GREEDY)[0, ids.shape[1] :].tolist() == expected
    assert trace.digest == model.tiers.manifest.digest
    assert trace.blocks == tuple(f"model.layers.{layer}.mlp.experts" for layer in range(8))


def test_it_survives_a_file(recorded: tuple[Trace, list[list[int]]], tmp_path: Path) -> None:
    trace, _ = recorded
    trace.save(tmp_path / "T.npz")
    again = Trace.load(tmp_path / "T.npz")
    for name in ("experts", "weights", "probabilities", "predictions", "prediction_probabilities", "token_ids"):
        assert np.array_equal(getattr(again, name), getattr(trace, name))
    for name in ("offsets", "n_prefill", "num_experts", "lookaheads", "blocks", "digest", "model"):
        assert getattr(again, name) == getattr(trace, name)


@torch.no_grad()
def record(model: Any, *sequences: Tensor, **options: Any) -> Trace:
    """Each sequence [T] in one pass."""
    with Recorder(model, **options) as recorder:
        for ids in sequences:
            getattr(model, "thinker", model)(input_ids=ids[None])
            recorder.end_sequence(ids.tolist(), n_prefill=len(ids))
        return recorder.trace()


@pytest.mark.parametrize("name", ["it", "python"])
def test_gates_foretell_text_that_the_model_never_saw(tinymix_4bit: Path, name: str) -> None:
    """docs/traces.md has the figures over 3,072 tokens."""
    text = (ASSETS / "texts" / f"{name}.txt").read_text()
    model, tokenizer = moetier.load(tinymix_4bit, daemon=None)
    assert tokenizer is not None
    with model.tiers:
        trace = record(model, tokenizer(text, return_tensors="pt")["input_ids"][0, :768])
    for lookahead, least in ((1, 0.7), (2, 0.58)):
        gates = of_predictions(trace, lookahead)
        simpler = [guess.only(gates.wanted > 0).ratio for guess in (of_popularity(trace), of_previous_token(trace))]
        assert (gates.wanted > 0).tolist() == [block >= lookahead for block in range(8)]
        assert gates.ratio > least
        assert gates.ratio > max(simpler) + 0.05
        assert min(simpler) > 0.3


def some_ids(count: int, seed: int = 1) -> Tensor:
    return torch.randint(2, 250, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("model_type", TYPES)
def test_every_architecture_is_recorded(model_type: str) -> None:
    if model_type == "diffusion_gemma":
        pytest.skip("it makes no tokens one by one")
    model = tiny_model(model_type, BF16)
    given: dict[int, list[Tensor]] = {}
    for block, module in enumerate(experts_modules(model).values()):
        module.register_forward_pre_hook(lambda _, inputs, block=block: given.setdefault(block, []).append(inputs[1]))
    trace = record(model, some_ids(9), some_ids(5, seed=2))
    idle = {block for block in range(trace.block_count) if (trace.experts[:, block] == NO_EXPERT).all()}
    assert idle == IDLE.get(model_type, set())
    for block in set(range(trace.block_count)) - idle:
        assert np.array_equal(trace.experts[:, block], torch.cat(given[block]).numpy())
    assert trace.offsets == (0, 9, 14)
    assert trace.lookaheads == FEWER.get(model_type, (1, 2))
    assert (trace.predictions is None) == (trace.lookaheads == ())
    assert (trace.probabilities is None) == (model_type == "zaya")
    if trace.predictions is not None and trace.prediction_probabilities is not None:
        falling = np.diff(trace.prediction_probabilities, axis=-1) <= 0
        assert falling.all(), "best first"


def test_a_block_that_begins_late_was_idle_before() -> None:
    """ernie4_5_vl_moe: a sequence of text, and one of an image."""
    model = tiny_model("ernie4_5_vl_moe", BF16)
    text, image = some_ids(9), some_ids(5, seed=2)
    with torch.no_grad(), Recorder(model) as recorder:
        model(input_ids=text[None])
        recorder.end_sequence(text.tolist(), n_prefill=9)
        model(input_ids=image[None], moe_mm_token_type_ids=torch.ones_like(image)[None])
        recorder.end_sequence(image.tolist(), n_prefill=5)
        trace = recorder.trace()
    used = (trace.experts != NO_EXPERT).all(-1)  # [T, B]
    assert used[:9].tolist() == [[True, False, True, False]] * 9
    assert used[9:].tolist() == [[False, True, False, True]] * 5


def test_experts_that_are_computed_nowhere_are_none() -> None:
    """An index of num_experts and above, as expert parallelism and zaya's skipping give it."""
    model = tiny_model("mixtral", BF16)
    gate = model.model.layers[1].mlp.gate

    def skip(_: Any, given: Any, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, experts = output
        return logits, weights, torch.where(experts == 3, 8, experts)

    wrongly = gate.register_forward_hook(skip)
    experts: npt.NDArray[Any] = record_skipping(model)
    wrongly.remove()
    assert (experts[:, 1] != 3).all()
    assert (experts[:, 1] == NO_EXPERT).any()


@torch.no_grad()
def record_skipping(model: Any) -> npt.NDArray[Any]:
    """Without the experts' own work, which eager ones can't do for an index like that."""
    for module in experts_modules(model).values():
        module.forward = lambda hidden, experts, weights: torch.zeros_like(hidden)
    trace = record(model, some_ids(64))
    assert trace.weights is not None
    assert ((trace.weights == 0) == (trace.experts == NO_EXPERT)).all()
    return trace.experts


def looped() -> Any:
    """inkling2_loop, whose second layer is passed three times."""
    text = tiny_config(model_class("inkling2_loop").config_class).text_config.to_dict()
    text |= {"n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 2}
    return tiny_model("inkling2_loop", BF16, text_config=text)


def test_what_passes_a_block_otherwise_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.experts got 27 hidden states for 9 tokens"):
        record(looped(), some_ids(9))
    with pytest.raises(UnsupportedModelError, match="for 9 tokens"):
        record(tiny_model("diffusion_gemma", BF16), some_ids(9))
    model = tiny_model("mixtral", BF16)
    with torch.no_grad(), Recorder(model) as recorder:
        model(input_ids=torch.stack([some_ids(9), some_ids(9, seed=2)]))
        with pytest.raises(UnsupportedModelError, match="got 18 hidden states for 9 tokens"):
            recorder.end_sequence(some_ids(9).tolist(), n_prefill=9)


def test_no_look_ahead_gives_no_predictions() -> None:
    trace = record(tiny_model("mixtral", BF16), some_ids(9), look_ahead=0)
    assert (trace.lookaheads, trace.predictions) == ((), None)
    assert trace.probabilities is not None


def test_a_look_ahead_beyond_the_last_layer_is_left_out() -> None:
    assert record(tiny_model("mixtral", BF16), some_ids(9), look_ahead=7).lookaheads == (1, 2)


def test_closing_ends_it() -> None:
    model = tiny_model("mixtral", BF16)
    with Recorder(model) as recorder:
        pass
    recorder.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


TINYMIX = ASSETS / "tinymix"


@cache
def loaded() -> Any:
    return transformers.AutoTokenizer.from_pretrained(TINYMIX)


@pytest.fixture
def tokenizer() -> Any:
    return loaded()


def test_each_token_has_what_it_adds(tokenizer: Any) -> None:
    text = "def read_lines(path):\n    return 1"
    token_ids = tokenizer(text)["input_ids"]
    pieces = pieces_of(tokenizer, token_ids)
    assert len(pieces) == len(token_ids)
    assert "".join(pieces) == text
    assert pieces[0] == "def"
    assert all(pieces)


def test_a_character_of_several_tokens_is_the_last_ones(tokenizer: Any) -> None:
    token_ids = tokenizer("a🦉b")["input_ids"]
    assert len(token_ids) == 6  # the owl takes four bytes, which this vocabulary has no word for
    assert pieces_of(tokenizer, token_ids) == ("a", "", "", "", "🦉", "b")


def test_what_is_cut_is_shown_as_such(tokenizer: Any) -> None:
    token_ids = tokenizer("a🦉b")["input_ids"]
    assert pieces_of(tokenizer, token_ids[:3]) == ("a", "", UNFINISHED)
    assert pieces_of(tokenizer, token_ids[:2] * 3)[-1].endswith(UNFINISHED)
    assert pieces_of(tokenizer, []) == ()


def test_bytes_that_are_no_character_hold_nothing_up(tokenizer: Any) -> None:
    """A model may write anything; no piece waits for more than four tokens."""
    cut = tokenizer("🦉")["input_ids"][1]
    pieces = pieces_of(tokenizer, [cut] * 21)
    assert all(any(pieces[start : start + 4]) for start in range(0, 20, 4))


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters=UNFINISHED), max_size=40))
def test_together_they_are_the_text(text: str) -> None:
    tokenizer = loaded()
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tokenizer, token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
    assert not any(UNFINISHED in piece for piece in pieces)
