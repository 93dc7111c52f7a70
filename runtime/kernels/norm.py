"""RMS norms on a CPU in one pass: torch takes seven operations, of which each costs more than its numbers do."""

from __future__ import annotations

import ctypes
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import jit as native
from .form import Number
from .normal import LANES, NORM, Scale, norm

_NUMBERS = {torch.float32: Number.F32, torch.bfloat16: Number.BF16}
_EPS = ("variance_epsilon", "eps")  # what modules call it
# sums in another order may round a number in some hundreds another way
_EQUAL = {torch.float32: (0.0, 1e-5), torch.bfloat16: (0.98, 1e-2)}


class QuickNorm:
    """What the class of an RMS norm gets before itself. With gradients, and with what it is not made for, the module
    computes as it did."""

    quick_scale: Scale
    quick_eps: str
    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., K] in its type."""
        y = None
        if not torch.is_grad_enabled():
            y = rms_norm(x, self.weight, getattr(self, self.quick_eps), self.quick_scale)
        return super().forward(x) if y is None else y  # type: ignore[misc]


def use_quick_norms(model: nn.Module) -> None:
    """For each norm of which a trial shows that it is one of those in ``Scale``."""
    for module in model.modules():
        if "RMSNorm" in type(module).__name__ and (found := _trial(module)) is not None:
            module.__class__ = _quick(type(module), *found)  # type: ignore[arg-type] # classes have a hash


def rms_norm(x: Tensor, weight: Tensor, eps: float, scale: Scale) -> Tensor | None:
    """x [..., K], weight [K], both of fp32 or both of bf16 -> [..., K]; None where torch is to do it."""
    columns = x.shape[-1]
    if (
        x.dtype != weight.dtype
        or x.dtype not in _NUMBERS
        or weight.shape != (columns,)
        or columns % LANES
        or not (x.is_cpu and weight.is_cpu and x.is_contiguous() and weight.is_contiguous())
    ):
        return None
    y = torch.empty_like(x)
    code = _compiled(_NUMBERS[x.dtype], scale)
    code(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // columns if columns else 0, columns, eps)
    return y


def _trial(module: Any) -> tuple[Scale, str] | None:
    """How it multiplies, and what it calls its eps, if some numbers show that it does what is computed here."""
    if len(inspect.signature(type(module).forward).parameters) != 2:  # with a gate it is another function than without
        return None
    eps = next((name for name in _EPS if isinstance(getattr(module, name, None), float)), None)
    weight = module._parameters.get("weight")
    if eps is None or weight is None or len(module._parameters) != 1 or weight.dtype not in _EQUAL or weight.dim() != 1:
        return None
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    share, near = _EQUAL[weight.dtype]
    with torch.no_grad():
        try:
            wanted = module(x)
        except Exception:  # whatever it wants besides: it stays as it is
            return None
        for scale in Scale:
            found = rms_norm(x, weight, getattr(module, eps), scale)
            if (
                found is not None
                and found.dtype == wanted.dtype
                and torch.allclose(found, wanted, rtol=near, atol=near / 10)
                and (found == wanted).float().mean() >= share
            ):
                return scale, eps
    return None


@functools.cache
def _quick(kind: type, scale: Scale, eps: str) -> type:
    own = {"quick_scale": scale, "quick_eps": eps, "__module__": kind.__module__}
    return type(kind.__name__, (QuickNorm, kind), own)


@functools.cache
def _compiled(number: Number, scale: Scale) -> Callable[..., None]:
    with native.compiling:
        address = native.here().compile(norm(number, scale), NORM)
    shape = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 2, ctypes.c_float)
    return shape(address)
