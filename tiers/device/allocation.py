"""A device's memory for slots: what was asked for, or what there is room for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch

from moetier.tiers.cache.budget import slot_ranges
from moetier.tiers.errors import BudgetError
from moetier.tiers.manifest import Manifest

from .stream import Device


def fewer(manifest: Manifest, slots: Mapping[str, int]) -> dict[str, int]:
    """Three quarters of ``slots`` by array, but at least one token's experts of one block."""
    fewest = {array: least for array, (least, _) in slot_ranges(manifest).items()}
    return {array: max(fewest[array], count * 3 // 4) for array, count in slots.items()}


def allocate(device: Device, manifest: Manifest, slots: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Memory for ``slots`` by array, or for fewer, with one warning to the caller's caller, where the device has no
    room for them. Raises BudgetError when it has none for one token's experts."""
    sizes = {array: layout.slot_bytes for array, layout in manifest.layouts.items()}
    counts = dict(slots)
    while True:
        try:
            memory = {array: device.allocate(count * sizes[array]) for array, count in counts.items()}
        except torch.OutOfMemoryError:
            less = fewer(manifest, counts)
            if less == counts:
                least = sum(count * sizes[array] for array, count in counts.items())
                raise BudgetError(
                    f"The device has no room for the {least:,} bytes of the experts that one token needs in one block.",
                    "Free some of its memory, or run on the CPU.",
                ) from None
            counts = less
        else:
            break
    if counts != slots:
        warnings.warn(
            f"The device has room for {sum(counts.values())} experts, not for {sum(slots.values())}; it caches fewer.",
            RuntimeWarning,
            stacklevel=3,
        )
    return memory
