"""Exceptions from outside, at any point where Python would raise one: after a call, a jump back, or a resumption."""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Callable
from itertools import pairwise
from types import CodeType, FrameType
from typing import Any

PACKAGES = ("moetier.tiers.", "moetier.runtime.")
AFTER = {"CALL", "CALL_KW", "CALL_FUNCTION_EX", "RESUME"}


class Cut(Exception):
    """Comes from outside."""


def cut(work: Callable[[], object], number: int) -> Cut | None:
    """Runs ``work``, and cuts it at the point of this number, if it gets there: the exception then."""
    left, raised = number, None

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left, raised
        if event == "call":
            if not frame.f_globals.get("__name__", "").startswith(PACKAGES):
                return None
            frame.f_trace = trace  # before the next line, which Python 3.13 and later otherwise ignore
            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
        elif event == "opcode" and frame.f_lasti in _points(frame.f_code):
            left -= 1
            if left < 0:
                raised = Cut(f"{frame.f_globals['__name__']}:{frame.f_code.co_name}:{frame.f_lineno}")
                raise raised
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except Cut:
        pass
    finally:
        sys.settrace(before)
    return raised


@functools.cache
def _points(code: CodeType) -> frozenset[int]:
    instructions = list(dis.get_instructions(code))
    # A call before SWAP is the value of a return in a ``with``. Python raises at the call, inside the block. At SWAP
    # the exception would come outside of it, and leave the lock of a ``with`` locked.
    offsets = {after.offset for one, after in pairwise(instructions) if one.opname in AFTER and after.opname != "SWAP"}
    return frozenset(offsets | {one.argval for one in instructions if one.opname == "JUMP_BACKWARD"})
