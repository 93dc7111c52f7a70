"""The division of a daemon's memory among its models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moetier.runtime.config import Size
from moetier.runtime.memory import Available, budget_for
from moetier.tiers.cache.budget import slots_for, smallest_budget
from moetier.tiers.manifest import Manifest

from .reclaim import Leftover

_UNLIMITED = Available(1 << 62, "")


def plan_slots(
    manifests: Mapping[str, Manifest],
    ram: Size | None,
    available: Available,
    leftovers: Mapping[str, Sequence[Leftover]],
) -> tuple[dict[str, Mapping[str, int]], dict[str, Leftover]]:
    """How many slots each model gets, and which leftovers are used for it. By digest. Raises BudgetError.

    ``ram`` in bytes is for all models together, in proportion to what they can use; a leftover of just these slots is
    used. A share of what is free, or none given, leaves the leftovers as they are, and divides the rest.
    """
    if ram is not None and ram.bytes is not None:
        slots = _divide(manifests, ram, _UNLIMITED)
        kept = {
            digest: leftover
            for digest, found in leftovers.items()
            for leftover in reversed(found)
            if leftover.arena.plan.slots_by_array == slots[digest]
        }
        if others := _without(manifests, kept):  # theirs is memory that is still to be had
            _divide(others, Size(bytes=sum(_slot_bytes(others[digest], slots[digest]) for digest in others)), available)
        return slots, kept
    kept = {digest: found[0] for digest, found in leftovers.items()}
    slots = {digest: leftover.arena.plan.slots_by_array for digest, leftover in kept.items()}
    if others := _without(manifests, kept):
        slots |= _divide(others, ram, available)
    return slots, kept


def _without(manifests: Mapping[str, Manifest], kept: Mapping[str, Leftover]) -> dict[str, Manifest]:
    return {digest: manifest for digest, manifest in manifests.items() if digest not in kept}


def _slot_bytes(manifest: Manifest, slots: Mapping[str, int]) -> int:
    return sum(manifest.layouts[array].slot_bytes * count for array, count in slots.items())


def _divide(manifests: Mapping[str, Manifest], ram: Size | None, available: Available) -> dict[str, Mapping[str, int]]:
    """The smallest budget to each model; of the rest to each in proportion to what it can still use."""
    smallest = {digest: smallest_budget(manifest) for digest, manifest in manifests.items()}
    largest = {digest: manifest.stored_bytes for digest, manifest in manifests.items()}
    least, most = sum(smallest.values()), sum(largest.values())
    budget = budget_for(ram, smallest=least, largest=most, reserve=0, available=available)
    slots = {}
    for digest, manifest in manifests.items():
        more = (budget - least) * (largest[digest] - smallest[digest]) // max(most - least, 1)
        slots[digest] = slots_for(manifest, smallest[digest] + more)
    return slots
