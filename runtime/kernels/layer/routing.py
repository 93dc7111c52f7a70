"""A router's choice of experts: logits, scores, the top-k of them, and the weights of these.

Scores are the softmax of the logits, or the sigmoid of each (DeepSeek-V3, arXiv 2412.19437). Weights are the scores of
the chosen experts, which may be divided by their sum. For the choice, a correction may be added to the scores. Experts
may be divided into groups of neighbours; then only experts of the best groups are chosen. A group's score is that of
its best expert, or of its best two together. With torch the choice for one token takes five to twenty operations, each
of which costs more than its arithmetic. Of experts with equal scores, those with the smallest numbers are chosen. A
token's choice does not depend on the others.
"""

from __future__ import annotations

import threading
from array import array
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moetier.runtime.kernels.jit.processor import refusal
from moetier.runtime.kernels.jit.team import KernelTask, Program, is_small, threads_for
from moetier.runtime.kernels.products.api import CPU, FLOATS, is_readable
from moetier.runtime.kernels.products.gemv import W, X, Y, gemv_task, lies_in_rows
from moetier.runtime.kernels.products.matmul import matmul
from moetier.runtime.libraries.torch_internals import without_subclasses

from .norm import float_bits
from .routing_code import (
    BIAS,
    CORRECTION,
    EXPERTS,
    LOGITS,
    WEIGHTS,
    RoutingCode,
    routing_kernel,
    scratch_elements,
)


class RouterVariant(NamedTuple):
    """Variant of a router: the way in which it chooses experts and weighs them."""

    top_k: int
    normalised: bool  # whether the weights of the chosen experts add up to ``factor``
    factor: float
    logit_dtype: torch.dtype  # of the logits that it returns
    weight_dtype: torch.dtype
    product_dtype: torch.dtype | None = None  # of the product with its matrix; None: as the matrix
    is_sigmoid: bool = False  # whether scores are sigmoids; else they are a softmax
    has_correction: bool = False
    groups: int = 1
    best_groups: int = 1  # number of groups from which experts are chosen
    best_of_group: int = 0  # number of experts whose scores add up to a group's; 0 if there is one group


class CompiledRouter:
    """Chooses experts with a router's matrix, which has a row for each expert. Threads may use it at the same time."""

    def __init__(self, variant: RouterVariant) -> None:
        self.variant = variant
        self._local = threading.local()  # ``calls`` of this thread

    def can_route(self, weight: Tensor, bias: Tensor | None, correction: Tensor | None = None) -> bool:
        """Return whether compiled code can choose with a matrix ``weight`` [experts, columns].

        ``bias`` and ``correction`` are [experts].
        """
        product = self.variant.product_dtype or weight.dtype
        vectors = [vector for vector in (bias, correction) if vector is not None]
        return (
            weight.dtype in FLOATS
            and lies_in_rows(weight)
            and all(is_readable(vector) and vector.shape == weight.shape[:1] for vector in vectors)
            and (bias is None or bias.dtype == product)
            and (correction is not None) == self.variant.has_correction
            and (correction is None or correction.dtype in FLOATS)
            and not refusal()
        )

    def compute(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, correction: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return logits [rows, experts], weights [rows, top_k] and experts [rows, top_k], int64, of x [rows, columns].

        x may have other leading dimensions. Returns None for other inputs.
        """
        with without_subclasses():
            if not is_readable(x) or x.dtype not in FLOATS or torch.is_grad_enabled():
                return None
            if not self.can_route(weight, bias, correction) or not x.numel() or x.shape[-1] != weight.shape[1]:
                return None
            if x.numel() != x.shape[-1]:
                return self._many(x.view(-1, x.shape[-1]), weight, bias, correction)
            call: _ThreadRouter | None = getattr(self._local, "call", None)
            added = None if correction is None else correction.dtype
            signature = (x.dtype, weight.dtype, weight.shape, bias is not None, added, torch.get_num_threads())
            if call is None or call.signature != signature:
                tasks = RoutingTasks(self.variant, x.dtype, weight, bias, correction)
                call = self._local.call = _ThreadRouter(self.variant, signature, tasks, weight.numel())
            return call.compute(x, weight, bias, correction)

    def _many(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, correction: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        choice = RoutingTask(self.variant, weight, bias, correction, rows=len(x))
        logits = matmul(x, weight, choice.product_dtype)
        weights, experts = choice.bind(logits, bias, correction)
        choice.task.kernel.run(choice.task.context, threads_for(len(x) * weight.numel()))
        return logits.to(self.variant.logit_dtype), weights, experts


class RoutingTask:
    """The task that chooses experts by logits. Its context is made once."""

    def __init__(
        self, variant: RouterVariant, weight: Tensor, bias: Tensor | None, correction: Tensor | None, rows: int = 1
    ) -> None:
        """``weight`` is [experts, columns], and the others are [experts]. ``rows``: number of rows of logits."""
        self._variant, self._rows = variant, rows
        self.product_dtype = variant.product_dtype or weight.dtype  # of the logits
        scratch = np.empty(rows * scratch_elements(len(weight), variant.top_k), np.float32)
        numbers = (0, rows, len(weight), variant.top_k, 0, 0, scratch.ctypes.data, 0, 0, float_bits(variant.factor), 0)
        types = (self.product_dtype, variant.weight_dtype, variant.normalised, variant.is_sigmoid, bias is not None)
        added = None if correction is None else correction.dtype
        kernel = routing_kernel(RoutingCode(*types, added, variant.best_of_group))
        self.task = KernelTask(kernel, array("q", (*numbers, variant.groups, variant.best_groups)), 1, scratch)

    def bind(self, logits: Tensor, bias: Tensor | None, correction: Tensor | None) -> tuple[Tensor, Tensor]:
        """Let the task read logits [rows, experts], ``bias`` and ``correction`` [experts].

        Returns the new tensors that it fills: weights and experts, [rows, top_k] each.
        """
        shape, context = (self._rows, self._variant.top_k), self.task.context
        weights = torch.empty(shape, dtype=self._variant.weight_dtype, device=CPU)
        experts = torch.empty(shape, dtype=torch.int64, device=CPU)
        context[LOGITS], context[WEIGHTS], context[EXPERTS] = (one.data_ptr() for one in (logits, weights, experts))
        for place, vector_ in ((BIAS, bias), (CORRECTION, correction)):
            context[place] = 0 if vector_ is None else vector_.data_ptr()
        return weights, experts


class RoutingTasks:
    """Compiled tasks that route one token. Their argument arrays are made once, and reused."""

    def __init__(
        self, variant: RouterVariant, given: torch.dtype, weight: Tensor, bias: Tensor | None, correction: Tensor | None
    ) -> None:
        """``given`` is the type of x. ``weight`` is [experts, columns], and the others are [experts]."""
        self._choice = RoutingTask(variant, weight, bias, correction)
        self.tasks = [gemv_task(weight, given, self._choice.product_dtype), self._choice.task]

    def bind(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, correction: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Let the tasks read x [1, columns], ``weight`` [experts, columns], ``bias`` and ``correction`` [experts].

        Returns the new tensors that each run fills: logits [1, experts]; weights and experts, [1, top_k] each.
        """
        logits = torch.empty((1, len(weight)), dtype=self._choice.product_dtype, device=CPU)
        product = self.tasks[0].context
        product[X], product[W], product[Y] = x.data_ptr(), weight.data_ptr(), logits.data_ptr()
        return logits, *self._choice.bind(logits, bias, correction)


class _ThreadRouter:
    """The tasks of a routing, which are made once for each thread."""

    def __init__(self, routing: RouterVariant, signature: tuple[Any, ...], tasks: RoutingTasks, numbers: int) -> None:
        """``signature``: types and sizes of the inputs. ``numbers``: size of the matrix."""
        self.signature = signature
        self._logit_dtype = routing.logit_dtype
        self._tasks = tasks
        self._program = Program(tasks.tasks, locked=is_small(numbers))

    def compute(self, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Choose experts; ``given`` are the arguments of ``RoutingTasks.bind``."""
        logits, weights, experts = self._tasks.bind(*given)
        self._program.run()
        return logits.to(self._logit_dtype), weights, experts
