"""Read the header of a GGUF file, which is not trusted: its metadata, and the type, shape and place of each tensor.

The format is specified at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Versions 2 and 3 are read, little
endian. A header that breaks the specification is refused before anything else of the file is read.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from moetier.tiers.fields import shown
from moetier.tiers.manifest import MAX_BYTES

SUFFIX = ".gguf"  # of the names of such files
MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 64 << 20  # largest header that is read; a vocabulary of 260,000 tokens takes 10 MiB
MAX_VALUES = 1 << 21  # most values of all arrays together
MAX_TENSORS = 200_000
MAX_KEYS = 10_000
MAX_TEXT = 1000  # longest key or name of a tensor, in bytes
MAX_DIMENSIONS = 4
CHUNK_BYTES = 1 << 20  # bytes of a header that are read at first; each further read doubles what has been read
STRING, ARRAY = 8, 9  # types of values
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

GGML_TYPES = {  # by ggml's number of a type: its name, and the weights and bytes of a block
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
}  # fmt: skip

Value = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]


class GgufEntry(NamedTuple):
    """The entry of one tensor in a header."""

    ggml_type: str  # name of its type, such as "Q4_K"
    number: int  # ggml's number of the type
    shape: tuple[int, ...]  # columns last
    row_bytes: int  # bytes of each row
    begin: int  # offset of its first byte in the file

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape[:-1]) * self.row_bytes


class GgufHeader(NamedTuple):
    """The header of a GGUF file."""

    metadata: dict[str, Value]
    tensors: dict[str, GgufEntry]
    nbytes: int  # number of bytes before those of tensors
    digest: str  # their sha256


# a file as it was when its header was read: its path, size and time of the last change in ns
_State = tuple[Path, int, int]
_digests: dict[_State, str] = {}  # of headers that were read


def read_gguf(path: Path) -> GgufHeader:
    """Read and check a header. The last one is kept, and read again only if the file has changed.

    Raises ValueError, which says what is wrong, or OSError if the file can't be read.
    """
    return _last(_state(path))


def digest_of(path: Path) -> str:
    """Return the digest of a header, which is read only if it was not read since the file's last change.

    Raises as ``read_gguf``.
    """
    state = _state(path)
    return _digests.get(state) or _read(state).digest


def _state(path: Path) -> _State:
    status = path.stat()
    return path.absolute(), status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=1)
def _last(state: _State) -> GgufHeader:
    return _read(state)


def _read(state: _State) -> GgufHeader:
    with state[0].open("rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        cursor = _Cursor(stream.fileno(), min(size, MAX_HEADER_BYTES))
        if (magic := cursor.take(4)) != MAGIC:
            raise ValueError(f"it begins with {magic!r}, and not with {MAGIC!r}")
        (version,) = cursor.unpack("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            raise ValueError("it is big endian" if swapped else f"its version is {version}, not 2 or 3")
        tensors, keys = cursor.unpack("QQ")
        if tensors > MAX_TENSORS or keys > MAX_KEYS:
            raise ValueError(
                f"it has {tensors:,} tensors and {keys:,} keys; at most {MAX_TENSORS:,} and {MAX_KEYS:,} are read"
            )
        metadata = dict[str, Value]()
        for _ in range(keys):
            key = cursor.text(MAX_TEXT, "a key")
            if key in metadata:
                raise ValueError(f"it has the key {shown(key)} twice")
            metadata[key] = cursor.value(key)
        entries = dict[str, GgufEntry]()
        for _ in range(tensors):
            name = cursor.text(MAX_TEXT, "the name of a tensor")
            if name in entries:
                raise ValueError(f"it has the tensor {shown(name)} twice")
            entries[name] = cursor.entry(name)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {shown(alignment)}, not a power of two up to 65,536")
        start = -(-cursor.at // alignment) * alignment
        placed = {name: entry._replace(begin=start + entry.begin) for name, entry in entries.items()}
        _check_places(placed, start, alignment, size)
        digest = _digests[state] = hashlib.sha256(memoryview(cursor.data)[: cursor.at]).hexdigest()
        return GgufHeader(metadata, placed, cursor.at, digest)


def _check_places(entries: dict[str, GgufEntry], start: int, alignment: int, size: int) -> None:
    """Raise ValueError unless all tensors are aligned, in the file of ``size`` bytes, and apart from each other."""
    for name, entry in entries.items():
        if (entry.begin - start) % alignment:
            raise ValueError(f"{shown(name)} begins at {entry.begin - start:,}, no multiple of {alignment}")
        if entry.begin + entry.nbytes > size:
            raise ValueError(f"{shown(name)} ends at {entry.begin + entry.nbytes:,}, but the file has {size:,} bytes")
    ordered = sorted(entries.items(), key=lambda item: (item[1].begin, item[1].nbytes))
    for (name, entry), (after, following) in pairwise(ordered):
        if entry.begin + entry.nbytes > following.begin:
            raise ValueError(f"{shown(name)} and {shown(after)} overlap")


class _Cursor:
    """Reads a header from its beginning on, no further than ``most`` bytes."""

    def __init__(self, descriptor: int, most: int) -> None:
        self.descriptor = descriptor
        self.most = most
        self.data = b""  # the file's first bytes
        self.at = 0
        self.values = 0  # number of values of all arrays so far

    def need(self, count: int) -> None:
        """Read more of the file, until ``count`` bytes follow the present place. Raises ValueError if it has fewer."""
        end = self.at + count
        if end > self.most:
            raise ValueError(f"it is truncated, or its header has more than {MAX_HEADER_BYTES:,} bytes")
        pieces = [self.data]
        have = len(self.data)
        while have < end:
            piece = os.pread(self.descriptor, min(max(CHUNK_BYTES, have, end - have), self.most - have), have)
            if not piece:
                raise ValueError("it is truncated")
            pieces.append(piece)
            have += len(piece)
        if pieces[1:]:
            self.data = b"".join(pieces)

    def take(self, count: int) -> bytes:
        self.need(count)
        self.at += count
        return self.data[self.at - count : self.at]

    def unpack(self, code: str) -> tuple[int, ...]:
        size = struct.calcsize(f"<{code}")
        return struct.unpack(f"<{code}", self.take(size))

    def text(self, most: int, what: str) -> str:
        (length,) = self.unpack("Q")
        if length > most:
            raise ValueError(f"{what} has {length:,} bytes, more than {most:,}")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is not UTF-8") from error

    def value(self, key: str) -> Value:
        (value_type,) = self.unpack("I")
        if value_type != ARRAY:
            (one,) = self._values(key, value_type, 1)
            return one
        value_type, count = self.unpack("IQ")
        self.values += count
        if self.values > MAX_VALUES:
            raise ValueError(f"with {shown(key)}, its arrays have {self.values:,} values, more than {MAX_VALUES:,}")
        texts: list[str] = [*self._values(key, value_type, count)]  # type: ignore[list-item]  # all of one type
        return texts

    def _values(self, key: str, value_type: int, count: int) -> Iterator[int | float | bool | str]:
        if value_type == STRING:
            yield from self._texts(key, count)
        elif value_type in NUMBERS:
            yield from self.unpack(f"{count}{NUMBERS[value_type]}")
        else:
            raise ValueError(f"{shown(key)} has values of type {value_type}, which GGUF does not define")

    def _texts(self, key: str, count: int) -> Iterator[str]:
        """Yield ``count`` strings. This takes less time for each than ``text``: a vocabulary has some 100,000."""
        length_at = struct.Struct("<Q").unpack_from
        for _ in range(count):
            at = self.at
            if at + 8 > len(self.data):
                self.need(8)
            end = at + 8 + length_at(self.data, at)[0]
            if end > len(self.data):
                self.need(end - at)
            try:
                yield self.data[at + 8 : end].decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{shown(key)} has a text that is not UTF-8") from error
            self.at = end

    def entry(self, name: str) -> GgufEntry:
        """Read what follows a tensor's name. The result's ``begin`` counts from the first byte of all tensors."""
        (dimensions,) = self.unpack("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"{shown(name)} has {dimensions:,} dimensions, not 1 to {MAX_DIMENSIONS}")
        shape = self.unpack(f"{dimensions}Q")[::-1]
        number, begin = self.unpack("IQ")
        if number not in GGML_TYPES:
            raise ValueError(f"{shown(name)} has the unknown type {number}")
        ggml_type, weights, size = GGML_TYPES[number]
        if math.prod(shape) * size > MAX_BYTES * weights or begin > MAX_BYTES or min(shape) < 1:
            raise ValueError(f"{shown(name)} has the shape {list(shape)} and begins at {begin:,}")
        if shape[-1] % weights:
            raise ValueError(f"{shown(name)} has {shape[-1]:,} columns, no multiple of {weights} as {ggml_type} needs")
        return GgufEntry(ggml_type, number, shape, shape[-1] // weights * size, begin)
