"""Load matrices in the blocks of GGUF files, which have the codes and scales of 32 or 256 consecutive weights of a row.

``tiers/quant/gguf_blocks.py`` has the layouts, and decodes them. Two small blocks are loaded together. Most are no
multiple of four bytes, so that words of the first would have to be loaded again for the second.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

from moetier.runtime.kernels.jit.emitter import F32, I8, I16, I32, Value, vector
from moetier.tiers.layout import GGUF_BLOCKS, Projection

from .row_emitter import BIASED_E2M1, UNIT, Coding, ColumnGroup, RowEmitter

COLUMNS = 64  # columns whose blocks are loaded together, unless a single block has more


class _Bytes:
    """Bytes of a tile's rows, from ``start`` in the first row on. They are loaded when they are first used."""

    def __init__(self, emit: RowEmitter, start: Value, stride: int, nbytes: int) -> None:
        """``stride``: the distance of two rows in bytes; ``nbytes``: the number of bytes of each row."""
        self._emit, self._start, self._stride, self._nbytes = emit, start, stride, nbytes
        self._words: dict[int, Value] = {}  # by their offset, a multiple of 4

    def word(self, offset: int) -> Value:
        """Return the four bytes of each row from ``offset`` on, i32 [lanes]. Those after the last are 0."""
        emit, skipped = self._emit, offset % 4
        first = self._aligned(offset - skipped)
        if not skipped:
            return first
        type_ = vector(I16, 2 * emit.lanes) if skipped == 2 else vector(I8, 4 * emit.lanes)
        count = type_.count // emit.lanes  # elements of a word
        one, other = (emit.at.bitcast(word, type_) for word in (first, self._aligned(offset - skipped + 4)))
        kept = [*range(skipped * count // 4, count), *range(type_.count, type_.count + skipped * count // 4)]
        order = [i + count * lane for lane in range(emit.lanes) for i in kept]
        return emit.at.bitcast(emit.pick(one, other, order), first.type)

    def byte(self, offset: int) -> Value:
        """Return a byte of each row, i32 [lanes]."""
        return self._emit.byte(self._aligned(offset - offset % 4), offset % 4)

    def half(self, offset: int) -> Value:
        """Return a number in half precision of each row, fp32 [lanes]. ``offset`` is even."""
        emit, word = self._emit, self._aligned(offset - offset % 4)
        if offset % 4 == 0:
            word = emit.at.shl(word, emit.all(I32, 16, emit.lanes))
        return emit.small_floats(word, 16, 5)

    def _aligned(self, offset: int) -> Value:
        if offset not in self._words:
            emit, at, n = self._emit, self._emit.at, self._emit.number
            first = offset - offset % UNIT
            left = min(UNIT, self._nbytes - first)
            for size in (16, 8, 4):
                if left & size:
                    loaded = emit.transposed(emit.codes, at.add(self._start, n(first)), self._stride, size)
                    self._words |= {first + 4 * number: word for number, word in enumerate(loaded)}
                    first += size
            if left % 4:
                places = [at.add(self._start, n(first + lane * self._stride)) for lane in range(emit.lanes)]
                self._words[first] = emit.words(emit.codes, places, left % 4)
        return self._words[offset]


class _Blocks(Coding):
    """Coding of the blocks of a GGUF file."""

    def __init__(self, p: Projection) -> None:
        super().__init__(p)
        self.chunk = max(COLUMNS, GGUF_BLOCKS[p.coding].weights) // p.group
        self._p, self._block = p, GGUF_BLOCKS[p.coding]

    @staticmethod
    def can_load(p: Projection) -> bool:
        """Return True: rows consist of whole blocks."""
        return True

    def groups(
        self, emit: RowEmitter, row: Value, offsets: Sequence[Value], first: Value, columns: int
    ) -> Iterator[ColumnGroup]:
        """Load columns as ``Coding.groups`` says. There are no ``offsets``."""
        at, n, (weights, nbytes, _, group) = emit.at, emit.number, self._block
        block = at.udiv(first, n(weights // group))
        start = at.add(at.mul(row, n(self._p.row_bytes)), at.mul(block, n(nbytes)))
        count = columns // weights
        stored = _Bytes(emit, start, self._p.row_bytes, count * nbytes)
        for number in range(count):
            yield from self._of_block(emit, stored, number * nbytes)

    @abstractmethod
    def _of_block(self, emit: RowEmitter, stored: _Bytes, place: int) -> Iterator[ColumnGroup]:
        """Yield the groups of the block at byte ``place``."""


def _nibbles(emit: RowEmitter, words: Sequence[Value]) -> list[Value]:
    """Return the low halves of the bytes of words, then their high halves."""
    low, high = zip(*map(emit.halves, words), strict=True)
    return [*low, *high]


class _Q4_0(_Blocks):
    centre, largest = 8, 15

    def _of_block(self, emit: RowEmitter, stored: _Bytes, place: int) -> Iterator[ColumnGroup]:
        yield ColumnGroup(_nibbles(emit, [stored.word(place + 2 + 4 * i) for i in range(4)]), stored.half(place))


class _Mxfp4(_Blocks):
    centre, largest, unit = 12, 24, 0.5

    def _of_block(self, emit: RowEmitter, stored: _Bytes, place: int) -> Iterator[ColumnGroup]:
        at, lanes = emit.at, emit.lanes
        scale = emit.powers(at.shl(stored.byte(place), emit.all(I32, 23, lanes)))
        codes = _nibbles(emit, [stored.word(place + 1 + 4 * i) for i in range(4)])
        yield ColumnGroup([emit.lookup(code, BIASED_E2M1) for code in codes], scale)


class _Q8_0(_Blocks):
    centre, largest, is_signed = 128, 128, True

    def _of_block(self, emit: RowEmitter, stored: _Bytes, place: int) -> Iterator[ColumnGroup]:
        at, count = emit.at, 4 * emit.lanes
        scale = stored.half(place)
        codes = [at.bitcast(stored.word(place + 2 + 4 * i), vector(I8, count)) for i in range(8)]
        if emit.processor.dot.takes_bytes:
            codes = [at.xor(each, emit.all(I8, -128, count)) for each in codes]
        yield ColumnGroup(codes, scale)


class _Q4_K(_Blocks):
    largest = 15
    codes_at = 16  # offset of the codes' low halves in a block

    def _of_block(self, emit: RowEmitter, stored: _Bytes, place: int) -> Iterator[ColumnGroup]:
        at, lanes = emit.at, emit.lanes
        scale, least = stored.half(place), at.fneg(stored.half(place + 2))

        def masked(word: Value, shift: int, mask: int) -> Value:
            moved = at.lshr(word, emit.all(I32, shift, lanes)) if shift else word
            return at.and_(moved, emit.all(I32, mask * 0x01010101, lanes))

        a, b, c = (stored.word(place + 4 + 4 * i) for i in range(3))
        scales = masked(a, 0, 63), at.or_(masked(c, 0, 15), masked(a, 2, 48))
        minima = masked(b, 0, 63), at.or_(masked(c, 4, 15), masked(b, 2, 48))

        def factor(words: Sequence[Value], number: int, unit: Value) -> Value:
            whole = emit.byte(words[number // 4], number % 4)
            return at.fmul(unit, at.sitofp(whole, vector(F32, lanes)))

        for first in range(0, 8, 2):
            low = place + self.codes_at + 16 * first
            codes = self._codes(emit, stored, place, [stored.word(low + 4 * i) for i in range(8)], first)
            for number, half in ((first, codes[:8]), (first + 1, codes[8:])):
                yield ColumnGroup(half, factor(scales, number, scale), factor(minima, number, least))

    def _codes(self, emit: RowEmitter, stored: _Bytes, place: int, words: list[Value], first: int) -> list[Value]:
        """Return the codes of groups ``first`` and ``first`` + 1, whose low halves are in ``words``.

        ``words`` are 8 vectors i32 [lanes], each with four codes of both groups for each row.
        """
        return _nibbles(emit, words)


class _Q5_K(_Q4_K):
    largest = 31
    codes_at = 48

    def _codes(self, emit: RowEmitter, stored: _Bytes, place: int, words: list[Value], first: int) -> list[Value]:
        codes = _nibbles(emit, words)
        for number, code in enumerate(codes):
            high = emit.bits(stored.word(place + 16 + 4 * (number % 8)), first + number // 8, 1, 4)
            codes[number] = emit.at.or_(code, high)
        return codes


class _Q6_K(_Blocks):
    centre, largest = 32, 63

    def _of_block(self, emit: RowEmitter, stored: _Bytes, place: int) -> Iterator[ColumnGroup]:
        at, lanes = emit.at, emit.lanes
        unit = stored.half(place + 208)
        for first in range(0, 256, 32):
            half, quarter = divmod(first, 128)
            nibble, run = quarter // 64, quarter // 32
            codes = []
            for i in range(8):
                low = emit.halves(stored.word(place + 64 * half + quarter % 64 + 4 * i))[nibble]
                codes.append(at.or_(low, emit.bits(stored.word(place + 128 + 32 * half + 4 * i), 2 * run, 2, 4)))
            for number in (first // 16, first // 16 + 1):
                word, left = stored.word(place + 192 + number - number % 4), 24 - 8 * (number % 4)
                signed = at.ashr(at.shl(word, emit.all(I32, left, lanes)), emit.all(I32, 24, lanes))
                scale = at.fmul(unit, at.sitofp(signed, vector(F32, lanes)))
                yield ColumnGroup(codes[4 * (number % 2) :][:4], scale)


BLOCK_CODINGS: dict[str, type[Coding]] = {
    "q4_0": _Q4_0, "q8_0": _Q8_0, "q4_k": _Q4_K, "q5_k": _Q5_K, "q6_k": _Q6_K, "mxfp4": _Mxfp4,
}  # fmt: skip
