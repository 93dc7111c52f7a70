"""Guesses by the fewest operations: they are what the gates say, and get better by what comes of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FURTHER, REQUIRED, tiny_model
from foretelling import run
from places import ASSETS
from torch import Tensor

import moetier
from moetier.runtime.moe.gates import Gates
from moetier.runtime.speculation.predictor import Ranking, Shortcuts, ask, shortcut_of

BF16 = torch.bfloat16
TEXT = ASSETS / "texts" / "it.txt"


def entries(model_type: str) -> tuple[Gates, dict[int, Tensor]]:
    model = tiny_model(model_type, BF16)
    gates, found = Gates(model), dict[int, Tensor]()
    with torch.no_grad(), gates.observe(entry=found.__setitem__):
        run(model_type, model)
    return gates, found


@pytest.mark.parametrize("model_type", sorted(REQUIRED | FURTHER))
def test_it_names_what_the_gate_names(model_type: str) -> None:
    gates, found = entries(model_type)
    shortcuts = Shortcuts(gates, 2)
    for gate in gates.blocks:
        if gate.refusal is not None or not found[gate.block].numel():
            continue
        said, ranking = gate.predict(found[gate.block]).experts, shortcuts.rank(gate.block, 0, found[gate.block])
        top_k = said.shape[1]
        assert ranking.top_k == top_k
        assert ranking.experts.shape == (len(said), min(2 * top_k, gate.experts.num_experts))
        assert all(len(set(experts)) == len(experts) for experts in ranking.experts.tolist())
        same = (ranking.experts[:, :top_k].sort(-1).values == said.sort(-1).values).all(-1)
        assert same.float().mean() > 0.8, "rounding decides between experts that are as good as equal"


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_single_token_is_named_the_same_and_sooner(model_type: str) -> None:
    gates, found = entries(model_type)
    shortcuts = Shortcuts(gates, 2)
    for gate in gates.blocks:
        hidden = found[gate.block].reshape(-1, found[gate.block].shape[-1])[:1]
        assert shortcuts.predict(gate.block, 0, hidden) == shortcuts.rank(gate.block, 0, hidden).prediction()


def test_a_prediction_for_several_tokens_begins_with_the_best_of_each() -> None:
    assert Ranking(torch.tensor([[5, 1, 2, 3], [6, 1, 4, 0]]), 2).prediction() == ([5, 6, 1, 1], [2, 4, 3, 0])


def test_of_nothing_nothing_is_learned() -> None:
    gates, found = entries("mixtral")
    shortcuts = Shortcuts(gates, 1)
    states = found[0].reshape(-1, found[0].shape[-1])
    hidden, before = states[:1], shortcuts.rank(1, 1, states).experts
    for nothing in (0.0, math.nan, math.inf):
        shortcuts.learn(1, 1, torch.full_like(hidden, nothing), missed={0}, in_vain={1})
    assert torch.equal(before, shortcuts.rank(1, 1, states).experts)


@pytest.mark.parametrize(
    ("model_type", "is_there"),
    [("mixtral", True), ("qwen3_moe", True), ("olmoe", True), ("gpt_oss", True), ("deepseek_v3", False)],
)
def test_which_gates_have_one(model_type: str, is_there: bool) -> None:
    """DeepSeek's chooses with a correction of its own."""
    gates = Gates(tiny_model(model_type, BF16))
    assert [shortcut_of(gate) is not None for gate in gates.blocks] == [is_there] * len(gates.blocks)


def test_who_has_none_is_asked() -> None:
    gates, found = entries("deepseek_v3")
    for gate in gates.blocks:
        hidden = found[gate.block]
        ranking, said = ask(gate, hidden), gate.predict(hidden)
        assert torch.equal(ranking.experts[:, : ranking.top_k], said.experts)


@pytest.fixture
def trained(tinymix_4bit: Path) -> Any:
    model, tokenizer = moetier.load(tinymix_4bit, ram="100%", daemon=None, speculate="off")
    with model.tiers:
        yield model, tokenizer(TEXT.read_text(), return_tensors="pt").input_ids[:, :400]


@torch.no_grad()
def test_it_learns_what_the_layers_between_do(trained: Any) -> None:
    """Of the model's own text, as it comes: the share of right guesses from one layer ahead, of the later half."""
    model, ids = trained
    gates, states, real = Gates(model), dict[int, Tensor](), dict[int, Tensor]()
    before = [gate.gate.weight.clone() for gate in gates.blocks if gate.gate is not None]
    with gates.observe(
        entry=lambda block, hidden: states.update({block: hidden[0]}),
        experts=lambda block, experts, _: real.update({block: experts}),
    ):
        model(ids)
    learning, still = Shortcuts(gates, 1), Shortcuts(gates, 1)
    right = {"learning": 0, "still": 0}
    for token in range(ids.shape[1]):
        for block in range(len(gates.blocks) - 1):
            hidden, wanted = states[block][token : token + 1], set(real[block + 1][token].tolist())
            for name, shortcuts in (("learning", learning), ("still", still)):
                named = {*shortcuts.predict(block + 1, 1, hidden).likely}
                right[name] += len(named & wanted) * (token >= ids.shape[1] // 2)
                if name == "learning":
                    shortcuts.learn(block + 1, 1, hidden, missed=wanted - named, in_vain=named - wanted)
    of = 2 * (len(gates.blocks) - 1) * ids.shape[1] // 2
    assert right["learning"] / of > right["still"] / of + 0.03
    after = [gate.gate.weight for gate in gates.blocks if gate.gate is not None]
    assert all(map(torch.equal, before, after)), "the gates themselves learn nothing"
