"""Objects with a method ``close``, and descriptors of files. All packages may use this module."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol, Self, TypeVar


class Closeable(ABC):
    """A context manager that calls ``close`` when the ``with`` block ends."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Release what the object holds. A second call does nothing."""


class HasClose(Protocol):
    """Type of an object with a method ``close``."""

    def close(self) -> object:
        """Release what the object holds."""


Opened = TypeVar("Opened", bound=HasClose)


@contextlib.contextmanager
def closed_on_error(opened: Opened) -> Iterator[Opened]:
    """Yield ``opened`` for a ``with`` block, and close it if the block raises."""
    try:
        yield opened
    except BaseException:
        opened.close()
        raise


@contextlib.contextmanager
def descriptor_closed_on_error(descriptor: int) -> Iterator[None]:
    """Close the descriptor of a file if the ``with`` block raises."""
    try:
        yield
    except BaseException:
        os.close(descriptor)
        raise
