"""Building of models: on torch's meta device, and not while others in the same process compute.

On the meta device tensors have a shape and a type but no numbers, so a model takes no memory there.

While transformers builds a model, torch's default type of numbers is that of the model, for all threads. A model that
computes at that moment could make tensors of the wrong type. So models are built only while no engine computes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class ModelBuilding:
    """Keeps the building of models and computations apart. Builders go first. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards: ``_computing``, ``_waiting``, ``_builder``
        self._computing: set[int] = set()  # threads that compute
        self._waiting: set[int] = set()  # threads that build, or wait for it
        self._builder: int | None = None  # thread that builds

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Compute in this context, which a thread must not enter again in it. Waits for builders."""
        own = threading.get_ident()
        try:
            self._begin_computing(own)
            yield
        finally:
            with self._changed:  # in place, as an exception from outside may come when a function is called
                self._computing.discard(own)
                self._changed.notify_all()

    def let_build(self) -> None:
        """Let builders go first that wait. Called between two parts of a long computation, in ``computing``."""
        if self._waiting:
            own = threading.get_ident()
            with self._changed:
                self._computing.discard(own)
                self._changed.notify_all()
            self._begin_computing(own)

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Build a model in this context. Waits for computations; a model may be built within another."""
        own = threading.get_ident()
        if self._builder == own:
            yield
            return
        try:
            with self._changed:
                self._waiting.add(own)
                self._changed.wait_for(lambda: not self._computing and self._builder is None)
                self._builder = own
            yield
        finally:
            with self._changed:
                if self._builder == own:
                    self._builder = None
                self._waiting.discard(own)
                self._changed.notify_all()

    def _begin_computing(self, own: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)
            self._computing.add(own)


BUILDING = ModelBuilding()  # of this process


class MadeOnMeta(TorchFunctionMode):
    """Build models on the meta device without torch's Python code for that device, because it imports sympy.

    Random initialisation is skipped on the meta device. Arithmetic on small tensors there, such as the angles of
    positions, is done on the CPU with ones, only to find the shape and type of the result.

    If an operation is missing, ``complete`` is called, and may import that code. If it returns True, the operation is
    tried again.
    """

    DRAWN = frozenset(("kaiming_uniform_", "normal_", "uniform_"))
    ARITHMETIC = frozenset(
        ("add", "clamp", "div", "mul", "neg", "outer", "pow", "reciprocal", "sub", "__rdiv__", "__rpow__", "__rsub__")
    )
    FEW = 1 << 20

    def __init__(self, complete: Callable[[], bool]) -> None:
        super().__init__()
        self._complete = complete

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
            if not self._complete():
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
