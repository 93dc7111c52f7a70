"""Interpret functions of LLVM IR as threads of ``interleavings``: every access to shared memory is an operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from interleavings import Add, And, Call, Clock, Load, Store, Swap, Thread, Wait, Wake
from llvmlite import ir

from moetier.runtime.kernels.jit.team_code import WAIT

CLOCK, SYSCALL = 1, 2  # addresses of functions of the C library
ALLOCATED = 1 << 40  # from here on addresses are those of the function's own variables
_WORD = 1 << 64


def interpret(function: ir.Function, arguments: Sequence[int], private: dict[int, int]) -> Thread:
    """Run a function, whose pointers are byte addresses. ``private`` has the words that only this thread uses.

    An operation's place is the number of a word, its address / 8.
    """
    values: dict[str, int] = {own.name: value for own, value in zip(function.args, arguments, strict=True)}
    block, index = function.entry_basic_block, 0
    while True:
        one = block.instructions[index]
        index += 1
        operands = [_value(each, values) for each in getattr(one, "operands", ())]
        result = 0
        if isinstance(one, ir.Ret):
            return
        if isinstance(one, ir.instructions.Branch | ir.instructions.ConditionalBranch):
            target = one.operands[0] if len(operands) == 1 else one.operands[1 if operands[0] else 2]
            values = _entered(function, target, block, values)
            block, index = target, len(_phis(target))
            continue
        if isinstance(one, ir.instructions.CallInstr):
            callee, *given = operands
            if callee == CLOCK:
                private[given[1]] = 0
                private[given[1] + 8] = yield Clock()
            elif callee == SYSCALL:
                yield (Wait if given[2] == WAIT else Wake)(given[1] // 8, given[3])
            elif callee:  # not an intrinsic function
                yield Call(callee, given[0])
        elif isinstance(one, ir.instructions.LoadInstr | ir.instructions.LoadAtomicInstr):
            address = operands[0]
            result = private[address] if address in private else (yield Load(address // 8))
        elif isinstance(one, ir.instructions.StoreInstr | ir.instructions.StoreAtomicInstr):
            address = operands[1]
            if address in private or address >= ALLOCATED:
                private[address] = operands[0]
            else:
                yield Store(address // 8, operands[0])
        elif isinstance(one, ir.instructions.AtomicRMW):
            address = operands[0]
            result = yield {"add": Add, "and": And}[one.operation](address // 8, operands[1])
        elif isinstance(one, ir.instructions.CmpXchg):
            address = operands[0]
            result = yield Swap(address // 8, operands[1], operands[2])
        elif isinstance(one, ir.instructions.AllocaInstr):
            result = ALLOCATED + 64 * index
        elif not isinstance(one, ir.instructions.Fence):
            result = _computed(one, operands)
        values[one.name] = result


def _value(operand: Any, values: Mapping[str, int]) -> int:
    if isinstance(operand, ir.Constant):
        return int(operand.constant)
    return values.get(getattr(operand, "name", ""), 0)  # blocks and intrinsic functions have no value


def _computed(one: Any, operands: Sequence[int]) -> int:
    """Return the result of an instruction without access to memory: signed, with 64 bits or 1."""
    a, b, *_ = (*operands, 0, 0)
    match one.opname:
        case "icmp":
            if one.op.startswith("u"):
                a, b = a % _WORD, b % _WORD
            order = one.op.removeprefix("u").removeprefix("s")
            return int({"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}[order])
        case "select":
            return operands[1] if a else operands[2]
        case "bitcast" | "inttoptr" | "ptrtoint" | "zext" | "extractvalue":  # of CmpXchg: whether it has swapped
            return a
        case "getelementptr" | "add":
            result = a + b
        case "sub":
            result = a - b
        case "mul":
            result = a * b
        case "shl":
            result = a << b
        case "lshr":
            result = a % _WORD >> b
        case "and":
            result = a & b
        case "or":
            result = a | b
        case "xor":
            result = a ^ b
        case _:
            raise AssertionError(f"an instruction that is not interpreted: {one}")
    if one.type == ir.IntType(1):
        return result & 1
    return (result + _WORD // 2) % _WORD - _WORD // 2


def _phis(block: ir.Block) -> list[Any]:
    return [one for one in block.instructions if isinstance(one, ir.PhiInstr)]


def _entered(function: ir.Function, block: ir.Block, before: ir.Block, values: dict[str, int]) -> dict[str, int]:
    """Return the values that are used from a block on, which is entered from the block ``before``."""
    chosen = {
        phi.name: _value(next(value for value, origin in phi.incomings if origin is before), values)
        for phi in _phis(block)
    }
    return {name: value for name, value in (values | chosen).items() if name in _used(function)[block.name]}


@cache
def _used(function: ir.Function) -> dict[str, set[str]]:
    """Return for each block the names of the values that are used in it or after it, before they are set again."""
    used: dict[str, set[str]] = {block.name: set() for block in function.blocks}
    changes = True
    while changes:
        changes = False
        for block in function.blocks:
            names: set[str] = set()
            for after in block.terminator.operands:
                if isinstance(after, ir.Block):
                    names |= used[after.name] - {phi.name for phi in _phis(after)}
                    names |= {
                        value.name for phi in _phis(after) for value, _ in phi.incomings if hasattr(value, "name")
                    }
            for one in reversed(block.instructions):
                if not isinstance(one, ir.PhiInstr):
                    names.discard(one.name)
                    names |= {each.name for each in one.operands if hasattr(each, "name")}
            changes |= names != used[block.name]
            used[block.name] = names
    return used
