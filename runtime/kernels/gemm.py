"""The code of a product with quantised matrices where they lie in their records: y = x @ W.T.

x is rounded to 8 bits first, each row's groups along K by a scale of their own: x = n * t with n in -127 .. 127. With
w = (q - centre) * s + b of ``tiers/quantize.py``, a group of K adds up in integers, exactly:

    sum of w * x = s * t * (sum of q * n - centre * sum of n) + b * t * sum of n

So what is rounded of a row of y is x alone, by half of a 127th of its group's largest number: about .7 % of a group of
normal numbers, of which next to the rounding of 4-bit weights (9 %) nothing is seen. And a row of y depends on the row
of x and on W, not on how many rows or matrices go together, how many threads there are, or the kind of processor.
"""

from __future__ import annotations

from llvmlite import ir

from .emit import I64, POINTER, Emitter, Value, new_module
from .form import Form
from .gemm_tile import Tile
from .jit import Processor

JOB = 3  # i64 of each: its record, first row of x and y, rows
# i64: items begun, items, row tiles of a matrix, jobs; n, t and t * sum of n, sum of n, y; K, N, N padded, whether jobs
# have rows of x of their own (1) or all the same (0); where in a record codes, second plane, pairs, their scales begin
CONTEXT = 16
WORK = "moetier_work"  # the function's name; not that of the C library's


def product(form: Form, processor: Processor) -> ir.Module:
    """``WORK(context)``: takes items, of ROW_TILE rows of one job's matrix each, until none is left."""
    module = new_module()
    tiles = {rows: Tile(module, form, processor, rows).function for rows in (4, 2, 1)}
    emit = Emitter(module, WORK, [POINTER])
    at, n = emit.at, emit.number
    (context,) = emit.function.args
    field = [emit.place(context, n(8 * i), I64) for i in range(CONTEXT)]
    items, row_tiles, jobs = (at.load(place) for place in field[1:4])
    xn, xt, xs, y, columns, out_rows, padded, own, *offsets = (at.load(place) for place in field[4:])
    xn, xt, xs, y, jobs = (at.inttoptr(value, POINTER) for value in (xn, xt, xs, y, jobs))
    groups = at.udiv(columns, n(form.group))
    with emit.items(field[0], items) as item:
        job = at.gep(jobs, [at.mul(at.udiv(item, row_tiles), n(8 * JOB))])
        tile = at.urem(item, row_tiles)
        record, first, rows = (at.load(emit.place(job, n(8 * i), I64)) for i in range(JOB))
        sections = [at.inttoptr(at.add(record, offset), POINTER) for offset in offsets]
        read = at.mul(first, own)

        def call(height: int, row: Value) -> None:
            source, target = at.add(read, row), at.add(first, row)
            at.call(
                tiles[height],
                [
                    *sections,
                    at.gep(xn, [at.mul(source, columns)]),
                    at.gep(xt, [at.mul(at.mul(source, groups), n(8))]),
                    at.gep(xs, [at.mul(at.mul(source, groups), n(4))]),
                    at.gep(y, [at.mul(at.mul(target, out_rows), n(form.out.nbytes))]),
                    tile,
                    columns,
                    out_rows,
                    padded,
                ],
            )

        whole = at.and_(rows, n(~3))
        with emit.loop(n(0), whole, 4) as row:
            call(4, row)
        twos = at.and_(rows, n(2))
        with emit.loop(whole, at.add(whole, twos), 2) as row:
            call(2, row)
        with emit.loop(at.add(whole, twos), rows) as row:
            call(1, row)
    at.ret_void()
    return module
