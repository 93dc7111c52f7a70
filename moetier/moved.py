"""Former names of modules, for one release: importing one gives the module of today, with a warning."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {  # those that docs/api.md has named
    "moetier.runtime.address": "moetier.runtime.wire",
    "moetier.runtime.tiers": "moetier.runtime.model",
    "moetier.tiers.keys": "moetier.tiers.layout",
    "moetier.tiers.views": "moetier.tiers.device",
    "moetier.tiers.writer": "moetier.tiers.store",
}


class Moved:
    """Finder and loader of ``sys.meta_path``."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, cls) if name in MOVED else None  # type: ignore[arg-type]  # a loader of two methods

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        return None

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        new = MOVED[module.__name__]
        warnings.warn(
            f"{module.__name__} is now {new}; the old name goes with the next release.", DeprecationWarning, 2
        )
        sys.modules[module.__name__] = import_module(new)
