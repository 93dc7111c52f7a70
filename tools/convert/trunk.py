"""The trunk's files: the tensors that are no experts', each on a 64-byte boundary; under their original names, or as
records of quantised matrices under those of their modules.

Some libraries' fp32 results depend on the alignment of what they read, and transformers uses the file's bytes as they
lie. Safetensors allows no holes, so the order makes the alignment: tensors of a multiple of 64 bytes come first; a
matrix of another size ends its file; vectors of another size, which no matrix product reads in place, end the last one.
Files are written piece by piece, synced, then renamed: a file that is there was whole once. A resumed conversion still
compares it with its source, as it may have been changed since.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from moetier.runtime.checkpoint.dequantize import Plain, SourceTensor
from moetier.runtime.checkpoint.safetensors import CHUNK_BYTES, TORCH_NAMES, Bytes
from moetier.tiers.errors import CheckpointError
from moetier.tiers.layout import ALIGNMENT
from moetier.tiers.manifest import FileSum
from moetier.tiers.store.atomic import PARTIAL, allocate, sync_folder, write_all
from moetier.tiers.store.checksum import crc32c
from moetier.tiers.store.trunk import read_pieces

from .matrices import MatrixRecord

TrunkTensor = SourceTensor | MatrixRecord

FILE_BYTES = 2 << 30
FLUSH_BYTES = 64 << 20  # of dirty pages at most
SPELLINGS = {name: spelling for spelling, name in TORCH_NAMES.items()}


@dataclass(frozen=True)
class TrunkFile:
    """One file to be: its tensors by name, in order."""

    name: str
    tensors: Mapping[str, TrunkTensor]

    @property
    def header(self) -> bytes:
        """Header of the safetensors file, its length included."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, tensor in self.tensors.items():
            end = offset + nbytes(tensor)
            entries[name] = {
                "dtype": SPELLINGS[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(map(nbytes, self.tensors.values()))

    def is_complete(self, folder: Path) -> bool:
        """Whether ``folder`` has the file, in its full size."""
        path = folder / self.name
        return path.is_file() and path.stat().st_size == self.size

    def make(self, folder: Path, advance: Callable[[int], None]) -> FileSum:
        """Write the file into ``folder``, unless an earlier run did and every byte is still the same."""
        if (found := self._found(folder)) is None:
            return self.write(folder, advance)
        advance(self.size)
        return found

    def _found(self, folder: Path) -> FileSum | None:
        """Return the sum of the file that is there; remove it, and return None, if its bytes are not the source's."""
        if not self.is_complete(folder):
            return None
        stored = wanted = 0
        path = folder / self.name
        with path.open("rb", buffering=0) as stream:
            for piece in read_pieces(stream.fileno()):
                stored = crc32c(piece, stored)
        for piece in self._pieces():
            wanted = crc32c(piece, wanted)
        if stored == wanted:
            return FileSum(self.size, stored)
        path.unlink()  # a second copy may be more than the disk holds
        return None

    def write(self, folder: Path, advance: Callable[[int], None]) -> FileSum:
        """Write the file into ``folder``; ``advance`` is called with the bytes of each piece.

        Raises CheckpointError at a NaN.
        """
        partial = folder / (self.name + PARTIAL)
        crc = 0
        with partial.open("wb", buffering=0) as stream:
            allocate(stream.fileno(), self.size)
            written = flushed = 0
            for piece in self._pieces():
                write_all(stream.fileno(), piece, written)
                crc = crc32c(piece, crc)
                written += len(piece)
                advance(len(piece))
                if written - flushed >= FLUSH_BYTES:
                    os.fdatasync(stream.fileno())
                    os.posix_fadvise(stream.fileno(), flushed, written - flushed, os.POSIX_FADV_DONTNEED)
                    flushed = written
            assert written == self.size
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        partial.rename(folder / self.name)
        sync_folder(folder)
        return FileSum(self.size, crc)

    def _pieces(self) -> Iterator[memoryview]:
        yield memoryview(self.header)
        for name, tensor in self.tensors.items():
            for piece in _chunks(tensor):
                _refuse_nan(name, tensor.dtype, piece)
                yield piece.data


def nbytes(tensor: TrunkTensor) -> int:
    """Return the bytes that a tensor of shape [rows, ...] takes in its file."""
    return math.prod(tensor.shape) * _itemsize(tensor)


def _itemsize(tensor: TrunkTensor) -> int:
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    return dtype.itemsize


def plan_trunk(
    tensors: Mapping[str, TrunkTensor], stem: str = "trunk", file_bytes: int = FILE_BYTES
) -> tuple[TrunkFile, ...]:
    """Distribute tensors over files of about ``file_bytes``, by names, shapes and types alone.

    Of those whose size is no multiple of ALIGNMENT, a matrix [rows, columns] ends a file or has one of its own, and all
    vectors [length] end one file.
    """
    odd = {name: None for name in tensors if nbytes(tensors[name]) % ALIGNMENT}  # in order
    matrices = [name for name in odd if len(tensors[name].shape) > 1]
    vectors = sorted((name for name in odd if len(tensors[name].shape) <= 1), key=lambda n: -_itemsize(tensors[n]))
    files: list[list[str]] = [[]]
    size = 0
    for name in tensors:
        if name in odd:
            continue
        if files[-1] and size + nbytes(tensors[name]) > file_bytes:
            files[-1] += matrices[:1]
            del matrices[:1]
            files.append([])
            size = 0
        files[-1].append(name)
        size += nbytes(tensors[name])
    if vectors:
        files[-1] += vectors
    elif matrices:
        files[-1].append(matrices.pop(0))
    files += [[name] for name in matrices]
    files = [members for members in files if members]
    return tuple(
        TrunkFile(f"{stem}-{i:05}-of-{len(files):05}.safetensors", {name: tensors[name] for name in members})
        for i, members in enumerate(files, start=1)
    )


def index_of(files: tuple[TrunkFile, ...]) -> bytes:
    """Make model.safetensors.index.json."""
    places = {name: file.name for file in files for name in file.tensors}
    total = sum(nbytes(tensor) for file in files for tensor in file.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return json.dumps(index, indent=2).encode() + b"\n"


def _chunks(tensor: TrunkTensor) -> Iterator[Bytes]:
    """Yield a tensor's bytes in order, a few MiB at a time."""
    if isinstance(tensor, MatrixRecord):
        yield from tensor.chunks()
        return
    if isinstance(tensor, Plain):
        yield from tensor.stored.chunks()
        return
    rows = tensor.shape[0]
    step = max(1, CHUNK_BYTES * rows // max(nbytes(tensor), 1))
    for first in range(0, rows, step):
        made = tensor.read(first, min(step, rows - first))
        yield made.view(-1).view(torch.uint8).numpy()


def _refuse_nan(name: str, dtype: str, piece: Bytes) -> None:
    kind: torch.dtype = getattr(torch, dtype)
    if not kind.is_floating_point or kind.itemsize == 1 or not len(piece):
        return
    low, _ = torch.from_numpy(piece).view(kind).aminmax()
    if math.isnan(float(low)):
        raise CheckpointError(
            f"{name} has weights that are not numbers (NaN).", "Get an intact copy of the checkpoint."
        )
