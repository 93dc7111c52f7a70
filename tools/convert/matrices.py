"""Matrices of the trunk that are quantised: which ones are, and how each becomes a record.

All linear modules are but those that this would harm or not help. A record is made when it is written, in pieces of
rows, by workers.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from moetier.runtime.checkpoint.blueprint import loaded_dtype
from moetier.runtime.checkpoint.recipe import Recipe
from moetier.runtime.checkpoint.safetensors import CHUNK_BYTES, Bytes, StoredTensor
from moetier.runtime.moe.experts import experts_modules
from moetier.runtime.moe.gates import GATE_NAMES
from moetier.runtime.moe.linear import WEIGHT, matrix_layout
from moetier.tiers.errors import CheckpointError, ConfigError
from moetier.tiers.layout import ROW_TILE, TRUNK_BITS, Bits, RecordLayout
from moetier.tiers.manifest import TrunkRecords
from moetier.tiers.quant.codec import DEFAULTS, WeightError, encode, sections

from .encoder import one_thread_each

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
    """Return the default form of a width, or None where the trunk stays as it is.

    Raises ConfigError for other widths.
    """
    if bits not in TRUNK_BITS:
        raise ConfigError(
            f"A trunk of {bits} bits is not supported.", f"Choose among {', '.join(map(str, TRUNK_BITS))}."
        )
    return None if bits == 16 else TrunkRecords(bits, *DEFAULTS[bits])


@dataclass(frozen=True)
class Matrices:
    """Linear modules of the trunk by path: the layout of each that is chosen, and why each other is not."""

    chosen: dict[str, RecordLayout] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel, dtype: torch.dtype, form: TrunkRecords) -> Matrices:
        """Choose the matrices of a ``model`` that is loaded in ``dtype``."""
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
        """Return the same without those that the checkpoint can't give."""
        left = {path: layout for path, layout in self.chosen.items() if path in able}
        return Matrices(left, self.kept | {path: MIXED for path in self.chosen if path not in able})

    def reasons(self) -> Iterator[str]:
        """Yield a line for each reason, with the first of its modules."""
        for reason in dict.fromkeys(self.kept.values()):
            paths = [path for path, why in self.kept.items() if why == reason]
            yield f"{len(paths)} {reason}: {paths[0]}" + (", ..." if len(paths) > 1 else "")


def _within(path: str, places: list[str]) -> bool:
    return any(path == place or path.startswith(f"{place}.") for place in places)


def _gates(model: PreTrainedModel) -> list[str]:
    """Return the routers beside Experts modules."""
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
    """Return names of children whose ``weight`` the classes around a module read, as fused kernels do."""
    parts = path.split(".")
    around = [type(model.get_submodule(".".join(parts[:depth]))) for depth in range(len(parts))]
    return {name for made_by in around for base in made_by.__mro__ for name in _names_read(base)}


@cache
def _names_read(made_by: type) -> frozenset[str]:
    if not made_by.__module__.startswith("transformers.models."):
        return frozenset()
    return frozenset(re.findall(r"\bself(?:\.\w+)*\.(\w+)\.weight\b", inspect.getsource(made_by)))


PIECE_WEIGHTS = 1 << 20  # quantised at a time by a worker


class MatrixRecord:
    """Record of one matrix, as a tensor of the trunk. ``error`` is known once it was made."""

    dtype = "uint8"

    def __init__(self, path: str, recipe: Recipe, form: TrunkRecords, *, workers: int, fast: bool) -> None:
        rows, columns = recipe.model.get_parameter(recipe.target).shape
        self.layout: RecordLayout = matrix_layout(rows, columns, form)
        self.error = WeightError()
        self._path = path
        self._recipe = recipe
        self._form = form
        self._workers = workers
        self._fast = fast

    @property
    def shape(self) -> tuple[int]:
        """Shape of the record: its bytes."""
        return (self.layout.payload_bytes,)

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """Stored tensors that the matrix [rows, columns] is made from."""
        return tuple(self._recipe.parts)

    @property
    def peak_bytes(self) -> int:
        """About what making it takes: the record, the matrix where it is read whole, and what each worker holds."""
        (p,) = self.layout.projections
        whole = 0 if self._recipe.direct else 2 * p.rows * p.columns * self._recipe.dtype.itemsize
        return self.layout.payload_bytes + whole + self._workers * 16 * max(PIECE_WEIGHTS, ROW_TILE * p.columns)

    def chunks(self) -> Iterator[Bytes]:
        """Make the record anew, and yield its bytes in order."""
        record = self._made().numpy()
        for start in range(0, len(record), CHUNK_BYTES):
            yield record[start : start + CHUNK_BYTES]

    def _made(self) -> torch.Tensor:
        (p,) = self.layout.projections
        record = torch.zeros(self.layout.payload_bytes, dtype=torch.uint8)
        whole = None if self._recipe.direct else self._recipe.make(None)
        step = max(1, PIECE_WEIGHTS // p.columns // ROW_TILE) * ROW_TILE

        def fill(start: int) -> WeightError:
            count = min(step, p.rows - start)
            weights = self._recipe.rows(start, count) if whole is None else whole[start : start + count]
            return self._fill(sections(record, self.layout), weights, start)

        self.error = WeightError()
        with (
            one_thread_each(),
            ThreadPoolExecutor(self._workers, "convert", lambda: torch.set_num_threads(1)) as pool,
        ):
            try:
                for error in pool.map(fill, range(0, p.rows, step)):
                    self.error += error
            finally:
                pool.shutdown(cancel_futures=True)
        return record

    def _fill(self, views: dict[str, torch.Tensor], weights: torch.Tensor, start: int) -> WeightError:
        """Quantise rows from ``start`` on, and put them in their places; groups don't reach over rows."""
        if not all(map(math.isfinite, torch.stack(weights.aminmax()).tolist())):
            raise CheckpointError(
                f"{self._path}.weight has weights that are not finite numbers.", "Get an intact copy of the checkpoint."
            )
        layout = matrix_layout(len(weights), weights.shape[1], self._form)
        piece = np.empty(layout.record_bytes, np.uint8)
        (error,) = encode({WEIGHT: weights}, layout, piece, fast=self._fast).values()
        (p,) = layout.projections
        rows = slice(start, start + p.padded_rows)
        for name, values in sections(torch.from_numpy(piece), layout).items():
            if name == f"{WEIGHT}.pairs":
                views[name][:, rows] = values  # [K / g, N, 2]
            else:
                views[name][rows] = values  # codes, [N, K / 2]
        return error
