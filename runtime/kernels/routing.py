"""A router's choice of experts for one token in one call: logits, the top-k of them, and the weights of these.

Weights are the softmax of the logits, either over all experts or over the chosen ones only. The latter are the weights
over all experts, divided by the sum of those of the chosen experts. With torch the choice takes five to seven
operations, each of which costs more than its arithmetic. Of experts with equal logits, those with the smallest numbers
are chosen. All is computed in fp32; logits and weights are rounded to their types.
"""

from __future__ import annotations

import math
import struct
import threading
from array import array
from typing import Any, NamedTuple

import torch
from llvmlite import ir
from torch import Tensor

from .emitter import F32, FLOATS, I32, I64, LANES, POINTER, Emitter, Value, new_module, once, vector
from .gemv import W, X, Y, gemv_step, lies_in_rows
from .jit import refusal, this_processor
from .team import Kernel, Program, Step, compile_kernel, is_small

ROUTE = "moetier_route"  # name of the compiled function
# Number of i64 fields in the context. In order: unused; number of experts, top_k; pointers to the logits, the bias,
# scratch memory, the weights, and the experts; the bits of the fp32 factor of the weights
CONTEXT = 9
LOGITS, BIAS, WEIGHTS, EXPERTS = 3, 4, 6, 7  # indices of addresses in a context
_LEAST = -(1 << 31)


class RoutingForm(NamedTuple):
    """How a router chooses experts and weighs them."""

    top_k: int
    normalised: bool  # whether the weights of the chosen experts add up to ``factor``
    factor: float
    logit_dtype: torch.dtype  # of the logits that it returns
    weight_dtype: torch.dtype


class Routing:
    """Chooses experts with a router's matrix, which has a row for each expert. Threads may use it at the same time."""

    def __init__(self, form: RoutingForm) -> None:
        self.form = form
        self._local = threading.local()  # ``calls`` of this thread

    @staticmethod
    def fits(weight: Tensor, bias: Tensor | None) -> bool:
        """Return whether compiled code can compute logits with ``weight`` [experts, columns] and bias [experts]."""
        return (
            weight.dtype in FLOATS
            and lies_in_rows(weight)
            and (bias is None or (bias.dtype == weight.dtype and bias.is_cpu and bias.shape == weight.shape[:1]))
            and not refusal()
        )

    def of(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return logits [1, experts], weights [1, top_k] and experts [1, top_k], int64, of one row x [1, columns].

        x may have other leading dimensions. Returns None for other inputs.
        """
        with torch._C.DisableTorchFunctionSubclass():
            if x.numel() != weight.shape[-1] or x.shape[-1] != x.numel() or torch.is_grad_enabled():
                return None
            if x.dtype not in FLOATS or not x.is_cpu or not x.is_contiguous() or not self.fits(weight, bias):
                return None
            call: _Call | None = getattr(self._local, "call", None)
            form = (x.dtype, weight.dtype, weight.shape, bias is not None, torch.get_num_threads())
            if call is None or call.form != form:
                call = self._local.call = _Call(self.form, form, weight)
            return call.of(x, weight, bias)


class _Call:
    """The contexts of a routing, which are made once for each thread."""

    def __init__(self, routing: RoutingForm, form: tuple[Any, ...], weight: Tensor) -> None:
        self.form = form
        self._routing = routing
        given, kept, _, has_bias, _ = form
        self._product = gemv_step(weight, given)
        scratch = array("f", bytes(4 * scratch_numbers(len(weight), routing.top_k)))
        (factor,) = struct.unpack("I", struct.pack("f", routing.factor))
        numbers = (0, len(weight), routing.top_k, 0, 0, scratch.buffer_info()[0], 0, 0, factor)
        kernel = _kernel(kept, routing.weight_dtype, routing.normalised, has_bias)
        self._choice = Step(kernel, array("q", numbers), 1, scratch)
        self._program = Program([self._product, self._choice], locked=is_small(weight.numel()))

    def of(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        top_k, dtype = self._routing.top_k, self._routing.weight_dtype
        logits = torch.empty((1, len(weight)), dtype=weight.dtype)
        weights, experts = torch.empty((1, top_k), dtype=dtype), torch.empty((1, top_k), dtype=torch.int64)
        product, choice = self._product.context, self._choice.context
        product[X], product[W], product[Y] = x.data_ptr(), weight.data_ptr(), logits.data_ptr()
        choice[LOGITS], choice[BIAS] = logits.data_ptr(), 0 if bias is None else bias.data_ptr()
        choice[WEIGHTS], choice[EXPERTS] = weights.data_ptr(), experts.data_ptr()
        self._program.run()
        return logits.to(self._routing.logit_dtype), weights, experts


@once
def _kernel(dtype: torch.dtype, weight_dtype: torch.dtype, normalised: bool, has_bias: bool) -> Kernel:
    module = routing_module(dtype, weight_dtype, normalised=normalised, has_bias=has_bias)
    return compile_kernel(this_processor(), module, ROUTE)


def _padded(count: int) -> int:
    return -(-count // LANES) * LANES


def scratch_numbers(experts: int, top_k: int) -> int:
    """Return the size of the scratch memory in fp32 numbers: logits, keys, the logits and then weights of the top-k."""
    return 2 * _padded(experts) + _padded(top_k)


def routing_module(dtype: torch.dtype, weight_dtype: torch.dtype, *, normalised: bool, has_bias: bool) -> ir.Module:
    """Emit the function ``ROUTE(context)``.

    Logits [experts] and bias [experts] are of ``dtype``; the bias is added to the logits in memory. Weights [top_k] are
    of ``weight_dtype``, experts [top_k] i64. The scratch memory has ``scratch_numbers`` fp32 numbers.
    """
    module = new_module()
    emit = Emitter(module, ROUTE, [POINTER])
    at, n = emit.at, emit.number
    _, (experts, top_k, logits, bias, scratch, weights, chosen, factor) = emit.fields(CONTEXT)
    logits, bias, scratch, weights, chosen = (
        at.inttoptr(address, POINTER) for address in (logits, bias, scratch, weights, chosen)
    )
    best, where, total = at.alloca(I32), at.alloca(I64), at.alloca(vector(F32, LANES))
    factor = emit.spread(at.bitcast(at.trunc(factor, I32), F32), LANES)
    nothing, one = emit.all(F32, -math.inf, LANES), vector(F32, 1)

    def padded(count: Value) -> Value:
        return at.mul(at.udiv(at.add(count, n(LANES - 1)), n(LANES)), n(LANES))

    keys = at.gep(scratch, [at.mul(padded(experts), n(4))])
    picked = at.gep(keys, [at.mul(padded(experts), n(4))])
    for values, count in ((scratch, experts), (picked, top_k)):  # -inf in the padding
        emit.store(nothing, values, at.mul(at.sub(padded(count), n(LANES)), n(4)))

    with emit.loop(n(0), experts) as expert:
        place = at.mul(expert, n(dtype.itemsize))
        value = emit.load_floats(logits, place, dtype, 1)
        if has_bias:
            emit.store_floats(at.fadd(value, emit.load_floats(bias, place, dtype, 1)), logits, place, dtype)
            value = emit.load_floats(logits, place, dtype, 1)
        emit.store(value, scratch, at.mul(expert, n(4)))
        # keys have the order of the logits, as integers; so NaN has a place too, above infinity
        bits = at.bitcast(value, I32)
        sign = at.and_(at.ashr(bits, ir.Constant(I32, 31)), ir.Constant(I32, 0x7FFFFFFF))
        emit.store(at.xor(bits, sign), keys, at.mul(expert, n(4)))

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
    at.store(emit.all(F32, 0.0, LANES), total)
    values, count = (picked, top_k) if normalised else (scratch, experts)
    with emit.loop(n(0), padded(count), LANES) as i:
        share = emit.exp(at.fsub(emit.load(values, at.mul(i, n(4)), vector(F32, LANES)), largest))
        at.store(at.fadd(at.load(total), share), total)
    whole = emit.spread(emit.reduce(at.load(total), at.fadd), LANES)
    with emit.loop(n(0), padded(top_k), LANES) as i:
        share = emit.exp(at.fsub(emit.load(picked, at.mul(i, n(4)), vector(F32, LANES)), largest))
        emit.store(at.fmul(at.fdiv(share, whole), factor), picked, at.mul(i, n(4)))
    with emit.loop(n(0), top_k) as rank:
        weight = emit.load(picked, at.mul(rank, n(4)), one)
        emit.store_floats(weight, weights, at.mul(rank, n(weight_dtype.itemsize)), weight_dtype)
    at.ret_void()
    return module
