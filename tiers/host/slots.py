"""The slots of a host tier: a pool for each record layout, in the order in which their slots lie in the arena.

This module is a part of the ledger: callers hold the tier's lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moetier.tiers.arena.layout import ArenaLayout
from moetier.tiers.cache.budget import partitions_of
from moetier.tiers.cache.policies import POLICIES
from moetier.tiers.cache.pool import SlotState
from moetier.tiers.layout import ExpertKey, PoolSlot, TierSlot
from moetier.tiers.manifest import Manifest

from .demands import Demand, Load, Pool


class HostSlots:
    """The pools of one host tier."""

    def __init__(self, manifest: Manifest, layout: ArenaLayout, policy: str) -> None:
        """``layout`` is that of the arena that has the slots, and ``policy`` a key of ``POLICIES``."""
        self.pools: dict[str, Pool] = {}  # from the name of a zarr array to its pool, in the order of the pools' slots
        for region, first in zip(layout.regions, layout.first_slots, strict=True):
            partitions = partitions_of(region.slots, manifest.members[region.array])
            self.pools[region.array] = Pool(partitions, POLICIES[policy], first=first, slot_bytes=region.slot_bytes)
        self.pool_of = [self.pools[block.array] for block in manifest.blocks]  # for each block, the pool of its records

    def slot_of(self, key: ExpertKey) -> PoolSlot | None:
        """Return the slot, by its number in its pool, that holds or is to hold the record of ``key``, or None."""
        return self.pool_of[key.block].slot_of(key)

    def is_ready(self, key: ExpertKey) -> bool:
        """Return whether the record of ``key`` is READY."""
        return self.pool_of[key.block].state_of(key) is SlotState.READY

    def quotas(self) -> list[int]:
        """Return for each block the quota of its partition, in slots."""
        return [pool.partitions.quota(block) for block, pool in enumerate(self.pool_of)]

    def starved(self) -> list[Demand]:
        """Return the first starved demand of each pool that has one."""
        return [pool.starved[0] for pool in self.pools.values() if pool.starved]

    def contents(self) -> list[tuple[ExpertKey | None, bool]]:
        """Return for each slot of the tier its key (None if the slot is EMPTY) and whether the slot is LOADING."""
        return [content for pool in self.pools.values() for content in pool.contents()]

    def recover(self, kept: Mapping[TierSlot, ExpertKey]) -> None:
        """Make slots READY that hold intact records of a reclaimed arena. ``kept`` has the keys of these records."""
        for number, key in kept.items():
            pool = self.pool_of[key.block]
            slot = PoolSlot(number - pool.first)
            pool.begin_fill(slot, key)
            pool.complete_fill(slot)

    def repair(self, demands: Iterable[Demand], loads: Iterable[Load]) -> None:
        """Make the slots agree with all demands that are not over and all loads, after an interrupted transition."""
        pins = {pool: [0] * pool.slot_count for pool in self.pools.values()}
        for demand in demands:
            for slot in demand.slots:
                pins[demand.pool][slot] += 1
        loads = list(loads)
        for pool in self.pools.values():
            pool.repair(pins[pool], {load.slot: load.key for load in loads if load.pool is pool})
