"""The look-up and the proof of ``runtime/kernels/experts/expert_code.py`` in plain Python, for ``interleavings``.

``tiers/arena/directory.py`` describes the protocol.
"""

from __future__ import annotations

from collections.abc import Sequence

from interleavings import Load, Thread

from moetier.tiers.source import Residents


def find(experts: Sequence[int], residents: Residents) -> Thread:
    """Look experts up until one is not resident. Return for each of them its slot and the slot's generation."""
    resident: list[tuple[int, int]] = []
    for expert in experts:
        if not 0 <= expert < residents.experts:
            return resident
        slot = yield Load(residents.table // 8 + expert)
        if not 0 <= slot - residents.first_slot < residents.slots:
            return resident
        generation = yield Load(residents.generations // 8 + slot)
        # the slot is looked up again after its generation was read: if it was refilled in between, they differ
        now = yield Load(residents.table // 8 + expert)
        if now != slot or generation & 1:
            return resident
        resident = [*resident, (slot, generation)]
    return resident


def prove(resident: Sequence[tuple[int, int]], residents: Residents) -> Thread:
    """Return the number of slots whose generations are unchanged."""
    same = 0
    for slot, generation in resident:
        now = yield Load(residents.generations // 8 + slot)
        same += now == generation
    return same
