"""Who is evicted next: least recently used, block by block. Pure.

A global LRU with fewer slots than blocks x top-k hits nothing at all: when a block's turn comes again, every record of
it has just been evicted by the others. So blocks are *groups* that evict among their own. When the slots are too few
for that, some blocks keep their top-k and all others share one group, in which they stream.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .keys import ExpertKey
from .manifest import Block
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


class BlockLru:
    """Recency of the slots of one geometry, group by group.

    Within its quota a group's content is exactly what a least-recently-used cache of that size would hold.
    """

    def __init__(self, slots: Slots, groups: Sequence[Group]) -> None:
        assert sum(group.quota for group in groups) == slots.count
        self._slots = slots
        self._quotas = [group.quota for group in groups]
        self._group_of = {block: number for number, group in enumerate(groups) for block in group.blocks}
        self._orders: list[OrderedDict[int, None]] = [OrderedDict() for _ in groups]  # least recently used first

    def choose(
        self, block: int, *, borrow: bool = False, keep: Callable[[ExpertKey], bool] = lambda key: False
    ) -> int | None:
        """The slot for a record of ``block``: an EMPTY one, or one to be evicted; None when there is none to be had.

        A group below its quota takes a free slot, at its quota it evicts its own least recently used. With ``borrow``,
        when all of its own are held, it may take another group's, which takes one back when it needs it.
        What ``keep`` says is not evicted.
        """
        number = self._group_of[block]
        slot: int | None = None
        if len(self._orders[number]) < self._quotas[number]:
            # no free slot below the quota means that another group has borrowed
            slot = self._slots.free()
            if slot is None:
                slot = self._oldest(self._borrowers(), keep)
        if slot is None:
            slot = self._oldest([number], keep)
        if slot is None and borrow:
            slot = self._slots.free()
            if slot is None:
                slot = self._oldest(self._by_surplus(), keep)
        return slot

    def admit(self, block: int, slot: int) -> None:
        """``slot`` is being filled for ``block``: its group's from now on, and its most recently used."""
        self._orders[self._group_of[block]][slot] = None

    def touch(self, slot: int) -> None:
        """``slot`` is used."""
        self._orders[self._group_of[self._slots.key(slot).block]].move_to_end(slot)

    def forget(self, slot: int) -> None:
        """``slot`` is about to become EMPTY."""
        del self._orders[self._group_of[self._slots.key(slot).block]][slot]

    def check_integrity(self) -> None:
        """Asserts that the groups hold every slot that is not EMPTY, each once and by its key."""
        held = [(slot, number) for number, order in enumerate(self._orders) for slot in order]
        expected = [
            (slot, self._group_of[self._slots.key(slot).block])
            for slot in range(self._slots.count)
            if self._slots.state(slot) is not State.EMPTY
        ]
        assert sorted(held) == expected

    def _oldest(self, numbers: Iterable[int], keep: Callable[[ExpertKey], bool]) -> int | None:
        for number in numbers:
            for slot in self._orders[number]:
                if self._slots.is_evictable(slot) and not keep(self._slots.key(slot)):
                    return slot
        return None

    def _surplus(self, number: int) -> int:
        return len(self._orders[number]) - self._quotas[number]

    def _borrowers(self) -> list[int]:
        return [number for number in self._by_surplus() if self._surplus(number) > 0]

    def _by_surplus(self) -> list[int]:
        """Groups, those first that have most beyond their quota."""
        return sorted(range(len(self._orders)), key=lambda number: -self._surplus(number))
