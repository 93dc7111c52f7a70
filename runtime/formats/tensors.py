"""A checkpoint's tensors: what every format says of them, and those in files, which are read by byte ranges.

No file is mapped: a mapped checkpoint counts as resident memory, and a file that is truncated while it is mapped causes
a SIGBUS. Instead each tensor's byte range is checked against the file's size first, and what was read is dropped from
the page cache.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt

from moetier.tiers.errors import DOWNLOAD_AGAIN, CheckpointError
from moetier.tiers.fields import shown
from moetier.tiers.headers.safetensors import ITEM_BYTES, MAX_HEADER_BYTES, load_header, parse_header, read_header
from moetier.tiers.layout import Projection, RecordLayout

if TYPE_CHECKING:
    import torch

    from moetier.tiers.quant.zero_points import Levels

Bytes = npt.NDArray[np.uint8]

TORCH_NAMES = {
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
CHUNK_BYTES = 8 << 20
MAX_NAME = 1000  # longest name of a tensor; transformers takes parts of names for numbers
READ_AHEAD_BYTES = 64 << 10


class SourceTensor(ABC):
    """Tensor of a checkpoint as the model has it: reading decodes it, if it is quantised.

    Four members are abstract; ``shape`` and ``dtype`` may be fields of a dataclass. The others say what else can be
    done with the tensor as it is stored. By default that is nothing: experts are converted to records of 16 bits or
    fewer, and the trunk is decoded when a model is loaded.
    """

    __slots__ = ()

    is_plain: ClassVar[bool] = False  # whether ``read`` returns the very numbers of one stored tensor
    reads_rows: ClassVar[bool] = True  # whether reading a few rows does not read the whole tensor
    # What `convert` does with the weights of experts without --bits. True: it keeps them as they are stored, and
    # refuses the checkpoint if records can't hold them so (``record_projection``). False: it quantises them anew, to
    # 4 bits, and says so.
    is_kept: ClassVar[bool] = False

    if TYPE_CHECKING:  # a property would be taken for the default of a field

        @property
        @abstractmethod
        def shape(self) -> tuple[int, ...]:
            """Shape of the whole tensor as ``read`` returns it."""

        @property
        @abstractmethod
        def dtype(self) -> str:
            """torch's name of the type that ``read`` returns."""

    @property
    @abstractmethod
    def parts(self) -> tuple[StoredTensor, ...]:
        """Stored tensors that this tensor is read from; () if it is not read from files."""

    @abstractmethod
    def read(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Read ``count`` rows of the leading dimension, from row ``first`` on, into a new tensor [count, ...].

        None reads all rows from ``first`` on; ``count`` may be 0. A quantised weight is computed in float32, and
        rounded once, to ``dtype``. Raises CheckpointError for numbers that the format does not have, such as too large
        codes. Types and shapes are checked before, when the tensor is made: `moetier plan` never
        reads. Scales that are not finite are best refused here, by name; else `convert` refuses the weights of experts.
        """

    @property
    def stored_name(self) -> str:
        """Name of the first stored tensor, for messages."""
        return self.parts[0].name if self.parts else "a tensor"

    def chunks(self) -> Iterator[Bytes]:
        """Read the tensor, and yield its bytes in order, about CHUNK_BYTES at a time."""
        import torch

        nbytes = math.prod(self.shape) * getattr(torch, self.dtype).itemsize
        rows = self.shape[0]
        most = max(1, CHUNK_BYTES * rows // max(nbytes, 1))
        for first in range(0, rows, most):
            yield self.read(first, min(most, rows - first)).view(-1).view(torch.uint8).numpy()

    # methods for tensors that hold experts

    def by_expert(self, experts: int) -> list[list[SourceTensor]]:
        """Divide a tensor of all experts, [experts, ...], without reading it. Return [] if it can't be divided.

        The result has a list for each run of rows of an expert's parameter, in order: one tensor for each expert.
        """
        return []

    @property
    def alternate(self) -> bool:
        """Whether row 0 of run 0 is followed by row 0 of run 1, as in interleaved gate and up."""
        return False

    @property
    def transposed(self) -> bool:
        """Whether what ``by_expert`` returns as rows are the columns of the parameter."""
        return False

    # records that hold the weights of experts as they are stored

    def record_projection(self, plain: Projection, runs: Runs) -> Projection:
        """Return the projection of records that hold a parameter as it is stored.

        ``plain`` is the projection with 16 bits, in the type of the parameter. ``runs`` is what ``Recipe.by_expert``
        returns. Raises ValueError, which says why, if records can't hold the parameter so.
        """
        raise ValueError(f"{self.stored_name} is stored in a way that no record can hold")

    def component(self, name: str) -> StoredTensor:
        """Return the stored tensor whose bytes fill the section ``name`` of a record, such as "codes".

        ``name`` is "" in a record of 16 bits. Raises ValueError if a record's bytes are in another order.
        """
        raise ValueError(f"{self.stored_name}: its bytes are in another order than a record's")

    def levels(self, group: int) -> Levels:
        """Read the codes, and a scale and a zero point for each group of ``group`` consecutive weights of a row.

        Only for a tensor whose ``record_projection`` has zero points (``ZERO_POINTS``).
        """
        raise ValueError(f"{self.stored_name} has no zero points")

    def members_of(self, runs: Runs) -> list[Self]:
        """Return all tensors of ``runs``. Raises ValueError unless they are of the same class as this one."""
        members: list[Any] = [tensor for tensors in runs for tensor in tensors]
        if any(type(tensor) is not type(self) for tensor in members):
            raise ValueError(f"{members[0].stored_name} and the weights that belong to it are not stored alike")
        return members

    # the trunk

    def as_matrix(self) -> StoredMatrix | None:
        """Return the stored matrix if modules can multiply with it undecoded; else None."""
        return None


Runs = Sequence[Sequence[SourceTensor]]  # for each run of rows of an expert's parameter, the tensors of all experts


@dataclass(frozen=True, slots=True)
class StoredTensor(SourceTensor):
    """Tensor in a file, as the file's header lists it."""

    is_plain = True

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
        read_range(self.file, offset, tensor.view(-1).view(torch.uint8).numpy())
        return tensor

    def by_expert(self, experts: int) -> list[list[SourceTensor]]:
        """Return one run: a slice for each expert."""
        return [[self.slice(index) for index in range(experts)]] if self.shape[:1] == (experts,) else []

    def component(self, name: str) -> StoredTensor:
        """Return this tensor."""
        return self

    def slice(self, index: int) -> StoredTensor:
        """Return a slice of the leading dimension as a tensor of its own, without that dimension. Nothing is read."""
        return replace(self, shape=self.shape[1:], offset=self.offset + index * (self.nbytes // self.shape[0]))

    def chunks(self) -> Iterator[Bytes]:
        """Yield the bytes in order, at most CHUNK_BYTES at a time, in one buffer that is reused."""
        buffer = np.empty(min(CHUNK_BYTES, self.nbytes), np.uint8)
        for start in range(0, self.nbytes, CHUNK_BYTES):
            chunk = buffer[: min(CHUNK_BYTES, self.nbytes - start)]
            read_range(self.file, self.offset + start, chunk)
            yield chunk


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """Matrix of the trunk as it lies in its file. ``layout`` is that of its bytes, taken as a record."""

    stored: StoredTensor
    layout: RecordLayout
    order: npt.NDArray[np.int64] | None = None  # for each row of the model, its number in the file; None: the same


class Numbers(Protocol):
    """Codes, scales or zero points in a checkpoint: a stored tensor, or numbers that are computed from several."""

    @property
    def name(self) -> str:
        """Name of the stored tensor, or of the first of several."""

    @property
    def dtype(self) -> str:
        """torch's name of the type that ``read`` returns."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded weights, as ``read`` returns them without arguments."""

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """Stored tensors that the numbers are read from."""

    def read(self) -> torch.Tensor:
        """Read all numbers, in ``shape``: [groups, rows], [groups, 1] or [1, groups]."""


def check(stored: Numbers, shape: Sequence[int | str], *dtypes: str) -> None:
    """Raise CheckpointError unless a stored tensor has a type of ``dtypes`` and the shape ``shape``, and is not empty.

    A name in ``shape``, such as "rows", stands for any size.
    """
    expected = [size if isinstance(name, str) else name for name, size in zip(shape, stored.shape, strict=False)]
    if (
        len(shape) != len(expected)
        or tuple(expected) != stored.shape
        or stored.dtype not in dtypes
        or 0 in stored.shape
    ):
        raise CheckpointError(
            f"{stored.name} is {stored.dtype} {list(stored.shape)}, not {' or '.join(dtypes)} "
            f"[{', '.join(map(str, shape))}].",
            DOWNLOAD_AGAIN,
        )


def read_range(path: Path, offset: int, out: Bytes) -> None:
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
                        DOWNLOAD_AGAIN,
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
    fix = DOWNLOAD_AGAIN
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
