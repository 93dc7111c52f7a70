"""Policies: which record of a group is evicted next. They hold keys only, and have no locks.

A demand for more records than its group has slots is a *scan*: the group can't keep all that the demand loads. A
prefill is a scan if few experts of a block can be cached.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from math import inf, log2
from typing import Protocol

from moetier.tiers.layout import ExpertKey

HALF_LIFE = 30  # number of uses of the group's records after which an earlier use counts half


class Policy(Protocol):
    """Interface of a policy for the keys of one group. A policy has a key from ``add`` to ``remove``.

    The argument ``scan`` of the methods is true if the demand for the key is a scan.
    """

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[ExpertKey]: ...

    def victims(self, *, scan: bool) -> Iterator[ExpertKey]:
        """Iterate over keys that may be evicted, the first victim first. For a scan these may be only a part of all."""

    def add(self, key: ExpertKey, *, scan: bool) -> None:
        """Add a key whose record is being loaded. If the load is for a demand, ``touch`` follows."""

    def touch(self, key: ExpertKey, *, scan: bool) -> None:
        """Note that a demand uses the key now, or is about to."""

    def demote(self, key: ExpertKey) -> None:
        """Make the key the first victim, as its record was prefetched and is not used yet."""

    def remove(self, key: ExpertKey) -> None:
        """Remove a key whose record has lost its slot."""


class Recency:
    """Evict the least recently used key first. Scans are treated like other demands."""

    def __init__(self, quota: int) -> None:
        self._keys: OrderedDict[ExpertKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[ExpertKey]:
        return iter(self._keys)

    def victims(self, *, scan: bool) -> Iterator[ExpertKey]:
        """Iterate over all keys, the least recently used first."""
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
        """Remove the key."""
        del self._keys[key]


class ScanResistant:
    """Evict the least recently used key first, but protect the keys from scans.

    Records that a scan has loaded are evicted before all others. Records that a scan finds in the cache keep their
    place in the order. While there are ``room`` or more records that scans have loaded, a scan evicts only these. Such
    a record becomes an ordinary one when a demand that is no scan uses it.
    """

    def __init__(self, quota: int) -> None:
        self.room = max(2, quota // 8)  # enough for several reads at a time, few enough to evict little
        self._scanned: OrderedDict[ExpertKey, None] = OrderedDict()
        self._settled: OrderedDict[ExpertKey, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._scanned) + len(self._settled)

    def __iter__(self) -> Iterator[ExpertKey]:
        return chain(self._scanned, self._settled)

    def victims(self, *, scan: bool) -> Iterator[ExpertKey]:
        """Iterate over keys that scans have loaded, then the others.

        For a scan, leave the others out while there are ``room`` or more keys that scans have loaded.
        """
        return iter(self._scanned) if scan and len(self._scanned) >= self.room else iter(self)

    def add(self, key: ExpertKey, *, scan: bool) -> None:
        """Add the key to those that scans have loaded, or as the most recently used of the others."""
        if scan:
            self._scanned[key] = None
        else:
            self._settled[key] = 0.0

    def touch(self, key: ExpertKey, *, scan: bool) -> None:
        """Make the key the most recently used ordinary one. A use by a scan changes nothing."""
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
    """Evict the least frequently used key first, but protect the keys from scans as ``ScanResistant`` does.

    A use counts half after ``HALF_LIFE`` further uses of the group's records. The count of an evicted key is kept for
    the next time that its record is loaded.

    This is LRFU (Lee et al. 2001, "LRFU: a spectrum of policies that subsumes the least recently used and least
    frequently used policies", IEEE Transactions on Computers 50(12)). All counts decay at the same rate, so their order
    changes only by uses. Therefore each count is stored as a logarithm from which the decay is left out.
    """

    def __init__(self, quota: int) -> None:
        super().__init__(quota)
        self._uses = 0
        self._counts: dict[ExpertKey, float] = {}  # log2 of the count of every key that was ever used

    def __iter__(self) -> Iterator[ExpertKey]:  # the order of ``victims``
        return chain(self._scanned, sorted(self._settled, key=self._settled.__getitem__))

    def add(self, key: ExpertKey, *, scan: bool) -> None:
        """Add the key, with the count of its earlier uses, or to those that scans have loaded."""
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
        """Make the key the first victim among those that no scan has loaded, and keep its count for its next use."""
        super().demote(key)
        self._settled[key] = -inf


# by name of the policy: the function that makes a policy from a group's quota
POLICIES: Mapping[str, Callable[[int], Policy]] = {"lru": Recency, "scan": ScanResistant, "lrfu": Frequency}
DEFAULT_POLICY = "lrfu"
