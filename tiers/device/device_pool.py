"""The slots of a device tier: a pool of slots for each record layout, and the device memory of the slots."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch

from moetier.tiers.cache.budget import partitions_of, slot_ranges
from moetier.tiers.cache.policies import POLICIES
from moetier.tiers.cache.pool import SlotPool, stats_of
from moetier.tiers.errors import BudgetError
from moetier.tiers.layout import ExpertKey, PoolSlot
from moetier.tiers.manifest import Manifest
from moetier.tiers.stats import TierCounters, TierStats
from moetier.tiers.text import format_bytes

from .stream import DeviceStream, StreamDevice, StreamEvent


class DevicePool(SlotPool):
    """The slots of a device tier for records of one layout."""

    def __init__(self, manifest: Manifest, array: str, first: int, memory: torch.Tensor, policy: str) -> None:
        """Divide memory into slots for records of one layout.

        Args:
            manifest: the store's manifest.
            array: name of the zarr array that has these records in the store.
            first: number of the pool's first slot in the tier.
            memory: the memory, uint8 [slots * slot_bytes] on the device.
            policy: the policy of eviction, a key of ``POLICIES``.
        """
        layout = manifest.layouts[array]
        slots = memory.view(-1, layout.slot_bytes)
        partitions = partitions_of(len(slots), manifest.members[array])
        super().__init__(partitions, POLICIES[policy], first=first, slot_bytes=layout.slot_bytes)
        self.layout = layout
        self.records = [slot[: layout.record_bytes] for slot in slots]
        self.copied: list[StreamEvent | None] = [None] * len(slots)  # by slot, when its record can be used
        # for each slot, a dictionary from each stream that has used the slot to the end of the latest use
        self.used: list[dict[DeviceStream, StreamEvent]] = [{} for _ in slots]


class DeviceSlots:
    """The pools of one device tier. Callers of its methods hold the tier's lock."""

    def __init__(
        self, device: StreamDevice, manifest: Manifest, slots: Mapping[str, int], policy: str, counters: TierCounters
    ) -> None:
        """Allocate slots, as ``use`` does. ``policy`` is a key of ``POLICIES``."""
        self._device = device
        self._manifest = manifest
        self._policy = policy
        self._counters = counters
        self.pools: dict[str, DevicePool] = {}  # from the name of a zarr array to the pool for its records
        self.use(slots)

    def use(self, slots: Mapping[str, int]) -> None:
        """Replace the pools by new pools, whose slots are EMPTY. Their memory is allocated (``_allocate``).

        ``slots`` is a dictionary from the name of each zarr array to the number of slots for its records.
        """
        first = 0
        for array, memory in _allocate(self._device, self._manifest, slots).items():
            self.pools[array] = DevicePool(self._manifest, array, first, memory, self._policy)
            first += self.pools[array].slot_count

    def pool(self, block: int) -> DevicePool:
        """Return the pool for the records of a block."""
        return self.pools[self._manifest.blocks[block].array]

    def slot_of(self, key: ExpertKey) -> PoolSlot | None:
        """Return the slot that holds the record of ``key`` or is being filled with it, or None.

        The number is that of the slot in its pool.
        """
        return self.pool(key.block).slot_of(key)

    @property
    def is_filling(self) -> bool:
        """Whether a slot is LOADING."""
        return any(pool.loading for pool in self.pools.values())

    @property
    def counts(self) -> dict[str, int]:
        """A dictionary from the name of each zarr array to the number of slots for its records."""
        return {array: pool.slot_count for array, pool in self.pools.items()}

    @property
    def fewer_counts(self) -> dict[str, int]:
        """Three quarters of ``counts``, but at least enough for one token's experts in one block."""
        return _fewer(self._manifest, self.counts)

    @property
    def is_dropped(self) -> bool:
        """Whether the slots have no memory: so it is after ``drop`` or ``clear``, until ``use``."""
        return not all(pool.records for pool in self.pools.values())

    def wait_for_copies(self) -> None:
        """Wait until all queued copies are done."""
        for pool in self.pools.values():
            for event in pool.copied:
                if event is not None:
                    event.synchronize()

    def drop(self) -> list[ExpertKey]:
        """Evict all records, and free the memory once the device no longer uses it. Return the keys of the records.

        No slot may be leased or LOADING.
        """
        self.wait_for_copies()
        for pool in self.pools.values():
            for event in [event for uses in pool.used for event in uses.values()]:
                event.synchronize()
        keys = [key for pool in self.pools.values() for key in pool.keys]
        self._counters.count(evictions=len(keys))
        self.clear()
        return keys

    def clear(self) -> None:
        """Release the memory of the slots. The memory of a leased record is freed only when the lease is gone."""
        for pool in self.pools.values():
            pool.records.clear()

    def stats(self) -> TierStats:
        """Return the tier's counters, and the present state of its slots."""
        return stats_of(self._counters, self.pools.values())


def _allocate(device: StreamDevice, manifest: Manifest, slots: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Allocate device memory for slots. If the device has too little free memory, warn, and allocate fewer slots.

    Args:
        device: the device.
        manifest: the store's manifest.
        slots: a dictionary from the name of each of the store's zarr arrays to the number of slots for its records.

    Returns:
        A dictionary from the name of each zarr array to the memory for its slots, uint8 [slots * slot_bytes].

    Raises:
        BudgetError: there is not enough memory for the experts that one token uses in one block.
    """
    sizes = {array: layout.slot_bytes for array, layout in manifest.layouts.items()}
    counts = dict(slots)
    while True:
        try:
            memory = {array: device.allocate(count * sizes[array]) for array, count in counts.items()}
        except torch.OutOfMemoryError:
            less = _fewer(manifest, counts)
            if less == counts:
                least = sum(count * sizes[array] for array, count in counts.items())
                raise BudgetError(
                    f"The device has no room for the experts that one token needs in one block: {format_bytes(least)}.",
                    "Free some memory of the device, or run on the CPU: `device` cpu.",
                ) from None
            counts = less
        else:
            break
    if counts != slots:
        warnings.warn(
            f"The device has room for {sum(counts.values())} experts, not for {sum(slots.values())}: it caches fewer.",
            RuntimeWarning,
            stacklevel=5,
        )
    return memory


def _fewer(manifest: Manifest, slots: Mapping[str, int]) -> dict[str, int]:
    """Return three quarters of each number of slots, but at least enough for one token's experts in one block.

    ``slots`` and the result are dictionaries from the name of each zarr array to a number of slots.
    """
    fewest = {array: least for array, (least, _) in slot_ranges(manifest).items()}
    return {array: max(fewest[array], count * 3 // 4) for array, count in slots.items()}
