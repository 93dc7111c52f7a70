"""Products of one row with the matrices of a trunk that are not quantised: a router's, and all of one of 16 bits.

torch gives such a product of bf16 to oneDNN, which takes up to 2.7 times as long (docs/benchmarks.md, "One row"); with
fp32 there is nothing to gain.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import native
from .gemv import GEMV, LANES, ROWS, gemv


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
    if x.dtype != torch.bfloat16 or not x.is_cpu or not _fits(weight) or torch.is_grad_enabled():
        return None
    rows, columns = weight.shape
    if x.numel() != columns or x.shape[-1] != columns:
        return None
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], rows), dtype=x.dtype)
    items = -(-rows // ROWS)
    context = array("q", (0, items, rows, columns, x.data_ptr(), weight.data_ptr(), y.data_ptr()))
    work, alone = _compiled()
    native.run(work, alone, context.buffer_info()[0], min(items, native.threads_for(rows * columns)))
    return y if bias is None else y.add_(bias)


def _fits(weight: Tensor) -> bool:
    return (
        weight.dtype == torch.bfloat16
        and weight.dim() == 2
        and weight.shape[1] % LANES == 0
        and weight.is_cpu
        and weight.is_contiguous()
    )


@functools.cache
def _compiled() -> tuple[int, Callable[[int], None]]:
    """The address of GEMV, and the same as a function."""
    with native.compiling:
        work = native.here().compile(gemv(), GEMV)
    return work, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work)
