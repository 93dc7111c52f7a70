"""Check the trunk of a model directory: the index, and the sizes, headers and checksums of the files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from moetier.tiers.errors import ChecksumError, StoreError, StoreFormatError
from moetier.tiers.fields import Fields, shown
from moetier.tiers.headers.safetensors import SafetensorsEntry, parse_header, read_header
from moetier.tiers.manifest import MAX_BYTES, TRUNK_NAME, FileSum, Manifest

from .atomic import read_errors
from .checksum import READ_PIECE_BYTES, crc32c
from .folder import MAX_JSON_BYTES, parse_json, read_json, remaking

INDEX = "model.safetensors.index.json"
RECORD = ".record"  # a matrix that is stored as a record has this suffix to its name, in place of ".weight"
# size of the largest trunk whose checksums are compared when a model is loaded; this takes less than a twentieth of the
# time of loading (tests/measurements/trunk_checksums.py)
CHECKED_BYTES = 64 << 20
AHEAD_BYTES = 64 << 20  # number of bytes that the kernel is asked to read ahead

MISSING = "Copy this file from the original of this model directory, or run the same conversion again."
FIX = "Copy this file from the original of this model directory, or remove it and run the same conversion again."


def check_trunk(directory: Path, manifest: Manifest) -> None:
    """Check the index of the trunk, and the sizes and headers of its files.

    If ``trunk_faults`` finds errors, raises the first of them.
    """
    for fault in trunk_faults(directory, manifest).values():
        raise fault


def trunk_faults(directory: Path, manifest: Manifest) -> dict[str, StoreError]:
    """Check the index and the files of the trunk. Return a dictionary from the name of each bad file to its error.

    A file is bad if it is missing, unreadable, of the wrong size, or does not match the index. If the manifest, that of
    an older store, does not list the trunk's files, the files in the index are checked.
    """
    faults: dict[str, StoreError] = {}
    places: dict[str, str] = {}
    try:
        places = _places(directory)
    except StoreError as error:
        faults[INDEX] = error
    named: dict[str, set[str]] = {}  # from file name to the names of the tensors that the index says are in the file
    for tensor, file in places.items():
        named.setdefault(file, set()).add(tensor)
    if manifest.trunk and (strangers := sorted(named.keys() - manifest.trunk.keys())):
        faults[INDEX] = StoreFormatError(
            f"{directory / INDEX} names the file {strangers[0]}, which is not in the manifest.",
            remaking(directory / INDEX, FIX),
        )
    for name, entry in (manifest.trunk or dict.fromkeys(sorted(named))).items():
        try:
            _check_file(directory / name, entry, None if INDEX in faults else named.get(name, set()))
        except StoreError as error:
            faults[name] = error
    return faults


def _check_file(path: Path, entry: FileSum | None, tensors: set[str] | None) -> None:
    """Raise StoreError if a file of the trunk is missing, unreadable, of the wrong size, or has the wrong tensors.

    Args:
        path: the file.
        entry: the size that the file should have; None to accept any.
        tensors: the names of the tensors that should be in the file; None to accept any.
    """
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError:
        size = None
    if size is None:
        expected = f"; it should have {entry.bytes:,} bytes" if entry else ""
        raise StoreFormatError(f"{path}, a file of the trunk, is missing{expected}.", remaking(path, MISSING))
    if entry and size != entry.bytes:
        cause = f"{path}, a file of the trunk, has {size:,} bytes; {entry.bytes:,} were written."
        raise StoreFormatError(cause, remaking(path, FIX))
    names = _header(path).keys()
    if tensors is not None and names != tensors:
        cause = f"Only one of {path} and {INDEX} has the tensor {shown(min(names ^ tensors))}."
        raise StoreFormatError(cause, remaking(path, FIX))


def trunk_records(directory: Path, manifest: Manifest) -> dict[str, int]:
    """Find the trunk's matrices that are stored as records. Return a dictionary from module path to the size in bytes.

    Raises StoreFormatError if the index or a header is malformed, if a record has a wrong type or shape, or if the
    manifest says that no matrix of the trunk is quantised. Raises StoreReadError if a file can't be read.
    """
    records: dict[str, int] = {}
    headers: dict[str, dict[str, SafetensorsEntry]] = {}
    for tensor, name in _places(directory).items():
        if not tensor.endswith(RECORD):
            continue
        if manifest.trunk_records is None:
            raise StoreFormatError(
                f"{directory / INDEX} names {tensor}, a quantised matrix, "
                "but the manifest says that the trunk has none.",
                remaking(directory / INDEX, FIX),
            )
        path = directory / name
        if name not in headers:
            headers[name] = _header(path)
        if (entry := headers[name].get(tensor)) is None or entry.dtype != "U8" or len(entry.shape) != 1:
            what = f"has type {entry.dtype} and shape {list(entry.shape)}" if entry else "is missing"
            cause = f"{path}, a file of the trunk: {tensor} {what}; it should be a record."
            raise StoreFormatError(cause, remaking(path, FIX))
        records[tensor.removesuffix(RECORD)] = entry.shape[0]
    return records


def _places(directory: Path) -> dict[str, str]:
    """Read the trunk's index. Return a dictionary from the name of each tensor to the name of its file.

    Raises StoreFormatError if the index is malformed, or if it names a file that can't be a file of the trunk. Raises
    StoreReadError if the index can't be read.
    """
    path = directory / INDEX
    index = Fields(read_json(path, remaking(path, FIX if path.exists() else MISSING)))
    places: dict[str, str] = {}
    try:
        if metadata := index.get("metadata"):
            for _, value in metadata.members():  # transformers adds these numbers up
                value.number(0, MAX_BYTES)
        for tensor, file in index["weight_map"].members():
            places[tensor] = file.text(TRUNK_NAME.pattern, "the name of a trunk file in the model directory")
        if not places:
            raise ValueError("its weight_map is empty")
    except ValueError as error:
        raise StoreFormatError(
            f"{path}: {error}.", "Use another model directory, or convert the model again."
        ) from error
    return places


def _header(path: Path) -> dict[str, SafetensorsEntry]:
    """Read the header of a file of the trunk. Return a dictionary from the name of each tensor to its entry.

    Raises StoreFormatError if the file is missing or malformed, StoreReadError if it can't be read.
    """
    try:
        with read_errors(path):
            data, size = read_header(path, MAX_JSON_BYTES)
        entries, end = parse_header(parse_json(data, f"The header of {path}", remaking(path, FIX)))
        if end != size:
            raise ValueError(f"its header describes {end:,} bytes of data, but it has {size:,}")
        return entries
    except FileNotFoundError:
        raise StoreFormatError(f"{path}, a file of the trunk, is missing.", remaking(path, MISSING)) from None
    except ValueError as error:
        raise StoreFormatError(f"{path}, a file of the trunk, can't be read: {error}.", remaking(path, FIX)) from error


def check_small(directory: Path, manifest: Manifest) -> None:
    """Compare the checksums of the trunk's files, if all files together have at most CHECKED_BYTES.

    The caller must have called ``check_trunk``. Larger trunks are checked by ``moetier verify`` and by a daemon. Raises
    ChecksumError if a checksum is wrong, StoreReadError if a file can't be read.
    """
    if sum(entry.bytes for entry in manifest.trunk.values()) <= CHECKED_BYTES:
        for name, entry in manifest.trunk.items():
            for _ in check_sum(directory / name, entry, cached=True):
                pass


def check_sum(path: Path, entry: FileSum, *, cached: bool = False) -> Iterator[int]:
    """Read a file piece by piece, and compare its checksum at the end. Yield the size of each piece in bytes.

    The file is read from the disk, or from the page cache if ``cached`` is true. Raises ChecksumError if the checksum
    is wrong, StoreReadError if the file can't be read.
    """
    crc = 0
    with read_errors(path), path.open("rb", buffering=0) as stream:
        for piece in read_pieces(stream.fileno(), cached=cached):
            crc = crc32c(piece, crc)
            yield len(piece)
    if crc != entry.crc32c:
        raise ChecksumError(
            f"{path}, a file of the trunk: checksum mismatch: CRC-32C {crc:08x}, but {entry.crc32c:08x} was written.",
            remaking(path, FIX),
        )


def read_pieces(descriptor: int, *, cached: bool = False) -> Iterator[memoryview]:
    """Yield a file in pieces. All pieces are views of one buffer, so a piece is valid only until the next is taken.

    Unless ``cached`` is true, the file is first dropped from the page cache, so that it is read from the disk.
    """
    buffer = memoryview(bytearray(min(READ_PIECE_BYTES, max(os.fstat(descriptor).st_size, 1))))
    if not cached:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    position = 0
    while True:
        os.posix_fadvise(descriptor, position, AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        if not (count := os.preadv(descriptor, [buffer], position)):
            return
        yield buffer[:count]
        if not cached:
            os.posix_fadvise(descriptor, position, count, os.POSIX_FADV_DONTNEED)
        position += count
