"""Keys and values in 8 bits: rows of int8 codes, each with its scale.

A row has the numbers of a head of one token. Its scale is a bf16 number, a 127th of the largest number, in the two
bytes behind the codes. A number is its code times the scale, so the error is at most half the scale.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from llvmlite import ir
from torch import Tensor

from moetier.runtime.kernels.jit.emitter import F32, I8, I32, LANES, Emitter, Value, vector

SCALE_BYTES = 2
MAX_CODE = 127  # largest code


def in_codes(numbers: Tensor) -> Tensor:
    """Quantise rows [heads, tokens, width], with any dimensions before. Returns int8 [heads, tokens, width + 2]."""
    exact = numbers.float()
    scale = (exact.abs().amax(-1, keepdim=True) / MAX_CODE).bfloat16()
    scale = torch.where(scale > 0, scale, 1)  # a row of zeros
    codes = (exact / scale.float()).round().clamp(-MAX_CODE, MAX_CODE).to(torch.int8)
    return torch.cat([codes, scale.contiguous().view(torch.int8)], -1)


def emit_codes(emit: Emitter, numbers: Callable[[Value], Value], target: Value, count: Value, register: Value) -> None:
    """Emit code that quantises ``count`` numbers as ``in_codes`` does, and stores codes and scale at ``target``.

    ``numbers(i)`` emits the LANES fp32 numbers from index i on. ``register`` is the address of scratch memory for LANES
    fp32 numbers.
    """
    at, n = emit.at, emit.number
    at.store(emit.floats(0.0), register)
    with emit.loop(n(0), count, LANES) as i:
        bits = at.and_(at.bitcast(numbers(i), vector(I32, LANES)), emit.all(I32, 0x7FFFFFFF, LANES))
        at.store(emit.larger(at.bitcast(bits, vector(F32, LANES)), at.load(register)), register)
    largest = emit.spread(emit.reduce(at.load(register), emit.larger), LANES)
    scale = emit.widen(emit.narrow(at.fdiv(largest, emit.floats(MAX_CODE)), LANES), LANES)
    scale = at.select(at.fcmp_ordered(">", scale, emit.floats(0.0)), scale, emit.floats(1.0))
    with emit.loop(n(0), count, LANES) as i:
        shifted, _ = emit.nearest(at.fdiv(numbers(i), scale), -MAX_CODE, MAX_CODE)
        codes = at.trunc(at.bitcast(shifted, vector(I32, LANES)), vector(I8, LANES))
        emit.store(codes, target, i)
    emit.store(at.extract_element(emit.narrow(scale, LANES), ir.Constant(I32, 0)), target, count)
