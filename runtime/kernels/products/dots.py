"""Dot products of rows with rows, in one order of summation for any number of rows.

A dot product has LANES sums, of every LANES-th word (``words.py``) each, which begin with 0.0. In the end the second
half of them is added to the first, again and again. So its bits depend on its two rows only.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from moetier.runtime.kernels.jit.emitter import BF16, F32, LANES, POINTER, Dtype, Value, new_module, vector
from moetier.runtime.kernels.jit.processor import Processor

from .words import WordEmitter, has_pairs

ROWS = 4  # rows of a matrix that are read together


def pairs_of(processor: Processor, given: Dtype, kept: Dtype, columns: int) -> bool:
    """Return whether words are pairs in products of x [*, columns] with W [rows, columns].

    x is of type ``given``, W of type ``kept``.
    """
    return given.itemsize == kept.itemsize and has_pairs(processor, given, columns)


class DotEmitter(WordEmitter):
    """Emitter of a function that takes a context, and multiplies rows of x with rows of a matrix W.

    x is of type ``given``, W of type ``kept``, and y of type ``output``. ``pairs`` is what ``pairs_of`` returns.
    """

    def __init__(
        self, name: str, processor: Processor, given: Dtype, kept: Dtype, output: Dtype, *, pairs: bool
    ) -> None:
        super().__init__(new_module(), name, [POINTER], kept, processor, has_pairs=pairs)
        self.given, self.output = given, output

    def words(self, columns: Value) -> Value:
        """Emit the number of words of a row of ``columns`` numbers."""
        return self.at.udiv(columns, self.number(self.numbers))

    def dots_of_words(self, matrix: Sequence[Value], x: Sequence[Value], words: Value) -> list[list[Value]]:
        """Emit ``dots`` of rows that lie in memory as words of WORD bytes, one after the other (``words.py``).

        Where words are pairs, rows of bf16 numbers lie so already, else rows of fp32 numbers do; ``matmul.py`` makes
        copies of others.
        """
        return self._dots(matrix, x, words, lambda row, i, _: self.load_stored(row, i))

    def dots(self, matrix: Sequence[Value], x: Sequence[Value], words: Value) -> list[list[Value]]:
        """Emit the sums of the dot products of rows of x with rows of W.

        Args:
            matrix: pointers to rows of W.
            x: pointers to rows of x.
            words: number of words of a row.

        Returns:
            for each row of x, a vector of LANES sums for each row of W.
        """

        def load(row: Value, i: Value, dtype: Dtype) -> Value:
            return self.load_words(row, self.at.mul(i, self.number(self.numbers * dtype.itemsize)), dtype)

        return self._dots(matrix, x, words, load)

    def _dots(
        self, matrix: Sequence[Value], x: Sequence[Value], words: Value, load: Callable[[Value, Value, Dtype], Value]
    ) -> list[list[Value]]:
        at = self.at
        with at.goto_entry_block():  # LLVM's passes turn these into registers
            sums = [[at.alloca(vector(F32, LANES)) for _ in matrix] for _ in x]
        for place in itertools.chain(*sums):
            at.store(self.floats(0.0), place)
        with self.loop(self.number(0), words, LANES) as i:
            weights = [load(row, i, self.dtype) for row in matrix]
            for row, own in zip(x, sums, strict=True):
                taken = load(row, i, self.given)
                for weight, place in zip(weights, own, strict=True):
                    at.store(self.add_product(at.load(place), weight, taken), place)
        return [[at.load(place) for place in own] for own in sums]

    def totals(self, sums: Sequence[Value]) -> Value:
        """Emit the dot products of a power of two of sums, as numbers of type ``output``."""
        vectors, left = list(sums), LANES  # ``left``: sums of a product that are not yet added
        while left > 1:
            left //= 2
            joined = len(vectors) > 1
            pairs = [*zip(vectors[::2], vectors[1::2], strict=True)] if joined else [(vectors[0], vectors[0])]
            starts = range(0, vectors[0].type.count * (1 + joined), 2 * left)
            halves = [[start + half + i for start in starts for i in range(left)] for half in (0, left)]
            vectors = [self.at.fadd(*(self.pick(one, other, half) for half in halves)) for one, other in pairs]
        (total,) = vectors
        return total if self.output.itemsize > BF16.itemsize else self.narrow(total, total.type.count)
