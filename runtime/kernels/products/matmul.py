"""The product of many rows with a matrix that is not quantised, y = x @ W.T. Its bits are those of ``gemv.py``.

An item of work is a strip of rows of x and CHUNK rows of W. A thread copies the strip's words to memory of its own,
which stays in the processor's second cache, and multiplies them with ROWS rows of W at a time.
"""

from __future__ import annotations

from array import array

import torch
from llvmlite import ir
from torch import Tensor

from moetier.runtime.kernels.jit.emitter import I64, LANES, POINTER, Dtype, Value, once
from moetier.runtime.kernels.jit.processor import Processor, this_processor
from moetier.runtime.kernels.jit.team import Kernel, Scratch, compile_kernel, threads_for

from .api import CPU
from .dots import ROWS, DotEmitter, pairs_of
from .words import HEIGHTS, WIDE_HEIGHTS, WORD

MATMUL = "moetier_matmul"  # name of the compiled function
CHUNK = 64  # rows of W; a multiple of ROWS
STRIP_BYTES = 800 << 10  # most bytes of a strip's words
PADDING = WORD * LANES  # bytes between rows of words, so that they lie in different sets of a cache
# Number of i64 fields in the context. In order: items that threads have taken, threads that have begun, all items;
# addresses of x, W and y; rows of x, N, K; rows of a strip; the address of the threads' memory, and bytes of a thread's
CONTEXT = 12
_scratch = Scratch()


def matmul(x: Tensor, weight: Tensor, output: torch.dtype) -> Tensor:
    """Multiply x [tokens, columns] with a matrix [rows, columns] -> [tokens, rows] of type ``output``.

    Both must lie in memory row after row, and have a multiple of LANES columns of fp32 or bf16 numbers.
    """
    tokens, (rows, columns) = len(x), weight.shape
    y = torch.empty((tokens, max(rows, ROWS)), dtype=output, device=CPU)
    pairs = pairs_of(this_processor(), x.dtype, weight.dtype, columns)
    row_bytes = WORD * columns // (2 if pairs else 1) + PADDING
    strips = -(-tokens * row_bytes // STRIP_BYTES)
    strip = -(-tokens // (strips * HEIGHTS[0])) * HEIGHTS[0]
    nbytes = (strip + ROWS) * row_bytes
    items = -(-tokens // strip) * -(-rows // CHUNK)
    threads = min(items, threads_for(tokens * rows * columns))
    memory = (_scratch.take(threads * nbytes), nbytes)
    addresses = (part.data_ptr() for part in (x, weight, y))
    context = array("q", (0, 0, items, *addresses, tokens, rows, columns, strip, *memory))
    matmul_kernel(this_processor(), x.dtype, weight.dtype, output, pairs).run(context, threads)
    return y if rows >= ROWS else y[:, :rows].contiguous()


@once
def matmul_kernel(
    processor: Processor, given: torch.dtype, kept: torch.dtype, output: torch.dtype, pairs: bool
) -> Kernel:
    """Compile ``matmul_module``, once for these types and each processor."""
    return compile_kernel(processor, matmul_module(processor, given, kept, output, pairs), MATMUL, unroll=False)


def matmul_module(
    processor: Processor, given: torch.dtype, kept: torch.dtype, output: torch.dtype, pairs: bool
) -> ir.Module:
    """Emit the function ``MATMUL(context)``, which computes items until none is left.

    x [tokens, K] is of type ``given``, W [N, K] of type ``kept``, and y [tokens, at least ROWS and N] of type
    ``output``; K is a multiple of LANES, and of 2 * LANES if words are ``pairs``.
    """
    return _Matmul(MATMUL, processor, given, kept, output, pairs=pairs).finish()


class _Matmul(DotEmitter):
    def __init__(
        self, name: str, processor: Processor, given: Dtype, kept: Dtype, output: Dtype, *, pairs: bool
    ) -> None:
        super().__init__(name, processor, given, kept, output, pairs=pairs)
        at, n = self.at, self.number
        (context,) = self.function.args
        begun, (_, items, x, matrix, y, *sizes, scratch, nbytes) = self.fields(CONTEXT)
        tokens, self._rows, columns, strip_tokens = sizes
        x, self._matrix, self._y = (at.inttoptr(address, POINTER) for address in (x, matrix, y))
        self._words = self.words(columns)
        self._word_bytes = at.add(at.mul(self._words, n(WORD)), n(PADDING))  # of a row of words
        self._stored_bytes = at.mul(columns, n(kept.itemsize))  # of a row of W
        self._product_bytes = at.mul(self.most(self._rows, n(ROWS)), n(output.itemsize))  # of a row of y
        thread = at.atomic_rmw("add", self.pointer_at(context, n(8), I64), n(1), "monotonic")
        self._strip = at.inttoptr(at.add(scratch, at.mul(thread, nbytes)), POINTER)
        self._copies = at.gep(self._strip, [at.mul(strip_tokens, self._word_bytes)])  # of ROWS rows of W
        copied = at.alloca(I64)  # number of the strip whose words are in memory
        at.store(n(-1), copied)
        chunks = at.udiv(at.add(self._rows, n(CHUNK - 1)), n(CHUNK))
        with self.items(begun, items) as item:
            strip, chunk = at.udiv(item, chunks), at.urem(item, chunks)
            token = at.mul(strip, strip_tokens)
            count = self.least(strip_tokens, at.sub(tokens, token))
            with at.if_then(at.icmp_signed("!=", at.load(copied), strip)):
                at.store(strip, copied)
                with self.loop(n(0), count) as t:
                    source = at.gep(x, [at.mul(at.add(token, t), at.mul(columns, n(given.itemsize)))])
                    self._copy(source, at.gep(self._strip, [at.mul(t, self._word_bytes)]), given)
            first = at.mul(chunk, n(CHUNK))
            with self.loop(first, self.least(self._rows, at.add(first, n(CHUNK))), ROWS) as row:
                # some rows are computed again if fewer than ROWS are left
                self._multiply(token, count, self.most(n(0), self.least(row, at.sub(self._rows, n(ROWS)))))

    def _copy(self, source: Value, target: Value, dtype: Dtype) -> None:
        """Emit a copy of a row of numbers of ``dtype`` as words."""
        at, n = self.at, self.number
        with self.loop(n(0), self._words, LANES) as i:
            words = self.load_words(source, at.mul(i, n(self.numbers * dtype.itemsize)), dtype)
            self.store(words, target, at.mul(i, n(WORD)))

    def _multiply(self, token: Value, count: Value, first: Value) -> None:
        """Emit the products of the strip's ``count`` rows, from ``token`` on, with ROWS rows of W from ``first`` on."""
        at, n = self.at, self.number
        # an only row is multiplied several times if W has fewer than ROWS
        rows = [self.least(at.add(first, n(i)), at.sub(self._rows, n(1))) for i in range(ROWS)]
        matrix = [at.gep(self._matrix, [at.mul(row, self._stored_bytes)]) for row in rows]
        following = [at.gep(row, [at.mul(self._stored_bytes, n(ROWS))]) for row in matrix]
        if not self.has_pairs and self.dtype.itemsize < WORD:
            copies = [at.gep(self._copies, [at.mul(self._word_bytes, n(i))]) for i in range(ROWS)]
            for source, target in zip(matrix, copies, strict=True):
                self._copy(source, target, self.dtype)
            matrix = copies
        # as many sums at once as the processor has registers
        width, heights = (ROWS, HEIGHTS) if self.vectors > 1 else (2, WIDE_HEIGHTS)

        def multiply(height: int, t: Value) -> None:
            # each tile prefetches a part of the next rows of W
            begin, end = (at.udiv(at.mul(at.add(t, n(i)), self._stored_bytes), count) for i in (0, height))
            with self.loop(begin, end, 64) as offset:
                for row in following:
                    self.prefetch(row, offset, 64, near=False)
            places = [at.add(t, n(i)) for i in range(height)]
            x = [at.gep(self._strip, [at.mul(place, self._word_bytes)]) for place in places]
            for start in range(0, ROWS, width):
                sums = self.dots_of_words(matrix[start : start + width], x, self._words)
                offset = at.mul(at.add(first, n(start)), n(self.output.itemsize))
                y = [at.add(at.mul(at.add(token, place), self._product_bytes), offset) for place in places]
                self._store([at.gep(self._y, [place]) for place in y], sums)

        self.some(count, heights, multiply)

    def _store(self, places: list[Value], sums: list[list[Value]]) -> None:
        """Emit stores of the totals of each row's sums at one of ``places``."""
        while places:
            count = min(4, 1 << (len(places).bit_length() - 1))
            totals = self.totals([one for own in sums[:count] for one in own])
            width = len(sums[0])
            for i, place in enumerate(places[:count]):
                self.store(self.pick(totals, totals, range(i * width, (i + 1) * width)), place, self.number(0))
            places, sums = places[count:], sums[count:]
