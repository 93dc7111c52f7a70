"""Emit the compiled code of HQQ's solver. It does the operations of ``tiers.quant.hqq.solve`` in the same order.

Sums follow torch's order: runs of SUM_RUN numbers are added up from the left, then the runs' sums are.
"""

from __future__ import annotations

import math
from array import array

from llvmlite import ir

from moetier.runtime.kernels.jit.emitter import F32, I32, LANES, Emitter, Value, vector
from moetier.tiers.layout import Bits
from moetier.tiers.quant import hqq

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
