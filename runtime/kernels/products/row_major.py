"""Code for products with matrices in the coding of a checkpoint, which lie row after row (``row_emitter.py``).

A *tile* is as many rows as a register holds fp32 numbers. The columns of a group are multiplied with x, and their
products are added up in integers, or for FP8 in fp32. The sum is scaled and added to those of the groups before it, in
fp32. So the order of operations is the same on every processor, and for any number of rows of x.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from llvmlite import ir

from moetier.runtime.kernels.codings.row_codings import coding_of
from moetier.runtime.kernels.codings.row_emitter import RowEmitter
from moetier.runtime.kernels.jit.emitter import F32, I8, I16, I32, I64, LANES, POINTER, FloatType, Value, vector
from moetier.runtime.kernels.jit.processor import Dot, Processor
from moetier.tiers.layout import ITEM_BYTES, SCALE_TYPES, Projection

from .gemm_avx2 import MAX_ROWS
from .gemm_tile import dot

ITEM_ROWS = 64  # rows of a matrix that a thread takes at a time
CHAINS = 4  # sums in fp32 that are added up apart from one another


@dataclass(frozen=True)
class RowMajorVariant:
    """Properties that the code of a product depends on: how the matrices are stored, and the type of y."""

    projection: Projection
    out: FloatType

    @classmethod
    def of(cls, p: Projection, out: FloatType) -> RowMajorVariant:
        """Return the variant of a projection, the same for those that need the same code."""
        rows = p.rows if p.block_rows > 1 or p.globals else LANES
        return cls(replace(p, name="", dtype="", transposed=False, rows=rows), out)


class RowTile(RowEmitter):
    """The function ``tile_1``, which multiplies ITEM_ROWS rows of W with one row of x; or ``tile_rows``, with several.

    ``tile_rows`` takes the number of rows of x, at most MAX_ROWS, as its last argument. It loads each group once, and
    multiplies it with up to four rows of x at a time. Arguments are those of ``gemm_tile.TileEmitter``: of the four
    sections, the first three are the codes, the scales and the numbers of the parts.
    """

    def __init__(self, module: ir.Module, variant: RowMajorVariant, processor: Processor, *, several: bool) -> None:
        arguments = [POINTER] * 8 + [I64] * (5 if several else 4)
        super().__init__(module, "tile_rows" if several else "tile_1", arguments, processor)
        self.function.linkage = "internal"
        self.codes, self.scales, self._globals, _, self._xn, self._xt, self._xs, self._y = self.function.args[:8]
        coding = coding_of(variant.projection)
        assert coding is not None
        self._coding, self._p, self._out = coding, variant.projection, variant.out
        self._is_signed = coding.is_signed and not processor.dot.takes_bytes
        # number of vectors, of four columns each, whose products are added up in 16 bits; 0 if all sums are of 32 bits
        self._span = 32767 // (2 * 127 * coding.largest) if processor.dot is Dot.AVX2 and not coding.is_exact else 0
        at, n, lanes = self.at, self.number, self.lanes
        self._rows = self.function.args[10]
        first = at.mul(self.function.args[8], n(ITEM_ROWS))
        end = at.add(first, n(ITEM_ROWS))
        last = at.sub(self._rows, n(lanes))  # if fewer rows are left for the last tile, it computes some rows again
        with self.loop(first, at.select(at.icmp_signed("<", end, self._rows), end, self._rows), lanes) as tile:
            row = at.select(at.icmp_signed("<", tile, last), tile, last)
            if several:
                self._emit_rows(row, self.function.args[12])
            else:
                self._emit_row(row)
        at.ret_void()

    # -- one row of x -------------------------------------------------------------------------------------------------

    def _emit_row(self, row: Value) -> None:
        at, n, coding = self.at, self.number, self._coding
        offsets = self._scale_offsets(row)
        total = self._variable(vector(F32, self.lanes))
        at.store(self._zeros(), total)

        def add(first: Value, columns: int) -> None:
            for number, group in enumerate(coding.groups(self, row, offsets, first, columns)):
                g = at.add(first, n(number))
                codes = group.codes
                (part,) = self._sums(codes.__getitem__, len(codes), [n(0)], g)
                at.store(self._added(at.load(total), part, group.scale, group.low, n(0), g), total)

        self._each_chunk(row, add)
        self._write(at.load(total), row, n(0), self._factor(row))

    # -- several rows of x --------------------------------------------------------------------------------------------

    def _emit_rows(self, row: Value, rows: Value) -> None:
        at, n, coding = self.at, self.number, self._coding
        offsets = self._scale_offsets(row)
        of_codes = 4 * self.lanes  # bytes of a vector
        columns_of_vector = 1 if coding.is_exact else 4
        codes = self.memory(coding.chunk * coding.group // columns_of_vector * of_codes)
        scales, lows = (self.memory(coding.chunk * of_codes) for _ in range(2))
        totals = self.memory(MAX_ROWS * of_codes)
        numbers = vector(F32, self.lanes)

        def add(first: Value, columns: int) -> None:
            groups = 0
            for groups, group in enumerate(coding.groups(self, row, offsets, first, columns), 1):
                count, low = len(group.codes), group.low  # count is the same for all groups
                for number, vector_ in enumerate(group.codes, count * (groups - 1)):
                    self.store(vector_, codes, n(of_codes * number))
                self.store(group.scale, scales, n(of_codes * (groups - 1)))
                if low is not None:
                    self.store(low, lows, n(of_codes * (groups - 1)))
            is_first = at.icmp_signed("==", first, n(0))
            begun = n(0)
            for height in (2, 1) if coding.is_exact else (4, 2, 1):
                whole = at.and_(rows, n(-height))
                with self.loop(begun, whole, height) as strip:
                    own = [at.add(strip, n(i)) for i in range(height)]
                    places = [self.pointer_at(totals, at.mul(x, n(of_codes)), numbers) for x in own]
                    sums = [self._variable(numbers) for _ in own]
                    for place, total in zip(places, sums, strict=True):
                        # not zeros that a loop has stored: LLVM would call memset, which is not linked
                        at.store(at.select(is_first, self._zeros(), at.load(place, align=4)), total)
                    with self.loop(n(0), n(groups)) as number:
                        codes_of_group = at.gep(codes, [at.mul(number, n(count * of_codes))])
                        type_ = numbers if coding.is_exact else vector(I8, of_codes)
                        g, place = at.add(first, number), at.mul(number, n(of_codes))
                        scale = self.load(scales, place, numbers)
                        added = None if low is None else self.load(lows, place, numbers)
                        load = functools.partial(self._load_vector, codes_of_group, type_)
                        for part, total, x in zip(self._sums(load, count, own, g), sums, own, strict=True):
                            at.store(self._added(at.load(total), part, scale, added, x, g), total)
                    for place, total in zip(places, sums, strict=True):
                        at.store(at.load(total), place, align=4)
                begun = whole

        self._each_chunk(row, add)
        factor = self._factor(row)
        with self.loop(n(0), rows) as x:
            self._write(self.load(totals, at.mul(x, n(of_codes)), numbers), row, x, factor)

    # -- both ---------------------------------------------------------------------------------------------------------

    def _each_chunk(self, row: Value, add: Callable[[Value, int], None]) -> None:
        """Emit a loop over the chunks of a row's columns. It calls ``add(first group, number of columns)`` for each.

        The same chunks of the next tile's rows are prefetched.
        """
        at, n, p, coding = self.at, self.number, self._p, self._coding
        columns = coding.chunk * coding.group
        whole, rest = divmod(p.columns, columns)
        nbytes = self.lanes * (p.row_bytes // max(whole, 1))
        next_tile = at.mul(at.add(row, n(self.lanes)), n(p.row_bytes))
        if whole:
            with self.loop(n(0), n(whole)) as chunk:
                self.prefetch(self.codes, at.add(next_tile, at.mul(chunk, n(nbytes))), nbytes)
                add(at.mul(chunk, n(coding.chunk)), columns)
        if rest:
            add(n(whole * coding.chunk), rest)

    def _scale_offsets(self, row: Value) -> list[Value]:
        """Return for each row of a tile where its scales begin in their section, in bytes: i64, one for each row."""
        at, n, p = self.at, self.number, self._p
        if not p.scales:
            return []
        down, across = p.grid
        stride = n(across * ITEM_BYTES[SCALE_TYPES[p.scales]])
        rows = [at.add(row, n(lane)) for lane in range(self.lanes)]
        if p.block_rows > 1:
            part = n(p.part_rows)
            of_part = [at.udiv(at.urem(index, part), n(p.block_rows)) for index in rows]
            rows = [at.add(at.mul(at.udiv(r, part), n(down)), own) for r, own in zip(rows, of_part, strict=True)]
        return [at.mul(index, stride) for index in rows]

    def _factor(self, row: Value) -> Value | None:
        """Return the factor of the final sum of each row of a tile, fp32 [lanes]; None if it is 1."""
        at, n, p = self.at, self.number, self._p
        unit = None if self._coding.unit == 1 else self.all(F32, self._coding.unit, self.lanes)
        if not p.globals:
            return unit
        places = [at.mul(at.udiv(at.add(row, n(lane)), n(p.part_rows)), n(4)) for lane in range(self.lanes)]
        factors = at.bitcast(self.words(self._globals, places, 4), vector(F32, self.lanes))
        if unit is None:
            unit = self.all(F32, 1.0, self.lanes)
        return at.fmul(unit, factors) if p.globals == "multiply" else at.fdiv(unit, factors)

    def _sums(self, code: Callable[[int], Value], count: int, rows: Sequence[Value], g: Value) -> list[Value]:
        """Emit the sums of products of a group's codes with each of some rows of x, fp32 [lanes].

        ``code(i)`` emits the i-th of the group's ``count`` vectors of codes.
        """
        at, n, coding = self.at, self.number, self._coding
        starts = [at.add(at.mul(x, n(self._p.columns)), at.mul(g, n(coding.group))) for x in rows]
        if coding.is_exact:
            return self._float_sums(code, count, starts)
        # the sums of n are multiplied by -centre already (``Rounding.factor``)
        totals = [
            self.spread(self.load(self._xs, at.mul(self._group_of(x, g), n(4)), I32), self.lanes)
            if coding.centre and not self._is_signed
            else self.all(I32, 0, self.lanes)
            for x in rows
        ]
        spans = -(-count // self._span) if self._span else 1
        for span in range(spans):
            short: list[Value | None] = [None] * len(rows)
            for i in range(count * span // spans, count * (span + 1) // spans):
                q = code(i)
                size = self._size(q)
                for number, start in enumerate(starts):
                    four = self.load(self._xn, at.add(start, n(4 * i)), I32)
                    x = at.bitcast(self.spread(four, self.lanes), vector(I8, 4 * self.lanes))
                    if self._span:
                        if self._is_signed:
                            x = self.intrinsic("llvm.x86.avx2.psign.b", x.type, x, q)
                        pairs = self.intrinsic("llvm.x86.avx2.pmadd.ub.sw", vector(I16, 16), size, x)
                        before = short[number]
                        short[number] = pairs if before is None else at.add(before, pairs)
                    else:
                        totals[number] = dot(self, self.processor, totals[number], q, x, is_signed=self._is_signed)
            if self._span:
                ones = self.all(I16, 1, 16)
                wide = [self.intrinsic("llvm.x86.avx2.pmadd.wd", vector(I32, 8), pairs, ones) for pairs in short]
                totals = [at.add(total, partial) for total, partial in zip(totals, wide, strict=True)]
        return [at.sitofp(total, vector(F32, self.lanes)) for total in totals]

    def _size(self, q: Value) -> Value:
        """Return the absolute values of signed codes, as unsigned numbers, and codes without a sign as they are."""
        is_poison = ir.Constant(ir.IntType(1), 0)  # whether -128 has no result
        return self.intrinsic(f"llvm.abs.v{q.type.count}i8", q.type, q, is_poison) if self._is_signed else q

    def _float_sums(self, code: Callable[[int], Value], count: int, starts: Sequence[Value]) -> list[Value]:
        at, n = self.at, self.number
        chains = [[self._zeros()] * CHAINS for _ in starts]
        for i in range(count):
            w = code(i)
            for sums, start in zip(chains, starts, strict=True):
                x = self.spread(self.load(self._xn, at.mul(at.add(start, n(i)), n(4)), F32), self.lanes)
                sums[i % CHAINS] = at.fadd(sums[i % CHAINS], at.fmul(w, x))
        return [at.fadd(at.fadd(a, b), at.fadd(c, d)) for a, b, c, d in chains]

    def _group_of(self, x: Value, g: Value) -> Value:
        """Return the index of group ``g`` of row ``x`` of x among the groups of all rows."""
        return self.at.add(self.at.mul(x, self.number(self._p.columns // self._coding.group)), g)

    def _added(self, total: Value, part: Value, scale: Value, low: Value | None, x: Value, g: Value) -> Value:
        """Emit the addition of a group's sum ``part``, scaled, to ``total``: of group ``g`` and row ``x`` of x."""
        at, n = self.at, self.number
        if self._coding.is_exact:
            return at.fadd(total, at.fmul(part, scale))
        place = at.mul(self._group_of(x, g), n(8))
        t, t_sum = (self.spread(self.load(self._xt, at.add(place, n(i)), F32), self.lanes) for i in (0, 4))
        total = at.fadd(total, at.fmul(part, at.fmul(scale, t)))
        return total if low is None else at.fadd(total, at.fmul(low, t_sum))

    def _write(self, total: Value, row: Value, x: Value, factor: Value | None) -> None:
        """Write the results of a tile with row ``x`` of x."""
        at, n = self.at, self.number
        value = total if factor is None else at.fmul(total, factor)
        place = at.mul(at.add(at.mul(x, self._rows), row), n(self._out.itemsize))
        self.store_floats(value, self._y, place, self._out)

    def _load_vector(self, pointer: Value, type_: ir.VectorType, i: int) -> Value:
        return self.load(pointer, self.number(4 * self.lanes * i), type_)

    def _zeros(self) -> Value:
        return self.all(F32, 0.0, self.lanes)

    def _variable(self, type_: ir.VectorType) -> Value:
        with self.at.goto_entry_block():
            return self.at.alloca(type_)
