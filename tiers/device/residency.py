"""The device's slots of all geometries, and what is being copied into them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from moetier.tiers.cache.pool import snapshot
from moetier.tiers.cache.slots import State
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.stats import TierCounters, TierStats

from .copies import Copy
from .pool import DevicePool
from .visit import Visit


class DeviceSlots:
    """Of one tier, whose lock is held by who calls."""

    def __init__(
        self, manifest: Manifest, memory: Mapping[str, torch.Tensor], policy: str, counters: TierCounters
    ) -> None:
        self._manifest = manifest
        self._policy = policy
        self._counters = counters
        self._pools: dict[str, DevicePool] = {}
        self.copying = 0  # slots that are being filled now
        self.use(memory)

    def use(self, memory: Mapping[str, torch.Tensor]) -> None:
        """Makes slots, all EMPTY, of ``memory`` by array, as ``allocate`` gives it."""
        first = 0
        for array, slots in memory.items():
            self._pools[array] = DevicePool(self._manifest, array, first, slots, self._policy)
            first += self._pools[array].slots.count

    def pool(self, block: int) -> DevicePool:
        """Where a block's records go."""
        return self._pools[self._manifest.blocks[block].array]

    def find(self, key: ExpertKey) -> int | None:
        """The slot of its pool that holds a key or is being filled with it."""
        return self.pool(key.block).slots.find(key)

    def holds(self, key: ExpertKey) -> bool:
        return self.pool(key.block).slots.holds(key)

    def begin(
        self, pool: DevicePool, slot: int, key: ExpertKey, *, wished: bool = False, passing: bool = False
    ) -> ExpertKey | None:
        """A copy into a slot; returns whose record goes, if there is one."""
        evicted = pool.begin(slot, key, scan=passing, prefetched=wished)
        if evicted is not None:
            self._counters.evictions += 1
        self.copying += 1
        return evicted

    def arrive(self, pool: DevicePool, slot: int, copy: Copy) -> None:
        """What computes on it from now on waits for the copy."""
        self._counters.bytes_in += pool.slot_bytes
        pool.copied[slot] = copy.ready
        pool.used[slot] = dict(copy.uses)
        pool.slots.fill(slot)
        self.copying -= 1

    def give_up(self, pool: DevicePool, slot: int) -> None:
        """What was to come into a slot does not."""
        pool.fail(slot)
        self.copying -= 1

    def repair(self, visits: Collection[Visit], promoting: tuple[DevicePool, int, ExpertKey] | None) -> None:
        """Make all agree after a step that an exception has cut anywhere. What callers hold stays, and what is being
        copied for them, or for the promoter."""
        self.copying = 0
        for pool in self._pools.values():
            pins = [0] * pool.slots.count
            loading: dict[int, ExpertKey] = {}
            for visit in visits:
                if visit.pool is pool:
                    for slot in [*visit.ready, *([visit.leased[0]] if visit.leased is not None else [])]:
                        pins[slot] += 1
                    if visit.filling is not None:
                        loading[visit.filling[0]] = visit.filling[1]
            if promoting is not None and promoting[0] is pool:
                loading[promoting[1]] = promoting[2]
            pool.repair(pins, loading)
            self.copying += len(loading)

    def wait_for_copies(self) -> None:
        """Until all that have been queued are done."""
        for pool in self._pools.values():
            for event in pool.copied:
                if event is not None:
                    event.synchronize()

    @property
    def counts(self) -> dict[str, int]:
        """How many there are, by array."""
        return {array: pool.slots.count for array, pool in self._pools.items()}

    def drop(self) -> list[ExpertKey]:
        """Evicts every record, and lets go of the memory when the device no longer uses it; what was evicted. No slot
        is held or being filled."""
        self.wait_for_copies()
        for pool in self._pools.values():
            for event in [event for uses in pool.used for event in uses.values()]:
                event.synchronize()
        held = [key for pool in self._pools.values() for key in pool.slots.held()]
        self._counters.evictions += len(held)
        self.clear()
        return held

    @property
    def is_dropped(self) -> bool:
        """Whether some slots have no memory."""
        return not all(pool.records for pool in self._pools.values())

    def clear(self) -> None:
        for pool in self._pools.values():
            pool.clear()

    def stats(self) -> TierStats:
        return snapshot(self._counters, self._pools.values())

    def check_integrity(self) -> None:
        """Asserts that slots, groups and copies agree."""
        for pool in self._pools.values():
            pool.check_integrity()
        states = [pool.slots.state(slot) for pool in self._pools.values() for slot in range(pool.slots.count)]
        assert states.count(State.LOADING) == self.copying
