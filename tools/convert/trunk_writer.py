"""Files of the trunk: all tensors that do not belong to experts, some of them quantised, aligned to 64 bytes.

Tensors keep their original names. A quantised matrix is stored as a record; its name is made from its module's path.

transformers computes with the file's bytes in place, and fp32 results of some libraries depend on the alignment of
their inputs. Safetensors allows no gaps between tensors, so alignment depends on their order. Tensors whose size is a
multiple of 64 bytes come first. A matrix of another size is the last tensor of its file. All vectors of other sizes are
at the end of one file; they need no alignment, as no matrix product reads them in place.

A file is written in pieces, synced, and then renamed, so a file with its final name was complete once. A resumed
conversion still compares it with its source, because it may have been changed since.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moetier.runtime.checkpoint.recipe import Recipe
from moetier.runtime.formats.tensors import CHUNK_BYTES, TORCH_NAMES, Bytes, SourceTensor, StoredTensor
from moetier.runtime.kernels.quantise.encode import encode
from moetier.runtime.moe.linear import WEIGHT, matrix_layout
from moetier.tiers.errors import CheckpointError
from moetier.tiers.headers.safetensors import ITEM_BYTES
from moetier.tiers.layout import ALIGNMENT, ROW_TILE, RecordLayout
from moetier.tiers.manifest import FileSum, TrunkRecords
from moetier.tiers.quant.codec import WeightDeviation, sections
from moetier.tiers.store.atomic import large_file
from moetier.tiers.store.checksum import crc32c
from moetier.tiers.store.trunk import read_pieces

from .encoder import pool_of

FILE_BYTES = 2 << 30
PIECE_WEIGHTS = 1 << 20  # of a matrix, quantised by a worker in one call
SPELLINGS = {name: spelling for spelling, name in TORCH_NAMES.items()}


class MatrixRecord:
    """Record of one quantised matrix, as a tensor of the trunk. ``make`` makes it."""

    dtype = "uint8"

    def __init__(
        self,
        path: str,
        recipe: Recipe,
        trunk_records: TrunkRecords,
        *,
        workers: int,
        fast: bool,
    ) -> None:
        """Prepare the record of the module at ``path``.

        Args:
            path: path of the module.
            recipe: makes its weight [rows, columns].
            trunk_records: how many bits the record has, and how they are grouped.
            workers: number of threads that quantise.
            fast: round to the nearest value instead of using HQQ.
        """
        rows, columns = recipe.model.get_parameter(recipe.parameter).shape
        self.layout: RecordLayout = matrix_layout(rows, columns, trunk_records)
        self._path = path
        self._recipe = recipe
        self._trunk_records = trunk_records
        self._workers = workers
        self._fast = fast

    @property
    def shape(self) -> tuple[int]:
        """Shape of the record as a tensor: [bytes]."""
        return (self.layout.payload_bytes,)

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """Stored tensors that the matrix [rows, columns] is made from."""
        return tuple(self._recipe.parts)

    @property
    def peak_bytes(self) -> int:
        """Approximate memory to make the record, in bytes: record, workers, and the matrix if it is read as a whole."""
        (p,) = self.layout.projections
        whole = 0 if self._recipe.is_direct else 2 * p.rows * p.columns * self._recipe.dtype.itemsize
        return self.layout.payload_bytes + whole + self._workers * 16 * max(PIECE_WEIGHTS, ROW_TILE * p.columns)

    def make(self) -> tuple[Bytes, WeightDeviation]:
        """Make the record, anew at each call. Return its bytes, and the deviation of its weights.

        Raises CheckpointError if a weight is not finite, or if the source can't be read.
        """
        (p,) = self.layout.projections
        record = torch.zeros(self.layout.payload_bytes, dtype=torch.uint8)
        views = sections(record, self.layout)
        whole = None if self._recipe.is_direct else self._recipe.make(None)
        most = max(1, PIECE_WEIGHTS // p.columns // ROW_TILE) * ROW_TILE

        def fill(start: int) -> WeightDeviation:
            """Quantise the rows from ``start`` on, ``most`` of them at most, and put them into the record.

            Rows can be quantised apart, as no group spans several rows.
            """
            count = min(most, p.rows - start)
            weights = self._recipe.rows(start, count) if whole is None else whole[start : start + count]
            if not all(map(math.isfinite, torch.stack(weights.aminmax()).tolist())):
                raise CheckpointError(
                    f"{self._path}.weight has weights that are not finite numbers.",
                    "Get an intact copy of the checkpoint.",
                )
            layout = matrix_layout(count, p.columns, self._trunk_records)
            piece = np.empty(layout.record_bytes, np.uint8)
            (deviation,) = encode({WEIGHT: weights}, layout, piece, fast=self._fast).values()
            rows = slice(start, start + layout.projections[0].padded_rows)
            for name, values in sections(torch.from_numpy(piece), layout).items():
                if name == f"{WEIGHT}.pairs":
                    views[name][:, rows] = values  # [K / g, N, 2]
                else:
                    views[name][rows] = values  # codes, [N, K / 2]
            return deviation

        with pool_of(self._workers) as pool:
            deviation = sum(pool.map(fill, range(0, p.rows, most)), WeightDeviation())
        return record.numpy(), deviation


TrunkTensor = SourceTensor | MatrixRecord


@dataclass(frozen=True)
class TrunkFile:
    """One file of the trunk. ``tensors`` has its tensors by name, in the order in which they are written."""

    name: str
    tensors: Mapping[str, TrunkTensor]

    @property
    def header(self) -> bytes:
        """Header of the safetensors file, with the 8 bytes before it that give its length."""
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
        """Size of the file in bytes."""
        return len(self.header) + sum(map(nbytes, self.tensors.values()))

    def is_complete(self, folder: Path) -> bool:
        """Return whether the file exists in ``folder`` and has its full size."""
        path = folder / self.name
        return path.is_file() and path.stat().st_size == self.size

    def make(self, folder: Path, advance: Callable[[int], None]) -> tuple[FileSum, WeightDeviation]:
        """Write the file into ``folder``, unless it is there with the right checksum.

        Return its size and checksum, and the deviation of the weights that were quantised. ``advance`` is called with
        numbers of bytes that are done. Raises CheckpointError if a weight is NaN.
        """
        path = folder / self.name
        if self.is_complete(folder):
            with path.open("rb", buffering=0) as stream:
                stored = functools.reduce(lambda crc, piece: crc32c(piece, crc), read_pieces(stream.fileno()), 0)
            crc, total = 0, WeightDeviation()
            for piece, deviation in self._pieces():
                crc, total = crc32c(piece, crc), total + deviation
            if stored == crc:
                advance(self.size)
                return FileSum(self.size, crc), total
            path.unlink()  # before writing: the disk may have no room for both
        return self.write(folder, advance)

    def write(self, folder: Path, advance: Callable[[int], None]) -> tuple[FileSum, WeightDeviation]:
        """Write the file into ``folder``. The result, ``advance`` and what is raised are those of ``make``."""
        crc, total = 0, WeightDeviation()
        with large_file(folder / self.name, self.size) as file:
            for piece, deviation in self._pieces():
                file.write(piece)
                crc, total = crc32c(piece, crc), total + deviation
                advance(len(piece))
        return FileSum(self.size, crc), total

    def _pieces(self) -> Iterator[tuple[memoryview, WeightDeviation]]:
        """Yield the bytes of the file in pieces, each with the deviation of the weights that were quantised for it."""
        yield memoryview(self.header), WeightDeviation()
        for name, tensor in self.tensors.items():
            if isinstance(tensor, MatrixRecord):
                record, deviation = tensor.make()
                for start in range(0, len(record), CHUNK_BYTES):
                    yield record[start : start + CHUNK_BYTES].data, WeightDeviation() if start else deviation
                continue
            dtype: torch.dtype = getattr(torch, tensor.dtype)
            for piece in tensor.chunks():
                if dtype.is_floating_point and dtype.itemsize > 1 and len(piece):
                    low, _ = torch.from_numpy(piece).view(dtype).aminmax()
                    if math.isnan(float(low)):
                        raise CheckpointError(
                            f"{name} has weights that are not numbers (NaN).", "Get an intact copy of the checkpoint."
                        )
                yield piece.data, WeightDeviation()


def nbytes(tensor: TrunkTensor) -> int:
    """Return the bytes that a tensor of shape [rows, ...] takes in its file."""
    return math.prod(tensor.shape) * ITEM_BYTES[SPELLINGS[tensor.dtype]]


def distribute_trunk(
    tensors: Mapping[str, TrunkTensor], stem: str = "trunk", file_bytes: int = FILE_BYTES
) -> tuple[TrunkFile, ...]:
    """Distribute ``tensors`` over files of about ``file_bytes`` bytes. The files' names begin with ``stem``.

    The result depends only on the tensors' names, shapes and types. Tensors whose size is no multiple of ALIGNMENT are
    placed last: at most one matrix [rows, columns] in each file, and all vectors [length] in one file.
    """
    odd = {name: None for name in tensors if nbytes(tensors[name]) % ALIGNMENT}  # in order
    matrices = [name for name in odd if len(tensors[name].shape) > 1]
    vectors = [name for name in odd if len(tensors[name].shape) <= 1]
    vectors.sort(key=lambda name: -ITEM_BYTES[SPELLINGS[tensors[name].dtype]])
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
    """Return the content of model.safetensors.index.json for the trunk's ``files``."""
    places = {name: file.name for file in files for name in file.tensors}
    total = sum(nbytes(tensor) for file in files for tensor in file.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return json.dumps(index, indent=2).encode() + b"\n"
