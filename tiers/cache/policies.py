"""Policies: which record of a partition is evicted next; and the partitions of a pool, each with a policy.

Both hold only keys, and have no lock: callers hold the tier's.

A demand for more records than its partition has slots is a *scan*: the partition can't keep all the records that the
demand loads. The prefill of a long prompt is often a scan.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from math import inf, log2
from typing import ClassVar, Protocol

from moetier.tiers.layout import ExpertKey

from .budget import Partition

EVICTION_HALF_LIFE = 30  # a use counts half after this many further uses of records of the partition


class Policy(Protocol):
    """Interface of a policy for the keys of one partition. A policy has a key from ``add`` to ``remove``.

    The argument ``is_scan`` of the methods is true if the demand is a scan.
    """

    summary: ClassVar[str]  # which records are evicted first, for users who choose a policy

    def __init__(self, quota: int) -> None:
        """Make the policy of a partition of ``quota`` slots."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[ExpertKey]: ...

    def victims(self, *, is_scan: bool) -> Iterator[ExpertKey]:
        """Yield the keys whose records may be evicted, the first to be evicted first. A scan may get only some keys."""

    def scanned(self) -> Iterator[ExpertKey]:
        """Yield the keys of records that only scans have used, the first to be evicted first."""

    def add(self, key: ExpertKey, *, is_scan: bool) -> None:
        """Add a key whose record is being loaded. If the load is for a demand, a call of ``touch`` follows."""

    def touch(self, key: ExpertKey, *, is_scan: bool) -> None:
        """Note that a demand uses the key's record now, or is about to use it."""

    def demote(self, key: ExpertKey) -> None:
        """Let the key's record be evicted first, because it is prefetched and no demand has used it yet."""

    def remove(self, key: ExpertKey) -> None:
        """Remove a key whose record has lost its slot."""


class Lru:
    """The policy LRU: evict the least recently used record first. Scans are treated like other demands."""

    summary: ClassVar[str] = "the least recently used"

    def __init__(self, quota: int) -> None:
        self._keys: OrderedDict[ExpertKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[ExpertKey]:
        return iter(self._keys)

    def victims(self, *, is_scan: bool) -> Iterator[ExpertKey]:
        """Yield all keys, the least recently used first."""
        return iter(self._keys)

    def scanned(self) -> Iterator[ExpertKey]:
        """Yield nothing, as scans are treated like other demands."""
        return iter(())

    def add(self, key: ExpertKey, *, is_scan: bool) -> None:
        """Add the key as the most recently used."""
        self._keys[key] = None

    def touch(self, key: ExpertKey, *, is_scan: bool) -> None:
        """Make the key the most recently used."""
        self._keys.move_to_end(key)

    def demote(self, key: ExpertKey) -> None:
        """Make the key the least recently used."""
        self._keys.move_to_end(key, last=False)

    def remove(self, key: ExpertKey) -> None:
        """Remove the key."""
        del self._keys[key]


class ScanLru:
    """The policy "scan": evict the least recently used record first, but keep most records when a scan comes.

    *Scanned* records, which a scan or its prefetch has loaded, are evicted before all others. A scan that finds a
    record in the cache does not change the order. If there are ``room`` or more scanned records, a scan evicts only
    scanned records. A scanned record becomes an ordinary record when a demand that is not a scan uses it.
    """

    summary: ClassVar[str] = "as lru, but a long prompt leaves most cached experts in place"

    def __init__(self, quota: int) -> None:
        self.room = max(2, quota // 8)  # enough for several reads at the same time, and few enough to evict little
        self._scanned: OrderedDict[ExpertKey, None] = OrderedDict()
        self._ordinary: OrderedDict[ExpertKey, float] = OrderedDict()  # ordinary records; in LRFU, with their counts

    def __len__(self) -> int:
        return len(self._scanned) + len(self._ordinary)

    def __iter__(self) -> Iterator[ExpertKey]:
        return chain(self._scanned, self._ordinary)

    def victims(self, *, is_scan: bool) -> Iterator[ExpertKey]:
        """Yield the keys of scanned records, and then those of ordinary records.

        If ``is_scan`` is true and there are ``room`` or more scanned records, yield only the keys of scanned records.
        """
        return iter(self._scanned) if is_scan and len(self._scanned) >= self.room else iter(self)

    def scanned(self) -> Iterator[ExpertKey]:
        """Yield the keys of scanned records, the earliest first."""
        return iter(self._scanned)

    def add(self, key: ExpertKey, *, is_scan: bool) -> None:
        """Add the key: of a scanned record if ``is_scan`` is true, else of the most recently used ordinary record."""
        if is_scan:
            self._scanned[key] = None
        else:
            self._ordinary[key] = 0.0

    def touch(self, key: ExpertKey, *, is_scan: bool) -> None:
        """Make the record an ordinary record, the most recently used one. A use by a scan changes nothing."""
        if not is_scan:
            self._scanned.pop(key, None)
            self._ordinary[key] = 0.0
            self._ordinary.move_to_end(key)

    def demote(self, key: ExpertKey) -> None:
        """Let the record be evicted first of all ordinary records."""
        self._ordinary.move_to_end(key, last=False)

    def remove(self, key: ExpertKey) -> None:
        """Remove the key of a scanned or an ordinary record."""
        if key in self._scanned:
            del self._scanned[key]
        else:
            del self._ordinary[key]


class Lrfu(ScanLru):
    """The policy LRFU: evict the least frequently used record first, but keep most records when a scan comes.

    A use counts half after ``EVICTION_HALF_LIFE`` further uses of records of the partition. If a record is evicted, the
    count of its uses is kept for the next time that it is loaded. Scans are treated as ``ScanLru`` treats them.

    LRFU is from Lee et al. 2001, "LRFU: a spectrum of policies that subsumes the least recently used and least
    frequently used policies", IEEE Transactions on Computers 50(12). All counts decay at the same rate, so only uses
    change their order. Therefore each count is stored as a logarithm without the decay.
    """

    summary: ClassVar[str] = "as scan, but the experts used least often of late"

    def __init__(self, quota: int) -> None:
        super().__init__(quota)
        self._uses = 0
        self._counts: dict[ExpertKey, float] = {}  # log2 of the count of each key that was ever used

    def __iter__(self) -> Iterator[ExpertKey]:  # in the order of eviction
        return chain(self._scanned, sorted(self._ordinary, key=self._ordinary.__getitem__))

    def add(self, key: ExpertKey, *, is_scan: bool) -> None:
        """Add the key of a scanned record if ``is_scan`` is true, else of an ordinary record with its earlier count."""
        super().add(key, is_scan=is_scan)
        if not is_scan:
            self._ordinary[key] = self._counts.get(key, -inf)

    def touch(self, key: ExpertKey, *, is_scan: bool) -> None:
        """Add a use to the key's count. A use by a scan changes nothing."""
        if not is_scan:
            self._scanned.pop(key, None)
            self._uses += 1
            now, before = self._uses / EVICTION_HALF_LIFE, self._counts.get(key, -inf)
            self._counts[key] = self._ordinary[key] = now + log2(1.0 + 2.0 ** (before - now))
            self._ordinary.move_to_end(key)

    def demote(self, key: ExpertKey) -> None:
        """Let the record be evicted first of all ordinary records. The count of its uses is kept for its next use."""
        super().demote(key)
        self._ordinary[key] = -inf


POLICIES: Mapping[str, type[Policy]] = {"lru": Lru, "scan": ScanLru, "lrfu": Lrfu}
DEFAULT_POLICY = "lrfu"


class Partitions:
    """The partitions of one pool, each with a policy. With "lru", a partition within its quota is an LRU cache."""

    def __init__(self, partitions: Sequence[Partition], make_policy: Callable[[int], Policy]) -> None:
        """``make_policy`` returns a policy for a partition with a given quota."""
        self._quotas = [partition.quota for partition in partitions]
        self._number_of = {block: number for number, one in enumerate(partitions) for block in one.blocks}
        self._policies = [make_policy(quota) for quota in self._quotas]

    @property
    def slot_count(self) -> int:
        """The number of slots of all partitions."""
        return sum(self._quotas)

    def quota(self, block: int) -> int:
        """Return the quota of the block's partition, in slots."""
        return self._quotas[self._number_of[block]]

    def is_scan(self, block: int, records: int) -> bool:
        """Return whether a demand for so many records of a block is a scan: for more than its partition can keep."""
        return records > self.quota(block)

    def has_room(self, block: int) -> bool:
        """Return whether the block's partition has fewer slots than its quota."""
        return self._surplus(self._number_of[block]) < 0

    def add(self, key: ExpertKey, *, is_scan: bool = False, is_prefetch: bool = False) -> None:
        """Add a key that has got a slot. A prefetched record is evicted before those that were used."""
        policy = self._policy(key)
        policy.add(key, is_scan=is_scan)
        if is_prefetch and not is_scan:
            policy.demote(key)

    def remove(self, key: ExpertKey) -> None:
        """Remove a key that has lost its slot."""
        self._policy(key).remove(key)

    def touch(self, keys: Iterable[ExpertKey], *, is_scan: bool = False) -> None:
        """Note that demands use the records of ``keys``, in this order. All of them must have slots."""
        for key in keys:
            self._policies[self._number_of[key[0]]].touch(key, is_scan=is_scan)

    def victims(self, block: int, *, is_scan: bool = False) -> Iterator[ExpertKey]:
        """Yield the keys of the block's partition whose records may be evicted, the first to be evicted first."""
        return self._policies[self._number_of[block]].victims(is_scan=is_scan)

    def scanned(self) -> Iterator[ExpertKey]:
        """Yield the keys of scanned records of all partitions, beginning with the one furthest above its quota."""
        return (key for number in self._by_surplus() for key in self._policies[number].scanned())

    def borrowed(self) -> Iterator[ExpertKey]:
        """Yield the keys of partitions that are above their quotas, beginning with the one furthest above."""
        return self._of([number for number in self._by_surplus() if self._surplus(number) > 0])

    def all_victims(self) -> Iterator[ExpertKey]:
        """Yield the keys of all partitions, beginning with the one that is furthest above its quota."""
        return self._of(self._by_surplus())

    def repair(self, keys: Collection[ExpertKey]) -> None:
        """Make the partitions have exactly ``keys``, which have slots, after an interrupted change."""
        for policy in self._policies:
            for key in set(policy).difference(keys):
                policy.remove(key)
        placed = set[ExpertKey]().union(*self._policies)
        for key in keys:
            if key not in placed:
                self.add(key)

    def _policy(self, key: ExpertKey) -> Policy:
        return self._policies[self._number_of[key.block]]

    def _of(self, numbers: Iterable[int]) -> Iterator[ExpertKey]:
        return (key for number in numbers for key in self._policies[number].victims(is_scan=False))

    def _surplus(self, number: int) -> int:
        return len(self._policies[number]) - self._quotas[number]

    def _by_surplus(self) -> list[int]:
        return sorted(range(len(self._policies)), key=lambda number: -self._surplus(number))
