"""Round rows of x for products with quantised matrices.

Each group of numbers in a row of x has a scale t of its own: x = n * t, with n in -127 .. 127. So a number is rounded
by at most half of a 127th of its group's largest number. That is about .7 % of a group of normally distributed numbers,
which is small beside the rounding of 4-bit weights (9 %). For matrices of FP8 numbers, x is only converted to fp32.
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from moetier.runtime.kernels.codings.row_codings import FLOAT_SCALE, coding_of
from moetier.runtime.kernels.codings.row_emitter import UNIT
from moetier.runtime.kernels.jit.emitter import (
    F32,
    I8,
    I32,
    POINTER,
    ROUNDING,
    Emitter,
    FloatType,
    Value,
    new_module,
    once,
    vector,
)
from moetier.runtime.kernels.jit.processor import Processor
from moetier.runtime.kernels.jit.team import Kernel, compile_kernel
from moetier.tiers.layout import Projection

# Number of i64 fields in the context of ROUND. In order: number of rows that threads have taken, number of all rows;
# pointers to x, to n, to t and t * sum of n, and to sum of n; K
ROUND_CONTEXT = 7
X = 2  # index of the address of x in a context of ROUND
ROUND = "moetier_round"  # name of the compiled function


class Rounding(NamedTuple):
    """Rounding of the rows of x for a product."""

    group: int  # number of neighbouring numbers that share a scale
    is_interleaved: bool = False  # numbers 0, 2, 4, 6 of every eight are stored before numbers 1, 3, 5, 7
    is_exact: bool = False  # x is only converted to fp32, and multiplied by FLOAT_SCALE
    factor: int = 1  # by which sums of n are multiplied before they are stored

    @classmethod
    def of(cls, p: Projection) -> Rounding:
        """Return how x is rounded for products with a projection."""
        if (coding := coding_of(p)) is None:
            return cls(p.group)
        if coding.is_exact:
            return cls(UNIT, is_exact=True)
        return cls(coding.group, coding.is_interleaved, factor=-coding.centre)

    @property
    def number_bytes(self) -> int:
        """Size of a rounded number in bytes."""
        return 4 if self.is_exact else 1

    def row_bytes(self, columns: int) -> int:
        """Size of a rounded row in bytes: the codes n; unless exact, plus per group t, t * sum of n, and sum of n."""
        return columns * self.number_bytes + (0 if self.is_exact else 12 * (columns // self.group))


@once
def rounding_kernel(processor: Processor, rounding: Rounding, dtype: FloatType) -> Kernel:
    """Compile ``rounding_module``, once for each rounding, type and processor."""
    return compile_kernel(processor, rounding_module(rounding, dtype), ROUND)


def rounding_module(rounding: Rounding, dtype: FloatType) -> ir.Module:
    """Emit the function ``ROUND(context)``, which rounds rows of x to 8 bits until none is left.

    x [rows, K] of ``dtype`` -> n [rows, K] int8; t and t * sum of n [rows, K / group, 2] fp32; sum of n, times
    ``rounding.factor``, [rows, K / group] int32. In a group with a number that is not finite, t is not finite. If
    ``rounding.is_exact``, n is x * FLOAT_SCALE, [rows, K] fp32, and nothing else is written.
    """
    group = rounding.group
    emit = Emitter(new_module(), ROUND, [POINTER])
    at, n = emit.at, emit.number
    begun, (rows, *addresses, columns) = emit.fields(ROUND_CONTEXT)
    x, out, scales, sums = (at.inttoptr(address, POINTER) for address in addresses)
    groups = at.udiv(columns, n(group))
    with emit.items(begun, rows) as row:
        first = at.mul(row, groups)
        with emit.loop(first, at.add(first, groups)) as g:
            values = emit.load_floats(x, at.mul(g, n(group * dtype.itemsize)), dtype, group)
            emit_rounding(emit, rounding, values, g, out, scales, sums)
    return emit.finish()


def emit_rounding(
    emit: Emitter, rounding: Rounding, values: Value, g: Value, out: Value, scales: Value, sums: Value
) -> None:
    """Emit the rounding of ``values``, an fp32 vector, which is group ``g`` of x.

    n is written to ``out``, t and t * sum of n to ``scales``, and sum of n to ``sums``, as ``rounding_module`` says.
    """
    at, n, group = emit.at, emit.number, rounding.group
    if rounding.is_exact:
        emit.store(at.fmul(values, emit.all(F32, FLOAT_SCALE, group)), out, at.mul(g, n(4 * group)))
        return
    # the bits of numbers without their signs, read as integers, have the numbers' order; NaN is above infinity
    sizes = at.and_(at.bitcast(values, vector(I32, group)), emit.all(I32, 0x7FFFFFFF, group))
    largest = at.bitcast(emit.intrinsic(f"llvm.vector.reduce.smax.v{group}i32", I32, sizes), F32)
    scale = at.fmul(largest, ir.Constant(F32, 1 / 127))
    some = at.fcmp_ordered(">", scale, ir.Constant(F32, 0.0))
    inverse = at.select(some, at.fdiv(ir.Constant(F32, 1.0), scale), ir.Constant(F32, 0.0))
    scaled = at.fmul(values, emit.spread(inverse, group))
    shift, zero = emit.all(F32, ROUNDING, group), emit.all(F32, 0.0, group)
    rounded = at.fsub(at.fadd(scaled, shift), shift)  # to the nearest, ties to even
    top, bottom = emit.all(F32, 127.0, group), emit.all(F32, -127.0, group)
    fits = at.and_(at.fcmp_ordered("<=", rounded, top), at.fcmp_ordered(">=", rounded, bottom))
    whole = at.fptosi(at.select(fits, rounded, zero), vector(I32, group))
    stored = at.trunc(whole, vector(I8, group))
    if rounding.is_interleaved:
        stored = emit.pick(
            stored, stored, [first + i for first in range(0, group, 8) for i in (0, 2, 4, 6, 1, 3, 5, 7)]
        )
    emit.store(stored, out, at.mul(g, n(group)))
    total = emit.intrinsic(f"llvm.vector.reduce.add.v{group}i32", I32, whole)
    emit.store(at.mul(total, ir.Constant(I32, rounding.factor)), sums, at.mul(g, n(4)))
    emit.store(scale, scales, at.mul(g, n(8)))
    emit.store(at.fmul(scale, at.sitofp(total, F32)), scales, at.add(at.mul(g, n(8)), n(4)))
