"""Linear modules of a trunk whose weights may be records instead of tensors, because no other code reads them."""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import nn

from moetier.runtime.moe.experts import experts_modules
from moetier.runtime.moe.gates import GATE_NAMES

from .blueprint import loaded_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def standing_alone(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, nn.Linear]:
    """Return the linear modules, by path, whose weights are used for nothing but matrix products.

    ``dtype``: the type in which ``model`` will be loaded. Left out are gates; parts without experts, such as
    encoders of images and sound; and weights that the architecture's code reads directly, keeps in another type or
    shares between modules.
    """
    apart = _gates(model) + _towers(model)
    linears = {}
    for path, module in model.named_modules():
        if type(module) is not nn.Linear or _within(path, apart):  # a subclass may do more than multiply
            continue
        weight = f"{path}.weight"
        if (
            not is_read_by_others(model, path)
            and loaded_dtype(model, weight, module.weight.dtype, dtype) == dtype
            and _stands_alone(model, weight)
        ):
            linears[path] = module
    return linears


def _within(path: str, places: list[str]) -> bool:
    return any(path == place or path.startswith(f"{place}.") for place in places)


def _gates(model: PreTrainedModel) -> list[str]:
    """Return the module paths that a router beside an Experts module may have."""
    parents = [path.rpartition(".")[0] for path in experts_modules(model)]
    return [f"{parent}.{name}".removeprefix(".") for parent in parents for name in GATE_NAMES]


def _towers(model: PreTrainedModel) -> list[str]:
    from transformers import PreTrainedModel

    experts = list(experts_modules(model))
    parts = [path for path, module in model.named_modules() if path and isinstance(module, PreTrainedModel)]
    return [part for part in parts if not any(_within(path, [part]) for path in experts)]


def _stands_alone(model: PreTrainedModel, weight: str) -> bool:
    """Return whether no other module shares the parameter ``weight``. A head may share that of its embedding."""
    tied = model.all_tied_weights_keys
    if weight in tied.values():
        return False
    source = tied.get(weight)
    return source is None or isinstance(model.get_submodule(source.rpartition(".")[0]), nn.Embedding)


def is_read_by_others(model: PreTrainedModel, path: str) -> bool:
    """Return whether a class that contains the module at ``path`` reads its weights instead of calling it."""
    return path.rpartition(".")[2] in _read_by(model, path)


def _read_by(model: PreTrainedModel, path: str) -> set[str]:
    """Return the names of modules whose ``weight`` is read by a class around the module at ``path``.

    Such a class, with fused kernels for example, reads the weights instead of calling the module.
    """
    parts = path.split(".")
    around = [type(model.get_submodule(".".join(parts[:depth]))) for depth in range(len(parts))]
    return {name for made_by in around for base in made_by.__mro__ for name in _names_read(base)}


@cache
def _names_read(made_by: type) -> frozenset[str]:
    if not made_by.__module__.startswith("transformers.models."):
        return frozenset()
    return frozenset(re.findall(r"\bself(?:\.\w+)*\.(\w+)\.weight\b", inspect.getsource(made_by)))
