"""What there is to choose for a model, before it is converted: how large experts and trunk would be at each width."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetier.runtime.checkpoint.config_json import read_config
from moetier.runtime.checkpoint.skeleton import build_on_meta
from moetier.runtime.config import DEFAULT_CONTEXT
from moetier.runtime.context import context_of
from moetier.runtime.moe.linear import matrix_layout
from moetier.tiers.errors import ConfigError
from moetier.tiers.layout import BITS, TRUNK_BITS, Bits, RecordLayout
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.folder import check_directory, read_manifest, store_folder
from moetier.tiers.store.trunk import check_trunk, trunk_records
from moetier.tools.convert.draft import Draft, Options
from moetier.tools.convert.stages import most_bytes
from moetier.tools.convert.target import is_ours

from .forecast import Trunk
from .outline import Outline, open_outline


@dataclass(frozen=True)
class Choice:
    """One width of experts and one of the trunk."""

    bits: Bits
    trunk_bits: Bits
    manifest: Manifest
    trunk_bytes: int  # of its files, and in memory
    matrices: tuple[RecordLayout, ...]  # of the trunk, that are quantised
    trunk: Trunk

    @property
    def disk_bytes(self) -> int:
        """Of a model directory, but for small files."""
        return self.manifest.stored_bytes + self.trunk_bytes

    @property
    def options(self) -> str:
        return f"--bits {self.bits}" + (f" --trunk-bits {self.trunk_bits}" if self.trunk_bits != 16 else "")


@dataclass(frozen=True)
class Prospect:
    """A model and its choices; ``outline`` is None where it is converted, and there is one choice."""

    name: str
    source: str
    outline: Outline | None
    model: Any  # on meta, its experts cut down
    choices: tuple[Choice, ...]
    passing_bytes: int = 0  # of the checkpoint's files, the most that are on the disk when it is converted from the hub

    @property
    def source_bytes(self) -> int:
        """Of the checkpoint; where its index does not say, what it takes at 16 bits."""
        if self.outline is not None and self.outline.nbytes is not None:
            return self.outline.nbytes
        return max(choice.disk_bytes for choice in self.choices)

    @property
    def context(self) -> int:
        """Tokens that a plan is for where nobody says: no more than the model was made for."""
        return context_of(self.model.config, DEFAULT_CONTEXT)

    def chosen(self, bits: Collection[int] | None, trunk_bits: Collection[int] | None) -> list[Choice]:
        """Those of the given widths. Raises ConfigError where there are none."""
        found = [
            choice
            for choice in self.choices
            if (bits is None or choice.bits in bits) and (trunk_bits is None or choice.trunk_bits in trunk_bits)
        ]
        if not found:
            (only, *_) = self.choices
            raise ConfigError(
                f"{self.source} is converted already, with experts of {only.bits} bits and a trunk of "
                f"{only.trunk_bits}.",
                "Leave out --bits and --trunk-bits, or plan with the checkpoint that it was made from.",
            )
        return found


def open_prospect(source: str | Path) -> Prospect:
    """Of a checkpoint's folder, in which its weights need not be; of a hub id; of a model directory. Raises
    CheckpointError or StoreError."""
    check_directory(Path(source))
    if is_ours(Path(source)):
        return _converted(Path(source))
    outline = open_outline(source)
    checkpoint, choices, model, passing = outline.checkpoint, list[Choice](), None, 0
    for trunk_bits in TRUNK_BITS:
        model, dtype = build_on_meta(checkpoint.config, checkpoint.first_dtype if outline.shaped else None)
        draft = Draft.of(model, dtype, outline.tensors(model, dtype), trunk_bits)
        if outline.on_hub:
            passing = max(passing, most_bytes(draft, checkpoint.tensors.values()))
        records = draft.records(workers=1, fast=False)
        layouts = {path: record.layout for path, record in records.items()}
        size = sum(file.size for file in draft.trunk(records))
        trunk = _trunk(model, size, trunk_bits, layouts)
        for bits in BITS:
            manifest = draft.manifest(Options(bits, trunk_bits), model=checkpoint.name, digest="")
            choices.append(Choice(bits, trunk_bits, manifest, size, tuple(layouts.values()), trunk))
    return Prospect(checkpoint.name, str(source), outline, model, tuple(choices), passing)


def _converted(folder: Path) -> Prospect:
    manifest = read_manifest(store_folder(folder))
    check_trunk(folder, manifest)
    model, _ = build_on_meta(read_config(folder), None)
    layouts = {}
    if manifest.trunk_records is not None:
        for path in trunk_records(folder, manifest):
            linear: Any = model.get_submodule(path)
            layouts[path] = matrix_layout(linear.out_features, linear.in_features, manifest.trunk_records)
    files = [folder / name for name in manifest.trunk] or folder.glob("trunk-*.safetensors")
    size = sum(path.stat().st_size for path in files)
    trunk_bits: Any = manifest.trunk_bits
    trunk = _trunk(model, size, trunk_bits, layouts)
    choice = Choice(manifest.bits, trunk_bits, manifest, size, tuple(layouts.values()), trunk)
    return Prospect(manifest.model, str(folder), None, model, (choice,))


def _trunk(model: Any, size: int, bits: Bits, records: Mapping[str, RecordLayout]) -> Trunk:
    """``size`` bytes, but for the embedding's where a token reads one row of it."""
    quantised = sum(layout.payload_bytes for layout in records.values())
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    recorded = any(model.get_submodule(path) is head for path in records)
    is_head = head is not None and head.weight is table and not recorded
    plain = size - quantised - (0 if is_head else table.numel() * model.dtype.itemsize)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return Trunk(bits, records=quantised, plain=max(plain, 0), layers=layers)
