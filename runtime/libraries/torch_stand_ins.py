"""Stand-ins for modules of torch that are seldom used and take long to import. The first use imports the module."""

from __future__ import annotations

import importlib
import os
import sys
from importlib.metadata import version
from types import ModuleType
from typing import Any

LEAN = "MOETIER_LEAN"  # the variable that turns stand-ins off
COMPILER = "torch._dynamo"
META = "torch._meta_registrations"  # the meta device's operations that are Python code
TRIED = ("2.13.",)  # releases of torch that were found to work without META


def is_lean() -> bool:
    """Return whether imports may be replaced, and models built in a quicker way: unless $MOETIER_LEAN is 0."""
    return os.environ.get(LEAN) != "0"


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
