"""The layout of a record: its sections, their types and shapes, and where each of them begins.

A *record* has the bytes of one expert. It consists of *sections* in a fixed order; each begins at a multiple of 64
bytes. A record and its checksum of 4 bytes fill whole pages of 4,096 bytes. So every record of a store begins on a
page, and one read with O_DIRECT fetches it. ``docs/format.md`` specifies the layout, as version 1 of the format.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from .fields import Fields, shown

PAGE = 4096  # size of a page in bytes; each record begins on a page
CHECKSUM_BYTES = 4  # size of the CRC-32C, little endian, after each record
ALIGNMENT = 64  # each section begins at a multiple of this many bytes
ROW_TILE = 64  # quantised projections are padded to a multiple of this many rows, as torch's int4 kernel takes them

Bits = Literal[16, 8, 4, 3, 2]
BITS: tuple[Bits, ...] = (16, 8, 4, 3, 2)
TRUNK_BITS: tuple[Bits, ...] = (16, 8, 4)  # supported for matrices of the trunk: kernels multiply these in place
PAIR_BLOCK = 128  # if pairs are stored in 8 bits: the number of groups whose pairs are quantised together
WEIGHT_TYPES = ("bfloat16", "float16")  # types of 16-bit weights and of biases
SOURCE_TYPES = (*WEIGHT_TYPES, "float32")  # types that weights may have before they are quantised
MAX_SIZE = 1 << 24  # the largest number of rows or columns of a projection, or of items of a bias
GROUPS = {
    "bfloat16": (32, 64, 128, 256),
    "uint8": (16, 32, 64, 128, 256),
}  # a dictionary from the type of pairs to the supported group sizes
PAIR_TYPES = tuple(GROUPS)
ITEM_BYTES = {"uint8": 1, "bfloat16": 2, "float16": 2}


class ExpertKey(NamedTuple):
    """Identifies an expert by the number of its block and its index in the block."""

    block: int
    expert: int

    def __str__(self) -> str:
        return f"block {self.block} expert {self.expert}"


@dataclass(frozen=True, slots=True)
class Section:
    """An array in a record, with items of ``dtype``. It begins ``offset`` bytes after the start of the record."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size of the array in bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Projection:
    """One weight matrix W [rows, columns] of an expert, for y = x @ W.T.

    A record with 16 bits holds the matrix in the module's own shape: [rows, columns], or [columns, rows] if
    ``transposed``. A quantised matrix is always stored as [padded_rows, columns]. In each row, every ``group``
    consecutive weights share a pair (s, b) of scale and offset. A weight is (q - 8) * s + b, where q is the weight's
    code after expansion to 4 bits (see ``quant.codec``).
    """

    name: str
    rows: int
    columns: int
    bits: Bits
    dtype: str = "bfloat16"  # with 16 bits the type of the stored weights; with fewer, their type before quantisation
    transposed: bool = False  # true if the module's own shape is [columns, rows]
    group: int = 0  # number of weights in a group; 0 with 16 bits
    pairs: str = ""  # type of the stored pairs, one of PAIR_TYPES; "" with 16 bits

    @property
    def padded_rows(self) -> int:
        """``rows`` rounded up to a multiple of ROW_TILE."""
        return -(-self.rows // ROW_TILE) * ROW_TILE

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix in the module: [rows, columns], or [columns, rows] if ``transposed``."""
        return (self.columns, self.rows) if self.transposed else (self.rows, self.columns)


@dataclass(frozen=True, slots=True)
class Bias:
    """A bias vector of an expert. It has ``size`` items and is stored in 16 bits."""

    name: str
    size: int
    dtype: str = "bfloat16"


def _pair_pieces(p: Projection) -> list[tuple[str, str, tuple[int, ...]]]:
    groups, rows = p.columns // p.group, p.padded_rows
    if p.pairs == "bfloat16":
        return [(f"{p.name}.pairs", "bfloat16", (groups, rows, 2))]
    # Pairs in 8 bits: each group has a code for s and a code for b. The groups, in [group, row] order, are cut into
    # runs of PAIR_BLOCK. Each run has a scale and a minimum for its codes of s, and others for its codes of b.
    blocks = -(-groups * rows // PAIR_BLOCK)
    return [(f"{p.name}.pairs", "uint8", (groups, rows, 2)), (f"{p.name}.pair_scales", "bfloat16", (blocks, 2, 2))]


def _pieces(projections: Iterable[Projection], biases: Iterable[Bias]) -> Iterable[tuple[str, str, tuple[int, ...]]]:
    """Yield the name, type and shape of each section, in the order in which the sections are stored."""
    last: list[tuple[str, str, tuple[int, ...]]] = []  # the low nibbles of 8-bit codes
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
    """The layout of a record. The sections follow from the projections and biases."""

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
        """Number of bytes from the start of the record to the end of its last section."""
        last = self.sections[-1]
        return last.offset + last.nbytes

    @cached_property
    def record_bytes(self) -> int:
        """Size of the record in bytes. It is padded with zeros so that record and checksum fill whole pages."""
        return self.slot_bytes - CHECKSUM_BYTES

    @cached_property
    def slot_bytes(self) -> int:
        """Size of a slot for the record and its checksum, in bytes. It is a multiple of PAGE."""
        return -(-(self.payload_bytes + CHECKSUM_BYTES) // PAGE) * PAGE

    def section(self, name: str) -> Section:
        """Return the section ``name``. Raises KeyError if the layout has no such section."""
        for section in self.sections:
            if section.name == name:
                return section
        raise KeyError(name)

    @property
    def weights(self) -> int:
        """The number of parameters of one expert, without padding."""
        return sum(p.rows * p.columns for p in self.projections) + sum(b.size for b in self.biases)

    def to_json(self) -> dict[str, Any]:
        """Return the layout as a JSON object for the manifest.

        The object includes the sections, so that other programs can read records without knowing how sections follow
        from the projections.
        """
        return {
            "record_bytes": self.record_bytes,
            "projections": [asdict(p) for p in self.projections],
            "biases": [asdict(b) for b in self.biases],
            "sections": [asdict(s) | {"shape": list(s.shape)} for s in self.sections],
        }

    @classmethod
    def from_json(cls, value: Fields) -> RecordLayout:
        """Parse a layout. Raises ValueError, which names the field, if ``value`` is not a layout of this format."""
        projections = tuple(map(_projection, value["projections"].items()))
        biases = tuple(
            Bias(_name(b), b["size"].number(1, MAX_SIZE), b["dtype"].among(WEIGHT_TYPES))
            for b in value["biases"].items()
        )
        names = [p.name for p in projections] + [b.name for b in biases]
        if not projections or len(set(names)) != len(names):
            raise ValueError(
                f"{value.place}.projections must not be empty, and no name may be in projections and biases twice: "
                f"they are named {shown(names)}"
            )
        layout = cls(projections, biases)
        value.equals(layout.to_json(), "it does not follow from the projections (another kernel layout)")
        return layout


def _projection(value: Fields) -> Projection:
    """Parse a projection. Raises ValueError if it is malformed, or if the kernels do not support it."""
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
        raise ValueError(f"{value.place}.group is {group}, which does not divide the {columns} columns")
    return Projection(name, rows, columns, bits, value["dtype"].among(SOURCE_TYPES), transposed, group, pairs)


def _name(value: Fields) -> str:
    return value["name"].text(r"\w+", "the name of a parameter")
