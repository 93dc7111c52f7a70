"""Compute experts of a block on a CPU, given by the addresses of their records. torch is not needed.

Values between the products are fp32. The result of the activation is rounded to 8 bits, as every input of a product is
(``gemm.py``). Each row of an expert's output is rounded to the type of x. So a row of an output depends only on that
row of x and on the record: not on other rows, on the number of threads, or on the machine.
"""

from __future__ import annotations

import copy
import itertools
from array import array
from collections.abc import Callable
from typing import Any

from llvmlite import ir

from moetier.runtime.kernels.jit.emitter import FP32, LANES, Dtype, FloatType, once
from moetier.runtime.kernels.jit.processor import Processor, this_processor
from moetier.runtime.kernels.jit.team import Kernel, KernelTask, Memory, compile_kernel, run_all, threads_for
from moetier.runtime.kernels.jit.team_code import LINE
from moetier.runtime.kernels.products.gemm import JOB, ProjectionProduct, Rounded, multiplies
from moetier.runtime.kernels.products.rounding import X
from moetier.tiers.layout import RecordLayout

from .expert_code import (
    ACTIVATE,
    PLACE,
    ActivateContext,
    Activation,
    PlaceContext,
    activation_module,
    placing_module,
)

BATCH_OUTPUTS = 256  # most outputs that callers compute together, which limits memory for intermediate values
PIECE = 16  # most rows of an expert that a thread takes at a time between and after the products


class ExpertProducts:
    """Compiled functions for experts of one layout, with hidden states of one type. Thread-safe."""

    @staticmethod
    def can_compile(layout: RecordLayout, activation: Activation) -> bool:
        """Return whether compiled code can compute experts of a layout with an activation."""
        projections = {p.name: p for p in layout.projections}
        up, down = projections.get(_first(activation)), projections.get("down_proj")
        if up is None or down is None or len(projections) > 2 or not (multiplies(up) and multiplies(down)):
            return False
        if activation.interleaved and not activation.gated:
            return False
        biases = {(bias.name, bias.size, bias.dtype) for bias in layout.biases}
        return (
            up.rows == down.columns * (2 if activation.gated else 1)
            and down.rows == up.columns
            and down.rows % LANES == 0
            and (not biases or biases == {(f"{p.name}_bias", p.rows, "bfloat16") for p in (up, down)})
        )

    def __init__(
        self, layout: RecordLayout, activation: Activation, dtype: Dtype, processor: Processor | None = None
    ) -> None:
        """``dtype`` is the type of hidden states, as ``FloatType.of`` takes it. ``can_compile`` must be true."""
        assert self.can_compile(layout, activation)
        self.activation, self._activation_numbers = activation, activation.numbers
        self.floats = FloatType.of(dtype)
        self._processor = processor or this_processor()
        first = _first(activation)
        self._up = ProjectionProduct(layout, first, dtype, FP32, self._processor)
        self._down = ProjectionProduct(layout, "down_proj", FP32, FP32, self._processor)
        biases = {bias.name: layout.section(bias.name).offset for bias in layout.biases}
        self._biases = [biases.get(f"{name}_bias", 0) for name in (first, "down_proj")]
        has_bias = bool(biases)
        rounding = self._down.rounding
        self._activate = compiled(self._processor, activation_module, ACTIVATE, activation.variant, rounding, has_bias)
        self._place = compiled(self._processor, placing_module, PLACE, self.floats, has_bias)
        self.width = self._up.columns  # of hidden states
        self.row_bytes = self.width * self.floats.itemsize

    def with_activation(self, activation: Activation) -> ExpertProducts:
        """Return the same compiled code for an activation of the same variant."""
        assert activation.variant == self.activation.variant
        other = copy.copy(self)
        other.activation, other._activation_numbers = activation, activation.numbers
        return other

    def compute_at(self, x: int, own: int, jobs: array[int], places: array[int], outputs: int, memory: Memory) -> None:
        """Compute experts for rows of x, and write each resulting row to a row of the outputs.

        Args:
            x: address of [own, hidden]: the rows of the first expert, then those of the second, and so on; or of
                [1, hidden], one row that goes through every expert.
            own: number of rows of x: R, the number of ``places``, or 1.
            jobs: for each expert the address of its record, its first row and its number of rows.
            places: [R], for each row its row in the outputs.
            outputs: address of rows of hidden numbers in the type of x.
            memory: scratch memory, which no other thread uses meanwhile.
        """
        starts = self.scratch_starts(own, len(places))
        tasks = self.tasks(own, jobs, places, memory.take(starts[-1]), starts, outputs)
        tasks[0].context[X] = x
        run_all(tasks)

    def scratch_starts(self, own: int, rows: int, *, has_outputs: bool = True) -> list[int]:
        """Return where in scratch memory values begin for ``own`` rows of x and ``rows`` rows after them; and the end.

        The values: x rounded, the first product, the activation rounded, the second product, and unless ``has_outputs``
        the outputs.
        """
        up, down = self._up, self._down
        sizes = (
            own * up.row_bytes,
            4 * rows * up.rows,
            rows * down.row_bytes,
            4 * rows * down.rows,
            0 if has_outputs else rows * down.rows * self.floats.itemsize,
        )
        return [*itertools.accumulate((-(-nbytes // LINE) * LINE for nbytes in sizes), initial=0)]

    def tasks(
        self, own: int, jobs: array[int], places: array[int], scratch: int, starts: list[int], outputs: int
    ) -> list[KernelTask]:
        """Return the tasks of ``compute_at``, in order: round x, multiply, activate, multiply, and place the outputs.

        The address of x [own, hidden] is not in the first context yet: ``compute_at`` sets it.

        Args:
            own: as in ``compute_at``, like ``jobs``, ``places`` and ``outputs``.
            jobs: may be filled later if each expert has one row.
            places: [R].
            scratch: address of the memory for intermediate results.
            starts: where its parts begin, in bytes, from ``scratch_starts``.
            outputs: address.
        """
        up, down, rows, count = self._up, self._down, len(places), len(jobs) // JOB
        taken, inner, activated, part = (scratch + start for start in starts[:4])
        given, rounded = Rounded(taken, own, up), Rounded(activated, rows, down)
        pieces = jobs if count == rows else _pieces(jobs)  # ``jobs`` may not be filled yet if each has one row
        items, address = len(pieces) // JOB, pieces.buffer_info()[0]
        numbers, scales, sums = rounded.places
        alpha, limit, shift = self._activation_numbers
        activation = ActivateContext(
            items=items,
            jobs=address,
            product=inner,
            rounded=numbers,
            scales=scales,
            sums=sums,
            columns=down.columns,
            bias=self._biases[0],
            alpha=alpha,
            limit=limit,
            shift=shift,
        )
        placing = PlaceContext(
            items=items,
            jobs=address,
            product=part,
            places=places.buffer_info()[0],
            outputs=outputs,
            columns=down.rows,
            bias=self._biases[1],
        )
        weights = rows * up.columns * up.rows
        return [
            KernelTask(up.round, given.context(0), threads_for(own * up.columns)),
            KernelTask(
                up.kernel, up.context(count, jobs, given, inner, has_own_rows=own == rows), threads_for(weights)
            ),
            KernelTask(self._activate, array("q", activation), min(items, threads_for(rows * up.rows))),
            KernelTask(
                down.kernel,
                down.context(count, jobs, rounded, part, has_own_rows=True),
                threads_for(rows * down.columns * down.rows),
            ),
            KernelTask(
                self._place, array("q", placing), min(items, threads_for(rows * down.rows)), (jobs, pieces, places)
            ),
        ]


def _first(activation: Activation) -> str:
    """Return the name of the projection before the activation."""
    return "gate_up_proj" if activation.gated else "up_proj"


def _pieces(jobs: array[int]) -> array[int]:
    """Cut jobs into jobs of at most PIECE rows."""
    pieces = array("q")
    for i in range(0, len(jobs), JOB):
        record, first, rows = jobs[i : i + JOB]
        for skip in range(0, rows, PIECE):
            pieces.extend((record, first + skip, min(PIECE, rows - skip)))
    return pieces


@once
def compiled(processor: Processor, emit: Callable[..., ir.Module], name: str, *arguments: Any) -> Kernel:
    """Compile the function ``name`` of the module that ``emit`` returns for ``arguments``, once for each of them."""
    return compile_kernel(processor, emit(*arguments), name)
