"""The code that rounds rows of inputs to 8 bits, as ``product.py`` wants them."""

from __future__ import annotations

from llvmlite import ir

from .emit import F32, I8, I16, I32, I64, POINTER, Emitter, new_module, vector
from .form import Number

ROUND = "moetier_round"  # the function's name; not that of the C library's


def rounding(group: int, source: Number) -> ir.Module:
    """``ROUND(x, n, t, sums, rows, K)``: x [rows, K] -> n [rows, K] int8, t and t * sum of n [rows, K / group, 2] fp32,
    sum of n [rows, K / group] int32. Numbers that are not finite give a t that is not."""
    module = new_module()
    emit = Emitter(module, ROUND, [POINTER] * 4 + [I64] * 2)
    at, n = emit.at, emit.number
    x, out, scales, sums, rows, columns = emit.function.args
    wide = vector(F32, group)
    groups = at.udiv(columns, n(group))
    with emit.loop(n(0), at.mul(rows, groups)) as g:
        first = at.mul(g, n(group))
        place = at.mul(first, n(source.nbytes))
        if source is Number.BF16:
            values = emit.widen(emit.load(x, place, vector(I16, group)), group)
        else:
            values = emit.load(x, place, wide)
        # without their signs, numbers are ordered as their bits are, and what is none lies above infinity
        sizes = at.and_(at.bitcast(values, vector(I32, group)), emit.all(I32, 0x7FFFFFFF, group))
        largest = at.bitcast(emit.intrinsic(f"llvm.vector.reduce.smax.v{group}i32", I32, sizes), F32)
        step = at.fmul(largest, ir.Constant(F32, 1 / 127))
        some = at.fcmp_ordered(">", step, ir.Constant(F32, 0.0))
        inverse = at.select(some, at.fdiv(ir.Constant(F32, 1.0), step), ir.Constant(F32, 0.0))
        scaled = at.fmul(values, emit.spread(inverse, group))
        shift, zero = emit.all(F32, 1.5 * 2**23, group), emit.all(F32, 0.0, group)
        rounded = at.fsub(at.fadd(scaled, shift), shift)  # to the nearest, ties to even
        top, bottom = emit.all(F32, 127.0, group), emit.all(F32, -127.0, group)
        fits = at.and_(at.fcmp_ordered("<=", rounded, top), at.fcmp_ordered(">=", rounded, bottom))
        whole = at.fptosi(at.select(fits, rounded, zero), vector(I32, group))
        emit.store(at.trunc(whole, vector(I8, group)), out, first)
        total = emit.intrinsic(f"llvm.vector.reduce.add.v{group}i32", I32, whole)
        emit.store(total, sums, at.mul(g, n(4)))
        emit.store(step, scales, at.mul(g, n(8)))
        emit.store(at.fmul(step, at.sitofp(total, F32)), scales, at.add(at.mul(g, n(8)), n(4)))
    at.ret_void()
    return module
