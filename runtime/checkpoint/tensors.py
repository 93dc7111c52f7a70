"""A checkpoint's tensors, read by byte ranges; what is stored in FP8 or MXFP4 is dequantised on the way.

No file is mapped: a mapped checkpoint counts as resident memory, and a file that is truncated while it is mapped causes
a SIGBUS. Here each tensor's place is checked against the file's size first, and what was read is dropped from the page
cache.

To the rest of the converter a quantised checkpoint looks like one of 16 bits: a ``SourceTensor`` has one name, a shape
and a type, and rows of its leading dimension can be read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from moetier.tiers.errors import CheckpointError, UnsupportedModelError
from moetier.tiers.store.safetensors import ITEM_BYTES, parse_header, read_header

if TYPE_CHECKING:
    import torch

Bytes = npt.NDArray[np.uint8]

TORCH_NAMES = {
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
CHUNK_BYTES = 8 << 20
READ_AHEAD_BYTES = 64 << 10
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
SCALE_OF = ("weight_scale_inv", "scale", "qscale_weight")  # beside a "weight": DeepSeek-V3, DeepSeek-V4, Mistral
TILE_WEIGHTS = 1 << 24  # dequantised at a time: 64 MiB in fp32


class SourceTensor(Protocol):
    """Tensor that the converter reads. ``dtype`` is torch's name of the type that ``read`` returns."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor as ``read`` returns it."""

    @property
    def dtype(self) -> str:
        """torch's name of the type that ``read`` returns."""

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """Stored tensors that it is read from."""

    def read(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Read rows of the leading dimension into a new tensor [count, ...]."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Tensor in a safetensors file, which is also the source tensor where it is not quantised."""

    name: str
    spelling: str  # of its type, in the file: "BF16"
    shape: tuple[int, ...]
    file: Path
    offset: int  # from the file's start

    @property
    def dtype(self) -> str:
        """Type by torch's name."""
        return TORCH_NAMES[self.spelling]

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The tensor itself."""
        return (self,)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in its file."""
        return math.prod(self.shape) * ITEM_BYTES[self.spelling]

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
    """Fill ``out``, and drop what was read from the page cache, which counts towards a memory limit.

    Raises CheckpointError where the file is too short or can't be read.
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
    """Return the tensors of a file by name, to be read there or from a copy at ``place``.

    Raises CheckpointError for a file that is not a whole safetensors file.
    """
    fix = "Download the checkpoint again."
    try:
        raw, data = read_header(path, MAX_HEADER_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}.", "Check the file and its disk.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is {error}.", fix) from error
    size, begin = 8 + len(raw) + data, 8 + len(raw)
    try:
        tensors, start = listed(place or path, json.loads(raw), size)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a malformed header ({error}).", fix) from error
    if start != begin:
        what = "is truncated" if start < begin else "is longer than its header says"
        raise CheckpointError(f"{path} {what}: {size} bytes where its header names {size - start + begin}.", fix)
    return tensors


def listed(path: Path, header: Mapping[str, Any], size: int) -> tuple[dict[str, StoredTensor], int]:
    """Return the tensors that a header lists for the file at ``path`` of ``size`` bytes, and where their bytes begin.

    Raises ValueError for a malformed header.
    """
    entries, data = parse_header(header)
    start = size - data
    tensors = {
        name: StoredTensor(name, entry.dtype, entry.shape, path, start + entry.begin) for name, entry in entries.items()
    }
    return tensors, start


@dataclass(frozen=True, slots=True)
class Scaled:
    """[..., rows, columns] in FP8, or two FP4 values a byte, times a scale for each block of rows and columns.

    The scales are a grid [..., ceil(rows / block rows), ceil(columns / block columns)], or a single number.
    """

    weight: StoredTensor
    scale: StoredTensor
    block: tuple[int, int]  # rows, columns; a grid with another number of cells divides the weight evenly
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape once FP4 values are unpacked, two of a byte."""
        packed = 2 if self.weight.dtype == "int8" else 1
        return (*self.weight.shape[:-1], self.weight.shape[-1] * packed)

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The weight, [rows, columns / 2] where a byte holds two FP4 values, and its scales."""
        return (self.weight, self.scale)

    def read(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Read and dequantise rows of the leading dimension -> [count, ...]."""
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
        """Return the rows and columns of a block."""
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
        """Read in tiles of whole blocks, so that a large matrix is never in fp32 as a whole."""
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
    """Set out [rows, columns] to weight [rows, columns] times the scale of its block, in fp32.

    ``weight`` is FP8, or int8 [rows, columns / 2] with two FP4 values a byte; the first ``skipped`` rows of its first
    block are missing. ``scale`` is [row blocks, column blocks], or a single number.
    """
    import torch

    if scale.dtype == torch.uint8:  # exponents of powers of two
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
    """Tensor of gpt-oss: FP4 values and their exponents, which are dequantised to [experts, columns, rows].

    Values are stored as [experts, rows, columns / 32, 16], two a byte, and exponents as [experts, rows, columns / 32].
    """

    blocks: StoredTensor
    scales: StoredTensor
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape once dequantised, [experts, columns, rows]."""
        experts, rows, groups, size = self.blocks.shape
        return experts, groups * size * 2, rows

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The values [experts, rows, columns / 32, 16] and the exponents [experts, rows, columns / 32]."""
        return (self.blocks, self.scales)

    def read(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Read and dequantise some experts -> [count, columns, rows]."""
        import torch
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        made: torch.Tensor = convert_moe_packed_tensors(
            self.blocks.read(first, count), self.scales.read(first, count), dtype=getattr(torch, self.dtype)
        )
        return made.contiguous()


def source_tensors(
    tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any] | None, dtype: str
) -> dict[str, SourceTensor]:
    """Return the source tensors by name; quantised ones are read as ``dtype``.

    ``quantization`` is the checkpoint's own quantization_config. Raises UnsupportedModelError for other methods.
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
                f"The checkpoint is quantised with {method}.",
                "Give one in 16 or 32 bits; FP8 (in blocks) and MXFP4 are dequantised on the way.",
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
