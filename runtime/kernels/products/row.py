"""Products of rows with matrices of a trunk.

torch gives a product of one row with a bf16 matrix to oneDNN, which takes up to 2.7 times as long (docs/benchmarks.md,
"One row"). Products of many rows have the bits of those of one.
"""

from __future__ import annotations

import copy
import threading
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetier.runtime.kernels.jit.emitter import LANES, POINTER, Emitter, new_module, once
from moetier.runtime.kernels.jit.processor import refusal, this_processor
from moetier.runtime.kernels.jit.team import Kernel, KernelTask, Program, compile_kernel, is_small, threads_for
from moetier.runtime.libraries.torch_internals import parameters_of, tree_map_only, without_subclasses

from . import gemm, gemv, rounding
from .api import CPU, FLOATS, is_readable
from .gemm import ProjectionProduct, Rounded
from .gemv import gemv_task, lies_in_rows
from .matmul import matmul

BIAS = "moetier_bias"  # name of the compiled function


class RowMatrix:
    """A matrix that single rows are multiplied with: quantised, or of bf16."""

    def __init__(
        self, weight: Tensor, rows: int, columns: int, product: Callable[[torch.dtype], ProjectionProduct] | None = None
    ) -> None:
        """Make a matrix.

        Args:
            weight: a record, uint8 [record bytes], or a bf16 matrix [rows, columns].
            rows: number of rows.
            columns: number of columns.
            product: for a record, gives the compiled product by the type of x.
        """
        self.weight = weight
        self.rows = rows
        self.columns = columns
        self.product = product
        self._local = threading.local()  # ``product``: the thread's _Product

    def __deepcopy__(self, memo: Any) -> RowMatrix:
        return RowMatrix(copy.deepcopy(self.weight, memo), self.rows, self.columns, self.product)

    def multiply(self, x: Tensor) -> Tensor | None:
        """Multiply one row x [1, columns] -> [1, rows] in the type of x; return None for other inputs.

        x may have other leading dimensions.
        """
        if x.numel() != self.columns or x.shape[-1] != self.columns or torch.is_grad_enabled() or not is_readable(x):
            return None
        with without_subclasses():  # attributes of a RowWeight are torch functions
            if not self.is_readable(x.dtype):
                return None
            signature = (x.dtype, torch.get_num_threads())
            product: _Product | None = getattr(self._local, "product", None)
            if product is None or product.signature != signature:
                product = self._local.product = _Product(self, signature)
            return product.compute(self, x)

    def is_readable(self, dtype: torch.dtype) -> bool:
        """Return whether the matrix is in memory as compiled code reads it for x of ``dtype``."""
        if self.product is not None:
            return dtype in FLOATS and self.weight.is_cpu
        weight = self.weight
        return (
            dtype == weight.dtype == torch.bfloat16
            and weight.shape == (self.rows, self.columns)
            and lies_in_rows(weight)
        )


class ProductTasks:
    """Tasks that multiply one row x [K] with several matrices [N, K].

    Their contexts are made once, as that takes longer than a small product.
    """

    def __init__(
        self, matrices: Sequence[RowMatrix], dtype: torch.dtype, biases: Sequence[Tensor | None] | None = None
    ) -> None:
        """Prepare products with ``matrices``.

        Args:
            matrices: the matrices.
            dtype: type of x and of the products.
            biases: for each matrix, [rows] of ``dtype``, which is added to the product; or None.
        """
        self.tasks: list[KernelTask] = []
        self._sums: dict[RowMatrix, array[int]] = {}  # contexts of the tasks that add biases
        rounded: dict[int, Rounded] = {}  # by the address of the function that rounds x
        self._inputs: list[tuple[array[int], int]] = []  # where to write the address of x
        # by matrix: where to write the address of the weight, and that of y
        self._products: dict[RowMatrix, tuple[array[int], int, array[int], int]] = {}
        for matrix in matrices:
            if matrix.product is None:
                task = gemv_task(matrix.weight, dtype)
                self._inputs.append((task.context, gemv.X))
                self._products[matrix] = (task.context, gemv.W, task.context, gemv.Y)
                self.tasks.append(task)
                continue
            product = matrix.product(dtype)
            if (given := rounded.get(product.round.address)) is None:
                memory = array("b", bytes(product.row_bytes))
                given = rounded[product.round.address] = Rounded(memory.buffer_info()[0], 1, product)
                self.tasks.append(KernelTask(product.round, given.context(0), 1, memory))
                self._inputs.append((self.tasks[-1].context, rounding.X))
            jobs = array("q", (0, 0, 1))
            context = product.context(1, jobs, given, 0, has_own_rows=True)
            self.tasks.append(KernelTask(product.kernel, context, threads_for(matrix.rows * matrix.columns), jobs))
            self._products[matrix] = (jobs, 0, context, gemm.Y)
        for matrix, bias in zip(matrices, biases or (), strict=False):
            if bias is not None:
                self._sums[matrix] = array("q", (0, 0, bias.data_ptr(), matrix.rows))
                self.tasks.append(KernelTask(bias_kernel(dtype), self._sums[matrix], 1, bias))

    def read(self, x: int) -> None:
        """Let the tasks read x from an address."""
        for context, place in self._inputs:
            context[place] = x

    def write(self, matrix: RowMatrix, y: int) -> None:
        """Let the tasks write the product with a matrix to an address. To be called before each run."""
        job, record, context, place = self._products[matrix]
        job[record], context[place] = matrix.weight.data_ptr(), y
        if matrix in self._sums:
            self._sums[matrix][1] = y


@once
def bias_kernel(dtype: torch.dtype) -> Kernel:
    """Compile the function ``BIAS(context)``, which adds a bias [N] to y [N], both of ``dtype``.

    N is a multiple of LANES. The fields of the context: an unused one, the pointers to y and to the bias, and N.
    """
    emit = Emitter(new_module(), BIAS, [POINTER])
    at, n = emit.at, emit.number
    _, (y, bias, rows) = emit.fields(4)
    y, bias = (at.inttoptr(address, POINTER) for address in (y, bias))
    with emit.loop(n(0), at.mul(rows, n(dtype.itemsize)), LANES * dtype.itemsize) as offset:
        parts = [emit.load_floats(part, offset, dtype, LANES) for part in (y, bias)]
        emit.store_floats(at.fadd(*parts), y, offset, dtype)
    return compile_kernel(this_processor(), emit.finish(), BIAS)


class _Product:
    """Product of one row x [K] with a matrix [N, K], prepared once for each thread that computes."""

    def __init__(self, matrix: RowMatrix, signature: tuple[torch.dtype, int]) -> None:
        """``signature``: type of x, number of threads."""
        self.signature = signature
        self._tasks = ProductTasks([matrix], signature[0])
        self._program = Program(self._tasks.tasks, locked=is_small(matrix.rows * matrix.columns))

    def compute(self, matrix: RowMatrix, x: Tensor) -> Tensor:
        """Return the product of x with the matrix."""
        y = torch.empty((*x.shape[:-1], matrix.rows), dtype=x.dtype, device=CPU)
        self._tasks.read(x.data_ptr())
        self._tasks.write(matrix, y.data_ptr())
        self._program.run()
        return y


class RowWeight(nn.Parameter):
    """A bf16 matrix with which F.linear multiplies by compiled code, on a CPU and without gradients.

    In all other cases torch computes as with any parameter.
    """

    matrix: RowMatrix | None = None
    same_bits = False  # whether products of many rows must have the bits of one row's

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, arguments: Any = (), named: dict[str, Any] | None = None
    ) -> Any:
        with without_subclasses():
            if len(types) > 1:  # another subclass, which has its operations beside any parameter
                arguments, named = tree_map_only(RowWeight, _plain, (arguments, named))
            elif function is F.linear and not named and (y := _linear(*arguments)) is not None:
                return y
            else:
                return function(*arguments, **(named or {}))
        return function(*arguments, **(named or {}))


def _plain(weight: RowWeight) -> Tensor:
    return weight.as_subclass(Tensor)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Multiply x [tokens, columns] as F.linear does, if ``weight`` is a RowWeight; return None for other inputs.

    x may have other leading dimensions. The product is rounded to bf16 before the bias is added.
    """
    if not isinstance(weight, RowWeight) or not lies_in_rows(weight) or refusal():
        return None
    if (matrix := weight.matrix) is None or (matrix.rows, matrix.columns) != weight.shape:
        matrix = weight.matrix = RowMatrix(weight, *weight.shape)
    if bias is not None and (bias.dtype, bias.shape) != (weight.dtype, weight.shape[:1]):
        return None
    y = matrix.multiply(x) if x.numel() == x.shape[-1] else _many_rows(x, weight)
    return y if y is None or bias is None else y.add_(bias)


def _many_rows(x: Tensor, weight: RowWeight) -> Tensor | None:
    """Multiply rows x [*, columns] with a bf16 matrix [rows, columns]. Returns [*, rows].

    Returns None for other inputs, and where torch's product is preferred.
    """
    if (
        type(x) is not Tensor
        or not x.is_cpu
        or x.dtype != weight.dtype
        or x.shape[-1] != weight.shape[1]
        or not x.numel()
        or torch.is_grad_enabled()
        or (prefers_torch() and not weight.same_bits)
    ):
        return None
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = matmul(rows, weight, weight.dtype)
    return y.reshape(*x.shape[:-1], len(weight))


def prefers_torch() -> bool:
    """Return whether torch multiplies many rows with bf16 matrices much faster than compiled code: with AMX."""
    return this_processor().has_amx


def use_row_weights(model: nn.Module, *, same_bits: bool = False) -> None:
    """Replace the ``weight`` of each module by a RowWeight if it is a bf16 matrix, except in embeddings.

    Modules that share a weight still share it afterwards. ``same_bits``: products of many rows must have the bits of
    one row's, even where torch's are faster.
    """
    row_weights = {}
    for module in model.modules():
        weight = parameters_of(module).get("weight")
        if (
            weight is not None
            and not isinstance(module, nn.Embedding)
            and weight.dtype == torch.bfloat16
            and lies_in_rows(weight)
        ):
            row_weights[id(weight)] = row_weight = RowWeight(weight.data, weight.requires_grad)
            row_weight.matrix, row_weight.same_bits = RowMatrix(row_weight, *weight.shape), same_bits
    for module in model.modules():
        for name, parameter in parameters_of(module).items():
            parameters_of(module)[name] = row_weights.get(id(parameter), parameter)
