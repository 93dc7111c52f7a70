"""Guesses by the fewest operations: they are what the gates say, and get better by what comes of them."""

from __future__ import annotations

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
from moetier.runtime.speculation.predictor import Shortcuts, ask, shortcut_of

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
        said, guess = gate.predict(found[gate.block]).experts, shortcuts.guess(gate.block, 0, found[gate.block])
        top_k = said.shape[1]
        assert guess.top_k == top_k
        assert guess.experts.shape == guess.values.shape == (len(said), min(2 * top_k, gate.experts.num_experts))
        assert (guess.values[:, top_k:].diff(dim=-1) <= 0).all(), "of what comes next the best first"
        assert all(len(set(experts)) == len(experts) for experts in guess.experts.tolist())
        assert guess.unit.shape == (len(said),)
        same = (guess.experts[:, :top_k].sort(-1).values == said.sort(-1).values).all(-1)
        assert same.float().mean() > 0.8, "rounding decides between experts that are as good as equal"


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_single_token_is_named_the_same_and_sooner(model_type: str) -> None:
    gates, found = entries(model_type)
    shortcuts = Shortcuts(gates, 2)
    for gate in gates.blocks:
        hidden = found[gate.block].reshape(-1, found[gate.block].shape[-1])[:1]
        said, leads = shortcuts.guess(gate.block, 0, hidden).leads(), shortcuts.leads(gate.block, 0, hidden)
        assert [expert for expert, _ in leads.named] == [expert for expert, _ in said.named]
        assert [lead for _, lead in leads.named] == pytest.approx([lead for _, lead in said.named], rel=1e-4, abs=1e-4)
        assert leads.near == said.near


def test_of_nothing_nothing_is_learned() -> None:
    gates, found = entries("mixtral")
    shortcuts = Shortcuts(gates, 1)
    hidden = found[0].reshape(-1, found[0].shape[-1])[:1]
    before = shortcuts.guess(1, 1, hidden)
    shortcuts.learn(1, 1, torch.zeros_like(hidden), missed={0}, in_vain={1})
    assert all(map(torch.equal, before[:3], shortcuts.guess(1, 1, hidden)[:3]))


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
        guess, said = ask(gate, hidden), gate.predict(hidden)
        top_k = said.experts.shape[1]
        assert torch.equal(guess.experts[:, :top_k], said.experts)
        assert torch.equal(guess.values[:, :top_k], said.probabilities.log())


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
                named = {expert for expert, _ in shortcuts.leads(block + 1, 1, hidden).named}
                right[name] += len(named & wanted) * (token >= ids.shape[1] // 2)
                if name == "learning":
                    shortcuts.learn(block + 1, 1, hidden, missed=wanted - named, in_vain=named - wanted)
    of = 2 * (len(gates.blocks) - 1) * ids.shape[1] // 2
    assert right["learning"] / of > right["still"] / of + 0.03
    after = [gate.gate.weight for gate in gates.blocks if gate.gate is not None]
    assert all(map(torch.equal, before, after)), "the gates themselves learn nothing"
