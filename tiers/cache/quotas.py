"""Who is evicted next, block by block. Pure; ``order.py`` has the orders.

A global LRU with fewer slots than blocks x top-k hits nothing at all: when a block's turn comes again, every record of
it has just been evicted by the others. So blocks are *groups* that evict among their own. When the slots are too few
for that, some blocks keep their top-k and all others share one group, in which they stream.

What a wish loads takes the place of an earlier one that was wrong, of whichever block, or of its own block's next
victim, and is itself the next to go until it is used: a right guess evicts what the demand would have evicted, and of
those that are wrong one after the other only the first costs a record.
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
    """Blocks that evict among their own, and the slots that are theirs."""

    blocks: tuple[int, ...]
    quota: int


def plan_groups(slots: int, blocks: Mapping[int, Block]) -> tuple[Group, ...]:
    """Divides ``slots`` among the blocks of one record geometry; the quotas' sum is ``slots``.

    ``slots`` is at least the greatest top-k, and at most the number of records.
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
    """From each block's top-k upwards, one slot at a time to the block that has the fewest and can use it."""
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
    """An order for the records of each group of one geometry.

    With "lru", a group's content within its quota is exactly what a least-recently-used cache of that size holds.
    """

    def __init__(
        self, slots: Slots, groups: Sequence[Group], make_order: Callable[[int], Order] = ORDERS[DEFAULT_ORDER]
    ) -> None:
        """``make_order`` is given a group's quota."""
        assert sum(group.quota for group in groups) == slots.count
        self._slots = slots
        self._quotas = [group.quota for group in groups]
        self._group_of = {block: number for number, group in enumerate(groups) for block in group.blocks}
        self._orders = [make_order(group.quota) for group in groups]

    def is_passage(self, block: int, records: int) -> bool:
        """Whether a demand for so many records of ``block`` is more than its group can keep."""
        return records > self._quotas[self._group_of[block]]

    def choose(
        self,
        block: int,
        *,
        borrow: bool = False,
        passing: bool = False,
        keep: Callable[[ExpertKey], bool] = lambda key: False,
    ) -> int | None:
        """The slot for a record of ``block``: an EMPTY one, or one to be evicted; None when there is none to be had.

        A group below its quota takes a free slot, at its quota it evicts its own first. With ``borrow``, when none of
        its own is to be had, it may take another group's, which takes one back when it needs it, or what a passage
        (``passing``) had better leave. What ``keep`` says is not evicted.
        """
        number = self._group_of[block]
        slot: int | None = None
        if self._surplus(number) < 0:
            # no free slot below the quota means that another group has borrowed
            slot = self._slots.free()
            if slot is None:
                borrowers = (number for number in self._by_surplus() if self._surplus(number) > 0)
                slot = self._first(borrowers, keep)
        if slot is None:
            slot = self._first([number], keep, passing=passing)
        if slot is None and borrow:
            slot = self._slots.free()
            if slot is None:
                slot = self._first([number, *self._by_surplus()], keep)
        return slot

    def quota(self, block: int) -> int:
        """Of the block's group."""
        return self._quotas[self._group_of[block]]

    def vacancy(self, block: int) -> int | None:
        """An EMPTY slot that the block's group has a right to; None if there is none."""
        return self._slots.free() if self._surplus(self._group_of[block]) < 0 else None

    def admit(self, block: int, slot: int, *, passing: bool = False, early: bool = False) -> None:
        """``slot`` is being filled for ``block``: its group's from now on, and used; or brought before anybody wants it
        (``early``), and evicted before what was used."""
        order, key = self._orders[self._group_of[block]], self._slots.key(slot)
        order.add(key, passing=passing)
        if early:
            order.put_first(key)

    def touch(self, slot: int, *, passing: bool = False) -> None:
        """``slot`` is used."""
        key = self._slots.key(slot)
        self._orders[self._group_of[key.block]].touch(key, passing=passing)

    def forget(self, slot: int) -> None:
        """``slot`` is about to become EMPTY."""
        key = self._slots.key(slot)
        self._orders[self._group_of[key.block]].remove(key)

    def mend(self) -> None:
        """After a step that was cut: the groups hold the record of every slot that is not EMPTY."""
        for order in self._orders:
            for key in list(order):
                if self._slots.find(key) is None:
                    order.remove(key)
        held = {key for order in self._orders for key in order}
        for slot in range(self._slots.count):
            if self._slots.state(slot) is not State.EMPTY and (key := self._slots.key(slot)) not in held:
                self._orders[self._group_of[key.block]].add(key, passing=False)

    def check_integrity(self) -> None:
        """Asserts that the groups hold the record of every slot that is not EMPTY, each once and by its key."""
        held = [(key, number) for number, order in enumerate(self._orders) for key in order]
        full = [slot for slot in range(self._slots.count) if self._slots.state(slot) is not State.EMPTY]
        expected = [(key, self._group_of[key.block]) for key in map(self._slots.key, full)]
        assert sorted(held) == sorted(expected)
        assert [len(order) for order in self._orders] == [len(list(order)) for order in self._orders]

    def _first(self, numbers: Iterable[int], keep: Callable[[ExpertKey], bool], *, passing: bool = False) -> int | None:
        for number in numbers:
            for key in self._orders[number].victims(passing=passing):
                slot = self._slots.find(key)
                assert slot is not None
                if self._slots.is_evictable(slot) and not keep(key):
                    return slot
        return None

    def _surplus(self, number: int) -> int:
        return len(self._orders[number]) - self._quotas[number]

    def _by_surplus(self) -> list[int]:
        """Groups, those first that have most beyond their quota."""
        return sorted(range(len(self._orders)), key=lambda number: -self._surplus(number))
