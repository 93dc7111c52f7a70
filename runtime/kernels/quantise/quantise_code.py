"""Emit the compiled code that quantises weights. ``encode.py`` runs it.

A *slice* is one group of weights in each of LANES neighbouring rows. The rows are the elements of vectors, so that a
sum over a group is a sum of vectors. A slice stays in the first-level cache while the solver goes over it repeatedly.

HQQ's solver does the operations of ``tiers.quant.hqq.solve`` in the same order. Sums follow torch's order: runs of
SUM_RUN numbers are added up from the left, then the runs' sums are.
"""

from __future__ import annotations

import math
from array import array
from enum import Enum
from typing import NamedTuple

import torch
from llvmlite import ir

from moetier.runtime.kernels.jit.emitter import (
    F32,
    I8,
    I16,
    I32,
    LANES,
    POINTER,
    Emitter,
    Value,
    new_module,
    once,
    vector,
)
from moetier.runtime.kernels.jit.processor import Processor
from moetier.runtime.kernels.jit.team import Kernel, compile_kernel
from moetier.tiers.layout import ROW_TILE, Bits
from moetier.tiers.quant import hqq
from moetier.tiers.quant.packing import HALF

SUM_RUN = 16  # numbers that torch's cascade sum adds up from the left, before it adds up the sums of such runs
BYTES = LANES * 4  # bytes of an fp32 vector
F64 = ir.DoubleType()
_VARIABLES = ("offset", "best", "least", "sizes", "errors", "largest", "run")


def solver_table() -> array[float]:
    """Return ``hqq.shrinking`` as the memory that the emitted code reads: fp32 numbers, two for each iteration."""
    return array("f", (number for pair in hqq.shrinking() for number in pair))


class Solver:
    """Emitter of the solver for groups of weights in memory, one group in each element of vectors."""

    def __init__(self, emit: Emitter, bits: Bits, group: int, weights: Value, table: Value) -> None:
        """Emit memory and variables; call this in the entry block of the function.

        Args:
            emit: the emitter of the function.
            bits: bits per weight.
            group: number of weights in a group.
            weights: pointer to ``group`` fp32 vectors.
            table: pointer to ``solver_table()``.
        """
        self._emit = emit
        self._half = 2 ** (bits - 1)
        self._group = group
        self._weights = weights
        self._table = table
        self._scaled = emit.memory(group * BYTES)  # the weights, divided by the scale
        self._variables = {name: emit.at.alloca(vector(F32, LANES)) for name in _VARIABLES}

    def solve(self, plain: Value, scale: Value, inverse: Value) -> Value:
        """Emit the search for the offset b of each group.

        ``plain`` has the offsets of plain rounding. ``inverse`` is 1 / ``scale``, or 0 where the scale is 0.
        """
        emit, at, n = self._emit, self._emit.at, self._emit.number
        size = n(self._group * BYTES)
        with emit.loop(n(0), size, BYTES) as place:
            weight = emit.load(self._weights, place, vector(F32, LANES))
            emit.store(at.fmul(at.fsub(weight, plain), inverse), self._scaled, place)
        for name, value in (("offset", 0.0), ("best", 0.0), ("least", math.inf)):
            self._set(name, emit.floats(value))
        with emit.loop(n(0), n(8 * hqq.ITERATIONS), 8) as row:
            threshold, beta = (emit.spread(emit.load(self._table, at.add(row, n(4 * i)), F32), LANES) for i in range(2))
            offset = self._get("offset")
            for name in ("sizes", "errors", "largest"):
                self._set(name, emit.floats(0.0))
            with emit.loop(n(0), size, SUM_RUN * BYTES) as run:
                self._sum(run, offset)
            better = at.fcmp_ordered("<", self._get("sizes"), self._get("least"))
            self._set("best", at.select(better, offset, self._get("best")))
            self._set("least", at.select(better, self._get("sizes"), self._get("least")))
            large = at.fcmp_ordered(">", at.fmul(self._get("largest"), scale), threshold)
            some = at.icmp_unsigned("!=", at.bitcast(large, ir.IntType(LANES)), ir.Constant(ir.IntType(LANES), 0))
            with at.if_then(some, likely=False):  # not if the weights are of usual size: their errors are smaller
                self._set("errors", emit.floats(0.0))
                with emit.loop(n(0), size, SUM_RUN * BYTES) as run:
                    self._sum_shrunk(run, offset, scale, inverse, threshold, beta)
            mean = at.fmul(self._get("errors"), emit.floats(1 / self._group))
            self._set("offset", at.fadd(offset, mean))
        return at.fadd(at.fmul(self._get("best"), scale), plain)

    def _set(self, name: str, value: Value) -> None:
        self._emit.at.store(value, self._variables[name])

    def _get(self, name: str) -> Value:
        return self._emit.at.load(self._variables[name])

    def _sum(self, run: Value, offset: Value) -> None:
        """Emit the addition of a run's errors and of their absolute values, and the search for the largest of these."""
        emit, at = self._emit, self._emit.at
        errors = sizes = None
        largest = self._get("largest")
        for i in range(SUM_RUN):
            error = self._error(at.add(run, emit.number(i * BYTES)), offset)
            size = emit.intrinsic(f"llvm.fabs.v{LANES}f32", error.type, error)
            errors = error if errors is None else at.fadd(errors, error)
            sizes = size if sizes is None else at.fadd(sizes, size)
            largest = emit.larger(size, largest)
        self._set("largest", largest)
        self._set("errors", at.fadd(self._get("errors"), errors))
        self._set("sizes", at.fadd(self._get("sizes"), sizes))

    def _error(self, place: Value, offset: Value) -> Value:
        """Emit the rounding error of scaled weights: (w/s - b) - nearest code."""
        emit = self._emit
        scaled = emit.at.fsub(emit.load(self._scaled, place, vector(F32, LANES)), offset)
        return emit.at.fsub(scaled, emit.nearest(scaled, -self._half, self._half - 1)[1])

    def _sum_shrunk(
        self, run: Value, offset: Value, scale: Value, inverse: Value, threshold: Value, beta: Value
    ) -> None:
        """Emit the addition of a run's errors, less the result of the proximal step where they exceed ``threshold``."""
        emit, at = self._emit, self._emit.at
        self._set("run", emit.floats(0.0))
        with emit.loop(run, at.add(run, emit.number(SUM_RUN * BYTES)), BYTES) as place:
            error = self._error(place, offset)
            product = at.fmul(error, scale)
            size = emit.intrinsic(f"llvm.fabs.v{LANES}f32", product.type, product)
            shrunk = emit.larger(at.fsub(size, at.fdiv(_power(emit, size), beta)), emit.floats(0.0))
            shrunk = emit.intrinsic(f"llvm.copysign.v{LANES}f32", shrunk.type, shrunk, product)
            smaller = at.fsub(error, at.fmul(shrunk, inverse))
            large = at.fcmp_ordered(">", size, threshold)
            self._set("run", at.fadd(self._get("run"), at.select(large, smaller, error)))
        self._set("errors", at.fadd(self._get("errors"), self._get("run")))


def _power(emit: Emitter, size: Value) -> Value:
    """Emit code that does what ``hqq.power`` does."""
    at = emit.at

    def number(value: float) -> Value:
        return emit.all(F64, value, LANES)

    wide = vector(F64, LANES)
    bits = at.sitofp(at.bitcast(size, vector(I32, LANES)), wide)
    guess = at.fadd(at.fmul(bits, number(hqq.GUESS[0])), number(hqq.GUESS[1]))
    y = at.fpext(at.bitcast(at.fptosi(guess, vector(I32, LANES)), vector(F32, LANES)), wide)
    x = at.fpext(size, wide)
    cube = at.fmul(at.fmul(x, x), x)
    for _ in range(hqq.NEWTON):
        y2 = at.fmul(y, y)
        y4 = at.fmul(y2, y2)
        y10 = at.fmul(at.fmul(y4, y4), y2)
        y = at.fadd(y, at.fdiv(at.fmul(y, at.fsub(number(1.0), at.fmul(cube, y10))), number(10.0)))
    return at.fptrunc(y, vector(F32, LANES))


QUANTISE = "moetier_quantise"  # name of the compiled function
# Number of i64 fields in the context. In order: number of row tiles that threads have taken, number of all row tiles;
# number of columns; pointer to the weights, bytes from one row to the next (or from one column to the next if the rows
# of a column are contiguous); number of padded rows of the projection; pointers to pairs, scales, offsets, low nibbles
# of codes, high nibbles of codes, errors, and ``solver_table()``
CONTEXT = 13


class QuantiserPass(Enum):
    """Pass of a compiled function over the weights: a single one, or one of three if pairs are rounded to 8 bits."""

    ALL = "weights -> pairs, codes"
    SCALES = "weights -> scales"
    OFFSETS = "weights, stored scales -> offsets"
    CODES = "weights, stored scales and offsets -> codes"


class QuantiserVariant(NamedTuple):
    """Properties of weights, of their encoding and of the pass, on which the emitted code depends."""

    dtype: torch.dtype  # type of the weights
    turned: bool  # whether the rows of a column are contiguous in memory, rather than the columns of a row
    bits: Bits
    group: int
    fast: bool  # whether offsets are those of plain rounding, in place of HQQ's
    stage: QuantiserPass


@once
def quantising_kernel(processor: Processor, variant: QuantiserVariant) -> Kernel:
    """Compile the function ``QUANTISE(context)``, which quantises row tiles until none is left."""
    return compile_kernel(processor, _Quantiser(variant).finish(), QUANTISE)


class _Quantiser(Emitter):
    """Emitter of the function QUANTISE: loops over row tiles, groups and slices, and the work on a slice."""

    def __init__(self, variant: QuantiserVariant) -> None:
        super().__init__(new_module(), QUANTISE, [POINTER])
        self._variant = variant
        at, n = self.at, self.number
        begun, fields = self.fields(CONTEXT)
        tiles, self._columns, weights, self._stride, self._rows, *addresses = fields
        self._weights = at.inttoptr(weights, POINTER)
        self._pairs, self._scales, self._offsets, low, high, errors, table = (
            at.inttoptr(address, POINTER) for address in addresses
        )
        self._slice = self.memory(variant.group * BYTES)  # for the weights of a slice
        self._solver = Solver(self, variant.bits, variant.group, self._slice, table)
        self._codes = self.memory(2 * variant.group * LANES)  # for the codes of two slices
        self._low, self._high = (at.alloca(vector(F32, LANES)) for _ in range(2))  # range of each row's weights
        self._sums = [at.alloca(vector(F64, LANES)) for _ in range(2)]
        with self.items(begun, tiles) as tile:
            for place in self._sums:
                at.store(self.all(F64, 0.0, LANES), place)
            first = at.mul(tile, n(ROW_TILE))
            with self.loop(n(0), self._columns, variant.group) as column, self.loop(n(0), n(HALF), LANES) as row:
                with self.loop(n(0), n(2)) as half:
                    self._quantise(at.add(at.add(first, row), at.mul(half, n(HALF))), column, half)
                if variant.stage in (QuantiserPass.ALL, QuantiserPass.CODES):
                    start = at.add(at.mul(at.add(at.mul(tile, self._columns), column), n(HALF)), row)
                    self._pack(at.gep(low, [start]), at.gep(high, [start]))
            if variant.stage in (QuantiserPass.ALL, QuantiserPass.CODES):
                for number, place in enumerate(self._sums):
                    total = self.reduce(at.load(place), at.fadd)
                    self.store(total, errors, at.add(at.mul(tile, n(16)), n(8 * number)))

    def _quantise(self, row: Value, column: Value, half: Value) -> None:
        """Emit the work on the slice at ``row`` and ``column``.

        ``half`` is its number, 0 or 1, of the two slices whose codes share bytes.
        """
        at, n, variant = self.at, self.number, self._variant
        group = at.udiv(column, n(variant.group))
        place = at.mul(at.add(at.mul(group, self._rows), row), n(4))  # byte offset of pairs, scales and offsets
        self._load(row, column)
        if variant.stage in (QuantiserPass.ALL, QuantiserPass.SCALES):
            scale = at.fdiv(at.fsub(at.load(self._high), at.load(self._low)), self.floats(2**variant.bits - 1))
            scale = at.select(at.fcmp_ordered("<", scale, self.floats(hqq.TINY)), self.floats(0.0), scale)
            if variant.stage is QuantiserPass.SCALES:
                self.store(scale, self._scales, place)
                return
            stored_scale = self.narrow(scale, LANES)
            scale = self.widen(stored_scale, LANES)
        else:
            scale = self.load(self._scales, place, vector(F32, LANES))
        inverse = at.fdiv(self.floats(1.0), scale)
        inverse = at.select(at.fcmp_ordered("<", scale, self.floats(hqq.TINY)), self.floats(0.0), inverse)
        if variant.stage is QuantiserPass.CODES:
            offset = self.load(self._offsets, place, vector(F32, LANES))
        else:
            low, two = at.load(self._low), self.floats(2.0)
            centre = at.fadd(low, at.fdiv(at.fsub(at.load(self._high), low), two))
            offset = at.fadd(centre, at.fdiv(scale, two))
            if not variant.fast:
                offset = self._solver.solve(offset, scale, inverse)
            if variant.stage is QuantiserPass.OFFSETS:
                self.store(offset, self._offsets, place)
                return
            stored = self.narrow(offset, LANES)
            offset = self.widen(stored, LANES)
            wide = vector(I32, LANES)
            pair = at.or_(at.zext(stored_scale, wide), at.shl(at.zext(stored, wide), self.all(I32, 16, LANES)))
            self.store(pair, self._pairs, place)
        self._round(scale, inverse, offset, at.mul(half, n(variant.group * LANES)))

    # -- loading -------------------------------------------------------------------------------------------------------

    def _load(self, row: Value, column: Value) -> None:
        """Emit the loading of a slice into its memory, and the search for the lowest and highest weight of each row."""
        at, n, variant = self.at, self.number, self._variant
        itemsize = variant.dtype.itemsize
        at.store(self.floats(math.inf), self._low)
        at.store(self.floats(-math.inf), self._high)
        if not variant.turned:  # hardware prefetchers can't follow so many rows
            following = at.mul(at.add(column, n(variant.group)), n(itemsize))
            with self.loop(n(0), n(LANES)) as lane:
                start = at.mul(at.add(row, lane), self._stride)
                self.prefetch(self._weights, at.add(start, following), variant.group * itemsize)
        with self.loop(n(0), n(variant.group), LANES) as tile:
            first = at.add(column, tile)
            if variant.turned:
                places = [
                    at.add(at.mul(at.add(first, n(i)), self._stride), at.mul(row, n(itemsize))) for i in range(LANES)
                ]
            else:
                places = [
                    at.add(at.mul(at.add(row, n(i)), self._stride), at.mul(first, n(itemsize))) for i in range(LANES)
                ]
            columns = [self._widened(place) for place in places]
            if not variant.turned:
                columns = self._transposed(columns)
            low, high = at.load(self._low), at.load(self._high)
            for number, values in enumerate(columns):
                low, high = self.smaller(values, low), self.larger(values, high)
                self.store(values, self._slice, at.add(at.mul(tile, n(BYTES)), n(number * BYTES)))
            at.store(low, self._low)
            at.store(high, self._high)

    def _widened(self, offset: Value) -> Value:
        """Emit a load of LANES weights as fp32. What is infinite in fp16 becomes NaN."""
        if self._variant.dtype != torch.float16:
            return self.load_floats(self._weights, offset, self._variant.dtype, LANES)
        at = self.at
        half = self.load(self._weights, offset, vector(I16, LANES))
        is_finite = at.icmp_signed("<", at.and_(half, self.all(I16, 0x7FFF, LANES)), self.all(I16, 0x7C00, LANES))
        return at.select(is_finite, self.widen_half(half, LANES), self.floats(math.nan))

    def _transposed(self, rows: list[Value]) -> list[Value]:
        """Emit the transposition of a square of LANES vectors, by exchanges of ever smaller blocks."""
        size = LANES // 2
        while size:
            upper = [i for i in range(LANES) if not i & size]
            for i in upper:
                first, second = rows[i], rows[i + size]
                rows[i] = self.pick(first, second, [k if not k & size else LANES + k - size for k in range(LANES)])
                rows[i + size] = self.pick(
                    first, second, [k + size if not k & size else LANES + k for k in range(LANES)]
                )
            size //= 2
        return rows

    # -- codes ---------------------------------------------------------------------------------------------------------

    def _round(self, scale: Value, inverse: Value, offset: Value, codes: Value) -> None:
        """Emit the rounding of a slice to codes, and the addition to the sums of squares for the error.

        Each code becomes a byte in the memory for codes, from the offset ``codes`` on.
        """
        at, n, variant = self.at, self.number, self._variant
        half = 2 ** (variant.bits - 1)
        with self.loop(n(0), n(variant.group)) as column:
            weight = self.load(self._slice, at.mul(column, n(BYTES)), vector(F32, LANES))
            shifted, code = self.nearest(at.fmul(at.fsub(weight, offset), inverse), -half, half - 1)
            whole = at.add(at.bitcast(shifted, vector(I32, LANES)), self.all(I32, half, LANES))
            byte = at.trunc(whole, vector(I8, LANES))
            self.store(byte, self._codes, at.add(codes, at.mul(column, n(LANES))))
            difference = at.fsub(at.fadd(at.fmul(code, scale), offset), weight)
            for place, value in zip(self._sums, (difference, weight), strict=True):
                wide = at.fpext(value, vector(F64, LANES))
                at.store(at.fadd(at.load(place), at.fmul(wide, wide)), place)

    def _pack(self, low: Value, high: Value) -> None:
        """Emit the packing of two slices' codes in the order in which kernels read them, two nibbles a byte.

        They are written to ``low``, or with 8 bits the low nibbles to ``low`` and the high nibbles to ``high``.
        """
        at, n, variant = self.at, self.number, self._variant
        with self.loop(n(0), n(variant.group)) as column:
            first, second = (
                self.load(
                    self._codes, at.add(at.mul(column, n(LANES)), n(i * variant.group * LANES)), vector(I8, LANES)
                )
                for i in range(2)
            )
            four, nibble = self.all(I8, 4, LANES), self.all(I8, 0x0F, LANES)
            place = at.mul(column, n(HALF))
            if variant.bits == 8:
                upper = at.or_(at.lshr(first, four), at.and_(second, self.all(I8, 0xF0, LANES)))
                self.store(upper, high, place)
                first = at.and_(first, nibble)
            self.store(at.or_(first, at.shl(second, four)), low, place)
