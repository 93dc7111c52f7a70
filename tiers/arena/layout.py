"""The layout of an arena: first the directory, then the slots, in one region for each record layout.

    [directory][slots of layout 1][slots of layout 2]...

In the store, each record layout has a zarr array. The regions are in the order of these arrays' names, and keys are in
the order of the blocks. So the owner and all readers compute the same offsets from the manifest and the number of slots
in each region.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from moetier.tiers.layout import PAGE_BYTES, ExpertKey
from moetier.tiers.manifest import Manifest

WORD = 8  # size of each number in the directory, in bytes
_HEADER_WORDS = 16  # fixed part of the header, of which four words are unused; two words for each region follow


@dataclass(frozen=True, slots=True)
class Region:
    """The slots of an arena for records of one layout."""

    array: str  # name of the zarr array that has these records in the store
    slots: int  # number of slots
    slot_bytes: int  # size of each slot in bytes, a multiple of PAGE_BYTES

    @property
    def nbytes(self) -> int:
        """Size of all slots of the region, in bytes."""
        return self.slots * self.slot_bytes


@dataclass(frozen=True)
class ArenaLayout:
    """Sizes and offsets of an arena. Slots are numbered across all regions, and keys across all blocks."""

    digest: str  # digest of the store, hexadecimal
    experts: tuple[int, ...]  # number of experts of each block
    regions: tuple[Region, ...]

    @classmethod
    def of(cls, manifest: Manifest, slots: Mapping[str, int]) -> ArenaLayout:
        """Return the layout of an arena for the store of ``manifest``.

        ``slots`` is a dictionary from the name of each of the store's zarr arrays to a number of slots, at least 1.
        """
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
        """A dictionary from the name of each zarr array to the number of slots in its region."""
        return {region.array: region.slots for region in self.regions}

    @cached_property
    def slots(self) -> int:
        """The number of slots in the arena."""
        return sum(region.slots for region in self.regions)

    @cached_property
    def first_slots(self) -> tuple[int, ...]:
        """For each region, the number of its first slot."""
        return tuple(accumulate((region.slots for region in self.regions), initial=0))[:-1]

    def offset(self, slot: int) -> int:
        """Return the offset of a slot from the start of the arena in bytes, a multiple of PAGE_BYTES."""
        number = self._region_number(slot)
        return self._starts[number] + (slot - self.first_slots[number]) * self.regions[number].slot_bytes

    def slot_bytes(self, slot: int) -> int:
        """Return the size of a slot, in bytes."""
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
        """The number of keys, which is the number of experts of all blocks together."""
        return sum(self.experts)

    @cached_property
    def first_keys(self) -> tuple[int, ...]:
        """For each block, the number of the key of its expert 0. Keys are numbered block after block."""
        return tuple(accumulate(self.experts, initial=0))[:-1]

    def key(self, number: int) -> ExpertKey:
        """Return the key with the number ``number``."""
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
        """Size of the directory in bytes, in whole pages: a header, one word per key and two words per slot."""
        return -(-(self.header_words + self.keys + 2 * self.slots) * WORD // PAGE_BYTES) * PAGE_BYTES
