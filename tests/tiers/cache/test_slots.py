from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moetier.tiers.cache.slots import Slots, State
from moetier.tiers.layout import ExpertKey

COUNT = 4
KEYS = st.builds(ExpertKey, st.integers(0, 1), st.integers(0, 3))


class SlotsMachine(RuleBasedStateMachine):
    """Compare slots with a dict: slot -> (key, state, pins)."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = Slots(COUNT)
        self.model: dict[int, tuple[ExpertKey, State, int]] = {}

    def holder(self, key: ExpertKey) -> int | None:
        return next((slot for slot, (held, _, _) in self.model.items() if held == key), None)

    @rule(key=KEYS)
    def begin(self, key: ExpertKey) -> None:
        slot = self.slots.free()
        assert (slot is None) == (len(self.model) == COUNT)
        if self.holder(key) is not None:
            if slot is not None:
                with pytest.raises(AssertionError):
                    self.slots.begin(slot, key)
        elif slot is not None:
            assert slot not in self.model
            self.slots.begin(slot, key)
            self.model[slot] = (key, State.LOADING, 0)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), act=st.sampled_from(["fill", "fail", "evict", "pin", "unpin"]))
    def act(self, data: st.DataObject, act: str) -> None:
        slot = data.draw(st.sampled_from(sorted(self.model)))
        key, state, pins = self.model[slot]
        legal, after = {
            "fill": (state is State.LOADING, (key, State.READY, pins)),
            "fail": (state is State.LOADING, None),
            "evict": (state is State.READY and not pins, None),
            "pin": (True, (key, state, pins + 1)),
            "unpin": (pins > 0, (key, state, pins - 1)),
        }[act]
        method: Callable[[int], object] = getattr(self.slots, act)
        if not legal:
            with pytest.raises(AssertionError):
                method(slot)
        else:
            method(slot)
            if after is None:
                del self.model[slot]
            else:
                self.model[slot] = after

    @rule(key=KEYS)
    def find(self, key: ExpertKey) -> None:
        assert self.slots.find(key) == self.holder(key)

    @invariant()
    def agrees(self) -> None:
        self.slots.check_integrity()
        for slot in range(COUNT):
            if slot in self.model:
                key, state, pins = self.model[slot]
                assert (self.slots.key(slot), self.slots.state(slot), self.slots.pins(slot)) == (key, state, pins)
                assert self.slots.is_ready(slot) == (state is State.READY)
                assert self.slots.is_evictable(slot) == (state is State.READY and not pins)
            else:
                assert self.slots.state(slot) is State.EMPTY
                assert not self.slots.is_evictable(slot)
        assert self.slots.ready == sum(state is State.READY for _, state, _ in self.model.values())


TestSlots = SlotsMachine.TestCase


def test_an_empty_slot_can_not_be_used() -> None:
    slots = Slots(1)
    for method in (slots.fill, slots.fail, slots.evict, slots.pin, slots.unpin, slots.key):
        with pytest.raises(AssertionError):
            method(0)


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda slots: slots._free.clear(),
        lambda slots: slots._free.update({0: None}),
        lambda slots: slots._slot_of.clear(),
        lambda slots: slots._slot_of.update({ExpertKey(0, 0): 1}),
        lambda slots: slots._keys.__setitem__(0, None),
        lambda slots: slots._keys.__setitem__(2, ExpertKey(1, 1)),
        lambda slots: slots._states.__setitem__(0, State.EMPTY),
        lambda slots: slots._pins.__setitem__(0, -1),
        lambda slots: slots._pins.__setitem__(2, 1),
    ],
)
def test_check_integrity_sees_what_is_wrong(corrupt: Callable[[Slots], None]) -> None:
    slots = Slots(3)
    for slot, key in ((0, ExpertKey(0, 0)), (1, ExpertKey(0, 1))):
        slots.begin(slot, key)
        slots.fill(slot)
    slots.check_integrity()
    corrupt(slots)
    with pytest.raises(AssertionError):
        slots.check_integrity()
