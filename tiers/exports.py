"""Lazy exports: names of a package whose modules are imported when a name is first used.

This small module stands alone because packages of tiers and of runtime share it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module


def exports(package: str, homes: dict[str, str]) -> Callable[[str], object]:
    """Make the ``__getattr__`` of a package, which imports an exported name from its module.

    Args:
        package: the package's ``__name__``.
        homes: the exported names; for each, the name of the module in the package that defines it.
    """

    def getattribute(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return getattribute
