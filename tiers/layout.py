"""The nouns that every module shares: which expert, and how its bytes are laid out.

A *record* is one expert's bytes: its *sections* in a fixed order, each 64-byte aligned. A record and its 4-byte
checksum fill whole 4,096-byte pages, so that every record of a store starts on a page and one O_DIRECT read fetches it.
The layout is format version 1 of ``docs/format.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from .fields import Fields, shown

PAGE = 4096  # bytes; records start on a page
CHECKSUM_BYTES = 4  # crc32c, little endian, behind every record
ALIGNMENT = 64  # bytes; sections start on a multiple
ROW_TILE = 64  # rows; quantised projections are padded to a multiple (one block of torch's AVX-512 int4 kernel)

Bits = Literal[16, 8, 4, 3, 2]
BITS: tuple[Bits, ...] = (16, 8, 4, 3, 2)
TRUNK_BITS: tuple[Bits, ...] = (16, 8, 4)  # of matrices beside the experts: what a kernel multiplies where it lies
PAIR_BLOCK = 128  # groups that share one second-level pair when pairs are stored in 8 bits
WEIGHT_TYPES = ("bfloat16", "float16")  # of 16-bit weights and of biases
SOURCE_TYPES = (*WEIGHT_TYPES, "float32")  # that weights of fewer bits had before
MAX_SIZE = 1 << 24  # rows, columns, or items of a bias
GROUPS = {"bfloat16": (32, 64, 128, 256), "uint8": (16, 32, 64, 128, 256)}  # weights that share a pair, by its type
PAIR_TYPES = tuple(GROUPS)
ITEM_BYTES = {"uint8": 1, "bfloat16": 2, "float16": 2}


class ExpertKey(NamedTuple):
    """Names one expert: ``block`` is the Experts module, counted in module order; ``expert`` its index in the block."""

    block: int
    expert: int

    def __str__(self) -> str:
        return f"block {self.block} expert {self.expert}"


@dataclass(frozen=True, slots=True)
class Section:
    """A typed piece of a record: ``offset`` in bytes from the record's start, ``shape`` in items of ``dtype``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Projection:
    """One weight matrix of an expert, y = x @ W.T with W of ``rows`` (N, outputs) x ``columns`` (K, inputs).

    At 16 bits the section holds the matrix as the module does: [N, K], or [K, N] if ``transposed``.
    Quantised, it is always [N, K] with N padded to ``padded_rows``; ``group`` weights along K share a pair (s, b),
    w = (q - 8) * s + b with q the code after expansion to 4 bits.
    """

    name: str
    rows: int
    columns: int
    bits: Bits
    dtype: str = "bfloat16"  # of the section at 16 bits; the type that the weights had before at fewer
    transposed: bool = False  # how the module holds it
    group: int = 0  # 0 at 16 bits
    pairs: str = ""  # "" at 16 bits; "bfloat16", or "uint8": 8-bit pairs, quantised over PAIR_BLOCK groups

    @property
    def padded_rows(self) -> int:
        return -(-self.rows // ROW_TILE) * ROW_TILE

    @property
    def shape(self) -> tuple[int, int]:
        """As the module holds it."""
        return (self.columns, self.rows) if self.transposed else (self.rows, self.columns)


@dataclass(frozen=True, slots=True)
class Bias:
    """A vector of an expert, kept in 16 bits."""

    name: str
    size: int
    dtype: str = "bfloat16"


def _pair_pieces(p: Projection) -> list[tuple[str, str, tuple[int, ...]]]:
    groups, rows = p.columns // p.group, p.padded_rows
    if p.pairs == "bfloat16":
        return [(f"{p.name}.pairs", "bfloat16", (groups, rows, 2))]
    # 8-bit pairs: codes for (s, b) of every group, and for each run of PAIR_BLOCK groups (in [group, row] order)
    # a second-level (scale, minimum) for s and one for b
    blocks = -(-groups * rows // PAIR_BLOCK)
    return [(f"{p.name}.pairs", "uint8", (groups, rows, 2)), (f"{p.name}.pair_scales", "bfloat16", (blocks, 2, 2))]


def _pieces(projections: Iterable[Projection], biases: Iterable[Bias]) -> Iterable[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of each section, in the order in which they are stored."""
    last: list[tuple[str, str, tuple[int, ...]]] = []  # low planes of 8-bit codes: behind everything else
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
    """Where each section of a record lies: a pure function of its projections and biases."""

    projections: tuple[Projection, ...]
    biases: tuple[Bias, ...] = ()

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        sections, offset = [], 0
        for name, dtype, shape in _pieces(self.projections, self.biases):
            section = Section(name, dtype, shape, offset)
            sections.append(section)
            offset = -(-(offset + section.nbytes) // ALIGNMENT) * ALIGNMENT
        return tuple(sections)

    @cached_property
    def payload_bytes(self) -> int:
        """Bytes up to the end of the last section."""
        last = self.sections[-1]
        return last.offset + last.nbytes

    @cached_property
    def record_bytes(self) -> int:
        """NB: the payload padded with zeros to 4096 n - 4 bytes, so that record and checksum fill whole pages."""
        return self.slot_bytes - CHECKSUM_BYTES

    @cached_property
    def slot_bytes(self) -> int:
        """Record and checksum: a multiple of 4,096."""
        return -(-(self.payload_bytes + CHECKSUM_BYTES) // PAGE) * PAGE

    def section(self, name: str) -> Section:
        for section in self.sections:
            if section.name == name:
                return section
        raise KeyError(name)

    @property
    def weights(self) -> int:
        """Parameters of one expert, padding not counted."""
        return sum(p.rows * p.columns for p in self.projections) + sum(b.size for b in self.biases)

    def to_json(self) -> dict[str, Any]:
        """What the manifest holds: the derived sections too, so that another reader needs no rule."""
        return {
            "record_bytes": self.record_bytes,
            "projections": [asdict(p) for p in self.projections],
            "biases": [asdict(b) for b in self.biases],
            "sections": [asdict(s) | {"shape": list(s.shape)} for s in self.sections],
        }

    @classmethod
    def from_json(cls, value: Fields) -> RecordLayout:
        """Raises ValueError, naming the field, on anything that is not a layout of this format."""
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
    """Exactly what the kernels multiply with."""
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
