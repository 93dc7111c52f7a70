"""Emit the compiled code of one token's attention. ``attention.py`` runs it.

A *query group* is one head of keys and values of a sequence, with all the heads of queries that share it. An item is a
piece of a query group: at most PIECE positions. For each head of queries it has three results: the largest score m, the
sum z of exp(score - m), and the sum s of the values, each multiplied by its exp(score - m). The thread that computes
the last item of a query group merges the group's items, in the order of their positions (Milakov & Gimelshein 2018,
arXiv 1805.02867).

A *sink* is a score of a head of queries that belongs to no position: it takes part in the softmax, but has no value
(Xiao et al. 2023, arXiv 2309.17453).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from llvmlite import ir

from moetier.runtime.kernels.jit.emitter import F32, I32, I64, LANES, POINTER, Emitter, Value, new_module, once, vector
from moetier.runtime.kernels.jit.processor import this_processor
from moetier.runtime.kernels.jit.team import Kernel, compile_kernel

ATTEND = "moetier_attend"  # name of the compiled function
PIECE = 512  # positions; a multiple of LANES. Each piece begins to read from memory anew, which takes time
HEADS, POSITIONS = 4, 4  # heads for which scores are computed together, positions whose values are added together
# Number of i64 fields in the context of the compiled function. In order: items that threads have taken, threads that
# have begun, all items; key heads, query heads per key head; L (positions), D (width of a key), V (width of a value);
# items of a group; pointers to q, K, V, the mask (0 if there is none), the output, the threads' scratch memory and the
# results of items; strides of K, then of V, over sequences, heads and positions, in elements; the bits of the fp32
# scale; a pointer to the sinks (0 if there are none). Then follows, for each group, the number of its items that are
# finished.
CONTEXT = 24
# indices in a context: of the threads that have begun, all items, L, items of a group, the addresses of K and V, that
# of the scratch memory, the strides, and the address of the sinks
BEGUN, ITEMS, LENGTH, PIECES, CACHE, SCRATCH, STRIDES, SINKS = 1, 2, 5, 8, 10, 14, 16, 23


def scratch_elements(heads: int, width: int, values: int) -> tuple[int, int]:
    """Return the sizes of memory in fp32 numbers: a thread's scratch memory, and the results of an item.

    A thread needs queries, scores, and rows of keys or values. The results of an item are all s, then all m, then all
    z. ``heads`` are those of queries that share a key head.
    """
    return heads * (width + PIECE) + POSITIONS * max(width, values), heads * (values + 2)


@once
def attention_kernel(dtype: torch.dtype) -> Kernel:
    """Compile ``attention_module``, once for each type."""
    return compile_kernel(this_processor(), attention_module(dtype), ATTEND)


def attention_module(dtype: torch.dtype) -> ir.Module:
    """Emit the function ``ATTEND(context)``, which computes items until none is left.

    q [groups, heads, D], keys, values, sinks [all heads] and out [groups, heads, V] are of ``dtype``. The mask is fp32
    [B, L rounded up to LANES]. D and V are multiples of LANES.
    """
    return _Attention(dtype).finish()


class _Attention(Emitter):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(new_module(), ATTEND, [POINTER])
        self._dtype = dtype
        at, n = self.at, self.number
        (context,) = self.function.args
        begun, fields = self.fields(CONTEXT)
        items, key_heads, self._heads, length, self._width, self._values, self._pieces = fields[1:8]
        q, k, v, mask, out, scratch, results = fields[8:15]
        k_strides, v_strides = fields[15:18], fields[18:21]
        scale, self._sinks = at.bitcast(at.trunc(fields[21], I32), F32), fields[22]
        self._accumulators = [at.alloca(vector(F32, LANES)) for _ in range(HEADS)]
        self._sink = at.alloca(vector(F32, LANES))
        wide = at.select(at.icmp_signed(">", self._width, self._values), self._width, self._values)
        numbers = at.add(at.mul(self._heads, at.add(self._width, n(PIECE))), at.mul(n(POSITIONS), wide))
        thread = at.atomic_rmw("add", self.place(context, n(8), I64), n(1), "monotonic")
        self._queries = at.inttoptr(at.add(scratch, at.mul(thread, at.mul(numbers, n(4)))), POINTER)
        self._rows = at.gep(self._queries, [at.mul(at.mul(self._heads, self._width), n(4))])
        self._scores = at.gep(self._rows, [at.mul(wide, n(4 * POSITIONS))])  # [heads, PIECE]
        sums = at.mul(self._heads, self._values)
        self._result_numbers = at.add(sums, at.mul(self._heads, n(2)))
        with self.items(begun, items) as item:
            query_group, piece = at.udiv(item, self._pieces), at.urem(item, self._pieces)
            sequence, head = at.udiv(query_group, key_heads), at.urem(query_group, key_heads)
            first = at.mul(piece, n(PIECE))
            left = at.sub(length, first)
            count = at.select(at.icmp_signed("<", left, n(PIECE)), left, n(PIECE))
            result = at.inttoptr(at.add(results, at.mul(item, at.mul(self._result_numbers, n(4)))), POINTER)

            queries = at.mul(self._heads, self._width)
            self._take(self._address(q, at.mul(query_group, queries)), self._queries, queries, scale)
            self._score(self._begin(k, k_strides, sequence, head, first), k_strides[2], count)
            self._soften(mask, at.add(at.mul(sequence, self.padded(length)), first), self.padded(count), result)
            self._unite(self._begin(v, v_strides, sequence, head, first), v_strides[2], count, result)

            finished = self.place(context, at.mul(at.add(n(CONTEXT), query_group), n(8)), I64)
            others = at.atomic_rmw("add", finished, n(1), "acq_rel")  # the last thread sees what the others wrote
            with at.if_then(at.icmp_signed("==", at.add(others, n(1)), self._pieces)):
                start = at.mul(at.mul(query_group, self._pieces), at.mul(self._result_numbers, n(4)))
                start = at.inttoptr(at.add(results, start), POINTER)
                self._merge(start, self._address(out, at.mul(query_group, sums)), at.mul(head, self._heads))

    def _address(self, base: Value, elements: Value) -> Value:
        return self.at.inttoptr(self.at.add(base, self.at.mul(elements, self.number(self._dtype.itemsize))), POINTER)

    def _begin(self, base: Value, strides: list[Value], *indices: Value) -> Value:
        at, elements = self.at, self.number(0)
        for stride, index in zip(strides, indices, strict=True):
            elements = at.add(elements, at.mul(index, stride))
        return self._address(base, elements)

    def _floats(self, pointer: Value, index: Value) -> Value:
        return self.load(pointer, self.at.mul(index, self.number(4)), vector(F32, LANES))

    def _keep(self, value: Value, pointer: Value, index: Value) -> None:
        self.store(value, pointer, self.at.mul(index, self.number(4)))

    def _take(self, source: Value, target: Value, count: Value, scale: Value | None = None) -> None:
        """Emit a copy of ``count`` numbers to ``target`` as fp32, multiplied by ``scale`` if there is one."""
        at, n = self.at, self.number
        with self.loop(n(0), count, LANES) as i:
            value = self.load_floats(source, at.mul(i, n(self._dtype.itemsize)), self._dtype, LANES)
            if scale is not None:
                value = at.fmul(value, self.spread(scale, LANES))
            self._keep(value, target, i)

    def _some(self, count: Value, together: int, body: Callable[[int, Value], None]) -> None:
        """Emit a loop over ``count`` indices, ``together`` at a time, and a loop over the rest, one at a time.

        ``body(number of indices, first index)`` emits the body of each loop.
        """
        at, n = self.at, self.number
        whole = at.mul(at.udiv(count, n(together)), n(together))
        with self.loop(n(0), whole, together) as first:
            body(together, first)
        with self.loop(whole, count) as first:
            body(1, first)

    def _score(self, keys: Value, stride: Value, count: Value) -> None:
        """Emit the scores of ``count`` positions, with -inf in the padding after them."""
        at, n = self.at, self.number
        last = at.sub(self.padded(count), n(LANES))
        with self.loop(n(0), self._heads) as head:
            self._keep(self.floats(-math.inf), self._scores, at.add(at.mul(head, n(PIECE)), last))
        with self.loop(n(0), count) as position:
            key = at.gep(keys, [at.mul(at.mul(position, stride), n(self._dtype.itemsize))])
            self._take(key, self._rows, self._width)

            def dots(count: int, head: Value, position: Value = position) -> None:
                heads = [at.add(head, n(i)) for i in range(count)]
                for place in self._accumulators[:count]:
                    at.store(self.floats(0.0), place)
                with self.loop(n(0), self._width, LANES) as i:
                    row = self._floats(self._rows, i)
                    for h, place in zip(heads, self._accumulators, strict=False):
                        query = self._floats(self._queries, at.add(at.mul(h, self._width), i))
                        at.store(self.multiply_add(query, row, at.load(place)), place)
                for h, place in zip(heads, self._accumulators, strict=False):
                    total = self.reduce(at.load(place), at.fadd)
                    self._keep(total, self._scores, at.add(at.mul(h, n(PIECE)), position))

            self._some(self._heads, HEADS, dots)

    def _soften(self, mask: Value, first: Value, count: Value, result: Value) -> None:
        """Emit exp(score - m) in place of ``count`` scores of each head, and all m and z of an item.

        The mask is added to the scores first if there is one; ``first`` is the index in it of the item's first number.
        """
        at, n = self.at, self.number
        largest, total = self._accumulators[:2]
        with at.if_then(at.icmp_signed("!=", mask, n(0))):
            added = at.inttoptr(at.add(mask, at.mul(first, n(4))), POINTER)
            with self.loop(n(0), self._heads) as head, self.loop(n(0), count, LANES) as i:
                place = at.add(at.mul(head, n(PIECE)), i)
                self._keep(at.fadd(self._floats(self._scores, place), self._floats(added, i)), self._scores, place)
        with self.loop(n(0), self._heads) as head:
            begin = at.mul(head, n(PIECE))
            at.store(self._lowest(), largest)
            with self.loop(n(0), count, LANES) as i:
                at.store(self.larger(self._floats(self._scores, at.add(begin, i)), at.load(largest)), largest)
            top = self.reduce(at.load(largest), self.larger)
            at.store(self.floats(0.0), total)
            with self.loop(n(0), count, LANES) as i:
                place = at.add(begin, i)
                share = self.exp(at.fsub(self._floats(self._scores, place), self.spread(top, LANES)))
                self._keep(share, self._scores, place)
                at.store(at.fadd(at.load(total), share), total)
            self._keep(top, result, self._index_of_m(head))
            self._keep(self.reduce(at.load(total), at.fadd), result, self._index_of_z(head))

    def _unite(self, values: Value, stride: Value, count: Value, result: Value) -> None:
        """Emit all s of an item: the sums of ``count`` values, weighted by what ``_soften`` has left."""
        at, n = self.at, self.number
        with self.loop(n(0), at.mul(self._heads, self._values), LANES) as i:
            self._keep(self.floats(0.0), result, i)

        def add(count: int, position: Value) -> None:
            positions = [at.add(position, n(i)) for i in range(count)]
            rows = [at.gep(self._rows, [at.mul(self._values, n(4 * i))]) for i in range(count)]
            for p, row in zip(positions, rows, strict=True):
                self._take(at.gep(values, [at.mul(at.mul(p, stride), n(self._dtype.itemsize))]), row, self._values)
            with self.loop(n(0), self._heads) as head:
                begin = at.mul(head, n(PIECE))
                shares = [self._number(self._scores, at.add(begin, p)) for p in positions]
                with self.loop(n(0), self._values, LANES) as i:
                    place = at.add(at.mul(head, self._values), i)
                    value = self._floats(result, place)
                    for share, row in zip(shares, rows, strict=True):
                        value = self.multiply_add(share, self._floats(row, i), value)
                    self._keep(value, result, place)

        self._some(count, POSITIONS, add)

    def _merge(self, results: Value, out: Value, first: Value) -> None:
        """Emit the output of a query group: the sum of all s / the sum of all z, each multiplied by exp(m - largest m).

        A sink counts as an m, with z = 1 and s = 0. ``first`` is the number of the query group's first head of queries.
        """
        at, n = self.at, self.number
        accumulator, total = self._accumulators[:2]
        has_sinks = at.icmp_signed("!=", self._sinks, n(0))

        def index(piece: Value, number: Value) -> Value:
            return at.add(at.mul(piece, self._result_numbers), number)

        with self.loop(n(0), self._heads) as head:
            m, z = self._index_of_m(head), self._index_of_z(head)
            at.store(self._lowest(), accumulator)
            with at.if_then(has_sinks):
                sink = self.load_floats(self._address(self._sinks, at.add(first, head)), n(0), self._dtype, 1)
                at.store(self.pick(sink, sink, [0] * LANES), accumulator)
            at.store(at.load(accumulator), self._sink)
            with self.loop(n(0), self._pieces) as piece:
                at.store(self.larger(self._number(results, index(piece, m)), at.load(accumulator)), accumulator)
            top = at.load(accumulator)
            share = self.exp(at.fsub(at.load(self._sink), top))
            at.store(at.select(has_sinks, share, self.floats(0.0)), total)
            with self.loop(n(0), self._pieces) as piece:
                share = self.exp(at.fsub(self._number(results, index(piece, m)), top))
                at.store(self.multiply_add(share, self._number(results, index(piece, z)), at.load(total)), total)
                # the share takes the place of m, which is not needed any more
                self._keep(at.extract_element(share, ir.Constant(I32, 0)), results, index(piece, m))
            inverse = at.fdiv(self.floats(1.0), at.load(total))
            with self.loop(n(0), self._values, LANES) as i:
                place = at.add(at.mul(head, self._values), i)
                at.store(self.floats(0.0), accumulator)
                with self.loop(n(0), self._pieces) as piece:
                    share, value = self._number(results, index(piece, m)), self._floats(results, index(piece, place))
                    at.store(self.multiply_add(share, value, at.load(accumulator)), accumulator)
                value = at.fmul(at.load(accumulator), inverse)
                self.store_floats(value, out, at.mul(place, n(self._dtype.itemsize)), self._dtype)

    def _index_of_m(self, head: Value) -> Value:
        return self.at.add(self.at.mul(self._heads, self._values), head)

    def _index_of_z(self, head: Value) -> Value:
        return self.at.add(self._index_of_m(head), self._heads)

    def _number(self, pointer: Value, index: Value) -> Value:
        """Emit a vector whose elements all are the fp32 number at an index."""
        return self.spread(self.load(pointer, self.at.mul(index, self.number(4)), F32), LANES)

    def _lowest(self) -> Value:
        """Return the least finite numbers. As no m is less, there is no NaN where all scores of an item are -inf."""
        return self.floats(torch.finfo(torch.float32).min)
