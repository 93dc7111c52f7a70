"""Directory of an arena: which record is in which slot. Only the arena's owner writes it; any process may read it.

The directory consists of 64-bit words, little endian:

    header    magic, version, size of the arena in bytes, number of keys, number of slots, number of regions,
              identity (2 words), digest of the store (4), unused (4); for each region: number of slots, size of a slot
    table     for each key: the slot that holds the key's record, or -1
    slots     for each slot: its generation; then for each slot: the number of its key, or -1

Each change of a slot's content increments the slot's generation, which is odd while the slot is being filled. A reader
looks up the slot of a key and the slot's generation, computes with the record in the slot, and then reads the
generation again. If the generation is unchanged, the slot held that record all the time, and the result may be used.
This is a seqlock: no process takes a lock or waits, and a dead reader blocks no other process.

A seqlock requires that each word is read and written in one piece, and that other processes see loads and stores in
program order. x86-64 guarantees both. The owner's order of stores is in ``begin_fill`` and ``complete_fill``, and the
order of a reader's loads is in ``find``.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moetier.tiers.cache.budget import slot_ranges
from moetier.tiers.errors import ArenaError, ClosedError
from moetier.tiers.layout import PAGE_BYTES, ExpertKey, TierSlot
from moetier.tiers.manifest import Manifest

from .layout import WORD, ArenaLayout

MAGIC = int.from_bytes(b"moetier\0", "little")
VERSION = 1
NO_ENTRY = -1  # means "no slot" in the table, and "no key" in the slots
_WORDS = 1 << 64  # number of values that a word can have
_FIXED = struct.Struct("<6Q16s32s4Q")


@dataclass(frozen=True, slots=True)
class ArenaHeader:
    """Header of an arena. Any process that has a descriptor of the arena can read the header."""

    nbytes: int  # size of the arena, in bytes
    keys: int  # number of keys, which is the number of experts of all blocks together
    slots: int  # number of slots
    identity: bytes  # 16 random bytes, chosen when the arena was created
    digest: str  # digest of the store, 64 hexadecimal digits; all digits are 0 if the store has none
    regions: tuple[tuple[int, int], ...]  # for each region: the number of its slots, the size of a slot in bytes

    @classmethod
    def of(cls, layout: ArenaLayout, identity: bytes) -> ArenaHeader:
        """Make the header of the arena that ``layout`` describes."""
        regions = tuple((region.slots, region.slot_bytes) for region in layout.regions)
        return cls(layout.nbytes, layout.keys, layout.slots, identity, layout.digest.rjust(64, "0"), regions)

    @classmethod
    def read(cls, descriptor: int) -> ArenaHeader:
        """Read the header of an open arena. Raises ArenaError if the file is not an arena of this version."""
        data = os.pread(descriptor, PAGE_BYTES, 0)
        if len(data) < PAGE_BYTES:
            raise _no_arena(f"it has {len(data)} bytes, fewer than its header")
        magic, version, nbytes, keys, slots, regions, identity, digest, *_ = _FIXED.unpack_from(data)
        if magic != MAGIC:
            raise _no_arena("it does not begin with the magic number")
        if version != VERSION:
            raise _no_arena(f"it has version {version}, and this version of moetier supports {VERSION}")
        if _FIXED.size + regions * 2 * WORD > PAGE_BYTES:
            raise _no_arena(f"its header says that it has {regions:,} regions, more than fit into the header")
        pairs = struct.unpack_from(f"<{2 * regions}Q", data, _FIXED.size)
        return cls(nbytes, keys, slots, identity, digest.hex(), tuple(zip(pairs[::2], pairs[1::2], strict=True)))

    def layout(self, manifest: Manifest) -> ArenaLayout:
        """Return the layout of the arena. Raises ArenaError if the arena is not one for the store of ``manifest``."""
        ranges = slot_ranges(manifest)
        if self.digest != manifest.digest.rjust(64, "0"):
            raise ArenaError("The arena holds records of another store.", "Restart the daemon.")
        slots = {array: count for array, (count, _) in zip(sorted(ranges), self.regions, strict=False)}
        if all(least <= slots.get(array, 0) <= most for array, (least, most) in ranges.items()):
            layout = ArenaLayout.of(manifest, slots)
            if self == ArenaHeader.of(layout, self.identity):
                return layout
        has = ", ".join(f"{count:,} slots of {size:,} bytes" for count, size in self.regions)
        raise ArenaError(f"The arena has {has}, which do not fit the store of {manifest.model}.", "Restart the daemon.")

    def to_bytes(self) -> bytes:
        """Encode the header as bytes."""
        fixed = (MAGIC, VERSION, self.nbytes, self.keys, self.slots, len(self.regions))
        words = [word for region in self.regions for word in region]
        return _FIXED.pack(*fixed, self.identity, bytes.fromhex(self.digest), 0, 0, 0, 0) + struct.pack(
            f"<{len(words)}Q", *words
        )


class Placement(NamedTuple):
    """The slot that holds a record. The slot holds the same record until its generation changes."""

    slot: TierSlot
    generation: int


class Directory:
    """The directory in the first ``layout.directory_bytes`` of an arena. Only one thread may change it at a time."""

    @classmethod
    def create(cls, memory: memoryview, layout: ArenaLayout) -> Directory:
        """Write a directory without records into ``memory``, the beginning of a new arena. All of its bytes are 0."""
        header = ArenaHeader.of(layout, os.urandom(16)).to_bytes()
        assert len(header) == layout.header_words * WORD <= PAGE_BYTES
        directory = cls(memory, layout)
        for number in range(layout.keys):
            directory._table[number] = NO_ENTRY
        for slot in range(layout.slots):
            directory._contents[slot] = NO_ENTRY
        memory[WORD : len(header)] = header[WORD:]
        memory[:WORD] = header[:WORD]  # the magic is written last, so that no reader accepts an unfinished header
        return directory

    def __init__(self, memory: memoryview, layout: ArenaLayout) -> None:
        """Use the existing directory in ``memory``, which has ``layout.directory_bytes`` bytes."""
        assert len(memory) == layout.directory_bytes
        self._layout = layout
        self._is_closed = False
        self._is_retired = False
        self._first_keys = layout.first_keys
        words = memory.cast("Q")
        table = layout.header_words
        generations = table + layout.keys
        contents = generations + layout.slots
        self._words = words
        self._table = memory.cast("q")[table:generations]
        self._generations = words[generations:contents]
        self._contents = memory.cast("q")[contents : contents + layout.slots]

    @property
    def identity(self) -> bytes:
        """The arena's identity: 16 random bytes, which tell it from all other arenas."""
        return struct.pack("<2Q", self._words[6], self._words[7])

    # -- readers ------------------------------------------------------------------------------------------------------

    def find(self, key: ExpertKey) -> Placement | None:
        """Return where the record of a key is, or None if no slot holds it now.

        The model must have the expert. Raises ClosedError after ``close``.
        """
        number = self._first_keys[key[0]] + key[1]  # like ``_number``, but without the call
        try:
            slot = self._table[number]
            if slot < 0:
                return None
            generation = self._generations[slot]
            # Look the slot up again *after* reading its generation. If the table has another slot by now, the slot was
            # refilled in between, and the generation belongs to another record.
            if generation & 1 or self._table[number] != slot:
                return None
        except ValueError:
            raise _closed() from None
        return Placement(TierSlot(slot), generation)

    def generation(self, slot: TierSlot) -> int:
        """Return the generation of a slot. Raises ClosedError after ``close``."""
        try:
            return self._generations[slot]
        except ValueError:
            raise _closed() from None

    @property
    def ready(self) -> int:
        """Number of slots that hold a record now."""
        return sum(self.content(slot) is not None for slot in range(self._layout.slots))

    # -- the owner ----------------------------------------------------------------------------------------------------

    def begin_fill(self, slot: TierSlot, evicted: ExpertKey | None) -> None:
        """Make a slot's generation odd, because the slot is about to be filled.

        ``evicted`` is the key of the record that the slot holds until now; None if it holds no record.
        """
        if evicted is not None:
            self._table[self._number(evicted)] = NO_ENTRY
        self._step(slot)
        assert self._generations[slot] & 1, f"slot {slot} was being filled"

    def complete_fill(self, slot: TierSlot, key: ExpertKey) -> None:
        """Let readers find the record of ``key`` in a slot, which has been filled."""
        if self._is_retired:
            return
        number = self._number(key)
        self._contents[slot] = number
        self._step(slot)
        self._table[number] = slot

    def abort_fill(self, slot: TierSlot) -> None:
        """Note that a slot holds no record, because filling it has failed."""
        self._contents[slot] = NO_ENTRY
        self._step(slot)

    def retire(self) -> None:
        """Invalidate all slots for good. Readers find no records from now on, and all their leases are invalid."""
        self._is_retired = True
        for number in range(self._layout.keys):
            self._table[number] = NO_ENTRY
        for slot in range(self._layout.slots):
            self._contents[slot] = NO_ENTRY
            self._generations[slot] = (self._generations[slot] + 2) % _WORDS | 1

    def _number(self, key: ExpertKey) -> int:
        return self._first_keys[key.block] + key.expert

    def _step(self, slot: int) -> None:
        if self._is_retired:
            return
        # modulo, because a dead owner may have left any number, even the largest
        self._generations[slot] = (self._generations[slot] + 1) % _WORDS

    # -- reclaiming the arena -----------------------------------------------------------------------------------------

    def content(self, slot: int) -> ExpertKey | None:
        """Return the key of the record in a slot, or None if the slot holds no whole record.

        If an owner has died while it filled a slot, the slot holds no whole record.
        """
        number = self._contents[slot]
        if self._generations[slot] & 1 or not 0 <= number < self._layout.keys:
            return None
        return self._layout.key(number)

    def repair(self, states: Sequence[tuple[ExpertKey | None, bool]]) -> None:
        """Make the directory agree with ``states``, after an exception has interrupted a change or the owner has died.

        ``states`` has for each slot the key that it holds or is being filled with (None if neither), and whether the
        slot is being filled. Entries that are already right are not changed, so readers can use them during the repair.
        """
        if self._is_closed:
            return
        if self._is_retired:
            self.retire()
            return
        held = {self._number(key): slot for slot, (key, filling) in enumerate(states) if key and not filling}
        for number in range(self._layout.keys):
            slot = held.get(number, NO_ENTRY)
            if self._table[number] not in (slot, NO_ENTRY) or (
                slot != NO_ENTRY and self.content(slot) != states[slot][0]
            ):
                self._table[number] = NO_ENTRY
        for slot, (key, filling) in enumerate(states):
            is_odd = bool(self._generations[slot] & 1)
            if filling:
                if not is_odd:
                    self._step(slot)
            elif is_odd or self.content(slot) != key:
                if not is_odd:
                    self._step(slot)
                # This is done before the generation becomes even. So if the owner dies in between, the next owner never
                # finds an even generation with the wrong key.
                self._contents[slot] = NO_ENTRY if key is None else self._number(key)
                self._step(slot)
        for number, slot in held.items():
            self._table[number] = slot

    def close(self) -> None:
        """Release the views of the arena's memory. Idempotent."""
        self._is_closed = True
        for view in (self._table, self._generations, self._contents, self._words):
            view.release()


def _no_arena(why: str) -> ArenaError:
    return ArenaError(f"The memory file is not an arena that this version can use: {why}.", "Restart the daemon.")


def _closed() -> ClosedError:
    return ClosedError("The arena was closed.", "Open the tier again.")
