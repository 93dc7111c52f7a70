"""The manifest of a store: attributes of its zarr group that say what the store holds. They are written last."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any

from .errors import MissingExpertError, StoreFormatError
from .fields import SHOWN, Fields, shown
from .layout import GROUPS, PAIR_TYPES, TRUNK_BITS, ZERO_POINTS, Bits, ExpertKey, RecordLayout

FORMAT = 1
TRUNK_RECORDS = "trunk-records"
FEATURES = frozenset({TRUNK_RECORDS})  # features that a store may require and this version supports
MAX_EXPERTS = 1 << 16  # largest number of experts of a block
MAX_BYTES = 1 << 50  # largest size of a file, in bytes
MAX_NAME_BYTES = 255  # longest name of a file or folder, in bytes (NAME_MAX of Linux)
MAX_SOLVER = 1 << 16
SOURCE_DIGEST = "[0-9a-f]{64}|[0-9a-f]{40}"  # a sha256, or the hub's commit during a conversion that streams the source
FILE_NAME = re.compile(r"(\w[\w.-]*/){0,2}\w[\w.-]*")  # a file below a model directory
TRUNK_NAME = re.compile(r"trunk-[\w-]+(\.[\w-]+)*\.safetensors")  # a trunk file, which lies beside experts.zarr


@dataclass(frozen=True, slots=True)
class Block:
    """One block of the model, and the place of its records in the store."""

    path: str  # path of its Experts module in the model: "model.layers.0.mlp.experts"
    array: str  # name of the zarr array that has its records; all records of an array have one layout
    index: int  # index of the block in that array
    experts: int  # number of its experts
    top_k: int  # number of experts that it uses for each token


@dataclass(frozen=True, slots=True)
class FileSum:
    """Size in bytes and checksum of a file when it was written."""

    bytes: int
    crc32c: int


@dataclass(frozen=True, slots=True)
class TrunkRecords:
    """Quantisation of matrices of the trunk. Each is stored as a record with one projection, named "weight"."""

    bits: Bits  # bits per weight
    group: int  # largest group size; it is smaller in a matrix whose number of columns is not a multiple of it
    pairs: str  # type of the pairs, one of PAIR_TYPES


@dataclass(frozen=True)
class Manifest:
    """The manifest, in version 1 of the format. Block b of the model is ``blocks[b]``."""

    model: str  # hub id or folder name of the checkpoint that was converted
    source_digest: str  # sha256 over its config and its tensors' names, shapes, types, offsets and some of their bytes
    blocks: tuple[Block, ...]
    layouts: Mapping[str, RecordLayout]  # a dictionary from the name of a zarr array to the layout of its records
    version: str  # version of moetier that wrote the store
    digest: str = ""  # identifies the store: sha256 over the CRC-32C (LE u32) of each record, block after block
    requires: tuple[str, ...] = ()  # names of features without which the store can't be read
    method: str = "hqq"  # method of quantisation: "hqq" or "rounding"; "native": the checkpoint's own codes were kept
    solver: int = 1  # version of the code that finds codes: two versions may find different codes for the same weights
    trunk: Mapping[str, FileSum] = field(default_factory=dict)  # from file name to its sum; empty until all are written
    trunk_records: TrunkRecords | None = None  # None: no matrix of the trunk is quantised
    record_checksums: bytes = field(default=b"", repr=False)  # LE u32 each; b"" in the manifest of an older store
    # in an object store: the config, the tokenizer's files and so on, from file name to sum; empty if unknown
    files: Mapping[str, FileSum] = field(default_factory=dict)
    copied: Mapping[str, FileSum] = field(default_factory=dict)  # the same of files copied from the checkpoint

    @property
    def trunk_bits(self) -> int:
        """Bits per weight of the trunk's quantised matrices; 16 if no matrix is quantised."""
        return self.trunk_records.bits if self.trunk_records else 16

    @property
    def bits(self) -> Bits:
        """Bits per expert weight. If projections have different numbers of bits, this is the smallest of them."""
        return min(projection.bits for layout in self.layouts.values() for projection in layout.projections)

    @cached_property
    def _checksums(self) -> tuple[tuple[int, ...], ...]:
        table = iter(struct.iter_unpack("<I", self.record_checksums))
        return tuple(tuple(next(table)[0] for _ in range(block.experts)) for block in self.blocks)

    def checksums(self, block: int) -> tuple[int, ...]:
        """Return the CRC-32C of each record of a block; () for an older store, whose manifest has only the digest."""
        return self._checksums[block] if self.record_checksums else ()

    def has_record(self, key: ExpertKey, crc: int) -> bool:
        """Return whether the record of ``key`` has the CRC-32C ``crc``. True for an older store without checksums."""
        return not self.record_checksums or self._checksums[key.block][key.expert] == crc

    @property
    def plan(self) -> Manifest:
        """The manifest without the fields that are unknown until the store is written."""
        return replace(self, digest="", trunk={}, record_checksums=b"", files={}, copied={})

    def layout(self, block: int) -> RecordLayout:
        """Return the layout of a block's records."""
        return self.layouts[self.blocks[block].array]

    def shape(self, array: str) -> tuple[int, int, int]:
        """Return the shape of the zarr array ``array``: [blocks, experts, record bytes]."""
        members = self.members[array]
        return len(members), next(iter(members.values())).experts, self.layouts[array].record_bytes

    @cached_property
    def members(self) -> Mapping[str, Mapping[int, Block]]:
        """A dictionary from the name of each zarr array to its blocks, as a dictionary from block number to block."""
        by_array: dict[str, dict[int, Block]] = {name: {} for name in self.layouts}
        for number, block in enumerate(self.blocks):
            by_array[block.array][number] = block
        return by_array

    def check_keys(self, block: int, keys: Sequence[ExpertKey]) -> None:
        """Raise MissingExpertError if the model has no block ``block``, or if the block lacks an expert of ``keys``.

        All keys must belong to ``block``.
        """
        if not 0 <= block < len(self.blocks):
            raise MissingExpertError(
                f"{self.model} has no block {block}.", f"Choose a block from 0 to {len(self.blocks) - 1}."
            )
        experts = self.blocks[block].experts
        for key in keys:
            assert key.block == block, "keys of one block"
            if not 0 <= key.expert < experts:
                raise MissingExpertError(f"{self.model} has no {key}.", f"Choose an expert from 0 to {experts - 1}.")

    @property
    def record_count(self) -> int:
        """The number of records in the store."""
        return sum(block.experts for block in self.blocks)

    @property
    def stored_bytes(self) -> int:
        """Total size of all records with their checksums, in bytes. A tier has no use for a larger budget."""
        return sum(block.experts * self.layouts[block.array].slot_bytes for block in self.blocks)

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as a JSON object."""
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
            "solver": self.solver,
            **({"trunk_records": asdict(self.trunk_records)} if self.trunk_records else {}),
            **({"record_checksums": base64.b64encode(self.record_checksums).decode()} if self.record_checksums else {}),
            **({"trunk": {name: asdict(entry) for name, entry in sorted(self.trunk.items())}} if self.trunk else {}),
            **({"files": {name: asdict(entry) for name, entry in sorted(self.files.items())}} if self.files else {}),
            **({"copied": {name: asdict(entry) for name, entry in sorted(self.copied.items())}} if self.copied else {}),
        }

    @classmethod
    def from_json(cls, value: object, where: str, fix: str = "Convert the model again.") -> Manifest:
        """Parse a manifest. Unknown fields are ignored.

        Args:
            value: what ``to_json`` returned when the store was written; anything else is refused.
            where: the name of the store in error messages.
            fix: what to do if ``value`` is no manifest at all.

        Raises:
            StoreFormatError: ``value`` is not a manifest of version 1, or requires a feature that is not supported.
        """
        if not isinstance(value, dict) or "format" not in value:
            raise StoreFormatError(f"{where} is not a moetier store: it has no manifest.", fix)
        if type(value["format"]) is not int or value["format"] != FORMAT:
            raise StoreFormatError(
                f"{where} has format version {shown(value['format'])}; this version of moetier reads version {FORMAT}.",
                "Install a version of moetier that reads it, or convert the model again.",
            )
        fields = Fields(value)
        try:
            requires = tuple(entry.text() for entry in fields["requires"].items())
            if missing := set(requires) - FEATURES:
                features = ", ".join(sorted(missing))[:SHOWN]
                raise StoreFormatError(
                    f"{where} requires {features}, which this version of moetier does not support: {_versions(value)}.",
                    "Install a newer version of moetier, or convert the model again.",
                )
            manifest = cls(
                model=fields["model"].text(),
                source_digest=fields["source_digest"].text(SOURCE_DIGEST, "a digest"),
                blocks=_blocks(fields["blocks"].items()),
                layouts={
                    _array(name, layout): RecordLayout.from_json(layout) for name, layout in fields["layouts"].members()
                },
                version=fields["version"].text(),
                digest=fields["digest"].text("([0-9a-f]{64})?", "a sha256"),
                requires=requires,
                method=method.text() if (method := fields.get("method")) else "hqq",
                solver=solver.number(1, MAX_SOLVER) if (solver := fields.get("solver")) else 1,
                trunk=_sums(trunk, TRUNK_NAME, "a trunk file", 1) if (trunk := fields.get("trunk")) else {},
                trunk_records=_trunk_records(entry) if (entry := fields.get("trunk_records")) else None,
                files=_sums(files, FILE_NAME, "a file", 0) if (files := fields.get("files")) else {},
                copied=_sums(copied, FILE_NAME, "a file", 0) if (copied := fields.get("copied")) else {},
                record_checksums=_table(table) if (table := fields.get("record_checksums")) else b"",
            )
            manifest = replace(manifest, method=method_of(manifest.method, manifest.layouts, manifest.trunk_records))
            manifest._check()
        except ValueError as error:
            raise StoreFormatError(
                f"{where}: its manifest can't be used: {error} ({_versions(value)}).",
                "Install the version of moetier that wrote it, or convert the model again.",
            ) from error
        return manifest

    def _check(self) -> None:
        """Raise ValueError unless the blocks fill their arrays exactly and the other fields agree with them."""
        if not self.blocks:
            raise ValueError("blocks is empty")
        if (self.trunk_records is not None) != (TRUNK_RECORDS in self.requires):
            raise ValueError(f"trunk_records is {self.trunk_records}, but requires is {shown(list(self.requires))}")
        if strangers := {b.array for b in self.blocks} - set(self.layouts):
            raise ValueError(f"layouts has no layout of array {shown(min(strangers))}, which blocks names")
        for name, members in self.members.items():
            if sorted(b.index for b in members.values()) != list(range(len(members))) or not members:
                raise ValueError(f"the blocks of array {name} do not have the indexes 0, 1, 2 and so on")
            if len({b.experts for b in members.values()}) != 1:
                raise ValueError(f"the blocks of array {name} differ in their number of experts")
        if len({b.path for b in self.blocks}) != len(self.blocks):
            raise ValueError("two blocks have the same path")
        if (table := self.record_checksums) and (
            len(table) != 4 * self.record_count or hashlib.sha256(table).hexdigest() != self.digest
        ):
            raise ValueError("record_checksums does not match digest")


def method_of(quantised: str, layouts: Mapping[str, RecordLayout], trunk: TrunkRecords | None) -> str:
    """Return "native" if all codes of a store are a checkpoint's own, and else the method that has ``quantised``.

    Earlier versions wrote "hqq" for native codes too.
    """
    projections = [p for layout in layouts.values() for p in layout.projections]
    own = [bool(p.coding) or p.pairs in ZERO_POINTS for p in projections if p.bits != 16]
    return "native" if own and all(own) and trunk is None else quantised


def _blocks(values: Sequence[Fields]) -> tuple[Block, ...]:
    blocks = []
    for value in values:
        experts = value["experts"].number(1, MAX_EXPERTS)
        top_k = value["top_k"].number(1, experts)
        index = value["index"].number(0, len(values) - 1)
        blocks.append(Block(value["path"].text(), value["array"].text(), index, experts, top_k))
    return tuple(blocks)


def _array(name: str, layout: Fields) -> str:
    """Return ``name``, the name of a zarr array. Raises ValueError if a folder can't have that name."""
    if not re.fullmatch(r"[\w-]+", name) or len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"{layout.path}: {shown(name)} can't be the name of an array")
    return name


def _sums(value: Fields, names: re.Pattern[str], what: str, least: int) -> dict[str, FileSum]:
    """Parse a dictionary from file names to sizes and checksums. Raises ValueError if it can't be used.

    Args:
        value: the dictionary.
        names: pattern of permitted names.
        what: words for a file, for errors.
        least: the smallest permitted size in bytes.
    """
    sums = {}
    for name, entry in value.members():
        if not names.fullmatch(name):
            raise ValueError(f"{entry.path}: {shown(name)} can't be the name of {what}")
        sums[name] = FileSum(entry["bytes"].number(least, MAX_BYTES), entry["crc32c"].number(0, 2**32 - 1))
    return sums


def _table(value: Fields) -> bytes:
    try:
        return base64.b64decode(value.text(), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{value.path} is {shown(value.value)}, not base64") from error


def _trunk_records(value: Fields) -> TrunkRecords:
    pairs = value["pairs"].among(PAIR_TYPES)
    trunk_records = TrunkRecords(value["bits"].among(TRUNK_BITS[1:]), value["group"].among(GROUPS[pairs]), pairs)
    value.equals(asdict(trunk_records), "this version of moetier does not support it")
    return trunk_records


def _versions(value: Mapping[str, Any]) -> str:
    writer = value.get("version")
    return (
        f"moetier {writer[:SHOWN] if isinstance(writer, str) else '?'} wrote it; this is moetier {version('moetier')}"
    )
