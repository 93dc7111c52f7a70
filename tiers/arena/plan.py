"""Where everything lies in an arena: the directory's pages, then the slots, one record geometry after the other. Pure.

    [directory][slots of geometry 1][slots of geometry 2]...

Geometries are in the order of their arrays' names, blocks in the model's. So owner and readers come to the same numbers
from the manifest and the counts of slots alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from moetier.tiers.layout import PAGE, ExpertKey
from moetier.tiers.manifest import Manifest

WORD = 8  # bytes of each number of a directory
_HEADER_WORDS = 16  # of which the first twelve are in use, and two for each region behind


@dataclass(frozen=True, slots=True)
class Region:
    """The slots of one record geometry."""

    array: str
    slots: int
    slot_bytes: int  # a multiple of PAGE
    record_bytes: int

    @property
    def nbytes(self) -> int:
        return self.slots * self.slot_bytes


@dataclass(frozen=True)
class ArenaPlan:
    """Slots are numbered through all regions, keys through all blocks."""

    digest: str  # of the store, hexadecimal
    experts: tuple[int, ...]  # by block
    regions: tuple[Region, ...]

    @classmethod
    def of(cls, manifest: Manifest, slots: Mapping[str, int]) -> ArenaPlan:
        """``slots`` by array, at least one of each."""
        assert slots.keys() == manifest.layouts.keys(), f"{sorted(slots)} are not {sorted(manifest.layouts)}"
        assert all(count > 0 for count in slots.values()), f"{slots}"
        layouts = sorted(manifest.layouts.items())
        return cls(
            manifest.digest,
            tuple(block.experts for block in manifest.blocks),
            tuple(Region(array, slots[array], layout.slot_bytes, layout.record_bytes) for array, layout in layouts),
        )

    # -- slots --------------------------------------------------------------------------------------------------------

    @property
    def slots_by_array(self) -> dict[str, int]:
        return {region.array: region.slots for region in self.regions}

    @cached_property
    def slots(self) -> int:
        return sum(region.slots for region in self.regions)

    @cached_property
    def first_slots(self) -> tuple[int, ...]:
        """The number of each region's first slot."""
        return tuple(accumulate((region.slots for region in self.regions), initial=0))[:-1]

    def offset(self, slot: int) -> int:
        """Bytes from the arena's start; a multiple of PAGE."""
        number = self._region_number(slot)
        return self._starts[number] + (slot - self.first_slots[number]) * self.regions[number].slot_bytes

    def slot_bytes(self, slot: int) -> int:
        return self.regions[self._region_number(slot)].slot_bytes

    def record_bytes(self, slot: int) -> int:
        return self.regions[self._region_number(slot)].record_bytes

    @property
    def nbytes(self) -> int:
        """Of the whole arena."""
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
        return sum(self.experts)

    @cached_property
    def first_keys(self) -> tuple[int, ...]:
        """The number of each block's expert 0."""
        return tuple(accumulate(self.experts, initial=0))[:-1]

    def number(self, key: ExpertKey) -> int:
        return self.first_keys[key.block] + key.expert

    def key(self, number: int) -> ExpertKey:
        assert 0 <= number < self.keys, f"key {number} of {self.keys}"
        block = bisect_right(self.first_keys, number) - 1
        return ExpertKey(block, number - self.first_keys[block])

    # -- the directory, in words --------------------------------------------------------------------------------------

    @property
    def header_words(self) -> int:
        return _HEADER_WORDS + 2 * len(self.regions)

    @cached_property
    def directory_bytes(self) -> int:
        """Header, a word for each key, two for each slot; a multiple of PAGE."""
        return -(-(self.header_words + self.keys + 2 * self.slots) * WORD // PAGE) * PAGE
