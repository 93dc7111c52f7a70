"""Emit the compiled code of a router's choice of experts for rows of logits. ``routing.py`` runs it.

All is computed in fp32; logits and weights are rounded to their types.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from llvmlite import ir

from moetier.runtime.kernels.jit.emitter import F32, I32, I64, LANES, POINTER, Emitter, Value, new_module, once, vector
from moetier.runtime.kernels.jit.processor import this_processor
from moetier.runtime.kernels.jit.team import Kernel, compile_kernel

ROUTE = "moetier_route"  # name of the compiled function
# Number of i64 fields in the context. In order: rows that threads have taken, all rows; number of experts, top_k;
# pointers to the logits, the bias, scratch memory, the weights, and the experts; the bits of the fp32 factor of the
# weights; a pointer to the correction; number of groups, and of those to choose from
CONTEXT = 13
LOGITS, BIAS, WEIGHTS, EXPERTS, CORRECTION = 4, 5, 7, 8, 10  # indices of addresses in a context
_LEAST, _LARGEST = -(1 << 31), (1 << 31) - 1
_TINY = 1e-20  # added to sums of sigmoids, as architectures do


class RoutingCode(NamedTuple):
    """The properties of a router for which a function is compiled."""

    dtype: torch.dtype  # of logits and bias
    weight_dtype: torch.dtype
    normalised: bool
    is_sigmoid: bool
    has_bias: bool
    correction_dtype: torch.dtype | None  # None: no correction
    best_of_group: int  # number of experts whose scores add up to a group's; 0: no groups


@once
def routing_kernel(code: RoutingCode) -> Kernel:
    """Compile the function ``ROUTE(context)``.

    Logits [rows, experts] and bias [experts] are of ``code.dtype``; the bias is added to the logits in memory. Weights
    [rows, top_k] are of ``code.weight_dtype``, experts [rows, top_k] i64. The scratch memory has ``scratch_elements``
    fp32 numbers for each row.
    """
    return compile_kernel(this_processor(), _Router(code).finish(), ROUTE)


def _padded(count: int) -> int:
    return -(-count // LANES) * LANES


def scratch_elements(experts: int, top_k: int) -> int:
    """Return the size of the scratch memory of a row in fp32 numbers.

    It has the scores of all experts, their keys, the keys of groups, and the scores and then the weights of the top-k.
    """
    return 3 * _padded(experts) + _padded(top_k)


class _Router(Emitter):
    """Emitter of the function ROUTE: scores of all experts, their keys, the top-k of these, and their weights.

    Experts are chosen by numbers. Their keys are i32 in the same order, in which NaN has a place too, above infinity.
    """

    def __init__(self, code: RoutingCode) -> None:
        super().__init__(new_module(), ROUTE, [POINTER])
        at, n = self.at, self.number
        self._code = code
        begun, (rows, self._experts, self._top_k, *addresses, factor, correction, groups, best_groups) = self.fields(
            CONTEXT
        )
        # variables: a key, an index, a sum, and scores
        self._key, self._index, self._total = at.alloca(I32), at.alloca(I64), at.alloca(vector(F32, LANES))
        self._first, self._second = at.alloca(F32), at.alloca(F32)
        self._factor = self.spread(at.bitcast(at.trunc(factor, I32), F32), LANES)
        score_bytes = at.mul(self.padded(self._experts), n(4))
        row_bytes = at.add(at.mul(score_bytes, n(3)), at.mul(self.padded(self._top_k), n(4)))
        strides = (
            at.mul(self._experts, n(code.dtype.itemsize)),
            n(0),
            row_bytes,
            at.mul(self._top_k, n(code.weight_dtype.itemsize)),
            at.mul(self._top_k, n(8)),
        )
        self._correction = at.inttoptr(correction, POINTER)
        with self.items(begun, rows) as row:
            self._logits, self._bias, self._scores, self._weights, self._chosen = (
                at.inttoptr(at.add(address, at.mul(row, stride)), POINTER)
                for address, stride in zip(addresses, strides, strict=True)
            )
            self._keys = at.gep(self._scores, [score_bytes])
            self._group_keys = at.gep(self._keys, [score_bytes])
            self._picked = at.gep(self._group_keys, [score_bytes])
            self._score()
            self._make_keys()
            if code.best_of_group:
                self._drop_groups(groups, best_groups)
            self._choose()
            self._weigh()

    def _number(self, pointer: Value, index: Value, type_: Value) -> Value:
        return self.load(pointer, self.at.mul(index, self.number(4)), type_)

    def _keep(self, value: Value, pointer: Value, index: Value) -> None:
        self.store(value, pointer, self.at.mul(index, self.number(4)))

    def _ordered(self, bits: Value) -> Value:
        """Emit the i32 key of an fp32 number from its bits, or the bits from the key. Keys order as numbers do."""
        at = self.at
        sign = at.and_(at.ashr(bits, ir.Constant(I32, 31)), ir.Constant(I32, 0x7FFFFFFF))
        return at.xor(bits, sign)

    def _score(self) -> None:
        """Emit the logits, with the bias, and the scores: sigmoids, or the logits themselves for a softmax."""
        at, n, code = self.at, self.number, self._code
        nothing = self.floats(0.0 if code.is_sigmoid else -math.inf)
        for values, count in ((self._scores, self._experts), (self._picked, self._top_k)):
            self._keep(nothing, values, at.sub(self.padded(count), n(LANES)))  # the padding adds nothing to sums
        with self.loop(n(0), self._experts) as expert:
            place = at.mul(expert, n(code.dtype.itemsize))
            value = self.load_floats(self._logits, place, code.dtype, 1)
            if code.has_bias:
                value = at.fadd(value, self.load_floats(self._bias, place, code.dtype, 1))
                self.store_floats(value, self._logits, place, code.dtype)
                value = self.load_floats(self._logits, place, code.dtype, 1)
            self._keep(value, self._scores, expert)
        if code.is_sigmoid:
            with self.loop(n(0), self.padded(self._experts), LANES) as i:
                value = self._number(self._scores, i, vector(F32, LANES))
                self._keep(self.times_sigmoid(self.floats(1.0), value), self._scores, i)

    def _make_keys(self) -> None:
        """Emit a key for each expert: an i32 that has the order of the scores, with the correction added to them."""
        at, n, dtype = self.at, self.number, self._code.correction_dtype
        with self.loop(n(0), self._experts) as expert:
            value = self._number(self._scores, expert, vector(F32, 1))
            if dtype is not None:
                value = at.fadd(value, self.load_floats(self._correction, at.mul(expert, n(dtype.itemsize)), dtype, 1))
            self._keep(self._ordered(at.bitcast(value, I32)), self._keys, expert)

    def _drop_groups(self, groups: Value, best_groups: Value) -> None:
        """Emit the least key for all experts but those of the ``best_groups`` best groups.

        Of groups that are as good, the last is dropped first.
        """
        at, n = self.at, self.number
        size = at.udiv(self._experts, groups)
        first, second = self._first, self._second
        with self.loop(n(0), groups) as group:
            for place in (first, second):
                at.store(ir.Constant(F32, -math.inf), place)
            begin = at.mul(group, size)
            with self.loop(begin, at.add(begin, size)) as expert:
                value = at.bitcast(self._ordered(self._number(self._keys, expert, I32)), F32)
                is_first = at.fcmp_ordered(">", value, at.load(first))
                smaller = at.select(is_first, at.load(first), value)
                is_second = at.fcmp_ordered(">", smaller, at.load(second))
                at.store(at.select(is_second, smaller, at.load(second)), second)
                at.store(at.select(is_first, value, at.load(first)), first)
            is_best = self._code.best_of_group == 1
            score = at.load(first) if is_best else at.fadd(at.load(first), at.load(second))
            self._keep(self._ordered(at.bitcast(score, I32)), self._group_keys, group)
        with self.loop(best_groups, groups):
            worst = self._index_of(self._group_keys, groups, "<=", _LARGEST)
            self._keep(ir.Constant(I32, _LARGEST), self._group_keys, worst)
            begin = at.mul(worst, size)
            with self.loop(begin, at.add(begin, size)) as expert:
                self._keep(ir.Constant(I32, _LEAST), self._keys, expert)

    def _index_of(self, keys: Value, count: Value, order: str, start: int) -> Value:
        """Emit the search for the largest key, if ``order`` is ">", or the smallest, if it is "<="; return its index.

        Of equal keys, the largest is the first of them, and the smallest the last. ``start`` is a key that is not
        before any other.
        """
        at, n = self.at, self.number
        at.store(ir.Constant(I32, start), self._key)
        at.store(n(0), self._index)
        with self.loop(n(0), count) as i:
            key = self._number(keys, i, I32)
            is_better = at.icmp_signed(order, key, at.load(self._key))
            at.store(at.select(is_better, key, at.load(self._key)), self._key)
            at.store(at.select(is_better, i, at.load(self._index)), self._index)
        return at.load(self._index)

    def _choose(self) -> None:
        """Emit the choice of the experts with the top-k keys, and copies of their scores."""
        at, n = self.at, self.number
        with self.loop(n(0), self._top_k) as rank:
            best = self._index_of(self._keys, self._experts, ">", _LEAST)
            self.store(best, self._chosen, at.mul(rank, n(8)))
            self._keep(ir.Constant(I32, _LEAST), self._keys, best)
            self._keep(self._number(self._scores, best, F32), self._picked, rank)

    def _weigh(self) -> None:
        """Emit the weights of the chosen experts."""
        at, n, code = self.at, self.number, self._code
        largest = self.spread(self.load(self._picked, n(0), F32), LANES)

        def share_of(values: Value, i: Value) -> Value:
            value = self._number(values, i, vector(F32, LANES))
            return value if code.is_sigmoid else self.exp(at.fsub(value, largest))

        at.store(self.floats(0.0), self._total)
        values, count = (self._picked, self._top_k) if code.normalised else (self._scores, self._experts)
        with self.loop(n(0), self.padded(count), LANES) as i:
            at.store(at.fadd(at.load(self._total), share_of(values, i)), self._total)
        whole = self.spread(self.reduce(at.load(self._total), at.fadd), LANES)
        if code.is_sigmoid:
            whole = at.fadd(whole, self.floats(_TINY))
        with self.loop(n(0), self.padded(self._top_k), LANES) as i:
            share = share_of(self._picked, i)
            if code.normalised or not code.is_sigmoid:
                share = at.fdiv(share, whole)
            self._keep(at.fmul(share, self._factor), self._picked, i)
        with self.loop(n(0), self._top_k) as rank:
            weight = self._number(self._picked, rank, vector(F32, 1))
            self.store_floats(weight, self._weights, at.mul(rank, n(code.weight_dtype.itemsize)), code.weight_dtype)
