"""The table of extents: which bytes of a checkpoint's files make the record of each expert.

An *extent* is a run of bytes of a file that lies in a section of the record: unchanged, or as ``RecordPiece`` says.
``moetier link`` writes a table of a checkpoint, with a checksum for each record. The table is beside the checkpoint, or
in ``$XDG_CACHE_HOME/moetier/extents`` (XDG Base Directory Specification 0.8). docs/format.md describes the file.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moetier.tiers.errors import StoreFormatError, TargetError
from moetier.tiers.fields import Fields, shown
from moetier.tiers.layout import CHECKSUM_BYTES, ExpertKey, RecordLayout
from moetier.tiers.manifest import MAX_BYTES, Manifest
from moetier.tiers.store.atomic import make_folders, read_errors, write_durably
from moetier.tiers.store.folder import command, parse_json, user_cache

NAME = "moetier-extents.json"
FORMAT = 1
MAX_TABLE_BYTES = 64 << 20  # largest file that is read: six times that of 100,000 experts with three extents each
MAX_SHARDS = 10_000
MAX_PIECES = 64  # extents of a record


class RecordPiece(NamedTuple):
    """A byte range of the record that each expert of a block stores as one extent."""

    section: str  # name of the section that it is in, after earlier pieces of the same section
    length: int  # bytes in the record
    row_bytes: int = 0  # if not 0: rows of that size alternate with those of the section's other pieces
    is_wide: bool = False  # numbers are fp32 in the file, and bf16 in the record

    @property
    def file_bytes(self) -> int:
        """Bytes in the file."""
        return self.length * (2 if self.is_wide else 1)


class Extent(NamedTuple):
    """Bytes of a file, and where they lie in the record."""

    start: int  # in the record
    length: int  # from the first to the last byte in the record
    shard: int  # number of the file
    offset: int  # in the file
    row_bytes: int = 0  # 0: all bytes follow each other; else they are rows of that size
    stride: int = 0  # distance of two rows in the record
    is_wide: bool = False  # numbers are fp32 in the file, and bf16 in the record


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of the checkpoint, as it was when the table was made."""

    name: str  # relative to the checkpoint's folder
    bytes: int
    mtime_ns: int
    header: str  # sha256 of the JSON that begins the file
    rest: int | None = None  # CRC-32C of all its bytes that are in no extent, in order; None if they were not read


@dataclass(frozen=True)
class BlockExtents:
    """The extents of one block's records."""

    pieces: tuple[RecordPiece, ...]  # in the order of the record; together they fill its sections
    places: npt.NDArray[np.int64]  # [experts, pieces, 2]: number of the shard, offset in the file

    def of(self, layout: RecordLayout, expert: int) -> list[Extent]:
        """Return the extents of an expert's record, in the order of the record."""
        starts = {section.name: section.offset for section in layout.sections}
        strides = Counter[str]()  # of sections whose pieces alternate
        for piece in self.pieces:
            strides[piece.section] += piece.row_bytes
        extents = []
        for piece, (shard, offset) in zip(self.pieces, self.places[expert].tolist(), strict=True):
            row, stride = piece.row_bytes, strides[piece.section]
            length = piece.length // row * stride - stride + row if row else piece.length
            extents.append(Extent(starts[piece.section], length, shard, offset, row, stride, piece.is_wide))
            starts[piece.section] += row or piece.length
        return extents


@dataclass(frozen=True)
class ExtentTable:
    """The manifest of a checkpoint's experts, and where their bytes are.

    ``manifest.record_checksums`` is empty until the checkpoint is linked. ``manifest.digest`` does not depend on that.
    """

    manifest: Manifest
    shards: tuple[Shard, ...]
    blocks: tuple[BlockExtents, ...]
    ignored_code: bool = False  # linked although the checkpoint names code of its own, which is never run

    @property
    def is_linked(self) -> bool:
        """Whether the table has the checksums of all records, with which reads are compared."""
        return bool(self.manifest.record_checksums)

    def extents(self, key: ExpertKey) -> list[Extent]:
        """Return the extents of an expert's record, in the order of the record."""
        return self.blocks[key.block].of(self.manifest.layout(key.block), key.expert)

    def gaps(self) -> list[list[tuple[int, int]]]:
        """Return, for each shard, the ranges (first byte, end) that are in no extent, in order."""
        taken: list[list[tuple[int, int]]] = [[] for _ in self.shards]
        for block in self.blocks:
            for number, piece in enumerate(block.pieces):
                for shard, offset in block.places[:, number].tolist():
                    taken[shard].append((offset, offset + piece.file_bytes))
        return [list(_between(sorted(ranges), shard.bytes)) for ranges, shard in zip(taken, self.shards, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON."""
        return {
            "format": FORMAT,
            "manifest": replace(self.manifest, record_checksums=b"").to_json(),
            "record_checksums": base64.b64encode(self.manifest.record_checksums).decode(),
            "shards": [asdict(shard) for shard in self.shards],
            "blocks": [
                {
                    "pieces": [list(piece[: 4 if piece.row_bytes or piece.is_wide else 2]) for piece in block.pieces],
                    "places": base64.b64encode(block.places.astype("<i8").tobytes()).decode(),
                }
                for block in self.blocks
            ],
            **({"ignored_code": True} if self.ignored_code else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> ExtentTable:
        """Parse a table. Raises StoreFormatError, which names it by ``where``, unless each extent lies in its file."""
        try:
            fields = Fields(value)
            fields["format"].among((FORMAT,))
            manifest = Manifest.from_json(fields["manifest"].value, where)
            checksums = _decoded(fields["record_checksums"])
            if len(checksums) not in (0, CHECKSUM_BYTES * manifest.record_count):
                expected = f"0 or {CHECKSUM_BYTES * manifest.record_count:,}"
                raise ValueError(f"record_checksums has {len(checksums):,} bytes, not {expected}")
            shards = tuple(map(_shard, fields["shards"].items(MAX_SHARDS)))
            values = fields["blocks"].items(len(manifest.blocks))
            if len(values) != len(manifest.blocks):
                raise ValueError(f"blocks has {len(values)} items, and the manifest {len(manifest.blocks)} blocks")
            blocks = tuple(_block(json_block, manifest, number, shards) for number, json_block in enumerate(values))
            ignored = fields.get("ignored_code")
            ignored_code = ignored is not None and ignored.flag()
        except ValueError as error:
            raise StoreFormatError(f"{where} can't be used: {error}.", "Make it again: moetier link DIR") from error
        return cls(replace(manifest, record_checksums=checksums), shards, blocks, ignored_code)


def _between(taken: list[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    at = 0
    for first, end in (*taken, (size, size)):
        if first > at:
            yield at, first
        at = max(at, end)


def _decoded(value: Fields) -> bytes:
    try:
        return base64.b64decode(value.text(), validate=True)
    except binascii.Error as error:
        raise ValueError(f"{value.path} is not base64") from error


def _shard(value: Fields) -> Shard:
    rest = value.get("rest")
    return Shard(
        value["name"].text("[^/\0][^\0]*", "the name of a file"),
        value["bytes"].number(0, MAX_BYTES),
        value["mtime_ns"].number(-(1 << 63), (1 << 63) - 1),
        value["header"].text("[0-9a-f]{64}", "a sha256"),
        None if rest is None or rest.value is None else rest.number(0, 2**32 - 1),
    )


def _block(value: Fields, manifest: Manifest, number: int, shards: tuple[Shard, ...]) -> BlockExtents:
    layout, experts = manifest.layout(number), manifest.blocks[number].experts
    pieces = []
    for item in value["pieces"].items(MAX_PIECES):
        name, length, *more = item.items(4)
        piece = RecordPiece(name.text(), length.number(1, MAX_BYTES))
        if more:
            row_bytes, is_wide = more
            piece = piece._replace(row_bytes=row_bytes.number(0, piece.length), is_wide=is_wide.flag())
        pieces.append(piece)
    _check_rows(pieces)
    filled = [(section.name, section.nbytes) for section in layout.sections]
    if list(_sums(pieces)) != filled:
        raise ValueError(f"{value.path}.pieces do not fill the sections of the record")
    data = _decoded(value["places"])
    if len(data) != 16 * experts * len(pieces):
        raise ValueError(f"{value.path}.places has {len(data):,} bytes")
    places = np.frombuffer(data, "<i8").reshape(experts, len(pieces), 2)
    shard, offset = places[..., 0], places[..., 1]
    sizes = np.array([file.bytes for file in shards], np.int64)
    if (shard < 0).any() or (shard >= len(shards)).any():
        raise ValueError(f"{value.path}.places name a shard that is not listed")
    # negative if the file is too small
    last = sizes[shard] - np.array([piece.file_bytes for piece in pieces], np.int64)
    if (offset < 0).any() or (offset > last).any():
        raise ValueError(f"{value.path}.places lead out of a shard")
    return BlockExtents(tuple(pieces), places)


def _check_rows(pieces: list[RecordPiece]) -> None:
    """Raise ValueError unless the pieces of each section whose rows alternate have rows alike, and as many."""
    for name in {piece.section for piece in pieces if piece.row_bytes}:
        alike = {(piece.length, piece.row_bytes) for piece in pieces if piece.section == name}
        if len(alike) > 1 or any(length % row for length, row in alike):
            raise ValueError(f"the pieces of {shown(name)} have rows that do not alternate")
    if any(piece.is_wide and (piece.length % 2 or piece.row_bytes % 2) for piece in pieces):
        raise ValueError("a piece of fp32 numbers, or a row of it, has half a number")


def _sums(pieces: list[RecordPiece]) -> Iterator[tuple[str, int]]:
    """Yield the name and total size of each run of pieces of one section."""
    name, size = "", 0
    for piece in pieces:
        if piece.section != name:
            if name:
                yield name, size
            name, size = piece.section, 0
        size += piece.length
    yield name, size


def table_path(folder: Path) -> Path:
    """Return the path of a table beside its checkpoint: in the folder, or for a GGUF file beside it."""
    return folder / NAME if folder.is_dir() else folder.with_name(f"{folder.name}.{NAME}")


def cached(folder: Path) -> Path:
    """Return the path of a checkpoint's table in the user's cache. Raises TargetError for a user without a home."""
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    return user_cache("extents") / f"{name}.json"


def read_table(folder: Path) -> ExtentTable | None:
    """Read the table of a linked checkpoint, that of the user's cache first; None if it is not linked.

    Raises StoreFormatError or StoreReadError.
    """
    paths = [table_path(folder)]
    with contextlib.suppress(TargetError):
        paths.insert(0, cached(folder))
    for path in paths:
        try:
            with read_errors(path), path.open("rb") as stream:
                data = stream.read(MAX_TABLE_BYTES + 1)
        except FileNotFoundError:
            continue
        return _parsed(data, str(path), f"Make it again: {command('link', folder)}")
    return None


@functools.lru_cache(maxsize=1)
def _parsed(data: bytes, where: str, fix: str) -> ExtentTable:
    """Parse the content of a table. The last one is kept, as loading a model reads the table several times."""
    return ExtentTable.from_json(parse_json(data, where, fix, limit=MAX_TABLE_BYTES), where)


def write_table(folder: Path, table: ExtentTable, *, into_cache: bool) -> Path:
    """Write the table of the checkpoint in ``folder``, and return its path. Raises TargetError.

    It is written into the user's cache if that is asked for, or if the folder can't be written to. An older table in
    the other place is removed.
    """
    data = json.dumps(table.to_json()).encode()
    if not into_cache:
        try:
            write_durably(table_path(folder), data)
        except OSError:
            into_cache = True
        else:
            with contextlib.suppress(TargetError, OSError):
                cached(folder).unlink()
            return table_path(folder)
    path = cached(folder)
    try:
        make_folders(path.parent)
        write_durably(path, data)
    except OSError as error:
        raise TargetError(
            f"{path} can't be written ({error.strerror}).", "Set XDG_CACHE_HOME to a folder that can be written."
        ) from error
    return path
