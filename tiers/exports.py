"""Names that a package exports from its modules, which are imported when a name is first used."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module


def exports(package: str, homes: dict[str, str]) -> Callable[[str], object]:
    """Return a ``__getattr__`` for a package.

    Args:
        package: the package's ``__name__``.
        homes: exported name -> the module beneath the package that defines it.
    """

    def getattribute(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return getattribute
