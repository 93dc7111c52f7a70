"""Products of one row, y = W @ x, with matrices of a trunk that are not quantised: routers, and 16-bit trunks.

torch gives such a product of bf16 to oneDNN, which takes up to 2.7 times as long (docs/benchmarks.md, "One row"); with
fp32 there is nothing to gain. Sums are fp32, and each number of y depends only on its row of W and on x.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from llvmlite import ir
from torch import Tensor, nn

from .emitter import F32, FLOATS, I32, LANES, POINTER, Emitter, new_module, vector
from .jit import refusal, this_processor
from .team import Kernel, compile_kernel, is_small, threads_for

GEMV = "moetier_gemv"  # name of the compiled function
ROWS = 4  # rows of W that are read together
# number of i64 fields in the context. In order: items that threads have taken, all items; rows N and columns K of W;
# pointers to x, W, y
CONTEXT = 7


class RowWeight(nn.Parameter):
    """A bf16 matrix with which F.linear multiplies one row by ``linear_row``, on a CPU and without gradients.

    In all other cases torch computes as with any parameter.
    """

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, arguments: Any = (), named: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function is F.linear and not named and (y := linear_row(*arguments)) is not None:
                return y
            return function(*arguments, **(named or {}))


def use_row_weights(model: nn.Module) -> None:
    """Replace the ``weight`` of each module by a RowWeight if it is a bf16 matrix, except in embeddings.

    Modules that share a weight still share it afterwards.
    """
    found = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and not isinstance(module, nn.Embedding) and _fits(weight):
            found[id(weight)] = RowWeight(weight.data, weight.requires_grad)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = found.get(id(parameter), parameter)


def linear_row(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Multiply one row x [1, columns] with weight [rows, columns] and add bias [rows] -> [1, rows], all bf16.

    x may have other leading dimensions. Returns None for other inputs. Sums are fp32; they are rounded to bf16 before
    the bias is added.
    """
    if x.dtype != torch.bfloat16 or not x.is_cpu or not _fits(weight) or torch.is_grad_enabled() or refusal():
        return None
    rows, columns = weight.shape
    if x.numel() != columns or x.shape[-1] != columns:
        return None
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], rows), dtype=x.dtype)
    _multiply(x, weight, y.data_ptr())
    return y if bias is None else y.add_(bias)


class Scores:
    """An fp32 matrix [N, K] on a CPU that is multiplied with one row at a time, to score experts for a prediction."""

    def __init__(self, weight: Tensor) -> None:
        assert self.fits(weight)
        self._weight = weight
        self._found = array("f", bytes(4 * len(weight)))
        self._address = self._found.buffer_info()[0]

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Return whether this machine's kernel can multiply with ``weight`` [rows, columns] as it is in memory."""
        return weight.dtype == torch.float32 and _lies_in_rows(weight) and not refusal()

    def of(self, x: Tensor) -> list[float] | None:
        """Return ``weight @ x`` for one row x [1, columns] of bf16 or fp32; None for other inputs.

        x may have other leading dimensions. Not thread-safe: threads that call this at once may get one another's
        results.
        """
        if x.dtype not in FLOATS or not x.is_cpu or not x.is_contiguous() or x.numel() != self._weight.shape[1]:
            return None
        _multiply(x, self._weight, self._address)
        return self._found.tolist()


def _multiply(x: Tensor, weight: Tensor, y: int) -> None:
    """Write ``weight @ x`` to the address ``y``, where N numbers of the weight's type fit."""
    rows, columns = weight.shape
    items, weights = -(-rows // ROWS), rows * columns
    context = array("q", (0, items, rows, columns, x.data_ptr(), weight.data_ptr(), y))
    threads = min(items, threads_for(weights))
    _kernel(x.dtype, weight.dtype).run(context, threads, locked=is_small(weights))


def _lies_in_rows(weight: Tensor) -> bool:
    return weight.dim() == 2 and weight.shape[1] % LANES == 0 and weight.is_cpu and weight.is_contiguous()


def _fits(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and _lies_in_rows(weight)


@functools.cache
def _kernel(given: torch.dtype, kept: torch.dtype) -> Kernel:
    return compile_kernel(this_processor(), gemv_module(given, kept), GEMV)


def gemv_module(given: torch.dtype, kept: torch.dtype) -> ir.Module:
    """Emit the function ``GEMV(context)``, which computes items, of ROWS rows of W each, until none is left.

    x [K] is of type ``given``, W [N, K] and y [N] are of type ``kept``; K is a multiple of LANES.
    """
    module = new_module()
    emit = Emitter(module, GEMV, [POINTER])
    at, n = emit.at, emit.number
    begun, (items, rows, columns, *addresses) = emit.fields(CONTEXT)
    x, matrix, y = (at.inttoptr(address, POINTER) for address in addresses)
    sums = [at.alloca(vector(F32, LANES)) for _ in range(ROWS)]
    row_bytes, last = at.mul(columns, n(kept.itemsize)), at.sub(rows, n(1))
    with emit.items(begun, items) as item:
        wanted = [at.add(at.mul(item, n(ROWS)), n(i)) for i in range(ROWS)]
        # if fewer than ROWS rows are left for the last item, it computes the last row again
        chosen = [at.select(at.icmp_signed("<", row, last), row, last) for row in wanted]
        sources = [at.gep(matrix, [at.mul(row, row_bytes)]) for row in chosen]
        for place in sums:
            at.store(emit.all(F32, 0.0, LANES), place)
        with emit.loop(n(0), columns, LANES) as column:
            taken = emit.load_floats(x, at.mul(column, n(given.itemsize)), given, LANES)
            for source, place in zip(sources, sums, strict=True):
                weights = emit.load_floats(source, at.mul(column, n(kept.itemsize)), kept, LANES)
                at.store(emit.multiply_add(weights, taken, at.load(place)), place)
        for row, place in zip(chosen, sums, strict=True):
            total = emit.reduce(at.load(place), at.fadd)
            if kept == torch.bfloat16:
                total = at.extract_element(emit.narrow(emit.spread(total, LANES), LANES), ir.Constant(I32, 0))
            emit.store(total, y, at.mul(row, n(kept.itemsize)))
    at.ret_void()
    return module
