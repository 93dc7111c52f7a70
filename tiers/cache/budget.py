"""Budgets: how many slots fit a number of bytes, and how the slots are divided among the blocks.

One LRU over all blocks would never hit if it had fewer slots than the number of blocks times top-k: before a block is
computed again, the other blocks evict all of its records. So the cache is divided into *partitions*, and a partition
evicts only records of its own blocks. If there are enough slots, each block has a partition of its own. Otherwise some
blocks have partitions of their own, with top-k slots each, and all other blocks share one partition. Its slots hold the
records of the block that is being computed, and then those of the next.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from moetier.tiers.errors import BudgetError
from moetier.tiers.manifest import Block, Manifest


def smallest_budget(manifest: Manifest) -> int:
    """Return the smallest budget that works, in bytes.

    For each record layout, it holds the experts that one token uses in one block.
    """
    return sum(manifest.layouts[name].slot_bytes * least for name, (least, _) in slot_ranges(manifest).items())


def slots_for(manifest: Manifest, budget_bytes: int) -> Mapping[str, int]:
    """Divide a budget into slots. Return a dictionary from the name of each zarr array to the number of its slots.

    An array gets at most one slot for each of its records.

    Raises:
        BudgetError: the budget is smaller than ``smallest_budget``.
    """
    smallest, largest = smallest_budget(manifest), manifest.stored_bytes
    if budget_bytes < smallest:
        raise BudgetError(
            f"A memory budget of {budget_bytes:,} bytes is too small for the experts that a token uses in one block.",
            f"Give {smallest:,} to {largest:,} bytes.",
        )
    ranges = slot_ranges(manifest)
    slots = {name: least for name, (least, _) in ranges.items()}
    if above := largest - smallest:  # divide the rest of the budget in proportion to what each array can still use
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
    """Return a dictionary from the name of each zarr array to the smallest and the largest useful number of slots.

    The smallest number is the largest top-k of the array's blocks. The largest number is the number of its records.
    """
    ranges = {}
    for name, members in manifest.members.items():
        blocks = members.values()
        ranges[name] = (max(block.top_k for block in blocks), sum(block.experts for block in blocks))
    return ranges


@dataclass(frozen=True, slots=True)
class Partition:
    """A part of a cache: slots for the records of some blocks, in which only these blocks evict records."""

    blocks: tuple[int, ...]  # numbers of the blocks
    quota: int  # number of slots that the blocks share


def partitions_of(slots: int, blocks: Mapping[int, Block]) -> tuple[Partition, ...]:
    """Divide blocks whose records have one layout among partitions, and ``slots`` into the partitions' quotas.

    Args:
        slots: the number of slots: at least the largest top-k, and at most the number of records.
        blocks: a dictionary from block number to block.

    Returns:
        The partitions. Their quotas add up to ``slots``.
    """
    least = max(block.top_k for block in blocks.values())
    assert least <= slots <= sum(block.experts for block in blocks.values()), f"{slots} slots"
    if slots >= sum(block.top_k for block in blocks.values()):
        quotas = _even_quotas(slots, blocks)
        return tuple(Partition((index,), quotas[index]) for index in blocks)
    kept, left = [], slots
    for index in sorted(blocks, key=lambda index: (blocks[index].top_k, index)):
        if left - blocks[index].top_k < least:
            break
        kept.append(index)
        left -= blocks[index].top_k
    stream = Partition(tuple(index for index in blocks if index not in kept), left)
    return (*(Partition((index,), blocks[index].top_k) for index in sorted(kept)), stream)


def _even_quotas(slots: int, blocks: Mapping[int, Block]) -> dict[int, int]:
    """Return a quota for each block, where each has a partition of its own.

    Each block gets top-k slots. Each further slot goes to the block with the fewest slots that can still use one more.
    """
    quotas = {index: block.top_k for index, block in blocks.items()}
    heap = [(quota, index) for index, quota in quotas.items() if quota < blocks[index].experts]
    heapq.heapify(heap)
    for _ in range(slots - sum(quotas.values())):
        quota, index = heapq.heappop(heap)
        quotas[index] = quota + 1
        if quota + 1 < blocks[index].experts:
            heapq.heappush(heap, (quota + 1, index))
    return quotas
