"""Compute experts of a block on a CPU in one call: both products, the activation, the biases and the weighted sum.

Values between the products are fp32. The result of the activation is rounded to 8 bits, as every input of a product is
(``gemm.py``). Each row of an expert's output is rounded to the type of x. A token's outputs are multiplied by their
weights and added up in fp32, in the order of its top-k. So a token's result depends only on that token and its routing:
not on other tokens, on the order in which experts arrive, or on the number of threads.
"""

from __future__ import annotations

import itertools
import threading
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from moetier.tiers.layout import RecordLayout
from moetier.tiers.source import Residents

from .emitter import FLOATS, LANES, once
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
from .gemm import JOB, GemmPlan, Rounded, X
from .jit import Processor, this_processor
from .team import Kernel, Program, Scratch, Step, compile_kernel, run_all, threads_for
from .team_code import LINE

WEIGHTS, SUMS = 3, 5  # indices of addresses in a context of ADD_UP
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
        self._processor = processor
        self._find = _compiled(processor, find_module, FIND)
        self._prove = _compiled(processor, prove_module, PROVE)
        self.width = self._up.columns  # of hidden states
        self._local = threading.local()  # ``token``: the thread's OneToken

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
        starts = self._starts(len(x), len(places))
        steps = self._steps(len(x), jobs, places, _scratch.take(starts[-1]), starts, outputs.data_ptr())
        steps[0].context[X] = x.data_ptr()
        run_all(steps)

    def add_up(self, outputs: Tensor, weights: Tensor) -> Tensor:
        """Multiply outputs [tokens * top_k, hidden] by weights [tokens, top_k], and add up those of each token.

        Weights are fp32 or bf16. Returns [tokens, hidden] in the type of the outputs.
        """
        tokens, top_k = weights.shape
        out = torch.empty((tokens, outputs.shape[1]), dtype=self.dtype)
        step = self._adding(weights.dtype, tokens, top_k, outputs.data_ptr(), threads_for(outputs.numel()))
        step.context[WEIGHTS], step.context[SUMS] = weights.data_ptr(), out.data_ptr()
        run_all([step])
        return out

    def one_token(self, top_k: int, weight_dtype: torch.dtype) -> OneToken:
        """Return the calling thread's object for tokens with ``top_k`` experts, valid until the thread asks again."""
        token: OneToken | None = getattr(self._local, "token", None)
        form = (top_k, weight_dtype, torch.get_num_threads())
        if token is None or token.form != form or token.scratch != _scratch.take(token.nbytes):
            token = self._local.token = OneToken(self, form)
        return token

    # -- contexts -----------------------------------------------------------------------------------------------------

    def _starts(self, own: int, rows: int, *, has_outputs: bool = True) -> list[int]:
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
            0 if has_outputs else rows * down.rows * self.dtype.itemsize,
        )
        return [*itertools.accumulate((-(-nbytes // LINE) * LINE for nbytes in sizes), initial=0)]

    def _steps(
        self, own: int, jobs: array[int], places: array[int], scratch: int, starts: list[int], outputs: int
    ) -> list[Step]:
        """Return the steps of ``compute``, whose first context still lacks the address of x [own, hidden]."""
        up, down, rows, count = self._up, self._down, len(places), len(jobs) // JOB
        taken, inner, activated, part = (scratch + start for start in starts[:4])
        given, rounded = Rounded(taken, own, up), Rounded(activated, rows, down)
        activation = array(
            "q", (0, count, jobs.buffer_info()[0], inner, *rounded.places, down.columns, self._biases[0])
        )
        placing = array(
            "q", (0, count, jobs.buffer_info()[0], part, places.buffer_info()[0], outputs, down.rows, self._biases[1])
        )
        weights = rows * up.columns * up.rows
        return [
            Step(up.round, given.context(0), threads_for(own * up.columns)),
            Step(up.kernel, up.context(count, jobs, given, inner, has_own_rows=own == rows), threads_for(weights)),
            Step(self._activate, activation, min(count, threads_for(rows * up.rows))),
            Step(
                down.kernel,
                down.context(count, jobs, rounded, part, has_own_rows=True),
                threads_for(rows * down.columns * down.rows),
            ),
            Step(self._place, placing, min(count, threads_for(rows * down.rows)), (jobs, places)),
        ]

    def _adding(self, weight_dtype: torch.dtype, tokens: int, top_k: int, outputs: int, threads: int) -> Step:
        """Return the step of ``add_up``, whose context still lacks the addresses WEIGHTS and SUMS."""
        kernel = _compiled(self._processor, adding_module, ADD_UP, self.dtype, weight_dtype)
        return Step(kernel, array("q", (0, tokens, outputs, 0, top_k, 0, self._down.rows)), threads)


class OneToken:
    """Experts of one token, if all of them are resident. One thread uses it, and no two tokens at the same time.

    Contexts are made once, because making them takes longer than some of the steps.
    """

    def __init__(self, kernels: ExpertKernels, form: tuple[int, torch.dtype, int]) -> None:
        """``form``: number of experts, type of the weights, number of threads."""
        self.form = form
        self._top_k, weight_dtype, _ = form
        self._find = kernels._find
        starts = kernels._starts(1, self._top_k, has_outputs=False)
        self.nbytes = starts[-1]
        self.scratch = _scratch.take(self.nbytes)
        self._jobs, self._slots, self._stamps = (
            array("q", bytes(8 * self._top_k * numbers)) for numbers in (JOB, 1, 1)
        )
        found = [numbers.buffer_info()[0] for numbers in (self._jobs, self._slots, self._stamps)]
        self._lookup = array("q", (0, self._top_k, *[0] * 8, *found))
        self._proof = array("q", (0, self._top_k, 0, *found[1:]))
        outputs = self.scratch + starts[4]
        steps = kernels._steps(1, self._jobs, array("q", range(self._top_k)), self.scratch, starts, outputs)
        adding = kernels._adding(weight_dtype, 1, self._top_k, outputs, 1)
        self._x, self._sums = steps[0].context, adding.context
        self._program = Program([*steps, adding, Step(kernels._prove, self._proof, 1)])

    def find(self, experts: Sequence[int], residents: Residents) -> bool:
        """Look up the experts of a token. Return whether all their records are resident."""
        wanted, lookup = array("q", experts), self._lookup
        lookup[0], lookup[2], lookup[3:10] = 0, wanted.buffer_info()[0], array("q", residents.numbers)
        self._proof[2] = residents.generations
        self._find.call_locked(lookup.buffer_info()[0])
        return lookup[0] == self._top_k

    def compute(self, x: Tensor, weights: Tensor) -> Tensor | None:
        """Compute a token, x [1, hidden] with weights [1, top_k], with the records that ``find`` has found.

        Returns [1, hidden], or None if one of the records was replaced meanwhile.
        """
        out = torch.empty_like(x)
        self._x[X], self._sums[WEIGHTS], self._sums[SUMS] = x.data_ptr(), weights.data_ptr(), out.data_ptr()
        self._program.run()
        return out if self._proof[0] == self._top_k else None


def _first(activation: Activation) -> str:
    """Return the name of the projection before the activation."""
    return "gate_up_proj" if activation.gated else "up_proj"


@once
def _compiled(processor: Processor, emit: Callable[..., ir.Module], name: str, *arguments: Any) -> Kernel:
    return compile_kernel(processor, emit(*arguments), name)
