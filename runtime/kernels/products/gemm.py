"""CPU kernels that multiply with quantised matrices as they are stored in records: y = x @ W.T.

x is [R, K] and W is [N, K]. First x is rounded to 8 bits: x = n * t (``rounding.py``).
With w = (q - centre) * s + b of ``tiers/quant/codec.py``, the products of a group add up in integers, exactly:

    sum of w * x = s * t * (sum of q * n - centre * sum of n) + b * t * sum of n

So only x is rounded. A row of y depends on the row of x and on W. It does not depend on how many rows or matrices are
multiplied together, on the number of threads or on the processor.

Matrices in the coding of a checkpoint, such as the blocks of a GGUF file, are multiplied by the code of
``row_major.py``. For FP8 numbers, x is not rounded, and products are in fp32.
"""

from __future__ import annotations

from array import array

from llvmlite import ir

from moetier.runtime.kernels.codings.row_codings import coding_of
from moetier.runtime.kernels.jit.emitter import I64, POINTER, Dtype, Emitter, FloatType, Value, new_module, once
from moetier.runtime.kernels.jit.processor import Dot, Processor
from moetier.runtime.kernels.jit.team import Kernel, compile_kernel, thread_count
from moetier.tiers.layout import ROW_TILE, Projection, RecordLayout

from .gemm_amx import AmxTile
from .gemm_avx2 import MAX_ROWS, Avx2Tile, is_narrow
from .gemm_rows import RowsTile
from .gemm_tile import PackedVariant, Tile
from .rounding import Rounding, rounding_kernel
from .row_major import ITEM_ROWS, RowMajorVariant, RowTile

JOB = 3  # i64 fields of each job: pointer to its record, its first row of x and y, its number of rows
# Number of i64 fields in the context of WORK. In order: number of items that threads have taken, number of all items,
# row tiles of a matrix, runs into which they are cut, pointer to the jobs; pointers to n, to t and t * sum of n, to sum
# of n, and to y; K, N, N padded; 1 if each job has its own rows of x, 0 if all have the same row; offsets in a record
# of the codes, their second plane, the pairs and the pairs' scales, or with a coding of the codes, the scales and the
# globals
CONTEXT = 17
Y = 8  # index of the address of y in a context of WORK
WORK = "moetier_work"  # name of the compiled function; it must not be a name in the C library


def multiplies(p: Projection) -> bool:
    """Return whether a projection is stored in a way that the kernels of this module multiply with."""
    return coding_of(p) is not None if p.coding else p.bits != 16


class ProjectionProduct:
    """Compiled functions, sizes and offsets that all products with one projection of a layout share.

    Args:
        layout: the layout of the records.
        name: the projection's name.
        given: the type of x: fp32 or bf16, as ``FloatType.of`` takes it.
        out: the type of y, likewise.
        processor: compiles the functions.
    """

    def __init__(self, layout: RecordLayout, name: str, given: Dtype, out: Dtype, processor: Processor) -> None:
        p = layout.projection(name)
        self.layout = layout  # kept alive, because products are found by its id()
        self.rounding = Rounding.of(p)
        self.kernel = product_kernel(processor, variant_of(p, FloatType.of(out)))
        self.round = rounding_kernel(processor, self.rounding, FloatType.of(given))
        self.rows, self.columns = p.rows, p.columns
        self.tiles = -(-p.rows // (ITEM_ROWS if p.coding else ROW_TILE))
        self.row_bytes, self.number_bytes = self.rounding.row_bytes(p.columns), self.rounding.number_bytes
        self._shape = (p.columns, p.rows, p.padded_rows)
        # offsets in a record, in bytes, of codes, second plane, pairs and scales of pairs, or with a coding of codes,
        # scales and globals; 0 for sections that it lacks
        places = {section.name.removeprefix(f"{name}."): section.offset for section in layout.sections}
        names = (("codes", "high"), ("plane", "low", "scales"), ("pairs", "globals"), ("pair_scales",))
        self._offsets = tuple(sum(places.get(name, 0) for name in section) for section in names)

    def context(self, count: int, jobs: array[int], x: Rounded, y: int, *, has_own_rows: bool) -> array[int]:
        """Make the context of a product of ``count`` jobs, whose result is written to the address ``y``.

        ``jobs`` has JOB numbers for each job. With ``has_own_rows``, each job has its own rows of x. Otherwise all jobs
        use the same row.
        """
        items = (0, count * self.tiles, self.tiles, thread_count(), jobs.buffer_info()[0])
        return array("q", (*items, *x.places, y, *self._shape, int(has_own_rows), *self._offsets))


class Rounded:
    """Scratch memory at ``address`` for ``rows`` rows of x, rounded as a product needs them."""

    def __init__(self, address: int, rows: int, product: ProjectionProduct) -> None:
        scales = address + rows * product.columns * product.number_bytes
        sums = scales + rows * product.columns // product.rounding.group * 8
        self.rows = rows
        self.places = (address, scales, sums)  # of n; t and t * sum of n; sum of n
        self._columns = product.columns

    def context(self, x: int) -> array[int]:
        """Make the context for rounding the rows of x. ``x`` is their address."""
        return array("q", (0, self.rows, x, *self.places, self._columns))


def variant_of(p: Projection, out: FloatType) -> PackedVariant | RowMajorVariant:
    """Return the variant of products with a projection. ``out`` is the type of the results."""
    if p.coding:
        return RowMajorVariant.of(p, out)
    return PackedVariant(p.bits, p.group, p.pairs, out)


@once
def product_kernel(processor: Processor, variant: PackedVariant | RowMajorVariant) -> Kernel:
    """Compile ``product_module``, once for each variant and processor."""
    # unrolled loops would need more registers than AVX2 has
    unroll = not isinstance(variant, RowMajorVariant) and not is_narrow(processor)
    return compile_kernel(processor, product_module(variant, processor), WORK, unroll=unroll)


def product_module(variant: PackedVariant | RowMajorVariant, processor: Processor) -> ir.Module:
    """Emit the function ``WORK(context)``, which computes items until none is left.

    An item is ROW_TILE rows of one job's matrix, or ITEM_ROWS rows of a matrix in the coding of a checkpoint.
    """
    module = new_module()
    if isinstance(variant, RowMajorVariant):
        one, several = (RowTile(module, variant, processor, several=several).function for several in (False, True))
        emit = _ProductEmitter(module, Rounding.of(variant.projection), variant.out)
        emit.items_of_any_height(one, several)
    elif is_narrow(processor):
        one, several = (Avx2Tile(module, variant, processor, several=several).function for several in (False, True))
        emit = _ProductEmitter(module, Rounding(variant.group), variant.out)
        emit.items_of_any_height(one, several)
    else:
        tiles = {height: Tile(module, variant, processor, height).function for height in (4, 2, 1)}
        many: AmxTile | RowsTile | None = None
        if processor.dot is Dot.AVX512_VNNI:
            many = (AmxTile if processor.has_amx else RowsTile)(module, variant, processor)
        emit = _ProductEmitter(module, Rounding(variant.group), variant.out)
        emit.items_by_height(tiles, many)
    return module


class _ProductEmitter(Emitter):
    """Emitter of the function WORK, which calls functions of tiles for the rows of x of each item."""

    def __init__(self, module: ir.Module, rounding: Rounding, out: FloatType) -> None:
        super().__init__(module, WORK, [POINTER])
        at = self.at
        self._rounding, self._out = rounding, out
        self._begun, fields = self.fields(CONTEXT)
        self._items, self._row_tiles, self._runs, jobs, xn, xt, xs, y, *more = fields
        self._columns, self._out_rows, self._padded, self._own, *self._offsets = more
        self._xn, self._xt, self._xs, self._y, self._jobs = (at.inttoptr(v, POINTER) for v in (xn, xt, xs, y, jobs))
        self._groups = at.udiv(self._columns, self.number(rounding.group))

    def items_of_any_height(self, one: Value, several: Value) -> None:
        """Emit all items with a tile's function for one row of x, and one for up to MAX_ROWS rows."""
        at, n = self.at, self.number
        with self.items(self._begun, self._items) as item:
            rows = self._begin_item(item)
            with self.loop(n(0), rows, MAX_ROWS) as row:
                left = at.sub(rows, row)
                with at.if_else(at.icmp_signed("==", left, n(1))) as (then, otherwise):
                    with then:
                        self._call(one, row)
                    with otherwise:
                        self._call(several, row, self._least(left, MAX_ROWS))
        at.ret_void()

    def items_by_height(self, tiles: dict[int, Value], many: AmxTile | RowsTile | None) -> None:
        """Emit all items with tiles' functions by their number of rows of x, the highest first.

        ``many`` is a tile for many rows; None if there is none.
        """
        at, n = self.at, self.number
        with self.items(self._begun, self._items) as item:
            rows = self._begin_item(item)
            begin, left = n(0), rows
            if many is not None:
                rest = at.urem(rows, n(many.most))
                left = at.select(at.icmp_signed("<", rest, n(many.least)), rest, at.urem(rest, n(many.step)))
                begin = at.sub(rows, left)
                with self.loop(n(0), begin, many.most) as row:
                    self._call(many.function, row, self._least(at.sub(begin, row), many.most))
            for height, tile in tiles.items():
                whole = at.sub(rows, at.and_(left, n(height - 1)))
                with self.loop(begin, whole, height) as row:
                    self._call(tile, row)
                begin = whole
        at.ret_void()

    def _begin_item(self, item: Value) -> Value:
        """Emit what the calls for an item have in common. Return the number of rows of x."""
        at, n = self.at, self.number
        job = at.gep(self._jobs, [at.mul(at.udiv(item, self._row_tiles), n(8 * JOB))])
        self._tile = self._tile_of(at.urem(item, self._row_tiles))
        record, self._first, rows = (at.load(self.pointer_at(job, n(8 * i), I64)) for i in range(JOB))
        self._sections = [at.inttoptr(at.add(record, offset), POINTER) for offset in self._offsets]
        self._read = at.mul(self._first, self._own)
        return rows

    def _tile_of(self, number: Value) -> Value:
        """Return the row tile that is the item ``number`` of a job.

        The tiles are split into one contiguous run per thread; successive items come from successive runs.
        So threads hardly ever write to neighbouring memory at the same time, which hardware prefetchers would move from
        one processor core's cache to the other's.
        """
        at = self.at
        run, place = at.urem(number, self._runs), at.udiv(number, self._runs)
        length, longer = at.udiv(self._row_tiles, self._runs), at.urem(self._row_tiles, self._runs)
        before = at.select(at.icmp_signed("<", run, longer), run, longer)
        return at.add(at.add(at.mul(run, length), before), place)

    def _call(self, tile: Value, row: Value, *count: Value) -> None:
        """Emit a call of a tile's function, from row ``row`` of the item's rows of x on."""
        at, n = self.at, self.number
        source, target = at.add(self._read, row), at.add(self._first, row)
        xn = at.gep(self._xn, [at.mul(at.mul(source, self._columns), n(self._rounding.number_bytes))])
        xt, xs = (
            at.gep(base, [at.mul(at.mul(source, self._groups), n(size))])
            for base, size in ((self._xt, 8), (self._xs, 4))
        )
        y = at.gep(self._y, [at.mul(at.mul(target, self._out_rows), n(self._out.itemsize))])
        sizes = (self._tile, self._columns, self._out_rows, self._padded)
        at.call(tile, [*self._sections, xn, xt, xs, y, *sizes, *count])

    def _least(self, count: Value, most: int) -> Value:
        limit = self.number(most)
        return self.at.select(self.at.icmp_signed("<", count, limit), count, limit)
