"""What callers wish for beforehand and has not begun yet. Pure; wishers are whatever the owner tells apart."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Generic, TypeVar

from moetier.tiers.layout import ExpertKey

Place = TypeVar("Place")  # where a block's records go


class Wishes(Generic[Place]):
    """Each wisher's latest for each block."""

    def __init__(self) -> None:
        self._waiting: dict[Hashable, dict[int, tuple[Place, deque[ExpertKey]]]] = {}  # not begun; by wisher, by block
        self._latest: dict[int, dict[Hashable, frozenset[ExpertKey]]] = {}  # begun or not; by block, by wisher

    def __len__(self) -> int:
        """How many have not begun."""
        return sum(len(keys) for blocks in self._waiting.values() for _, keys in blocks.values())

    def __contains__(self, key: ExpertKey) -> bool:
        """Whether anybody's latest wishes name it, begun or not."""
        return any(key in wishes for wishes in self._latest.get(key.block, {}).values())

    def replace(
        self, wisher: Hashable, block: int, place: Place, keys: Sequence[ExpertKey], absent: Sequence[ExpertKey]
    ) -> int:
        """A wisher's wishes for a block are these from now on; of them, those that are ``absent`` are to begin. How
        many were given up that had not begun."""
        latest = self._latest.get(block)
        if latest is not None and latest.pop(wisher, None) is not None and not latest:
            del self._latest[block]
        blocks = self._waiting.setdefault(wisher, {})
        _, waiting = blocks.pop(block, (place, deque[ExpertKey]()))
        if keys:
            self._latest.setdefault(block, {})[wisher] = frozenset(keys)
        if absent:
            blocks[block] = (place, deque(dict.fromkeys(absent)))
        if not blocks:
            del self._waiting[wisher]
        return sum(key not in keys for key in waiting)

    def withdraw(self, wisher: Hashable) -> int:
        """All of a wisher's. How many of them had not begun."""
        given_up = self._waiting.pop(wisher, {})
        for block in list(self._latest):
            self._latest[block].pop(wisher, None)
            if not self._latest[block]:
                del self._latest[block]
        return sum(len(keys) for _, keys in given_up.values())

    def clear(self) -> None:
        self._waiting.clear()
        self._latest.clear()

    def take(self, may: Callable[[Place], bool]) -> Iterator[tuple[Hashable, Place, ExpertKey]]:
        """Takes those whose place ``may`` get records, one by one, with their wishers: wishers by turns, each one's
        blocks in the order of their coming."""
        for wisher, blocks in list(self._waiting.items()):
            for block, (place, keys) in list(blocks.items()):
                if not may(place):
                    continue
                while keys:
                    yield wisher, place, keys.popleft()
                del blocks[block]
            if not blocks:
                del self._waiting[wisher]

    def served(self, wisher: Hashable) -> None:
        """One of his has begun: it is everybody else's turn before his."""
        if (blocks := self._waiting.pop(wisher, None)) is not None:
            self._waiting[wisher] = blocks
