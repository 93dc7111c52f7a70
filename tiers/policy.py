"""Who is evicted next, block by block. Pure; ``order.py`` has the orders, of which least recently used is the default.

A global LRU with fewer slots than blocks x top-k hits nothing at all: when a block's turn comes again, every record of
it has just been evicted by the others. So blocks are *groups* that evict among their own. When the slots are too few
for that, some blocks keep their top-k and all others share one group, in which they stream.

*Spare* slots are in no block's quota. What a wish loads goes there, and what a group evicts: so a guess costs what was
evicted the longest ago. A record that is used there is its group's again.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .keys import ExpertKey
from .manifest import Block
from .order import DEFAULT_ORDER, ORDERS, Order, Recency
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


def spare_slots(slots: int, blocks: Mapping[int, Block], look_ahead: int) -> int:
    """How many of the slots of one record geometry had better be spare, for guesses ``look_ahead`` layers far: what two
    tokens' worth of them name, where each block keeps its top-k all the same."""
    wished = look_ahead * max(block.top_k for block in blocks.values())
    return max(0, min(2 * wished, slots - sum(block.top_k for block in blocks.values())))


class BlockPolicy:
    """An order for the records of each group of one geometry, and one for those in spare slots.

    With the default, a group's content within its quota is exactly what a least-recently-used cache of that size holds.
    """

    def __init__(
        self, slots: Slots, groups: Sequence[Group], make_order: Callable[[int], Order] = ORDERS[DEFAULT_ORDER]
    ) -> None:
        """``make_order`` is given a group's quota. Slots in no quota are spare."""
        spare = slots.count - sum(group.quota for group in groups)
        assert spare >= 0
        self._slots = slots
        self._quotas = [*(group.quota for group in groups), spare]
        self._group_of = {block: number for number, group in enumerate(groups) for block in group.blocks}
        self._orders = [*(make_order(group.quota) for group in groups), Recency(spare)]
        self._spare = len(groups)  # the number of the group that has no blocks
        self._where: dict[ExpertKey, int] = {}  # number of the group that has it

    def is_passage(self, block: int, records: int) -> bool:
        """Whether a demand for so many records of ``block`` is more than its group can keep."""
        return records > self._quotas[self._group_of[block]]

    def choose(
        self,
        block: int,
        *,
        borrow: bool = False,
        passing: bool = False,
        wished: bool = False,
        keep: Callable[[ExpertKey], bool] = lambda key: False,
    ) -> int | None:
        """The slot for a record of ``block``: an EMPTY one, or one to be evicted; None when there is none to be had.

        A group below its quota takes a free slot, at its quota it evicts what is spare, then its own first. With
        ``borrow``, when none of its own is to be had, it may take another group's, which takes one back when it needs
        it, or what a passage (``passing``) had better leave. A wish evicts what is spare, and only where none of the
        slots are, its own group's. What ``keep`` says is not evicted.
        """
        number = self._group_of[block]
        spare = self._quotas[self._spare] > 0
        slot: int | None = None
        below = [number, self._spare] if not wished else [self._spare] if spare else [number]
        if any(self._surplus(group) < 0 for group in below):
            # no free slot below the quota means that another group has borrowed
            slot = self._slots.free()
            if slot is None:
                slot = self._first(self._borrowers(), keep)
        if slot is None and spare and not passing:
            slot = self._first([self._spare], keep)
        if slot is None and not (wished and spare):
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

    def admit(
        self, block: int, slot: int, *, passing: bool = False, wished: bool = False, warmed: bool = False
    ) -> None:
        """``slot`` is being filled for ``block``: its group's from now on, and used; or for a wish, and spare; or by a
        warm-up (``warmed``), and evicted before what was used."""
        key = self._slots.key(slot)
        number = self._spare if wished and self._quotas[self._spare] else self._group_of[block]
        self._put(key, number, passing=passing)
        if warmed:
            self._orders[number].put_first(key)

    def touch(self, slot: int, *, passing: bool = False) -> None:
        """``slot`` is used."""
        key = self._slots.key(slot)
        number = self._group_of[key.block]
        if self._where.get(key) == self._spare:
            self._orders[self._spare].remove(key)
            self._put(key, number, passing=passing)
        else:
            self._orders[number].touch(key, passing=passing)

    def forget(self, slot: int) -> None:
        """``slot`` is about to become EMPTY."""
        key = self._slots.key(slot)
        self._orders[self._where.pop(key)].remove(key)

    def check_integrity(self) -> None:
        """Asserts that the groups hold the record of every slot that is not EMPTY, each once and by its key, or that it
        is spare."""
        held = {key: number for number, order in enumerate(self._orders) for key in order}
        full = [slot for slot in range(self._slots.count) if self._slots.state(slot) is not State.EMPTY]
        assert held == self._where
        assert held.keys() == set(map(self._slots.key, full))
        assert all(number in (self._group_of[key.block], self._spare) for key, number in held.items())
        assert [len(order) for order in self._orders] == [len(list(order)) for order in self._orders]
        assert sum(map(len, self._orders)) == len(held)

    def _put(self, key: ExpertKey, number: int, *, passing: bool) -> None:
        """Into a group. What is too much there is spare, as long as there is room."""
        self._orders[number].add(key, passing=passing)
        self._where[key] = number
        if self._surplus(number) > 0 > self._surplus(self._spare):
            first = next(iter(self._orders[number].victims(passing=False)))
            self._orders[number].remove(first)
            self._orders[self._spare].add(first, passing=False)
            self._where[first] = self._spare

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

    def _borrowers(self) -> list[int]:
        return [number for number in self._by_surplus() if self._surplus(number) > 0]

    def _by_surplus(self) -> list[int]:
        """Groups, those first that have most beyond their quota."""
        return sorted(range(len(self._orders)), key=lambda number: -self._surplus(number))
