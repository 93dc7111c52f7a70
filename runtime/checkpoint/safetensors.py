"""Read a safetensors file by byte ranges, without mapping it.

A mapped checkpoint counts as resident memory, and a file that is truncated while it is mapped causes a SIGBUS. Here
each tensor's place is checked against the file's size first, and what was read is dropped from the page cache.
The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moetier.tiers.errors import CheckpointError
from moetier.tiers.store.trunk import ITEM_BYTES

if TYPE_CHECKING:
    import torch

Bytes = npt.NDArray[np.uint8]

FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
TORCH_NAMES = FLOATS | {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
CHUNK_BYTES = 8 << 20
READ_AHEAD_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Tensor in a safetensors file. ``dtype`` has the file's spelling ("BF16"); ``offset`` is from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in its file."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def read(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Read rows ``first`` to ``first + count`` of the leading dimension into a new tensor [count, ...].

        A scalar is read whole.
        """
        import torch

        shape, offset = self.shape, self.offset
        if shape:
            rows = shape[0] - first if count is None else count
            assert 0 <= first <= first + rows <= shape[0]
            shape = (rows, *shape[1:])
            offset += first * (self.nbytes // self.shape[0] if self.shape[0] else 0)
        tensor = torch.empty(shape, dtype=getattr(torch, TORCH_NAMES[self.dtype]))
        read_at(self.file, offset, tensor.view(-1).view(torch.uint8).numpy())
        return tensor

    def chunks(self) -> Iterator[Bytes]:
        """Yield the bytes in order, at most CHUNK_BYTES at a time, in one buffer that is reused."""
        buffer = np.empty(min(CHUNK_BYTES, self.nbytes), np.uint8)
        for start in range(0, self.nbytes, CHUNK_BYTES):
            chunk = buffer[: min(CHUNK_BYTES, self.nbytes - start)]
            read_at(self.file, self.offset + start, chunk)
            yield chunk


def read_at(path: Path, offset: int, out: Bytes) -> None:
    """Fill ``out``, and drop what was read from the page cache, which counts towards a memory limit.

    Raises CheckpointError where the file is too short or can't be read.
    """
    try:
        with path.open("rb", buffering=0) as file:
            _fill(file.fileno(), path, offset, out)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}.", "Check the file and its disk.") from error


def _fill(descriptor: int, path: Path, offset: int, out: Bytes) -> None:
    ahead = out.nbytes >= READ_AHEAD_BYTES  # for small reads, read-ahead would read far more than is needed
    advice = os.POSIX_FADV_SEQUENTIAL if ahead else os.POSIX_FADV_RANDOM
    os.posix_fadvise(descriptor, offset, out.nbytes, advice)
    done = 0
    while done < out.nbytes:
        got = os.preadv(descriptor, [out[done : done + CHUNK_BYTES].data], offset + done)
        if got == 0:
            raise CheckpointError(
                f"{path} ends at byte {offset + done}; a tensor needs {offset + out.nbytes}.",
                "Download the checkpoint again.",
            )
        os.posix_fadvise(descriptor, offset + done, got, os.POSIX_FADV_DONTNEED)
        done += got


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors by name. Raises CheckpointError for a file that is not a whole safetensors file."""
    fix = "Download the checkpoint again."
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(f"{path} is truncated: {size} bytes, with a header of {length}.", fix)
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}.", "Check the file and its disk.") from error
    try:
        tensors = dict(listed(path, json.loads(raw), 8 + length))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has a malformed header ({error}).", fix) from error
    end = max((t.offset + t.nbytes for t in tensors.values()), default=8 + length)
    if end != size:
        what = "is truncated" if size < end else "is longer than its header says"
        raise CheckpointError(f"{path} {what}: {size} bytes where its header names {end}.", fix)
    return tensors


def listed(path: Path, header: Mapping[str, Any], start: int) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the tensors that a ``header`` lists for the file at ``path``, whose data begin at ``start``.

    An entry's data_offsets are [begin, end], from ``start`` on. Raises ValueError, KeyError, TypeError or
    AttributeError for a malformed header.
    """
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape = str(entry["dtype"]), entry["shape"]
        begin, end = entry["data_offsets"]
        if dtype not in ITEM_BYTES:
            raise ValueError(f"{name} has the unknown type {dtype}")
        if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(f"{name} has the shape {shape}")
        tensor = StoredTensor(name, dtype, tuple(shape), path, start + begin)
        if begin < 0 or end - begin != tensor.nbytes:
            raise ValueError(f"{name} takes {tensor.nbytes} bytes, its offsets say {begin} to {end}")
        yield name, tensor
