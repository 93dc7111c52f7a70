"""Products of one row with matrices of a trunk. Matrices that the same row is multiplied with share a call.

Attention multiplies a row with three matrices in turn, and a gated MLP with two. Each product is a module's, so each
would be a call of its own, which costs more than the product of a small matrix. Which matrices take the same row is
observed: those that a thread multiplies with one tensor, one after the other, become a group. Later, the first of them
computes the products of all, and the others fetch theirs. If one does not come for its product, the group is divided.
A product depends only on the row and the matrix, so that groups do not change any results.

torch gives a product of one row with a bf16 matrix to oneDNN, which takes up to 2.7 times as long (docs/benchmarks.md,
"One row").
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import gemm, gemv
from .emitter import FLOATS
from .gemm import GemmPlan, Rounded
from .gemv import gemv_step, lies_in_rows
from .jit import refusal
from .team import Program, Step, is_small, threads_for


class RowMatrix:
    """A matrix that single rows are multiplied with: quantised, or of bf16."""

    def __init__(
        self, weight: Tensor, rows: int, columns: int, plan: Callable[[torch.dtype], GemmPlan] | None = None
    ) -> None:
        """
        Args:
            weight: a record, uint8 [record bytes], or a bf16 matrix [rows, columns].
            rows: number of rows.
            columns: number of columns.
            plan: for a record, gives the plan of its product by the type of x.
        """
        self.weight = weight
        self.rows = rows
        self.columns = columns
        self.plan = plan
        self.group: _Group | None = None  # None: not known yet

    def multiply(self, x: Tensor) -> Tensor | None:
        """Multiply one row x [1, columns] -> [1, rows] in the type of x; return None for other inputs.

        x may have other leading dimensions.
        """
        if x.numel() != self.columns or x.shape[-1] != self.columns or torch.is_grad_enabled():
            return None
        group = self.group or _observer.group_of(self, x)
        with torch._C.DisableTorchFunctionSubclass():  # attributes of a RowWeight are torch functions
            return group.multiply(self, x)

    def fits(self, dtype: torch.dtype) -> bool:
        """Return whether the matrix is in memory as compiled code reads it for x of ``dtype``."""
        if self.plan is not None:
            return dtype in FLOATS and self.weight.is_cpu
        weight = self.weight
        return (
            dtype == weight.dtype == torch.bfloat16
            and weight.shape == (self.rows, self.columns)
            and lies_in_rows(weight)
        )


class _Group:
    """Matrices that take the same row, one after the other."""

    def __init__(self, matrices: Sequence[RowMatrix]) -> None:
        self._matrices = matrices
        self._local = threading.local()  # ``products`` of this thread, of ``x`` with matrices that have not asked yet

    def multiply(self, matrix: RowMatrix, x: Tensor) -> Tensor | None:
        """Multiply one row x with ``matrix``, one of the group."""
        local = self._local
        if products := getattr(local, "products", None):
            if x is local.x and _version(x) == local.version and matrix in products:
                found: Tensor = products.pop(matrix)
                return found
            for one in self._matrices:
                one.group = _Group([one])
            local.products = local.x = None
            assert matrix.group is not None
            return matrix.group.multiply(matrix, x)
        if not x.is_cpu or not x.is_contiguous() or not all(one.fits(x.dtype) for one in self._matrices):
            return None
        program: _Products | None = getattr(local, "program", None)
        form = (x.dtype, torch.get_num_threads())
        if program is None or program.form != form:
            program = local.program = _Products(self._matrices, form)
        products = program.of(x)
        y = products.pop(matrix)
        local.x, local.version, local.products = x if products else None, _version(x), products
        return y


def _version(x: Tensor) -> int | None:
    """Return a number that changes when x is changed in place. Tensors made in inference mode have none."""
    return None if x.is_inference() else x._version


class ProductSteps:
    """Steps that multiply one row with several matrices.

    Their contexts are made once, because making them takes long.
    """

    def __init__(self, matrices: Sequence[RowMatrix], dtype: torch.dtype) -> None:
        """``dtype``: type of x and of the products."""
        self.steps: list[Step] = []
        rounded: dict[int, Rounded] = {}  # by the address of the function that rounds x
        self._inputs: list[tuple[array[int], int]] = []  # where to write the address of x
        # by matrix: where to write the address of the weight, and that of y
        self._products: dict[RowMatrix, tuple[array[int], int, array[int], int]] = {}
        for matrix in matrices:
            if matrix.plan is None:
                step = gemv_step(matrix.weight, dtype)
                self._inputs.append((step.context, gemv.X))
                self._products[matrix] = (step.context, gemv.W, step.context, gemv.Y)
                self.steps.append(step)
                continue
            plan = matrix.plan(dtype)
            given = rounded.get(plan.round.address)
            if given is None:
                memory = array("b", bytes(plan.row_bytes))
                given = rounded[plan.round.address] = Rounded(memory.buffer_info()[0], 1, plan)
                self.steps.append(Step(plan.round, given.context(0), 1, memory))
                self._inputs.append((self.steps[-1].context, gemm.X))
            jobs = array("q", (0, 0, 1))
            context = plan.context(1, jobs, given, 0, has_own_rows=True)
            self.steps.append(Step(plan.kernel, context, threads_for(matrix.rows * matrix.columns), jobs))
            self._products[matrix] = (jobs, 0, context, gemm.Y)

    def read(self, x: int) -> None:
        """Let the steps read x from an address."""
        for context, place in self._inputs:
            context[place] = x

    def write(self, matrix: RowMatrix, y: int) -> None:
        """Let the steps write the product with a matrix to an address. To be called before each run."""
        job, record, context, place = self._products[matrix]
        job[record], context[place] = matrix.weight.data_ptr(), y


class _Products:
    """Products of one row with several matrices."""

    def __init__(self, matrices: Sequence[RowMatrix], form: tuple[torch.dtype, int]) -> None:
        """``form``: type of x, number of threads."""
        self.form = form
        self._matrices = matrices
        self._steps = ProductSteps(matrices, form[0])
        is_quick = all(is_small(one.rows * one.columns) for one in matrices)
        self._program = Program(self._steps.steps, locked=is_quick)

    def of(self, x: Tensor) -> dict[RowMatrix, Tensor]:
        """Return the product of x with each matrix."""
        self._steps.read(x.data_ptr())
        found = {}
        for matrix in self._matrices:
            y = found[matrix] = torch.empty((*x.shape[:-1], matrix.rows), dtype=x.dtype)
            self._steps.write(matrix, y.data_ptr())
        self._program.run()
        return found


class _Observer(threading.local):
    """For each thread: the last row, and the matrices without a ``_Group`` that it has multiplied with that row."""

    def __init__(self) -> None:
        self._x: Tensor | None = None
        self._matrices: list[RowMatrix] = []

    def group_of(self, matrix: RowMatrix, x: Tensor) -> _Group:
        """Note that this thread multiplies ``matrix`` with x. Return the matrix's group.

        If it has none yet, return a new group of only this matrix, for this one product.
        """
        if x is not self._x or matrix in self._matrices:
            if not any(one.group for one in self._matrices):  # no other thread was quicker
                group = _Group(self._matrices)
                for one in self._matrices:
                    one.group = group
            self._x, self._matrices = x, []
            if matrix.group is not None:
                return matrix.group
        self._matrices.append(matrix)
        return _Group([matrix])


_observer = _Observer()


class RowWeight(nn.Parameter):
    """A bf16 matrix with which F.linear multiplies one row by a RowMatrix, on a CPU and without gradients.

    In all other cases torch computes as with any parameter.
    """

    matrix: RowMatrix | None = None

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, arguments: Any = (), named: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function is F.linear and not named and (y := _linear(*arguments)) is not None:
                return y
            return function(*arguments, **(named or {}))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Multiply as F.linear does, if ``weight`` is a RowWeight and x one row; return None for other inputs.

    The product is rounded to bf16 before the bias is added.
    """
    if not isinstance(weight, RowWeight) or not lies_in_rows(weight) or refusal():
        return None
    matrix = weight.matrix
    if matrix is None or (matrix.rows, matrix.columns) != weight.shape:
        matrix = weight.matrix = RowMatrix(weight, *weight.shape)
    y = matrix.multiply(x)
    return y if y is None or bias is None else y.add_(bias)


def use_row_weights(model: nn.Module) -> None:
    """Replace the ``weight`` of each module by a RowWeight if it is a bf16 matrix, except in embeddings.

    Modules that share a weight still share it afterwards.
    """
    found = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if (
            weight is not None
            and not isinstance(module, nn.Embedding)
            and weight.dtype == torch.bfloat16
            and lies_in_rows(weight)
        ):
            found[id(weight)] = row_weight = RowWeight(weight.data, weight.requires_grad)
            row_weight.matrix = RowMatrix(row_weight, *weight.shape)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = found.get(id(parameter), parameter)
