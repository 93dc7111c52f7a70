"""The layout of a record: its sections, their types and shapes, and where each of them begins.

A *record* has the bytes of one expert. It consists of *sections* in a fixed order; each begins at a multiple of 64
bytes. A record and its checksum of 4 bytes fill whole pages of 4,096 bytes. So every record of a store begins on a
page, and one read with O_DIRECT fetches it. ``docs/format.md`` specifies the layout, as version 1 of the format.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, NewType

from .fields import Fields, shown

PAGE_BYTES = 4096  # size of a page in bytes; each record begins on a page
CHECKSUM_BYTES = 4  # size of the CRC-32C, little endian, after each record
ALIGNMENT = 64  # each section begins at a multiple of this many bytes
ROW_TILE = 64  # quantised projections are padded to a multiple of this many rows, as torch's int4 kernel takes them

Bits = Literal[16, 8, 6, 5, 4, 3, 2]  # 6 and 5 only in blocks of GGUF files
BITS: tuple[Bits, ...] = (16, 8, 4, 3, 2)
TRUNK_BITS: tuple[Bits, ...] = (16, 8, 4)  # supported for matrices of the trunk: kernels multiply these in place
PAIR_RUN = 128  # if pairs are stored in 8 bits: the number of groups whose pairs are quantised together
WEIGHT_TYPES = ("bfloat16", "float16")  # types of 16-bit weights and of biases
SOURCE_TYPES = (*WEIGHT_TYPES, "float32")  # types that weights may have before they are quantised
MAX_SIZE = 1 << 24  # the largest number of rows or columns of a projection, or of items of a bias
GROUPS = {
    "bfloat16": (32, 64, 128, 256),
    "uint8": (16, 32, 64, 128, 256),
}  # a dictionary from the type of pairs to the supported group sizes
PAIR_TYPES = tuple(GROUPS)
# values of ``Projection.pairs`` for pairs (s, z) of a scale and a zero point, as HQQ, AWQ and GPTQ quantise weights:
# a dictionary from the value to the type in which s and z are stored and w = (c - z) * s is computed
ZERO_POINTS = {"float16_zeros": "float16", "bfloat16_zeros": "bfloat16", "float32_zeros": "float32"}
ZERO_POINT_GROUPS = (16, 32, 64, 128, 256)
ITEM_BYTES = {"uint8": 1, "bfloat16": 2, "float16": 2, "float32": 4}
SCALE_TYPES = {
    "e8m0": "uint8",
    "e4m3": "uint8",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float32": "float32",
}  # a dictionary from the type of a coding's scales to the item type of the section that holds them

PoolSlot = NewType("PoolSlot", int)  # number of a slot in a pool of slots of one size (``cache.pool``)
TierSlot = NewType("TierSlot", int)  # number of a slot in a tier: of all its pools, in the order of their slots


class GgufBlock(NamedTuple):
    """Layout of a block of a GGUF file: consecutive weights of a row, with their scales."""

    weights: int  # number of weights in a block
    nbytes: int  # size of a block
    bits: Bits  # of a weight's code
    group: int  # number of weights that share a scale


# The codings in which records keep a checkpoint's weights. ``runtime.kernels.codings.row_codings`` has compiled code
# for each, and ``runtime.formats`` reads them from checkpoints.
CODINGS: dict[str, Bits] = {"e2m1": 4, "int4": 4, "e4m3": 8}  # a dictionary from codings to their bits per weight
GGUF_BLOCKS: dict[str, GgufBlock] = {  # a dictionary from codings of GGUF files to their blocks
    "q4_0": GgufBlock(32, 18, 4, 32),
    "q8_0": GgufBlock(32, 34, 8, 32),
    "q4_k": GgufBlock(256, 144, 4, 32),
    "q5_k": GgufBlock(256, 176, 5, 32),
    "q6_k": GgufBlock(256, 210, 6, 16),
    "mxfp4": GgufBlock(32, 17, 4, 32),
}
CODING_GROUPS = (16, 32, 64, 128)  # supported group sizes of the codings in CODINGS that have 4 bits
GLOBALS = ("multiply", "divide")  # what is done to scales with the number of their part


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
    code after expansion to 4 bits (see ``quant.codec``). Or they share a pair (s, z) of scale and zero point, and a
    weight is (c - z) * s, where c is its code as it is.

    With a ``coding``, the matrix is stored as in the checkpoint that it comes from: [rows, columns], row after row,
    without padding and without pairs. Each rectangle of ``block_rows`` rows and ``group`` columns shares a scale. A
    matrix may consist of ``parts`` of equal shape, one below the other, each with its own grid of scales. If the coding
    is one of GGUF_BLOCKS, a row is a run of the blocks of a GGUF file, which contain the scales, and the fields that
    follow ``coding`` have their defaults. ``quant.codings`` decodes all codings.
    """

    name: str
    rows: int
    columns: int
    bits: Bits
    dtype: str = "bfloat16"  # with 16 bits the type of the stored weights; with fewer, their type before quantisation
    transposed: bool = False  # true if the module's own shape is [columns, rows]
    group: int = 0  # number of weights of a row that share a pair or a scale; 0 with 16 bits
    pairs: str = ""  # type of the stored pairs, one of PAIR_TYPES or ZERO_POINTS; "" with 16 bits, or with a coding
    # The fields below are left out of a manifest where they have these values.
    coding: str = ""  # how the checkpoint stores weights, one of CODINGS or GGUF_BLOCKS; "": as moetier quantises
    scales: str = ""  # type of the scales of a coding in CODINGS, one of SCALE_TYPES
    block_rows: int = 1  # number of rows that share a scale
    parts: int = 1  # number of matrices of equal shape, one below the other, each with its own grid of scales
    globals: str = ""  # if each part has an fp32 number for all its scales: what is done with it, one of GLOBALS; or ""

    @property
    def padded_rows(self) -> int:
        """Number of stored rows: ``rows``, which is rounded up to a multiple of ROW_TILE unless there is a coding."""
        return self.rows if self.coding else -(-self.rows // ROW_TILE) * ROW_TILE

    @property
    def row_bytes(self) -> int:
        """Size of the codes of a row in bytes. Only for a projection with a coding."""
        if (block := GGUF_BLOCKS.get(self.coding)) is not None:
            return self.columns // block.weights * block.nbytes
        return self.columns * self.bits // 8

    @property
    def part_rows(self) -> int:
        """Number of rows of each part."""
        return self.rows // self.parts

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the grid of scales of each part. Only for a coding in CODINGS."""
        return -(-self.part_rows // self.block_rows), -(-self.columns // self.group)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix in the module: [rows, columns], or [columns, rows] if ``transposed``."""
        return (self.columns, self.rows) if self.transposed else (self.rows, self.columns)


# values that fields of a projection have without a coding
_DEFAULTS = {"coding": "", "scales": "", "block_rows": 1, "parts": 1, "globals": ""}


@dataclass(frozen=True, slots=True)
class Bias:
    """A bias vector of an expert. It has ``size`` items and is stored in 16 bits."""

    name: str
    size: int
    dtype: str = "bfloat16"


def _coded_pieces(p: Projection) -> Iterable[tuple[str, str, tuple[int, ...]]]:
    yield f"{p.name}.codes", "uint8", (p.rows, p.row_bytes)
    if p.coding in GGUF_BLOCKS:
        return
    down, across = p.grid
    yield f"{p.name}.scales", SCALE_TYPES[p.scales], (p.parts * down, across)
    if p.globals:
        yield f"{p.name}.globals", "float32", (p.parts,)


def _pair_pieces(p: Projection) -> list[tuple[str, str, tuple[int, ...]]]:
    groups, rows = p.columns // p.group, p.padded_rows
    if p.pairs != "uint8":
        return [(f"{p.name}.pairs", ZERO_POINTS.get(p.pairs, p.pairs), (groups, rows, 2))]
    # Pairs in 8 bits: each group has a code for s and a code for b. The groups, in [group, row] order, are cut into
    # runs of PAIR_RUN. Each run has a scale and a minimum for its codes of s, and others for its codes of b.
    runs = -(-groups * rows // PAIR_RUN)
    return [(f"{p.name}.pairs", "uint8", (groups, rows, 2)), (f"{p.name}.pair_scales", "bfloat16", (runs, 2, 2))]


def _pieces(projections: Iterable[Projection], biases: Iterable[Bias]) -> Iterable[tuple[str, str, tuple[int, ...]]]:
    """Yield the name, type and shape of each section, in the order in which the sections are stored."""
    last: list[tuple[str, str, tuple[int, ...]]] = []  # the low nibbles of 8-bit codes
    middle: list[tuple[str, str, tuple[int, ...]]] = []
    for p in projections:
        if p.coding:
            yield from _coded_pieces(p)
            continue
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
        """Size of a slot for the record and its checksum, in bytes. It is a multiple of PAGE_BYTES."""
        return -(-(self.payload_bytes + CHECKSUM_BYTES) // PAGE_BYTES) * PAGE_BYTES

    def projection(self, name: str) -> Projection:
        """Return the projection ``name``."""
        return next(p for p in self.projections if p.name == name)

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
            "projections": [
                {name: value for name, value in asdict(p).items() if _DEFAULTS.get(name) != value}
                for p in self.projections
            ],
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
                f"{value.path}.projections must not be empty, and no name may be in projections and biases twice: "
                f"they are named {shown(names)}"
            )
        layout = cls(projections, biases)
        value.equals(layout.to_json(), "it does not follow from the projections (another kernel layout)")
        return layout


def _projection(value: Fields) -> Projection:
    """Parse a projection. Raises ValueError if it is malformed, or if the kernels do not support it."""
    is_coded = value.get("coding") is not None
    bits: Bits = value["bits"].among((*BITS, 6, 5) if is_coded else BITS)
    rows, columns = (value[name].number(1, MAX_SIZE) for name in ("rows", "columns"))
    name, transposed = _name(value), value["transposed"].flag()
    if is_coded:
        return _coded(Projection(name, rows, columns, bits, value["dtype"].among(SOURCE_TYPES), transposed), value)
    if bits == 16:
        dtype = value["dtype"].among(WEIGHT_TYPES)
        return Projection(
            name, rows, columns, bits, dtype, transposed, value["group"].among((0,)), value["pairs"].among(("",))
        )
    pairs = value["pairs"].among((*PAIR_TYPES, *ZERO_POINTS))
    group = value["group"].among(GROUPS.get(pairs, ZERO_POINT_GROUPS))
    if columns % group:
        raise ValueError(f"{value.path}.group is {group}, which does not divide the {columns} columns")
    return Projection(name, rows, columns, bits, value["dtype"].among(SOURCE_TYPES), transposed, group, pairs)


def _coded(p: Projection, value: Fields) -> Projection:
    """Parse the fields of a projection that belong to its coding. Raises ValueError as ``_projection`` does."""
    coding = value["coding"].among((*CODINGS, *GGUF_BLOCKS))
    if (block := GGUF_BLOCKS.get(coding)) is not None:
        value["bits"].among((block.bits,))
        value["group"].among((block.group,))
        value["pairs"].among(("",))
        if p.columns % block.weights:
            raise ValueError(f"{value.path}.columns is {p.columns}, no multiple of {block.weights}")
        return replace(p, coding=coding, group=block.group)
    value["bits"].among((CODINGS[coding],))
    value["pairs"].among(("",))
    group = value["group"].number(1, MAX_SIZE) if p.bits == 8 else value["group"].among(CODING_GROUPS)
    if p.bits == 4 and p.columns % group:
        raise ValueError(f"{value.path}.group is {group}, which does not divide the {p.columns} columns")
    p = replace(p, coding=coding, group=group, scales=value["scales"].among(tuple(SCALE_TYPES)))
    if (parts := value.get("parts")) is not None:
        p = replace(p, parts=parts.number(2, p.rows))
        if p.rows % p.parts:
            raise ValueError(f"{parts.path} is {p.parts}, which does not divide the {p.rows} rows")
    if (block_rows := value.get("block_rows")) is not None:
        p = replace(p, block_rows=block_rows.number(2, MAX_SIZE))
    if (globals_ := value.get("globals")) is not None:
        p = replace(p, globals=globals_.among(GLOBALS))
    return p


def _name(value: Fields) -> str:
    return value["name"].text(r"\w+", "the name of a parameter")
