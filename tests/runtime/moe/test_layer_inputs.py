"""Inputs of decoder layers are freed once their experts are called, unless a hook gets them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from threads import Task
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import moetier
from moetier.runtime.moe.experts import experts_modules
from moetier.runtime.moe.gates import Observer
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
    note = Observer(inputs.append, lambda _, given: (given[0],))
    look = Observer(lambda: empty.append(not inputs.pop().numel()), lambda *_: ())
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    hooks += [module.register_forward_hook(look) for module in experts_modules(model).values()]
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


@pytest.mark.parametrize(
    "path", ["model.embed_tokens", "model.layers.0", "model.layers.0.input_layernorm", "model.layers.1", "all"]
)
@pytest.mark.parametrize("is_before", [False, True])
def test_what_a_hook_gets_stays(model: Any, path: str, is_before: bool) -> None:
    """The output of a module may be the same object as the input of the next layer."""
    kept = list[Tensor]()

    def keep(_: Any, *given: Any) -> None:
        kept.extend(
            part
            for part in (tensor for one in given for tensor in (one if isinstance(one, tuple) else [one]))
            if isinstance(part, Tensor)
        )

    if path == "all":
        register = register_module_forward_pre_hook if is_before else register_module_forward_hook
        hook = register(keep)
    else:
        module = model.get_submodule(path)
        hook = (module.register_forward_pre_hook if is_before else module.register_forward_hook)(keep)
    try:
        with LayerInputs(model).freed():
            model(torch.tensor([[5, 6, 7, 8]]), use_cache=False)
    finally:
        hook.remove()
    assert all(tensor.numel() for tensor in kept)
    assert kept


def test_layers_without_such_hooks_are_freed_though_others_have_some(model: Any) -> None:
    hook = model.get_submodule("model.layers.0").register_forward_hook(lambda *_: None)
    try:
        with LayerInputs(model).freed():
            _, empty = seen(model, torch.tensor([[5, 6, 7, 8]]))
    finally:
        hook.remove()
    assert empty == [False, False, *[True] * (len(empty) - 2)]


def test_inputs_of_other_threads_stay(model: Any) -> None:
    ids, inputs = torch.tensor([[5, 6, 7, 8]]), LayerInputs(model)
    with inputs.freed():
        _, empty = Task(lambda: seen(model, ids)).result()
    assert not any(empty)
