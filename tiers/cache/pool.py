"""A pool: the slots of one record geometry in a tier, and the policy that evicts their records.

The pools of the host tier and of the device tier add what each tier needs besides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from moetier.tiers.layout import ExpertKey
from moetier.tiers.stats import TierCounters, TierStats

from .orders import DEFAULT_ORDER, ORDERS
from .quotas import BlockPolicy, Group
from .slots import Slots


class SlotPool:
    """``count`` slots of ``slot_bytes`` each; ``first`` is the number of the first one in the tier."""

    def __init__(
        self, count: int, groups: Sequence[Group], first: int, slot_bytes: int, order: str = DEFAULT_ORDER
    ) -> None:
        self.slots = Slots(count)
        self.policy = BlockPolicy(self.slots, groups, ORDERS[order])
        self.first = first
        self.slot_bytes = slot_bytes

    def begin(self, slot: int, key: ExpertKey, *, scan: bool = False, prefetched: bool = False) -> ExpertKey | None:
        """Begin to fill a slot that is EMPTY or evictable; return the key of the record that was evicted, if any."""
        evicted = None
        if self.slots.is_ready(slot):
            evicted = self.slots.key(slot)
            self.policy.remove(slot)
            self.slots.evict(slot)
        self.slots.begin(slot, key)
        self.policy.admit(key.block, slot, scan=scan, prefetched=prefetched)
        return evicted

    def fail(self, slot: int) -> None:
        """Empty a LOADING slot whose record will not arrive."""
        self.policy.remove(slot)
        self.slots.fail(slot)

    def repair(self, pins: Sequence[int], loading: Mapping[int, ExpertKey]) -> None:
        """Make slots and policy agree after a step that an exception has cut; the arguments are those of
        ``Slots.repair``."""
        self.slots.repair(pins, loading)
        self.policy.repair()

    def check_integrity(self) -> None:
        """Assert that slots and policy agree."""
        self.slots.check_integrity()
        self.policy.check_integrity()


def snapshot(counters: TierCounters, pools: Iterable[SlotPool]) -> TierStats:
    """Statistics of the tier that consists of ``pools``."""
    pools = list(pools)
    return counters.snapshot(
        slots=sum(pool.slots.count for pool in pools),
        ready=sum(pool.slots.ready for pool in pools),
        leased=sum(pool.slots.leased for pool in pools),
        slot_bytes=sum(pool.slots.count * pool.slot_bytes for pool in pools),
    )
