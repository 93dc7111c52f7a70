"""Emit the compiled code of one token's attention. ``attention.py`` runs it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from llvmlite import ir

from .emitter import F32, I32, LANES, POINTER, Emitter, Value, new_module, vector

ATTEND = "moetier_attend"  # name of the compiled function
HEADS, POSITIONS = 4, 4  # heads for which scores are computed together, positions whose values are added together
# Number of i64 fields in the context of the compiled function. In order: items that threads have taken, all items, key
# heads, query heads per key head; L (positions), D (width of a key), V (width of a value); pointers to q, K, V, the
# mask (0 if there is none), the output and the scratch memory; strides of K, then of V, over sequences, heads and
# positions, in elements; the bits of the fp32 scale
CONTEXT = 20


def scratch_numbers(heads: int, positions: int, width: int, values: int) -> int:
    """Return the size of an item's scratch memory in fp32 numbers: queries, rows of keys or values, scores, sums."""
    padded = -(-positions // LANES) * LANES
    return heads * (width + padded + values) + POSITIONS * max(width, values)


def attention_module(dtype: torch.dtype) -> ir.Module:
    """Emit the function ``ATTEND(context)``, which computes items until none is left.

    q [items, heads, D], keys, values and out [items, heads, V] are of ``dtype``; heads are those of queries that share
    a key head. The mask is fp32 [B, L rounded up to LANES]. D and V are multiples of LANES.
    """
    return _Attention(new_module(), dtype).module


class _Attention(Emitter):
    def __init__(self, module: ir.Module, dtype: torch.dtype) -> None:
        super().__init__(module, ATTEND, [POINTER])
        self._dtype = dtype
        at, n = self.at, self.number
        begun, fields = self.fields(CONTEXT)
        items, key_heads, self._heads, self._length, self._width, self._values = fields[:6]
        q, k, v, mask, out, scratch = fields[6:12]
        k_strides, v_strides = fields[12:15], fields[15:18]
        scale = at.bitcast(at.trunc(fields[18], I32), F32)
        self._padded = at.mul(at.udiv(at.add(self._length, n(LANES - 1)), n(LANES)), n(LANES))
        self._accumulators = [at.alloca(vector(F32, LANES)) for _ in range(HEADS)]
        wide = at.select(at.icmp_signed(">", self._width, self._values), self._width, self._values)
        numbers = at.mul(self._heads, at.add(self._width, at.add(self._padded, self._values)))
        numbers = at.add(numbers, at.mul(n(POSITIONS), wide))
        with self.items(begun, items) as item:
            sequence, head = at.udiv(item, key_heads), at.urem(item, key_heads)
            self._queries = at.inttoptr(at.add(scratch, at.mul(item, at.mul(numbers, n(4)))), POINTER)
            self._rows = at.gep(self._queries, [at.mul(at.mul(self._heads, self._width), n(4))])
            self._scores = at.gep(self._rows, [at.mul(wide, n(4 * POSITIONS))])
            self._sums = at.gep(self._scores, [at.mul(at.mul(self._heads, self._padded), n(4))])

            queries = at.mul(self._heads, self._width)
            self._take(self._address(q, at.mul(item, queries)), self._queries, queries, scale)
            self._score(self._begin(k, k_strides, sequence, head), k_strides[2])
            self._soften(mask, at.mul(sequence, self._padded))
            self._unite(self._begin(v, v_strides, sequence, head), v_strides[2])
            result = self._address(out, at.mul(item, at.mul(self._heads, self._values)))
            with self.loop(n(0), at.mul(self._heads, self._values), LANES) as i:
                self.store_floats(self._floats(self._sums, i), result, at.mul(i, n(dtype.itemsize)), dtype)
        at.ret_void()

    def _address(self, base: Value, elements: Value) -> Value:
        return self.at.inttoptr(self.at.add(base, self.at.mul(elements, self.number(self._dtype.itemsize))), POINTER)

    def _begin(self, base: Value, strides: list[Value], sequence: Value, head: Value) -> Value:
        at = self.at
        return self._address(base, at.add(at.mul(sequence, strides[0]), at.mul(head, strides[1])))

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
        """Emit a loop over ``count`` indices, ``together`` at a time, and one over the rest, one at a time.

        They call ``body(number of indices, first index)``.
        """
        at, n = self.at, self.number
        whole = at.mul(at.udiv(count, n(together)), n(together))
        with self.loop(n(0), whole, together) as first:
            body(together, first)
        with self.loop(whole, count) as first:
            body(1, first)

    def _score(self, keys: Value, stride: Value) -> None:
        """Emit the scores of all positions, with -inf in the padding after them."""
        at, n = self.at, self.number
        nothing = self.all(F32, -math.inf, LANES)
        with self.loop(n(0), self._heads) as head:
            self._keep(nothing, self._scores, at.sub(at.mul(at.add(head, n(1)), self._padded), n(LANES)))
        with self.loop(n(0), self._length) as position:
            key = at.gep(keys, [at.mul(at.mul(position, stride), n(self._dtype.itemsize))])
            self._take(key, self._rows, self._width)

            def dots(count: int, head: Value, position: Value = position) -> None:
                heads = [at.add(head, n(i)) for i in range(count)]
                for place in self._accumulators[:count]:
                    at.store(self.all(F32, 0.0, LANES), place)
                with self.loop(n(0), self._width, LANES) as i:
                    row = self._floats(self._rows, i)
                    for h, place in zip(heads, self._accumulators, strict=False):
                        query = self._floats(self._queries, at.add(at.mul(h, self._width), i))
                        at.store(self.multiply_add(query, row, at.load(place)), place)
                for h, place in zip(heads, self._accumulators, strict=False):
                    total = self.reduce(at.load(place), at.fadd)
                    self.store(total, self._scores, at.mul(at.add(at.mul(h, self._padded), position), n(4)))

            self._some(self._heads, HEADS, dots)

    def _soften(self, mask: Value, first: Value) -> None:
        """Emit the softmax of the scores, to which the mask is added first if there is one.

        ``first``: index in the mask of the sequence's first number.
        """
        at, n = self.at, self.number
        largest, total = self._accumulators[:2]
        rest, masked = self.function.append_basic_block("plain"), self.function.append_basic_block("masked")
        at.cbranch(at.icmp_signed("==", mask, n(0)), rest, masked)
        at.position_at_end(masked)
        added = at.inttoptr(at.add(mask, at.mul(first, n(4))), POINTER)
        with self.loop(n(0), self._heads) as head, self.loop(n(0), self._padded, LANES) as i:
            place = at.add(at.mul(head, self._padded), i)
            self._keep(at.fadd(self._floats(self._scores, place), self._floats(added, i)), self._scores, place)
        at.branch(rest)
        at.position_at_end(rest)
        with self.loop(n(0), self._heads) as head:
            begin = at.mul(head, self._padded)
            at.store(self.all(F32, -math.inf, LANES), largest)
            with self.loop(n(0), self._padded, LANES) as i:
                at.store(self._larger(self._floats(self._scores, at.add(begin, i)), at.load(largest)), largest)
            top = self.spread(self.reduce(at.load(largest), self._larger), LANES)
            at.store(self.all(F32, 0.0, LANES), total)
            with self.loop(n(0), self._padded, LANES) as i:
                share = self.exp(at.fsub(self._floats(self._scores, at.add(begin, i)), top))
                self._keep(share, self._scores, at.add(begin, i))
                at.store(at.fadd(at.load(total), share), total)
            inverse = at.fdiv(ir.Constant(F32, 1.0), self.reduce(at.load(total), at.fadd))
            with self.loop(n(0), self._padded, LANES) as i:
                place = at.add(begin, i)
                self._keep(at.fmul(self._floats(self._scores, place), self.spread(inverse, LANES)), self._scores, place)

    def _unite(self, values: Value, stride: Value) -> None:
        """Emit the sum of all values, weighted by the scores."""
        at, n = self.at, self.number
        with self.loop(n(0), at.mul(self._heads, self._values), LANES) as i:
            self._keep(self.all(F32, 0.0, LANES), self._sums, i)

        def add(count: int, position: Value) -> None:
            positions = [at.add(position, n(i)) for i in range(count)]
            rows = [at.gep(self._rows, [at.mul(self._values, n(4 * i))]) for i in range(count)]
            for p, row in zip(positions, rows, strict=True):
                self._take(at.gep(values, [at.mul(at.mul(p, stride), n(self._dtype.itemsize))]), row, self._values)
            with self.loop(n(0), self._heads) as head:
                begin = at.mul(head, self._padded)
                shares = [
                    self.spread(self.load(self._scores, at.mul(at.add(begin, p), n(4)), F32), LANES) for p in positions
                ]
                with self.loop(n(0), self._values, LANES) as i:
                    place = at.add(at.mul(head, self._values), i)
                    value = self._floats(self._sums, place)
                    for share, row in zip(shares, rows, strict=True):
                        value = self.multiply_add(share, self._floats(row, i), value)
                    self._keep(value, self._sums, place)

        self._some(self._length, POSITIONS, add)

    def _larger(self, a: Value, b: Value) -> Value:
        return self.at.select(self.at.fcmp_ordered(">", a, b), a, b)
