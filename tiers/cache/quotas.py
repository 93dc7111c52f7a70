"""Eviction: how many slots each block keeps, and which record a pool evicts next.

With a global LRU and fewer slots than blocks x top-k nothing is ever hit: when a block's turn comes again, the others
have just evicted all of its records. So blocks form *groups* that evict among their own. If the slots are too few for
that, some blocks keep their top-k and all others share one group, through which they stream.

A prefetch takes the slot of an earlier prefetch that turned out wrong, of any block, or else its own block's next
victim. Its record is the next victim itself until it is used. So a right prediction evicts what the demand would have
evicted, and of several wrong ones in a row only the first costs a record.

All of this is pure. ``orders`` has the eviction orders.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Block

from .orders import DEFAULT_ORDER, ORDERS, Order
from .slots import Slots, State


@dataclass(frozen=True, slots=True)
class Group:
    """Blocks that evict among their own records, and the number of their slots."""

    blocks: tuple[int, ...]
    quota: int


def plan_groups(slots: int, blocks: Mapping[int, Block]) -> tuple[Group, ...]:
    """Divide ``slots`` among the ``blocks`` of one record geometry, given by number. The quotas add up to ``slots``.

    ``slots`` must be at least the greatest top-k and at most the number of records.
    """
    least = max(block.top_k for block in blocks.values())
    assert least <= slots <= sum(block.experts for block in blocks.values()), f"{slots} slots"
    if slots >= sum(block.top_k for block in blocks.values()):
        quotas = _even_quotas(slots, blocks)
        return tuple(Group((index,), quotas[index]) for index in blocks)
    kept, left = [], slots
    for index in sorted(blocks, key=lambda index: (blocks[index].top_k, index)):
        if left - blocks[index].top_k < least:
            break
        kept.append(index)
        left -= blocks[index].top_k
    stream = Group(tuple(index for index in blocks if index not in kept), left)
    return (*(Group((index,), blocks[index].top_k) for index in sorted(kept)), stream)


def _even_quotas(slots: int, blocks: Mapping[int, Block]) -> dict[int, int]:
    """Start from each block's top-k; give each further slot to the block that has the fewest and can use one more."""
    quotas = {index: block.top_k for index, block in blocks.items()}
    heap = [(quota, index) for index, quota in quotas.items() if quota < blocks[index].experts]
    heapq.heapify(heap)
    for _ in range(slots - sum(quotas.values())):
        quota, index = heapq.heappop(heap)
        quotas[index] = quota + 1
        if quota + 1 < blocks[index].experts:
            heapq.heappush(heap, (quota + 1, index))
    return quotas


class BlockPolicy:
    """Eviction policy of one pool: one eviction order per group.

    With "lru", a group within its quota holds exactly what a least-recently-used cache of that size holds.
    """

    def __init__(
        self, slots: Slots, groups: Sequence[Group], make_order: Callable[[int], Order] = ORDERS[DEFAULT_ORDER]
    ) -> None:
        """``make_order`` makes the order of a group from the group's quota."""
        assert sum(group.quota for group in groups) == slots.count
        self._slots = slots
        self._quotas = [group.quota for group in groups]
        self._group_of = {block: number for number, group in enumerate(groups) for block in group.blocks}
        self._orders = [make_order(group.quota) for group in groups]

    def is_scan(self, block: int, records: int) -> bool:
        """Whether a demand for ``records`` records of ``block`` is a scan: more than the block's group can keep."""
        return records > self._quotas[self._group_of[block]]

    def choose(
        self,
        block: int,
        *,
        may_borrow: bool = False,
        scan: bool = False,
        keep: Callable[[ExpertKey], bool] = lambda key: False,
    ) -> int | None:
        """Choose the slot for a record of ``block``: an EMPTY one or one to evict. Return None if there is none.

        A group below its quota takes a free slot; a group at its quota evicts one of its own records first.

        Args:
            may_borrow: if the group has no slot to offer, take one of another group, which takes one back when it
                needs it, or a slot that a scan would otherwise leave alone.
            scan: the demand is a scan.
            keep: keys that are not evicted.
        """
        number = self._group_of[block]
        slot: int | None = None
        if self._surplus(number) < 0:
            # Without a free slot below the quota, another group has borrowed one.
            slot = self._slots.free()
            if slot is None:
                borrowers = (number for number in self._by_surplus() if self._surplus(number) > 0)
                slot = self._first(borrowers, keep)
        if slot is None:
            slot = self._first([number], keep, scan=scan)
        if slot is None and may_borrow:
            slot = self._slots.free()
            if slot is None:
                slot = self._first([number, *self._by_surplus()], keep)
        return slot

    def quota(self, block: int) -> int:
        """The quota of the block's group, in slots."""
        return self._quotas[self._group_of[block]]

    def vacancy(self, block: int) -> int | None:
        """An EMPTY slot that belongs to the block's group, or None."""
        return self._slots.free() if self._surplus(self._group_of[block]) < 0 else None

    def admit(self, block: int, slot: int, *, scan: bool = False, prefetched: bool = False) -> None:
        """Add the record that ``slot`` is being filled with. A ``prefetched`` one is evicted before used ones."""
        order, key = self._orders[self._group_of[block]], self._slots.key(slot)
        order.add(key, scan=scan)
        if prefetched:
            order.demote(key)

    def touch(self, key: ExpertKey, *, scan: bool = False) -> None:
        """Note a use of a record that has a slot."""
        self._orders[self._group_of[key.block]].touch(key, scan=scan)

    def remove(self, slot: int) -> None:
        """Remove the record of ``slot``, which is about to become EMPTY."""
        key = self._slots.key(slot)
        self._orders[self._group_of[key.block]].remove(key)

    def repair(self) -> None:
        """After a step that an exception has cut: make the groups hold the record of every slot that is not EMPTY."""
        for order in self._orders:
            for key in list(order):
                if self._slots.find(key) is None:
                    order.remove(key)
        held = {key for order in self._orders for key in order}
        for slot in range(self._slots.count):
            if self._slots.state(slot) is not State.EMPTY and (key := self._slots.key(slot)) not in held:
                self._orders[self._group_of[key.block]].add(key, scan=False)

    def check_integrity(self) -> None:
        """Assert that the groups hold the record of every slot that is not EMPTY, each exactly once."""
        held = [(key, number) for number, order in enumerate(self._orders) for key in order]
        full = [slot for slot in range(self._slots.count) if self._slots.state(slot) is not State.EMPTY]
        expected = [(key, self._group_of[key.block]) for key in map(self._slots.key, full)]
        assert sorted(held) == sorted(expected)
        assert [len(order) for order in self._orders] == [len(list(order)) for order in self._orders]

    def _first(self, numbers: Iterable[int], keep: Callable[[ExpertKey], bool], *, scan: bool = False) -> int | None:
        for number in numbers:
            for key in self._orders[number].victims(scan=scan):
                slot = self._slots.find(key)
                assert slot is not None
                if self._slots.is_evictable(slot) and not keep(key):
                    return slot
        return None

    def _surplus(self, number: int) -> int:
        return len(self._orders[number]) - self._quotas[number]

    def _by_surplus(self) -> list[int]:
        """Group numbers, the group that is furthest above its quota first."""
        return sorted(range(len(self._orders)), key=lambda number: -self._surplus(number))
