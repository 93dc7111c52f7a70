"""A model with tiers, or a part of it, can't be copied or pickled, which is said plainly."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch

import moetier
from moetier.tiers.errors import MoetierError


@pytest.fixture(scope="module")
def model(tinymix_4bit: Path) -> Iterator[Any]:
    loaded, _ = moetier.load(tinymix_4bit)
    with loaded.tiers:
        yield loaded


WAYS: dict[str, Callable[[Any], object]] = {
    "copy.deepcopy": copy.deepcopy,
    "copy.copy": copy.copy,  # its tiers would close with the original
    "pickle.dumps": pickle.dumps,
    "torch.save": lambda model: torch.save(model, io.BytesIO()),
    "a spawned process": ForkingPickler.dumps,
    "its tiers": lambda model: copy.deepcopy(model.tiers),
    "a layer": lambda model: copy.deepcopy(model.model.layers[1]),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_copy_is_refused(model: Any, way: Callable[[Any], object]) -> None:
    ids = torch.arange(3, 9)[None]
    with torch.inference_mode():
        before = model(ids).logits
        with pytest.raises(MoetierError, match="can't be copied or pickled") as caught:
            way(model)
        assert "Load the model again" in caught.value.fix
        assert torch.equal(model(ids).logits, before), "it works as before"
