"""Compute experts of a block on a CPU in one call: both products, the activation, the biases and the weighted sum.

Values between the products are fp32. The result of the activation is rounded to 8 bits, as every input of a product is
(``gemm.py``). Each row of an expert's output is rounded to the type of x. A token's outputs are multiplied by their
weights and added up in fp32, in the order of its top-k. So a token's result depends only on that token and its routing:
not on other tokens, on the order in which experts arrive, or on the number of threads.
"""

from __future__ import annotations

import functools
import itertools
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from moetier.tiers.layout import RecordLayout
from moetier.tiers.source import Residents

from .emitter import FLOATS, LANES
from .expert_code import (
    ACTIVATE,
    ADD_UP,
    FIND,
    PLACE,
    PROVE,
    Activation,
    activation_module,
    adding_module,
    find_module,
    placing_module,
    prove_module,
)
from .gemm import JOB, GemmPlan, Rounded
from .jit import Processor, this_processor
from .team import Kernel, Scratch, Step, compile_kernel, run_all, threads_for
from .team_code import LINE

_scratch = Scratch()


class ExpertKernels:
    """Compiled functions for experts of one layout, with hidden states of one type. Thread-safe."""

    @staticmethod
    def fit(layout: RecordLayout, activation: Activation) -> bool:
        """Return whether compiled code can compute experts of a layout with an activation."""
        projections = {p.name: p for p in layout.projections}
        up, down = projections.get(_first(activation)), projections.get("down_proj")
        if up is None or down is None or len(projections) > 2 or 16 in (up.bits, down.bits):
            return False
        biases = {(bias.name, bias.size, bias.dtype) for bias in layout.biases}
        return (
            up.rows == down.columns * (2 if activation.gated else 1)
            and down.rows == up.columns
            and down.rows % LANES == 0
            and (not biases or biases == {(f"{p.name}_bias", p.rows, "bfloat16") for p in (up, down)})
        )

    def __init__(
        self,
        layout: RecordLayout,
        activation: Activation,
        dtype: torch.dtype,
        experts: int,
        processor: Processor | None = None,
    ) -> None:
        """``dtype`` is the type of hidden states, bfloat16 or float32; ``experts`` is the block's number of experts."""
        assert self.fit(layout, activation)
        assert dtype in FLOATS
        processor = processor or this_processor()
        self.dtype = dtype
        self.experts = experts
        first = _first(activation)
        self._up = GemmPlan(layout, first, dtype, torch.float32, processor)
        self._down = GemmPlan(layout, "down_proj", torch.float32, torch.float32, processor)
        biases = {bias.name: layout.section(bias.name).offset for bias in layout.biases}
        self._biases = [biases.get(f"{name}_bias", 0) for name in (first, "down_proj")]
        has_bias = bool(biases)
        self._activate = _compiled(processor, activation_module, ACTIVATE, activation, self._down.group, has_bias)
        self._place = _compiled(processor, placing_module, PLACE, dtype, has_bias)
        self._add_up = _compiled(processor, adding_module, ADD_UP, dtype)
        self._find = _compiled(processor, find_module, FIND)
        self._prove = _compiled(processor, prove_module, PROVE)

    @property
    def width(self) -> int:
        """Number of columns of hidden states."""
        return self._up.columns

    # -- experts as they arrive ---------------------------------------------------------------------------------------

    def compute(self, x: Tensor, jobs: array[int], places: array[int], outputs: Tensor) -> None:
        """Compute experts for rows of x, and write each resulting row to a row of ``outputs``.

        Args:
            x: [R, hidden]: the rows of the first expert, then those of the second, and so on; or [1, hidden], one row
                that goes through every expert.
            jobs: for each expert the address of its record, its first row and its number of rows.
            places: [R], for each row its row in ``outputs``.
            outputs: [tokens * top_k, hidden], in the type of x.
        """
        run_all(self._steps(x, jobs, len(jobs) // JOB, places, outputs.data_ptr())[0])

    def add_up(self, outputs: Tensor, weights: Tensor) -> Tensor:
        """Multiply outputs [tokens * top_k, hidden] by weights, fp32 [tokens, top_k], and add up those of each token.

        Returns [tokens, hidden] in the type of the outputs.
        """
        out = torch.empty((len(weights), outputs.shape[1]), dtype=self.dtype)
        run_all([Step(self._add_up, self._adding(outputs.data_ptr(), weights, out), threads_for(outputs.numel()))])
        return out

    # -- one token whose experts are all resident ---------------------------------------------------------------------

    def find(self, experts: Sequence[int], residents: Residents) -> array[int] | None:
        """Look up the experts of one token.

        Returns the jobs of all experts (see ``compute``), then their slots, then the slots' generations; None if one of
        the records is not resident.
        """
        top_k, wanted = len(experts), array("q", experts)
        found = array("q", bytes(8 * top_k * (JOB + 2)))
        places = _places_in(found, top_k)
        context = array("q", (0, top_k, wanted.buffer_info()[0], *residents.numbers, *places))
        self._find.call_locked(context.buffer_info()[0])
        return found if context[0] == top_k else None

    def compute_found(self, x: Tensor, weights: Tensor, found: array[int], residents: Residents) -> Tensor | None:
        """Compute one token, x [1, hidden] with weights fp32 [1, top_k], with the records that ``find`` has found.

        Returns [1, hidden], or None if one of the records was replaced meanwhile.
        """
        top_k = weights.shape[1]
        steps, outputs = self._steps(x, found, top_k, array("q", range(top_k)), 0)
        out = torch.empty_like(x)
        _, slots, generations = _places_in(found, top_k)
        proof = array("q", (0, top_k, residents.generations, slots, generations))
        run_all([*steps, Step(self._add_up, self._adding(outputs, weights, out), 1), Step(self._prove, proof, 1)])
        return out if proof[0] == top_k else None

    # -- contexts -----------------------------------------------------------------------------------------------------

    def _steps(
        self, x: Tensor, jobs: array[int], count: int, places: array[int], outputs: int
    ) -> tuple[list[Step], int]:
        """Prepare the steps of ``compute`` for the first ``count`` of ``jobs``.

        Returns the steps and the address of the outputs. If ``outputs`` is 0, they are in scratch memory.
        """
        up, down, own, rows = self._up, self._down, len(x), len(places)
        sizes = (  # bytes of x rounded, the first product, the activation rounded, the second product, the outputs
            own * up.row_bytes,
            4 * rows * up.rows,
            rows * down.row_bytes,
            4 * rows * down.rows,
            0 if outputs else rows * down.rows * self.dtype.itemsize,
        )
        starts = [*itertools.accumulate((-(-nbytes // LINE) * LINE for nbytes in sizes), initial=0)]
        first = _scratch.take(starts[-1])
        taken, inner, activated, part, last = (first + start for start in starts[:-1])
        given, rounded = Rounded(taken, own, up), Rounded(activated, rows, down)
        outputs = outputs or last
        activation = array(
            "q", (0, count, jobs.buffer_info()[0], inner, *rounded.places, down.columns, self._biases[0])
        )
        placing = array(
            "q", (0, count, jobs.buffer_info()[0], part, places.buffer_info()[0], outputs, down.rows, self._biases[1])
        )
        weights = rows * up.columns * up.rows
        return [
            Step(up.round, given.context(x.data_ptr()), threads_for(own * up.columns)),
            Step(up.kernel, up.context(count, jobs, given, inner, has_own_rows=own == rows), threads_for(weights)),
            Step(self._activate, activation, min(count, threads_for(rows * up.rows))),
            Step(
                down.kernel,
                down.context(count, jobs, rounded, part, has_own_rows=True),
                threads_for(rows * down.columns * down.rows),
            ),
            Step(self._place, placing, min(count, threads_for(rows * down.rows)), (jobs, places)),
        ], outputs

    def _adding(self, outputs: int, weights: Tensor, out: Tensor) -> array[int]:
        tokens, top_k = weights.shape
        return array("q", (0, tokens, outputs, weights.data_ptr(), top_k, out.data_ptr(), self._down.rows))


def _first(activation: Activation) -> str:
    """Return the name of the projection before the activation."""
    return "gate_up_proj" if activation.gated else "up_proj"


def _places_in(found: array[int], top_k: int) -> tuple[int, int, int]:
    """Return the addresses of the jobs, slots and generations that ``ExpertKernels.find`` has found."""
    address = found.buffer_info()[0]
    return address, address + 8 * JOB * top_k, address + 8 * (JOB + 1) * top_k


@functools.cache
def _compiled(processor: Processor, emit: Callable[..., ir.Module], name: str, *arguments: Any) -> Kernel:
    return compile_kernel(processor, emit(*arguments), name)
