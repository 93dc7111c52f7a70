"""Numbers of free pages.

A sequence gets pages with consecutive numbers where it can: others are copied where compiled attention does not read
them.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby


class FreePages:
    """Set of free pages."""

    def __init__(self, count: int) -> None:
        """All of ``count`` pages are free."""
        self._is_free = [True] * count
        self._count = count

    def __len__(self) -> int:
        return self._count

    def take(self, count: int, last: int | None) -> list[int]:
        """Take ``count`` pages, of which there are enough: those after page ``last`` if they are free."""
        pages = list[int]()
        for _ in range(count):
            page = self._begin() if last is None else last + 1
            if page >= len(self._is_free) or not self._is_free[page]:
                page = self._begin()
            self._is_free[page] = False
            self._count -= 1
            pages.append(page)
            last = page
        return pages

    def take_last(self, count: int) -> list[int]:
        """Take ``count`` pages, of which there are enough: those with the highest numbers, consecutive or not."""
        pages = [page for page, is_free in enumerate(self._is_free) if is_free][-count:]
        for page in pages:
            self._is_free[page] = False
        self._count -= count
        return pages

    def release(self, pages: Iterable[int]) -> None:
        """Let pages be taken again."""
        for page in pages:
            assert not self._is_free[page]
            self._is_free[page] = True
            self._count += 1

    def _begin(self) -> int:
        """Return the page at which to begin: in the middle of the longest run of free pages.

        The sequence before these may continue in the first half of them.
        """
        longest, begin, at = 0, 0, 0
        for is_free, run in groupby(self._is_free):
            length = len([*run])
            if is_free and length > longest:
                longest, begin = length, at
            at += length
        return begin + longest // 2 if begin else 0
