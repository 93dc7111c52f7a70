"""Compute experts of a block on a CPU in one call, with the weighted sum of their outputs.

A token's outputs (``expert_products.py``) are multiplied by their weights and added up in fp32, in ascending order of
experts. So a token's result depends only on that token and its routing: not on other tokens, on the order in which
experts arrive, or on the number of threads; and experts can be computed a few at a time, for all tokens of a prompt.
"""

from __future__ import annotations

import itertools
import threading
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from moetier.runtime.kernels.jit.processor import Processor
from moetier.runtime.kernels.jit.team import Kernel, KernelTask, Program, Scratch, run_all, threads_for
from moetier.runtime.kernels.products.api import FLOATS
from moetier.runtime.kernels.products.gemm import JOB
from moetier.runtime.kernels.products.rounding import X
from moetier.tiers.layout import RecordLayout
from moetier.tiers.source import Residents

from .expert_code import (
    ADD_UP,
    FIND,
    PROVE,
    Activation,
    AddUpContext,
    FindContext,
    ProveContext,
    adding_module,
    find_module,
    prove_module,
)
from .expert_products import ExpertProducts, compiled

# indices of fields in the contexts of ADD_UP, FIND and PROVE
TOKENS, WEIGHTS, SUMS, RESIDUAL = map(AddUpContext._fields.index, ("tokens", "weights", "sums", "residual"))
FOUND, WANTED = map(FindContext._fields.index, ("found", "wanted"))
RESIDENT_FIELDS = slice(*map(FindContext._fields.index, ("experts", "jobs")))  # of ``Residents.numbers``
UNCHANGED, GENERATIONS = map(ProveContext._fields.index, ("unchanged", "generations"))
_scratch = Scratch()


class ExpertKernels(ExpertProducts):
    """Compiled functions for experts of one layout, with hidden states of one type. Thread-safe."""

    def __init__(
        self,
        layout: RecordLayout,
        activation: Activation,
        dtype: torch.dtype,
        experts: int,
        processor: Processor | None = None,
    ) -> None:
        """``dtype`` is the type of hidden states, bfloat16 or float32; ``experts`` is the block's number of experts."""
        assert dtype in FLOATS
        super().__init__(layout, activation, dtype, processor)
        self.dtype = dtype
        self.experts = experts
        self.find_kernel = compiled(self._processor, find_module, FIND)
        self.prove_kernel = compiled(self._processor, prove_module, PROVE)
        self._local = threading.local()  # ``token``: the thread's OneToken
        # by arguments of ``adding_module``, so that ``add_up`` does not wait while a thread compiles
        self._add_up: dict[tuple[torch.dtype, bool, bool], Kernel] = {}

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
        self.compute_at(x.data_ptr(), len(x), jobs, places, outputs.data_ptr(), _scratch)

    def compute_found(self, x: Tensor, lookup: RecordLookup, counts: Sequence[int], outputs: Tensor) -> bool:
        """Compute the experts that ``lookup`` has found, for rows of x, and write row after row to ``outputs``.

        Returns whether none of their records was replaced meanwhile; otherwise the outputs may be wrong.

        Args:
            x: [rows, hidden]: the rows of the first expert, then those of the second, and so on.
            lookup: the records.
            counts: for each expert its number of rows.
            outputs: [rows, hidden], in the type of x.
        """
        ends = [*itertools.accumulate(counts)]
        lookup.jobs[1::JOB], lookup.jobs[2::JOB] = array("q", (0, *ends[:-1])), array("q", counts)
        self.compute(x, lookup.jobs, array("q", range(len(x))), outputs)
        run_all([lookup.proof])
        return lookup.is_proved

    def add_up(
        self, outputs: Tensor, weights: Tensor, rows: Tensor, bounds: Tensor, sums: Tensor, *, is_part: bool = False
    ) -> None:
        """Multiply outputs by their weights, and add up those of each token.

        Args:
            outputs: [R, hidden], in the type of hidden states.
            weights: [R], fp32 or bf16.
            rows: [R], int64: the rows of the first token's outputs, in ascending order of experts, then those of the
                second, and so on.
            bounds: [tokens + 1], int64: where in ``rows`` those of each token begin, and the end.
            sums: [tokens, hidden]: gets the sums, in the type of hidden states.
            is_part: the outputs are only some of the tokens'. They are added to ``sums``, which are fp32.
        """
        threads = threads_for(outputs.numel())
        task = self.adding_task(
            weights.dtype, outputs.data_ptr(), rows.data_ptr(), bounds.data_ptr(), threads, is_part=is_part
        )
        task.context[TOKENS], task.context[WEIGHTS], task.context[SUMS] = len(sums), weights.data_ptr(), sums.data_ptr()
        run_all([task])

    def one_token(self, top_k: int, weight_dtype: torch.dtype, *, has_residual: bool) -> OneToken:
        """Return the calling thread's object for tokens with ``top_k`` experts, valid until the thread asks again."""
        token: OneToken | None = getattr(self._local, "token", None)
        signature = (top_k, weight_dtype, has_residual, torch.get_num_threads())
        if token is None or token.signature != signature or token.scratch != _scratch.take(token.nbytes):
            token = self._local.token = OneToken(self, signature)
        return token

    def adding_task(
        self,
        weight_dtype: torch.dtype,
        outputs: int,
        rows: int,
        bounds: int,
        threads: int,
        *,
        has_residual: bool = False,
        is_part: bool = False,
    ) -> KernelTask:
        """Return the task of ``add_up`` for one token, whose context still lacks WEIGHTS, SUMS and RESIDUAL."""
        variant = weight_dtype, has_residual, is_part
        if (kernel := self._add_up.get(variant)) is None:
            kernel = self._add_up[variant] = compiled(self._processor, adding_module, ADD_UP, self.dtype, *variant)
        given = AddUpContext(tokens=1, outputs=outputs, rows=rows, bounds=bounds, columns=self._down.rows)
        return KernelTask(kernel, array("q", given), threads)


class RecordLookup:
    """Records of a block's experts, found without leases. One thread uses it.

    After a computation with the records, ``proof`` shows whether none of them was replaced meanwhile.
    """

    def __init__(self, kernels: ExpertKernels, count: int) -> None:
        """Look up ``count`` experts at a time."""
        self.jobs, self._slots, self._generations = (array("q", bytes(8 * count * n)) for n in (JOB, 1, 1))
        jobs, slots, generations = (numbers.buffer_info()[0] for numbers in (self.jobs, self._slots, self._generations))
        self._count = count
        self._find = kernels.find_kernel
        given = FindContext(top_k=count, jobs=jobs, found_slots=slots, found_generations=generations)
        self._context = array("q", given)
        proved = ProveContext(top_k=count, found_slots=slots, found_generations=generations)
        self.proof = KernelTask(kernels.prove_kernel, array("q", proved), 1)

    def find(self, experts: Sequence[int], residents: Residents) -> bool:
        """Look experts up, and write a job of one row for each into ``jobs``. Return whether all are resident."""
        chosen, context = array("q", experts), self._context
        context[FOUND], context[WANTED] = 0, chosen.buffer_info()[0]
        context[RESIDENT_FIELDS] = array("q", residents.numbers)
        self.proof.context[GENERATIONS] = residents.generations
        self._find.call_locked(context.buffer_info()[0])
        return context[FOUND] == self._count

    @property
    def is_proved(self) -> bool:
        """Whether ``proof``, which has run, has found all records unchanged."""
        return self.proof.context[UNCHANGED] == self._count


class OneToken:
    """Experts of one token, if all of them are resident. One thread uses it, and no two tokens at the same time.

    Contexts are made once, because making them takes longer than some of the tasks.
    """

    def __init__(self, kernels: ExpertKernels, signature: tuple[int, torch.dtype, bool, int]) -> None:
        """``signature``: number of experts, type of the weights, whether there is a residual, number of threads."""
        self.signature = signature
        self._top_k, weight_dtype, has_residual, _ = signature
        starts = kernels.scratch_starts(1, self._top_k, has_outputs=False)
        self.nbytes = starts[-1]
        self.scratch = _scratch.take(self.nbytes)
        self._lookup = RecordLookup(kernels, self._top_k)
        outputs = self.scratch + starts[4]
        tasks = kernels.tasks(1, self._lookup.jobs, array("q", range(self._top_k)), self.scratch, starts, outputs)
        self._order, bounds = array("q", bytes(8 * self._top_k)), array("q", (0, self._top_k))
        rows, bound = (numbers.buffer_info()[0] for numbers in (self._order, bounds))
        adding = kernels.adding_task(weight_dtype, outputs, rows, bound, 1, has_residual=has_residual)._replace(
            kept=bounds
        )
        self._x, self._sums = tasks[0].context, adding.context
        self._program = Program([*tasks, adding, self._lookup.proof])

    def find(self, experts: Sequence[int], residents: Residents) -> bool:
        """Look up the experts of a token. Return whether all their records are resident."""
        self._order[:] = array("q", sorted(range(self._top_k), key=experts.__getitem__))
        return self._lookup.find(experts, residents)

    def compute(self, x: Tensor, weights: Tensor, residual: Tensor | None) -> Tensor | None:
        """Compute a token, x [1, hidden] with weights [1, top_k], with the records that ``find`` has found.

        ``residual`` [1, hidden], or with more leading dimensions, is added to the result if it is given. Returns [1,
        hidden], or the shape of ``residual``; None if one of the records was replaced meanwhile.
        """
        out = torch.empty_like(x if residual is None else residual)
        self._x[X], self._sums[WEIGHTS], self._sums[SUMS] = x.data_ptr(), weights.data_ptr(), out.data_ptr()
        if residual is not None:
            self._sums[RESIDUAL] = residual.data_ptr()
        self._program.run()
        return out if self._lookup.is_proved else None
