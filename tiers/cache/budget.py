"""Budgets: how many slots a number of bytes pays for, and how many of them each block keeps. All of this is pure.

With a global LRU and fewer slots than blocks x top-k nothing is ever hit: when a block's turn comes again, the others
have just evicted all of its records. So blocks form *groups* that evict among their own. If the slots are too few for
that, some blocks keep their top-k and all others share one group, through which they stream.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from moetier.tiers.errors import BudgetError
from moetier.tiers.manifest import Block, Manifest


def smallest_budget(manifest: Manifest) -> int:
    """The smallest budget that works, in bytes: in every record geometry, one token's experts of one block."""
    return sum(manifest.layouts[name].slot_bytes * least for name, (least, _) in slot_ranges(manifest).items())


def slots_for(manifest: Manifest, budget_bytes: int) -> Mapping[str, int]:
    """Compute how many slots of each record geometry (zarr array) a budget pays for, at most one per record.

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
    if above := largest - smallest:  # divide the rest in proportion to what each geometry can still use
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
    """The smallest and the largest useful number of slots, by array."""
    ranges = {}
    for name, members in manifest.members.items():
        blocks = members.values()
        ranges[name] = (max(block.top_k for block in blocks), sum(block.experts for block in blocks))
    return ranges


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
