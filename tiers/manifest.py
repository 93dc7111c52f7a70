"""What a store says of itself: the attributes of its zarr group, written last."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from .errors import MissingExpertError, StoreFormatError
from .keys import PAIR_TYPES, TRUNK_BITS, Bits, ExpertKey, RecordLayout

FORMAT = 1
TRUNK_RECORDS = "trunk-records"
FEATURES = frozenset({TRUNK_RECORDS})  # what a store may require and this version has
TRUNK_NAME = re.compile(r"trunk-[\w-]+(\.[\w-]+)*\.safetensors")  # beside experts.zarr, and nowhere else


@dataclass(frozen=True, slots=True)
class Block:
    """One Experts module: its path in the model, where its records lie, and its routing."""

    path: str  # "model.layers.0.mlp.experts"
    array: str  # the zarr array of its record geometry
    index: int  # in that array
    experts: int
    top_k: int


@dataclass(frozen=True, slots=True)
class FileSum:
    """What a file was when it was written."""

    bytes: int
    crc32c: int


@dataclass(frozen=True, slots=True)
class TrunkRecords:
    """How the matrices of the trunk are stored that are quantised: each as a record of one projection, "weight"."""

    bits: Bits
    group: int  # the most: a matrix that it does not divide has a smaller one
    pairs: str


@dataclass(frozen=True)
class Manifest:
    """The manifest of format version 1. ``blocks[b]`` is what ``ExpertKey.block == b`` names."""

    model: str  # hub id or folder name of the source
    source_digest: str  # sha256 over the source's config, its tensors' names, shapes, types, places, some bytes of each
    blocks: tuple[Block, ...]
    layouts: Mapping[str, RecordLayout]  # by array name
    version: str  # of moetier, that wrote it
    digest: str = ""  # sha256 over the crc32c (LE u32) of every record, block by block; identifies the store
    requires: tuple[str, ...] = ()
    method: str = "hqq"  # how the codes were found: "hqq", or "rounding"
    trunk: Mapping[str, FileSum] = field(default_factory=dict)  # by name; like the digest, empty until it is written
    trunk_records: TrunkRecords | None = None  # None: all of the trunk is as it was

    @property
    def trunk_bits(self) -> int:
        return self.trunk_records.bits if self.trunk_records else 16

    @property
    def bits(self) -> Bits:
        """Of an expert's weight; projections that no group divides may have more."""
        return min(projection.bits for layout in self.layouts.values() for projection in layout.projections)

    def layout(self, block: int) -> RecordLayout:
        return self.layouts[self.blocks[block].array]

    def shape(self, array: str) -> tuple[int, int, int]:
        """[blocks, experts, record bytes] of a zarr array."""
        members = [b for b in self.blocks if b.array == array]
        return len(members), members[0].experts, self.layouts[array].record_bytes

    def check_keys(self, block: int, keys: Sequence[ExpertKey]) -> None:
        """Raises MissingExpertError for what the model does not have. All keys are of ``block``."""
        if not 0 <= block < len(self.blocks):
            raise MissingExpertError(
                f"{self.model} has no block {block}.", f"Its blocks are 0 to {len(self.blocks) - 1}."
            )
        experts = self.blocks[block].experts
        for key in keys:
            assert key.block == block, "keys of one block"
            if not 0 <= key.expert < experts:
                raise MissingExpertError(f"{self.model} has no {key}.", f"Its experts are 0 to {experts - 1}.")

    @property
    def record_count(self) -> int:
        return sum(block.experts for block in self.blocks)

    @property
    def stored_bytes(self) -> int:
        """Of all records with their checksums."""
        return sum(block.experts * self.layouts[block.array].slot_bytes for block in self.blocks)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "requires": list(self.requires),
            "model": self.model,
            "source_digest": self.source_digest,
            "blocks": [
                {"path": b.path, "array": b.array, "index": b.index, "experts": b.experts, "top_k": b.top_k}
                for b in self.blocks
            ],
            "layouts": {name: layout.to_json() for name, layout in self.layouts.items()},
            "version": self.version,
            "digest": self.digest,
            "method": self.method,
            **({"trunk_records": asdict(self.trunk_records)} if self.trunk_records else {}),
            **({"trunk": {name: asdict(entry) for name, entry in sorted(self.trunk.items())}} if self.trunk else {}),
        }

    @classmethod
    def from_json(cls, value: object, where: str) -> Manifest:
        """Ignores unknown optional keys; raises StoreFormatError, naming ``where``, on what is not format 1."""
        if not isinstance(value, dict) or "format" not in value:
            raise StoreFormatError(f"{where} is not a moetier store: it has no manifest.", "Convert the model again.")
        if value["format"] != FORMAT:
            raise StoreFormatError(
                f"{where} has format version {value['format']}; this moetier reads version {FORMAT}.",
                "Install a moetier that reads it, or convert the model again.",
            )
        try:
            if missing := set(value["requires"]) - FEATURES:
                features = ", ".join(sorted(missing))
                raise StoreFormatError(
                    f"{where} requires {features}, which this moetier does not have: {_versions(value)}.",
                    "Install a newer moetier, or convert the model again.",
                )
            manifest = cls(
                model=str(value["model"]),
                source_digest=str(value["source_digest"]),
                blocks=tuple(
                    Block(str(b["path"]), str(b["array"]), int(b["index"]), int(b["experts"]), int(b["top_k"]))
                    for b in value["blocks"]
                ),
                layouts={name: RecordLayout.from_json(layout) for name, layout in value["layouts"].items()},
                version=str(value["version"]),
                digest=str(value["digest"]),
                requires=tuple(value["requires"]),
                method=str(value.get("method", "hqq")),
                trunk={
                    str(name): FileSum(int(entry["bytes"]), int(entry["crc32c"]))
                    for name, entry in value.get("trunk", {}).items()
                },
                trunk_records=TrunkRecords(**value["trunk_records"]) if "trunk_records" in value else None,
            )
            manifest._check()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreFormatError(
                f"{where}: its manifest can't be used ({type(error).__name__}: {error}): {_versions(value)}.",
                "Install the moetier that wrote it, or convert the model again.",
            ) from error
        return manifest

    def _check(self) -> None:
        """Raises ValueError unless the blocks fill their arrays exactly."""
        if not self.blocks:
            raise ValueError("it has no blocks")
        if names := [name for name in self.trunk if not TRUNK_NAME.fullmatch(name)]:
            raise ValueError(f"{names[0]!r} is no name of a trunk file")
        form = self.trunk_records
        if form and (form.bits not in TRUNK_BITS[1:] or form.pairs not in PAIR_TYPES or type(form.group) is not int):
            raise ValueError(f"its trunk is stored with {form}")
        if (form is not None) != (TRUNK_RECORDS in self.requires):
            raise ValueError(f"its trunk is stored with {form}, and it requires {list(self.requires)}")
        if names := [name for name in self.layouts if not re.fullmatch(r"[\w-]+", name)]:
            raise ValueError(f"{names[0]!r} is no name of an array")  # it becomes the name of a folder
        if strangers := {b.array for b in self.blocks} - set(self.layouts):
            raise ValueError(f"its blocks are in arrays that have no layout: {sorted(strangers)}")
        for name in self.layouts:
            members = [b for b in self.blocks if b.array == name]
            if sorted(b.index for b in members) != list(range(len(members))) or not members:
                raise ValueError(f"the blocks of array {name} are not numbered from 0")
            if len({b.experts for b in members}) != 1:
                raise ValueError(f"the blocks of array {name} differ in their number of experts")
        if len({b.path for b in self.blocks}) != len(self.blocks):
            raise ValueError("two blocks have one path")
        for block in self.blocks:
            if not 1 <= block.top_k <= block.experts:
                raise ValueError(f"block {block.path}: top-{block.top_k} of {block.experts} experts")


def _versions(value: Mapping[str, Any]) -> str:
    return f"moetier {value.get('version', '?')} wrote it, this is {version('moetier')}"
