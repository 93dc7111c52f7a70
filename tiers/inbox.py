"""A queue for one thread that waits with a timeout, whatever signals come meanwhile.

The queues of Python's ``queue`` don't suit the main thread, which handles signals. In Python 3.11, a SimpleQueue waits
for ever if a signal comes just before its timeout is over. A Queue stays locked, or misses an item, if the handler of a
signal raises at the wrong moment, as Ctrl-C does.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from queue import Empty
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Inbox(Generic[Item]):
    """An unbounded queue. Any thread may put items into it; one thread at a time gets them, in their order."""

    def __init__(self) -> None:
        self._items = deque[Item]()
        self._arrived = threading.Lock()  # held while nothing has been put since it was last acquired
        self._arrived.acquire()

    def put(self, item: Item) -> None:
        """Append an item, and wake the thread that waits."""
        self._items.append(item)
        with contextlib.suppress(RuntimeError):  # it is free: the thread is awake, and looks for items before it waits
            self._arrived.release()

    def get(self, timeout: float) -> Item:
        """Remove and return the oldest item. Raises ``queue.Empty`` if there is none within ``timeout`` seconds.

        It may wait a second time, after an item that an earlier call has returned.
        """
        while True:
            with contextlib.suppress(IndexError):
                return self._items.popleft()
            if not self._arrived.acquire(timeout=timeout):
                raise Empty
