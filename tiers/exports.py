"""Lazy exports: a package offers names that its modules define, and imports a module only when such a name is used.

The function is in a module of its own because packages of ``tiers`` and of ``runtime`` use it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module


def exports(package: str, homes: dict[str, str]) -> Callable[[str], object]:
    """Return a ``__getattr__`` for a package. When a name is first used, it imports the module that defines the name.

    Args:
        package: the package's ``__name__``.
        homes: a dictionary from each exported name to the package's module that defines the name.
    """

    def getattribute(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return getattribute
