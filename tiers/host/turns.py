"""Turns at the loaders: somebody's hundred loads are not before another's one. Pure."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator

from .requests import Load


class Turns:
    """Loads that demands have begun and no loader has taken, by caller."""

    def __init__(self) -> None:
        self._queues: OrderedDict[Hashable, deque[Load]] = OrderedDict()  # last served last

    def __iter__(self) -> Iterator[Load]:
        """Those that are not taken; one that several callers want as often as that."""
        return (load for queue in self._queues.values() for load in queue if not load.is_taken)

    def add(self, caller: Hashable, load: Load) -> None:
        """It comes in the turn of whoever is first, of all that add it."""
        queue = self._queues.get(caller)
        if queue is None:
            # Whoever wants nothing and was served before all who wait may be forgotten: he would come back to the same
            # place. Anybody else would overtake those who wait, again and again.
            while self._queues and not next(iter(self._queues.values())):
                self._queues.popitem(last=False)
            queue = self._queues[caller] = deque()
            self._queues.move_to_end(caller, last=False)
        queue.append(load)

    def take(self) -> Load | None:
        """The first load of the caller who was served the longest ago; None if nobody waits."""
        for caller, queue in self._queues.items():
            while queue:
                load = queue.popleft()
                if not load.is_taken:  # in the turn of another, who wants it too
                    load.is_taken = True
                    self._queues.move_to_end(caller)
                    return load
        return None

    def clear(self) -> None:
        self._queues.clear()

    def take_all(self) -> list[Load]:
        """Each once; all turns are over."""
        left = []
        for load in self:
            load.is_taken = True
            left.append(load)
        self._queues.clear()
        return left
