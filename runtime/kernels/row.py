"""Products of one row with the matrices of a trunk that are not quantised: a router's, and all of one of 16 bits.

torch gives such a product of bf16 to oneDNN, which takes up to 2.7 times as long (docs/benchmarks.md, "One row"); with
fp32 there is nothing to gain.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import jit as native
from .emit import F32, I16
from .gemv import GEMV, LANES, ROWS, gemv

_KINDS = {torch.bfloat16: I16, torch.float32: F32}


class RowWeight(nn.Parameter):
    """A matrix of bf16 that F.linear multiplies with one row by code of our own, on a CPU and without gradients. What
    else is done with it is torch's."""

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, arguments: Any = (), named: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function is F.linear and not named and (y := linear_row(*arguments)) is not None:
                return y
            return function(*arguments, **(named or {}))


def use_row_weights(model: nn.Module) -> None:
    """For each matrix that is a module's ``weight`` and no table to look rows up in. What several modules share they
    share afterwards."""
    found = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and not isinstance(module, nn.Embedding) and _fits(weight):
            found[id(weight)] = RowWeight(weight.data, weight.requires_grad)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = found.get(id(parameter), parameter)


def linear_row(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """x [..., K] of one row, weight [N, K], bias [N] -> [..., N], all bf16; None where torch is to do it. Sums are
    fp32; the bias is added to what they are rounded to."""
    if x.dtype != torch.bfloat16 or not x.is_cpu or not _fits(weight) or torch.is_grad_enabled() or native.refusal():
        return None
    rows, columns = weight.shape
    if x.numel() != columns or x.shape[-1] != columns:
        return None
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], rows), dtype=x.dtype)
    _multiply(x, weight, y.data_ptr())
    return y if bias is None else y.add_(bias)


class Scores:
    """A matrix [N, K] of fp32 on a CPU, to be multiplied with one row at a time: a gate's, that is asked for a guess.
    Its numbers may change in place."""

    def __init__(self, weight: Tensor) -> None:
        assert self.fits(weight)
        self._weight = weight
        self._found = array("f", bytes(4 * len(weight)))
        self._address = self._found.buffer_info()[0]

    @staticmethod
    def fits(weight: Tensor) -> bool:
        return weight.dtype == torch.float32 and _lies_in_rows(weight) and not native.refusal()

    def of(self, x: Tensor) -> list[float] | None:
        """``weight @ x`` of x [..., K], one row of bf16 or fp32; None where torch is to do it. Threads that ask at once
        may be given one another's numbers."""
        if x.dtype not in _KINDS or not x.is_cpu or not x.is_contiguous() or x.numel() != self._weight.shape[1]:
            return None
        _multiply(x, self._weight, self._address)
        return self._found.tolist()


def _multiply(x: Tensor, weight: Tensor, y: int) -> None:
    """``y`` is the address of N numbers of the weight's type."""
    rows, columns = weight.shape
    items = -(-rows // ROWS)
    context = array("q", (0, items, rows, columns, x.data_ptr(), weight.data_ptr(), y))
    code, threads = _compiled(x.dtype, weight.dtype), native.threads_for(rows * columns)
    alone = code.locked if native.is_small(rows * columns) else code.alone
    native.run(code.work, alone, context.buffer_info()[0], min(items, threads))


def _lies_in_rows(weight: Tensor) -> bool:
    return weight.dim() == 2 and weight.shape[1] % LANES == 0 and weight.is_cpu and weight.is_contiguous()


def _fits(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and _lies_in_rows(weight)


class _Code(NamedTuple):
    """The address of GEMV, and the same as functions for one thread."""

    work: int
    alone: Callable[[int], None]
    locked: Callable[[int], None]  # keeps Python's lock: to get that back from another thread may take longer


@functools.cache
def _compiled(given: torch.dtype, kept: torch.dtype) -> _Code:
    with native.compiling:
        work = native.here().compile(gemv(_KINDS[given], _KINDS[kept]), GEMV)
    return _Code(work, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work), ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(work))
