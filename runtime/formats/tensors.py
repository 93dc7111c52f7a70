"""A checkpoint's tensors, read by byte ranges.

No file is mapped: a mapped checkpoint counts as resident memory, and a file that is truncated while it is mapped causes
a SIGBUS. Instead each tensor's byte range is checked against the file's size first, and what was read is dropped from
the page cache.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from moetier.tiers.errors import CheckpointError
from moetier.tiers.fields import shown
from moetier.tiers.headers.safetensors import ITEM_BYTES, MAX_HEADER_BYTES, load_header, parse_header, read_header

if TYPE_CHECKING:
    import torch

Bytes = npt.NDArray[np.uint8]

TORCH_NAMES = {
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
CHUNK_BYTES = 8 << 20
MAX_NAME = 1000  # longest name of a tensor; transformers takes parts of names for numbers
READ_AHEAD_BYTES = 64 << 10


class SourceTensor(Protocol):
    """Tensor that the converter reads, dequantised if it is stored in another form."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor as ``read`` returns it."""

    @property
    def dtype(self) -> str:
        """torch's name of the type that ``read`` returns."""

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """Stored tensors that this tensor is read from."""

    def read(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Read ``count`` rows of the leading dimension, from row ``first`` on, into a new tensor [count, ...].

        None reads all rows from ``first`` on.
        """


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Tensor in a safetensors file. If it is not quantised, it is also the source tensor."""

    name: str
    spelling: str  # the file's name of its type, such as "BF16"
    shape: tuple[int, ...]
    file: Path
    offset: int  # in bytes, from the file's start

    @property
    def dtype(self) -> str:
        """torch's name of the type."""
        return TORCH_NAMES[self.spelling]

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """A tuple of only this tensor."""
        return (self,)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in its file."""
        return math.prod(self.shape) * ITEM_BYTES[self.spelling]

    def read(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Read ``count`` rows of the leading dimension, from row ``first`` on, into a new tensor [count, ...].

        None reads all rows from ``first`` on. A scalar is read whole.
        """
        import torch

        shape, offset = self.shape, self.offset
        if shape:
            rows = shape[0] - first if count is None else count
            assert 0 <= first <= first + rows <= shape[0]
            shape = (rows, *shape[1:])
            offset += first * (self.nbytes // self.shape[0] if self.shape[0] else 0)
        tensor = torch.empty(shape, dtype=getattr(torch, self.dtype))
        read_at(self.file, offset, tensor.view(-1).view(torch.uint8).numpy())
        return tensor

    def slice(self, index: int) -> StoredTensor:
        """Return a slice of the leading dimension as a tensor of its own, without that dimension. Nothing is read."""
        size = self.nbytes // self.shape[0]
        return replace(self, shape=self.shape[1:], offset=self.offset + index * size)

    def chunks(self) -> Iterator[Bytes]:
        """Yield the bytes in order, at most CHUNK_BYTES at a time, in one buffer that is reused."""
        buffer = np.empty(min(CHUNK_BYTES, self.nbytes), np.uint8)
        for start in range(0, self.nbytes, CHUNK_BYTES):
            chunk = buffer[: min(CHUNK_BYTES, self.nbytes - start)]
            read_at(self.file, self.offset + start, chunk)
            yield chunk


def read_at(path: Path, offset: int, out: Bytes) -> None:
    """Fill ``out`` with bytes of a file from ``offset`` on.

    Raises CheckpointError if the file is too short or can't be read. What was read is dropped from the page cache,
    which counts towards a memory limit.
    """
    ahead = out.nbytes >= READ_AHEAD_BYTES  # for small reads, read-ahead would read far more than is needed
    done = 0
    try:
        with path.open("rb", buffering=0) as file:
            advice = os.POSIX_FADV_SEQUENTIAL if ahead else os.POSIX_FADV_RANDOM
            os.posix_fadvise(file.fileno(), offset, out.nbytes, advice)
            while done < out.nbytes:
                got = os.preadv(file.fileno(), [out[done : done + CHUNK_BYTES].data], offset + done)
                if got == 0:
                    raise CheckpointError(
                        f"{path} ends at byte {offset + done}; a tensor needs {offset + out.nbytes}.",
                        "Download the checkpoint again.",
                    )
                os.posix_fadvise(file.fileno(), offset + done, got, os.POSIX_FADV_DONTNEED)
                done += got
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}.", "Check the file and its disk.") from error


def read_tensors(path: Path, place: Path | None = None) -> dict[str, StoredTensor]:
    """Return a dictionary from names to tensors of the safetensors file at ``path``.

    The bytes of the tensors are read later: from ``place``, a copy of the file, if it is given, else from ``path``.
    Raises CheckpointError for a file that is not a whole safetensors file.
    """
    fix = "Download the checkpoint again."
    try:
        raw, data = read_header(path, MAX_HEADER_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}.", "Check the file and its disk.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is truncated, or no safetensors file: {error}.", fix) from error
    size, begin = 8 + len(raw) + data, 8 + len(raw)
    try:
        tensors, start = listed(place or path, load_header(raw), size)
    except ValueError as error:
        raise CheckpointError(f"{path} has a malformed header ({error}).", fix) from error
    if start != begin:
        what = "is truncated" if start < begin else "is longer than its header says"
        raise CheckpointError(f"{path} {what}: it has {size} bytes, but its header names {size - start + begin}.", fix)
    return tensors


def listed(path: Path, header: Mapping[str, Any], size: int) -> tuple[dict[str, StoredTensor], int]:
    """Return a dictionary from names to the tensors that a header lists, and the offset in the file of their bytes.

    ``path`` is the file from which the tensors will be read, and ``size`` its size in bytes. Raises ValueError for a
    malformed header.
    """
    entries, data = parse_header(header)
    if strange := [name for name in entries if len(name) > MAX_NAME or not name.isascii()]:
        raise ValueError(f"{shown(strange[0])} is no name of a tensor")
    start = size - data
    tensors = {
        name: StoredTensor(name, entry.dtype, entry.shape, path, start + entry.begin) for name, entry in entries.items()
    }
    return tensors, start
