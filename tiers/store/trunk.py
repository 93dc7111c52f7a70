"""Check the files of the trunk: their index, sizes, headers and checksums."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from moetier.tiers.errors import ChecksumError, StoreError, StoreFormatError
from moetier.tiers.fields import Fields, shown
from moetier.tiers.manifest import MAX_BYTES, TRUNK_NAME, FileSum, Manifest

from .atomic import read_errors
from .checksum import PIECE_BYTES, crc32c
from .folder import MAX_JSON_BYTES, parse_json, read_json
from .safetensors import Entry, parse_header, read_header

INDEX = "model.safetensors.index.json"
RECORD = ".record"  # suffix, in place of ".weight", of the name of a matrix that is stored as a record
# largest trunk whose checksums are compared on loading, where this takes less than a twentieth of the time
# (tests/measurements/trunk_checksums.py)
CHECKED_BYTES = 64 << 20
AHEAD_BYTES = 64 << 20  # size of the read-ahead that the kernel is asked for

FIX = "Get that file again from where the directory came from, or remove it and run the same conversion again."


def check_trunk(directory: Path, manifest: Manifest) -> None:
    """Check the trunk's index and the sizes and headers of its files. Raises the first error of ``trunk_faults``."""
    for fault in trunk_faults(directory, manifest).values():
        raise fault


def trunk_faults(directory: Path, manifest: Manifest) -> dict[str, StoreError]:
    """Find a wrong index, and missing, truncated or unreadable files of the trunk. Return the errors by file name.

    The manifest of an older store does not list the trunk's files. Then the files that the index names are checked.
    """
    faults: dict[str, StoreError] = {}
    places: dict[str, str] = {}
    try:
        places = _places(directory)
    except StoreError as error:
        faults[INDEX] = error
    named: dict[str, set[str]] = {}  # by file: its tensors
    for tensor, file in places.items():
        named.setdefault(file, set()).add(tensor)
    if manifest.trunk and (strangers := sorted(named.keys() - manifest.trunk.keys())):
        faults[INDEX] = StoreFormatError(
            f"{directory / INDEX} names {strangers[0]}, which the manifest does not know.", FIX
        )
    for name, entry in (manifest.trunk or dict.fromkeys(sorted(named))).items():
        try:
            _check_file(directory / name, entry, None if INDEX in faults else named.get(name, set()))
        except StoreError as error:
            faults[name] = error
    return faults


def _check_file(path: Path, entry: FileSum | None, tensors: set[str] | None) -> None:
    """Raise StoreError if a file is missing or unreadable, or has not the size of ``entry`` or just ``tensors``.

    ``tensors`` are the names of its tensors by the index. Either argument is None if it is not known.
    """
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError:
        size = None
    if size is None:
        expected = f"; it has {entry.bytes:,} bytes" if entry else ""
        raise StoreFormatError(f"{path}, a file of the trunk, is missing{expected}.", FIX)
    if entry and size != entry.bytes:
        raise StoreFormatError(f"{path}, a file of the trunk, has {size:,} bytes; {entry.bytes:,} were written.", FIX)
    found = _header(path).keys()
    if tensors is not None and found != tensors:
        raise StoreFormatError(f"{path} and {INDEX} differ in {shown(min(found ^ tensors))}.", FIX)


def trunk_records(directory: Path, manifest: Manifest) -> dict[str, int]:
    """Find the matrices that are stored as records. Return the size of each in bytes, by module path.

    Reads the index, and the headers of the files with records. Raises StoreFormatError if a record has a wrong type or
    shape, or if the manifest does not mention records.
    """
    found: dict[str, int] = {}
    headers: dict[str, dict[str, Entry]] = {}
    for tensor, name in _places(directory).items():
        if not tensor.endswith(RECORD):
            continue
        if manifest.trunk_records is None:
            raise StoreFormatError(f"{directory / INDEX} names {tensor}, which the manifest does not know.", FIX)
        path = directory / name
        if name not in headers:
            headers[name] = _header(path)
        entry = headers[name].get(tensor)
        if entry is None or entry.dtype != "U8" or len(entry.shape) != 1:
            what = f"is of {entry.dtype} {list(entry.shape)}" if entry else "is not there"
            raise StoreFormatError(f"{path}, a file of the trunk: {tensor} {what}; it is to be a record.", FIX)
        found[tensor.removesuffix(RECORD)] = entry.shape[0]
    return found


def _places(directory: Path) -> dict[str, str]:
    """Read the index. Return the file name of each tensor. Raises StoreFormatError if one is no trunk file's name."""
    path = directory / INDEX
    index = Fields(read_json(path, FIX))
    places: dict[str, str] = {}
    try:
        if metadata := index.get("metadata"):
            for _, value in metadata.members():  # transformers adds these numbers up
                value.number(0, MAX_BYTES)
        for tensor, file in index["weight_map"].members():
            places[tensor] = file.text(TRUNK_NAME.pattern, "the name of a trunk file of its own folder")
        if not places:
            raise ValueError("its weight_map is empty")
    except ValueError as error:
        raise StoreFormatError(f"{path}: {error}.", "Use another directory, or convert the model again.") from error
    return places


def _header(path: Path) -> dict[str, Entry]:
    """Read the header of a trunk file. Return its tensors by name. Raises StoreFormatError or StoreReadError."""
    try:
        with read_errors(path):
            data, size = read_header(path, MAX_JSON_BYTES)
        entries, end = parse_header(parse_json(data, f"The header of {path}", FIX))
        if end != size:
            raise ValueError(f"its data_offsets end at {end:,}, its data at {size:,}")
        return entries
    except FileNotFoundError:
        raise StoreFormatError(f"{path}, a file of the trunk, is missing.", FIX) from None
    except ValueError as error:
        raise StoreFormatError(f"{path}, a file of the trunk, can't be read: {error}.", FIX) from error


def check_small(directory: Path, manifest: Manifest) -> None:
    """Compare the checksums of the trunk's files if they have at most ``CHECKED_BYTES`` together.

    Call ``check_trunk`` before. Larger trunks are checked by ``moetier verify`` and by a daemon. Raises ChecksumError
    or StoreReadError.
    """
    if sum(entry.bytes for entry in manifest.trunk.values()) <= CHECKED_BYTES:
        for name, entry in manifest.trunk.items():
            for _ in check_sum(directory / name, entry, cached=True):
                pass


def check_sum(path: Path, entry: FileSum, *, cached: bool = False) -> Iterator[int]:
    """Read a file and compare its checksum at the end. Yield the number of bytes of each read as progress.

    The file is read from the disk, or through the page cache if ``cached``. Raises ChecksumError or StoreReadError.
    """
    crc = 0
    with read_errors(path), path.open("rb", buffering=0) as stream:
        for piece in read_pieces(stream.fileno(), cached=cached):
            crc = crc32c(piece, crc)
            yield len(piece)
    if crc != entry.crc32c:
        raise ChecksumError(
            f"{path}, a file of the trunk: checksum mismatch: crc32c {crc:08x}, {entry.crc32c:08x} was written.", FIX
        )


def read_pieces(descriptor: int, *, cached: bool = False) -> Iterator[memoryview]:
    """Read a file and yield it in pieces. All pieces are views of one buffer, so each is valid until the next.

    Unless ``cached``, the file is dropped from the page cache first, so that it is read from the disk.
    """
    buffer = memoryview(bytearray(min(PIECE_BYTES, max(os.fstat(descriptor).st_size, 1))))
    if not cached:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    position = 0
    while True:
        os.posix_fadvise(descriptor, position, AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        count = os.preadv(descriptor, [buffer], position)
        if not count:
            return
        yield buffer[:count]
        if not cached:
            os.posix_fadvise(descriptor, position, count, os.POSIX_FADV_DONTNEED)
        position += count
