"""Emit the compiled code that rounds pairs to 8 bits, to the bytes of ``tiers.quant.packing.store_pairs``."""

from __future__ import annotations

import math

from llvmlite import ir

from moetier.runtime.kernels.jit.emitter import F32, I8, I32, LANES, POINTER, Emitter, new_module, once, vector
from moetier.runtime.kernels.jit.processor import Processor
from moetier.runtime.kernels.jit.team import Kernel, compile_kernel
from moetier.tiers.layout import PAIR_RUN

PAIRS = "moetier_pairs"  # name of the compiled function


@once
def pairs_kernel(processor: Processor) -> Kernel:
    """Compile the function ``PAIRS(context)``, which rounds runs of PAIR_RUN numbers to 8 bits until none is left.

    The context: number of runs that threads have taken, number of all runs, number of all numbers; pointers to the
    numbers (the function replaces them by their rounded values), to the first code (only each second byte is a code of
    these numbers), and to the scale and minimum of the first run, bf16.
    """
    emit = Emitter(new_module(), PAIRS, [POINTER])
    at, n, wide = emit.at, emit.number, vector(F32, LANES)
    begun, (runs, count, *addresses) = emit.fields(6)
    numbers, codes, scales = (at.inttoptr(address, POINTER) for address in addresses)
    low, high = (at.alloca(wide) for _ in range(2))

    with emit.items(begun, runs) as run:
        first = at.mul(run, n(PAIR_RUN))
        last = at.add(first, n(PAIR_RUN))
        last = at.select(at.icmp_signed("<", last, count), last, count)  # a multiple of LANES
        at.store(emit.floats(math.inf), low)
        at.store(emit.floats(-math.inf), high)
        with emit.loop(first, last, LANES) as place:
            values = emit.load(numbers, at.mul(place, n(4)), wide)
            at.store(emit.smaller(values, at.load(low)), low)
            at.store(emit.larger(values, at.load(high)), high)
        bottom = emit.spread(emit.reduce(at.load(low), emit.smaller), LANES)
        top = emit.spread(emit.reduce(at.load(high), emit.larger), LANES)
        stored = [emit.narrow(v, LANES) for v in (at.fdiv(at.fsub(top, bottom), emit.floats(255)), bottom)]
        for number, value in enumerate(stored):
            one = at.extract_element(value, ir.Constant(I32, 0))
            emit.store(one, scales, at.add(at.mul(run, n(8)), n(2 * number)))
        scale, minimum = (emit.widen(value, LANES) for value in stored)
        some = at.fcmp_ordered(">", scale, emit.floats(0))
        with emit.loop(first, last, LANES) as place:
            values = emit.load(numbers, at.mul(place, n(4)), wide)
            scaled = at.select(some, at.fdiv(at.fsub(values, minimum), scale), emit.floats(0))
            shifted, code = emit.nearest(scaled, 0, 255)
            read = at.fadd(at.fmul(code, scale), minimum)
            emit.store(emit.widen(emit.narrow(read, LANES), LANES), numbers, at.mul(place, n(4)))
            bytes_ = at.trunc(at.bitcast(shifted, vector(I32, LANES)), vector(I8, LANES))
            for i in range(LANES):
                byte = at.extract_element(bytes_, ir.Constant(I32, i))
                emit.store(byte, codes, at.add(at.mul(place, n(2)), n(2 * i)))
    return compile_kernel(processor, emit.finish(), PAIRS)
