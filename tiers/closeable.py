"""Base class of objects with a method ``close``. It has a module of its own because all packages may use it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self


class Closeable(ABC):
    """A context manager that calls ``close`` when the ``with`` block ends."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Release what the object holds. A second call does nothing."""
