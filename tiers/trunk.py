"""The trunk's files as a reader finds them: what the manifest and the index say of them, and what is wrong."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .checksum import crc32c
from .errors import ChecksumError, StoreError, StoreFormatError
from .folder import read_errors
from .manifest import TRUNK_NAME, FileSum, Manifest

INDEX = "model.safetensors.index.json"
RECORD = ".record"  # in place of ".weight": a matrix that is stored as a record
PIECE_BYTES = 8 << 20  # read and checksummed at a time, while it is in the processor's cache
AHEAD_BYTES = 64 << 20  # that the kernel is asked to read meanwhile

FIX = "Get that file again from where the directory came from, or remove it and run the same conversion again."


def check_trunk(directory: Path, manifest: Manifest) -> None:
    """Raises the first of ``trunk_faults``. Reads the index alone; of the trunk's files, their sizes."""
    for fault in trunk_faults(directory, manifest).values():
        raise fault


def trunk_faults(directory: Path, manifest: Manifest) -> dict[str, StoreError]:
    """By file name: the index, if it is not one of this directory's own trunk files; and each that is not there whole.

    A manifest of before ``trunk`` says no sizes: then the files that the index names must be there.
    """
    faults: dict[str, StoreError] = {}
    named: set[str] = set()
    try:
        named = set(_places(directory).values())
    except StoreError as error:
        faults[INDEX] = error
    if manifest.trunk and (strangers := sorted(named - manifest.trunk.keys())):
        faults[INDEX] = StoreFormatError(
            f"{directory / INDEX} names {strangers[0]}, which the manifest does not know.", FIX
        )
    for name, entry in (manifest.trunk or dict.fromkeys(sorted(named))).items():
        path = directory / name
        try:
            size = path.stat().st_size if path.is_file() else None
        except OSError:
            size = None
        if size is None:
            expected = f"; it has {entry.bytes:,} bytes" if entry else ""
            faults[name] = StoreFormatError(f"{path}, a file of the trunk, is missing{expected}.", FIX)
        elif entry and size != entry.bytes:
            faults[name] = StoreFormatError(
                f"{path}, a file of the trunk, has {size:,} bytes; {entry.bytes:,} were written.", FIX
            )
    return faults


def trunk_records(directory: Path, manifest: Manifest) -> dict[str, int]:
    """Module path -> bytes, of each matrix that is stored as a record. Reads the index, and its files' headers.

    Raises StoreFormatError for what is no record, and for records that the manifest says nothing of.
    """
    found: dict[str, int] = {}
    of_file: dict[str, list[str]] = defaultdict(list)
    for tensor, name in _places(directory).items():
        if tensor.endswith(RECORD):
            of_file[name].append(tensor)
    for name, tensors in of_file.items():
        if manifest.trunk_records is None:
            raise StoreFormatError(f"{directory / INDEX} names {tensors[0]}, which the manifest does not know.", FIX)
        try:
            with safe_open(directory / name, "np") as file:
                for tensor in tensors:
                    place = file.get_slice(tensor)
                    (size,) = place.get_shape()
                    if place.get_dtype() != "U8":
                        raise ValueError(f"{tensor} is of {place.get_dtype()}")
                    found[tensor.removesuffix(RECORD)] = size
        except (OSError, ValueError, SafetensorError) as error:
            raise StoreFormatError(f"{directory / name}, a file of the trunk, can't be read: {error}.", FIX) from error
    return found


def _places(directory: Path) -> dict[str, str]:
    """The index: tensor -> file. Raises StoreFormatError unless all are plain names of trunk files."""
    path = directory / INDEX
    try:
        with read_errors(path):
            index = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise StoreFormatError(f"{path} is missing: it says where the trunk's tensors lie.", FIX) from None
    except ValueError as error:
        raise StoreFormatError(f"{path} is not JSON ({error}).", FIX) from error
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise StoreFormatError(f"{path} has no weight_map.", FIX)
    for name in places.values():
        if not isinstance(name, str) or not TRUNK_NAME.fullmatch(name):
            raise StoreFormatError(
                f"{path} names {name!r}, which is no trunk file of its own folder.",
                "Don't use this directory, or convert the model again.",
            )
    return places


def check_sum(path: Path, entry: FileSum) -> Iterator[int]:
    """Reads a file from the disk and yields how much, again and again. Raises ChecksumError, or StoreReadError."""
    crc = 0
    with read_errors(path), path.open("rb", buffering=0) as stream:
        for piece in read_pieces(stream.fileno()):
            crc = crc32c(piece, crc)
            yield len(piece)
    if crc != entry.crc32c:
        raise ChecksumError(
            f"{path}, a file of the trunk: checksum mismatch: crc32c {crc:08x}, {entry.crc32c:08x} was written.", FIX
        )


def read_pieces(descriptor: int) -> Iterator[memoryview]:
    """A file from its start, in one reused buffer; from the disk, as what the page cache holds of it is dropped."""
    buffer = memoryview(bytearray(PIECE_BYTES))
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    position = 0
    while True:
        os.posix_fadvise(descriptor, position, AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        count = os.preadv(descriptor, [buffer], position)
        if not count:
            return
        yield buffer[:count]
        os.posix_fadvise(descriptor, position, count, os.POSIX_FADV_DONTNEED)
        position += count
