"""CPU kernels that multiply with quantised matrices as they are stored in records: y = x @ W.T.

x is [R, K] and W is [N, K]. First x is rounded to 8 bits. Each group of numbers in a row of x has a scale t of its own:
x = n * t, with n in -127 .. 127.
With w = (q - centre) * s + b of ``tiers/quant/codec.py``, the products of a group add up in integers, exactly:

    sum of w * x = s * t * (sum of q * n - centre * sum of n) + b * t * sum of n

So only x is rounded, by at most half of a 127th of its group's largest number. That is about .7 % of a group of
normally distributed numbers, which is small beside the rounding of 4-bit weights (9 %). A row of y depends on the row
of x and on W. It does not depend on how many rows or matrices are multiplied together, on the number of threads or on
the processor.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from llvmlite import ir
from torch import Tensor

from moetier.tiers.layout import ROW_TILE, RecordLayout

from .api import Kernels, projection_of
from .emitter import F32, FLOATS, I8, I32, I64, POINTER, Emitter, Value, new_module, once, vector
from .gemm_avx2 import MOST_ROWS, Avx2Tile, is_narrow
from .gemm_tile import Form, Tile
from .jit import Processor, this_processor
from .team import Kernel, Scratch, Step, compile_kernel, run_all, threads_for

JOB = 3  # i64 fields of each job: pointer to its record, its first row of x and y, its number of rows
# Number of i64 fields in the context of WORK. In order: number of items that threads have taken, number of all items,
# row tiles of a matrix, pointer to the jobs; pointers to n, to t and t * sum of n, to sum of n, and to y; K, N, N
# padded; 1 if each job has its own rows of x, 0 if all have the same row; offsets in a record of the codes, their
# second plane, the pairs and the pairs' scales
CONTEXT = 16
# Number of i64 fields in the context of ROUND. In order: number of rows that threads have taken, number of all rows;
# pointers to x, to n, to t and t * sum of n, and to sum of n; K
ROUND_CONTEXT = 7
X, Y = 2, 7  # indices of the address of x in a context of ROUND, and of that of y in a context of WORK
# names of the compiled functions; they must not be names in the C library
WORK, ROUND = "moetier_work", "moetier_round"


class PackedKernels(Kernels):
    """CPU kernels that multiply with quantised weights directly from their records, without a dequantised copy."""

    def __init__(self, processor: Processor | None = None) -> None:
        super().__init__()
        self.processor = processor or this_processor()
        self._plans: dict[tuple[int, str, torch.dtype], GemmPlan] = {}
        self._rounded = Scratch()

    def packs(self, layout: RecordLayout) -> bool:
        """Return whether all projections of the layout are quantised."""
        return all(p.bits != 16 for p in layout.projections)

    def project(self, x: Tensor, record: Tensor, layout: RecordLayout, name: str, bias: Tensor | None = None) -> Tensor:
        """Multiply as ``Kernels.project`` does, [tokens, columns] -> [tokens, rows], but with x rounded to 8 bits.

        A row of the result depends only on the same row of x and on the matrix.
        """
        if projection_of(layout, name).bits == 16:
            return super().project(x, record, layout, name, bias)
        y = self.multiply(x, (record,), (len(x),), layout, name)
        return y if bias is None else y.add_(bias)

    def multiply(
        self, x: Tensor, records: Sequence[Tensor], rows: Sequence[int], layout: RecordLayout, name: str
    ) -> Tensor:
        """Multiply rows of x with the quantised projection ``name`` of several records.

        Args:
            x: [R, K]: the first ``rows[0]`` rows go through the first record, the next ``rows[1]`` through the second,
                and so on; or [1, K]: the one row goes through every record, and each of ``rows`` is 1.
            records: uint8 [record bytes] each, all of one ``layout``.

        Returns:
            [R, N] in the type of x.
        """
        if x.dtype not in FLOATS:
            return self.multiply(x.float(), records, rows, layout, name).to(x.dtype)
        plan = self.plan(layout, name, x.dtype)
        own, columns = x.shape
        total = len(rows) if own == 1 else sum(rows)
        assert columns == plan.columns, f"{name} takes {plan.columns} numbers, not {columns}"
        assert own in (total, 1), f"{own} rows of x for {total} rows"
        if not x.is_contiguous():
            x = x.contiguous()
        y = torch.empty((total, plan.rows), dtype=x.dtype)
        jobs: list[int] = []
        first = 0
        for record, count in zip(records, rows, strict=True):
            jobs += (record.data_ptr(), first, count)
            first += count
        rounded = Rounded(self._rounded.take(own * plan.row_bytes), own, plan)
        rounding = rounded.context(x.data_ptr())
        table = array("q", jobs)
        product = plan.context(len(records), table, rounded, y.data_ptr(), has_own_rows=own == total)
        threads = threads_for(plan.rows * columns * total)
        run_all([Step(plan.round, rounding, threads_for(own * columns)), Step(plan.kernel, product, threads)])
        return y

    def plan(self, layout: RecordLayout, name: str, dtype: torch.dtype) -> GemmPlan:
        """Return the plan for products with the quantised projection ``name``, of x and y of ``dtype``."""
        plan = self._plans.get((id(layout), name, dtype))
        if plan is None:
            plan = self._plans[id(layout), name, dtype] = GemmPlan(layout, name, dtype, dtype, self.processor)
        return plan


class GemmPlan:
    """Compiled functions, sizes and offsets that all products with one projection of a layout share.

    Args:
        layout: the layout of the records.
        name: the projection's name.
        given: the type of x: torch.bfloat16 or torch.float32.
        out: the type of y, likewise.
        processor: compiles the functions.
    """

    def __init__(
        self, layout: RecordLayout, name: str, given: torch.dtype, out: torch.dtype, processor: Processor
    ) -> None:
        p = projection_of(layout, name)
        self.layout = layout  # kept alive, because plans are found by its id()
        self.kernel = product_kernel(processor, Form(p.bits, p.group, p.pairs, out))
        self.round = rounding_kernel(processor, p.group, given)
        self.rows, self.columns, self.group, self.groups = p.rows, p.columns, p.group, p.columns // p.group
        self.tiles = p.padded_rows // ROW_TILE
        # bytes of a rounded row of x: n; and for each group t, t * sum of n, and sum of n
        self.row_bytes = p.columns + 12 * self.groups
        self._shape = (p.columns, p.rows, p.padded_rows)
        # offsets in a record, in bytes, of codes, second plane, pairs and scales of pairs; 0 for sections that it lacks
        places = {section.name.removeprefix(f"{name}."): section.offset for section in layout.sections}
        kinds = (("codes", "high"), ("plane", "low"), ("pairs",), ("pair_scales",))
        self._offsets = tuple(sum(places.get(kind, 0) for kind in group) for group in kinds)

    def context(self, count: int, jobs: array[int], x: Rounded, y: int, *, has_own_rows: bool) -> array[int]:
        """Make the context of a product of ``count`` jobs, whose result is written to the address ``y``.

        ``jobs`` has JOB numbers for each job. With ``has_own_rows``, each job has its own rows of x. Otherwise all jobs
        use the same row.
        """
        items = (0, count * self.tiles, self.tiles, jobs.buffer_info()[0])
        return array("q", (*items, *x.places, y, *self._shape, int(has_own_rows), *self._offsets))


class Rounded:
    """Scratch memory at ``address`` for ``rows`` rows of x that are rounded to 8 bits, for products of one plan."""

    def __init__(self, address: int, rows: int, plan: GemmPlan) -> None:
        scales = address + rows * plan.columns
        self.rows = rows
        self.places = (address, scales, scales + rows * plan.groups * 8)  # of n; t and t * sum of n; sum of n
        self._columns = plan.columns

    def context(self, x: int) -> array[int]:
        """Make the context for rounding the rows of x. ``x`` is their address."""
        return array("q", (0, self.rows, x, *self.places, self._columns))


@once
def product_kernel(processor: Processor, form: Form) -> Kernel:
    """Compile ``product_module``, once for each form and processor."""
    # unrolled loops would need more registers than AVX2 has
    return compile_kernel(processor, product_module(form, processor), WORK, unroll=not is_narrow(processor))


@once
def rounding_kernel(processor: Processor, group: int, dtype: torch.dtype) -> Kernel:
    """Compile ``rounding_module``, once for each group size, type and processor."""
    return compile_kernel(processor, rounding_module(group, dtype), ROUND)


def product_module(form: Form, processor: Processor) -> ir.Module:
    """Emit the function ``WORK(context)``, which computes items until none is left.

    An item is ROW_TILE rows of one job's matrix.
    """
    module = new_module()
    if is_narrow(processor):
        one, several = (Avx2Tile(module, form, processor, several=several).function for several in (False, True))
    else:
        tiles = {rows: Tile(module, form, processor, rows).function for rows in (4, 2, 1)}
    emit = Emitter(module, WORK, [POINTER])
    at, n = emit.at, emit.number
    begun, fields = emit.fields(CONTEXT)
    items, row_tiles, jobs, xn, xt, xs, y, columns, out_rows, padded, own, *offsets = fields
    xn, xt, xs, y, jobs = (at.inttoptr(value, POINTER) for value in (xn, xt, xs, y, jobs))
    groups = at.udiv(columns, n(form.group))
    with emit.items(begun, items) as item:
        job = at.gep(jobs, [at.mul(at.udiv(item, row_tiles), n(8 * JOB))])
        tile = at.urem(item, row_tiles)
        record, first, rows = (at.load(emit.place(job, n(8 * i), I64)) for i in range(JOB))
        sections = [at.inttoptr(at.add(record, offset), POINTER) for offset in offsets]
        read = at.mul(first, own)

        def call(tile_of: Value, row: Value, *count: Value) -> None:
            source, target = at.add(read, row), at.add(first, row)
            at.call(
                tile_of,
                [
                    *sections,
                    at.gep(xn, [at.mul(source, columns)]),
                    at.gep(xt, [at.mul(at.mul(source, groups), n(8))]),
                    at.gep(xs, [at.mul(at.mul(source, groups), n(4))]),
                    at.gep(y, [at.mul(at.mul(target, out_rows), n(form.out.itemsize))]),
                    tile,
                    columns,
                    out_rows,
                    padded,
                    *count,
                ],
            )

        if is_narrow(processor):
            with emit.loop(n(0), rows, MOST_ROWS) as row:
                left = at.sub(rows, row)
                with at.if_else(at.icmp_signed("==", left, n(1))) as (then, otherwise):
                    with then:
                        call(one, row)
                    with otherwise:
                        few = at.icmp_signed("<", left, n(MOST_ROWS))
                        call(several, row, at.select(few, left, n(MOST_ROWS)))
        else:
            begin = n(0)
            for height in (4, 2, 1):
                whole = at.and_(rows, n(-height))
                with emit.loop(begin, whole, height) as row:
                    call(tiles[height], row)
                begin = whole
    at.ret_void()
    return module


def rounding_module(group: int, dtype: torch.dtype) -> ir.Module:
    """Emit the function ``ROUND(context)``, which rounds rows of x to 8 bits until none is left.

    x [rows, K] of ``dtype`` -> n [rows, K] int8; t and t * sum of n [rows, K / group, 2] fp32; sum of n [rows, K /
    group] int32. In a group with a number that is not finite, t is not finite.
    """
    module = new_module()
    emit = Emitter(module, ROUND, [POINTER])
    at, n = emit.at, emit.number
    begun, (rows, *addresses, columns) = emit.fields(ROUND_CONTEXT)
    x, out, scales, sums = (at.inttoptr(address, POINTER) for address in addresses)
    groups = at.udiv(columns, n(group))
    with emit.items(begun, rows) as row:
        first = at.mul(row, groups)
        with emit.loop(first, at.add(first, groups)) as g:
            values = emit.load_floats(x, at.mul(g, n(group * dtype.itemsize)), dtype, group)
            emit_rounding(emit, values, g, out, scales, sums)
    at.ret_void()
    return module


def emit_rounding(emit: Emitter, values: Value, g: Value, out: Value, scales: Value, sums: Value) -> None:
    """Emit the rounding of ``values``, an fp32 vector, which is group ``g`` of x.

    n is written to ``out``, t and t * sum of n to ``scales``, and sum of n to ``sums``, as in ``rounding_module``.
    """
    at, n, group = emit.at, emit.number, values.type.count
    # the bits of numbers without their signs, read as integers, have the numbers' order; NaN is above infinity
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
    emit.store(at.trunc(whole, vector(I8, group)), out, at.mul(g, n(group)))
    total = emit.intrinsic(f"llvm.vector.reduce.add.v{group}i32", I32, whole)
    emit.store(total, sums, at.mul(g, n(4)))
    emit.store(step, scales, at.mul(g, n(8)))
    emit.store(at.fmul(step, at.sitofp(total, F32)), scales, at.add(at.mul(g, n(8)), n(4)))
