"""Records that keep weights of experts as a checkpoint stores them: its codes and scales, or its 16 bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from moetier.runtime.formats.tensors import StoredTensor
from moetier.tiers.errors import CheckpointError
from moetier.tiers.layout import ZERO_POINTS, Projection, RecordLayout, Section
from moetier.tiers.quant.codec import layout_for
from moetier.tiers.quant.zero_points import Levels

from .recipe import BlockBlueprint, Expert


def native_layout(block: BlockBlueprint) -> RecordLayout:
    """Return the layout of records that keep a block's weights as the checkpoint stores them.

    Raises ValueError, which says why, if a record can't hold a quantised parameter as it is stored, and CheckpointError
    as ``layout_for`` does.
    """
    plain = layout_for(block.parameters, bits=16, transposed=block.transposed)
    return RecordLayout(tuple(_as_stored(block, p) for p in plain.projections), plain.biases)


def _as_stored(block: BlockBlueprint, plain: Projection) -> Projection:
    """Return the projection of a parameter as it is stored; ``plain`` if it is not quantised."""
    recipe = block.recipes[plain.name]
    if (quantised := next((tensor for tensor in recipe.tensors if not tensor.is_plain), None)) is None:
        return plain
    _, dtype = block.parameters[plain.name]
    projection = quantised.record_projection(dataclasses.replace(plain, dtype=dtype), recipe.by_expert())
    check_shape(block, plain.name)
    return projection


@dataclass(frozen=True, eq=False)
class Kept(Mapping[str, torch.Tensor | Levels]):
    """Parameters of an expert by name, as ``encode`` takes them: Levels for a projection with zero points, else tensor.

    ``layout`` is that of the expert's record.
    """

    expert: Expert
    layout: RecordLayout

    def __getitem__(self, name: str) -> torch.Tensor | Levels:
        p = next((p for p in self.layout.projections if p.name == name and p.pairs in ZERO_POINTS), None)
        if p is None:
            return self.expert[name]
        parts = [tensors[self.expert.index] for tensors in self.expert.block.recipes[name].by_expert()]
        levels = [part.levels(p.group) for part in parts]
        return Levels(*(torch.cat(pieces) for pieces in zip(*levels, strict=True)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.expert)

    def __len__(self) -> int:
        return len(self.expert)


def stored_in(block: BlockBlueprint, section: Section) -> list[list[StoredTensor]]:
    """Return the stored tensors whose bytes, one after the other, fill a section.

    The result has one list for each part of the section, in order; the list has one tensor for each expert. ``section``
    is one of the block's ``native_layout``. Raises ValueError, which says why, if stored bytes can't fill it.
    """
    name, _, component = section.name.partition(".")
    stored = []
    for tensors in block.recipes[name].by_expert():
        members = [tensor.component(component) for tensor in tensors]
        first = members[0]
        if not component and first.dtype != section.dtype and not is_narrowed(first, section):
            raise ValueError(f"{first.name} is in {first.dtype}, and a record holds {section.dtype}")
        stored.append(members)
    sizes = [members[0].nbytes // (2 if is_narrowed(members[0], section) else 1) for members in stored]
    if sum(sizes) != section.nbytes or any(len({member.nbytes for member in members}) != 1 for members in stored):
        raise ValueError(
            f"{stored[0][0].name} and the tensors that belong to it do not have the size of {section.name}"
        )
    return stored


def is_narrowed(stored: StoredTensor, section: Section) -> bool:
    """Return whether a section has bf16 numbers where the checkpoint has fp32: biases, which GGUF files have so."""
    return stored.dtype == "float32" and section.dtype == "bfloat16" and len(section.shape) == 1


def row_bytes_of(block: BlockBlueprint, section: Section) -> int:
    """Return the bytes of a row if rows of two stored tensors alternate in the section, as gate and up of gpt-oss do.

    Return 0 if they follow one another.
    """
    (first, *_) = block.recipes[section.name.partition(".")[0]].tensors
    return section.nbytes // section.shape[0] if first.alternate else 0


def check_shape(block: BlockBlueprint, name: str) -> None:
    """Raise CheckpointError unless a parameter of an expert has the same shape in this checkpoint and in the model."""
    if (shape := parameter_shape(block, name)) != (expected := block.parameters[name][0]):
        raise CheckpointError(
            f"{block.path}: {name} of an expert comes out as {list(shape)} from this checkpoint; the model has "
            f"{list(expected)}.",
            "Check that config.json belongs to these weights.",
        )


def parameter_shape(block: BlockBlueprint, name: str) -> tuple[int, ...]:
    """Return the shape of a parameter of one expert in this checkpoint; () if its tensors do not fit together."""
    shapes = [tensors[0].shape for tensors in block.recipes[name].by_expert()]
    rows, tails = sum(shape[0] for shape in shapes if shape), {shape[1:] for shape in shapes if shape}
    stacked = (rows, *tails.pop()) if len(tails) == 1 and all(shapes) else ()
    (first, *_) = block.recipes[name].tensors
    return stacked[::-1] if first.transposed else stacked
