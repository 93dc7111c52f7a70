"""Budgets: how many slots fit a number of bytes, and how many of them each block keeps. The functions have no state.

With a global LRU and fewer slots than blocks x top-k there are no hits: when a block is computed again, the other
blocks have just evicted all of its records. So blocks form *groups* that evict only their own records: one block to a
group where there are enough slots. Otherwise some blocks keep top-k slots each, and all others share one group, whose
slots hold the records of one block after the other.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from moetier.tiers.errors import BudgetError
from moetier.tiers.manifest import Block, Manifest


def smallest_budget(manifest: Manifest) -> int:
    """Return the smallest budget that works, in bytes: for every record layout, one token's experts of one block."""
    return sum(manifest.layouts[name].slot_bytes * least for name, (least, _) in slot_ranges(manifest).items())


def slots_for(manifest: Manifest, budget_bytes: int) -> Mapping[str, int]:
    """Compute how many slots of each record layout fit the budget, by zarr array: at most one slot per record.

    Raises:
        BudgetError: not even one block's top-k records fit.
    """
    smallest, largest = smallest_budget(manifest), manifest.stored_bytes
    if budget_bytes < smallest:
        raise BudgetError(
            f"{budget_bytes:,} bytes can't hold the experts that one token needs in one block.",
            f"Give from {smallest:,} to {largest:,} bytes.",
        )
    ranges = slot_ranges(manifest)
    slots = {name: least for name, (least, _) in ranges.items()}
    if above := largest - smallest:  # divide the rest in proportion to what each layout can still use
        extra = min(budget_bytes, largest) - smallest
        for name, (least, most) in ranges.items():
            slots[name] += (most - least) * extra // above
    sizes = {name: layout.slot_bytes for name, layout in manifest.layouts.items()}
    left = budget_bytes - sum(sizes[name] * count for name, count in slots.items())
    for name, (_, most) in ranges.items():
        more = min(left // sizes[name], most - slots[name])
        slots[name] += more
        left -= more * sizes[name]
    return slots


def slot_ranges(manifest: Manifest) -> dict[str, tuple[int, int]]:
    """Return the smallest and the largest useful number of slots, by zarr array."""
    ranges = {}
    for name, members in manifest.members.items():
        blocks = members.values()
        ranges[name] = (max(block.top_k for block in blocks), sum(block.experts for block in blocks))
    return ranges


@dataclass(frozen=True, slots=True)
class Group:
    """Blocks that evict only one another's records, and the number of slots that they share."""

    blocks: tuple[int, ...]
    quota: int


def plan_groups(slots: int, blocks: Mapping[int, Block]) -> tuple[Group, ...]:
    """Divide ``slots`` among the ``blocks`` of one record layout. The quotas of the groups add up to ``slots``.

    ``slots`` must be at least the largest top-k and at most the number of records. ``blocks`` is by block number.
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
    """Give each block its top-k slots, and each further slot to the block with the fewest that can use one more."""
    quotas = {index: block.top_k for index, block in blocks.items()}
    heap = [(quota, index) for index, quota in quotas.items() if quota < blocks[index].experts]
    heapq.heapify(heap)
    for _ in range(slots - sum(quotas.values())):
        quota, index = heapq.heappop(heap)
        quotas[index] = quota + 1
        if quota + 1 < blocks[index].experts:
            heapq.heappush(heap, (quota + 1, index))
    return quotas
