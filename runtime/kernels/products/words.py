"""Products of rows with many columns in registers, in one order of summation for any number of rows.

A sum of products begins with 0.0, and its terms are added one by one, in their order. So it has the same bits wherever
a kernel computes it: a tile of several rows and columns only decides which sums are computed together. A *word* has
what one instruction multiplies for a sum: an fp32 number, or two bf16 numbers where the processor has an instruction
for such pairs. It rounds after each of the two products, and takes numbers below 2^-126 as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from moetier.runtime.kernels.jit.emitter import F32, FP32, I16, I32, LANES, Dtype, Emitter, Value, vector
from moetier.runtime.kernels.jit.processor import Processor

WORD = 4  # bytes
_LINE = LANES * WORD  # bytes of a vector of words
TILE = 4 * LANES  # most columns of a tile
HEIGHTS, WIDE_HEIGHTS = (6, 2, 1), (3, 1)  # numbers of rows of a tile, and of one with twice the columns


class _Bfloat(ir.types.Type):  # type: ignore[misc]  # llvmlite has no types
    """LLVM's type of bf16 numbers, which llvmlite lacks."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat)

    def __hash__(self) -> int:
        return hash(_Bfloat)


_WORDS, _FLOATS, _PAIRS = vector(I32, LANES), vector(F32, LANES), vector(_Bfloat(), 2 * LANES)


def has_pairs(processor: Processor, dtype: Dtype, count: int) -> bool:
    """Return whether ``processor`` multiplies rows of ``count`` numbers of ``dtype`` as pairs."""
    return processor.multiplies_pairs and dtype.itemsize < FP32.itemsize and count % (2 * LANES) == 0


class WordEmitter(Emitter):
    """Emitter of products of numbers of ``dtype``.

    A word is a pair of bf16 numbers if ``has_pairs``, which the function of this name returns; else an fp32 number.
    """

    def __init__(
        self,
        module: ir.Module,
        name: str,
        arguments: Sequence[Any],
        dtype: Dtype,
        processor: Processor,
        *,
        has_pairs: bool,
    ) -> None:
        super().__init__(module, name, arguments)
        self.dtype = dtype
        self.has_pairs = has_pairs
        self.numbers = 2 if has_pairs else 1  # in a word
        self.vectors = TILE // LANES if processor.has_wide_registers else 1  # of columns in a tile
        self.columns = LANES * self.vectors
        # LLVM's passes turn these into registers
        self._sums = [[self.at.alloca(_FLOATS) for _ in range(2 * self.vectors)] for _ in range(HEIGHTS[0])]

    def load_words(self, pointer: Value, offset: Value, dtype: Dtype | None = None) -> Value:
        """Emit a load of the next LANES words of a row of numbers from ``pointer`` + ``offset`` bytes.

        The numbers are of ``dtype``, if it is given. Words of them are as others are: pairs, or fp32 numbers.
        """
        if self.has_pairs:
            return self.load(pointer, offset, _WORDS)
        return self.at.bitcast(self.load_floats(pointer, offset, dtype or self.dtype, LANES), _WORDS)

    def add_product(self, total: Value, a: Value, b: Value) -> Value:
        """Emit the fp32 numbers ``total`` plus the products of the words ``a`` and ``b``."""
        at = self.at
        if self.has_pairs:
            name = "llvm.x86.avx512bf16.dpbf16ps.512"
            return self.intrinsic(name, _FLOATS, total, at.bitcast(a, _PAIRS), at.bitcast(b, _PAIRS))
        return self.multiply_add(at.bitcast(a, _FLOATS), at.bitcast(b, _FLOATS), total)

    def words_of(self, parts: Sequence[Value]) -> Value:
        """Emit words from fp32 vectors: two if a word is a pair of bf16 numbers, else one, whose numbers it keeps."""
        at = self.at
        if not self.has_pairs:
            return at.bitcast(parts[0], _WORDS)
        name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
        return at.bitcast(self.intrinsic(name, _PAIRS, parts[1], parts[0]), _WORDS)

    def transpose(self, rows: Sequence[Value]) -> list[Value]:
        """Emit the transposition of a matrix of LANES × LANES words: take its rows, return its columns."""
        quarters = range(0, LANES, 4)

        def mix(a: Value, b: Value, pattern: Sequence[int]) -> Value:
            return self.pick(a, b, [quarter + i + 12 * (i > 3) for quarter in quarters for i in pattern])

        low, high = (0, 4, 1, 5), (2, 6, 3, 7)
        twos = [mix(a, b, half) for a, b in zip(rows[::2], rows[1::2], strict=True) for half in (low, high)]
        fours = [
            mix(a, b, half)
            for i in range(0, LANES, 4)
            for a, b in ((twos[i], twos[i + 2]), (twos[i + 1], twos[i + 3]))
            for half in ((0, 1, 4, 5), (2, 3, 6, 7))
        ]

        def lanes(a: Value, b: Value, chosen: Sequence[int]) -> Value:
            return self.pick(a, b, [4 * lane + i for lane in chosen for i in range(4)])

        pairs = (0, 1, 4, 5), (2, 3, 6, 7)
        return [
            lanes(lanes(fours[c], fours[4 + c], pair), lanes(fours[8 + c], fours[12 + c], pair), side)
            for pair in pairs
            for side in ((0, 2, 4, 6), (1, 3, 5, 7))
            for c in range(4)
        ]

    def tile(
        self, rows: Sequence[Value], columns: Callable[[Value], list[Value]], steps: tuple[Value, Value], vectors: int
    ) -> list[list[Value]]:
        """Emit the sums of a tile: of the products of words of each row with those of LANES * ``vectors`` columns.

        Args:
            rows: pointers to the rows' words.
            columns: emits the vectors of the columns' words of a step.
            steps: the first step, and the one after the last.
            vectors: number of vectors of columns.

        Returns:
            for each row, ``vectors`` vectors of fp32 numbers.
        """
        at, n = self.at, self.number
        sums = [own[:vectors] for own in self._sums[: len(rows)]]
        for own in sums:
            for place in own:
                at.store(self.floats(0.0), place)
        with self.loop(*steps) as step:
            loaded = columns(step)
            for row, own in zip(rows, sums, strict=True):
                word = self.spread(self.load(row, at.mul(step, n(WORD)), I32), LANES)
                for column, place in zip(loaded, own, strict=True):
                    at.store(self.add_product(at.load(place), word, column), place)
        return [[at.load(place) for place in own] for own in sums]

    def stored(self, words: Value, stride: Value, vectors: int) -> Callable[[Value], list[Value]]:
        """Return what ``tile`` needs for columns whose words are in memory: at ``words`` + step * ``stride`` bytes."""

        def load(step: Value) -> list[Value]:
            begin = self.at.mul(step, stride)
            return [self.load(words, self.at.add(begin, self.number(_LINE * i)), _WORDS) for i in range(vectors)]

        return load

    def paired(self, rows: Sequence[Value], offset: Value, vectors: int) -> list[Value]:
        """Emit the words of LANES * ``vectors`` columns, of which each of ``rows`` has one of a word's numbers.

        ``rows`` are pointers to numbers; those of the columns begin ``offset`` bytes from there.
        """
        at, size = self.at, self.dtype.itemsize
        if not self.has_pairs:
            places = [at.add(offset, self.number(size * LANES * i)) for i in range(vectors)]
            return [self.load_words(rows[0], place) for place in places]
        low, high = (self.load(row, offset, vector(I16, LANES * vectors)) for row in rows)
        count = low.type.count
        return [
            at.bitcast(self.pick(low, high, [j + part for j in range(i, i + LANES) for part in (0, count)]), _WORDS)
            for i in range(0, count, LANES)
        ]

    def some(self, count: Value, together: Sequence[int], body: Callable[[int, Value], None]) -> None:
        """Emit loops over ``count`` indices: as often as possible ``together[0]`` of them, then ``together[1]``...

        The last of ``together`` is 1. ``body(number of indices, first index)`` emits the body of each loop.
        """
        at, n, start = self.at, self.number, self.number(0)
        for number in dict.fromkeys(together):
            stop = at.add(start, at.mul(at.udiv(at.sub(count, start), n(number)), n(number)))
            with self.loop(start, stop, number) as first:
                body(number, first)
            start = stop

    def floats_at(self, pointer: Value, index: Value) -> Value:
        """Emit a load of the LANES fp32 numbers from an index on."""
        return self.load(pointer, self.at.mul(index, self.number(4)), _FLOATS)

    def keep(self, value: Value, pointer: Value, index: Value) -> None:
        """Emit a store of fp32 numbers from an index on."""
        self.store(value, pointer, self.at.mul(index, self.number(4)))

    def load_stored(self, pointer: Value, index: Value) -> Value:
        """Emit a load of the LANES words from an index on, which ``load_words`` or others have made."""
        return self.load(pointer, self.at.mul(index, self.number(WORD)), _WORDS)

    def least(self, a: Value, b: Value) -> Value:
        """Emit the smaller of two i64."""
        return self.at.select(self.at.icmp_signed("<", a, b), a, b)

    def most(self, a: Value, b: Value) -> Value:
        """Emit the larger of two i64."""
        return self.at.select(self.at.icmp_signed(">", a, b), a, b)
