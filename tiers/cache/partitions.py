"""Partitions of a pool: their quotas, what they lend, and the order in which their records are evicted.

Callers hold the tier's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from moetier.tiers.layout import ExpertKey

from .budget import Partition
from .policies import Policy


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
