"""Base of classes that have ``close``. Apart, as every layer of moetier may use it."""

from __future__ import annotations

from typing import Self


class Closeable:
    """An object that ``with`` closes at its end."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release what the object holds. Idempotent."""
        raise NotImplementedError
