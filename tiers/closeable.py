"""Base of classes that have ``close``. It is a module of its own because every package of moetier may use it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self


class Closeable(ABC):
    """An object that can be used as a context manager: leaving the ``with`` block calls ``close``."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Release what the object holds. Idempotent."""
