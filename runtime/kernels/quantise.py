"""Quantise weights in compiled code, to the same bytes that ``tiers.quant`` computes with torch.

The compiled code does the operations of ``hqq`` and ``codec`` in the same order, and fuses none of them. So the bytes
are the same on every processor, and the same as those of torch. Sums follow torch's order: runs of SUM_RUN numbers are
added up from the left, then the runs' sums are.

A *slice* is one group of weights in each of LANES neighbouring rows. The rows are the elements of vectors, so that a
sum over a group is a sum of vectors. A slice stays in the first-level cache while the solver goes over it repeatedly.

The module is long because most of it emits a single function, whose parts share memory for slices and variables.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

import numpy as np
import torch
from llvmlite import ir
from torch import Tensor

from moetier.tiers.layout import PAIR_BLOCK, ROW_TILE, Bits, Projection, RecordLayout
from moetier.tiers.quant import codec, hqq
from moetier.tiers.quant.codec import WeightError
from moetier.tiers.quant.packing import HALF, fold, load_pairs
from moetier.tiers.quant.zero_points import Levels

from .emitter import F32, I8, I16, I32, LANES, POINTER, Emitter, Value, new_module, once, vector
from .jit import Processor, refusal, this_processor
from .team import Kernel, compile_kernel

QUANTISE, PAIRS = "moetier_quantise", "moetier_pairs"  # names of the compiled functions
# Number of i64 fields in the context of QUANTISE. In order: number of row blocks that threads have taken, number of all
# row blocks; number of columns; pointer to the weights, bytes from one row to the next (or from one column to the next
# if the rows of a column are contiguous); number of padded rows of the projection; pointers to pairs, steps, offsets,
# low nibbles of codes, high nibbles of codes, errors, and the table of ``hqq.shrinking``
CONTEXT = 13
SUM_RUN = 16  # numbers that torch's cascade sum adds up from the left, before it adds up the sums of such runs
F64 = ir.DoubleType()
BYTES = LANES * 4  # bytes of an fp32 vector


class Stage(Enum):
    """Pass of a compiled function over the weights: a single one, or one of three if pairs are rounded to 8 bits."""

    ALL = "weights -> pairs, codes"
    STEPS = "weights -> steps"
    OFFSETS = "weights, stored steps -> offsets"
    CODES = "weights, stored steps and offsets -> codes"


class QuantiserForm(NamedTuple):
    """Properties of weights, of their encoding and of the pass, on which the emitted code depends."""

    dtype: torch.dtype  # type of the weights
    turned: bool  # whether the rows of a column are contiguous in memory, rather than the columns of a row
    bits: Bits
    group: int
    fast: bool  # whether offsets are those of plain rounding, in place of HQQ's
    stage: Stage


def encode(
    tensors: Mapping[str, Tensor | Levels], layout: RecordLayout, out: memoryview | np.ndarray, *, fast: bool = False
) -> dict[str, WeightError]:
    """Encode one expert as ``codec.encode`` does, in compiled code if this machine can compile it.

    ``tensors`` has matrices [rows, columns], or [columns, rows] if transposed, or Levels, and biases [size].
    """
    return codec.encode(tensors, layout, out, fast=fast, quantise=None if refusal() else quantise)


def quantise(
    weights: Tensor, p: Projection, views: Mapping[str, Tensor], fast: bool, processor: Processor | None = None
) -> WeightError:
    """Quantise ``weights`` [rows, columns] of one projection on one thread, and return the error of what is stored.

    The result is written into ``views``, which has the sections of the record by name. Raises CheckpointError as
    ``codec.encode`` does.
    """
    if 1 not in weights.stride():
        weights = weights.contiguous()
    work = _Work(weights, p, views, fast, processor or this_processor())
    if p.pairs == "bfloat16":
        work.run(Stage.ALL)
    else:
        # pairs are rounded in runs that cross row blocks, so each pass covers all rows before the next one begins
        for which, stage, found in ((0, Stage.STEPS, work.steps), (1, Stage.OFFSETS, work.offsets)):
            work.run(stage)
            work.store_pairs(found, which)
        work.run(Stage.CODES)
    error = work.error()
    # the squares of fp32 numbers don't overflow in fp64, so the second sum shows weights that are not finite
    if not (math.isfinite(error.squared) or (math.isfinite(error.squared_norm) and work.has_finite_pairs())):
        raise codec.not_finite(p)
    work.fold()
    return error


class _Work:
    """Memory for quantising one projection, and the runs of compiled functions over it."""

    def __init__(
        self, weights: Tensor, p: Projection, views: Mapping[str, Tensor], fast: bool, processor: Processor
    ) -> None:
        self._p, self._views = p, views
        self._processor = processor
        turned = weights.stride(1) != 1
        self._form = QuantiserForm(weights.dtype, turned, p.bits, p.group, fast, Stage.ALL)
        # if the last row block is not full, it becomes a matrix of its own, padded with rows of zeros
        rest = p.rows % ROW_TILE
        self._parts = [(0, weights[: p.rows - rest])] if p.rows > rest else []
        if rest:
            shape = (p.columns, ROW_TILE) if turned else (ROW_TILE, p.columns)
            last = torch.zeros(shape, dtype=weights.dtype)
            last = last.T if turned else last
            last[:rest] = weights[p.rows - rest :]
            self._parts.append((p.rows - rest, last))
        codes = (p.padded_rows, p.columns // 2)
        self._high = views.get(f"{p.name}.high")
        self._low = views[f"{p.name}.low" if p.bits == 8 else f"{p.name}.codes"]
        if p.bits in (3, 2):
            self._low = torch.empty(codes, dtype=torch.uint8)  # folded into the sections at the end
        self.steps, self.offsets = torch.empty(
            (2, p.columns // p.group, p.padded_rows) if p.pairs == "uint8" else (2, 0)
        )
        self._errors = torch.empty(p.padded_rows // ROW_TILE, 2, dtype=torch.float64)
        self._table = array("f", (number for pair in hqq.shrinking() for number in pair))

    def run(self, stage: Stage) -> None:
        """Run the compiled function of a stage over all rows."""
        p, kernel = self._p, quantising_kernel(self._processor, self._form._replace(stage=stage))
        for first, weights in self._parts:
            stride = weights.stride(1 if self._form.turned else 0) * weights.dtype.itemsize
            block, items = first // ROW_TILE, len(weights) // ROW_TILE
            codes = first * p.columns // 2
            fields = (
                *(0, items, p.columns, weights.data_ptr(), stride, p.padded_rows),
                self._views[f"{p.name}.pairs"].data_ptr() + 4 * first,
                *(values.data_ptr() + 4 * first for values in (self.steps, self.offsets)),
                self._low.data_ptr() + codes,
                0 if self._high is None else self._high.data_ptr() + codes,
                self._errors.data_ptr() + 16 * block,
                self._table.buffer_info()[0],
            )
            context = array("q", fields)
            kernel.run(context, 1)

    def store_pairs(self, found: Tensor, which: int) -> None:
        """Round the values ``found`` of s (``which`` 0) or b (``which`` 1) to 8 bits, and store them in the record.

        The bytes are those of ``packing.store_pairs``. ``found`` [columns / group, padded rows] is changed in place: it
        then holds the rounded values, as kernels will read them from the record. Padding rows become 0 in both.
        """
        p = self._p
        pairs, scales = (self._views[f"{p.name}.{section}"] for section in ("pairs", "pair_scales"))
        found[:, p.rows :] = found[:, p.rows - 1 : p.rows]
        fields = (
            0,
            len(scales),
            found.numel(),
            found.data_ptr(),
            pairs.data_ptr() + which,
            scales.data_ptr() + 4 * which,
        )
        context = array("q", fields)
        _pairs_kernel(self._processor).run(context, 1)
        found[:, p.rows :] = 0
        pairs[:, p.rows :, which] = 0

    def error(self) -> WeightError:
        """Return the error of the stored weights. Call this after the pass that finds the codes."""
        return WeightError(*self._errors.sum(0).tolist())

    def has_finite_pairs(self) -> bool:
        """Return whether the stored pairs are finite numbers."""
        return bool(load_pairs(self._p, self._views, 0, self._p.padded_rows).isfinite().all())

    def fold(self) -> None:
        """Set the codes of padding rows to 0, and fold codes of 3 and 2 bits into the record."""
        p = self._p
        if rest := p.rows % ROW_TILE:
            for plane in (self._low, self._high):
                if plane is not None:
                    last = plane.view(-1, p.columns, HALF)[-1]
                    last[:, max(rest - HALF, 0) :] &= 0x0F
                    last[:, min(rest, HALF) :] &= 0xF0
        if p.bits in (3, 2):
            fold(self._low.view(-1), 2, self._views[f"{p.name}.codes"])
        if p.bits == 3:
            fold(self._low.view(-1) >> 2, 4, self._views[f"{p.name}.plane"])


@once
def quantising_kernel(processor: Processor, form: QuantiserForm) -> Kernel:
    """Compile ``quantising_module``, once for each form and processor."""
    return compile_kernel(processor, quantising_module(form), QUANTISE)


@once
def _pairs_kernel(processor: Processor) -> Kernel:
    return compile_kernel(processor, pairs_module(), PAIRS)


def pairs_module() -> ir.Module:
    """Emit the function ``PAIRS(context)``, which rounds runs of PAIR_BLOCK numbers to 8 bits until none is left.

    The context: number of runs that threads have taken, number of all runs, number of all numbers; pointers to the
    numbers (the function replaces them by their rounded values), to the first code (only each second byte is a code of
    these numbers), and to the scale and minimum of the first run, bf16.
    """
    module = new_module()
    emit = Emitter(module, PAIRS, [POINTER])
    at, n, wide = emit.at, emit.number, vector(F32, LANES)
    begun, (runs, count, *addresses) = emit.fields(6)
    numbers, codes, scales = (at.inttoptr(address, POINTER) for address in addresses)
    low, high = (at.alloca(wide) for _ in range(2))

    with emit.items(begun, runs) as run:
        first = at.mul(run, n(PAIR_BLOCK))
        last = at.add(first, n(PAIR_BLOCK))
        last = at.select(at.icmp_signed("<", last, count), last, count)  # a multiple of LANES
        at.store(emit.floats(math.inf), low)
        at.store(emit.floats(-math.inf), high)
        with emit.loop(first, last, LANES) as place:
            values = emit.load(numbers, at.mul(place, n(4)), wide)
            at.store(emit.smaller(values, at.load(low)), low)
            at.store(emit.larger(values, at.load(high)), high)
        bottom = emit.spread(emit.reduce(at.load(low), emit.smaller), LANES)
        top = emit.spread(emit.reduce(at.load(high), emit.larger), LANES)
        stored = [emit.narrow(v, LANES) for v in (at.fdiv(at.fsub(top, bottom), emit.floats(255)), bottom)]
        for number, value in enumerate(stored):
            one = at.extract_element(value, ir.Constant(I32, 0))
            emit.store(one, scales, at.add(at.mul(run, n(8)), n(2 * number)))
        scale, minimum = (emit.widen(value, LANES) for value in stored)
        some = at.fcmp_ordered(">", scale, emit.floats(0))
        with emit.loop(first, last, LANES) as place:
            values = emit.load(numbers, at.mul(place, n(4)), wide)
            scaled = at.select(some, at.fdiv(at.fsub(values, minimum), scale), emit.floats(0))
            shifted, code = emit.nearest(scaled, 0, 255)
            read = at.fadd(at.fmul(code, scale), minimum)
            emit.store(emit.widen(emit.narrow(read, LANES), LANES), numbers, at.mul(place, n(4)))
            bytes_ = at.trunc(at.bitcast(shifted, vector(I32, LANES)), vector(I8, LANES))
            for i in range(LANES):
                byte = at.extract_element(bytes_, ir.Constant(I32, i))
                emit.store(byte, codes, at.add(at.mul(place, n(2)), n(2 * i)))
    at.ret_void()
    return module


def quantising_module(form: QuantiserForm) -> ir.Module:
    """Emit the function ``QUANTISE(context)``, which quantises row blocks until none is left."""
    module = new_module()
    _Quantiser(module, form)
    return module


class _Quantiser(Emitter):
    """Emitter of the function QUANTISE: loops over row blocks, groups and slices, and the work on a slice."""

    def __init__(self, module: ir.Module, form: QuantiserForm) -> None:
        super().__init__(module, QUANTISE, [POINTER])
        self._form = form
        at, n = self.at, self.number
        begun, fields = self.fields(CONTEXT)
        blocks, self._columns, weights, self._stride, self._rows, *addresses = fields
        self._weights = at.inttoptr(weights, POINTER)
        self._pairs, self._steps, self._offsets, low, high, errors, self._table = (
            at.inttoptr(address, POINTER) for address in addresses
        )
        # memory for the weights of a slice, for its weights in units of a step, and for the codes of two slices
        self._slice, self._scaled = (self.memory(form.group * BYTES) for _ in range(2))
        self._codes = self.memory(2 * form.group * LANES)
        self._variables = {name: at.alloca(vector(F32, LANES)) for name in _VARIABLES}
        self._sums = [at.alloca(vector(F64, LANES)) for _ in range(2)]
        with self.items(begun, blocks) as block:
            for place in self._sums:
                at.store(self.all(F64, 0.0, LANES), place)
            first = at.mul(block, n(ROW_TILE))
            with self.loop(n(0), self._columns, form.group) as column, self.loop(n(0), n(HALF), LANES) as row:
                with self.loop(n(0), n(2)) as half:
                    self._quantise(at.add(at.add(first, row), at.mul(half, n(HALF))), column, half)
                if form.stage in (Stage.ALL, Stage.CODES):
                    start = at.add(at.mul(at.add(at.mul(block, self._columns), column), n(HALF)), row)
                    self._pack(at.gep(low, [start]), at.gep(high, [start]))
            if form.stage in (Stage.ALL, Stage.CODES):
                for number, place in enumerate(self._sums):
                    total = self.reduce(at.load(place), at.fadd)
                    self.store(total, errors, at.add(at.mul(block, n(16)), n(8 * number)))
        at.ret_void()

    def _set(self, name: str, value: Value) -> None:
        self.at.store(value, self._variables[name])

    def _get(self, name: str) -> Value:
        return self.at.load(self._variables[name])

    def _quantise(self, row: Value, column: Value, half: Value) -> None:
        """Emit the work on the slice at ``row`` and ``column``.

        ``half`` is its number, 0 or 1, of the two slices whose codes share bytes.
        """
        at, n, form = self.at, self.number, self._form
        group = at.udiv(column, n(form.group))
        place = at.mul(at.add(at.mul(group, self._rows), row), n(4))  # byte offset of pairs, steps and offsets
        self._load(row, column)
        if form.stage in (Stage.ALL, Stage.STEPS):
            step = at.fdiv(at.fsub(self._get("high"), self._get("low")), self.floats(2**form.bits - 1))
            step = at.select(at.fcmp_ordered("<", step, self.floats(hqq.TINY)), self.floats(0.0), step)
            if form.stage is Stage.STEPS:
                self.store(step, self._steps, place)
                return
            stored_step = self.narrow(step, LANES)
            step = self.widen(stored_step, LANES)
        else:
            step = self.load(self._steps, place, vector(F32, LANES))
        inverse = at.fdiv(self.floats(1.0), step)
        inverse = at.select(at.fcmp_ordered("<", step, self.floats(hqq.TINY)), self.floats(0.0), inverse)
        if form.stage is Stage.CODES:
            offset = self.load(self._offsets, place, vector(F32, LANES))
        else:
            low, two = self._get("low"), self.floats(2.0)
            centre = at.fadd(low, at.fdiv(at.fsub(self._get("high"), low), two))
            offset = at.fadd(centre, at.fdiv(step, two))
            if not form.fast:
                offset = self._solve(offset, step, inverse)
            if form.stage is Stage.OFFSETS:
                self.store(offset, self._offsets, place)
                return
            stored = self.narrow(offset, LANES)
            offset = self.widen(stored, LANES)
            wide = vector(I32, LANES)
            pair = at.or_(at.zext(stored_step, wide), at.shl(at.zext(stored, wide), self.all(I32, 16, LANES)))
            self.store(pair, self._pairs, place)
        self._round(step, inverse, offset, at.mul(half, n(form.group * LANES)))

    # -- loading -------------------------------------------------------------------------------------------------------

    def _load(self, row: Value, column: Value) -> None:
        """Emit the loading of a slice into its memory, and the search for the lowest and highest weight of each row."""
        at, n, form = self.at, self.number, self._form
        itemsize = form.dtype.itemsize
        self._set("low", self.floats(math.inf))
        self._set("high", self.floats(-math.inf))
        if not form.turned:  # hardware prefetchers can't follow so many rows
            following = at.mul(at.add(column, n(form.group)), n(itemsize))
            with self.loop(n(0), n(LANES)) as each:
                start = at.mul(at.add(row, each), self._stride)
                self.prefetch(self._weights, at.add(start, following), form.group * itemsize)
        with self.loop(n(0), n(form.group), LANES) as tile:
            first = at.add(column, tile)
            if form.turned:
                places = [
                    at.add(at.mul(at.add(first, n(i)), self._stride), at.mul(row, n(itemsize))) for i in range(LANES)
                ]
            else:
                places = [
                    at.add(at.mul(at.add(row, n(i)), self._stride), at.mul(first, n(itemsize))) for i in range(LANES)
                ]
            columns = [self._widened(place) for place in places]
            if not form.turned:
                columns = self._transposed(columns)
            low, high = self._get("low"), self._get("high")
            for number, values in enumerate(columns):
                low, high = self.smaller(values, low), self.larger(values, high)
                self.store(values, self._slice, at.add(at.mul(tile, n(BYTES)), n(number * BYTES)))
            self._set("low", low)
            self._set("high", high)

    def _widened(self, offset: Value) -> Value:
        """Emit a load of LANES weights as fp32."""
        if self._form.dtype != torch.float16:
            return self.load_floats(self._weights, offset, self._form.dtype, LANES)
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

    # -- the solver ----------------------------------------------------------------------------------------------------

    def _solve(self, plain: Value, step: Value, inverse: Value) -> Value:
        """Emit code that does what ``hqq.solve`` does, for the slice that was loaded. Return the offset b of each row.

        ``plain`` has the offsets of plain rounding. ``inverse`` is 1 / ``step``, or 0 where the step is 0.
        """
        at, n, form = self.at, self.number, self._form
        size = n(form.group * BYTES)
        with self.loop(n(0), size, BYTES) as place:
            weight = self.load(self._slice, place, vector(F32, LANES))
            self.store(at.fmul(at.fsub(weight, plain), inverse), self._scaled, place)
        for name, value in (("offset", 0.0), ("best", 0.0), ("least", math.inf)):
            self._set(name, self.floats(value))
        with self.loop(n(0), n(8 * hqq.ITERATIONS), 8) as row:
            threshold, beta = (self.spread(self.load(self._table, at.add(row, n(4 * i)), F32), LANES) for i in range(2))
            offset = self._get("offset")
            for name in ("sizes", "errors", "largest"):
                self._set(name, self.floats(0.0))
            with self.loop(n(0), size, SUM_RUN * BYTES) as run:
                self._sum(run, offset)
            better = at.fcmp_ordered("<", self._get("sizes"), self._get("least"))
            self._set("best", at.select(better, offset, self._get("best")))
            self._set("least", at.select(better, self._get("sizes"), self._get("least")))
            large = at.fcmp_ordered(">", at.fmul(self._get("largest"), step), threshold)
            some = at.icmp_unsigned("!=", at.bitcast(large, ir.IntType(LANES)), ir.Constant(ir.IntType(LANES), 0))
            with at.if_then(some, likely=False):  # not if the weights are of usual size: their errors are smaller
                self._set("errors", self.floats(0.0))
                with self.loop(n(0), size, SUM_RUN * BYTES) as run:
                    self._sum_shrunk(run, offset, step, inverse, threshold, beta)
            mean = at.fmul(self._get("errors"), self.floats(1 / form.group))
            self._set("offset", at.fadd(offset, mean))
        return at.fadd(at.fmul(self._get("best"), step), plain)

    def _sum(self, run: Value, offset: Value) -> None:
        """Emit the addition of a run's errors and of their absolute values, and the search for the largest of these."""
        at = self.at
        errors = sizes = None
        largest = self._get("largest")
        for i in range(SUM_RUN):
            error = self._error(at.add(run, self.number(i * BYTES)), offset)
            size = self.intrinsic(f"llvm.fabs.v{LANES}f32", error.type, error)
            errors = error if errors is None else at.fadd(errors, error)
            sizes = size if sizes is None else at.fadd(sizes, size)
            largest = self.larger(size, largest)
        self._set("largest", largest)
        self._set("errors", at.fadd(self._get("errors"), errors))
        self._set("sizes", at.fadd(self._get("sizes"), sizes))

    def _error(self, place: Value, offset: Value) -> Value:
        """Emit the difference between weights and their codes, in units of a step."""
        scaled = self.at.fsub(self.load(self._scaled, place, vector(F32, LANES)), offset)
        return self.at.fsub(scaled, self._code(scaled)[1])

    def _code(self, scaled: Value) -> tuple[Value, Value]:
        """Emit the codes nearest to weights that are given in units of a step, in the two forms of ``nearest``."""
        half = 2 ** (self._form.bits - 1)
        return self.nearest(scaled, -half, half - 1)

    def _sum_shrunk(
        self, run: Value, offset: Value, step: Value, inverse: Value, threshold: Value, beta: Value
    ) -> None:
        """Emit the addition of a run's errors, less the result of the proximal step where they exceed ``threshold``."""
        at = self.at
        self._set("run", self.floats(0.0))
        with self.loop(run, at.add(run, self.number(SUM_RUN * BYTES)), BYTES) as place:
            error = self._error(place, offset)
            product = at.fmul(error, step)
            size = self.intrinsic(f"llvm.fabs.v{LANES}f32", product.type, product)
            shrunk = self.larger(at.fsub(size, at.fdiv(self._power(size), beta)), self.floats(0.0))
            shrunk = self.intrinsic(f"llvm.copysign.v{LANES}f32", shrunk.type, shrunk, product)
            smaller = at.fsub(error, at.fmul(shrunk, inverse))
            large = at.fcmp_ordered(">", size, threshold)
            self._set("run", at.fadd(self._get("run"), at.select(large, smaller, error)))
        self._set("errors", at.fadd(self._get("errors"), self._get("run")))

    def _power(self, size: Value) -> Value:
        """Emit code that does what ``hqq.power`` does."""
        at = self.at

        def number(value: float) -> Value:
            return self.all(F64, value, LANES)

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

    # -- codes ---------------------------------------------------------------------------------------------------------

    def _round(self, step: Value, inverse: Value, offset: Value, codes: Value) -> None:
        """Emit the rounding of a slice to codes, and the addition to the sums of squares for the error.

        Each code becomes a byte in the memory for codes, from the offset ``codes`` on.
        """
        at, n, form = self.at, self.number, self._form
        half = self.all(I32, 2 ** (form.bits - 1), LANES)
        with self.loop(n(0), n(form.group)) as column:
            weight = self.load(self._slice, at.mul(column, n(BYTES)), vector(F32, LANES))
            shifted, code = self._code(at.fmul(at.fsub(weight, offset), inverse))
            byte = at.trunc(at.add(at.bitcast(shifted, half.type), half), vector(I8, LANES))
            self.store(byte, self._codes, at.add(codes, at.mul(column, n(LANES))))
            difference = at.fsub(at.fadd(at.fmul(code, step), offset), weight)
            for place, value in zip(self._sums, (difference, weight), strict=True):
                wide = at.fpext(value, vector(F64, LANES))
                at.store(at.fadd(at.load(place), at.fmul(wide, wide)), place)

    def _pack(self, low: Value, high: Value) -> None:
        """Emit the packing of two slices' codes in the order in which kernels read them, two nibbles a byte.

        They are written to ``low``, or with 8 bits the low nibbles to ``low`` and the high nibbles to ``high``.
        """
        at, n, form = self.at, self.number, self._form
        with self.loop(n(0), n(form.group)) as column:
            first, second = (
                self.load(self._codes, at.add(at.mul(column, n(LANES)), n(i * form.group * LANES)), vector(I8, LANES))
                for i in range(2)
            )
            four, nibble = self.all(I8, 4, LANES), self.all(I8, 0x0F, LANES)
            place = at.mul(column, n(HALF))
            if form.bits == 8:
                upper = at.or_(at.lshr(first, four), at.and_(second, self.all(I8, 0xF0, LANES)))
                self.store(upper, high, place)
                first = at.and_(first, nibble)
            self.store(at.or_(first, at.shl(second, four)), low, place)


_VARIABLES = ("low", "high", "offset", "best", "least", "sizes", "errors", "largest", "run")
