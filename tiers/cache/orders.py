"""In which order the records of one group are evicted. Pure.

A demand for more records than a group has slots is a *passage*: the group can't keep what it brings. A prefill is one
where few experts of a block are cached.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from math import inf, log2
from typing import Protocol

from moetier.tiers.layout import ExpertKey

HALF_LIFE = 30  # uses


class Order(Protocol):
    """What ``policy.py`` asks. A key is in it from ``add`` to ``remove``; ``passing``: it is used in a passage."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[ExpertKey]: ...

    def victims(self, *, passing: bool) -> Iterator[ExpertKey]:
        """From the one that is evicted first. A passage may be given fewer than all, so that it leaves the others."""

    def add(self, key: ExpertKey, *, passing: bool) -> None:
        """Its record is being loaded. If that is for a demand, ``touch`` follows."""

    def touch(self, key: ExpertKey, *, passing: bool) -> None:
        """It is used, or about to be."""

    def put_first(self, key: ExpertKey) -> None:
        """It is evicted before whatever was used, as nobody has used it yet."""

    def remove(self, key: ExpertKey) -> None: ...


class Recency:
    """Least recently used first, in a passage too."""

    def __init__(self, quota: int) -> None:
        self._keys: OrderedDict[ExpertKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[ExpertKey]:
        return iter(self._keys)

    def victims(self, *, passing: bool) -> Iterator[ExpertKey]:
        return iter(self._keys)

    def add(self, key: ExpertKey, *, passing: bool) -> None:
        self._keys[key] = None

    def touch(self, key: ExpertKey, *, passing: bool) -> None:
        self._keys.move_to_end(key)

    def put_first(self, key: ExpertKey) -> None:
        self._keys.move_to_end(key, last=False)

    def remove(self, key: ExpertKey) -> None:
        del self._keys[key]


class ScanResistant:
    """Recency that a passage does not disturb.

    What a passage brings is evicted before all else, what it finds stays where it is, and once ``room`` records are in
    passing it evicts those alone. A record in passing stays when anybody else uses it.
    """

    def __init__(self, quota: int) -> None:
        self.room = max(2, quota // 8)  # enough reads in flight for a passage to be quick, few enough to lose little
        self._passing: OrderedDict[ExpertKey, None] = OrderedDict()
        self._settled: OrderedDict[ExpertKey, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._passing) + len(self._settled)

    def __iter__(self) -> Iterator[ExpertKey]:
        return chain(self._passing, self._settled)

    def victims(self, *, passing: bool) -> Iterator[ExpertKey]:
        return iter(self._passing) if passing and len(self._passing) >= self.room else iter(self)

    def add(self, key: ExpertKey, *, passing: bool) -> None:
        if passing:
            self._passing[key] = None
        else:
            self._settled[key] = 0.0

    def touch(self, key: ExpertKey, *, passing: bool) -> None:
        if not passing:
            self._passing.pop(key, None)
            self._settled[key] = 0.0
            self._settled.move_to_end(key)

    def put_first(self, key: ExpertKey) -> None:
        self._settled.move_to_end(key, last=False)

    def remove(self, key: ExpertKey) -> None:
        if key in self._passing:
            del self._passing[key]
        else:
            del self._settled[key]


class Frequency(ScanResistant):
    """Least often used first, where a use counts half as much after ``HALF_LIFE`` others of its group; a passage
    disturbs it as little as it does recency, and what was evicted comes back with the uses it had.

    LRFU (Lee et al. 2001, "LRFU: a spectrum of policies that subsumes the least recently used and least frequently used
    policies", IEEE Transactions on Computers 50(12)). Two records that are not used keep their order, so what is kept
    is the logarithm of each one's count as of the group's first use.
    """

    def __init__(self, quota: int) -> None:
        super().__init__(quota)
        self._uses = 0
        self._counts: dict[ExpertKey, float] = {}  # log2, of all that were ever used

    def __iter__(self) -> Iterator[ExpertKey]:
        return chain(self._passing, sorted(self._settled, key=self._settled.__getitem__))

    def add(self, key: ExpertKey, *, passing: bool) -> None:
        super().add(key, passing=passing)
        if not passing:
            self._settled[key] = self._counts.get(key, -inf)

    def touch(self, key: ExpertKey, *, passing: bool) -> None:
        super().touch(key, passing=passing)
        if not passing:
            self._uses += 1
            now, before = self._uses / HALF_LIFE, self._counts.get(key, -inf)
            self._counts[key] = self._settled[key] = now + log2(1.0 + 2.0 ** (before - now))

    def put_first(self, key: ExpertKey) -> None:
        super().put_first(key)
        self._settled[key] = -inf


# name -> of a quota
ORDERS: Mapping[str, Callable[[int], Order]] = {"lru": Recency, "scan": ScanResistant, "lrfu": Frequency}
DEFAULT_ORDER = "lrfu"
