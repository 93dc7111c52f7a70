"""The nouns that every module shares: which expert, and how its bytes are laid out. Imports nothing of the project.

A *record* is one expert's bytes: its *sections* in a fixed order, each 64-byte aligned. A record and its 4-byte
checksum fill whole 4,096-byte pages, so that every record of a store starts on a page and one O_DIRECT read fetches it.
The layout is format version 1 of ``docs/format.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

PAGE = 4096  # bytes; records start on a page
CHECKSUM_BYTES = 4  # crc32c, little endian, behind every record
ALIGNMENT = 64  # bytes; sections start on a multiple
ROW_TILE = 64  # rows; quantised projections are padded to a multiple (one block of torch's AVX-512 int4 kernel)

Bits = Literal[16, 8, 4, 3, 2]
BITS: tuple[Bits, ...] = (16, 8, 4, 3, 2)
TRUNK_BITS: tuple[Bits, ...] = (16, 8, 4)  # of matrices beside the experts: what a kernel multiplies where it lies
PAIR_BLOCK = 128  # groups that share one second-level pair when pairs are stored in 8 bits
WEIGHT_TYPES = ("bfloat16", "float16")  # of 16-bit weights and of biases
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

    def _check(self) -> None:
        """Raises ValueError unless every projection and bias is one that this format has."""
        for p in self.projections:
            numbers = (p.rows, p.columns, p.bits, p.group)
            if p.bits not in BITS:
                raise ValueError(f"bits {p.bits!r} are not among {sorted(BITS)}")
            if not all(type(n) is int for n in numbers) or min(p.rows, p.columns) < 1:
                raise ValueError(f"projection {p.name!r} has sizes {numbers}")
            whole = p.group == 0 and p.pairs == "" and p.dtype in WEIGHT_TYPES
            cut = p.group > 0 and p.columns % p.group == 0 and p.pairs in PAIR_TYPES
            if not (whole if p.bits == 16 else cut):
                raise ValueError(f"projection {p.name!r} has groups of {p.group} with pairs {p.pairs!r} of {p.dtype!r}")
        for b in self.biases:
            if type(b.size) is not int or b.size < 1 or b.dtype not in WEIGHT_TYPES:
                raise ValueError(f"bias {b.name!r} has size {b.size} of {b.dtype!r}")
        names = [p.name for p in self.projections] + [b.name for b in self.biases]
        if not self.projections or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
            raise ValueError(f"its parts are named {names}")

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RecordLayout:
        """Raises KeyError, TypeError or ValueError on anything that is not a layout of this format."""
        layout = cls(tuple(Projection(**p) for p in value["projections"]), tuple(Bias(**b) for b in value["biases"]))
        layout._check()
        if layout.to_json() != dict(value):
            raise ValueError("its sections do not follow from its projections: another kernel layout")
        return layout
