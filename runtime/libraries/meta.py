"""Building of models on torch's meta device, where tensors have a shape and a type but no numbers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .torch_stand_ins import is_lean, remove_stand_ins


def made_on_meta() -> AbstractContextManager[Any]:
    """Return the context in which models are built on the meta device; with MOETIER_LEAN=0 one without effect."""
    return MadeOnMeta() if is_lean() else nullcontext()


class MadeOnMeta(TorchFunctionMode):
    """Build models on the meta device without torch's Python code for that device, because it imports sympy.

    Random initialisation is skipped on the meta device. Arithmetic on small tensors there, such as the angles of
    positions, is done on the CPU with ones, only to find the shape and type of the result.
    """

    DRAWN = frozenset(("kaiming_uniform_", "normal_", "uniform_"))
    ARITHMETIC = frozenset(
        ("add", "clamp", "div", "mul", "neg", "outer", "pow", "reciprocal", "sub", "__rdiv__", "__rpow__", "__rsub__")
    )
    FEW = 1 << 20

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``function``, or do its work in a way that needs no Python code of torch for the meta device."""
        given = kwargs or {}
        name = getattr(function, "__name__", "")
        first: Any = args[0] if args else given.get("tensor")
        on_meta = isinstance(first, torch.Tensor) and first.is_meta
        if on_meta and name in self.DRAWN:
            return first
        if on_meta and function is torch.empty_like and given.keys() <= {"device", "dtype"}:
            return torch.empty(first.shape, **{"dtype": first.dtype, "device": "meta"} | given)
        if on_meta and name in self.ARITHMETIC and not given and all(map(self._is_small, args)):
            return self._meta(function(*map(self._ones, args)))
        if function is torch.arange:
            device = given.get("device") or torch.get_default_device()
            if torch.device(device).type == "meta":
                return self._meta(function(*args, **given | {"device": "cpu"}))
        try:
            return function(*args, **given)
        except NotImplementedError:  # torch lacks the operation: its Python code has it, which was left out
            if not remove_stand_ins():
                raise
            return function(*args, **given)

    def _is_small(self, value: Any) -> bool:
        return not isinstance(value, torch.Tensor) or (value.is_meta and value.numel() <= self.FEW)

    def _ones(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return torch.ones(value.shape, dtype=value.dtype, device="cpu")

    def _meta(self, value: torch.Tensor) -> torch.Tensor:
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
