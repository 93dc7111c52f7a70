"""The layout of an arena: first the pages of the directory, then the slots, one record geometry after the other. Pure.

    [directory][slots of geometry 1][slots of geometry 2]...

Geometries are in the order of their arrays' names, blocks in the order of the model. So owner and readers derive the
same offsets from the manifest and the numbers of slots alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from moetier.tiers.layout import PAGE, ExpertKey
from moetier.tiers.manifest import Manifest

WORD = 8  # bytes of each number in the directory
_HEADER_WORDS = 16  # the first twelve are in use; two more per region follow


@dataclass(frozen=True, slots=True)
class Region:
    """The slots of one record geometry."""

    array: str
    slots: int
    slot_bytes: int  # a multiple of PAGE

    @property
    def nbytes(self) -> int:
        """Bytes of all slots of the region."""
        return self.slots * self.slot_bytes


@dataclass(frozen=True)
class ArenaPlan:
    """Sizes and offsets of an arena. Slots are numbered through all regions, keys through all blocks."""

    digest: str  # digest of the store, hexadecimal
    experts: tuple[int, ...]  # number of experts of each block
    regions: tuple[Region, ...]

    @classmethod
    def of(cls, manifest: Manifest, slots: Mapping[str, int]) -> ArenaPlan:
        """Plan an arena for a store. ``slots`` is the number of slots of each array, at least one."""
        assert slots.keys() == manifest.layouts.keys(), f"{sorted(slots)} are not {sorted(manifest.layouts)}"
        assert all(count > 0 for count in slots.values()), f"{slots}"
        layouts = sorted(manifest.layouts.items())
        return cls(
            manifest.digest,
            tuple(block.experts for block in manifest.blocks),
            tuple(Region(array, slots[array], layout.slot_bytes) for array, layout in layouts),
        )

    # -- slots --------------------------------------------------------------------------------------------------------

    @property
    def slots_by_array(self) -> dict[str, int]:
        """The number of slots of each array."""
        return {region.array: region.slots for region in self.regions}

    @cached_property
    def slots(self) -> int:
        """The number of all slots."""
        return sum(region.slots for region in self.regions)

    @cached_property
    def first_slots(self) -> tuple[int, ...]:
        """The number of each region's first slot."""
        return tuple(accumulate((region.slots for region in self.regions), initial=0))[:-1]

    def offset(self, slot: int) -> int:
        """Offset of a slot in bytes from the arena's start; a multiple of PAGE."""
        number = self._region_number(slot)
        return self._starts[number] + (slot - self.first_slots[number]) * self.regions[number].slot_bytes

    def slot_bytes(self, slot: int) -> int:
        """Size of a slot, in bytes."""
        return self.regions[self._region_number(slot)].slot_bytes

    @property
    def nbytes(self) -> int:
        """Size of the whole arena, in bytes."""
        return self.directory_bytes + sum(region.nbytes for region in self.regions)

    def _region_number(self, slot: int) -> int:
        assert 0 <= slot < self.slots, f"slot {slot} of {self.slots}"
        return bisect_right(self.first_slots, slot) - 1

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return tuple(accumulate((region.nbytes for region in self.regions), initial=self.directory_bytes))[:-1]

    # -- keys ---------------------------------------------------------------------------------------------------------

    @cached_property
    def keys(self) -> int:
        """The number of all keys."""
        return sum(self.experts)

    @cached_property
    def first_keys(self) -> tuple[int, ...]:
        """The number of each block's expert 0."""
        return tuple(accumulate(self.experts, initial=0))[:-1]

    def key(self, number: int) -> ExpertKey:
        """The key of a number."""
        assert 0 <= number < self.keys, f"key {number} of {self.keys}"
        block = bisect_right(self.first_keys, number) - 1
        return ExpertKey(block, number - self.first_keys[block])

    # -- the directory, in words --------------------------------------------------------------------------------------

    @property
    def header_words(self) -> int:
        """Size of the directory's header, in words."""
        return _HEADER_WORDS + 2 * len(self.regions)

    @cached_property
    def directory_bytes(self) -> int:
        """Size of the directory: a header, one word per key, two per slot; a multiple of PAGE."""
        return -(-(self.header_words + self.keys + 2 * self.slots) * WORD // PAGE) * PAGE
