"""Code for products with many rows of x on processors with AVX-512 VNNI and without AMX.

Codes and pairs are unpacked once for up to ``most`` rows of x, SPAN columns at a time, which fit the first cache. The
sums of a group are the same integers as those of ``gemm_tile.py``, and they are scaled by the same operations.

Of 304 operations that only two of Zen 4's four units can execute, 256 are VPDPBUSD, and 48 are multiplications of
scales. So with groups of 64 columns a product reaches at most .84 of the rate of VPDPBUSD alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from moetier.runtime.kernels.jit.emitter import F32, I8, I32, LANES, Value, vector
from moetier.runtime.kernels.jit.processor import Processor
from moetier.tiers.layout import ROW_TILE

from .gemm_tile import COLUMN, STEP, VECTORS, PackedVariant, TileEmitter, dot

SPAN = 256  # columns
HEIGHT = 4  # rows of x that are multiplied at a time; their sums take half of the registers
UNROLLED = 4 * STEP  # columns
WIDTH = 64  # bytes of a register
LINES = 2  # cache lines of the next span that are prefetched while UNROLLED columns are multiplied with HEIGHT rows


class RowsTile(TileEmitter):
    """The function ``tile_rows``, which multiplies ROW_TILE rows of W with many rows of x, a multiple of ``step``.

    The number of rows of x is its last argument.
    """

    least, most, step = 16, 256, HEIGHT

    def __init__(self, module: ir.Module, variant: PackedVariant, processor: Processor) -> None:
        super().__init__(module, "tile_rows", variant, processor, 5)
        at, n, group = self.at, self.number, variant.group
        rows = self.function.args[-1]
        span = max(1, SPAN // group)  # groups
        self._group_bytes = VECTORS * WIDTH * group // STEP, VECTORS * WIDTH * 2  # of unpacked codes and of pairs
        unpacked = [self.memory(span * nbytes) for nbytes in self._group_bytes]
        totals = self.memory(self.most * VECTORS * WIDTH)
        with self.loop(n(0), self._groups, span) as begin:
            end = self._least(at.add(begin, n(span)), self._groups)
            ahead = self._places_of(at.add(self._start, at.mul(end, n(group * COLUMN))))
            is_last = at.icmp_signed("==", end, self._groups)
            with self.loop(begin, end) as g:
                self._prefetch_pairs(at.add(g, n(span)))
                self._unpack_group(g, *self._group_in(unpacked, at.sub(g, begin)))
            with self.loop(n(0), rows, HEIGHT) as row:
                with at.if_then(is_last):
                    self._prefetch_results(row)
                # the first rows prefetch the whole next span; the others, as an address is needed, its beginning again
                block_bytes = LINES * WIDTH * SPAN // UNROLLED // HEIGHT
                skip = at.select(at.icmp_signed("<", row, n(self.least)), at.mul(row, n(block_bytes)), n(0))
                with self.loop(begin, end) as g:
                    number = at.sub(g, begin)
                    place = at.add(skip, at.mul(number, n(group // UNROLLED * LINES * WIDTH)))
                    places = [at.gep(plane, [place]) for plane in ahead]
                    self._multiply(g, row, *self._group_in(unpacked, number), totals, places)
                with at.if_then(is_last):
                    self._write_totals(totals, row, at.add(row, n(HEIGHT)))
        at.ret_void()

    def _group_in(self, unpacked: Sequence[Value], number: Value) -> tuple[Value, Value]:
        """Return the addresses of a group's codes and of its pairs.

        ``unpacked`` are the addresses of the codes and of the pairs of a span, in which the group has this ``number``.
        """
        codes, pairs = (
            self.at.gep(place, [self.at.mul(number, self.number(nbytes))])
            for place, nbytes in zip(unpacked, self._group_bytes, strict=True)
        )
        return codes, pairs

    def _unpack_group(self, g: Value, codes: Value, pairs: Value) -> None:
        at, n, group = self.at, self.number, self._variant.group
        first = at.mul(g, n(group))
        with self.loop(n(0), n(group), STEP) as step:
            unpacked = self._unpack(at.add(self._start, at.mul(at.add(first, step), n(COLUMN))))
            self._store_vectors(unpacked, at.gep(codes, [at.mul(step, n(VECTORS * WIDTH // STEP))]))
        self._store_vectors([value for pair in self._load_pairs(g) for value in pair], pairs)

    def _store_vectors(self, values: Sequence[Value], place: Value) -> None:
        for number, value in enumerate(values):
            self.store(value, place, self.number(number * WIDTH))

    def _multiply(
        self, g: Value, first: Value, codes: Value, pairs: Value, totals: Value, ahead: Sequence[Value]
    ) -> None:
        """Add products of a group with HEIGHT rows of x, from ``first`` on, to ``totals``.

        Meanwhile, prefetch codes from the addresses ``ahead`` on.
        """
        at, n, group = self.at, self.number, self._variant.group
        rows = [at.add(first, n(i)) for i in range(HEIGHT)]
        indices = [at.add(at.mul(row, self._groups), g) for row in rows]
        starts = [at.gep(self._xn, [at.add(at.mul(row, self._columns), at.mul(g, n(group)))]) for row in rows]
        with at.goto_entry_block():
            sums = [[at.alloca(vector(I32, LANES)) for _ in range(VECTORS)] for _ in rows]
        for index, places in zip(indices, sums, strict=True):
            begin = self._centre_sum(index)
            for place in places:
                at.store(begin, place)
        with self.loop(n(0), n(group), UNROLLED) as step:
            for place in ahead:
                self.prefetch(place, at.mul(step, n(LINES * WIDTH // UNROLLED)), LINES * WIDTH)
            for skip in range(0, UNROLLED, STEP):
                column = at.add(step, n(skip))
                place = at.gep(codes, [at.mul(column, n(VECTORS * WIDTH // STEP))])
                q = [self.load(place, n(number * WIDTH), vector(I8, WIDTH)) for number in range(VECTORS)]
                for start, places in zip(starts, sums, strict=True):
                    x = at.bitcast(self.spread(self.load(start, column, I32), LANES), vector(I8, WIDTH))
                    for place, code in zip(places, q, strict=True):
                        at.store(dot(self, self._processor, at.load(place), code, x), place)
        is_begun = self.spread(at.icmp_signed("!=", g, n(0)), LANES)
        for row, index, places in zip(rows, indices, sums, strict=True):
            scales = self._scales_of(index)
            for number, place in enumerate(places):
                s, b = (self.load(pairs, n((2 * number + i) * WIDTH), vector(F32, LANES)) for i in range(2))
                target = at.gep(totals, [self._total_at(row, number)])
                before = at.select(is_begun, self.load(target, n(0), vector(F32, LANES)), self.floats(0.0))
                self.store(self._add_scaled(before, at.load(place), (s, b), scales), target, n(0))

    def _prefetch_results(self, first: Value) -> None:
        """Prefetch what HEIGHT rows of y, from ``first`` on, will be written to."""
        at, n, size = self.at, self.number, self._variant.out.itemsize
        write, everywhere, data = (ir.Constant(I32, value) for value in (1, 3, 1))
        column = at.mul(self._tile, n(ROW_TILE))
        for i in range(HEIGHT):
            place = at.mul(at.add(at.mul(at.add(first, n(i)), self._out_rows), column), n(size))
            for line in range(0, ROW_TILE * size, WIDTH):
                target = at.gep(self._y, [at.add(place, n(line))])
                self.intrinsic("llvm.prefetch.p0", ir.VoidType(), target, write, everywhere, data)
