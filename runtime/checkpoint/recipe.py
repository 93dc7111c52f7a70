"""Recipes: how parameters of an Experts module are made from a checkpoint's tensors, one expert at a time or whole.

Matrices of the trunk that become records are made in the same way, a few rows at a time or whole.

If transformers' operations treat each expert by itself (merging, stacking, transposing), they are run on the tensors of
one expert. The Experts module on the meta device is then cut down to one expert, because the operations look up the
result's shape there.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import core_model_loading as loading

from moetier.runtime.formats.tensors import SourceTensor, StoredTensor
from moetier.tiers.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Recipe:
    """Recipe of one parameter: tensors of the checkpoint, and transformers' operations on them.

    ``sources`` is a dictionary from the patterns of transformers' conversion to the tensors that match them.
    """

    model: PreTrainedModel  # on the meta device; operations look up the shape and type of their result there
    key: str  # transformers' name of the result, or of the first of several results
    parameter: str  # the parameter's full name
    dtype: torch.dtype
    experts: int
    converter: loading.WeightConverter | None
    sources: Mapping[str, list[SourceTensor]]

    @property
    def is_separable(self) -> bool:
        """Whether the parameter can be made for one expert at a time, from rows of its sources."""
        operations = self.converter.operations if self.converter else []
        return all(map(_keeps_experts_apart, operations)) and all(
            len(tensors) == self.experts or (len(tensors) == 1 and tensors[0].shape[:1] == (self.experts,))
            for tensors in self.sources.values()
        )

    @property
    def is_direct(self) -> bool:
        """Whether the parameter is one unchanged tensor of the checkpoint, whose rows can be read a few at a time."""
        return self.converter is None and len(self.tensors) == 1 and self.tensors[0].reads_rows

    @property
    def tensors(self) -> list[SourceTensor]:
        """Source tensors that the parameter is made from."""
        return [tensor for tensors in self.sources.values() for tensor in tensors]

    @property
    def parts(self) -> Iterator[StoredTensor]:
        """Stored tensors that the parameter is made from."""
        return (part for tensor in self.tensors for part in tensor.parts)

    def by_expert(self) -> list[list[SourceTensor]]:
        """Return the tensors whose rows, one below the other, make the parameter of each expert.

        The result has one list for each run of rows, in order. The list has one tensor for each expert, all of one
        shape and type. Nothing is read. Raises ValueError, which says why, if the parameter is not made of unchanged
        rows.
        """
        operations = self.converter.operations if self.converter else []
        for operation in operations:
            if not _keeps_rows(operation):
                raise ValueError(f"transformers changes {self.parameter} on loading ({operation})")
        merged = any(isinstance(operation, loading.MergeModulelist) for operation in operations)
        patterns = self.converter.source_patterns if self.converter else self.sources
        runs: list[list[SourceTensor]] = []
        for tensors in (self.sources[pattern] for pattern in patterns if pattern in self.sources):
            if not merged and len(tensors) == 1 and (divided := tensors[0].by_expert(self.experts)):
                runs += divided
            elif (
                merged
                and len(tensors) == self.experts
                and len({(tensor.shape, tensor.dtype) for tensor in tensors}) == 1
            ):
                runs.append(tensors)
            else:
                raise ValueError(
                    f"{self.parameter} is made of tensors that are not alike, such as {tensors[0].stored_name}"
                )
        return runs

    def rows(self, first: int, count: int) -> torch.Tensor:
        """Read ``count`` rows of a parameter that is ``is_direct``, from row ``first`` on, as [count, columns]."""
        ((tensor,),) = self.sources.values()
        self._check_shape(tensor.shape)
        return tensor.read(first, count).to(self.dtype)

    def make(self, expert: int | None, merging: threading.Lock | None = None) -> torch.Tensor:
        """Return the slice of one expert, or, with None, the whole parameter [experts, ...].

        ``merging`` is held while what was read is merged, which takes a second copy of it.
        """
        read = {pattern: self._read(tensors, expert) for pattern, tensors in self.sources.items()}
        with merging or nullcontext():
            parameter = self._convert(read)
        self._check_shape(parameter.shape)
        return (parameter if expert is None else parameter[0]).detach()

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        expected = self.model.get_parameter(self.parameter).shape
        if shape != expected:
            raise CheckpointError(
                f"{self.parameter} has the shape {list(shape)} in this checkpoint, but {list(expected)} in the model.",
                "Check that config.json belongs to these weights.",
            )

    def _read(self, tensors: list[SourceTensor], expert: int | None) -> list[torch.Tensor]:
        if expert is None or len(tensors) == self.experts == 1:
            read = [tensor.read() for tensor in tensors]
        elif len(tensors) == self.experts:
            read = [tensors[expert].read()]
        else:
            read = [tensors[0].read(expert, 1)]
        return [tensor.to(self.dtype) if tensor.is_floating_point() else tensor for tensor in read]

    def _convert(self, read: dict[str, list[torch.Tensor]]) -> torch.Tensor:
        """Return the result of the operations on the tensors ``read``.

        This empties ``read``, so that no tensor stays in memory longer than needed.
        """
        if self.converter is None:
            (tensors,) = read.values()
            return tensors[0]
        converter: Any = deepcopy(self.converter)
        converter.collected_tensors.update(read)
        read.clear()
        try:
            converted = converter.convert(self.key, model=self.model, config=self.model.config)[self.parameter]
        except (ValueError, RuntimeError, KeyError) as error:
            raise CheckpointError(
                f"{self.parameter} can't be made from this checkpoint ({error}).",
                "Check that config.json belongs to these weights.",
            ) from error
        tensor: torch.Tensor = converted[0] if isinstance(converted, list) else converted
        return tensor.to(self.dtype)


def _keeps_experts_apart(operation: loading.ConversionOps) -> bool:
    """Return whether an operation handles each expert by itself, and puts the experts into dimension 0 of its result.

    Only then can a parameter [experts, ...] be made for one expert at a time. False for an unknown operation.
    """
    match operation:
        case loading.MergeModulelist():
            return operation.dim == 0
        case loading.Concatenate() | loading.Interleave():
            return operation.dim > 0
        case loading.Transpose():
            return operation.dim0 > 0 and operation.dim1 > 0
        case _:
            return False


def _keeps_rows(operation: loading.ConversionOps) -> bool:
    """Return whether an operation keeps each row of an expert's weights, and puts them one after the other."""
    match operation:
        case loading.MergeModulelist():
            return operation.dim == 0
        case loading.Concatenate():
            return operation.dim == 1
        case _:
            return False


@dataclass(frozen=True)
class BlockBlueprint:
    """Recipes for the experts of one Experts module.

    ``parameters`` is a dictionary from the parameters' names, in module order, to pairs: the shape of one expert's
    slice, and torch's name of its type.
    """

    path: str
    experts: int
    top_k: int
    transposed: bool
    parameters: Mapping[str, tuple[tuple[int, ...], str]]
    recipes: Mapping[str, Recipe]

    @property
    def is_separable(self) -> bool:
        """Whether its experts can be made one at a time; otherwise the block is read whole, once."""
        return all(recipe.is_separable for recipe in self.recipes.values())

    @property
    def files(self) -> frozenset[Path]:
        """Files of the checkpoint that the block's experts are made from."""
        return frozenset(part.file for recipe in self.recipes.values() for part in recipe.parts)


class Merging:
    """Makes experts' slices of parameters, for several threads, and keeps parameters that have to be made whole.

    Merging needs a second copy in memory, so one thread at a time does it.
    """

    def __init__(self) -> None:
        # guards: ``_whole``; ``release`` does not take it. Held while a parameter is merged
        self._merging = threading.Lock()
        self._whole: dict[str, torch.Tensor] = {}  # by the parameter's name in the model

    def make(self, recipe: Recipe, expert: int) -> torch.Tensor:
        """Return one expert's slice of a parameter: [rows, columns], or [size] for a bias."""
        if recipe.is_separable:
            return recipe.make(expert, self._merging)
        with self._merging:
            if recipe.parameter not in self._whole:
                self._whole[recipe.parameter] = recipe.make(None)
            return self._whole[recipe.parameter][expert]

    def release(self) -> None:
        """Release the parameters that were made whole."""
        self._whole.clear()


@dataclass(frozen=True, eq=False)
class Expert(Mapping[str, torch.Tensor]):
    """Dictionary from the parameters of one expert to their weights. A look-up makes the weights anew.

    Weights are [rows, columns], or [columns, rows] if the block is transposed; a bias is [size]. A look-up raises
    CheckpointError if some are not finite numbers.
    """

    block: BlockBlueprint
    index: int
    merging: Merging

    def __getitem__(self, name: str) -> torch.Tensor:
        parameter = self.merging.make(self.block.recipes[name], self.index)
        if not all(map(math.isfinite, torch.stack(parameter.aminmax()).tolist())):
            raise CheckpointError(
                f"{self.block.path} expert {self.index}: {name} has weights that are not finite numbers.",
                "Get an intact copy of the checkpoint.",
            )
        return parameter

    def __iter__(self) -> Iterator[str]:
        return iter(self.block.parameters)

    def __len__(self) -> int:
        return len(self.block.parameters)
