"""Load consecutive rows of a matrix as vectors. Each element of a vector belongs to another row.

A function of ``row_major.py`` multiplies LANES rows at a time, or half as many, and adds nothing up across a vector.
For that, 16 bytes of each row are loaded and transposed: vector i has bytes 4i to 4i + 3 of each row. A ``Coding``
turns these vectors into codes, and loads the scales.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from llvmlite import ir

from moetier.runtime.kernels.jit.emitter import F32, I8, I16, I32, LANES, Emitter, Value, vector
from moetier.runtime.kernels.jit.processor import Dot, Processor
from moetier.tiers.layout import Projection

WIDE = frozenset({Dot.AVX512_VNNI})  # values of Processor.dot with registers of 512 bits; others are taken for 256
UNIT = 16  # bytes of a row that are transposed at a time
NAN_BITS = -0x7F7F7F80  # 0x80808080: the highest bit of each byte
# 2 * v + 12 for the values v of the codes of FP4 numbers
BIASED_E2M1 = (12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0)


class ColumnGroup(NamedTuple):
    """Neighbouring columns of the rows of a tile, which are scaled together."""

    # Vectors in the order of the columns in x. Integers: i8 [4 * lanes], four columns of each row in each vector. FP8
    # numbers: fp32 [lanes], one column in each vector.
    codes: list[Value]
    scale: Value  # fp32 [lanes]
    low: Value | None = None  # what is added to each scaled code, fp32 [lanes]; None for 0


class RowEmitter(Emitter):
    """Emitter of a function that loads ``lanes`` rows of a matrix at a time.

    ``codes`` and ``scales`` are pointers to the sections of a projection.
    """

    codes: Value
    scales: Value

    def __init__(self, module: ir.Module, name: str, arguments: Sequence[Any], processor: Processor) -> None:
        super().__init__(module, name, arguments)
        self.processor = processor
        self.lanes = LANES if processor.dot in WIDE else LANES // 2

    def transposed(self, pointer: Value, offset: Value, stride: int, nbytes: int) -> list[Value]:
        """Load ``nbytes`` bytes of each row, from ``offset`` in the first row on: 16 bytes, or 8 or 4.

        ``stride`` is the distance of two rows in bytes. Returns i32 [lanes] vectors, one for every 4 bytes.
        """
        at, n, lanes = self.at, self.number, self.lanes
        count = nbytes // 4
        pieces = [self.load(pointer, at.add(offset, n(lane * stride)), vector(I32, count)) for lane in range(lanes)]
        if count == 1:
            return [self.concatenate(pieces)]
        nothing = self.all(I32, 0, count)
        pieces = [self.pick(piece, nothing, [*range(count), *[count] * (4 - count)]) for piece in pieces]
        rows = [self.concatenate(pieces[first::4]) for first in range(4)]  # rows[i]: the i-th of every four rows
        lower, upper = (0, 1, lanes, lanes + 1), (2, 3, lanes + 2, lanes + 3)
        words = []
        for order in ((0, lanes, 1, lanes + 1), (2, lanes + 2, 3, lanes + 3))[: count // 2]:
            one, other = (self._interleaved(rows[i], rows[i + 1], order) for i in (0, 2))
            words += [self._interleaved(one, other, lower), self._interleaved(one, other, upper)]
        return words

    def _interleaved(self, one: Value, other: Value, order: Sequence[int]) -> Value:
        """Pick four elements from every 128 bits of two vectors; ``order`` has those of the first 128 bits."""
        return self.pick(one, other, [first + i for first in range(0, self.lanes, 4) for i in order])

    def words(self, pointer: Value, offsets: Sequence[Value], nbytes: int) -> Value:
        """Load ``nbytes`` bytes, 1 to 4, for each row from its offset in bytes on -> i32 [lanes]."""
        loaded = ir.Constant(vector(I32, self.lanes), ir.Undefined)
        for lane, offset in enumerate(offsets):
            word = self.load(pointer, offset, ir.IntType(8 * nbytes))
            loaded = self.at.insert_element(loaded, self.at.zext(word, I32), ir.Constant(I32, lane))
        return loaded

    def halves(self, four: Value) -> tuple[Value, Value]:
        """Return the low and the high halves of the bytes of an i32 vector, i8 [4 * lanes] each."""
        at, count = self.at, 4 * self.lanes
        bytes_ = at.bitcast(four, vector(I8, count))
        return at.and_(bytes_, self.all(I8, 15, count)), at.lshr(bytes_, self.all(I8, 4, count))

    def byte(self, words: Value, number: int) -> Value:
        """Return byte ``number`` of each element of an i32 vector."""
        moved = self.at.lshr(words, self.all(I32, 8 * number, self.lanes)) if number else words
        return self.at.and_(moved, self.all(I32, 255, self.lanes))

    def bits(self, words: Value, first: int, count: int, to: int) -> Value:
        """Move ``count`` bits of each byte, from bit ``first`` on, to bit ``to``: i32 [lanes] -> i8 [4 * lanes]."""
        at, mask = self.at, self.all(I32, (((1 << count) - 1) << to) * 0x01010101, self.lanes)
        move = at.lshr if first > to else at.shl
        moved = move(words, self.all(I32, abs(first - to), self.lanes))
        return at.bitcast(at.and_(moved, mask), vector(I8, 4 * self.lanes))

    def lookup(self, codes: Value, table: Sequence[int]) -> Value:
        """Return the bytes of a table of 16 bytes at the indices ``codes``, i8 [n], which are below 16."""
        count = codes.type.count
        match self.processor.dot:
            case Dot.AVX512_VNNI | Dot.AVX_VNNI | Dot.AVX2:
                name = {32: "llvm.x86.avx2.pshuf.b", 64: "llvm.x86.avx512.pshuf.b.512"}[count]
                all_ = ir.Constant(vector(I8, count), [*table] * (count // 16))
                return self.intrinsic(name, codes.type, all_, codes)
            case Dot.I8MM | Dot.DOTPROD:
                sixteen = ir.Constant(vector(I8, 16), [*table])
                parts = [self.pick(codes, codes, range(first, first + 16)) for first in range(0, count, 16)]
                name = "llvm.aarch64.neon.tbl1.v16i8"
                return self.concatenate([self.intrinsic(name, sixteen.type, sixteen, part) for part in parts])
        values = self.all(I8, table[0], count)
        for code in range(1, 16):
            is_code = self.at.icmp_signed("==", codes, self.all(I8, code, count))
            values = self.at.select(is_code, self.all(I8, table[code], count), values)
        return values

    def fp8(self, four: Value) -> list[Value]:
        """Convert four FP8 numbers in each element of an i32 vector to fp32 numbers that are 2^120 times smaller.

        The format has no infinities. A NaN, in which all bits but the sign are set, is taken for 480: the caller looks
        for NaNs (``nan_bits``), which takes fewer instructions.
        """
        at, lanes = self.at, self.lanes
        kept = self.all(I32, -(1 << 31) | 0x7F << 20, lanes)
        floats = [four] * 4
        for first, words in ((0, at.shl(four, self.all(I32, 8, lanes))), (1, four)):
            pairs = at.bitcast(words, vector(I16, 2 * lanes))
            moved = at.bitcast(at.ashr(pairs, self.all(I16, 4, 2 * lanes)), four.type)
            for place, word in ((first, at.shl(moved, self.all(I32, 16, lanes))), (first + 2, moved)):
                floats[place] = at.bitcast(at.and_(word, kept), vector(F32, lanes))
        return floats

    def nan_bits(self, four: Value) -> Value:
        """Return i32 [lanes]. The bits NAN_BITS of an element show which of its four FP8 numbers are NaN."""
        sizes = self.at.and_(four, self.all(I32, 0x7F7F7F7F, self.lanes))
        return self.at.add(sizes, self.all(I32, 0x01010101, self.lanes))

    def nan_where(self, bits: Value, scale: Value) -> Value:
        """Return ``scale``, fp32 [lanes], with NaN where one of NAN_BITS is set in ``bits``, i32 [lanes]."""
        at, zero = self.at, self.all(I32, 0, self.lanes)
        is_nan = at.icmp_signed("!=", at.and_(bits, self.all(I32, NAN_BITS, self.lanes)), zero)
        return at.select(is_nan, self.all(F32, math.nan, self.lanes), scale)

    def powers(self, exponents: Value) -> Value:
        """Convert numbers in e8m0, in bits 23 to 30 of i32 [lanes], to fp32. 0xFF is NaN, and 2^-127 becomes 0."""
        at, nothing = self.at, self.all(I32, 0xFF << 23, self.lanes)
        bits = at.select(at.icmp_signed("==", exponents, nothing), self.all(I32, 0x7FC00000, self.lanes), exponents)
        return at.bitcast(bits, vector(F32, self.lanes))

    def small_floats(self, words: Value, bits: int, exponent_bits: int) -> Value:
        """Convert the floats in the top bits of ``words``, i32 [lanes], to fp32.

        A float has ``bits`` bits, ``exponent_bits`` of them for its exponent: fp16, or FP8 (e4m3), which has no
        infinities, and one NaN of each sign. Its bits are moved to where fp32 has them and scaled by a power of two,
        which is exact for subnormal numbers too.
        """
        at, lanes, skipped = self.at, self.lanes, 8 - exponent_bits
        moved = at.ashr(words, self.all(I32, skipped, lanes))
        place, all_set = 32 - bits - skipped, (1 << (bits - 1)) - 1
        moved = at.and_(moved, self.all(I32, all_set << place | -(1 << 31), lanes))
        scale = 2.0 ** (127 - (2 ** (exponent_bits - 1) - 1))
        scaled = at.fmul(at.bitcast(moved, vector(F32, lanes)), self.all(F32, scale, lanes))
        largest = 0x7E if bits == 8 else 0x7BFF  # the bits of the largest finite number
        sizes = at.and_(moved, self.all(I32, 0x7FFFFFFF, lanes))
        is_finite = at.icmp_signed("<=", sizes, self.all(I32, largest << place, lanes))
        other = at.bitcast(at.or_(moved, self.all(I32, 0xFF << 23, lanes)), vector(F32, lanes))
        return at.select(is_finite, scaled, other)


class Coding(ABC):
    """Coding in which a projection's weights are stored.

    A weight is ((c - centre) * scale + low) * unit, with a code c from 0 to ``largest``, which is at most 127, and
    with ``scale`` and ``low`` of its ColumnGroup. If ``is_exact``, codes are fp32 numbers instead, and x
    is not rounded.

    If ``is_signed``, ``centre`` and ``largest`` are 128. The codes of the compiled products are then:

    - on a processor that multiplies signed numbers: c - centre, from -128 to 127;
    - on a processor that ``takes_bytes``: c, from 0 to 255.
    """

    centre: int = 0
    largest: int = 0
    unit: float = 1.0
    is_exact = False
    is_signed = False
    is_interleaved = False  # codes of columns 0, 2, 4 and 6 of every eight come before those of columns 1, 3, 5 and 7

    def __init__(self, p: Projection) -> None:
        self.group = p.group  # columns that are added up before they are scaled
        self.chunk = 1  # groups that are loaded together

    @abstractmethod
    def groups(
        self, emit: RowEmitter, row: Value, offsets: Sequence[Value], first: Value, columns: int
    ) -> Iterator[ColumnGroup]:
        """Yield the groups of ``columns`` columns, from group ``first`` on, of the tile of rows that begins at ``row``.

        The last group may be shorter. ``offsets``: bytes from the section's start to each row's scales.
        """

    @staticmethod
    @abstractmethod
    def can_load(p: Projection) -> bool:
        """Return whether the coding can load a projection."""
