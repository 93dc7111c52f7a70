"""Guesses by the fewest operations: they are what the gates say."""

from __future__ import annotations

import pytest
import torch
from architectures import TYPES, tiny_model
from foretelling import run
from torch import Tensor

from moetier.runtime.moe.gates import Gates
from moetier.runtime.speculation.predictor import Ranking, Shortcuts, ask, shortcut_of

BF16 = torch.bfloat16


def entries(model_type: str) -> tuple[Gates, dict[int, Tensor]]:
    model = tiny_model(model_type, BF16)
    gates, found = Gates(model), dict[int, Tensor]()
    with torch.no_grad(), gates.observe(entry=found.__setitem__):
        run(model_type, model)
    return gates, found


@pytest.mark.parametrize("model_type", TYPES)
def test_it_names_what_the_gate_names(model_type: str) -> None:
    gates, found = entries(model_type)
    shortcuts = Shortcuts(gates)
    for gate in gates.blocks:
        if gate.refusal is not None or not found[gate.block].numel():
            continue
        said, ranking = gate.predict(found[gate.block]).experts, shortcuts.rank(gate.block, found[gate.block])
        top_k = said.shape[1]
        assert ranking.top_k == top_k
        assert ranking.experts.shape == (len(said), min(2 * top_k, gate.experts.num_experts))
        assert all(len(set(experts)) == len(experts) for experts in ranking.experts.tolist())
        same = (ranking.experts[:, :top_k].sort(-1).values == said.sort(-1).values).all(-1)
        assert same.float().mean() > 0.8, "rounding decides between experts that are as good as equal"


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_single_token_is_named_the_same_and_sooner(model_type: str) -> None:
    gates, found = entries(model_type)
    shortcuts = Shortcuts(gates)
    for gate in gates.blocks:
        hidden = found[gate.block].reshape(-1, found[gate.block].shape[-1])[:1]
        assert shortcuts.predict(gate.block, hidden) == shortcuts.rank(gate.block, hidden).prediction()


def test_a_prediction_for_several_tokens_begins_with_the_best_of_each() -> None:
    assert Ranking(torch.tensor([[5, 1, 2, 3], [6, 1, 4, 0]]), 2).prediction() == ([5, 6, 1, 1], [2, 4, 3, 0])


@pytest.mark.parametrize(
    ("model_type", "is_there"),
    [("mixtral", True), ("qwen3_moe", True), ("olmoe", True), ("gpt_oss", True), ("deepseek_v3", False)],
)
def test_which_gates_have_one(model_type: str, is_there: bool) -> None:
    """DeepSeek's chooses with a correction of its own."""
    gates = Gates(tiny_model(model_type, BF16))
    assert [shortcut_of(gate) is not None for gate in gates.blocks] == [is_there] * len(gates.blocks)


def test_a_gate_without_a_matrix_is_called() -> None:
    gates, found = entries("deepseek_v3")
    for gate in gates.blocks:
        hidden = found[gate.block]
        ranking, said = ask(gate, hidden), gate.predict(hidden)
        assert torch.equal(ranking.experts[:, : ranking.top_k], said.experts)
