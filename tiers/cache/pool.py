"""A pool: the slots of a tier for records of one layout, what each slot holds, and which record is evicted next.

A pool has keys and numbers of slots. It holds no records and has no lock.

    EMPTY -- begin_fill --> LOADING -- complete_fill --> READY -- begin_fill (another key) --> LOADING
                               `------ abort_fill --> EMPTY

A *pin* keeps the record of a READY slot from being evicted. A pin on a LOADING slot is a *claim*: a demand waits for
the record that is being loaded.

The slots are divided among *partitions* (``policies.Partitions``). A partition evicts only records of its own
blocks, in the order of a policy. A prefetch takes the slot of an earlier prefetch of any block if that record
was not used and is no longer requested. Otherwise it evicts the next record of its own partition. Until it is used, a
prefetched record is itself the next to be evicted. So a right prediction evicts the record that its demand would have
evicted. Of several wrong predictions in a row, only the first evicts a record that was in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from itertools import chain
from typing import NamedTuple

from moetier.tiers.layout import ExpertKey, PoolSlot, TierSlot
from moetier.tiers.stats import TierCounters, TierStats

from .budget import Partition
from .policies import Partitions, Policy


class SlotState(Enum):
    """The state of a record's slot. EMPTY also stands for a record without a slot."""

    EMPTY = "no slot has the record"
    LOADING = "its slot is being filled"
    READY = "its slot holds it"


class SlotCounts(NamedTuple):
    """How many slots of a pool are in each state. Other slots are EMPTY."""

    ready: int
    loading: int
    leased: int  # those of the READY slots that are pinned


class SlotPool:
    """Slots for records of one layout, ``slot_bytes`` each. Slot 0 of the pool is slot ``first`` of the tier.

    ``partitions`` has the quotas of blocks, and notes which records are used.
    """

    def __init__(
        self,
        partitions: Sequence[Partition],
        make_policy: Callable[[int], Policy],
        *,
        first: int = 0,
        slot_bytes: int = 0,
    ) -> None:
        """Make as many slots as the quotas of ``partitions`` add up to.

        Args:
            partitions: the partitions of blocks whose records the pool holds.
            make_policy: returns a policy for a partition with a given quota.
            first: number of the pool's first slot in the tier.
            slot_bytes: size of a slot in bytes.
        """
        self.partitions = Partitions(partitions, make_policy)
        self.slot_count = self.partitions.slot_count
        self.first = first
        self.slot_bytes = slot_bytes
        # A slot is READY if it has a key and is not LOADING. The methods change the state in such an order that only
        # slots with whole records are READY, wherever an exception interrupts a method.
        self._keys: list[ExpertKey | None] = [None] * self.slot_count
        self._loading: set[PoolSlot] = set()
        self._pins = [0] * self.slot_count
        self._slots: dict[ExpertKey, PoolSlot] = {}
        # an ordered set, of which the last slot is taken first
        self._free = dict.fromkeys(map(PoolSlot, reversed(range(self.slot_count))))

    # -- slots --------------------------------------------------------------------------------------------------------

    def slot_of(self, key: ExpertKey) -> PoolSlot | None:
        """Return the slot that holds the record of ``key`` or is being filled with it, or None."""
        return self._slots.get(key)

    def state_of(self, key: ExpertKey) -> SlotState:
        """Return the state of the slot of the record of ``key``; EMPTY if it has none."""
        if (slot := self._slots.get(key)) is None:
            return SlotState.EMPTY
        return SlotState.LOADING if slot in self._loading else SlotState.READY

    @property
    def keys(self) -> list[ExpertKey]:
        """All keys that have a slot, READY or LOADING."""
        return list(self._slots)

    def number(self, slot: PoolSlot) -> TierSlot:
        """Return the tier's number of a slot of this pool."""
        return TierSlot(self.first + slot)

    def key(self, slot: PoolSlot) -> ExpertKey:
        """Return the key of the record that a slot holds or is being filled with. The slot must not be EMPTY."""
        key = self._keys[slot]
        assert key is not None, f"slot {slot} is empty"
        return key

    def is_evictable(self, slot: PoolSlot) -> bool:
        """Return whether the slot is READY and not pinned."""
        return not self._pins[slot] and self._keys[slot] is not None and slot not in self._loading

    @property
    def loading(self) -> int:
        """Number of slots that are LOADING."""
        return len(self._loading)

    def counts(self) -> SlotCounts:
        """Return how many slots are in each state."""
        leased = sum(pins > 0 and slot not in self._loading for slot, pins in enumerate(self._pins))
        return SlotCounts(len(self._slots) - self.loading, self.loading, leased)

    def begin_fill(
        self, slot: PoolSlot, key: ExpertKey, *, is_scan: bool = False, is_prefetch: bool = False
    ) -> ExpertKey | None:
        """Begin to fill a slot that is EMPTY or evictable, which makes it LOADING.

        Args:
            slot: number of the slot in the pool.
            key: key of the record that the slot will hold. No other slot may have this key.
            is_scan: whether the demand for the record is a scan.
            is_prefetch: whether this is a prefetch. If so, the record is evicted before records that were used.

        Returns:
            The key of the record that was evicted, or None.
        """
        assert key not in self._slots, f"{key} has a slot"
        evicted = self._keys[slot]
        assert evicted is None or self.is_evictable(slot), f"slot {slot} is loading or has {self._pins[slot]} pins"
        self._loading.add(slot)
        if evicted is None:
            del self._free[slot]
        else:
            self.partitions.remove(evicted)
            del self._slots[evicted]
        self._keys[slot] = key
        self._slots[key] = slot
        self.partitions.add(key, is_scan=is_scan, is_prefetch=is_prefetch)
        return evicted

    def complete_fill(self, slot: PoolSlot) -> None:
        """Make a LOADING slot READY, because its record has arrived. Claims on the slot become pins."""
        self._loading.remove(slot)

    def abort_fill(self, slot: PoolSlot) -> None:
        """Make a LOADING slot EMPTY, because its record will not arrive. Claims on the slot end."""
        assert slot in self._loading, f"slot {slot} is not loading"
        key = self.key(slot)
        self._pins[slot] = 0
        self.partitions.remove(key)
        del self._slots[key]
        self._keys[slot] = None
        self._loading.remove(slot)
        self._free[slot] = None

    def pin(self, slot: PoolSlot) -> None:
        """Add a pin to a READY slot, or a claim to a LOADING slot."""
        assert self._keys[slot] is not None, f"slot {slot} is empty"
        self._pins[slot] += 1

    def pin_ready(self, key: ExpertKey) -> PoolSlot | None:
        """If the slot of the record of ``key`` is READY, pin it, and return it; otherwise return None."""
        if (slot := self._slots.get(key)) is None or slot in self._loading:
            return None
        self._pins[slot] += 1
        return slot

    def unpin(self, slot: PoolSlot) -> int:
        """Remove one pin or claim from a slot. Return how many are left on it."""
        assert self._pins[slot] > 0, f"slot {slot} is not pinned"
        self._pins[slot] -= 1
        return self._pins[slot]

    # -- evictions ----------------------------------------------------------------------------------------------------

    def vacancy(self, block: int) -> PoolSlot | None:
        """Return an EMPTY slot, or None if there is no such slot or the block's partition has no room in its quota."""
        return self._empty() if self.partitions.has_room(block) else None

    def choose(
        self,
        block: int,
        *,
        may_borrow: bool = False,
        is_scan: bool = False,
        keep: Callable[[ExpertKey], bool] = lambda key: False,
    ) -> PoolSlot | None:
        """Return a slot for a record of ``block``: an EMPTY slot, or a slot whose record is to be evicted.

        If the block's partition has fewer slots than its quota, it gets an EMPTY slot, or a slot from a partition that
        has more than its own quota. Otherwise the partition evicts one of its own records. Returns None if there is no
        such slot.

        Args:
            block: the block of the record.
            may_borrow: if there is no such slot, take an EMPTY slot or any evictable slot, also from another partition
                or one that a scan would not evict. The other partition gets a slot back when it needs one.
            is_scan: whether the demand for the record is a scan.
            keep: returns True for keys whose records must not be evicted.
        """
        slot: PoolSlot | None = None
        if self.partitions.has_room(block):
            # If the partition is below its quota and no slot is EMPTY, another partition is above its quota.
            slot = self._empty()
            if slot is None:
                slot = self._first_victim(self.partitions.borrowed(), keep)
        if slot is None:
            slot = self._first_victim(self.partitions.victims(block, is_scan=is_scan), keep)
        if slot is None and may_borrow:
            slot = self._empty()
            if slot is None:
                slot = self._first_victim(chain(self.partitions.victims(block), self.partitions.all_victims()), keep)
        return slot

    def choose_scanned(self, keep: Callable[[ExpertKey], bool]) -> PoolSlot | None:
        """Return a slot for a scan's prefetch: an EMPTY slot, or that of a scanned record of any partition, or None.

        ``keep`` returns True for keys whose records must not be evicted.
        """
        slot = self._empty()
        return self._first_victim(self.partitions.scanned(), keep) if slot is None else slot

    def _empty(self) -> PoolSlot | None:
        return next(reversed(self._free), None)

    def _first_victim(self, keys: Iterable[ExpertKey], keep: Callable[[ExpertKey], bool]) -> PoolSlot | None:
        """Return the slot of the first of ``keys`` that is evictable, and for which ``keep`` is false; or None."""
        for key in keys:
            slot = self._slots[key]
            if self.is_evictable(slot) and not keep(key):
                return slot
        return None

    # -- repair -------------------------------------------------------------------------------------------------------

    def contents(self) -> list[tuple[ExpertKey | None, bool]]:
        """Return for each slot its key (None if the slot is EMPTY) and whether it is LOADING."""
        return [(key, slot in self._loading) for slot, key in enumerate(self._keys)]

    def repair(self, pins: Sequence[int], loading: Mapping[PoolSlot, ExpertKey]) -> None:
        """Make slots and partitions consistent again after an exception has interrupted a change.

        Args:
            pins: the right number of pins and claims of each slot.
            loading: a dictionary from each slot that is being filled to the key of its record. These slots become
                LOADING. Of the other slots, those that are READY stay so, and the rest become EMPTY.
        """
        self._slots.clear()
        self._free.clear()
        for slot in map(PoolSlot, reversed(range(self.slot_count))):
            if slot in loading:
                self._loading.add(slot)
                self._keys[slot] = loading[slot]
            elif slot in self._loading:
                self._keys[slot] = None
                self._loading.remove(slot)
            key = self._keys[slot]
            self._pins[slot] = 0 if key is None else pins[slot]
            if key is None:
                self._free[slot] = None
            else:
                self._slots[key] = slot
        self.partitions.repair(self._slots)


def stats_of(counters: TierCounters, pools: Iterable[SlotPool]) -> TierStats:
    """Return the statistics of a tier: its counters, and the state of the slots in its ``pools``."""
    pools = list(pools)
    counts = [pool.counts() for pool in pools]
    return counters.snapshot(
        slots=sum(pool.slot_count for pool in pools),
        ready=sum(count.ready for count in counts),
        leased=sum(count.leased for count in counts),
        memory_bytes=sum(pool.slot_count * pool.slot_bytes for pool in pools),
    )
