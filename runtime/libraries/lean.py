"""Import transformers and load models without the parts of torch and other libraries that moetier never uses.

A third of the time and of the memory of importing a model's class goes to torch's compiler, distributed tensors and
libraries that transformers imports wherever they are installed (docs/benchmarks.md, First token). Without them,
transformers can neither compile nor distribute a model in this process. So only moetier's own commands call
``lean_imports``; ``moetier.load`` in a user's program imports transformers unchanged. MOETIER_LEAN=0 turns it off.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from types import ModuleType
from typing import Any

LEAN = "MOETIER_LEAN"  # the variable that turns stand-ins off
COMPILER = "torch._dynamo"
META = "torch._meta_registrations"  # the meta device's operations that are Python code
TRIED = ("2.13.",)  # releases of torch that were found to work without META

# functions of transformers.utils.import_utils that are made to return False
UNUSED = (
    "is_hqq_available",  # imports torch's compiler
    "is_peft_available",
    "is_scipy_available",  # losses of vision models
    "is_sklearn_available",  # drafts by another model
    "is_torch_distributed_available",  # imports torch.distributed.tensor, and with it sympy
    "is_torch_flex_attn_available",  # imports torch's compiler
)
ON_CPU = ("is_accelerate_available",)  # as UNUSED, if there is no other device to put a model on


def is_lean() -> bool:
    """Return whether imports may be replaced, and models built in a quicker way: unless $MOETIER_LEAN is 0."""
    return os.environ.get(LEAN) != "0"


@contextlib.contextmanager
def lean_imports() -> Iterator[None]:
    """Context in which imports and loading take less time and memory. With MOETIER_LEAN=0 it changes nothing.

    Modules that were imported before stay as they are. Python's garbage collector is off in the block, because imports
    create half a million objects that stay in memory, and the collector would visit them again and again.
    """
    if not is_lean():
        yield
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        if "transformers" not in sys.modules:
            sys.meta_path.insert(0, _AfterImport("transformers.utils.import_utils", _lighten))
            put_stand_ins()
        with made_on_meta():
            yield
    finally:
        if was_enabled:
            gc.enable()
        return_freed_memory()


def made_on_meta() -> AbstractContextManager[Any]:
    """Return the context in which models are built on the meta device; with MOETIER_LEAN=0 one without effect."""
    if not is_lean():
        return contextlib.nullcontext()
    from .model_building import MadeOnMeta

    return MadeOnMeta(remove_stand_ins)


def return_freed_memory() -> None:
    """Give memory that was freed, and that the allocator keeps, back to the kernel."""
    with contextlib.suppress(AttributeError):  # only glibc has malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def _lighten(utils: Any) -> None:
    """Make the functions UNUSED return False, and let transformers search its folders only for names that are used."""
    import torch

    from .transformers_internals import search_later

    for name in (*UNUSED, *(() if torch.accelerator.is_available() else ON_CPU)):
        setattr(utils, name, lambda *_, **__: False)
    search_later(utils)


class _AfterImport(MetaPathFinder):
    """Calls ``then`` with the module ``name`` once it was imported. Finds it as others do, and wraps its loader."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._then = then

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Return another finder's spec of the module, with a loader that also calls ``then``."""
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        if (spec := importlib.util.find_spec(name)) is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._then(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def put_stand_ins() -> None:
    """Import torch with a stand-in for META, and put stand-ins for the compiler, unless these were imported before."""
    if "torch" not in sys.modules and version("torch").startswith(TRIED):
        _StandIn(META)
        import torch
        from torch._opaque_base import OpaqueBaseMeta

        torch._C._set_generator_metaclass(OpaqueBaseMeta)  # torch.Generator needs it, and META would do it
    if COMPILER not in sys.modules:
        _StandIn(COMPILER, allow_in_graph=_same, assume_constant_result=_same, disable=_same)
        _StandIn(f"{COMPILER}._trace_wrapped_higher_order_op", TransformGetItemToIndex=_indexing)


def remove_stand_ins() -> bool:
    """Import META, and let the next use of the compiler import it. Return whether there were stand-ins."""
    stand_ins = [name for name, module in sys.modules.items() if isinstance(module, _StandIn)]
    for name in stand_ins:
        del sys.modules[name]
    if META in stand_ins:
        importlib.import_module(META)
    return bool(stand_ins)


class _StandIn(ModuleType):
    """Stand-in for a module of torch, with the few names that transformers uses while it is imported.

    These are decorators that mark functions for the compiler, and a class. Any other name imports the real module.
    """

    def __init__(self, name: str, **attributes: Any) -> None:
        super().__init__(name)
        vars(self).update(attributes)
        sys.modules[name] = self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and (name, self.__name__) != ("__path__", COMPILER):
            raise AttributeError(name)  # code that only inspects all modules does not need the real one
        remove_stand_ins()
        return getattr(importlib.import_module(self.__name__), name)


def _same(function: Any = None, *_: Any, **__: Any) -> Any:
    """Return ``function`` unchanged. If it is None, as in ``@_same(option=1)``, return this decorator."""
    return _same if function is None else function


def _indexing() -> Any:
    """Return the context manager in which vmap may index with a scalar, as only masks of unusual models do."""
    remove_stand_ins()
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    return TransformGetItemToIndex()
