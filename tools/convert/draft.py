"""What a conversion is to write: planned from a model on meta and the checkpoint's names, shapes and types alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from moetier.runtime.checkpoint.blueprint import Blueprint, make_blueprint
from moetier.runtime.checkpoint.dequantize import SourceTensor
from moetier.runtime.config import OPTIONS
from moetier.tiers.errors import ConfigError
from moetier.tiers.layout import Bits, RecordLayout
from moetier.tiers.manifest import TRUNK_RECORDS, Block, Manifest, TrunkRecords
from moetier.tiers.quant.codec import group_and_pairs, layout_for
from moetier.tiers.store.trunk import RECORD

from .matrices import Matrices, MatrixRecord, trunk_form
from .trunk import TrunkFile, TrunkTensor, plan_trunk

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Options:
    """How experts are stored, and by how many workers; None is the default of the width, or of the machine.

    Raises ConfigError for what no model can be stored with.
    """

    bits: Bits = 4
    trunk_bits: Bits = 16  # of the trunk's matrices
    group_size: int | None = None
    pairs: str | None = None
    fast: bool = False  # plain rounding in place of HQQ
    workers: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        OPTIONS["threads"].read("threads", self.threads)
        trunk_form(self.trunk_bits)
        fast = self.fast and self.trunk_bits == 16
        if self.bits == 16 and (self.group_size is not None or self.pairs is not None or fast):
            raise ConfigError(
                "With 16 bits nothing is rounded: groups, pairs and plain rounding say nothing.",
                "Leave out --group-size, --pairs and --fast, or choose fewer --bits.",
            )
        group_and_pairs(self.bits, self.group_size, self.pairs)


@dataclass(frozen=True)
class Draft:
    """Layout of a conversion for one width of the trunk; ``manifest`` chooses the experts' width."""

    blueprint: Blueprint
    matrices: Matrices  # of the trunk that are quantised
    form: TrunkRecords | None
    tensors: Mapping[str, SourceTensor]  # of the checkpoint

    @classmethod
    def of(
        cls, model: PreTrainedModel, dtype: torch.dtype, tensors: Mapping[str, SourceTensor], trunk_bits: Bits
    ) -> Draft:
        """Lay out the conversion of a ``model`` on meta, and cut down its Experts modules.

        ``tensors``: of the checkpoint by name, of any shape [rows, ...].
        Raises UnsupportedModelError or CheckpointError.
        """
        form = trunk_form(trunk_bits)
        matrices = Matrices.of(model, dtype, form) if form else Matrices()
        blueprint = make_blueprint(model, dtype, tensors, matrices.chosen)
        return cls(blueprint, matrices.only(blueprint.matrices), form, tensors)

    def manifest(self, options: Options, *, model: str, digest: str) -> Manifest:
        """Return the manifest of a source called ``model``, whose digest is ``digest``."""
        arrays: dict[tuple[RecordLayout, int], str] = {}
        sizes: dict[str, int] = {}
        blocks = []
        for block in self.blueprint.blocks:
            layout = layout_for(
                block.parameters,
                bits=options.bits,
                group=options.group_size,
                pairs=options.pairs,
                transposed=block.transposed,
            )
            name = f"records-{len(arrays) + 1}" if arrays else "records"
            array = arrays.setdefault((layout, block.experts), name)
            index = sizes.get(array, 0)
            sizes[array] = index + 1
            blocks.append(Block(block.path, array, index, block.experts, block.top_k))
        return Manifest(
            model=model,
            source_digest=digest,
            blocks=tuple(blocks),
            layouts={name: layout for (layout, _), name in arrays.items()},
            version=version("moetier"),
            requires=(TRUNK_RECORDS,) if self.form else (),
            method="rounding" if options.fast else "hqq",
            trunk_records=self.form,
        )

    def records(self, *, workers: int, fast: bool) -> dict[str, MatrixRecord]:
        """Return the record of each quantised matrix, by module path."""
        return {
            path: MatrixRecord(path, recipe, self.form, workers=workers, fast=fast)
            for path, recipe in self.blueprint.matrices.items()
            if self.form
        }

    def trunk(self, records: Mapping[str, MatrixRecord]) -> tuple[TrunkFile, ...]:
        """Return the files of the trunk; ``records`` are those of its quantised matrices."""
        of_trunk: dict[str, TrunkTensor] = {name: self.tensors[name] for name in self.blueprint.trunk}
        return plan_trunk(of_trunk | {f"{path}{RECORD}": record for path, record in records.items()})
