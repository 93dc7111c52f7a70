"""A request has the same tokens alone and in any company: random schedules with real models."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model
from readers import PATIENCE
from torch import Tensor

import moetier
from moetier.runtime.engine.engine import Engine
from moetier.runtime.engine.faster_way import FasterWay
from moetier.runtime.engine.model_runner import ModelRunner
from moetier.runtime.engine.packed_runner import PackedRunner, can_pack, check_bits
from moetier.runtime.engine.runner import Task
from moetier.runtime.engine.sequence import Finish, Request, Sampled, TokenSequence
from moetier.runtime.kernels.layer.attention import use_causal_attention
from moetier.runtime.model.prefill_memory import PASS_TOKENS
from moetier.runtime.moe.layers import OneTokenLayer
from moetier.tiers.errors import UnsupportedModelError

PAGES, MAX_PROMPT = 14, 150
QUICK, SCHEDULES = 1, 70  # of each model


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral", "gpt_oss"])
def model(request: pytest.FixtureRequest) -> Any:
    model = tiny_model(request.param, torch.float32)
    use_causal_attention(model)
    assert can_pack(model, near=0.01)
    return model


class Recorded(PackedRunner):
    """Notes the logits of each sequence's tokens."""

    def __init__(self, model: Any, pass_tokens: int) -> None:
        super().__init__(model, PAGES, later_chunk=1000, packs=True, pass_tokens=pass_tokens)
        self.logits: dict[TokenSequence, list[Tensor]] = {}

    def run(self, tasks: Any, *more: Any) -> list[Tensor | None]:  # type: ignore[override]
        found = super().run(tasks, *more)
        for task, logits in zip(tasks, found, strict=True):
            if logits is not None:
                self.logits.setdefault(task.sequence, []).append(logits)
        return found


def requests(seed: int) -> list[Request]:
    """Prompts that begin alike in part, with samplers and penalties of all kinds."""
    random_ = random.Random(seed)
    text = [random_.randrange(2, 250) for _ in range(MAX_PROMPT)]
    found = []
    for number in range(random_.randrange(2, 6)):
        ids = text[: random_.randrange(1, 90)] + [random_.randrange(2, 250) for _ in range(random_.randrange(1, 60))]
        decoding = random_.choice(
            [
                {"do_sample": False},
                {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
                {"do_sample": True, "top_k": 5},
                {"do_sample": False, "presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.2},
            ]
        )
        found.append(Request(tuple(ids), random_.randrange(1, 40), decoding, seed=number))
    return found


@pytest.mark.parametrize(
    "seed", [*range(QUICK), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(QUICK, SCHEDULES))]
)
def test_company_changes_no_token(model: Any, seed: int) -> None:
    random_, asked = random.Random(seed), requests(seed)
    alone = []
    for request in asked:
        runner = Recorded(model, 1000)
        with Engine(runner, pages=PAGES, max_sequences=1, chunk=1000, context=400) as engine:
            stream = engine.stream(request)
            alone.append(([*stream], runner.logits[stream.sequence]))
    most, chunk = random_.randrange(2, 5), random_.choice([8, 33, 64, 500])
    runner = Recorded(model, random_.choice([8, 40, 1000]))
    with Engine(runner, pages=PAGES, max_sequences=most, chunk=chunk, context=400) as engine:
        streams = [engine.stream(request) for request in asked]
        cancelled = random_.choice([None, streams[0]])
        if cancelled is not None:
            cancelled.sequence.cancel()
        for stream, (tokens, logits) in zip(streams, alone, strict=True):
            found = [*stream]
            assert found == tokens[: len(found)]
            if stream is not cancelled:
                assert found == tokens
            for one, other in zip(logits, runner.logits.get(stream.sequence, []), strict=False):
                torch.testing.assert_close(one.log_softmax(-1), other.log_softmax(-1), rtol=1e-4, atol=1e-4)
        assert not engine.sequences


@pytest.mark.parametrize("runner_of", [ModelRunner, partial(PackedRunner, later_chunk=64, packs=True, pass_tokens=10)])
def test_prompts_are_scored_by_the_models_own_probabilities(model: Any, runner_of: Callable[..., ModelRunner]) -> None:
    """In company, in chunks, and after another request with the same prompt; biases and samplers change no score."""
    prompts = [[*range(3, 3 + length)] for length in (150, 140, 1)]
    decoding = {"do_sample": True, "temperature": 2.0, "logit_bias": {7: 50.0}}
    with Engine(runner_of(model, PAGES), pages=PAGES, max_sequences=3, chunk=64, context=400) as engine:
        [*engine.stream(Request(tuple(prompts[0]), 1))]
        tokens: list[list[Sampled]] = [[] for _ in prompts]
        ended = [threading.Event() for _ in prompts]
        sequences = [
            engine.submit(
                Request(tuple(ids), 3, decoding, logprobs=4, scores_prompt=True),
                lambda _, sampled, found=tokens[at]: found.append(sampled),
                partial(note, end),
            )
            for at, (ids, end) in enumerate(zip(prompts, ended, strict=True))
        ]
        assert all(end.wait(PATIENCE) for end in ended)
    for ids, sequence, new in zip(prompts, sequences, tokens, strict=True):
        assert [sampled.token for sampled in new] == sequence.ids[len(ids) :] == [7] * 3
        scores = [*(sequence.prompt_scores[at] for at in range(1, len(ids))), *new]
        with torch.no_grad():
            expected = model(torch.tensor([sequence.ids]), use_cache=False).logits[0].float().log_softmax(-1)
        for sampled, logprobs, token in zip(scores, expected, sequence.ids[1:], strict=False):
            assert sampled.token == token
            assert sampled.logprob == pytest.approx(float(logprobs[token]), abs=1e-3)
            assert [value for _, value in sampled.top] == pytest.approx(logprobs.topk(4).values.tolist(), abs=1e-3)
            assert [float(logprobs[at]) for at, _ in sampled.top] == pytest.approx(
                [v for _, v in sampled.top], abs=1e-3
            )


def test_a_model_that_uses_the_inputs_of_layers_to_their_end_is_packed_but_not_in_lockstep() -> None:
    """In lockstep, these inputs are freed once their experts are reached. cohere2_moe adds them up at the end."""
    model = tiny_model("cohere2_moe", torch.float32)
    use_causal_attention(model)
    assert can_pack(model, near=0.01)
    assert not can_pack(model, near=0.01, in_lockstep=True)
    qwen3 = tiny_model("qwen3_moe", torch.float32)
    use_causal_attention(qwen3)
    assert can_pack(qwen3, near=0.01, in_lockstep=True)


def note(end: threading.Event, _: TokenSequence) -> None:
    end.set()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each decoder layer that has got one token was computed by compiled code."""
    computed, compute = list[bool](), OneTokenLayer.compute

    def seen(layer: OneTokenLayer, given: Any, hidden: Tensor, *arguments: Any, **named: Any) -> Any:
        found = compute(layer, given, hidden, *arguments, **named)
        if hidden.shape[1] == 1:
            computed.append(found is not None)
        return found

    monkeypatch.setattr(OneTokenLayer, "compute", seen)
    return computed


def test_one_sequence_is_decoded_by_compiled_layers(tinymix_4bit: Path, computed: list[bool]) -> None:
    """Conversations grow by turns, so that their pages are not consecutive."""
    model, _ = moetier.load(tinymix_4bit, daemon=None)
    with model.tiers, Engine.of(model, max_sequences=2) as engine:
        conversations = [range(3, 60)], [range(99, 160)]
        for _ in range(3):
            for ids in conversations:
                so_far = (*itertools.chain(*ids),)
                ids += [[*engine.stream(Request(so_far, 40, {"do_sample": False}))], [7, 8, 9]]
        blocks = len(model.tiers.manifest.blocks)
        assert sum(computed) >= blocks * 6 * 39
        assert all(computed[blocks:]), "the first token finds out how layers can be computed"


def test_a_first_prompt_whose_last_pass_is_one_token_refuses_no_layer(tinymix_4bit: Path, computed: list[bool]) -> None:
    """That pass is computed in a packed step, in which no trial of a layer can succeed."""
    model, _ = moetier.load(tinymix_4bit, daemon=None)
    with model.tiers, Engine.of(model, max_sequences=2) as engine:
        blocks, prompt = len(model.tiers.manifest.blocks), (5, 6, 7) * 171
        assert len(prompt) % PASS_TOKENS == 1
        assert len([*engine.stream(Request(prompt, 9, {"do_sample": False}))]) == 9
        assert all(computed[-7 * blocks :])  # the first token but one finds out how layers can be computed


def test_a_model_whose_trial_fails_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3_moe", torch.float32)
    use_causal_attention(model)
    right = PackedRunner.run_together

    def wrong(self: PackedRunner, tasks: list[Task], *more: Any) -> Any:
        return [None if logits is None else logits.flip(0) for logits in right(self, tasks, *more)]

    monkeypatch.setattr(PackedRunner, "run_together", wrong)
    assert not can_pack(model, near=0.01)


def test_a_cancelled_prompt_ends_between_two_layers(model: Any) -> None:
    with Engine(
        PackedRunner(model, PAGES, later_chunk=1000, packs=True), pages=PAGES, max_sequences=2, chunk=1000, context=800
    ) as engine:
        stream = engine.stream(Request((5,) * 700, 5, {"do_sample": False}))
        stream.sequence.cancel()
        assert [*stream] == []
        assert stream.sequence.finish is Finish.CANCELLED


def test_the_faster_way_is_taken_and_the_other_one_tried_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, taken = [0.0], list[str]()
    monkeypatch.setattr("moetier.runtime.engine.faster_way.time.perf_counter", lambda: clock[0])

    def way(name: str, seconds: float) -> Callable[[], str]:
        def run() -> str:
            clock[0] += seconds
            taken.append(name)
            return name

        return run

    ways = FasterWay()
    for _ in range(100):
        ways.run(4, way("slow", 2.0), way("quick", 1.0))
    assert taken.count("slow") == 1 + 3


def test_long_prompts_of_a_model_that_cannot_be_packed_let_others_go_on(model: Any) -> None:
    """They are computed in chunks, and one that is cancelled stops no other."""
    runner, shares = PackedRunner(model, PAGES, later_chunk=10, packs=False, pass_tokens=20), list[float]()
    long, other = (TokenSequence(Request(tuple(range(first, first + 55)), 1)) for first in (3, 90))
    tasks = [Task(long, 0, 55, [*range(1)]), Task(other, 0, 55, [1])]

    def between(share: float) -> None:
        shares.append(share)
        if len(shares) == 3:
            long.cancel()

    dropped, logits = runner.run(tasks, lambda: False, between)
    assert shares == [number / 12 for number in range(12)]
    assert dropped is None
    ids = torch.tensor([other.ids])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1]
    assert logits is not None
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_eight_bits_of_keys_and_values_need_moetiers_own_attention() -> None:
    """It takes heads of 16 numbers, and not of 24; and what qwen3_next keeps besides is not its own."""
    for model_type, changes in (("qwen3_moe", {}), ("qwen3_moe", {"head_dim": 24}), ("qwen3_next", {})):
        model = tiny_model(model_type, torch.float32, **changes)
        use_causal_attention(model)
        check_bits(model, 16)
        if model_type == "qwen3_moe" and not changes:
            check_bits(model, 8)
            continue
        with pytest.raises(UnsupportedModelError, match=r"can't have keys and values in 8 bits(?s:.*)`kv_bits`"):
            check_bits(model, 8)
