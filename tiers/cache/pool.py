"""A pool: the slots of one record geometry in a tier, what each holds, and which record is evicted next. Pure.

    EMPTY -- begin(key) --> LOADING -- fill --> READY -- begin(other key) --> LOADING
                               `------ fail --> EMPTY

A *pin* holds a READY slot in place. A pin on a LOADING slot is a claim: a demand waits for its record.

Blocks form *groups* (``budget.plan_groups``) that evict among their own records, each by an order (``orders``). A
prefetch takes the slot of an earlier prefetch that turned out wrong, of any block, or else its own block's next victim.
Its record is the next victim itself until it is used. So a right prediction evicts what the demand would have evicted,
and of several wrong ones in a row only the first costs a record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from moetier.tiers.layout import ExpertKey
from moetier.tiers.stats import TierCounters, TierStats

from .budget import Group
from .orders import DEFAULT_ORDER, ORDERS, Order


class SlotPool:
    """Slots, numbered from 0, of ``slot_bytes`` each; ``first`` is the number of the first one in the tier.

    With the order "lru", a group within its quota holds exactly what a least-recently-used cache of that size holds.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        make_order: Callable[[int], Order] = ORDERS[DEFAULT_ORDER],
        *,
        first: int = 0,
        slot_bytes: int = 0,
    ) -> None:
        """Make as many slots as the quotas of ``groups`` add up to; ``make_order`` takes the quota of a group."""
        self.count = sum(group.quota for group in groups)
        self.first = first
        self.slot_bytes = slot_bytes
        # A slot is READY if it has a key and is not LOADING. Changes are in an order that keeps this true of whole
        # records alone, wherever an exception cuts them.
        self._keys: list[ExpertKey | None] = [None] * self.count
        self._loading: set[int] = set()
        self._pins = [0] * self.count
        self._slot_of: dict[ExpertKey, int] = {}
        self._free = dict.fromkeys(reversed(range(self.count)))  # an ordered set; the end is taken first
        self._quotas = [group.quota for group in groups]
        self._group_of = {block: number for number, group in enumerate(groups) for block in group.blocks}
        self._orders = [make_order(quota) for quota in self._quotas]

    # -- slots --------------------------------------------------------------------------------------------------------

    def find(self, key: ExpertKey) -> int | None:
        """The slot that holds ``key`` or is being filled with it, or None."""
        return self._slot_of.get(key)

    def holds(self, key: ExpertKey) -> bool:
        """Return whether the record of ``key`` is READY."""
        slot = self._slot_of.get(key)
        return slot is not None and slot not in self._loading

    def held(self) -> list[ExpertKey]:
        """All keys that have a slot, READY or LOADING."""
        return list(self._slot_of)

    def key(self, slot: int) -> ExpertKey:
        """The key that a slot holds or is being filled with. The slot must not be EMPTY."""
        key = self._keys[slot]
        assert key is not None, f"slot {slot} is empty"
        return key

    def is_loading(self, slot: int) -> bool:
        """Return whether the slot is being filled."""
        return slot in self._loading

    def is_ready(self, slot: int) -> bool:
        """Return whether the slot holds a whole record."""
        return self._keys[slot] is not None and slot not in self._loading

    def is_evictable(self, slot: int) -> bool:
        """Return whether the slot is READY and not pinned."""
        return not self._pins[slot] and self.is_ready(slot)

    def pins(self, slot: int) -> int:
        """The number of pins on the slot, claims included."""
        return self._pins[slot]

    @property
    def ready(self) -> int:
        """The number of READY slots."""
        return len(self._slot_of) - len(self._loading)

    @property
    def loading(self) -> int:
        """The number of LOADING slots."""
        return len(self._loading)

    @property
    def leased(self) -> int:
        """The number of READY slots that are pinned."""
        return sum(pins > 0 and slot not in self._loading for slot, pins in enumerate(self._pins))

    def begin(self, slot: int, key: ExpertKey, *, scan: bool = False, prefetched: bool = False) -> ExpertKey | None:
        """Begin to fill a slot that is EMPTY or evictable; return the key of the record that was evicted, if any.

        A ``prefetched`` record is evicted before used ones.
        """
        assert key not in self._slot_of, f"{key} has a slot"
        evicted = self._keys[slot]
        assert evicted is None or self.is_evictable(slot), f"slot {slot} is loading or has {self._pins[slot]} pins"
        self._loading.add(slot)
        if evicted is None:
            del self._free[slot]
        else:
            self._order(evicted).remove(evicted)
            del self._slot_of[evicted]
        self._keys[slot] = key
        self._slot_of[key] = slot
        order = self._order(key)
        order.add(key, scan=scan)
        if prefetched:
            order.demote(key)
        return evicted

    def fill(self, slot: int) -> None:
        """Make a LOADING slot READY: its record has arrived. Claims become pins."""
        self._loading.remove(slot)

    def fail(self, slot: int) -> None:
        """Empty a LOADING slot whose record will not arrive. Claims on it end."""
        assert slot in self._loading, f"slot {slot} is not loading"
        key = self.key(slot)
        self._pins[slot] = 0
        self._order(key).remove(key)
        del self._slot_of[key]
        self._keys[slot] = None
        self._loading.remove(slot)
        self._free[slot] = None

    def pin(self, slot: int) -> None:
        """Add a pin to a READY slot, or a claim to a LOADING one."""
        assert self._keys[slot] is not None, f"slot {slot} is empty"
        self._pins[slot] += 1

    def pin_ready(self, key: ExpertKey) -> int | None:
        """Pin the slot of a key if it is READY, and return it; else return None."""
        slot = self._slot_of.get(key)
        if slot is None or slot in self._loading:
            return None
        self._pins[slot] += 1
        return slot

    def unpin(self, slot: int) -> int:
        """Remove one pin. Return how many are left."""
        assert self._pins[slot] > 0, f"slot {slot} is not pinned"
        self._pins[slot] -= 1
        return self._pins[slot]

    # -- evictions ----------------------------------------------------------------------------------------------------

    def quota(self, block: int) -> int:
        """The quota of the block's group, in slots. A demand for more records is a scan."""
        return self._quotas[self._group_of[block]]

    def vacancy(self, block: int) -> int | None:
        """An EMPTY slot that belongs to the block's group, or None."""
        return self._empty() if self._surplus(self._group_of[block]) < 0 else None

    def choose(
        self,
        block: int,
        *,
        may_borrow: bool = False,
        scan: bool = False,
        keep: Callable[[ExpertKey], bool] = lambda key: False,
    ) -> int | None:
        """Choose the slot for a record of ``block``: an EMPTY one or one to evict. Return None if there is none.

        A group below its quota takes a free slot; a group at its quota evicts one of its own records first.

        Args:
            may_borrow: if the group has no slot to offer, take one of another group, which takes one back when it
                needs it, or a slot that a scan would otherwise leave alone.
            scan: the demand is a scan.
            keep: keys that are not evicted.
        """
        number = self._group_of[block]
        slot: int | None = None
        if self._surplus(number) < 0:
            # Without a free slot below the quota, another group has borrowed one.
            slot = self._empty()
            if slot is None:
                borrowers = (number for number in self._by_surplus() if self._surplus(number) > 0)
                slot = self._first_victim(borrowers, keep)
        if slot is None:
            slot = self._first_victim([number], keep, scan=scan)
        if slot is None and may_borrow:
            slot = self._empty()
            if slot is None:
                slot = self._first_victim([number, *self._by_surplus()], keep)
        return slot

    def touch(self, keys: Iterable[ExpertKey], *, scan: bool = False) -> None:
        """Note uses of records that have slots, in their order."""
        for key in keys:
            self._orders[self._group_of[key[0]]].touch(key, scan=scan)

    def _order(self, key: ExpertKey) -> Order:
        return self._orders[self._group_of[key.block]]

    def _empty(self) -> int | None:
        return next(reversed(self._free), None)

    def _first_victim(
        self, numbers: Iterable[int], keep: Callable[[ExpertKey], bool], *, scan: bool = False
    ) -> int | None:
        """The first slot to evict of the first of these groups that has one, in the groups' orders."""
        for number in numbers:
            for key in self._orders[number].victims(scan=scan):
                slot = self._slot_of[key]
                if self.is_evictable(slot) and not keep(key):
                    return slot
        return None

    def _surplus(self, number: int) -> int:
        return len(self._orders[number]) - self._quotas[number]

    def _by_surplus(self) -> list[int]:
        """Group numbers, the group that is furthest above its quota first."""
        return sorted(range(len(self._orders)), key=lambda number: -self._surplus(number))

    # -- repair and checks --------------------------------------------------------------------------------------------

    def contents(self) -> list[tuple[ExpertKey | None, bool]]:
        """Return for each slot the key that it holds or is being filled with (None if EMPTY), and whether it is
        LOADING."""
        return [(key, slot in self._loading) for slot, key in enumerate(self._keys)]

    def repair(self, pins: Sequence[int], loading: Mapping[int, ExpertKey]) -> None:
        """Make slots and groups agree after a step that an exception has cut.

        The slots of ``loading`` become LOADING, READY ones stay, all others become EMPTY. ``pins`` is the true number
        of pins of each slot.
        """
        self._slot_of.clear()
        self._free.clear()
        for slot in reversed(range(self.count)):
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
                self._slot_of[key] = slot
        for order in self._orders:
            for key in set(order).difference(self._slot_of):
                order.remove(key)
        grouped = set[ExpertKey]().union(*self._orders)
        for key in self._slot_of:
            if key not in grouped:
                self._order(key).add(key, scan=False)

    def check_integrity(self) -> None:
        """Assert that every slot is in exactly one state, and every key in at most one slot and in its group."""
        held = {key: slot for slot, key in enumerate(self._keys) if key is not None}
        assert held == self._slot_of
        assert sorted([*held.values(), *self._free]) == list(range(self.count))
        assert self._loading <= set(held.values())
        assert all(pins >= 0 for pins in self._pins)
        assert not any(self._pins[slot] for slot in self._free)
        grouped = [(key, number) for number, order in enumerate(self._orders) for key in order]
        assert sorted(grouped) == sorted((key, self._group_of[key.block]) for key in held)
        assert [len(order) for order in self._orders] == [len(list(order)) for order in self._orders]


def snapshot(counters: TierCounters, pools: Iterable[SlotPool]) -> TierStats:
    """Statistics of the tier that consists of ``pools``."""
    pools = list(pools)
    return counters.snapshot(
        slots=sum(pool.count for pool in pools),
        ready=sum(pool.ready for pool in pools),
        leased=sum(pool.leased for pool in pools),
        slot_bytes=sum(pool.count * pool.slot_bytes for pool in pools),
    )
