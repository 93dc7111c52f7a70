"""A thin layer over llvmlite's IR builder: loops, and what is often done with vectors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llvmlite import binding, ir

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
POINTER = I8.as_pointer()

Value = Any  # llvmlite has no types


def vector(kind: Any, count: int) -> Any:
    return ir.VectorType(kind, count)


def new_module() -> ir.Module:
    """An empty one, for this kind of machine."""
    module = ir.Module("moetier")
    module.triple = binding.get_process_triple()
    return module


class Emitter:
    """Emits one function, ``void name(pointer, ..., i64, ...)``."""

    def __init__(self, module: ir.Module, name: str, arguments: Sequence[Any]) -> None:
        self.module = module
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
        self.at = ir.IRBuilder(self.function.append_basic_block("entry"))

    def number(self, value: int) -> Value:
        return ir.Constant(I64, value)

    def all(self, kind: Any, value: float, count: int) -> Value:
        """The vector whose elements are all ``value``."""
        return ir.Constant(vector(kind, count), [value] * count)

    @contextlib.contextmanager
    def loop(self, start: Value, stop: Value, step: int = 1) -> Iterator[Value]:
        """Its body is emitted inside; yields the index, i64."""
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
    def items(self, begun: Value, count: Value) -> Iterator[Value]:
        """Its body is emitted inside; yields an item that no other thread has, until ``count`` are taken. ``begun``
        points to how many are."""
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

    def place(self, pointer: Value, offset: Value, kind: Any) -> Value:
        """A pointer to ``kind``, ``offset`` bytes behind."""
        return self.at.bitcast(self.at.gep(pointer, [offset]), kind.as_pointer())

    def load(self, pointer: Value, offset: Value, kind: Any) -> Value:
        """What lies ``offset`` bytes behind ``pointer``, aligned to a byte."""
        return self.at.load(self.place(pointer, offset, kind), align=1)

    def store(self, value: Value, pointer: Value, offset: Value) -> None:
        self.at.store(value, self.place(pointer, offset, value.type), align=1)

    def prefetch(self, pointer: Value, offset: Value, nbytes: int) -> None:
        """Asks for memory that will be read soon; it need not be there."""
        read, everywhere, data = (ir.Constant(I32, value) for value in (0, 3, 1))
        for line in range(0, nbytes, 64):
            place = self.at.gep(pointer, [self.at.add(offset, self.number(line))])
            self.intrinsic("llvm.prefetch.p0", ir.VoidType(), place, read, everywhere, data)

    def spread(self, value: Value, count: int) -> Value:
        """The vector whose elements are all a scalar."""
        nothing = ir.Constant(vector(value.type, count), ir.Undefined)
        return self.pick(self.at.insert_element(nothing, value, ir.Constant(I32, 0)), nothing, [0] * count)

    def pick(self, first: Value, second: Value, indices: Sequence[int]) -> Value:
        """The elements of two vectors, one behind the other, at ``indices``."""
        return self.at.shuffle_vector(first, second, ir.Constant(vector(I32, len(indices)), list(indices)))

    def widen(self, bf16: Value, count: int) -> Value:
        """bf16 numbers as i16 -> fp32."""
        at = self.at
        bits = at.shl(at.zext(bf16, vector(I32, count)), self.all(I32, 16, count))
        return at.bitcast(bits, vector(F32, count))

    def narrow(self, value: Value, count: int) -> Value:
        """fp32 -> bf16 numbers as i16, rounded to the nearest, ties to even."""
        at, wide = self.at, vector(I32, count)
        bits = at.bitcast(value, wide)
        odd = at.and_(at.lshr(bits, self.all(I32, 16, count)), self.all(I32, 1, count))
        rounded = at.add(at.add(bits, self.all(I32, 0x7FFF, count)), odd)
        rounded = at.select(at.fcmp_unordered("uno", value, value), self.all(I32, 0x7FC00000, count), rounded)
        return at.trunc(at.lshr(rounded, self.all(I32, 16, count)), vector(I16, count))

    def multiply_add(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c of fp32 vectors."""
        return self.intrinsic(f"llvm.fmuladd.v{a.type.count}f32", a.type, a, b, c)

    def reduce(self, value: Value, unite: Callable[[Value, Value], Value]) -> Value:
        """All elements of a vector, a power of two, by halves: so always in the same order."""
        count = value.type.count
        while count > 1:
            count //= 2
            value = unite(self.pick(value, value, range(count)), self.pick(value, value, range(count, 2 * count)))
        return self.at.extract_element(value, ir.Constant(I32, 0))

    def intrinsic(self, name: str, result: Any, *arguments: Value) -> Value:
        """A call of LLVM's ``name``."""
        known = self.module.globals.get(name)
        if known is None:
            known = ir.Function(self.module, ir.FunctionType(result, [a.type for a in arguments]), name)
        return self.at.call(known, arguments)
