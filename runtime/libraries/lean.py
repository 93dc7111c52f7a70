"""Import transformers and load models without the parts of torch and other libraries that moetier never uses.

A third of the time and of the memory of importing a model's class goes to torch's compiler, distributed tensors and
libraries that transformers imports wherever they are installed (docs/benchmarks.md, First token). Without them,
transformers can neither compile nor distribute a model in this process. So only moetier's own commands use this module;
``moetier.load`` in a user's program imports transformers unchanged.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
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
WITHOUT_GPU = ("is_accelerate_available",)  # as UNUSED, if there is no GPU to put a model on


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
    """Make the functions UNUSED return False, and let transformers search its folders only for names that are used."""
    import torch

    for name in (*UNUSED, *(() if torch.cuda.is_available() else WITHOUT_GPU)):
        setattr(utils, name, lambda *_, **__: False)
    with contextlib.suppress(AttributeError):  # another patch release may lack these
        _search_later(utils, utils.define_import_structure, utils._LazyModule)


def _search_later(utils: Any, search: Callable[..., Any], lazy_module: Any) -> None:
    """Search the folder of a model when a name is used that begins with the folder's, and all for any other name.

    transformers would search 560 folders, twice, whenever it is imported.

    Args:
        utils: the module that transformers takes ``search`` and ``lazy_module`` from.
        search: returns the names in a folder, for an object of ``lazy_module``.
        lazy_module: the class of transformers and of its packages.
    """

    class Structure(dict[Any, Any]):
        """No names yet. ``left`` has a prefix for modules, and the folders in which there are names."""

        left: tuple[str, list[Path]] = "", []

    def search_later(path: str | Path, prefix: str | None = None) -> Any:
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        if folder.name != "models":
            return search(path, prefix=prefix)
        found = Structure({frozenset(): {prefix: set()} if prefix else {}})
        folders = [each for each in folder.iterdir() if each.suffix != ".py" and each.name != "__pycache__"]
        found.left = f"{prefix}." if prefix else "", folders
        return found

    class LazyModule(lazy_module):  # type: ignore[misc]
        def __init__(self, name: str, file: str, structure: Any, *more: Any, **named: Any) -> None:
            super().__init__(name, file, structure, *more, **named)
            self._prefix, self._left = structure.left if isinstance(structure, Structure) else ("", [])

        def __getattr__(self, name: str) -> Any:
            if self._left and not name.startswith("_") and not self._knows(name):
                plain = name.lower().replace("_", "")
                self._search([each for each in self._left if plain.startswith(each.name.replace("_", ""))])
                # a module beside this one may be yet to be imported
                if not self._knows(name) and f"{name}.py" not in os.listdir(Path(self.__file__).parent):  # noqa: PTH208
                    self._search(self._left)
            return super().__getattr__(name)

        def _knows(self, name: str) -> bool:
            """Return whether a name has been found, or the tokenizer for which it is another name."""
            known = (self._class_to_module, self._modules, self._objects, self._object_missing_backend)
            return any(each in names for each in (name, name.removesuffix("Fast")) for names in known)

        def __dir__(self) -> list[str]:
            self._search(self._left)
            return [*super().__dir__()]

        def _search(self, folders: list[Path]) -> None:
            for folder in folders:
                found = search(folder, prefix=f"{self._prefix}{folder.name}")
                other = vars(lazy_module(self.__name__, self.__file__, found))
                self.__all__ += other["__all__"]
                self._modules |= other["_modules"]
                for kind in ("_class_to_module", "_object_missing_backend", "_import_structure"):
                    vars(self)[kind].update(other[kind])
            searched = {*folders}  # another thread may have searched some, too
            self._left = [folder for folder in self._left if folder not in searched]

    utils.define_import_structure, utils._LazyModule = search_later, LazyModule


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
