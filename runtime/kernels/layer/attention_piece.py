"""Emit attention of some rows to a piece: at most PIECE positions next to one another.

A *row* is one head of queries of one token. For each row, a piece has three results: the largest score m, the sum z of
2^(score - m), and the sum s of the values, each multiplied by its 2^(score - m), which is rounded where words are pairs
of bf16 numbers.

These do not depend on the other rows: each score and each number of s is a sum in the order of ``words.py``, and a
position that a row does not attend to adds 0 to z and s.

Of keys and values in 8 bits (``eight_bits.py``), words have the codes. A score is then multiplied by the key's scale,
and 2^(score - m), for s, by the value's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from llvmlite import ir

from moetier.runtime.kernels.jit.emitter import F32, I8, I32, I64, LANES, POINTER, Dtype, Value, new_module, vector
from moetier.runtime.kernels.jit.processor import Processor
from moetier.runtime.kernels.products.words import HEIGHTS, TILE, WIDE_HEIGHTS, WORD, WordEmitter

PIECE = 512  # positions; a multiple of STEP and of TILE
STEP = 32  # positions: those of a row's z are added up in groups that begin at a multiple of it
ROWS = 24  # rows that are computed together, a multiple of HEIGHTS[0]. Their scores stay in the processor's caches
AHEAD = 2 * LANES  # positions that are prefetched
LOG2_E = math.log2(math.e)


def result_numbers(value_width: int) -> int:
    """Return the number of fp32 numbers in the results of a row: s [V], m and z, and padding."""
    return value_width + LANES


def held_numbers(rows: int, key_width: int, value_width: int) -> int:
    """Return the number of fp32 numbers in the memory of a ``PieceEmitter`` for ``rows`` rows.

    It has queries, keys and values as words, keys before they are transposed, scores, and scales of keys and values.
    """
    positions = TILE * key_width if rows <= ROWS else PIECE * (key_width + value_width)
    return rows * key_width + positions + LANES * key_width + ROWS * PIECE + 2 * PIECE


class Sight(NamedTuple):
    """Positions of a piece, from ``low`` to before ``high``; none if these are equal."""

    low: Value
    high: Value


class KeyPiece(NamedTuple):
    """Keys and values of a head, a piece of them, and what a strip of rows attends to in it."""

    keys: Value  # address of place 0 in memory, i64
    values: Value  # the same for values, i64
    first: Value  # position at which the piece begins, i64
    sight: Sight


class PieceEmitter(WordEmitter, ABC):
    """Emits attention over one piece of keys. The function takes a context.

    With few rows (``has_few_rows``: at most ROWS at once), keys are read in place. With more, keys and values are
    arranged as words once for all rows.
    """

    # numbers and addresses, i64, which the function must set
    key_width: Value  # D, of a query or key
    value_width: Value  # V
    key_stride: Value  # bytes from one position to the next
    value_stride: Value
    pages: Value  # pointer to the numbers of pages, of which each has the same number of positions
    page_bits: Value  # logarithm of this number. The places of page n in memory begin at n << page_bits

    def __init__(
        self,
        name: str,
        dtype: Dtype,
        processor: Processor,
        *,
        has_pairs: bool,
        has_few_rows: bool,
        has_codes: bool,
    ) -> None:
        super().__init__(new_module(), name, [POINTER], dtype, processor, has_pairs=has_pairs)
        self.has_few_rows = has_few_rows
        self.has_codes = has_codes  # whether keys and values are in 8 bits
        self.itemsize = 1 if has_codes else dtype.itemsize  # of a key's or value's number, in bytes
        self.registers = [self.at.alloca(vector(F32, LANES)) for _ in range(2)]

    def hold(self, place: Value, rows: Value) -> Value:
        """Divide a thread's memory, which begins at the pointer ``place``. Return a pointer to what is left of it."""
        at, n = self.at, self.number
        self._words = at.udiv(self.key_width, n(self.numbers))  # of a query or key
        self._word_bytes = at.mul(self._words, n(WORD))
        self._value_bytes = at.mul(self.value_width, n(WORD))
        held, steps = (TILE, 0) if self.has_few_rows else (PIECE, PIECE // self.numbers)

        def take(nbytes: Value) -> Value:
            nonlocal place
            taken, place = place, at.gep(place, [nbytes])
            return taken

        self._queries = take(at.mul(rows, self._word_bytes))  # [rows, words]
        self._keys = take(at.mul(n(held), self._word_bytes))  # [tiles, words, positions of a tile]
        self._value_words = take(at.mul(n(steps), self._value_bytes))  # [steps, V]
        self._untransposed = take(at.mul(n(LANES), self._word_bytes))  # [LANES, words]
        self._scores = take(n(ROWS * PIECE * WORD))  # [ROWS, PIECE]
        self._key_scales, self._value_scales = (take(n(PIECE * WORD)) for _ in range(2))  # [PIECE]
        return place

    def copy_query(self, source: Value, row: Value) -> None:
        """Emit a copy of a query to row ``row`` of the queries, as words. ``source``: a pointer."""
        at, n, target = self.at, self.number, self.at.gep(self._queries, [self.at.mul(row, self._word_bytes)])
        with self.loop(n(0), self._words, LANES) as i:
            words = self.load_words(source, at.mul(i, n(self.numbers * self.dtype.itemsize)))
            self.store(words, target, at.mul(i, n(WORD)))

    def _copy_key(self, source: Value, target: Value, ahead: Value | None) -> None:
        """Emit a copy of a key as words. ``ahead``: a pointer to a row to be prefetched."""
        at, n = self.at, self.number
        with self.loop(n(0), self._words, LANES) as i:
            offset = at.mul(i, n(self.numbers * self.itemsize))
            if ahead is not None:
                self.prefetch(ahead, offset, LANES * self.numbers * self.itemsize)
            if self.has_codes:
                parts = [self._codes(source, at.add(offset, n(LANES * i)), LANES) for i in range(self.numbers)]
                words = self.words_of(parts)
            else:
                words = self.load_words(source, offset)
            self.store(words, target, at.mul(i, n(WORD)))

    def _codes(self, pointer: Value, offset: Value, count: int) -> Value:
        """Emit a load of ``count`` codes of 8 bits, as an fp32 vector."""
        return self.at.sitofp(self.load(pointer, offset, vector(I8, count)), vector(F32, count))

    def _take_value_scales(self, piece: KeyPiece) -> None:
        """Emit copies of the scales of a piece's values, as fp32; 0 for positions outside of its sight."""
        low, high = piece.sight
        with self.loop(self._down(low, STEP), self._up(high, STEP), LANES) as position:
            self.keep(self.floats(0.0), self._value_scales, position)
        with self.loop(low, high) as position:
            row = self._row(piece, piece.values, self.value_stride, position)
            self._keep_scale(row, self.value_width, self._value_scales, position)

    def _keep_scale(self, row: Value, width: Value, scales: Value, position: Value) -> None:
        """Emit a copy of the scale behind the ``width`` codes of a row, as fp32."""
        scale = self.load_floats(row, width, torch.bfloat16, 1)
        self.store(scale, scales, self.at.mul(position, self.number(WORD)))

    def _paired_values(self, rows: list[Value], column: Value, vectors: int) -> list[Value]:
        """Emit the words of LANES * ``vectors`` columns of a step's values, ``paired``. ``column``: the first one."""
        at, n = self.at, self.number
        if not self.has_codes:
            return self.paired(rows, at.mul(column, n(self.itemsize)), vectors)
        words = []
        for i in range(vectors):
            place = at.add(column, n(LANES * i))
            parts = [at.bitcast(self._codes(row, place, LANES), vector(I32, LANES)) for row in rows]
            # a code as an fp32 number is one of bf16, with 16 bits that are 0
            words.append(at.or_(at.lshr(parts[0], self.all(I32, 16, LANES)), parts[1]) if self.has_pairs else parts[0])
        return words

    def arrange(self, piece: KeyPiece) -> None:
        """Emit copies of the values' scales, and, for more than ROWS rows, of a piece's keys and values as words."""
        if self.has_codes:
            self._take_value_scales(piece)
        if not self.has_few_rows:
            self._arrange_keys(piece, self._down(piece.sight.low, self.columns), piece.sight.high)
            self._arrange_values(piece)

    def _arrange_keys(self, piece: KeyPiece, begin: Value, end: Value) -> None:
        """Emit copies of the keys of positions from ``begin`` to before ``end``.

        Positions outside the window [low, high) get a copy of the nearest key inside it; their scores are discarded.
        """
        at, n = self.at, self.number
        with self.loop(begin, end, LANES) as first:
            with self.loop(n(0), n(LANES)) as i:  # row after row, as hardware prefetches
                position = at.add(first, i)
                key, ahead = (
                    self._row(piece, piece.keys, self.key_stride, self._nearest(to_read, piece.sight))
                    for to_read in (position, at.add(position, n(AHEAD)))
                )
                target = at.gep(self._untransposed, [at.mul(i, self._word_bytes)])
                self._copy_key(key, target, ahead if self.has_few_rows else None)
                if self.has_codes:
                    self._keep_scale(key, self.key_width, self._key_scales, position)
            tile = n(0) if self.has_few_rows else at.mul(self._down(first, self.columns), self._word_bytes)
            tile = at.add(tile, at.mul(at.urem(first, n(self.columns)), n(WORD)))
            with self.loop(n(0), self._words, LANES) as i:
                places = [at.add(at.mul(self._word_bytes, n(row)), at.mul(i, n(WORD))) for row in range(LANES)]
                rows = [self.load(self._untransposed, place, vector(I32, LANES)) for place in places]
                for number, words in enumerate(self.transpose(rows)):
                    offset = at.mul(at.add(i, n(number)), n(self.columns * WORD))
                    self.store(words, self._keys, at.add(tile, offset))

    def _arrange_values(self, piece: KeyPiece) -> None:
        at, n = self.at, self.number
        with self.loop(*self._steps(piece.sight)) as step:
            rows, target = self._values_of(piece, step), at.mul(step, self._value_bytes)
            with self.loop(n(0), self.value_width, LANES) as i:
                (words,) = self._paired_values(rows, i, 1)
                self.store(words, self._value_words, at.add(target, at.mul(i, n(WORD))))

    def _values_of(self, piece: KeyPiece, step: Value) -> list[Value]:
        """Emit pointers to the values of a step's positions: one, or a pair."""
        at, n = self.at, self.number
        first = at.mul(step, n(self.numbers))
        positions = [self._nearest(at.add(first, n(i)), piece.sight) for i in range(self.numbers)]
        return [self._row(piece, piece.values, self.value_stride, position) for position in positions]

    def compute(self, piece: KeyPiece, row: Value, count: Value, sight: Sight, result: Value) -> None:
        """Emit m, z and s of ``count`` rows, at most ROWS, from row ``row`` of the queries on.

        ``result`` points to the results of all rows. ``sight`` has what any of the rows attends to.
        """
        begin, end = self._down(sight.low, STEP), self._up(sight.high, STEP)
        self._score(piece, row, count, begin, sight.high)
        with self.loop(self.number(0), count) as i:
            scores = self.at.gep(self._scores, [self.at.mul(i, self.number(PIECE * WORD))])
            index = self.at.add(row, i)
            self.add_mask(scores, index, begin, end)
            self._hide(scores, begin, end, self.sight_of(index))
            self._soften(scores, begin, end, self.result_of(result, index))
        self._unite(piece, row, count, sight, result)

    @abstractmethod
    def sight_of(self, row: Value) -> Sight:
        """Emit the range of the present piece's positions that row ``row`` of the queries attends to."""

    @abstractmethod
    def add_mask(self, scores: Value, row: Value, begin: Value, end: Value) -> None:
        """Emit the addition of a mask, times LOG2_E, to a row's scores from position ``begin`` to before ``end``."""

    @abstractmethod
    def scaled(self, scores: Value) -> Value:
        """Emit a vector of scores times the scaling and LOG2_E."""

    def result_of(self, results: Value, row: Value) -> Value:
        """Emit a pointer to the results of a row: s [V], m, z, as ``result_numbers`` says."""
        return self.at.gep(
            results, [self.at.mul(row, self.at.mul(self.at.add(self.value_width, self.number(LANES)), self.number(4)))]
        )

    def _score(self, piece: KeyPiece, row: Value, count: Value, begin: Value, end: Value) -> None:
        """Emit the scores of ``count`` rows for the tiles with positions from ``begin`` to before ``end``."""
        at, n = self.at, self.number
        with self.loop(self._down(begin, self.columns), end, self.columns) as position:
            if self.has_few_rows:
                self._arrange_keys(piece, position, self.least(at.add(position, n(self.columns)), end))
            tile = n(0) if self.has_few_rows else at.mul(position, self._word_bytes)
            keys = self.stored(at.gep(self._keys, [tile]), n(self.columns * WORD), self.vectors)

            def multiply(height: int, first: Value) -> None:
                rows = [at.add(first, n(i)) for i in range(height)]
                queries = [at.gep(self._queries, [at.mul(at.add(row, r), self._word_bytes)]) for r in rows]
                for r, sums in zip(rows, self.tile(queries, keys, (n(0), self._words), self.vectors), strict=True):
                    place = at.add(at.mul(r, n(PIECE)), position)
                    for i, total in enumerate(sums):
                        scores = self.scaled(total)
                        if self.has_codes:
                            scales = self.floats_at(self._key_scales, at.add(position, n(LANES * i)))
                            scores = at.fmul(scores, scales)
                        self.keep(scores, self._scores, at.add(place, n(LANES * i)))

            self.some(count, HEIGHTS, multiply)

    def _hide(self, scores: Value, begin: Value, end: Value, sight: Sight) -> None:
        """Emit -inf for the positions from ``begin`` to before ``end`` that are not in sight."""
        at = self.at
        counted = ir.Constant(vector(I64, LANES), list(range(LANES)))
        low, high = sight
        for start, stop, compare, bound in ((begin, low, ">=", low), (self._down(high, LANES), end, "<", high)):
            with self.loop(start, stop, LANES) as i:
                positions = at.add(self.spread(i, LANES), counted)
                is_seen = at.icmp_signed(compare, positions, self.spread(bound, LANES))
                self.keep(at.select(is_seen, self.floats_at(scores, i), self.floats(-math.inf)), scores, i)

    def _soften(self, scores: Value, begin: Value, end: Value, result: Value) -> None:
        """Emit the words of 2^(score - m) in place of a row's scores, and its m and z."""
        at, n = self.at, self.number
        largest, total = self.registers
        at.store(self.lowest(), largest)
        with self.loop(begin, end, LANES) as i:
            at.store(self.larger(self.floats_at(scores, i), at.load(largest)), largest)
        m = self.reduce(at.load(largest), self.larger)
        at.store(self.floats(0.0), total)
        ones = self.words_of([self.floats(1.0)] * self.numbers)
        with self.loop(begin, end, LANES * self.numbers) as i:
            parts = [self.floats_at(scores, at.add(i, n(LANES * number))) for number in range(self.numbers)]
            shares = [self.exp2(at.fsub(part, self.spread(m, LANES))) for part in parts]
            words = self.words_of(shares)
            at.store(self.add_product(at.load(total), words, ones), total)
            if self.has_codes:
                places = [at.add(i, n(LANES * number)) for number in range(self.numbers)]
                scales = [self.floats_at(self._value_scales, place) for place in places]
                words = self.words_of([at.fmul(*pair) for pair in zip(shares, scales, strict=True)])
            self.store(words, scores, at.mul(at.udiv(i, n(self.numbers)), n(WORD)))
        self.keep(m, result, self.value_width)
        self.keep(self.reduce(at.load(total), at.fadd), result, at.add(self.value_width, n(1)))

    def _unite(self, piece: KeyPiece, row: Value, count: Value, sight: Sight, result: Value) -> None:
        """Emit s of ``count`` rows: the sums of the values, weighted by what ``_soften`` has left."""
        at, n = self.at, self.number

        def add(vectors: int, column: Value) -> None:
            def as_they_are(step: Value) -> list[Value]:
                return self._paired_values(self._values_of(piece, step), at.mul(column, n(LANES)), vectors)

            words = at.gep(self._value_words, [at.mul(column, n(LANES * WORD))])
            values = as_they_are if self.has_few_rows else self.stored(words, self._value_bytes, vectors)

            def multiply(height: int, first: Value) -> None:
                rows = [at.add(first, n(i)) for i in range(height)]
                shares = [at.gep(self._scores, [at.mul(r, n(PIECE * WORD))]) for r in rows]
                for r, sums in zip(rows, self.tile(shares, values, self._steps(sight), vectors), strict=True):
                    s = self.result_of(result, at.add(row, r))
                    for i, total in enumerate(sums):
                        self.keep(total, s, at.mul(at.add(column, n(i)), n(LANES)))

            self.some(count, HEIGHTS if vectors <= self.vectors else WIDE_HEIGHTS, multiply)

        # values that are read as they are shall be read row after row
        widest = 2 * self.vectors if self.has_few_rows else self.vectors
        self.some(at.udiv(self.value_width, n(LANES)), (widest, 1), add)

    # -- numbers

    def lowest(self) -> Value:
        """Return the least finite numbers. As no m is less, there is no NaN where all scores of a piece are -inf."""
        return self.floats(torch.finfo(torch.float32).min)

    def _row(self, piece: KeyPiece, base: Value, stride: Value, position: Value) -> Value:
        """Emit a pointer to the key or value at a position of a piece. ``base``: address of place 0."""
        at, n, bits = self.at, self.number, self.page_bits
        index = at.add(piece.first, position)
        page = self.load(self.pages, at.mul(at.lshr(index, bits), n(8)), I64)
        on_page = at.and_(index, at.sub(at.shl(n(1), bits), n(1)))
        return at.inttoptr(at.add(base, at.mul(at.add(at.shl(page, bits), on_page), stride)), POINTER)

    def _nearest(self, position: Value, sight: Sight) -> Value:
        return self.least(self.most(position, sight.low), self.at.sub(sight.high, self.number(1)))

    def _steps(self, sight: Sight) -> tuple[Value, Value]:
        """Emit the first step of words with the positions in sight, and the one after the last."""
        at, n = self.at, self.number
        return at.udiv(sight.low, n(self.numbers)), at.udiv(at.add(sight.high, n(self.numbers - 1)), n(self.numbers))

    def _down(self, index: Value, multiple: int) -> Value:
        return self.at.and_(index, self.number(-multiple))

    def _up(self, index: Value, multiple: int) -> Value:
        return self._down(self.at.add(index, self.number(multiple - 1)), multiple)
