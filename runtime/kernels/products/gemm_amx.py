"""Code for products with many rows of x on processors with Intel AMX.

A tile register has 16 rows of 64 bytes. The instruction TDPBSSD multiplies 16 rows of n, 64 columns each, with the
codes of 16 rows of W, and adds the products up in a register of 16 x 16 integers. The codes of a group are unpacked
once for up to ``most`` rows of x, less their centre. So a group's sums are the same integers as those of
``gemm_tile.py``, and they are scaled by the same operations. Scaling takes most of the time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from llvmlite import ir

from moetier.runtime.kernels.jit.emitter import F32, I8, I16, I32, LANES, Value, vector
from moetier.runtime.kernels.jit.processor import Processor

from .gemm_tile import CENTRES, COLUMN, PAIRS_AHEAD, STEP, VECTORS, PackedVariant, TileEmitter

HEIGHT = 16  # rows of a tile register
WIDTH = 64  # bytes of its rows
TILE = HEIGHT * WIDTH  # bytes of a tile register
_SUMS, _NUMBERS, _CODES = range(VECTORS), VECTORS, range(VECTORS + 1, 8)  # tile registers


class AmxTile(TileEmitter):
    """The function ``tile_rows``, which multiplies ROW_TILE rows of W with ``least`` to ``most`` rows of x.

    The number of rows of x is its last argument.
    """

    least, most, step = 8, 128, 1  # with fewer rows AMX does not pay

    def __init__(self, module: ir.Module, variant: PackedVariant, processor: Processor) -> None:
        super().__init__(module, "tile_rows", variant, processor, 5)
        at, n, group = self.at, self.number, variant.group
        self._rows = rows = self.function.args[-1]
        self._depth = min(group, WIDTH)  # columns that an instruction multiplies
        self._height = self._least(rows, n(HEIGHT))
        codes, sums, totals = map(self.memory, (group * WIDTH, VECTORS * TILE, self.most * VECTORS * WIDTH))
        self._configure()
        self._clear(totals)
        with self.loop(n(0), self._groups) as g:
            self._prefetch_pairs(at.add(g, n(PAIRS_AHEAD)))
            first = at.mul(g, n(group))
            with self.loop(n(0), n(group), STEP) as step:
                unpacked = self._unpack(at.add(self._start, at.mul(at.add(first, step), n(COLUMN))))
                for number, q in enumerate(unpacked):
                    place = at.add(at.mul(step, n(LANES)), n(number * group * LANES))
                    self.store(at.sub(q, self.all(I8, CENTRES[variant.bits], WIDTH)), codes, place)
            pairs = self._load_pairs(g)
            with self._strips() as (row, begin):
                self._multiply(at.gep(self._xn, [at.add(at.mul(begin, self._columns), first)]), codes, sums)
                with self.loop(row, at.add(begin, self._height)) as r:
                    # a row of x of the next group; so many rows are too many streams for the hardware prefetchers
                    self.prefetch(self._xn, at.add(at.mul(r, self._columns), at.add(first, n(group))), group)
                    self._add_group(g, r, at.gep(sums, [at.mul(at.sub(r, begin), n(WIDTH))]), pairs, totals)
        self.intrinsic("llvm.x86.tilerelease", ir.VoidType())
        self._write_totals(totals, n(0), rows)
        at.ret_void()

    @contextlib.contextmanager
    def _strips(self) -> Iterator[tuple[Value, Value]]:
        """Emit a loop over the rows of x in strips of ``_height``. Yields two row numbers for each strip.

        The first is where the strip's new rows begin, the second where the strip begins. They differ only in the last
        strip: it too has ``_height`` rows, so it repeats rows if fewer are left.
        """
        with self.loop(self.number(0), self._rows, HEIGHT) as row:
            yield row, self._least(row, self.at.sub(self._rows, self._height))

    def _configure(self) -> None:
        """Set the number of rows of each tile register, and the bytes of its rows."""
        n, place = self.number, self.memory(64)
        height, codes = self.at.trunc(self._height, I8), ir.Constant(I8, self._depth // STEP)
        shapes = [*[(height, WIDTH)] * len(_SUMS), (height, self._depth), *[(codes, WIDTH)] * len(_CODES)]
        self.store(self.all(I8, 0, 64), place, n(0))
        self.store(ir.Constant(I8, 1), place, n(0))  # the layout of these 64 bytes
        for register, (rows, width) in enumerate(shapes):
            self.store(ir.Constant(I16, width), place, n(16 + 2 * register))
            self.store(rows, place, n(48 + register))
        self.intrinsic("llvm.x86.ldtilecfg", ir.VoidType(), place)

    def _clear(self, totals: Value) -> None:
        # not by stores of zeros in a loop: LLVM would call memset, which ``executable.py`` does not link
        at, n, row_bytes = self.at, self.number, VECTORS * WIDTH
        self._instruction("tilezero", _SUMS[0])
        with self._strips() as (_, begin):
            for number in range(VECTORS):
                place = at.gep(totals, [at.add(at.mul(begin, n(row_bytes)), n(number * WIDTH))])
                self._instruction("tilestored64", _SUMS[0], place, n(row_bytes))

    def _instruction(self, name: str, *arguments: int | Value) -> None:
        """Emit an instruction for tile registers, which are given by their numbers."""
        numbers = [ir.Constant(I8, a) if isinstance(a, int) else a for a in arguments]
        self.intrinsic(f"llvm.x86.{name}", ir.VoidType(), *numbers)

    def _multiply(self, x: Value, codes: Value, sums: Value) -> None:
        """Multiply a group of a strip of rows of x with its unpacked codes, and store the sums."""
        at, n, group = self.at, self.number, self._variant.group
        for total in _SUMS:
            self._instruction("tilezero", total)
        for column in range(0, group, self._depth):
            self._instruction("tileloadd64", _NUMBERS, at.gep(x, [n(column)]), self._columns)
            for total in _SUMS:
                code = _CODES[total % len(_CODES)]
                self._instruction("tileloadd64", code, at.gep(codes, [n((total * group + column) * LANES)]), n(WIDTH))
                self._instruction("tdpbssd", total, _NUMBERS, code)
        for total in _SUMS:
            self._instruction("tilestored64", total, at.gep(sums, [n(total * TILE)]), n(WIDTH))

    def _add_group(
        self, g: Value, row: Value, sums: Value, pairs: Sequence[tuple[Value, Value]], totals: Value
    ) -> None:
        """Add a group's products with a row of x, scaled, to ``totals``."""
        at, n = self.at, self.number
        scales = self._scales_of(at.add(at.mul(row, self._groups), g))
        for number, pair in enumerate(pairs):
            whole, place = self.load(sums, n(number * TILE), vector(I32, LANES)), self._total_at(row, number)
            before = self.load(totals, place, vector(F32, LANES))
            self.store(self._add_scaled(before, whole, pair, scales), totals, place)
