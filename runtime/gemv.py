"""The code of a product of a matrix in bf16 with one row, y = W @ x, where the matrix lies; sums are fp32.

An item is ROWS rows of the matrix. Each number of y depends on nothing but its row and x.
"""

from __future__ import annotations

from llvmlite import ir

from .emit import F32, I16, I32, I64, POINTER, Emitter, Value, new_module, vector

GEMV = "moetier_gemv"  # the function's name
LANES = 16
ROWS = 4  # that are read together
CONTEXT = 7  # i64: items begun, items; N, K; x, W, y


def gemv() -> ir.Module:
    """``GEMV(context)``: takes items until none is left. x [K], W [N, K], y [N]; K is a multiple of LANES."""
    return _Gemv(new_module()).module


class _Gemv(Emitter):
    def __init__(self, module: ir.Module) -> None:
        super().__init__(module, GEMV, [POINTER])
        at, n = self.at, self.number
        (context,) = self.function.args
        field = [self.place(context, n(8 * i), I64) for i in range(CONTEXT)]
        items, rows, columns, *addresses = (at.load(place) for place in field[1:])
        x, matrix, y = (at.inttoptr(address, POINTER) for address in addresses)
        sums = [at.alloca(vector(F32, LANES)) for _ in range(ROWS)]
        row_bytes, last = at.mul(columns, n(2)), at.sub(rows, n(1))
        with self.items(field[0], items) as item:
            wanted = [at.add(at.mul(item, n(ROWS)), n(i)) for i in range(ROWS)]
            # where the last item has fewer rows it computes the last one again
            chosen = [at.select(at.icmp_signed("<", row, last), row, last) for row in wanted]
            sources = [at.gep(matrix, [at.mul(row, row_bytes)]) for row in chosen]
            for place in sums:
                at.store(self.all(F32, 0.0, LANES), place)
            with self.loop(n(0), row_bytes, 2 * LANES) as offset:
                given = self._take(x, offset)
                for source, place in zip(sources, sums, strict=True):
                    at.store(self.multiply_add(self._take(source, offset), given, at.load(place)), place)
            for row, place in zip(chosen, sums, strict=True):
                total = self.spread(self.reduce(at.load(place), at.fadd), LANES)
                rounded = at.extract_element(self.narrow(total, LANES), ir.Constant(I32, 0))
                self.store(rounded, y, at.mul(row, n(2)))
        at.ret_void()

    def _take(self, source: Value, offset: Value) -> Value:
        return self.widen(self.load(source, offset, vector(I16, LANES)), LANES)
