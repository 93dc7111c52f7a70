"""The product of one row with a matrix that is not quantised, y = W @ x.

Sums are fp32, and each number of y depends only on its row of W and on x (``dots.py``).
"""

from __future__ import annotations

from array import array

import torch
from llvmlite import ir
from torch import Tensor

from moetier.runtime.kernels.jit.emitter import I32, LANES, POINTER, once
from moetier.runtime.kernels.jit.processor import Processor, refusal, this_processor
from moetier.runtime.kernels.jit.team import Kernel, KernelTask, compile_kernel, is_small, threads_for

from .api import FLOATS, has_memory, is_readable
from .dots import ROWS, DotEmitter, pairs_of

GEMV = "moetier_gemv"  # name of the compiled function
# number of i64 fields in the context. In order: items that threads have taken, all items; pointer to x; rows N and
# columns K of W; pointers to W and y
CONTEXT = 7
X, W, Y = 2, 5, 6  # indices of the addresses in a context


def lies_in_rows(weight: Tensor) -> bool:
    """Return whether ``weight`` is in memory as the compiled code reads it: [rows, columns], row after row."""
    return weight.dim() == 2 and weight.shape[1] % LANES == 0 and has_memory(weight) and weight.is_contiguous()


def gemv_task(weight: Tensor, given: torch.dtype, output: torch.dtype | None = None) -> KernelTask:
    """Return a task that multiplies ``weight`` [rows, columns] with a row of type ``given``.

    The caller sets three addresses in its context, at the indices X, W and Y: those of x [columns], of the weight, and
    of y [rows], which is of type ``output``, or of the weight's type if that is None.
    """
    rows, columns = weight.shape
    items = -(-rows // ROWS)
    context = array("q", (0, items, 0, rows, columns, 0, 0))
    pairs = pairs_of(this_processor(), given, weight.dtype, columns)
    kernel = gemv_kernel(this_processor(), given, weight.dtype, output or weight.dtype, pairs)
    return KernelTask(kernel, context, min(items, threads_for(rows * columns)))


class Scores:
    """An fp32 matrix [N, K] on a CPU that is multiplied with one row at a time, to score experts for a prediction."""

    def __init__(self, weight: Tensor) -> None:
        assert self.can_multiply(weight)
        self._weight = weight
        self._outputs = array("f", bytes(4 * len(weight)))

    @staticmethod
    def can_multiply(weight: Tensor) -> bool:
        """Return whether this machine's kernel can multiply with ``weight`` [rows, columns] as it is in memory."""
        return weight.dtype == torch.float32 and lies_in_rows(weight) and not refusal()

    def compute(self, x: Tensor) -> list[float] | None:
        """Return ``weight @ x`` for one row x [1, columns] of bf16 or fp32; None for other inputs.

        x may have other leading dimensions. Not thread-safe: threads that call this at once may get one another's
        results.
        """
        weight = self._weight
        if not is_readable(x) or x.dtype not in FLOATS or x.numel() != weight.shape[1]:
            return None
        kernel, context, threads, _ = gemv_task(weight, x.dtype)
        context[X], context[W], context[Y] = x.data_ptr(), weight.data_ptr(), self._outputs.buffer_info()[0]
        kernel.run(context, threads, locked=is_small(weight.numel()))
        return self._outputs.tolist()


@once
def gemv_kernel(
    processor: Processor, given: torch.dtype, kept: torch.dtype, output: torch.dtype, pairs: bool
) -> Kernel:
    """Compile ``gemv_module``, once for these types and each processor."""
    return compile_kernel(processor, gemv_module(processor, given, kept, output, pairs), GEMV)


def gemv_module(
    processor: Processor, given: torch.dtype, kept: torch.dtype, output: torch.dtype, pairs: bool
) -> ir.Module:
    """Emit the function ``GEMV(context)``, which computes items, of ROWS rows of W each, until none is left.

    x [K] is of type ``given``, W [N, K] of type ``kept``, and y [N] of type ``output``; K is a multiple of LANES, and
    of 2 * LANES if words are ``pairs``.
    """
    emit = DotEmitter(GEMV, processor, given, kept, output, pairs=pairs)
    at, n = emit.at, emit.number
    begun, (items, x, rows, columns, matrix, y) = emit.fields(CONTEXT)
    x, matrix, y = (at.inttoptr(address, POINTER) for address in (x, matrix, y))
    row_bytes, last = at.mul(columns, n(kept.itemsize)), at.sub(rows, n(1))
    with emit.items(begun, items) as item:
        following = [at.add(at.mul(item, n(ROWS)), n(i)) for i in range(ROWS)]
        # if fewer than ROWS rows are left for the last item, it computes the last row again
        chosen = [at.select(at.icmp_signed("<", row, last), row, last) for row in following]
        sources = [at.gep(matrix, [at.mul(row, row_bytes)]) for row in chosen]
        (sums,) = emit.dots(sources, [x], emit.words(columns))
        totals = emit.totals(sums)
        for i, row in enumerate(chosen):
            emit.store(at.extract_element(totals, ir.Constant(I32, i)), y, at.mul(row, n(output.itemsize)))
    return emit.finish()
