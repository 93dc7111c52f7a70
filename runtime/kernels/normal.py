"""The code of RMS norms (Zhang & Sennrich 2019, arXiv 1910.07467): y = x / sqrt(mean of x * x + eps) * weight.

Each number of y depends on nothing but its row and the weight; sums are fp32.
"""

from __future__ import annotations

from enum import Enum

from llvmlite import ir

from .emit import F32, I16, I64, POINTER, Emitter, Value, new_module, vector
from .form import Number

NORM = "moetier_norm"  # the function's name
LANES = 16


class Scale(Enum):
    """How architectures multiply with the weight."""

    ROUNDED = "what is normed is rounded to the type of x, then multiplied"
    PLAIN = "all is multiplied in fp32, then rounded"
    BEYOND_ONE = "as PLAIN, with the weight + 1"


def norm(number: Number, scale: Scale) -> ir.Module:
    """``NORM(x, weight, y, rows, K, eps)``: x [rows, K], weight [K] -> y [rows, K]; K is a multiple of LANES."""
    return _Norm(new_module(), number, scale).module


class _Norm(Emitter):
    def __init__(self, module: ir.Module, number: Number, scale: Scale) -> None:
        super().__init__(module, NORM, [POINTER] * 3 + [I64] * 2 + [F32])
        self._number = number
        at, n = self.at, self.number
        x, weight, y, rows, columns, eps = self.function.args
        step, row_bytes = LANES * number.nbytes, at.mul(columns, n(number.nbytes))
        squares = at.alloca(vector(F32, LANES))
        one = self.all(F32, 1.0, LANES)
        with self.loop(n(0), rows) as row:
            first = at.mul(row, row_bytes)
            source, target = at.gep(x, [first]), at.gep(y, [first])
            at.store(self.all(F32, 0.0, LANES), squares)
            with self.loop(n(0), row_bytes, step) as offset:
                given = self._take(source, offset)
                at.store(self.multiply_add(given, given, at.load(squares)), squares)
            mean = at.fdiv(self.reduce(at.load(squares), at.fadd), at.uitofp(columns, F32))
            root = self.intrinsic("llvm.sqrt.f32", F32, at.fadd(mean, eps))
            inverse = self.spread(at.fdiv(ir.Constant(F32, 1.0), root), LANES)
            with self.loop(n(0), row_bytes, step) as offset:
                normed = at.fmul(self._take(source, offset), inverse)
                factor = self._take(weight, offset)
                if scale is Scale.ROUNDED and number is Number.BF16:
                    normed = self.widen(self.narrow(normed, LANES), LANES)
                if scale is Scale.BEYOND_ONE:
                    factor = at.fadd(factor, one)
                self._put(at.fmul(normed, factor), target, offset)
        at.ret_void()

    def _take(self, source: Value, offset: Value) -> Value:
        if self._number is Number.F32:
            return self.load(source, offset, vector(F32, LANES))
        return self.widen(self.load(source, offset, vector(I16, LANES)), LANES)

    def _put(self, values: Value, target: Value, offset: Value) -> None:
        self.store(values if self._number is Number.F32 else self.narrow(values, LANES), target, offset)
