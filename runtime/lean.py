"""Import transformers and load models without the parts of torch and other libraries that moetier never uses.

A third of the time and of the memory of importing a model's class goes to torch's compiler, distributed tensors and
libraries that transformers imports wherever they are installed (docs/benchmarks.md, First token). Without them,
transformers can neither compile nor distribute a model in this process. So only moetier's own commands use this module;
``moetier.load`` in a user's program imports transformers unchanged.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .stand_ins import put_stand_ins

# functions of transformers.utils.import_utils that are made to return False
UNUSED = (
    "is_hqq_available",  # imports torch's compiler
    "is_peft_available",
    "is_scipy_available",  # losses of vision models
    "is_sklearn_available",  # drafts by another model
    "is_torch_distributed_available",  # imports torch.distributed.tensor, and with it sympy
    "is_torch_flex_attn_available",  # imports torch's compiler
)


@contextlib.contextmanager
def lean_loading() -> Iterator[None]:
    """Context in which transformers is imported, and models are built and loaded, without the unused parts.

    Modules that were imported before stay as they are.
    """
    if "transformers" not in sys.modules:
        sys.meta_path.insert(0, _After("transformers.utils.import_utils", _lighten))
        put_stand_ins()
    from .meta import MadeOnMeta

    with MadeOnMeta():
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
