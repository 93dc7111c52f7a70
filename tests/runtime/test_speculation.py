"""Speculation on the bundled model: what is guessed, what is wished, and that no text depends on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moetier
from moetier.runtime.controller import Mode
from moetier.runtime.experts import experts_modules
from moetier.runtime.gates import Gates
from moetier.runtime.shortcut import Guess, Shortcuts
from moetier.runtime.speculation import JUDGED, MOST_ROWS, Speculation
from moetier.tiers.errors import ConfigError
from moetier.tiers.keys import ExpertKey

BLOCKS = 8
RAM = 4 << 20  # 18 of 64 experts
TOKENS = 24
PROMPT = MOST_ROWS + 1  # tokens: none is guessed for


class Wishes:
    """In place of a tier: notes wishes."""

    def __init__(self) -> None:
        self.made: list[tuple[int, list[int]]] = []
        self.lacking = {*range(8), 99}

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        return [key for key in keys if key.expert in self.lacking]

    def prefetch(self, block: int, wishes: Sequence[ExpertKey]) -> None:
        assert all(key.block == block for key in wishes)
        self.made.append((block, [key.expert for key in wishes]))


class Wrong(Shortcuts):
    """They name experts which no token wants: beyond those that there are."""

    def guess(self, block: int, distance: int, hidden: Tensor) -> Guess:
        rows = hidden.shape[:-1].numel()
        return Guess(torch.full((rows, 2), 99), torch.tensor([[2.0, 1.0, 0.0]] * rows), torch.ones(rows))

    def learn(self, block: int, distance: int, hidden: Tensor, *, missed: set[int], in_vain: set[int]) -> None:
        """They won't."""


def text(folder: Path, prompt: str = "La mattina seguente, don Rodrigo", **options: Any) -> tuple[list[int], Any]:
    """Tokens, and the tiers, closed."""
    model, tokenizer = moetier.load(folder, ram=RAM, daemon=None, **options)
    with model.tiers:
        encoded = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**encoded, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)[0]
        model.tiers.host.check_integrity()
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
    assert with_.host.stats().prefetched > 0
    assert with_.host.stats().hit_ratio > without.host.stats().hit_ratio


def test_guesses_are_better_than_chance_and_worse_from_afar(tinymix_4bit: Path) -> None:
    """Of eight experts two are right: chance is a quarter."""
    _, tiers = text(tinymix_4bit, speculate="always", look_ahead=2)
    stats = tiers.speculation.stats()
    steps = TOKENS - 1
    # the first block can't be guessed, the second only from one layer ahead; the layer's own entry follows a wish
    assert stats.guesses[1:] == tuple(steps * 2 * (BLOCKS - distance) for distance in (1, 2))
    assert 0 < stats.guesses[0] <= stats.guesses[1]
    at_entry, one, two = (right / all_ for right, all_ in zip(stats.right, stats.guesses, strict=True))
    assert min(at_entry, one) > two > 0.35
    assert 0 < stats.seconds < 10


@pytest.fixture
def model(tinymix_4bit: Path) -> Any:
    model, _ = moetier.load(tinymix_4bit, ram=RAM, daemon=None)
    with model.tiers:
        yield model


def attached(model: Any, gates: Any, mode: Mode, look_ahead: int = 2) -> tuple[Speculation, Wishes]:
    from dataclasses import replace

    wishes: Any = Wishes()
    speculation = Speculation(gates, wishes, mode=mode, look_ahead=look_ahead)
    speculation.attach()
    for module in experts_modules(model).values():
        module.tiered = replace(module.tiered, demanded=speculation.demanded)
    return speculation, wishes


def test_what_is_wished_is_what_the_gates_say(model: Any) -> None:
    """Of the next two blocks as soon as a block has made its demand; of a block once more before its attention."""
    gates = Gates(model)
    speculation, wishes = attached(model, gates, Mode.ALWAYS)
    sure: Any = lambda distance, lead: 1.0  # noqa: E731 (else only what has turned out likely is wished for)
    speculation._confidence.of = sure  # type: ignore[method-assign]
    said: list[tuple[int, list[int]]] = []

    def entry(block: int, hidden: Tensor) -> None:
        said.extend(
            (target, gates.predict(target, hidden).experts[0].tolist())
            for target in (block + 1, block + 2)
            if target < BLOCKS and hidden.shape[1] == 1
        )

    def layer(block: int, hidden: Tensor) -> None:
        if block and hidden.shape[1] == 1:
            said.append((block, gates.predict(block, hidden).experts[0].tolist()))

    with gates.observe(layer=layer, entry=entry):
        decode(model, steps=2)
    assert [(block, sorted(experts)) for block, experts in wishes.made] == [
        (block, sorted(experts)) for block, experts in said
    ]


def test_a_long_prompt_is_not_guessed(model: Any) -> None:
    speculation, wishes = attached(model, Gates(model), Mode.ALWAYS)
    with torch.no_grad():
        model(torch.arange(2, 2 + PROMPT)[None])
        assert wishes.made == []
        model(torch.arange(3, 2 + PROMPT)[None])
    assert len(wishes.made) > 0
    assert speculation.stats().steps_on == 0, "no time of a prompt is compared"


def test_several_sequences_want_what_any_of_them_wants(model: Any) -> None:
    speculation, wishes = attached(model, Gates(model), Mode.ALWAYS, look_ahead=1)
    decode(model, rows=3, steps=8)
    assert any(len(experts) > 2 for _, experts in wishes.made)
    assert all(len(set(experts)) == len(experts) for _, experts in wishes.made)
    _, one = speculation.stats().guesses
    assert one == 3 * 2 * (BLOCKS - 1) * 7


def test_who_is_always_wrong_wishes_nothing_any_more_and_is_off(model: Any) -> None:
    speculation, wishes = attached(model, gates := Gates(model), Mode.AUTO)
    speculation._shortcuts = Wrong(gates, range(3))
    decode(model, steps=60)
    stats = speculation.stats()
    assert not stats.is_on
    assert sum(stats.right) == 0
    assert stats.steps_on <= 2 + JUDGED / (3 * 2 * (BLOCKS - 2))
    made = sum(experts != [] for _, experts in wishes.made)
    assert 0 < made < stats.steps_on * BLOCKS / 2, "it has learned that they are wrong"


def test_it_lets_go(model: Any) -> None:
    def hooks() -> int:
        return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())

    before = hooks()
    speculation, wishes = attached(model, Gates(model), Mode.ALWAYS)
    assert hooks() > before
    speculation.detach()
    speculation.detach()
    assert hooks() == before
    decode(model, steps=2)
    assert wishes.made == []


@pytest.mark.parametrize(("option", "value"), [("speculate", "yes"), ("look_ahead", 0), ("look_ahead", 9)])
def test_what_is_no_way_to_speculate(tinymix_4bit: Path, option: str, value: Any) -> None:
    with pytest.raises(ConfigError):
        moetier.load(tinymix_4bit, **{option: value})
