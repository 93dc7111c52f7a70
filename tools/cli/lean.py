"""Import transformers and load models without the parts of torch and other libraries that moetier never uses.

A third of the time and of the memory of importing a model's class goes to torch's compiler, distributed tensors and
libraries that transformers imports wherever they are installed (docs/benchmarks.md, First token). Without them,
transformers can neither compile nor distribute a model in this process. So only moetier's own commands use this module;
``moetier.load`` in a user's program imports transformers unchanged. MOETIER_LEAN=0 turns it off.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from moetier.runtime.libraries.torch_stand_ins import is_lean, put_stand_ins

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
            sys.meta_path.insert(0, _After("transformers.utils.import_utils", _lighten))
            put_stand_ins()
        from moetier.runtime.libraries.meta import made_on_meta

        with made_on_meta():
            yield
    finally:
        if was_enabled:
            gc.enable()
        return_freed_memory()


def return_freed_memory() -> None:
    """Give memory that was freed, and that the allocator keeps, back to the kernel."""
    with contextlib.suppress(AttributeError):  # only glibc has malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def _lighten(utils: Any) -> None:
    """Make the functions UNUSED return False, and let transformers search its folders only for names that are used."""
    import torch

    from moetier.runtime.libraries.transformers_internals import search_later

    for name in (*UNUSED, *(() if torch.accelerator.is_available() else ON_CPU)):
        setattr(utils, name, lambda *_, **__: False)
    search_later(utils)


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
        if (spec := importlib.util.find_spec(name)) is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._then(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
