"""A daemon's arena in a client: it is mapped once, proofs notice a replaced record, and slots are checked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from stores import make_plan

from moetier.runtime.client.mapped_arena import MappedArena
from moetier.tiers.arena.arena import Arena
from moetier.tiers.arena.layout import ArenaLayout
from moetier.tiers.errors import ClosedError, ProtocolError
from moetier.tiers.layout import ExpertKey, TierSlot

MANIFEST, SLOTS = make_plan(), {"records": 4}
KEY, SLOT = ExpertKey(0, 1), TierSlot(2)


@pytest.fixture
def owner() -> Iterator[Arena]:
    """The daemon's own arena, with a record in slot 2."""
    arena = Arena.create(ArenaLayout.of(MANIFEST, SLOTS))
    arena.allocate(SLOT)
    arena.slot(SLOT)[:4] = b"abcd"
    arena.directory.begin_fill(SLOT, None)
    arena.directory.complete_fill(SLOT, KEY)
    yield arena
    arena.close()


def control(owner: Arena, slots: dict[str, int] = SLOTS) -> Any:
    """A control connection that has passed the arena's descriptor."""
    return SimpleNamespace(descriptor=owner.export(), slots=slots)


def mapped(owner: Arena, earlier: MappedArena | None = None) -> MappedArena:
    connection = control(owner)
    try:
        return MappedArena.of(connection, MANIFEST, earlier)
    finally:
        os.close(connection.descriptor)


def test_a_proof_holds_until_the_slot_is_filled_again(owner: Arena) -> None:
    arena = mapped(owner)
    placement = arena.directory.find(KEY)
    assert placement is not None
    lease, proof = arena.lease(KEY, *placement)
    assert (bytes(lease.record[:4]), proof.is_valid, lease.validate()) == (b"abcd", None, True)
    owner.directory.begin_fill(SLOT, KEY)
    assert (lease.validate(), proof.is_valid) == (False, False)
    assert arena.directory.find(KEY) is None
    arena.close()


def test_a_restarted_daemon_with_the_same_memory_is_not_mapped_again(owner: Arena) -> None:
    arena = mapped(owner)
    assert mapped(owner, arena) is arena
    other = Arena.create(ArenaLayout.of(MANIFEST, SLOTS))
    new = mapped(other, arena)
    assert new is not arena
    for one in (arena, new, other):
        one.close()


def test_slots_that_do_not_fit_the_store_are_refused(owner: Arena) -> None:
    connection = control(owner, {"others": 4})
    with pytest.raises(ProtocolError, match="other record layouts"):
        MappedArena.of(connection, MANIFEST)
    os.close(connection.descriptor)


def test_a_slot_that_does_not_exist_is_the_daemons_fault_and_a_closed_arena_the_callers(owner: Arena) -> None:
    arena = mapped(owner)
    with pytest.raises(ProtocolError, match="slot 4 of an arena with 4 slots"):
        arena.lease(KEY, TierSlot(4), 2)
    lease, _ = arena.lease(KEY, SLOT, owner.directory.generation(SLOT))
    arena.close()
    assert bytes(lease.record[:4]) == b"abcd", "a referenced record stays readable"
    with pytest.raises(ClosedError):
        lease.validate()
    with pytest.raises(ClosedError):
        arena.lease(KEY, SLOT, 2)
