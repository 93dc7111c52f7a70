"""Eviction orders of the records of one group. All of this is pure.

A demand for more records than its group has slots is a *scan*: the group can't keep what it loads. A prefill is a scan
where few experts of a block are cached.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from math import inf, log2
from typing import Protocol

from moetier.tiers.layout import ExpertKey

HALF_LIFE = 30  # uses of the group after which a use counts half as much


class Order(Protocol):
    """Eviction order of the keys of one group. A key is in it from ``add`` to ``remove``.

    ``scan`` says that the key is used by a scan.
    """

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[ExpertKey]: ...

    def victims(self, *, scan: bool) -> Iterator[ExpertKey]:
        """Keys, the first victim first. For a scan they may be fewer than all: it must leave the others alone."""

    def add(self, key: ExpertKey, *, scan: bool) -> None:
        """Add a key whose record is being loaded. If the load is for a demand, ``touch`` follows."""

    def touch(self, key: ExpertKey, *, scan: bool) -> None:
        """Note that the key is used or about to be."""

    def demote(self, key: ExpertKey) -> None:
        """Make the key the first victim: a prefetch has loaded it and it is not used yet."""

    def remove(self, key: ExpertKey) -> None:
        """Remove a key that has lost its slot."""


class Recency:
    """Evict the least recently used key first, for scans too."""

    def __init__(self, quota: int) -> None:
        self._keys: OrderedDict[ExpertKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[ExpertKey]:
        return iter(self._keys)

    def victims(self, *, scan: bool) -> Iterator[ExpertKey]:
        """All keys, the least recently used first."""
        return iter(self._keys)

    def add(self, key: ExpertKey, *, scan: bool) -> None:
        """Add the key as the most recently used."""
        self._keys[key] = None

    def touch(self, key: ExpertKey, *, scan: bool) -> None:
        """Make the key the most recently used."""
        self._keys.move_to_end(key)

    def demote(self, key: ExpertKey) -> None:
        """Make the key the least recently used."""
        self._keys.move_to_end(key, last=False)

    def remove(self, key: ExpertKey) -> None:
        """Remove the key from the order."""
        del self._keys[key]


class ScanResistant:
    """Evict the least recently used key first, undisturbed by scans.

    Records that a scan loads are evicted before all others; those that it finds keep their place. Once a scan has
    loaded ``room`` records, it evicts only such records. A record of a scan becomes an ordinary one when another demand
    uses it.
    """

    def __init__(self, quota: int) -> None:
        self.room = max(2, quota // 8)  # enough reads in flight for a quick scan, few enough slots to lose little
        self._scanned: OrderedDict[ExpertKey, None] = OrderedDict()
        self._settled: OrderedDict[ExpertKey, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._scanned) + len(self._settled)

    def __iter__(self) -> Iterator[ExpertKey]:
        return chain(self._scanned, self._settled)

    def victims(self, *, scan: bool) -> Iterator[ExpertKey]:
        """Keys that scans have loaded, then the others; for a scan the former alone once there are ``room``."""
        return iter(self._scanned) if scan and len(self._scanned) >= self.room else iter(self)

    def add(self, key: ExpertKey, *, scan: bool) -> None:
        """Add the key to those of scans, or to the others as the most recently used."""
        if scan:
            self._scanned[key] = None
        else:
            self._settled[key] = 0.0

    def touch(self, key: ExpertKey, *, scan: bool) -> None:
        """Make the key the most recently used of the ordinary ones. A scan changes nothing."""
        if not scan:
            self._scanned.pop(key, None)
            self._settled[key] = 0.0
            self._settled.move_to_end(key)

    def demote(self, key: ExpertKey) -> None:
        """Make the key the first victim among those that no scan has loaded."""
        self._settled.move_to_end(key, last=False)

    def remove(self, key: ExpertKey) -> None:
        """Remove the key, whether or not a scan has loaded it."""
        if key in self._scanned:
            del self._scanned[key]
        else:
            del self._settled[key]


class Frequency(ScanResistant):
    """Evict the least often used key first, undisturbed by scans.

    A use counts half as much after ``HALF_LIFE`` further uses of the group. An evicted key keeps its count and has it
    again when it comes back.

    This is LRFU (Lee et al. 2001, "LRFU: a spectrum of policies that subsumes the least recently used and least
    frequently used policies", IEEE Transactions on Computers 50(12)). All counts decay at the same rate, so unused keys
    keep their order. Stored is therefore the logarithm of each count, scaled to the time of the group's first use.
    """

    def __init__(self, quota: int) -> None:
        super().__init__(quota)
        self._uses = 0
        self._counts: dict[ExpertKey, float] = {}  # log2, for every key that was ever used

    def __iter__(self) -> Iterator[ExpertKey]:  # the order of ``victims``
        return chain(self._scanned, sorted(self._settled, key=self._settled.__getitem__))

    def add(self, key: ExpertKey, *, scan: bool) -> None:
        """Add the key, with the count of its former uses unless a scan loads it."""
        super().add(key, scan=scan)
        if not scan:
            self._settled[key] = self._counts.get(key, -inf)

    def touch(self, key: ExpertKey, *, scan: bool) -> None:
        """Add a use to the key's decayed count. Uses by scans do not count."""
        if not scan:
            self._scanned.pop(key, None)
            self._uses += 1
            now, before = self._uses / HALF_LIFE, self._counts.get(key, -inf)
            self._counts[key] = self._settled[key] = now + log2(1.0 + 2.0 ** (before - now))
            self._settled.move_to_end(key)

    def demote(self, key: ExpertKey) -> None:
        """Make the key the first victim among those that no scan has loaded; its count is kept."""
        super().demote(key)
        self._settled[key] = -inf


# by name: makes an order from a group's quota
ORDERS: Mapping[str, Callable[[int], Order]] = {"lru": Recency, "scan": ScanResistant, "lrfu": Frequency}
DEFAULT_ORDER = "lrfu"
