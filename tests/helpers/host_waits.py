"""Counts what would make the host wait for a device: reads of values, and of numbers of values, on a CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

WAITS = frozenset(
    [
        *("item", "tolist", "cpu", "numpy", "cuda", "__bool__", "__int__", "__float__", "__index__", "__contains__"),
        *("nonzero", "argwhere", "unique", "unique_consecutive", "bincount", "masked_select", "repeat_interleave"),
        *("equal", "allclose", "is_nonzero"),
    ]
)


class HostWaits(TorchFunctionMode):
    """``counts`` by name of function."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name, given = getattr(function, "__name__", ""), [*args, *(kwargs or {}).values()]
        moves = name == "to" and any(isinstance(value, torch.device | str) for value in given)
        counts = (name in ("__getitem__", "__setitem__") and any(map(_is_mask, _flat(args[1])))) or (
            name == "where" and len(given) == 1
        )
        if name in WAITS or moves or counts:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def _flat(index: Any) -> Sequence[Any]:
    return index if isinstance(index, tuple | list) else (index,)


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
