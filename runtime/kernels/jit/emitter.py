"""Emitter of LLVM IR, with which all compiled kernels are written."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import llvmlite.binding as llvm
from llvmlite import ir

# held while LLVM compiles. A fork waits for this lock: a child must not inherit LLVM's state, or llvmlite's own lock,
# in the middle of a change
compile_lock = threading.RLock()
os.register_at_fork(
    before=compile_lock.acquire, after_in_parent=compile_lock.release, after_in_child=compile_lock.release
)

Parameters = ParamSpec("Parameters")
Made = TypeVar("Made")


def once(make: Callable[Parameters, Made]) -> Callable[Parameters, Made]:
    """Cache what ``make`` compiles, by its arguments. A thread that needs what another one compiles waits for it."""
    cached: Any = functools.cache(make)

    @functools.wraps(make)
    def get(*arguments: Parameters.args, **named: Parameters.kwargs) -> Made:
        with compile_lock:
            return cached(*arguments, **named)

    return get


I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
POINTER = I8.as_pointer()
LANES = 16  # fp32 numbers in a vector, as many as a register of AVX-512 has
ROUNDING = 1.5 * 2**23  # x + ROUNDING - ROUNDING is x rounded to an integer, ties to even
_POWERS = [math.log(2) ** k / math.factorial(k) for k in range(7)]  # Taylor coefficients of 2^f, for f in -.5 .. .5

Value = Any  # llvmlite has no types


class Dtype(Protocol):
    """Type of numbers, such as a torch.dtype. Only its size is used."""

    @property
    def itemsize(self) -> int:
        """Size of a number in bytes."""


class FloatType(NamedTuple):
    """Type of the numbers that kernels read and write: fp32 (4 bytes) or bf16 (2 bytes). They compute in fp32."""

    itemsize: int

    @classmethod
    def of(cls, dtype: Dtype) -> FloatType:
        """Return the type for torch.float32 or torch.bfloat16."""
        return cls(dtype.itemsize)


FP32, BF16 = FloatType(4), FloatType(2)


def vector(type_: Any, count: int) -> Any:
    """Return the type of a vector of ``count`` elements of type ``type_``."""
    return ir.VectorType(type_, count)


def new_module() -> ir.Module:
    """Return an empty module for this machine's architecture."""
    module = ir.Module("moetier")
    with compile_lock:
        module.triple = llvm.get_process_triple()
    return module


class WhileLoop(NamedTuple):
    """Statements for the body of a loop of ``Emitter.while_``. No code may follow them in their block."""

    continue_: Callable[[], object]
    break_: Callable[[], object]


class Emitter:
    """Emitter of one function, ``void name(pointer, ..., i64, ...)``: loops, and frequent operations on vectors.

    ``at`` is llvmlite's builder, whose ``if_then`` and ``if_else`` emit branches. Values stand for results of LLVM
    instructions. They are known when the function runs, not when it is emitted.
    """

    def __init__(self, module: ir.Module, name: str, arguments: Sequence[Any]) -> None:
        self.module = module
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
        self.at = ir.IRBuilder(self.function.append_basic_block("entry"))

    def finish(self) -> ir.Module:
        """Emit the end of the function, and return its module."""
        self.at.ret_void()
        return self.module

    def number(self, value: int) -> Value:
        """Return a constant of type i64."""
        return ir.Constant(I64, value)

    def all(self, type_: Any, value: float, count: int) -> Value:
        """Return a constant vector of ``count`` elements of type ``type_``, which all are ``value``."""
        return ir.Constant(vector(type_, count), [value] * count)

    def floats(self, value: float) -> Value:
        """Return a constant vector of LANES fp32 numbers, which all are ``value``."""
        return self.all(F32, float(value), LANES)

    def memory(self, nbytes: int) -> Value:
        """Allocate ``nbytes`` bytes on the function's stack, aligned to 64 bytes, and return a pointer to them."""
        with self.at.goto_entry_block():
            place = self.at.alloca(ir.ArrayType(I8, nbytes))
        place.align = 64
        return self.at.bitcast(place, POINTER)

    def fields(self, count: int) -> tuple[Value, list[Value]]:
        """Return a pointer to the first of ``count`` i64 fields in the function's context, and the others' values.

        The function changes the first field while it runs, such as the number of items taken (see ``items``).
        """
        (context,) = self.function.args
        places = [self.pointer_at(context, self.number(8 * i), I64) for i in range(count)]
        return places[0], [self.at.load(place) for place in places[1:]]

    def padded(self, count: Value) -> Value:
        """Emit ``count``, an i64, rounded up to a multiple of LANES."""
        return self.at.and_(self.at.add(count, self.number(LANES - 1)), self.number(-LANES))

    @contextlib.contextmanager
    def loop(self, start: Value, stop: Value, step: int = 1) -> Iterator[Value]:
        """Emit a loop over indices from ``start`` to before ``stop``.

        Yields the index, i64; emit the body inside the context.
        """
        at, before = self.at, self.at.block
        head, body, end = (self.function.append_basic_block(name) for name in ("head", "body", "end"))
        at.branch(head)
        at.position_at_end(head)
        index = at.phi(I64)
        index.add_incoming(start, before)
        at.cbranch(at.icmp_signed("<", index, stop), body, end)
        at.position_at_end(body)
        yield index
        index.add_incoming(at.add(index, self.number(step)), at.block)
        at.branch(head)
        at.position_at_end(end)

    @contextlib.contextmanager
    def while_(self, condition: Callable[[], Value] | None = None) -> Iterator[WhileLoop]:
        """Emit a loop that is repeated while a condition holds; without one, until the body leaves it.

        ``condition`` emits the condition, an i1. Yields the loop; emit the body inside the context.
        """
        at = self.at
        head, body, end = (self.function.append_basic_block(name) for name in ("while", "body", "end"))
        at.branch(head)
        at.position_at_end(head)
        at.branch(body) if condition is None else at.cbranch(condition(), body, end)
        at.position_at_end(body)
        yield WhileLoop(functools.partial(at.branch, head), functools.partial(at.branch, end))
        if not at.block.is_terminated:
            at.branch(head)
        at.position_at_end(end)

    def return_if(self, condition: Value) -> None:
        """Emit the end of the function for the case that ``condition``, an i1, holds."""
        with self.at.if_then(condition):
            self.at.ret_void()

    @contextlib.contextmanager
    def items(self, begun: Value, count: Value) -> Iterator[Value]:
        """Emit a loop over items that no other thread has taken, until ``count`` are taken. Yields the item's index.

        ``begun`` points to the number of items that are taken. Emit the body inside the context.
        """
        at = self.at
        next_, work, done = (self.function.append_basic_block(name) for name in ("next", "work", "done"))
        at.branch(next_)
        at.position_at_end(next_)
        item = at.atomic_rmw("add", begun, self.number(1), "monotonic")
        at.cbranch(at.icmp_signed("<", item, count), work, done)
        at.position_at_end(work)
        yield item
        at.branch(next_)
        at.position_at_end(done)

    def pointer_at(self, pointer: Value, offset: Value, type_: Any) -> Value:
        """Emit the address ``pointer`` + ``offset`` bytes, as a pointer to ``type_``."""
        return self.at.bitcast(self.at.gep(pointer, [offset]), type_.as_pointer())

    def load(self, pointer: Value, offset: Value, type_: Any) -> Value:
        """Emit a load of ``type_`` from ``pointer`` + ``offset`` bytes. The address need not be aligned."""
        return self.at.load(self.pointer_at(pointer, offset, type_), align=1)

    def store(self, value: Value, pointer: Value, offset: Value) -> None:
        """Emit a store of ``value`` at ``pointer`` + ``offset`` bytes. The address need not be aligned."""
        self.at.store(value, self.pointer_at(pointer, offset, value.type), align=1)

    def prefetch(self, pointer: Value, offset: Value, nbytes: int, *, near: bool = True) -> None:
        """Emit prefetches of ``nbytes`` bytes from ``pointer`` + ``offset`` bytes on. The memory need not be mapped.

        The bytes are fetched to all caches; if not ``near``, to all but the first level.
        """
        read, caches, data = (ir.Constant(I32, value) for value in (0, 3 if near else 2, 1))
        for line in range(0, nbytes, 64):
            place = self.at.gep(pointer, [self.at.add(offset, self.number(line))])
            self.intrinsic("llvm.prefetch.p0", ir.VoidType(), place, read, caches, data)

    def spread(self, value: Value, count: int) -> Value:
        """Emit a vector of ``count`` elements, which all are the scalar ``value``."""
        nothing = ir.Constant(vector(value.type, count), ir.Undefined)
        return self.pick(self.at.insert_element(nothing, value, ir.Constant(I32, 0)), nothing, [0] * count)

    def pick(self, first: Value, second: Value, indices: Sequence[int]) -> Value:
        """Emit a vector of the elements at ``indices``, which count the elements of ``first``, then of ``second``."""
        return self.at.shuffle_vector(first, second, ir.Constant(vector(I32, len(indices)), list(indices)))

    def concatenate(self, parts: Sequence[Value]) -> Value:
        """Emit a vector of the elements of several vectors; their number must be a power of two."""
        parts = list(parts)
        while len(parts) > 1:
            count = 2 * parts[0].type.count
            parts = [self.pick(one, other, range(count)) for one, other in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    def widen(self, bf16: Value, count: int) -> Value:
        """Emit the conversion of ``count`` bf16 numbers, given as i16, to fp32."""
        at = self.at
        bits = at.shl(at.zext(bf16, vector(I32, count)), self.all(I32, 16, count))
        return at.bitcast(bits, vector(F32, count))

    def widen_half(self, half: Value, count: int) -> Value:
        """Emit the conversion of ``count`` fp16 numbers, given as i16, to fp32.

        LLVM's own conversion calls a library function on processors that have no instruction for it.
        """
        at, wide = self.at, vector(I32, count)
        bits = at.zext(half, wide)
        size = at.and_(bits, self.all(I32, 0x7FFF, count))
        normal = at.bitcast(
            at.add(at.shl(size, self.all(I32, 13, count)), self.all(I32, 112 << 23, count)), vector(F32, count)
        )
        denormal = at.fmul(at.sitofp(size, vector(F32, count)), self.all(F32, 2.0**-24, count))
        is_denormal = at.icmp_signed("<", size, self.all(I32, 0x400, count))
        sign = at.shl(at.xor(bits, size), self.all(I32, 16, count))
        is_finite = at.icmp_signed("<", size, self.all(I32, 0x7C00, count))
        more = at.select(is_finite, self.all(I32, 0, count), self.all(I32, 0xFF << 23, count))
        bits = at.or_(at.bitcast(at.select(is_denormal, denormal, normal), wide), at.or_(sign, more))
        return at.bitcast(bits, vector(F32, count))

    def narrow(self, value: Value, count: int) -> Value:
        """Emit the conversion of ``count`` fp32 numbers to bf16, given as i16, rounded to the nearest, ties to even."""
        at, wide = self.at, vector(I32, count)
        bits = at.bitcast(value, wide)
        odd = at.and_(at.lshr(bits, self.all(I32, 16, count)), self.all(I32, 1, count))
        rounded = at.add(at.add(bits, self.all(I32, 0x7FFF, count)), odd)
        rounded = at.select(at.fcmp_unordered("uno", value, value), self.all(I32, 0x7FC00000, count), rounded)
        return at.trunc(at.lshr(rounded, self.all(I32, 16, count)), vector(I16, count))

    def smaller(self, a: Value, b: Value) -> Value:
        """Emit the smaller of ``a`` and ``b`` for each element; ``b`` where either is NaN."""
        return self.at.select(self.at.fcmp_ordered("<", a, b), a, b)

    def larger(self, a: Value, b: Value) -> Value:
        """Emit the larger of ``a`` and ``b`` for each element; ``b`` where either is NaN."""
        return self.at.select(self.at.fcmp_ordered(">", a, b), a, b)

    def nearest(self, values: Value, low: int, high: int) -> tuple[Value, Value]:
        """Emit the integers from ``low`` to ``high`` that are nearest to LANES values, ties to even.

        Return fp32 numbers whose lowest bits are these integers, and the integers as fp32 numbers.
        """
        clamped = self.smaller(self.larger(values, self.floats(low)), self.floats(high))
        shifted = self.at.fadd(clamped, self.floats(ROUNDING))
        return shifted, self.at.fsub(shifted, self.floats(ROUNDING))

    def multiply_add(self, a: Value, b: Value, c: Value) -> Value:
        """Emit a * b + c of fp32 vectors."""
        return self.intrinsic(f"llvm.fmuladd.v{a.type.count}f32", a.type, a, b, c)

    def reduce(self, value: Value, unite: Callable[[Value, Value], Value]) -> Value:
        """Emit the reduction of a vector to one number, by applying ``unite`` to its halves again and again.

        So the order of operations is always the same. The number of elements must be a power of two.
        """
        count = value.type.count
        while count > 1:
            count //= 2
            value = unite(self.pick(value, value, range(count)), self.pick(value, value, range(count, 2 * count)))
        return self.at.extract_element(value, ir.Constant(I32, 0))

    def intrinsic(self, name: str, result: Any, *arguments: Value) -> Value:
        """Emit a call of LLVM's intrinsic function ``name``."""
        function = self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(result, [a.type for a in arguments]), name)
        return self.at.call(function, arguments)

    def load_floats(self, pointer: Value, offset: Value, dtype: Dtype, count: int) -> Value:
        """Emit a load of ``count`` numbers of ``dtype`` from ``pointer`` + ``offset`` bytes, as an fp32 vector."""
        if dtype.itemsize == FP32.itemsize:
            return self.load(pointer, offset, vector(F32, count))
        return self.widen(self.load(pointer, offset, vector(I16, count)), count)

    def store_floats(self, value: Value, pointer: Value, offset: Value, dtype: Dtype) -> None:
        """Emit a store of an fp32 vector as numbers of ``dtype``, at ``pointer`` + ``offset`` bytes."""
        self.store(value if dtype.itemsize == FP32.itemsize else self.narrow(value, value.type.count), pointer, offset)

    def exp(self, x: Value) -> Value:
        """Emit e^x of an fp32 vector for x <= 0, with a relative error of up to (2 - x) * 1e-7. Below -87 it is 0.

        The bits are the same on every processor, as no operations are fused.
        """
        at, count = self.at, x.type.count
        lowest = self.all(F32, -87.0, count)
        is_nothing = at.fcmp_ordered("<", x, lowest)
        powers = at.fmul(at.select(is_nothing, lowest, x), self.all(F32, 1 / math.log(2), count))
        shift = self.all(F32, ROUNDING, count)
        whole = at.fsub(at.fadd(powers, shift), shift)
        rest = at.fsub(powers, whole)
        value = self.all(F32, _POWERS[-1], count)
        for power in reversed(_POWERS[:-1]):
            value = at.fadd(at.fmul(value, rest), self.all(F32, power, count))
        finite = at.select(at.fcmp_ordered("ord", whole, whole), whole, self.all(F32, 0.0, count))
        exponent = at.add(at.fptosi(finite, vector(I32, count)), self.all(I32, 127, count))
        scaled = at.fmul(value, at.bitcast(at.shl(exponent, self.all(I32, 23, count)), vector(F32, count)))
        return at.select(is_nothing, self.all(F32, 0.0, count), scaled)

    def exp2(self, x: Value) -> Value:
        """Emit 2^x of an fp32 vector for x <= 0, with a relative error of about 2e-7. Below -125 it is 0."""
        at, count = self.at, x.type.count
        lowest, shift = self.all(F32, -125.0, count), self.all(F32, ROUNDING + 127, count)
        clamped = self.larger(lowest, x)  # NaN stays
        shifted = at.fadd(clamped, shift)  # its lowest bits are the exponent
        rest = at.fsub(clamped, at.fsub(shifted, shift))
        value = self.all(F32, _POWERS[-1], count)
        for power in reversed(_POWERS[:-1]):
            value = self.multiply_add(value, rest, self.all(F32, power, count))
        exponent = at.shl(at.bitcast(shifted, vector(I32, count)), self.all(I32, 23, count))
        scaled = at.fmul(value, at.bitcast(exponent, vector(F32, count)))
        return at.select(at.fcmp_ordered("<", x, lowest), self.all(F32, 0.0, count), scaled)

    def size(self, x: Value) -> Value:
        """Emit |x| of an fp32 vector."""
        return self.intrinsic(f"llvm.fabs.v{x.type.count}f32", x.type, x)

    def times_sigmoid(self, x: Value, u: Value) -> Value:
        """Emit x / (1 + e^-u), without an exponential that overflows."""
        at, count = self.at, x.type.count
        small = self.exp(at.fneg(self.size(u)))  # e^-|u|
        part = at.fdiv(x, at.fadd(self.all(F32, 1.0, count), small))
        return at.select(at.fcmp_ordered("<", u, self.all(F32, 0.0, count)), at.fmul(part, small), part)
