"""The layout of a record: which expert it belongs to and where its sections lie.

A *record* is one expert's bytes: its *sections* in a fixed order, each aligned to 64 bytes. A record and its 4-byte
checksum fill whole 4,096-byte pages. So every record of a store starts on a page, and one O_DIRECT read fetches it. The
layout is format version 1 of ``docs/format.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from .fields import Fields, shown

PAGE = 4096  # bytes; records start on a page
CHECKSUM_BYTES = 4  # CRC-32C, little endian, after every record
ALIGNMENT = 64  # bytes; sections start at multiples of this
ROW_TILE = 64  # quantised projections are padded to multiples of this many rows (a block of torch's int4 kernel)

Bits = Literal[16, 8, 4, 3, 2]
BITS: tuple[Bits, ...] = (16, 8, 4, 3, 2)
TRUNK_BITS: tuple[Bits, ...] = (16, 8, 4)  # widths for trunk matrices, which kernels multiply without unpacking
PAIR_BLOCK = 128  # groups that share one second-level pair when pairs are stored in 8 bits
WEIGHT_TYPES = ("bfloat16", "float16")  # types of 16-bit weights and of biases
SOURCE_TYPES = (*WEIGHT_TYPES, "float32")  # original types of weights that are stored in fewer bits
MAX_SIZE = 1 << 24  # the largest number of rows or columns of a projection, or of items of a bias
GROUPS = {
    "bfloat16": (32, 64, 128, 256),
    "uint8": (16, 32, 64, 128, 256),
}  # group sizes by type of pairs
PAIR_TYPES = tuple(GROUPS)
ITEM_BYTES = {"uint8": 1, "bfloat16": 2, "float16": 2}


class ExpertKey(NamedTuple):
    """Identifies an expert by the number of its Experts module in module order, ``block``, and its index there."""

    block: int
    expert: int

    def __str__(self) -> str:
        return f"block {self.block} expert {self.expert}"


@dataclass(frozen=True, slots=True)
class Section:
    """A typed array within a record: ``offset`` in bytes from the record's start, ``shape`` in items of ``dtype``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Projection:
    """One weight matrix W [N, K] of an expert, y = x @ W.T: N = ``rows`` outputs, K = ``columns`` inputs.

    At 16 bits the record holds the matrix in the module's own shape: [N, K], or [K, N] if ``transposed``. A quantised
    matrix is always stored as [N, K] with N padded to ``padded_rows``. Each ``group`` consecutive weights along K share
    a pair (s, b) of scale and offset: a weight is (q - 8) * s + b, where q is its code after expansion to 4 bits.
    """

    name: str
    rows: int
    columns: int
    bits: Bits
    dtype: str = "bfloat16"  # at 16 bits, the type of the section; at fewer bits, the type of the original weights
    transposed: bool = False  # whether the module holds [K, N]
    group: int = 0  # number of weights in a group; 0 at 16 bits
    pairs: str = ""  # "bfloat16", or "uint8" for pairs quantised to 8 bits in runs of PAIR_BLOCK groups; "" at 16 bits

    @property
    def padded_rows(self) -> int:
        """``rows`` rounded up to a multiple of ROW_TILE."""
        return -(-self.rows // ROW_TILE) * ROW_TILE

    @property
    def shape(self) -> tuple[int, int]:
        """The shape in which the module holds the matrix."""
        return (self.columns, self.rows) if self.transposed else (self.rows, self.columns)


@dataclass(frozen=True, slots=True)
class Bias:
    """A bias vector of an expert, stored in 16 bits."""

    name: str
    size: int
    dtype: str = "bfloat16"


def _pair_pieces(p: Projection) -> list[tuple[str, str, tuple[int, ...]]]:
    groups, rows = p.columns // p.group, p.padded_rows
    if p.pairs == "bfloat16":
        return [(f"{p.name}.pairs", "bfloat16", (groups, rows, 2))]
    # 8-bit pairs: a code for s and one for b of every group. Each run of PAIR_BLOCK groups, in [group, row] order, has
    # a second-level (scale, minimum) for s and another for b.
    blocks = -(-groups * rows // PAIR_BLOCK)
    return [(f"{p.name}.pairs", "uint8", (groups, rows, 2)), (f"{p.name}.pair_scales", "bfloat16", (blocks, 2, 2))]


def _pieces(projections: Iterable[Projection], biases: Iterable[Bias]) -> Iterable[tuple[str, str, tuple[int, ...]]]:
    """Yield (name, dtype, shape) of each section, in the order in which sections are stored."""
    last: list[tuple[str, str, tuple[int, ...]]] = []  # low nibbles of 8-bit codes, which come last
    middle: list[tuple[str, str, tuple[int, ...]]] = []
    for p in projections:
        rows, half = p.padded_rows, p.columns // 2
        match p.bits:
            case 16:
                yield p.name, p.dtype, p.shape
                continue
            case 8:
                yield f"{p.name}.high", "uint8", (rows, half)
                last.append((f"{p.name}.low", "uint8", (rows, half)))
                middle += _pair_pieces(p)
                continue
            case 4:
                yield f"{p.name}.codes", "uint8", (rows, half)
            case 3:
                yield f"{p.name}.codes", "uint8", (rows * p.columns // 4,)
                yield f"{p.name}.plane", "uint8", (rows * p.columns // 8,)
            case 2:
                yield f"{p.name}.codes", "uint8", (rows * p.columns // 4,)
        yield from _pair_pieces(p)
    yield from middle
    for bias in biases:
        yield bias.name, bias.dtype, (bias.size,)
    yield from last


@dataclass(frozen=True)
class RecordLayout:
    """The layout of a record. Its sections are derived from its projections and biases."""

    projections: tuple[Projection, ...]
    biases: tuple[Bias, ...] = ()

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """All sections, in the order in which they are stored."""
        sections, offset = [], 0
        for name, dtype, shape in _pieces(self.projections, self.biases):
            section = Section(name, dtype, shape, offset)
            sections.append(section)
            offset = -(-(offset + section.nbytes) // ALIGNMENT) * ALIGNMENT
        return tuple(sections)

    @cached_property
    def payload_bytes(self) -> int:
        """Number of bytes up to the end of the last section."""
        last = self.sections[-1]
        return last.offset + last.nbytes

    @cached_property
    def record_bytes(self) -> int:
        """Size of the record in bytes: the payload, padded with zeros so that record and checksum fill whole pages."""
        return self.slot_bytes - CHECKSUM_BYTES

    @cached_property
    def slot_bytes(self) -> int:
        """Size of the record with its checksum, in bytes: a multiple of 4,096."""
        return -(-(self.payload_bytes + CHECKSUM_BYTES) // PAGE) * PAGE

    def section(self, name: str) -> Section:
        """Return the section of that name. Raises KeyError."""
        for section in self.sections:
            if section.name == name:
                return section
        raise KeyError(name)

    @property
    def weights(self) -> int:
        """The number of parameters of one expert, without padding."""
        return sum(p.rows * p.columns for p in self.projections) + sum(b.size for b in self.biases)

    def to_json(self) -> dict[str, Any]:
        """Return the layout as JSON for the manifest.

        It includes the sections, so that other programs can read records without the rules that derive them.
        """
        return {
            "record_bytes": self.record_bytes,
            "projections": [asdict(p) for p in self.projections],
            "biases": [asdict(b) for b in self.biases],
            "sections": [asdict(s) | {"shape": list(s.shape)} for s in self.sections],
        }

    @classmethod
    def from_json(cls, value: Fields) -> RecordLayout:
        """Parse a layout. Raises ValueError, which names the field, if it is not a valid layout of this format."""
        projections = tuple(map(_projection, value["projections"].items()))
        biases = tuple(
            Bias(_name(b), b["size"].number(1, MAX_SIZE), b["dtype"].among(WEIGHT_TYPES))
            for b in value["biases"].items()
        )
        names = [p.name for p in projections] + [b.name for b in biases]
        if not projections or len(set(names)) != len(names):
            raise ValueError(f"{value.place}: the parts of its projections and biases are named {shown(names)}")
        layout = cls(projections, biases)
        value.equals(layout.to_json(), "which does not follow from its projections: another kernel layout")
        return layout


def _projection(value: Fields) -> Projection:
    """Parse a projection. Raises ValueError unless the kernels support it."""
    bits: Bits = value["bits"].among(BITS)
    rows, columns = (value[name].number(1, MAX_SIZE) for name in ("rows", "columns"))
    name, transposed = _name(value), value["transposed"].flag()
    if bits == 16:
        dtype = value["dtype"].among(WEIGHT_TYPES)
        return Projection(
            name, rows, columns, bits, dtype, transposed, value["group"].among((0,)), value["pairs"].among(("",))
        )
    pairs = value["pairs"].among(PAIR_TYPES)
    group = value["group"].among(GROUPS[pairs])
    if columns % group:
        raise ValueError(f"{value.place}.group {group} does not divide {columns} columns")
    return Projection(name, rows, columns, bits, value["dtype"].among(SOURCE_TYPES), transposed, group, pairs)


def _name(value: Fields) -> str:
    return value["name"].text(r"\w+", "the name of a parameter")
