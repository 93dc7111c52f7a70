"""Slots: which record is in which slot, and how often it is pinned. Bookkeeping only: the owner does I/O and locks.

    EMPTY -- begin(key) --> LOADING -- fill --> READY -- evict --> EMPTY
                               `------ fail -----------------------^

A *pin* holds a READY slot in place. A pin on a LOADING slot is a claim: a demand waits for its record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum

from moetier.tiers.layout import ExpertKey


class State(Enum):
    """State of a slot: without a record, being filled, or holding a whole record."""

    EMPTY = "empty"
    LOADING = "loading"
    READY = "ready"


class Slots:
    """``count`` slots, numbered from 0."""

    def __init__(self, count: int) -> None:
        assert count > 0
        self.count = count
        self._states = [State.EMPTY] * count
        self._keys: list[ExpertKey | None] = [None] * count
        self._pins = [0] * count
        self._slot_of: dict[ExpertKey, int] = {}
        self._free = dict.fromkeys(reversed(range(count)))  # an ordered set; the end is taken first

    def find(self, key: ExpertKey) -> int | None:
        """The slot that holds ``key`` or is being filled with it, or None."""
        return self._slot_of.get(key)

    def holds(self, key: ExpertKey) -> bool:
        """Whether the record of ``key`` is READY."""
        slot = self._slot_of.get(key)
        return slot is not None and self._states[slot] is State.READY

    def held(self) -> list[ExpertKey]:
        """All keys that have a slot, READY or LOADING."""
        return list(self._slot_of)

    def free(self) -> int | None:
        """An EMPTY slot, or None."""
        return next(reversed(self._free), None)

    def key(self, slot: int) -> ExpertKey:
        """The key that a slot holds or is being filled with. The slot must not be EMPTY."""
        key = self._keys[slot]
        assert key is not None, f"slot {slot} is empty"
        return key

    def state(self, slot: int) -> State:
        """Whether the slot is EMPTY, LOADING or READY."""
        return self._states[slot]

    def is_ready(self, slot: int) -> bool:
        """Whether the slot holds a whole record."""
        return self._states[slot] is State.READY

    def is_evictable(self, slot: int) -> bool:
        """Whether the slot is READY and not pinned."""
        return self._states[slot] is State.READY and not self._pins[slot]

    def pins(self, slot: int) -> int:
        """The number of pins on the slot, claims included."""
        return self._pins[slot]

    @property
    def ready(self) -> int:
        """The number of READY slots."""
        return self._states.count(State.READY)

    @property
    def loading(self) -> int:
        """How many slots are LOADING."""
        return self._states.count(State.LOADING)

    @property
    def leased(self) -> int:
        """The number of READY slots that are pinned."""
        return sum(pins > 0 and state is State.READY for pins, state in zip(self._pins, self._states, strict=True))

    def begin(self, slot: int, key: ExpertKey) -> None:
        """Make an EMPTY slot LOADING: the load of ``key`` into it begins."""
        assert self._states[slot] is State.EMPTY, f"slot {slot} is {self._states[slot]}"
        assert key not in self._slot_of, f"{key} has a slot"
        del self._free[slot]
        self._states[slot] = State.LOADING
        self._keys[slot] = key
        self._slot_of[key] = slot

    def fill(self, slot: int) -> None:
        """Make a LOADING slot READY: its record has arrived. Claims become pins."""
        assert self._states[slot] is State.LOADING, f"slot {slot} is {self._states[slot]}"
        self._states[slot] = State.READY

    def fail(self, slot: int) -> None:
        """Empty a LOADING slot whose record will not arrive. Claims on it end."""
        assert self._states[slot] is State.LOADING, f"slot {slot} is {self._states[slot]}"
        self._pins[slot] = 0
        self._empty(slot)

    def evict(self, slot: int) -> None:
        """Empty a READY slot that is not pinned."""
        assert self.is_evictable(slot), f"slot {slot} is {self._states[slot]} with {self._pins[slot]} pins"
        self._empty(slot)

    def pin(self, slot: int) -> None:
        """Add a pin to a READY slot, or a claim to a LOADING one."""
        assert self._states[slot] is not State.EMPTY, f"slot {slot} is empty"
        self._pins[slot] += 1

    def unpin(self, slot: int) -> int:
        """Remove one pin. Return how many are left."""
        assert self._pins[slot] > 0, f"slot {slot} is not pinned"
        self._pins[slot] -= 1
        return self._pins[slot]

    def contents(self) -> list[tuple[ExpertKey | None, bool]]:
        """For each slot: the key that it holds or is being filled with (None if EMPTY), and whether it is LOADING."""
        return [(key, state is State.LOADING) for key, state in zip(self._keys, self._states, strict=True)]

    def repair(self, pins: Sequence[int], loading: Mapping[int, ExpertKey]) -> None:
        """Repair the state after a step that an exception has cut.

        The slots of ``loading`` become LOADING, READY ones stay, all others become EMPTY. ``pins`` is the true number
        of pins of each slot.
        """
        self._slot_of.clear()
        self._free.clear()
        for slot in reversed(range(self.count)):
            key = loading.get(slot)
            if key is not None:
                self._states[slot] = State.LOADING
            elif self._states[slot] is State.READY:
                key = self._keys[slot]
            self._keys[slot] = key
            self._pins[slot] = 0 if key is None else pins[slot]
            if key is None:
                self._states[slot] = State.EMPTY
                self._free[slot] = None
            else:
                self._slot_of[key] = slot

    def check_integrity(self) -> None:
        """Assert that every slot is in exactly one state and every key in at most one slot."""
        empty = [slot for slot in range(self.count) if self._states[slot] is State.EMPTY]
        assert sorted(self._free) == empty
        assert all(self._keys[slot] is None and not self._pins[slot] for slot in empty)
        held = {key: slot for slot, key in enumerate(self._keys) if key is not None}
        assert held == self._slot_of
        assert len(held) + len(empty) == self.count
        assert all(pins >= 0 for pins in self._pins)

    def _empty(self, slot: int) -> None:
        del self._slot_of[self.key(slot)]
        self._keys[slot] = None
        self._states[slot] = State.EMPTY
        self._free[slot] = None
