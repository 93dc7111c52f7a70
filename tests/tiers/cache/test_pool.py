from __future__ import annotations

from collections.abc import Callable

import pytest
from cuts import cut
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from integrity import check_pool

from moetier.tiers.cache.budget import Partition
from moetier.tiers.cache.policies import POLICIES
from moetier.tiers.cache.pool import SlotPool, SlotState
from moetier.tiers.layout import ExpertKey

COUNT = 4
READY, LOADING = "ready", "loading"
KEYS = st.builds(ExpertKey, st.integers(0, 1), st.integers(0, 3))


def pool_of(*quotas: int) -> SlotPool:
    """A pool with a partition for each block."""
    return SlotPool([Partition((block,), quota) for block, quota in enumerate(quotas)], POLICIES["lru"])


class PoolMachine(RuleBasedStateMachine):
    """Compare slots with a dict: slot -> (key, state, pins)."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool_of(1, COUNT - 1)
        self.model: dict[int, tuple[ExpertKey, str, int]] = {}

    def holder(self, key: ExpertKey) -> int | None:
        return next((slot for slot, (held, _, _) in self.model.items() if held == key), None)

    @rule(key=KEYS, slot=st.integers(0, COUNT - 1))
    def begin(self, key: ExpertKey, slot: int) -> None:
        held, state, pins = self.model.get(slot, (None, READY, 0))
        if self.holder(key) is not None or state == LOADING or pins:
            with pytest.raises(AssertionError):
                self.pool.begin_fill(slot, key)
        else:
            assert self.pool.begin_fill(slot, key) == held
            self.model[slot] = (key, LOADING, 0)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), act=st.sampled_from(["complete_fill", "abort_fill", "pin", "unpin"]))
    def act(self, data: st.DataObject, act: str) -> None:
        slot = data.draw(st.sampled_from(sorted(self.model)))
        key, state, pins = self.model[slot]
        legal, after = {
            "complete_fill": (state == LOADING, (key, READY, pins)),
            "abort_fill": (state == LOADING, None),
            "pin": (True, (key, state, pins + 1)),
            "unpin": (pins > 0, (key, state, pins - 1)),
        }[act]
        method: Callable[[int], object] = getattr(self.pool, act)
        if not legal:
            with pytest.raises((AssertionError, KeyError)):
                method(slot)
        else:
            method(slot)
            if after is None:
                del self.model[slot]
            else:
                self.model[slot] = after

    @rule(key=KEYS)
    def pin_ready(self, key: ExpertKey) -> None:
        slot = self.holder(key)
        ready = slot if slot is not None and self.model[slot][1] == READY else None
        assert self.pool.pin_ready(key) == ready
        if ready is not None:
            self.model[ready] = (key, READY, self.model[ready][2] + 1)

    @rule(key=KEYS)
    def find(self, key: ExpertKey) -> None:
        slot = self.holder(key)
        assert self.pool.slot_of(key) == slot
        states = {READY: SlotState.READY, LOADING: SlotState.LOADING}
        assert self.pool.state_of(key) == (SlotState.EMPTY if slot is None else states[self.model[slot][1]])

    @rule(block=st.integers(0, 1))
    def choose(self, block: int) -> None:
        slot = self.pool.choose(block, may_borrow=True)
        if slot is None:
            assert len(self.model) == COUNT
            assert all(state == LOADING or pins for _, state, pins in self.model.values())
        else:
            assert slot not in self.model or self.model[slot][1:] == (READY, 0)

    @rule()
    def repair(self) -> None:
        """It changes nothing where nothing was cut."""
        pins = [self.model[slot][2] if slot in self.model else 0 for slot in range(COUNT)]
        self.pool.repair(pins, {slot: key for slot, (key, state, _) in self.model.items() if state == LOADING})

    @invariant()
    def agrees(self) -> None:
        check_pool(self.pool)
        for slot in range(COUNT):
            key, state, pins = self.model.get(slot, (None, "", 0))
            if key is not None:
                assert (self.pool.key(slot), self.pool._pins[slot]) == (key, pins)
            assert self.pool.is_evictable(slot) == (state == READY and not pins)
            assert self.pool.contents()[slot] == (key, state == LOADING)
        states = [(state, pins > 0) for _, state, pins in self.model.values()]
        assert self.pool.counts() == (
            sum(state == READY for state, _ in states),
            sum(state == LOADING for state, _ in states),
            states.count((READY, True)),
        )


TestPool = PoolMachine.TestCase


def test_an_empty_slot_cannot_be_used() -> None:
    pool = pool_of(1)
    for method in (pool.complete_fill, pool.abort_fill, pool.pin, pool.unpin, pool.key):
        with pytest.raises((AssertionError, KeyError)):
            method(0)


def filled(pool: SlotPool, key: ExpertKey, *, may_borrow: bool = False) -> int:
    slot = pool.choose(key.block, may_borrow=may_borrow)
    assert slot is not None
    pool.begin_fill(slot, key)
    pool.complete_fill(slot)
    check_pool(pool)
    return slot


@pytest.mark.parametrize("steps", range(1, 40))
@pytest.mark.parametrize("act", ["begin", "evict", "complete_fill", "abort_fill"])
def test_a_change_that_was_cut_leaves_no_slot_ready_without_its_record(act: str, steps: int) -> None:
    pool = pool_of(1, 1)
    old, new = ExpertKey(0, 0), ExpertKey(0, 1)
    slot = filled(pool, old) if act == "evict" else 0
    if act in ("complete_fill", "abort_fill"):
        pool.begin_fill(slot, new)
    acts = {"complete_fill": lambda: pool.complete_fill(slot), "abort_fill": lambda: pool.abort_fill(slot)}
    work = acts.get(act, lambda: pool.begin_fill(slot, new))
    cut(work, steps)
    was_ready = [key for key, loading in pool.contents() if key is not None and not loading]
    possible = {"evict": [[], [old]], "complete_fill": [[], [new]]}
    assert was_ready in possible.get(act, [[]])
    cut(lambda: pool.repair([0, 0], {}), steps)
    pool.repair([0, 0], {})
    check_pool(pool)
    assert pool.keys == was_ready


def test_pinned_slots_are_skipped_and_borrowed_quota_is_taken_back() -> None:
    pool = pool_of(2, 2)
    held = [filled(pool, ExpertKey(0, expert)) for expert in range(2)]
    for slot in held:
        pool.pin(slot)
    assert pool.choose(0) is None, "its own are held, and what is free is another's"
    borrowed = filled(pool, ExpertKey(0, 2), may_borrow=True)
    assert borrowed not in held
    filled(pool, ExpertKey(1, 0))
    pool.pin(borrowed)
    assert pool.choose(1) == pool.slot_of(ExpertKey(1, 0)), "below its quota, but what was borrowed is held"
    pool.unpin(borrowed)
    assert pool.choose(1) == borrowed, "below its quota: it takes back what was borrowed"
    pool.pin(borrowed)
    other = pool.slot_of(ExpertKey(1, 0))
    assert pool.choose(0, may_borrow=True) == other
    assert other is not None
    pool.pin(other)
    assert pool.choose(0, may_borrow=True) is None
    assert pool.choose(1, may_borrow=True) is None


def test_what_is_to_be_kept_is_not_chosen() -> None:
    pool = pool_of(2)
    first, second = (filled(pool, ExpertKey(0, expert)) for expert in range(2))
    assert pool.choose(0) == first
    assert pool.choose(0, keep=lambda key: key.expert == 0) == second
    assert pool.choose(0, keep=lambda key: True) is None


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda pool: pool._free.clear(),
        lambda pool: pool._free.update({0: None}),
        lambda pool: pool._slots.clear(),
        lambda pool: pool._slots.update({ExpertKey(0, 0): 1}),
        lambda pool: pool._keys.__setitem__(0, None),
        lambda pool: pool._keys.__setitem__(2, ExpertKey(1, 1)),
        lambda pool: pool._loading.add(2),
        lambda pool: pool._pins.__setitem__(0, -1),
        lambda pool: pool._pins.__setitem__(2, 1),
        lambda pool: pool.partitions._policies[1].add(ExpertKey(0, 0), is_scan=False),
        lambda pool: pool.partitions._policies[0].remove(ExpertKey(0, 0)),
    ],
)
def test_check_integrity_sees_what_is_wrong(corrupt: Callable[[SlotPool], None]) -> None:
    pool = pool_of(2, 1)
    for expert in range(2):
        filled(pool, ExpertKey(0, expert))
    corrupt(pool)
    with pytest.raises(AssertionError):
        check_pool(pool)
