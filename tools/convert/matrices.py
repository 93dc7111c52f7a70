"""Which of the trunk's matrices are quantised: of its linear modules, all but what this would harm or not help."""

from __future__ import annotations

import inspect
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import nn

from moetier.runtime.checkpoint.blueprint import loaded_dtype
from moetier.runtime.moe.experts import experts_modules
from moetier.runtime.moe.gates import GATE_NAMES
from moetier.runtime.moe.linear import matrix_layout
from moetier.tiers.errors import ConfigError
from moetier.tiers.layout import TRUNK_BITS, Bits, RecordLayout
from moetier.tiers.manifest import TrunkRecords
from moetier.tiers.quant.codec import DEFAULTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GATE = "gates"
TOWER = "in parts without experts, such as towers of images and sound"
READ = "whose weights the architecture reads itself"
FLOAT = "which the architecture keeps in another type"
SHARED = "which share their weights with others"
SMALL = "which would not get smaller"
MIXED = "which the checkpoint keeps in a form of its own"


def trunk_form(bits: Bits) -> TrunkRecords | None:
    """The default of a width; None where the trunk stays as it is. Raises ConfigError for other widths."""
    if bits not in TRUNK_BITS:
        raise ConfigError(
            f"A trunk of {bits} bits is not supported.", f"Choose among {', '.join(map(str, TRUNK_BITS))}."
        )
    return None if bits == 16 else TrunkRecords(bits, *DEFAULTS[bits])


@dataclass(frozen=True)
class Matrices:
    """By module path: the layout of each that is chosen, and why others of the linear modules are not."""

    chosen: dict[str, RecordLayout] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel, dtype: torch.dtype, form: TrunkRecords) -> Matrices:
        """``dtype`` is the type that the model is loaded in."""
        found = cls()
        gates, towers = _gates(model), _towers(model)
        for path, module in model.named_modules():
            if type(module) is not nn.Linear:  # a class of its own may do more than multiply
                continue
            name, weight = path.rpartition(".")[2], f"{path}.weight"
            layout = matrix_layout(module.out_features, module.in_features, form)
            if _within(path, gates):
                found.kept[path] = GATE
            elif _within(path, towers):
                found.kept[path] = TOWER
            elif name in _read_by(model, path):
                found.kept[path] = READ
            elif loaded_dtype(model, weight, module.weight.dtype, dtype) != dtype:
                found.kept[path] = FLOAT
            elif not _stands_alone(model, weight):
                found.kept[path] = SHARED
            elif layout.projections[0].bits == 16 or layout.payload_bytes >= 2 * layout.weights:
                found.kept[path] = SMALL
            else:
                found.chosen[path] = layout
        return found

    def only(self, able: Container[str]) -> Matrices:
        """The same without those that the checkpoint can't give."""
        left = {path: layout for path, layout in self.chosen.items() if path in able}
        return Matrices(left, self.kept | {path: MIXED for path in self.chosen if path not in able})

    def reasons(self) -> Iterator[str]:
        """A line for each, with the first of its modules."""
        for reason in dict.fromkeys(self.kept.values()):
            paths = [path for path, why in self.kept.items() if why == reason]
            yield f"{len(paths)} {reason}: {paths[0]}" + (", ..." if len(paths) > 1 else "")


def _within(path: str, places: list[str]) -> bool:
    return any(path == place or path.startswith(f"{place}.") for place in places)


def _gates(model: PreTrainedModel) -> list[str]:
    """The siblings of Experts modules by which tokens are sent."""
    parents = [path.rpartition(".")[0] for path in experts_modules(model)]
    return [f"{parent}.{name}".removeprefix(".") for parent in parents for name in GATE_NAMES]


def _towers(model: PreTrainedModel) -> list[str]:
    from transformers import PreTrainedModel

    experts = list(experts_modules(model))
    parts = [path for path, module in model.named_modules() if path and isinstance(module, PreTrainedModel)]
    return [part for part in parts if not any(_within(path, [part]) for path in experts)]


def _stands_alone(model: PreTrainedModel, weight: str) -> bool:
    """Whether no other module has the same weights, but for the embedding that a head is tied to."""
    tied = model.all_tied_weights_keys
    if weight in tied.values():
        return False
    source = tied.get(weight)
    return source is None or isinstance(model.get_submodule(source.rpartition(".")[0]), nn.Embedding)


def _read_by(model: PreTrainedModel, path: str) -> set[str]:
    """Names of children whose ``weight`` the classes around a module read: fused kernels take it, for instance."""
    parts = path.split(".")
    around = [type(model.get_submodule(".".join(parts[:depth]))) for depth in range(len(parts))]
    return {name for made_by in around for base in made_by.__mro__ for name in _names_read(base)}


@cache
def _names_read(made_by: type) -> frozenset[str]:
    if not made_by.__module__.startswith("transformers.models."):
        return frozenset()
    return frozenset(re.findall(r"\bself(?:\.\w+)*\.(\w+)\.weight\b", inspect.getsource(made_by)))
