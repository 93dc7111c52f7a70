"""The code of a product of a matrix with one row, y = W @ x, where the matrix lies; sums are fp32.

Numbers are bf16, as i16, or fp32: y's are of the matrix's type. An item is ROWS rows of the matrix. Each number of y
depends on nothing but its row and x.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from .emit import F32, I16, I32, I64, POINTER, Emitter, Value, new_module, vector

GEMV = "moetier_gemv"  # the function's name
LANES = 16
ROWS = 4  # that are read together
CONTEXT = 7  # i64: items begun, items; N, K; x, W, y


def gemv(given: Any = I16, kept: Any = I16) -> ir.Module:
    """``GEMV(context)``: takes items until none is left. x [K] of ``given``, W [N, K] and y [N] of ``kept``; K is a
    multiple of LANES."""
    return _Gemv(new_module(), given, kept).module


class _Gemv(Emitter):
    def __init__(self, module: ir.Module, given: Any, kept: Any) -> None:
        super().__init__(module, GEMV, [POINTER])
        at, n = self.at, self.number
        (context,) = self.function.args
        field = [self.place(context, n(8 * i), I64) for i in range(CONTEXT)]
        items, rows, columns, *addresses = (at.load(place) for place in field[1:])
        x, matrix, y = (at.inttoptr(address, POINTER) for address in addresses)
        sums = [at.alloca(vector(F32, LANES)) for _ in range(ROWS)]
        wide, narrow = _bytes(kept), _bytes(given)
        row_bytes, last = at.mul(columns, n(wide)), at.sub(rows, n(1))
        with self.items(field[0], items) as item:
            wanted = [at.add(at.mul(item, n(ROWS)), n(i)) for i in range(ROWS)]
            # where the last item has fewer rows it computes the last one again
            chosen = [at.select(at.icmp_signed("<", row, last), row, last) for row in wanted]
            sources = [at.gep(matrix, [at.mul(row, row_bytes)]) for row in chosen]
            for place in sums:
                at.store(self.all(F32, 0.0, LANES), place)
            with self.loop(n(0), columns, LANES) as column:
                taken = self._take(x, at.mul(column, n(narrow)), given)
                for source, place in zip(sources, sums, strict=True):
                    weights = self._take(source, at.mul(column, n(wide)), kept)
                    at.store(self.multiply_add(weights, taken, at.load(place)), place)
            for row, place in zip(chosen, sums, strict=True):
                total = self.reduce(at.load(place), at.fadd)
                if kept is I16:
                    total = at.extract_element(self.narrow(self.spread(total, LANES), LANES), ir.Constant(I32, 0))
                self.store(total, y, at.mul(row, n(wide)))
        at.ret_void()

    def _take(self, source: Value, offset: Value, kind: Any) -> Value:
        found = self.load(source, offset, vector(kind, LANES))
        return self.widen(found, LANES) if kind is I16 else found


def _bytes(kind: Any) -> int:
    return 2 if kind is I16 else 4
