"""Records of experts in the form in which a checkpoint stores their weights: its codes and scales, or 16 bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from moetier.runtime.formats.gguf import GgufExperts
from moetier.runtime.formats.grouped import Grouped
from moetier.runtime.formats.scaled import Packed
from moetier.runtime.formats.tensors import SourceTensor, StoredTensor
from moetier.tiers.errors import CheckpointError
from moetier.tiers.layout import CODING_GROUPS, ZERO_POINTS, Projection, RecordLayout, Section
from moetier.tiers.quant.codec import layout_for
from moetier.tiers.quant.zero_points import Levels

from .recipe import BlockBlueprint, Expert


def native_layout(block: BlockBlueprint) -> RecordLayout:
    """Return the layout of a block's records in the checkpoint's own form.

    Raises ValueError, which says why, if a record can't hold a quantised parameter as it is stored, and CheckpointError
    as ``layout_for`` does.
    """
    plain = layout_for(block.parameters, bits=16, transposed=block.transposed)
    return RecordLayout(tuple(_coded(block, p) for p in plain.projections), plain.biases)


def _coded(block: BlockBlueprint, plain: Projection) -> Projection:
    made_from = [each for tensors in block.recipes[plain.name].sources.values() for each in tensors]
    if all(isinstance(each, StoredTensor) for each in made_from):
        return plain
    if isinstance(made_from[0], GgufExperts):
        return made_from[0].projection(plain)
    parts = block.recipes[plain.name].by_expert()
    if any(isinstance(each, Grouped) for each in made_from):
        return _with_zero_points(block, plain, [each for tensors in parts for each in tensors])
    forms = {each.projection if isinstance(each, Packed) else None for tensors in parts for each in tensors}
    first, one = parts[0][0], forms.pop()
    if forms or one is None:
        raise ValueError(f"{plain.name} of {block.path} is quantised in several forms, or in one without a kernel")
    if one.transposed != plain.transposed:
        raise ValueError(f"{plain.name} of {block.path} is stored in another order than the model has")
    if one.bits == 4 and one.group not in CODING_GROUPS:
        raise ValueError(f"{first.parts[0].name} has a scale for each {one.group} weights, not 16, 32, 64 or 128")
    apart = bool(one.globals) or one.rows % one.block_rows != 0  # else parts have one grid of scales
    return dataclasses.replace(
        one, name=plain.name, rows=one.rows * len(parts), parts=len(parts) if apart else 1, dtype=_dtype(block, plain)
    )


def _with_zero_points(block: BlockBlueprint, plain: Projection, members: list[SourceTensor]) -> Projection:
    """Return the projection for matrices of HQQ, AWQ or GPTQ, which may differ in their bits and group sizes.

    It has the most bits and the smallest groups of all. Raises ValueError or CheckpointError as ``native_layout``.
    """
    grouped = [each for each in members if isinstance(each, Grouped)]
    first, kinds = grouped[0], {each.kind for each in grouped}
    if len(grouped) != len(members) or len(kinds) != 1 or plain.transposed:
        raise ValueError(f"{plain.name} of {block.path} is stored in several forms, such as {first.name}")
    check_shape(block, plain.name)
    group = min(each.group for each in grouped)
    if not group:
        which = next(each for each in grouped if not each.group)
        raise ValueError(
            f"{which.name} has groups that no record can have ({which.groups_as_text}): a record has a scale for "
            "neighbouring weights of a row"
        )
    first.probe(group)
    return dataclasses.replace(
        plain,
        bits=max(each.bits for each in grouped),
        dtype=_dtype(block, plain),
        group=group,
        pairs=f"{kinds.pop()}_zeros",
    )


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
        levels = [part.levels(p.group) for part in parts if isinstance(part, Grouped)]
        return Levels(*(torch.cat(each) for each in zip(*levels, strict=True)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.expert)

    def __len__(self) -> int:
        return len(self.expert)


def _dtype(block: BlockBlueprint, plain: Projection) -> str:
    return block.parameters[plain.name][1]


def stored_in(block: BlockBlueprint, section: Section) -> list[list[StoredTensor]]:
    """Return the stored tensors whose bytes, one after the other, fill a section.

    The result has one list for each part of the section, in order; the list has one tensor for each expert. ``section``
    is one of the block's ``native_layout``. Raises ValueError, which says why, if stored bytes can't fill it.
    """
    name, _, component = section.name.partition(".")
    found = []
    for tensors in block.recipes[name].by_expert():
        if isinstance(tensors[0], Grouped):
            raise ValueError(f"{tensors[0].name} is packed in another way than a record")
        members = [each.components[component] if isinstance(each, Packed) else each.parts[0] for each in tensors]
        if not component and members[0].dtype != section.dtype and not is_narrowed(members[0], section):
            first = members[0]
            raise ValueError(f"{first.name} is in {first.dtype}, and a record holds {section.dtype}")
        found.append(members)
    sizes = [members[0].nbytes // (2 if is_narrowed(members[0], section) else 1) for members in found]
    if sum(sizes) != section.nbytes or any(len({each.nbytes for each in members}) != 1 for members in found):
        raise ValueError(f"{found[0][0].name} and the tensors that belong to it do not have the size of {section.name}")
    return found


def is_narrowed(stored: StoredTensor, section: Section) -> bool:
    """Return whether a section has bf16 numbers where the checkpoint has fp32: biases, which GGUF files have so."""
    return stored.dtype == "float32" and section.dtype == "bfloat16" and len(section.shape) == 1


def row_bytes_of(block: BlockBlueprint, section: Section) -> int:
    """Return the bytes of a row if rows of two stored tensors alternate in the section, as gate and up of gpt-oss do.

    Return 0 if they follow one another.
    """
    source = _source(block, section.name.partition(".")[0])
    return section.nbytes // section.shape[0] if isinstance(source, GgufExperts) and source.alternate else 0


def _source(block: BlockBlueprint, name: str) -> SourceTensor:
    """Return the first tensor that a parameter is made from."""
    (source, *_), *_ = block.recipes[name].sources.values()
    return source


def check_shape(block: BlockBlueprint, name: str) -> None:
    """Raise CheckpointError unless a parameter of an expert has the same shape in this checkpoint and in the model."""
    if (found := made_shape(block, name)) != (wanted := block.parameters[name][0]):
        raise CheckpointError(
            f"{block.path}: {name} of an expert comes out as {list(found)} from this checkpoint; the model has "
            f"{list(wanted)}.",
            "Check that config.json belongs to these weights.",
        )


def made_shape(block: BlockBlueprint, name: str) -> tuple[int, ...]:
    """Return the shape of a parameter of one expert in this checkpoint; () if its tensors do not fit together."""
    shapes = [tensors[0].shape for tensors in block.recipes[name].by_expert()]
    rows, tails = sum(shape[0] for shape in shapes if shape), {shape[1:] for shape in shapes if shape}
    made = (rows, *tails.pop()) if len(tails) == 1 and all(shapes) else ()
    source = _source(block, name)
    return made[::-1] if isinstance(source, GgufExperts) and source.transposed else made
