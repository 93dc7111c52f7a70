"""Recipes: one expert is a slice of the whole parameter, however transformers makes it from stored tensors."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import core_model_loading as loading

from moetier.runtime.checkpoint.recipe import BlockBlueprint, Expert, Merging, Recipe
from moetier.runtime.formats.tensors import SourceTensor, StoredTensor
from moetier.tiers.errors import CheckpointError

EXPERTS, ROWS, COLUMNS = 3, 2, 4
ONE, OTHER = "experts.*.w1.weight", "experts.*.w3.weight"
MERGE = loading.MergeModulelist(dim=0)
PARAMETER = "experts.gate_up_proj"


class Model(nn.Module):
    """As the blueprint's model: on the meta device, with one expert."""

    base_model_prefix = ""
    config = None

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.empty(shape, device="meta"))


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, list[SourceTensor]]:
    """A tensor [ROWS, COLUMNS] for each expert and each of two patterns."""
    numbers = count()
    made: dict[str, list[SourceTensor]] = {}
    for pattern in (ONE, OTHER):
        made[pattern] = []
        for expert in range(EXPERTS):
            path = tmp_path / f"{pattern[10:12]}-{expert}"
            weights = torch.arange(ROWS * COLUMNS).float() + 100 * next(numbers)
            path.write_bytes(weights.numpy().tobytes())
            made[pattern].append(StoredTensor(pattern.replace("*", str(expert)), "F32", (ROWS, COLUMNS), path, 0))
    return made


def recipe(
    sources: dict[str, list[SourceTensor]], *operations: Any, shape: tuple[int, ...] = (1, 2 * ROWS, COLUMNS)
) -> Recipe:
    converter = loading.WeightConverter([*sources], PARAMETER, operations=[*operations]) if operations else None
    model: Any = Model(*shape)
    return Recipe(model, PARAMETER, PARAMETER, torch.float32, EXPERTS, converter, sources)


def test_one_expert_is_a_slice_of_the_whole(tensors: dict[str, list[SourceTensor]]) -> None:
    made = recipe(tensors, MERGE, loading.Concatenate(dim=1))
    assert made.is_separable
    assert not made.is_direct
    whole = recipe(tensors, MERGE, loading.Concatenate(dim=1), shape=(EXPERTS, 2 * ROWS, COLUMNS)).make(None)
    for expert in range(EXPERTS):
        rows = [tensor.read() for tensor in (tensors[ONE][expert], tensors[OTHER][expert])]
        assert torch.equal(made.make(expert), torch.cat(rows))
        assert torch.equal(made.make(expert), whole[expert])


def test_rows_that_stay_as_they_are_are_named_without_reading(tensors: dict[str, list[SourceTensor]]) -> None:
    assert recipe(tensors, MERGE, loading.Concatenate(dim=1)).by_expert() == [tensors[ONE], tensors[OTHER]]
    turned = recipe(tensors, MERGE, loading.Concatenate(dim=1), loading.Transpose(1, 2))
    assert turned.is_separable
    with pytest.raises(ValueError, match=f"transformers changes {PARAMETER} on loading"):
        turned.by_expert()
    lacking = {ONE: tensors[ONE], OTHER: tensors[OTHER][1:]}
    with pytest.raises(ValueError, match="is made of tensors that are not alike"):
        recipe(lacking, MERGE, loading.Concatenate(dim=1)).by_expert()


@pytest.mark.parametrize("operation", [loading.Concatenate(dim=0), loading.Transpose(0, 1), loading.Chunk(dim=0)])
def test_what_mixes_experts_is_made_whole(operation: Any, tensors: dict[str, list[SourceTensor]]) -> None:
    assert not recipe({ONE: tensors[ONE]}, MERGE, operation).is_separable


def test_one_tensor_of_all_experts_is_read_in_slices(tmp_path: Path) -> None:
    path = tmp_path / "all"
    weights = torch.arange(EXPERTS * ROWS * COLUMNS).float().view(EXPERTS, ROWS, COLUMNS)
    path.write_bytes(weights.numpy().tobytes())
    stored = StoredTensor("all", "F32", (EXPERTS, ROWS, COLUMNS), path, 0)
    made = recipe({PARAMETER: [stored]}, shape=(1, ROWS, COLUMNS))
    assert made.is_separable
    assert made.is_direct
    assert torch.equal(made.make(2), weights[2])
    assert list(made.parts) == [stored]
    assert [[part.read().tolist() for part in run] for run in made.by_expert()] == [weights.tolist()]
    matrix = recipe({PARAMETER: [stored]}, shape=(EXPERTS, ROWS, COLUMNS))
    assert torch.equal(matrix.rows(1, 2), weights[1:])
    with pytest.raises(CheckpointError, match=r"has the shape \[3, 2, 4\] in this checkpoint, but \[1, 2, 4\]"):
        made.make(None)


def test_what_transformers_cannot_make_names_the_parameter(tensors: dict[str, list[SourceTensor]]) -> None:
    (tensors[OTHER][0].parts[0].file).write_bytes(bytes(4 * 6))
    other = StoredTensor("w3", "F32", (2, 3), tensors[OTHER][0].parts[0].file, 0)
    with pytest.raises(CheckpointError, match=f"{PARAMETER} can't be made from this checkpoint"):
        recipe({ONE: tensors[ONE], OTHER: [other] * EXPERTS}, MERGE, loading.Concatenate(dim=1)).make(0)


def test_a_parameter_that_is_made_whole_is_made_once_for_all_threads(
    tensors: dict[str, list[SourceTensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe({ONE: tensors[ONE]}, MERGE, loading.Transpose(0, 1), shape=(ROWS, EXPERTS, COLUMNS))
    calls, make = [], Recipe.make

    def noted(self: Recipe, expert: int | None, merging: threading.Lock | None = None) -> torch.Tensor:
        calls.append(expert)
        return make(self, expert, merging)

    monkeypatch.setattr(Recipe, "make", noted)
    merging = Merging()
    with ThreadPoolExecutor(4) as pool:
        slices = list(pool.map(lambda expert: merging.make(made, expert), [0, 1, 0, 1]))
    assert calls == [None]
    assert torch.equal(slices[1], torch.stack([tensor.read()[1] for tensor in tensors[ONE]]))
    merging.release()
    merging.make(made, 0)
    assert calls == [None, None]


def test_an_expert_with_weights_that_are_no_numbers_is_named(tensors: dict[str, list[SourceTensor]]) -> None:
    made = recipe(tensors, MERGE, loading.Concatenate(dim=1))
    block = BlockBlueprint(
        "layers.0.mlp", EXPERTS, 1, False, {"gate_up_proj": ((4, 4), "float32")}, {"gate_up_proj": made}
    )
    assert block.is_separable
    assert len(block.files) == 2 * EXPERTS
    assert list(Expert(block, 0, Merging())) == ["gate_up_proj"]
    file = tensors[OTHER][1].parts[0].file
    file.write_bytes(torch.full((ROWS, COLUMNS), float("inf")).numpy().tobytes())
    assert Expert(block, 0, Merging())["gate_up_proj"].isfinite().all()
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp expert 1: gate_up_proj has weights that are not finite"):
        Expert(block, 1, Merging())["gate_up_proj"]
