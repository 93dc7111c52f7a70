"""Import transformers and load models without the parts of torch and other libraries that moetier never uses.

A third of the time and of the memory of importing a model's class goes to torch's compiler, distributed tensors and
libraries that transformers imports wherever they are installed (docs/benchmarks.md, First token). Without them,
transformers can neither compile nor distribute a model in this process. So only moetier's own commands use this module;
``moetier.load`` in a user's program imports transformers unchanged.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# functions of transformers.utils.import_utils that are made to return False
UNUSED = (
    "is_hqq_available",  # imports torch's compiler
    "is_peft_available",
    "is_scipy_available",  # losses of vision models
    "is_sklearn_available",  # drafts by another model
    "is_torch_distributed_available",  # imports torch.distributed.tensor, and with it sympy
    "is_torch_flex_attn_available",  # imports torch's compiler
)
_COMPILER = "torch._dynamo"


@contextlib.contextmanager
def lean_loading() -> Iterator[None]:
    """Context in which transformers is imported, and models are built and loaded, without the unused parts.

    Modules that were imported before stay as they are.
    """
    if "transformers" not in sys.modules:
        sys.meta_path.insert(0, _After("transformers.utils.import_utils", _lighten))
        if _COMPILER not in sys.modules:
            _StandIn(_COMPILER, allow_in_graph=_same, assume_constant_result=_same, disable=_same)
            _StandIn(f"{_COMPILER}._trace_wrapped_higher_order_op", TransformGetItemToIndex=_indexing)
    with _MadeOnMeta():
        yield


def _lighten(utils: Any) -> None:
    """Make the functions UNUSED return False, and speed up transformers' search for the names in its own folders."""
    for name in UNUSED:
        setattr(utils, name, lambda *_, **__: False)
    with contextlib.suppress(AttributeError):  # another patch release may lack these functions
        # transformers searches 560 folders twice, with a cache for 128
        search = utils.create_import_structure_from_path.__wrapped__
        utils.create_import_structure_from_path = functools.cache(search)
        # transformers searches all lines of a file; only the last that begins with __all__ counts
        fetch = utils.fetch__all__
        utils.fetch__all__ = lambda text: fetch(text[text.rfind("\n__all__") + 1 :])


class _After(MetaPathFinder):
    """Finder that calls ``then`` with the module called ``name`` once that module has been imported."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._then = then

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Return another finder's spec of the module, with a loader that also calls ``then``."""
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._then(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class _StandIn(ModuleType):
    """Stand-in for a module of torch's compiler, with the few names that transformers uses while it is imported.

    These are decorators that mark functions for the compiler, and a class. Any other name imports the real module.
    """

    def __init__(self, name: str, **known: Any) -> None:
        super().__init__(name)
        vars(self).update(known)
        sys.modules[name] = self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and (name, self.__name__) != ("__path__", _COMPILER):
            raise AttributeError(name)  # code that only inspects all modules does not need the real one
        _remove_stand_ins()
        return getattr(importlib.import_module(self.__name__), name)


def _remove_stand_ins() -> None:
    for name in [name for name, module in sys.modules.items() if isinstance(module, _StandIn)]:
        del sys.modules[name]


def _same(function: Any = None, *_: Any, **__: Any) -> Any:
    """Return ``function`` unchanged. If it is None, as in ``@_same(option=1)``, return this decorator."""
    return _same if function is None else function


def _indexing() -> Any:
    """Return the context manager in which vmap may index with a scalar, as only masks of unusual models do."""
    _remove_stand_ins()
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    return TransformGetItemToIndex()


class _MadeOnMeta(TorchFunctionMode):
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
        return function(*args, **given)

    def _is_small(self, value: Any) -> bool:
        return not isinstance(value, torch.Tensor) or (value.is_meta and value.numel() <= self.FEW)

    def _ones(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return torch.ones(value.shape, dtype=value.dtype, device="cpu")

    def _meta(self, value: torch.Tensor) -> torch.Tensor:
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
