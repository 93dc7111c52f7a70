"""Plan of a conversion: what is made, and in which order. No weights are needed for a plan.

Linear modules of the trunk are quantised, except where that would do harm or not save memory. Blocks of a hub
checkpoint are made in such an order that few of its files are on the disk at any one time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moetier.runtime.checkpoint.blueprint import Blueprint, make_blueprint, records_of
from moetier.runtime.checkpoint.matrices import standing_alone
from moetier.runtime.checkpoint.native import native_layout
from moetier.runtime.checkpoint.recipe import BlockBlueprint
from moetier.runtime.formats.registry import NEEDS_BITS
from moetier.runtime.formats.tensors import SourceTensor, StoredTensor
from moetier.runtime.moe.linear import matrix_layout
from moetier.tiers.errors import ConfigError, UnsupportedModelError
from moetier.tiers.layout import TRUNK_BITS, ZERO_POINTS, Bits, Projection, RecordLayout
from moetier.tiers.manifest import TRUNK_RECORDS, Manifest, TrunkRecords, method_of
from moetier.tiers.quant.codec import DEFAULTS, layout_for
from moetier.tiers.quant.hqq import SOLVER
from moetier.tiers.store.trunk import RECORD

from .options import DEFAULT_BITS, NATIVE, Options
from .trunk_writer import MatrixRecord, TrunkFile, TrunkTensor, distribute_trunk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AT_ONCE = 2  # files on the disk at any one time: one is downloaded while blocks are made from the other


def layout_of(block: BlockBlueprint, options: Options) -> RecordLayout:
    """Return the layout of a block's records. Raises UnsupportedModelError or CheckpointError."""
    if options.bits != NATIVE:
        how: Any = {"bits": options.bits or DEFAULT_BITS, "group": options.group_size, "pairs": options.pairs}
        return layout_for(block.parameters, **how, transposed=block.transposed)
    try:
        return native_layout(block)
    except ValueError as error:
        raise UnsupportedModelError(f"Experts can't be stored as in this checkpoint: {error}.", NEEDS_BITS) from error


def trunk_records_of(bits: Bits) -> TrunkRecords | None:
    """Return the default format of the trunk's matrices with ``bits`` per weight; None for 16, if none is quantised.

    Raises ConfigError if a trunk can't have that many bits.
    """
    if bits not in TRUNK_BITS:
        raise ConfigError(
            f"A trunk of {bits} bits is not supported.", f"Give --trunk-bits {' or '.join(map(str, TRUNK_BITS))}."
        )
    return None if bits == 16 else TrunkRecords(bits, *DEFAULTS[bits])


def choose_matrices(model: PreTrainedModel, dtype: torch.dtype, trunk_records: TrunkRecords) -> dict[str, RecordLayout]:
    """Choose the linear modules whose weights are quantised. Return the layouts of their records, by module path.

    ``dtype``: the type in which ``model`` will be loaded. Not quantised are the modules that ``standing_alone`` leaves
    out, and those whose weights would not get smaller.
    """
    layouts = {}
    for path, module in standing_alone(model, dtype).items():
        layout = matrix_layout(module.out_features, module.in_features, trunk_records)
        if layout.projections[0].bits != 16 and layout.payload_bytes < 2 * layout.weights:
            layouts[path] = layout
    return layouts


@dataclass(frozen=True)
class ConversionPlan:
    """Plan of a conversion with given bits of the trunk. The bits of experts are chosen later, in ``manifest``."""

    blueprint: Blueprint
    trunk_records: TrunkRecords | None
    tensors: Mapping[str, SourceTensor]  # of the checkpoint

    @classmethod
    def of(
        cls, model: PreTrainedModel, dtype: torch.dtype, tensors: Mapping[str, SourceTensor], trunk_bits: Bits
    ) -> ConversionPlan:
        """Plan the conversion of ``model``, which is on the meta device. Remove all experts of each block but one.

        Blocks whose experts can't be read one by one keep all experts. ``tensors``: the tensors of the checkpoint, of
        any shape, by name. ``dtype``: the type in which the model will be loaded. Raises UnsupportedModelError or
        CheckpointError.
        """
        trunk_records = trunk_records_of(trunk_bits)
        chosen = choose_matrices(model, dtype, trunk_records) if trunk_records else ()
        return cls(make_blueprint(model, dtype, tensors, chosen), trunk_records, tensors)

    def manifest(self, options: Options, *, model: str, digest: str) -> Manifest:
        """Return the manifest of the store. ``model`` and ``digest``: name and digest of the source."""
        blocks, layouts = records_of(self.blueprint, partial(layout_of, options=options))
        return Manifest(
            model=model,
            source_digest=digest,
            blocks=blocks,
            layouts=layouts,
            version=version("moetier"),
            requires=(TRUNK_RECORDS,) if self.trunk_records else (),
            method=method_of("rounding" if options.fast else "hqq", layouts, self.trunk_records),
            solver=SOLVER,
            trunk_records=self.trunk_records,
        )

    @property
    def kept(self) -> list[Projection]:
        """Projections whose weights the checkpoint has quantised, as records can hold them; none if they can't."""
        try:
            layouts = [native_layout(block) for block in self.blueprint.blocks]
        except ValueError:
            return []
        return [p for layout in layouts for p in layout.projections if p.coding or p.pairs in ZERO_POINTS]

    @property
    def has_few_bits(self) -> bool:
        """Whether records can hold weights as the checkpoint has quantised them, and some have fewer than 8 bits."""
        return any(p.bits < 8 for p in self.kept)

    @property
    def has_only_values(self) -> bool:
        """Whether experts are quantised in a way that no record format holds: only `--bits 16` keeps their values."""
        return not self.kept and any(not tensor.is_plain for tensor in self._of_experts)

    @property
    def _of_experts(self) -> list[SourceTensor]:
        recipes = [recipe for block in self.blueprint.blocks for recipe in block.recipes.values()]
        return [tensor for recipe in recipes for tensor in recipe.tensors]

    def with_bits(self, options: Options) -> Options:
        """Return the options. If ``bits`` is None, it is replaced by its default for this checkpoint.

        That is "native" for weights of HQQ, AWQ or GPTQ, and for others that have fewer than 8 bits and can be kept.
        """
        if options.bits is not None:
            return options
        native = self.has_few_bits or any(tensor.is_kept for tensor in self._of_experts)
        return replace(options, bits=NATIVE if native else DEFAULT_BITS)

    def matrices(self, *, workers: int, fast: bool) -> dict[str, MatrixRecord]:
        """Return the quantised matrices of the trunk, by module path. ``MatrixRecord.chunks`` makes the bytes later.

        The parameters are those of MatrixRecord.
        """
        return {
            path: MatrixRecord(path, recipe, self.trunk_records, workers=workers, fast=fast)
            for path, recipe in self.blueprint.matrices.items()
            if self.trunk_records
        }

    def trunk(self, matrices: Mapping[str, MatrixRecord]) -> tuple[TrunkFile, ...]:
        """Return the files of the trunk. ``matrices`` are its quantised matrices, by module path."""
        of_trunk: dict[str, TrunkTensor] = {name: self.tensors[name] for name in self.blueprint.trunk}
        return distribute_trunk(of_trunk | {f"{path}{RECORD}": matrix for path, matrix in matrices.items()})


@dataclass(frozen=True)
class Stage:
    """Blocks that are made from the same files, one after the other."""

    blocks: tuple[int, ...]
    files: frozenset[Path] = frozenset()
    present: frozenset[Path] = frozenset()  # ``files``, and files of earlier stages that later stages need
    ahead: Path | None = None  # file of the next stage to download meanwhile; None if ``present`` has AT_ONCE or more

    @property
    def at_once(self) -> frozenset[Path]:
        """All files that may be on the disk during the stage."""
        return self.present if self.ahead is None else self.present | {self.ahead}


def stages(files: Mapping[int, frozenset[Path]]) -> list[Stage]:
    """Group and order blocks by the files that they are made from, so that few files are on the disk at any one time.

    ``files``: the files that each block is made from, by its number. In a checkpoint, blocks are spread over files in
    the order of their numbers, or of their names ("10" before "2").
    """
    runs: list[tuple[list[int], frozenset[Path]]] = []
    for block in sorted(files, key=lambda block: (max(files[block]), min(files[block]), block)):
        if runs and files[block] == runs[-1][1]:
            runs[-1][0].append(block)
        else:
            runs.append(([block], files[block]))
    files_in_order = [run[1] for run in runs]
    none = frozenset[Path]()
    in_order = []
    for place, (blocks, needed) in enumerate(runs):
        present = none.union(*files_in_order[: place + 1]) & none.union(*files_in_order[place:])
        lacking = none.union(*files_in_order[place + 1 : place + 2]) - present
        ahead = min(lacking, default=None) if len(present) < AT_ONCE else None
        in_order.append(Stage(tuple(blocks), needed, present, ahead))
    return in_order


def most_bytes(planned: ConversionPlan, tensors: Iterable[StoredTensor]) -> int:
    """Estimate the most bytes of a hub checkpoint on the disk at any one time: its files, and the trunk's tensors.

    ``tensors``: all tensors of the checkpoint, of any shape.
    """
    sizes = Counter[Path]()
    for tensor in tensors:
        sizes[tensor.file] += tensor.nbytes
    in_order = stages(dict(enumerate(block.files for block in planned.blueprint.blocks)))
    parts = {part for file in planned.trunk({}) for tensor in file.tensors.values() for part in tensor.parts}
    parts |= {part for recipe in planned.blueprint.matrices.values() for part in recipe.parts}
    return max(sum(sizes[path] for path in stage.at_once) for stage in in_order) + sum(part.nbytes for part in parts)
