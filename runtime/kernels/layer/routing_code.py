"""Emit the compiled code of a router's choice of experts. ``routing.py`` runs it.

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
# Number of i64 fields in the context. In order: unused; number of experts, top_k; pointers to the logits, the bias,
# scratch memory, the weights, and the experts; the bits of the fp32 factor of the weights; a pointer to the correction;
# number of groups, and of those to choose from
CONTEXT = 12
LOGITS, BIAS, WEIGHTS, EXPERTS, CORRECTION = 3, 4, 6, 7, 9  # indices of addresses in a context
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
    """Compile ``routing_module``, once for each code."""
    return compile_kernel(this_processor(), routing_module(code), ROUTE)


def _padded(count: int) -> int:
    return -(-count // LANES) * LANES


def scratch_numbers(experts: int, top_k: int) -> int:
    """Return the size of the scratch memory in fp32 numbers.

    It has the scores of all experts, their keys, the keys of groups, and the scores and then the weights of the top-k.
    """
    return 3 * _padded(experts) + _padded(top_k)


def _ordered(emit: Emitter, bits: Value) -> Value:
    """Emit the bits of an fp32 number, i32, as a key, or a key as the bits.

    Keys have the order of the numbers, as integers. So NaN has a place too, above infinity.
    """
    at = emit.at
    sign = at.and_(at.ashr(bits, ir.Constant(I32, 31)), ir.Constant(I32, 0x7FFFFFFF))
    return at.xor(bits, sign)


def routing_module(code: RoutingCode) -> ir.Module:
    """Emit the function ``ROUTE(context)``.

    Logits [experts] and bias [experts] are of ``code.dtype``; the bias is added to the logits in memory. Weights
    [top_k] are of ``code.weight_dtype``, experts [top_k] i64. The scratch memory has ``scratch_numbers`` fp32 numbers.
    """
    dtype = code.dtype
    module = new_module()
    emit = Emitter(module, ROUTE, [POINTER])
    at, n = emit.at, emit.number
    _, (experts, top_k, logits, bias, scratch, weights, chosen, factor, correction, groups, best_groups) = emit.fields(
        CONTEXT
    )
    logits, bias, scratch, weights, chosen, correction = (
        at.inttoptr(address, POINTER) for address in (logits, bias, scratch, weights, chosen, correction)
    )
    best, where, total = at.alloca(I32), at.alloca(I64), at.alloca(vector(F32, LANES))
    factor = emit.spread(at.bitcast(at.trunc(factor, I32), F32), LANES)
    one = vector(F32, 1)

    def padded(count: Value) -> Value:
        return at.mul(at.udiv(at.add(count, n(LANES - 1)), n(LANES)), n(LANES))

    keys = at.gep(scratch, [at.mul(padded(experts), n(4))])
    group_keys = at.gep(keys, [at.mul(padded(experts), n(4))])
    picked = at.gep(group_keys, [at.mul(padded(experts), n(4))])
    nothing = emit.floats(0.0 if code.is_sigmoid else -math.inf)
    for values, count in ((scratch, experts), (picked, top_k)):  # the padding adds nothing to sums
        emit.store(nothing, values, at.mul(at.sub(padded(count), n(LANES)), n(4)))

    with emit.loop(n(0), experts) as expert:
        place = at.mul(expert, n(dtype.itemsize))
        value = emit.load_floats(logits, place, dtype, 1)
        if code.has_bias:
            emit.store_floats(at.fadd(value, emit.load_floats(bias, place, dtype, 1)), logits, place, dtype)
            value = emit.load_floats(logits, place, dtype, 1)
        emit.store(value, scratch, at.mul(expert, n(4)))
    if code.is_sigmoid:
        with emit.loop(n(0), padded(experts), LANES) as i:
            value = emit.load(scratch, at.mul(i, n(4)), vector(F32, LANES))
            emit.store(emit.times_sigmoid(emit.floats(1.0), value), scratch, at.mul(i, n(4)))
    with emit.loop(n(0), experts) as expert:
        value = emit.load(scratch, at.mul(expert, n(4)), one)
        if (kind := code.correction_dtype) is not None:
            value = at.fadd(value, emit.load_floats(correction, at.mul(expert, n(kind.itemsize)), kind, 1))
        emit.store(_ordered(emit, at.bitcast(value, I32)), keys, at.mul(expert, n(4)))
    if code.best_of_group:
        _drop_groups(emit, keys, group_keys, experts, groups, best_groups, code.best_of_group)

    with emit.loop(n(0), top_k) as rank:
        at.store(ir.Constant(I32, _LEAST), best)
        at.store(n(0), where)
        with emit.loop(n(0), experts) as expert:
            key = emit.load(keys, at.mul(expert, n(4)), I32)
            is_better = at.icmp_signed(">", key, at.load(best))
            at.store(at.select(is_better, key, at.load(best)), best)
            at.store(at.select(is_better, expert, at.load(where)), where)
        emit.store(at.load(where), chosen, at.mul(rank, n(8)))
        found = at.mul(at.load(where), n(4))
        emit.store(ir.Constant(I32, _LEAST), keys, found)
        emit.store(emit.load(scratch, found, F32), picked, at.mul(rank, n(4)))

    largest = emit.spread(emit.load(picked, n(0), F32), LANES)

    def share_of(values: Value, i: Value) -> Value:
        value = emit.load(values, at.mul(i, n(4)), vector(F32, LANES))
        return value if code.is_sigmoid else emit.exp(at.fsub(value, largest))

    at.store(emit.floats(0.0), total)
    values, count = (picked, top_k) if code.normalised else (scratch, experts)
    with emit.loop(n(0), padded(count), LANES) as i:
        at.store(at.fadd(at.load(total), share_of(values, i)), total)
    whole = emit.spread(emit.reduce(at.load(total), at.fadd), LANES)
    if code.is_sigmoid:
        whole = at.fadd(whole, emit.floats(_TINY))
    with emit.loop(n(0), padded(top_k), LANES) as i:
        share = share_of(picked, i)
        if code.normalised or not code.is_sigmoid:
            share = at.fdiv(share, whole)
        emit.store(at.fmul(share, factor), picked, at.mul(i, n(4)))
    with emit.loop(n(0), top_k) as rank:
        weight = emit.load(picked, at.mul(rank, n(4)), one)
        emit.store_floats(weight, weights, at.mul(rank, n(code.weight_dtype.itemsize)), code.weight_dtype)
    at.ret_void()
    return module


def _drop_groups(
    emit: Emitter, keys: Value, group_keys: Value, experts: Value, groups: Value, best_groups: Value, best_of_group: int
) -> None:
    """Emit the least key for all experts but those of the ``best_groups`` best groups.

    Of groups that are as good, the last is dropped first. ``group_keys`` is scratch memory, i32 [groups].
    """
    at, n = emit.at, emit.number
    size = at.udiv(experts, groups)
    first, second, least, where = at.alloca(F32), at.alloca(F32), at.alloca(I32), at.alloca(I64)
    lowest = ir.Constant(F32, -math.inf)
    with emit.loop(n(0), groups) as group:
        at.store(lowest, first)
        at.store(lowest, second)
        begin = at.mul(group, size)
        with emit.loop(begin, at.add(begin, size)) as expert:
            value = at.bitcast(_ordered(emit, emit.load(keys, at.mul(expert, n(4)), I32)), F32)
            is_first = at.fcmp_ordered(">", value, at.load(first))
            smaller = at.select(is_first, at.load(first), value)
            is_second = at.fcmp_ordered(">", smaller, at.load(second))
            at.store(at.select(is_second, smaller, at.load(second)), second)
            at.store(at.select(is_first, value, at.load(first)), first)
        score = at.load(first) if best_of_group == 1 else at.fadd(at.load(first), at.load(second))
        emit.store(_ordered(emit, at.bitcast(score, I32)), group_keys, at.mul(group, n(4)))
    with emit.loop(best_groups, groups):
        at.store(ir.Constant(I32, _LARGEST), least)
        at.store(n(0), where)
        with emit.loop(n(0), groups) as group:
            key = emit.load(group_keys, at.mul(group, n(4)), I32)
            is_less = at.icmp_signed("<=", key, at.load(least))
            at.store(at.select(is_less, key, at.load(least)), least)
            at.store(at.select(is_less, group, at.load(where)), where)
        emit.store(ir.Constant(I32, _LARGEST), group_keys, at.mul(at.load(where), n(4)))
        begin = at.mul(at.load(where), size)
        with emit.loop(begin, at.add(begin, size)) as expert:
            emit.store(ir.Constant(I32, _LEAST), keys, at.mul(expert, n(4)))
