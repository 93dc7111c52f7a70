"""Budgets: how many slots a number of bytes pays for. All of this is pure."""

from __future__ import annotations

from collections.abc import Mapping

from moetier.tiers.errors import BudgetError
from moetier.tiers.manifest import Manifest


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
