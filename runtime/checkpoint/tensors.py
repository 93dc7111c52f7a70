"""A checkpoint's tensors, read by byte ranges. Tensors in FP8 or MXFP4 are dequantised when they are read.

No file is mapped: a mapped checkpoint counts as resident memory, and a file that is truncated while it is mapped causes
a SIGBUS. Instead each tensor's byte range is checked against the file's size first, and what was read is dropped from
the page cache.

To the converter, a tensor of a quantised checkpoint looks like one in 16 bits: a ``SourceTensor`` has one name, a shape
and a type, and rows of its leading dimension can be read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from moetier.tiers.errors import CheckpointError, UnsupportedModelError
from moetier.tiers.fields import shown
from moetier.tiers.store.safetensors import ITEM_BYTES, MAX_HEADER_BYTES, load_header, parse_header, read_header

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
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# names of the scales of a "weight": in DeepSeek-V3, DeepSeek-V4, Mistral
SCALE_OF = ("weight_scale_inv", "scale", "qscale_weight")
TILE_WEIGHTS = 1 << 24  # most weights dequantised at a time: 64 MiB in fp32


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


@dataclass(frozen=True, slots=True)
class Scaled:
    """Tensor [..., rows, columns] stored in FP8, or in FP4 with two values in a byte, with a scale for each block.

    A block is a rectangle of rows and columns. The scales are a grid [..., ceil(rows / block rows), ceil(columns /
    block columns)], or a single number.
    """

    weight: StoredTensor
    scale: StoredTensor
    # rows, columns; ignored if the grid does not have ceil(size / block) cells, which then divide the weight evenly
    block: tuple[int, int]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, with FP4 values counted one by one."""
        packed = 2 if self.weight.dtype == "int8" else 1
        return (*self.weight.shape[:-1], self.weight.shape[-1] * packed)

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The weight, which is [rows, columns / 2] if a byte holds two FP4 values, and its scales."""
        return (self.weight, self.scale)

    def read(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Read and dequantise ``count`` rows of the leading dimension, from row ``first`` on, as [count, ...]."""
        import torch

        count = self.shape[0] - first if count is None else count
        out = torch.empty((count, *self.shape[1:]), dtype=getattr(torch, self.dtype))
        if len(self.shape) == 2:
            self._read_rows(first, out)
        else:
            for i in range(count):
                whole = len(self.scale.shape) < len(self.weight.shape)
                scale = self.scale.read() if whole else self.scale.read(first + i, 1)[0]
                dequantise_into(out[i], self.weight.read(first + i, 1)[0], scale, self._steps(scale))
        return out

    def _steps(self, scale: torch.Tensor) -> tuple[int, int]:
        """Return the rows and columns of a block. Raises CheckpointError if the scales do not fit the weight."""
        if scale.numel() == 1:
            return self.shape[-2], self.shape[-1]
        steps = []
        for size, cells, block in zip(self.shape[-2:], scale.shape[-2:], self.block, strict=True):
            step = block if -(-size // block) == cells else max(size // cells, 1)
            if -(-size // step) != cells:
                raise CheckpointError(
                    f"{self.scale.name} has shape {list(scale.shape)}, which does not fit {self.weight.name} "
                    f"of shape {list(self.shape)}.",
                    "Download the checkpoint again.",
                )
            steps.append(step)
        return steps[0], steps[1]

    def _read_rows(self, first: int, out: torch.Tensor) -> None:
        """Fill ``out`` with dequantised rows of the weight, from row ``first`` on.

        A limited number of rows is dequantised at a time, so that a large matrix is never in fp32 as a whole. All but
        the last of these parts end where a block of weights with a common scale ends.
        """
        scale = self.scale.read()
        rows, columns = self._steps(scale)
        tile = max(1, TILE_WEIGHTS // (self.shape[1] * rows)) * rows
        start = first
        while start < first + len(out):
            stop = min(start - start % rows + tile, first + len(out))
            cells = scale if scale.numel() == 1 else scale[start // rows : -(-stop // rows)]
            target = out[start - first : stop - first]
            dequantise_into(target, self.weight.read(start, stop - start), cells, (rows, columns), start % rows)
            start = stop


def dequantise_into(
    out: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], skipped: int = 0
) -> None:
    """Write the dequantised weight to ``out`` [rows, columns]: each value times the scale of its block, in fp32.

    ``weight`` is FP8 [rows, columns], or int8 [rows, columns / 2] with two FP4 values in a byte. ``scale`` is [row
    blocks, column blocks], or a single number. ``block`` is the number of rows and of columns of a block. The first row
    of ``weight`` is row ``skipped`` of its block.
    """
    import torch

    if scale.dtype == torch.uint8:  # scales are powers of two, stored as exponents
        scale = (scale.float() - 127).exp2()
    scale = scale.float()
    if weight.dtype == torch.int8:
        codes = weight.view(torch.uint8)
        table = torch.tensor(E2M1)
        values = torch.stack([table[(codes & 0xF).int()], table[(codes >> 4).int()]], dim=-1).flatten(-2)
    else:
        values = weight.float()
    if scale.numel() == 1:
        values.mul_(scale.reshape(()))
    else:
        by_row = scale.repeat_interleave(block[0], dim=0)[skipped : skipped + len(values)]
        for column, start in enumerate(range(0, values.shape[1], block[1])):
            values[:, start : start + block[1]].mul_(by_row[:, column, None])
    out.copy_(values)


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """Tensor of gpt-oss in MXFP4: FP4 values with shared exponents. It is dequantised to [experts, columns, rows].

    The values are stored as [experts, rows, columns / 32, 16], two in a byte, and the exponents as [experts, rows,
    columns / 32].
    """

    blocks: StoredTensor
    scales: StoredTensor
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantised tensor, [experts, columns, rows]."""
        experts, rows, groups, size = self.blocks.shape
        return experts, groups * size * 2, rows

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The stored values [experts, rows, columns / 32, 16] and exponents [experts, rows, columns / 32]."""
        return (self.blocks, self.scales)

    def read(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Read and dequantise ``count`` experts from expert ``first`` on, as [count, columns, rows]."""
        import torch
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        made: torch.Tensor = convert_moe_packed_tensors(
            self.blocks.read(first, count), self.scales.read(first, count), dtype=getattr(torch, self.dtype)
        )
        return made.contiguous()


def source_tensors(
    tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any] | None, dtype: str
) -> dict[str, SourceTensor]:
    """Return a dictionary from names to source tensors. Quantised tensors are read as ``dtype``, by torch's name.

    ``quantization`` is the checkpoint's own quantization_config, or None. Raises UnsupportedModelError for methods
    other than FP8 and MXFP4, and CheckpointError if an FP8 tensor has no scale.
    """
    method = quantization.get("quant_method") if quantization else None
    match method:
        case None:
            return dict(tensors)
        case "fp8":
            assert quantization
            rows, columns = quantization.get("weight_block_size") or (128, 128)
            return dict(_fp8(tensors, (int(rows), int(columns)), dtype))
        case "mxfp4":
            return dict(_mxfp4(tensors, dtype))
        case _:
            raise UnsupportedModelError(
                f"The checkpoint is quantised with {method}, which moetier can't read.",
                "Give a checkpoint in 16 or 32 bits, in FP8 with a scale for each block, or in MXFP4.",
            )


def _fp8(tensors: Mapping[str, StoredTensor], block: tuple[int, int], dtype: str) -> Iterator[tuple[str, SourceTensor]]:
    scales = {}
    for name in tensors:
        stem, _, leaf = name.rpartition(".")
        candidates = [f"{stem}.{scale}" for scale in SCALE_OF] if leaf == "weight" else [f"{name}_scale_inv"]
        if found := next((c for c in candidates if c in tensors), None):
            scales[name] = found
    used = set(scales.values())
    for name, tensor in tensors.items():
        if name in scales:
            yield name, Scaled(tensor, tensors[scales[name]], block, dtype)
        elif tensor.dtype.startswith("float8") and name not in used:
            raise CheckpointError(f"{name} is in FP8 but has no scale.", "Download the checkpoint again.")
        elif name not in used and not name.endswith((".activation_scale", ".input_scale")):
            yield name, tensor


def _mxfp4(tensors: Mapping[str, StoredTensor], dtype: str) -> Iterator[tuple[str, SourceTensor]]:
    for name, tensor in tensors.items():
        stem = name.removesuffix("_blocks")
        if stem != name and f"{stem}_scales" in tensors:
            yield stem, Mxfp4(tensor, tensors[f"{stem}_scales"], dtype)
        elif not (name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in tensors):
            yield name, tensor
