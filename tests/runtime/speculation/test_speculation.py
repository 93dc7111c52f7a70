"""Speculation on the bundled model: what is predicted and prefetched, and that no text depends on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from integrity import check_integrity
from torch import Tensor

import moetier
from moetier.runtime.config import SpeculationMode
from moetier.runtime.moe.experts import experts_modules
from moetier.runtime.moe.gates import Gates
from moetier.runtime.speculation.predictor import Prediction, Shortcuts
from moetier.runtime.speculation.speculation import JUDGED, MAX_TOKENS, Admission, Speculation
from moetier.tiers.errors import ConfigError
from moetier.tiers.layout import ExpertKey

BLOCKS = 8
RAM = 4 << 20  # 18 of 64 experts
TOKENS = 24
TRUSTED = 8  # steps
PROMPT = MAX_TOKENS + 1  # tokens: none is guessed for


class Requests:
    """In place of a tier: notes prefetch requests."""

    def __init__(self) -> None:
        self.made: list[tuple[int, list[int]]] = []
        self.lacking = {*range(8)}

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        return [key for key in keys if key.expert in self.lacking]

    def prefetch(self, block: int, keys: Sequence[ExpertKey]) -> None:
        assert all(key.block == block for key in keys)
        self.made.append((block, [key.expert for key in keys]))


class Wrong(Shortcuts):
    """Once they have been right for a while they name what is not used, which ``real`` says: by step, by block."""

    def __init__(self, gates: Gates, real: list[dict[int, set[int]]]) -> None:
        super().__init__(gates)
        self.real = real
        self.step = -1

    def predict(self, block: int, hidden: Tensor) -> Prediction:
        used = self.real[self.step][block]
        others = [expert for expert in range(8) if expert not in used]
        return Prediction([*used] if self.step < TRUSTED else others[:2], [])


def text(folder: Path, prompt: str = "La mattina seguente, don Rodrigo", **options: Any) -> tuple[list[int], Any]:
    """Tokens, and the tiers, closed."""
    model, tokenizer = moetier.load(folder, ram=RAM, daemon=None, **options)
    with model.tiers:
        encoded = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**encoded, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)[0]
        check_integrity(model.tiers.host)
    return tokens.tolist(), model.tiers


def decode(model: Any, *, rows: int = 1, steps: int = TOKENS) -> list[list[int]]:
    ids = torch.arange(2, 2 + PROMPT * rows).view(rows, PROMPT)
    found: list[list[int]] = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, min_new_tokens=steps, do_sample=False
    ).tolist()
    return found


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_the_text_is_the_same_and_experts_are_there_before_they_are_needed(tinymix_4bit: Path, mode: str) -> None:
    plain, without = text(tinymix_4bit, speculate="off")
    guessed, with_ = text(tinymix_4bit, speculate=mode)
    assert guessed == plain
    assert without.speculation is None
    assert without.host.stats().prefetched == 0
    stats = with_.speculation.stats()
    assert stats.steps_on > 0
    host = with_.host.stats()
    assert host.prefetched > 0
    if host.useful == 0:  # a disk that has other work may have been late each time, but is not always
        assert any(text(tinymix_4bit, speculate=mode)[1].host.stats().useful for _ in range(10))
    if mode == "always":  # with "auto", a fast disk may leave few steps in which experts are prefetched
        assert host.hits + host.joined > without.host.stats().hits, "they are there, or on their way"


def test_predictions_are_better_than_chance_and_worse_from_afar(tinymix_4bit: Path) -> None:
    """Of eight experts two are right: chance is a quarter."""
    _, tiers = text(tinymix_4bit, speculate="always", look_ahead=2)
    stats = tiers.speculation.stats()
    steps = TOKENS - 1
    # the first block can't be predicted, the second only from one layer ahead; a layer's own entry follows a request
    assert stats.guesses[1:] == tuple(steps * 2 * (BLOCKS - distance) for distance in (1, 2))
    assert 0 < stats.guesses[0] <= stats.guesses[1]
    at_entry, one, two = (right / all_ for right, all_ in zip(stats.right, stats.guesses, strict=True))
    assert min(at_entry, one) > two > 0.35
    assert 0 < stats.seconds < 100


@pytest.fixture
def model(tinymix_4bit: Path) -> Any:
    model, _ = moetier.load(tinymix_4bit, ram=RAM, daemon=None)
    with model.tiers:
        yield model


def attached(
    model: Any, gates: Any, mode: SpeculationMode, look_ahead: int = 2, shortcuts: Shortcuts | None = None
) -> tuple[Speculation, Requests]:
    from dataclasses import replace

    requests: Any = Requests()
    speculation = Speculation(shortcuts or Shortcuts(gates), requests, look_ahead=look_ahead, mode=mode)
    speculation.attach()
    for module in experts_modules(model).values():
        module.tiered = replace(module.tiered, on_demand=speculation.on_demand)
    return speculation, requests


def test_what_the_gates_choose_is_prefetched(model: Any) -> None:
    """Of the next two blocks as soon as a block has made its demand; of a block once more before its attention."""
    gates = Gates(model)
    _, requests = attached(model, gates, SpeculationMode.ALWAYS)
    said: list[tuple[int, list[int]]] = []

    def entry(block: int, hidden: Tensor) -> None:
        said.extend(
            (target, gates.blocks[target].predict(hidden).experts[0].tolist())
            for target in (block + 1, block + 2)
            if target < BLOCKS and hidden.shape[1] == 1
        )

    def layer(block: int, hidden: Tensor) -> None:
        if block and hidden.shape[1] == 1:
            said.append((block, gates.blocks[block].predict(hidden).experts[0].tolist()))

    with gates.observe(layer=layer, entry=entry):
        decode(model, steps=2)
    assert [(block, sorted(experts)) for block, experts in requests.made] == [
        (block, sorted(experts)) for block, experts in said
    ]


def test_nothing_is_predicted_for_a_long_prompt(model: Any) -> None:
    speculation, requests = attached(model, Gates(model), SpeculationMode.ALWAYS)
    with torch.no_grad():
        model(torch.arange(2, 2 + PROMPT)[None])
        assert requests.made == []
        model(torch.arange(3, 2 + PROMPT)[None])
    assert len(requests.made) > 0
    assert speculation.stats().steps_on == 0, "no time of a prompt is compared"


def test_several_sequences_want_what_any_of_them_wants(model: Any) -> None:
    speculation, requests = attached(model, Gates(model), SpeculationMode.ALWAYS, look_ahead=1)
    decode(model, rows=3, steps=8)
    assert any(len(experts) > 2 for _, experts in requests.made)
    assert all(len(set(experts)) == len(experts) for _, experts in requests.made)
    _, one = speculation.stats().guesses
    assert one == 3 * 2 * (BLOCKS - 1) * 7


def test_wrong_predictions_turn_it_off(model: Any) -> None:
    gates = Gates(model)
    real: list[dict[int, set[int]]] = []

    def begin(_: int, hidden: Tensor) -> None:
        if hidden.shape[1] == 1:
            real.append({})

    def note(block: int, experts: Tensor, _: Tensor) -> None:
        if len(experts) == 1:
            real[-1][block] = set(experts[0].tolist())

    with gates.observe(entry=begin, blocks=[0]), gates.observe(experts=note):
        decode(model, steps=60)
    wrong = Wrong(gates, real)

    def count(_: int, hidden: Tensor) -> None:
        wrong.step += hidden.shape[1] == 1

    with gates.observe(entry=count, blocks=[0]):
        speculation, _ = attached(model, gates, SpeculationMode.AUTO, look_ahead=1, shortcuts=wrong)
        decode(model, steps=60)
    stats = speculation.stats()
    assert not stats.is_on
    assert sum(stats.right) == TRUSTED * (BLOCKS - 1), "half of the steps of a trial are without"
    assert stats.steps_on <= TRUSTED + 2 + JUDGED / (BLOCKS - 1)


def test_another_tower_beside_it_is_left_alone(model: Any) -> None:
    """Its blocks are entered with other tokens than those of the step."""
    speculation, requests = attached(model, Gates(model), SpeculationMode.ALWAYS, look_ahead=1)
    with torch.no_grad():
        model(torch.tensor([[5]]))
        requests.made.clear()
        guessed = speculation.stats().guesses
        for rows in (3, PROMPT):
            speculation._at_entry(2, torch.ones(1, rows, model.config.hidden_size, dtype=model.dtype))
            speculation.on_demand(2, {0, 1})
            speculation.on_demand(3, {0, 1})
    assert requests.made == []
    assert speculation.stats().guesses == guessed


def test_it_lets_go(model: Any) -> None:
    def hooks() -> int:
        return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())

    before = hooks()
    speculation, requests = attached(model, Gates(model), SpeculationMode.ALWAYS)
    assert hooks() > before
    speculation.detach()
    speculation.detach()
    assert hooks() == before
    decode(model, steps=2)
    assert requests.made == []


@pytest.mark.parametrize(
    ("option", "value"), [("speculate", "yes"), ("look_ahead", 0), ("look_ahead", 9), ("prefetch", 0)]
)
def test_what_is_no_way_to_speculate(tinymix_4bit: Path, option: str, value: Any) -> None:
    with pytest.raises(ConfigError):
        moetier.load(tinymix_4bit, **{option: value})


EXPERTS = 8


class Source:
    """In place of a tier: has experts 6 and 7, and notes requests."""

    def __init__(self) -> None:
        self.made: list[list[int]] = []

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        return [key for key in keys if key.expert < 6]

    def prefetch(self, block: int, requests: Sequence[ExpertKey]) -> None:
        self.made.append([key.expert for key in requests])


def admission(source: Source, most: int | None = None) -> Admission:
    return Admission(source, [EXPERTS], most=most)  # type: ignore[arg-type]


@pytest.mark.parametrize(("most", "made"), [(None, [6, 2, 4, 5]), (4, [6, 2, 4, 5]), (2, [6, 2, 4]), (1, [6, 2])])
def test_no_more_than_asked_for_and_the_best_first(most: int | None, made: list[int]) -> None:
    source = Source()
    admission(source, most).request(0, Prediction([2, 4, 6, 5, 2], []))
    assert source.made == [made], "a resident expert is named besides: it costs no read"


def test_resident_experts_need_no_request() -> None:
    source = Source()
    assert admission(source).request(0, Prediction([6, 7], [])) == [6, 7]
    assert source.made == []


def test_a_resident_runner_up_is_named() -> None:
    source = Source()
    assert admission(source).request(0, Prediction([2], [3, 7])) == [2]
    assert source.made == [[7, 2]], "3 is absent, and not to be read"


def test_a_later_prediction_replaces_a_request_until_the_demand() -> None:
    source = Source()
    found = admission(source)
    found.request(0, Prediction([2], []))
    assert 0 in found.requested
    found.request(0, Prediction([6], []))
    found.requested.discard(0)
    assert 0 not in found.requested
    found.request(0, Prediction([6], []))
    assert source.made == [[2], [6]]


def test_experts_without_a_record_are_not_requested() -> None:
    source = Source()
    assert admission(source).request(0, Prediction([EXPERTS, 2], [EXPERTS])) == [2]
    assert source.made == [[2]]
