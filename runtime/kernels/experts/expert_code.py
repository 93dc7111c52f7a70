"""Emit the functions that a block's experts need besides products; ``expert_kernels.py`` runs them in order.

``tests/helpers/directory_reference.py`` has FIND and PROVE in plain Python. A test runs both beside an arena's owner,
in all interleavings.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from llvmlite import ir

from moetier.runtime.kernels.jit.emitter import (
    BF16,
    F32,
    FP32,
    I32,
    I64,
    LANES,
    POINTER,
    Dtype,
    Emitter,
    Value,
    new_module,
    vector,
)
from moetier.runtime.kernels.products.gemm import JOB
from moetier.runtime.kernels.products.rounding import Rounding, emit_rounding

# names of the compiled functions
ACTIVATE, PLACE, ADD_UP, FIND, PROVE = (f"moetier_{name}" for name in ("activate", "place", "add_up", "find", "prove"))

Function = Literal["silu", "gelu", "gelu_tanh", "relu2"]
FUNCTIONS: tuple[Function, ...] = get_args(Function)


@dataclass(frozen=True)
class Activation:
    """The function between an expert's products: f(min(gate, limit)) * (clamp(up, -limit, limit) + shift).

    Without a gate it is f(up). f is x * sigmoid(alpha * x) for "silu", GELU with the error function for "gelu", its
    approximation by tanh for "gelu_tanh" (Hendrycks & Gimpel 2016, arXiv 1606.08415), and the square of max(x, 0) for
    "relu2".
    """

    function: Function = "silu"
    interleaved: bool = False  # gate and up are the even and odd elements of a row; otherwise its first and second half
    alpha: float = 1.0
    limit: float = math.inf
    shift: float = 0.0
    gated: bool = True

    @property
    def variant(self) -> Activation:
        """The activation with the default numbers. Code is compiled for it, and gets the numbers when it runs."""
        return Activation(self.function, self.interleaved, gated=self.gated)

    @property
    def numbers(self) -> array[int]:
        """The bits of alpha, limit and shift as fp32 numbers."""
        return array("I", array("f", (self.alpha, self.limit, self.shift)).tobytes())


class ActivateContext(NamedTuple):
    """The i64 fields in the context of ACTIVATE."""

    begun: int = 0  # jobs that threads have taken
    items: int = 0  # number of all jobs
    jobs: int = 0  # address of the jobs
    product: int = 0  # address of the first product, fp32 [R, 2 * K], or without gates [R, K]
    rounded: int = 0  # addresses of n, t and sums, as ``rounding_module`` writes them
    scales: int = 0
    sums: int = 0
    columns: int = 0  # K
    bias: int = 0  # offset in a record, in bytes, of the bias, bf16 [2 * K], or without gates [K]
    alpha: int = 0  # ``Activation.numbers``
    limit: int = 0
    shift: int = 0


class PlaceContext(NamedTuple):
    """The i64 fields in the context of PLACE."""

    begun: int = 0  # jobs that threads have taken
    items: int = 0  # number of all jobs
    jobs: int = 0  # address of the jobs
    product: int = 0  # address of the last product, fp32 [R, N]
    places: int = 0  # address of the number of each row's row in the outputs, i64 [R]
    outputs: int = 0  # address of the outputs [*, N]
    columns: int = 0  # N
    bias: int = 0  # offset in a record, in bytes, of the bias, bf16 [N]


class AddUpContext(NamedTuple):
    """The i64 fields in the context of ADD_UP."""

    begun: int = 0  # tokens that threads have taken
    tokens: int = 0  # number of all tokens
    outputs: int = 0  # address of the outputs [R, N]
    weights: int = 0  # address of their weights [R]
    rows: int = 0  # address of the rows of each token's outputs, i64 [R], in the order in which they are added
    bounds: int = 0  # address of the number of rows before those of each token, i64 [tokens + 1]
    sums: int = 0  # address of the sums [tokens, N]
    columns: int = 0  # N
    residual: int = 0  # address of numbers [tokens, N] that are added to the rounded sums; 0 if there are none


class FindContext(NamedTuple):
    """The i64 fields in the context of FIND. From ``experts`` to ``slot_bytes`` they are ``Residents.numbers``."""

    found: int = 0  # number of experts before the first that is not resident; FIND writes it
    top_k: int = 0
    wanted: int = 0  # address of the experts to look up, i64 [top_k]
    experts: int = 0
    table: int = 0
    generations: int = 0
    first_slot: int = 0
    slots: int = 0
    records: int = 0
    slot_bytes: int = 0
    jobs: int = 0  # addresses of what FIND writes: jobs of one row, i64 [top_k, JOB]
    found_slots: int = 0  # slots of the experts, i64 [top_k]
    found_generations: int = 0  # generations of these slots, i64 [top_k]


class ProveContext(NamedTuple):
    """The i64 fields in the context of PROVE."""

    unchanged: int = 0  # number of slots whose generations are unchanged; PROVE writes it
    top_k: int = 0
    generations: int = 0  # address of the directory's generations
    found_slots: int = 0  # addresses of what FIND has written
    found_generations: int = 0


def activation_module(variant: Activation, rounding: Rounding, has_bias: bool) -> ir.Module:
    """Emit the function ``ACTIVATE(context)``, which computes items until none is left. An item is the rows of a job.

    The code does not use the numbers of ``variant``; they come from the context.
    """
    emit = Emitter(new_module(), ACTIVATE, [POINTER])
    at, n, group = emit.at, emit.number, rounding.group
    begun, fields = emit.fields(len(ActivateContext._fields))
    given = ActivateContext(begun, *fields)
    jobs, inner, out, scales, sums = (
        at.inttoptr(address, POINTER)
        for address in (given.jobs, given.product, given.rounded, given.scales, given.sums)
    )
    columns, groups = given.columns, at.udiv(given.columns, n(group))
    numbers = [
        emit.spread(at.bitcast(at.trunc(bits, I32), F32), group) for bits in (given.alpha, given.limit, given.shift)
    ]

    def load(row: Value, biases: Value, first: Value, count: int) -> Value:
        """Emit a load of ``count`` elements of a row, from element ``first`` on, and the addition of their biases."""
        values = emit.load(row, at.mul(first, n(4)), vector(F32, count))
        if has_bias:
            values = at.fadd(values, emit.load_floats(biases, at.mul(first, n(2)), BF16, count))
        return values

    with emit.items(begun, given.items) as item:
        record, first, rows = _job(emit, jobs, item)
        biases = at.gep(record, [given.bias])
        with emit.loop(first, at.add(first, rows)) as row:
            products = at.gep(inner, [at.mul(at.mul(row, columns), n(8 if variant.gated else 4))])
            with emit.loop(n(0), groups) as g:
                start = at.mul(g, n(group))
                if variant.interleaved:
                    start = at.mul(start, n(2))
                    left, right = (load(products, biases, at.add(start, n(skip)), group) for skip in (0, group))
                    gate, up = (emit.pick(left, right, range(first, 2 * group, 2)) for first in (0, 1))
                else:
                    gate = load(products, biases, start, group)
                    up = load(products, biases, at.add(columns, start), group) if variant.gated else None
                values = _activated(emit, variant.function, gate, up, *numbers)
                emit_rounding(emit, rounding, values, at.add(at.mul(row, groups), g), out, scales, sums)
    return emit.finish()


def placing_module(dtype: Dtype, has_bias: bool) -> ir.Module:
    """Emit the function ``PLACE(context)``, which computes items until none is left. An item is the rows of a job.

    PLACE adds biases to the rows of the last product, and writes each row to its row of the outputs, of ``dtype``.
    """
    emit = Emitter(new_module(), PLACE, [POINTER])
    at, n = emit.at, emit.number
    begun, fields = emit.fields(len(PlaceContext._fields))
    given = PlaceContext(begun, *fields)
    jobs, product, places, outputs = (
        at.inttoptr(address, POINTER) for address in (given.jobs, given.product, given.places, given.outputs)
    )
    columns = given.columns
    with emit.items(begun, given.items) as item:
        record, first, rows = _job(emit, jobs, item)
        biases = at.gep(record, [given.bias])
        with emit.loop(first, at.add(first, rows)) as row:
            source = at.gep(product, [at.mul(at.mul(row, columns), n(4))])
            place = emit.load(places, at.mul(row, n(8)), I64)
            target = at.gep(outputs, [at.mul(at.mul(place, columns), n(dtype.itemsize))])
            with emit.loop(n(0), columns, LANES) as column:
                values = emit.load(source, at.mul(column, n(4)), vector(F32, LANES))
                if has_bias:
                    values = at.fadd(values, emit.load_floats(biases, at.mul(column, n(2)), BF16, LANES))
                emit.store_floats(values, target, at.mul(column, n(dtype.itemsize)), dtype)
    return emit.finish()


def adding_module(dtype: Dtype, weight_dtype: Dtype, has_residual: bool, is_part: bool = False) -> ir.Module:
    """Emit the function ``ADD_UP(context)``, which computes items until none is left. An item is a token.

    The weights are of ``weight_dtype``; the outputs, the sums and, if ``has_residual``, the residual are of ``dtype``.
    With ``is_part``, the outputs are only some of the tokens': sums are fp32, and the outputs are added to them.
    """
    emit = Emitter(new_module(), ADD_UP, [POINTER])
    at, n = emit.at, emit.number
    begun, fields = emit.fields(len(AddUpContext._fields))
    given = AddUpContext(begun, *fields)
    outputs, weights, rows, bounds, sums, residual = (
        at.inttoptr(address, POINTER)
        for address in (given.outputs, given.weights, given.rows, given.bounds, given.sums, given.residual)
    )
    columns = given.columns
    total = at.alloca(vector(F32, LANES))
    row_bytes = at.mul(columns, n(dtype.itemsize))
    sum_dtype = FP32 if is_part else dtype

    def word(pointer: Value, index: Value) -> Value:
        return at.load(emit.pointer_at(pointer, at.mul(index, n(8)), I64))

    with emit.items(begun, given.tokens) as token:
        first, end = word(bounds, token), word(bounds, at.add(token, n(1)))
        target = at.gep(sums, [at.mul(token, at.mul(columns, n(sum_dtype.itemsize)))])
        with emit.loop(n(0), columns, LANES) as column:
            offset = at.mul(column, n(dtype.itemsize))
            at.store(
                emit.load_floats(target, at.mul(column, n(4)), FP32, LANES) if is_part else emit.floats(0.0), total
            )
            with emit.loop(first, end) as number:
                row = word(rows, number)
                weight = emit.load_floats(weights, at.mul(row, n(weight_dtype.itemsize)), weight_dtype, 1)
                weight = emit.pick(weight, weight, [0] * LANES)
                values = emit.load_floats(outputs, at.add(at.mul(row, row_bytes), offset), dtype, LANES)
                at.store(_multiply_add(emit, weight, values, at.load(total)), total)
            emit.store_floats(at.load(total), target, at.mul(column, n(sum_dtype.itemsize)), sum_dtype)
            if has_residual:
                place = at.add(at.mul(token, row_bytes), offset)
                parts = (emit.load_floats(*part, dtype, LANES) for part in ((target, offset), (residual, place)))
                emit.store_floats(at.fadd(*parts), target, offset, dtype)
    return emit.finish()


def find_module() -> ir.Module:
    """Emit the function ``FIND(context)``, which looks experts up in a directory (``tiers/arena/directory.py``).

    FIND stops at the first expert that is not resident.
    """
    emit = Emitter(new_module(), FIND, [POINTER])
    at, n = emit.at, emit.number
    found, fields = emit.fields(len(FindContext._fields))
    given = FindContext(found, *fields)
    wanted, table, generations = (
        at.inttoptr(address, POINTER) for address in (given.wanted, given.table, given.generations)
    )
    jobs, found_slots, found_generations = (
        at.inttoptr(address, POINTER) for address in (given.jobs, given.found_slots, given.found_generations)
    )

    def word(pointer: Value, index: Value) -> Value:
        return emit.pointer_at(pointer, at.mul(index, n(8)), I64)

    with emit.loop(n(0), given.top_k) as i:
        expert = at.load(word(wanted, i))
        emit.return_if(at.icmp_unsigned(">=", expert, given.experts))
        slot = at.load_atomic(word(table, expert), "acquire", 8)
        number = at.sub(slot, given.first_slot)
        emit.return_if(at.icmp_unsigned(">=", number, given.slots))
        generation = at.load_atomic(word(generations, slot), "acquire", 8)
        # the slot is looked up again after its generation was read: if it was refilled in between, they differ
        is_moved = at.icmp_signed("!=", at.load_atomic(word(table, expert), "acquire", 8), slot)
        is_filled = at.icmp_unsigned("==", at.and_(generation, n(1)), n(0))
        emit.return_if(at.or_(is_moved, at.not_(is_filled)))
        job = at.mul(i, n(JOB))
        for offset, value in enumerate((at.add(given.records, at.mul(number, given.slot_bytes)), i, n(1))):
            at.store(value, word(jobs, at.add(job, n(offset))))
        at.store(slot, word(found_slots, i))
        at.store(generation, word(found_generations, i))
        at.store(at.add(i, n(1)), found)
    return emit.finish()


def prove_module() -> ir.Module:
    """Emit the function ``PROVE(context)``, which counts the slots whose generations are unchanged."""
    emit = Emitter(new_module(), PROVE, [POINTER])
    at, n = emit.at, emit.number
    unchanged, fields = emit.fields(len(ProveContext._fields))
    given = ProveContext(unchanged, *fields)
    generations, slots, seen = (
        at.inttoptr(address, POINTER) for address in (given.generations, given.found_slots, given.found_generations)
    )
    at.fence("seq_cst")  # all reads of the records come before those of the generations
    with emit.loop(n(0), given.top_k) as i:
        slot, before = (emit.load(pointer, at.mul(i, n(8)), I64) for pointer in (slots, seen))
        now = at.load_atomic(emit.pointer_at(generations, at.mul(slot, n(8)), I64), "acquire", 8)
        at.store(at.add(at.load(unchanged), at.zext(at.icmp_signed("==", now, before), I64)), unchanged)
    return emit.finish()


def _job(emit: Emitter, jobs: Value, item: Value) -> tuple[Value, Value, Value]:
    """Emit loads of a job: a pointer to its record, its first row, its number of rows."""
    at, n = emit.at, emit.number
    job = at.gep(jobs, [at.mul(item, n(8 * JOB))])
    record, first, rows = (at.load(emit.pointer_at(job, n(8 * i), I64)) for i in range(JOB))
    return at.inttoptr(record, POINTER), first, rows


def _activated(
    emit: Emitter, function: Function, gate: Value, up: Value | None, alpha: Value, limit: Value, shift: Value
) -> Value:
    """Emit the activation of vectors of gates and ups; ``up`` is None if there are no gates."""
    at, count = emit.at, gate.type.count

    def all_(value: float) -> Value:
        return emit.all(F32, value, count)

    def least(a: Value, b: Value) -> Value:  # NaN stays
        return at.select(at.fcmp_ordered(">", a, b), b, a)

    if up is not None:
        gate, up, bottom = least(gate, limit), least(up, limit), at.fneg(limit)
        up = at.select(at.fcmp_ordered("<", up, bottom), bottom, up)
    match function:
        case "silu":
            value = emit.times_sigmoid(gate, at.fmul(gate, alpha))
        case "gelu_tanh":  # (1 + tanh(u)) / 2 is the sigmoid of 2 * u
            cube = at.fmul(at.fmul(gate, gate), gate)
            inside = _multiply_add(emit, cube, all_(0.044715), gate)
            value = emit.times_sigmoid(gate, at.fmul(inside, all_(2 * math.sqrt(2 / math.pi))))
        case "gelu":
            value = at.fmul(gate, _normal(emit, gate))
        case "relu2":
            positive = at.select(at.fcmp_ordered("<", gate, all_(0.0)), all_(0.0), gate)  # NaN stays
            value = at.fmul(positive, positive)
    return value if up is None else at.fmul(value, at.fadd(up, shift))


def _multiply_add(emit: Emitter, a: Value, b: Value, c: Value) -> Value:
    """Emit a * b + c with two roundings, so that the result is the same on processors without fused operations."""
    return emit.at.fadd(emit.at.fmul(a, b), c)


def _normal(emit: Emitter, x: Value) -> Value:
    """Emit the distribution function of the normal distribution, with an error of about 1e-7.

    The error function is formula 7.1.26 of Abramowitz & Stegun, Handbook of Mathematical Functions.
    """
    at, count = emit.at, x.type.count
    one, half = emit.all(F32, 1.0, count), emit.all(F32, 0.5, count)
    z = at.fmul(emit.size(x), emit.all(F32, math.sqrt(0.5), count))
    t = at.fdiv(one, _multiply_add(emit, z, emit.all(F32, 0.3275911, count), one))
    value = emit.all(F32, 1.061405429, count)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        value = _multiply_add(emit, value, t, emit.all(F32, coefficient, count))
    tail = at.fmul(half, at.fmul(at.fmul(value, t), emit.exp(at.fneg(at.fmul(z, z)))))  # erfc(z) / 2
    return at.select(at.fcmp_ordered("<", x, emit.all(F32, 0.0, count)), tail, at.fsub(one, tail))
