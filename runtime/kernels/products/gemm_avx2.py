"""Code for tiles of a product on processors with registers of 256 bits: AVX2, with or without AVX-VNNI.

With AVX2 alone, the instruction VPMADDUBSW multiplies 32 codes with 32 numbers n and adds up pairs of products to sums
of 16 bits. A code is at most 15 then, as 8-bit codes are multiplied in halves, and n is at most 127. So eight pairs fit
in 16 bits, and sums are widened to 32 bits only after SPAN columns. The instruction VPDPBUSD of AVX-VNNI multiplies
8-bit codes whole, and adds four products to a sum of 32 bits at once.

Codes of one column are in the order of the rows (``tiers/quant/packing.py``). Four columns are interleaved within each
half of a register, so that the sums of eight rows, not all of them neighbours, share a register. ``_in_order`` puts
them into the order of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from moetier.runtime.kernels.jit.emitter import F32, I8, I16, I32, LANES, Value, vector
from moetier.runtime.kernels.jit.processor import Dot, Processor

from .gemm_tile import COLUMN, PAIRS_AHEAD, STEP, VECTORS, PackedVariant, TileEmitter

BYTES = 32  # of a register
SPAN = 32  # columns whose products are added up in 16 bits
MAX_ROWS = 64  # rows of x that one call multiplies
REGISTERS = 8  # sums of 32 bits of ROW_TILE rows
_SUMS, _PAIRS, _WORDS = vector(I32, 8), vector(I16, 16), vector(I8, BYTES)


def is_narrow(processor: Processor) -> bool:
    """Return whether the code of this module is for ``processor``."""
    return processor.dot in (Dot.AVX2, Dot.AVX_VNNI)


class Avx2Tile(TileEmitter):
    """The function ``tile_1``, which multiplies ROW_TILE rows of W with one row of x; or ``tile_rows``, with several.

    ``tile_rows`` takes the number of rows of x, at most MAX_ROWS, as its last argument. It unpacks each group of codes
    once, and multiplies it with four rows of x at a time.
    """

    def __init__(self, module: ir.Module, variant: PackedVariant, processor: Processor, *, several: bool) -> None:
        super().__init__(module, "tile_rows" if several else "tile_1", variant, processor, 5 if several else 4)
        self._has_vnni = processor.dot is Dot.AVX_VNNI
        self._planes = 2 if variant.bits == 8 and not self._has_vnni else 1
        self._span = variant.group if self._has_vnni else min(variant.group, SPAN)
        self._ones = self.all(I16, 1, 16)
        if several:
            self._emit_rows(self.function.args[-1])
        else:
            self._emit_row()
        self.at.ret_void()

    # -- one row of x -------------------------------------------------------------------------------------------------

    def _emit_row(self) -> None:
        at, n, group = self.at, self.number, self._variant.group
        totals = self._variables(vector(F32, LANES), VECTORS)
        with self.loop(n(0), self._groups) as g:
            self._prefetch_pairs(at.add(g, n(PAIRS_AHEAD)))
            sums = self._variables(_SUMS, self._planes * REGISTERS)
            first = at.mul(g, n(group))
            with self.loop(n(0), n(group), self._span) as span:
                short = self._short_sums(sums)
                with self.loop(n(0), n(self._span), STEP) as step:
                    column = at.add(first, at.add(span, step))
                    x = self._four(column)
                    codes = self._unpacked(at.add(self._start, at.mul(column, n(COLUMN))))
                    for place, q in zip(short, codes, strict=True):
                        at.store(self._added(at.load(place), q, x), place)
                self._widen_sums(sums, short)
            self._add_group(g, sums, self._load_pairs(g), n(0), totals)
        for number, place in enumerate(totals):
            self._write(at.load(place), n(0), number * LANES)

    # -- several rows of x --------------------------------------------------------------------------------------------

    def _emit_rows(self, rows: Value) -> None:
        at, n, group = self.at, self.number, self._variant.group
        count = self._planes * REGISTERS
        codes, totals = map(self.memory, (group // STEP * count * BYTES, MAX_ROWS * VECTORS * LANES * 4))
        with self.loop(n(0), self._groups) as g:
            self._prefetch_pairs(at.add(g, n(PAIRS_AHEAD)))
            first = at.mul(g, n(group))
            with self.loop(n(0), n(group), STEP) as step:
                place = at.add(self._start, at.mul(at.add(first, step), n(COLUMN)))
                target = at.mul(step, n(count * BYTES // STEP))
                for number, q in enumerate(self._unpacked(place)):
                    self.store(q, codes, at.add(target, n(number * BYTES)))
            pairs = self._load_pairs(g)
            begun = n(0)
            for height in (4, 2, 1):
                whole = at.and_(rows, n(-height))
                with self.loop(begun, whole, height) as row:
                    self._emit_strip(g, [at.add(row, n(i)) for i in range(height)], codes, pairs, totals)
                begun = whole
        self._write_totals(totals, n(0), rows)

    def _emit_strip(
        self, g: Value, rows: Sequence[Value], codes: Value, pairs: list[tuple[Value, Value]], totals: Value
    ) -> None:
        """Multiply unpacked codes of group ``g`` with some rows of x."""
        at, n, group = self.at, self.number, self._variant.group
        count = self._planes * REGISTERS
        sums = [self._variables(_SUMS, count) for _ in rows]
        starts = [at.add(at.mul(row, self._columns), at.mul(g, n(group))) for row in rows]
        for first in range(0, count, 2):  # so few registers at a time that the sums of all rows stay in registers
            with self.loop(n(0), n(group), self._span) as span:
                short = [self._short_sums(own[first : first + 2]) for own in sums]
                with self.loop(n(0), n(self._span), STEP) as step:
                    column = at.add(span, step)
                    place = at.mul(column, n(count * BYTES // STEP))
                    both = [self.load(codes, at.add(place, n((first + i) * BYTES)), _WORDS) for i in range(2)]
                    for start, places in zip(starts, short, strict=True):
                        x = self._four(at.add(start, column))
                        for q, target in zip(both, places, strict=True):
                            at.store(self._added(at.load(target), q, x), target)
                for own, places in zip(sums, short, strict=True):
                    self._widen_sums(own[first : first + 2], places)
        for row, own in zip(rows, sums, strict=True):
            places = [self.pointer_at(totals, self._total_at(row, i), vector(F32, LANES)) for i in range(VECTORS)]
            self._add_group(g, own, pairs, row, places)

    # -- both ---------------------------------------------------------------------------------------------------------

    def _variables(self, type_: ir.VectorType, count: int) -> list[Value]:
        """Emit variables of type ``type_`` that are zero."""
        places = []
        for _ in range(count):
            with self.at.goto_entry_block():
                places.append(self.at.alloca(type_))
            self.at.store(ir.Constant(type_, [0] * type_.count), places[-1])
        return places

    def _four(self, index: Value) -> Value:
        """Load four int8 numbers of x, beginning at ``index``, and repeat them eight times in a register."""
        return self.at.bitcast(self.spread(self.load(self._xn, index, I32), 8), _WORDS)

    def _short_sums(self, sums: Sequence[Value]) -> Sequence[Value]:
        """Emit sums of 16 bits, which will be added to ``sums``; with VNNI they are ``sums`` themselves."""
        return sums if self._has_vnni else self._variables(_PAIRS, len(sums))

    def _added(self, total: Value, q: Value, x: Value) -> Value:
        """Emit the addition of products of codes and numbers to a register of short sums."""
        if self._has_vnni:
            return self.intrinsic("llvm.x86.avx512.vpdpbusd.256", _SUMS, total, q, x)
        return self.at.add(total, self.intrinsic("llvm.x86.avx2.pmadd.ub.sw", _PAIRS, q, x))

    def _widen_sums(self, sums: Sequence[Value], short: Sequence[Value]) -> None:
        """Add neighbours in ``short``, of 16 bits, to sums of 32 bits. With VNNI there is nothing to do."""
        if self._has_vnni:
            return
        for total, part in zip(sums, short, strict=True):
            wide = self.intrinsic("llvm.x86.avx2.pmadd.wd", _SUMS, self.at.load(part), self._ones)
            self.at.store(self.at.add(self.at.load(total), wide), total)

    def _unpacked(self, place: Value) -> list[Value]:
        """Load the codes of STEP columns, beginning at byte ``place`` of a plane of 4-bit codes.

        Returns registers of codes, each with four codes of eight rows. Without VNNI, the registers with the upper
        halves of 8-bit codes come first, then those with the lower halves.
        """
        low, four = self.all(I8, 15, BYTES), self.all(I8, 4, BYTES)
        planes: list[list[Value]] = []
        for columns in self._planes_at(place):
            united = self._interleaved(columns)
            planes.append([*(self.at.and_(v, low) for v in united), *(self.at.lshr(v, four) for v in united)])
        if len(planes) > self._planes:
            return [self.at.or_(self.at.shl(high, four), part) for high, part in zip(*planes, strict=True)]
        return [v for plane in planes for v in plane]

    def _interleaved(self, columns: Sequence[Value]) -> list[Value]:
        """Interleave four columns. The halves of register i have rows 4i to 4i + 3, and rows 4i + 16 to 4i + 19."""
        at, pairs = self.at, list[Value]()
        for both in columns:
            for first in (0, 8):
                order = [first + COLUMN * k + 16 * half + i for half in range(2) for i in range(8) for k in range(2)]
                pairs.append(at.bitcast(self.pick(both, both, order), _PAIRS))
        registers = []
        for one, other in zip(pairs[:2], pairs[2:], strict=True):
            for first in (0, 4):
                order = [first + 16 * k + 8 * half + i for half in range(2) for i in range(4) for k in range(2)]
                registers.append(at.bitcast(self.pick(one, other, order), _WORDS))
        return registers

    def _in_order(self, sums: Sequence[Value]) -> list[Value]:
        """Put sums into the order of the rows: i32 [LANES] each."""
        ordered = []
        for first in (0, 4):
            low, high = (self.pick(sums[i], sums[i + 1], range(16)) for i in (first, first + 2))
            for half in (0, 4):
                order = [half + 16 * k + 8 * i + j for k in range(2) for i in range(2) for j in range(4)]
                ordered.append(self.pick(low, high, order))
        return ordered

    def _add_group(
        self, g: Value, sums: Sequence[Value], pairs: list[tuple[Value, Value]], row: Value, totals: Sequence[Value]
    ) -> None:
        """Add a group's products, scaled, to ``totals``: addresses of fp32 [LANES]. Group 0 ignores what is there."""
        at, n = self.at, self.number
        is_first = at.icmp_signed("==", g, n(0))
        values = [at.load(place) for place in sums]
        if self._planes == 2:
            four = self.all(I32, 4, 8)
            high, low = values[:REGISTERS], values[REGISTERS:]
            values = [at.add(at.shl(h, four), v) for h, v in zip(high, low, strict=True)]
        index = at.add(at.mul(row, self._groups), g)
        centre, scales = self._centre_sum(index), self._scales_of(index)
        for pair, whole, total in zip(pairs, self._in_order(values), totals, strict=True):
            # not zeros that a loop has stored: LLVM would call memset, which ``executable.py`` does not link
            before = at.select(is_first, self.floats(0.0), at.load(total, align=4))
            at.store(self._add_scaled(before, at.add(whole, centre), pair, scales), total, align=4)
