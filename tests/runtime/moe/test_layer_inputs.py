"""Inputs of decoder layers are freed once their experts are called, unless a hook of the layer gets them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moetier
from moetier.runtime.moe.experts import experts_modules
from moetier.runtime.moe.layer_inputs import LayerInputs


@pytest.fixture(scope="module")
def model(tinymix_4bit: Path) -> Iterator[Any]:
    model, _ = moetier.load(tinymix_4bit, daemon=None, speculate="off")
    with model.tiers, torch.no_grad():
        yield model


def seen(model: Any, ids: Tensor) -> tuple[Tensor, list[bool]]:
    """Return logits, and for each layer whether its input has no elements when its experts have been called."""
    inputs, empty = list[Tensor](), list[bool]()
    layers = [model.get_submodule(path.rpartition(".mlp")[0]) for path in experts_modules(model)]
    hooks = [layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for layer in layers]
    hooks += [
        module.register_forward_hook(lambda *_: empty.append(not inputs.pop().numel()))
        for module in experts_modules(model).values()
    ]
    try:
        return model(ids, use_cache=False).logits, empty
    finally:
        for hook in hooks:
            hook.remove()
        gc.collect()


def test_inputs_are_freed_and_results_stay(model: Any) -> None:
    ids, inputs = torch.tensor([[5, 6, 7, 8]]), LayerInputs(model)
    plain, empty = seen(model, ids)
    assert not any(empty)
    with inputs.freed():
        freed, empty = seen(model, ids)
    assert all(empty)
    assert torch.equal(freed, plain)
    again, empty = seen(model, ids)
    assert not any(empty)
    assert torch.equal(again, plain)


def test_a_layer_whose_hook_gets_its_input_keeps_it(model: Any) -> None:
    sizes = list[int]()
    path = next(iter(experts_modules(model))).rpartition(".mlp")[0]
    hook = model.get_submodule(path).register_forward_hook(lambda _, given, __: sizes.append(given[0].numel()))
    try:
        with LayerInputs(model).freed():
            model(torch.tensor([[5, 6, 7, 8]]), use_cache=False)
    finally:
        hook.remove()
    assert sizes == [4 * model.config.hidden_size]
