"""MappedArena: a daemon's arena in this process, and proofs that a record in it was not replaced during its use."""

from __future__ import annotations

from collections.abc import Callable

from moetier.runtime.wire.control import ControlConnection
from moetier.tiers.arena.arena import Arena
from moetier.tiers.arena.directory import ArenaHeader
from moetier.tiers.arena.layout import ArenaLayout
from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import SAME_VERSION, ArenaError, ClosedError, ProtocolError
from moetier.tiers.layout import ExpertKey, TierSlot
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import Lease, Residents


class Proof:
    """Check that a slot has not been refilled since a lease on it began.

    A call returns whether the slot's generation is unchanged. ``is_valid`` is what the last call returned; None before
    the first call.
    """

    __slots__ = ("_generation", "_generation_of", "_slot", "is_valid")

    def __init__(self, generation_of: Callable[[TierSlot], int], slot: TierSlot, generation: int) -> None:
        self._generation_of = generation_of
        self._slot = slot
        self._generation = generation
        self.is_valid: bool | None = None

    def __call__(self) -> bool:
        self.is_valid = self._generation_of(self._slot) == self._generation
        return self.is_valid


class MappedArena(Closeable):
    """A daemon's arena, mapped read-only into this process.

    It stays mapped while this object or one of its records is referenced, even if the daemon dies. The mapping keeps a
    descriptor of the memory file open, through which a restarted daemon finds the arena again.
    """

    @classmethod
    def of(cls, control: ControlConnection, manifest: Manifest, mapped: MappedArena | None = None) -> MappedArena:
        """Map the arena that a new connection gives, or return ``mapped`` if that is the same arena.

        It is the same if a restarted daemon has taken over the memory of the previous one. Raises ArenaError if the
        arena can't be mapped, and ProtocolError if its slots don't fit ``manifest``.
        """
        slots = control.slots
        if control.descriptor is None or slots.keys() != manifest.layouts.keys() or min(slots.values()) < 1:
            raise ProtocolError("The daemon's arena has other record layouts than this store.", SAME_VERSION)
        layout = ArenaLayout.of(manifest, slots)
        if (
            mapped
            and mapped.layout == layout
            and ArenaHeader.read(control.descriptor).identity == mapped.directory.identity
        ):
            return mapped
        try:
            return cls(Arena.map(control.descriptor, layout))
        except OSError as error:
            raise ArenaError(
                f"The {layout.nbytes:,} bytes of the daemon's arena can't be mapped ({error.strerror}).",
                "Raise the limit of this process's address space (ulimit -v).",
            ) from None

    def __init__(self, arena: Arena) -> None:
        self.layout = arena.layout
        self.directory = arena.directory
        self._arena = arena
        # by slot; the objects stay the same, so that callers can recognise a record that they have wrapped before
        self._records = [arena.view(TierSlot(slot)) for slot in range(arena.layout.slots)]
        self._residents: dict[int, Residents | None] = {}  # by block

    def residents(self, block: int, array: str) -> Residents | None:
        """Return where compiled code finds a block's records, as ``Arena.residents`` does."""
        if block not in self._residents:
            self._residents[block] = self._arena.residents(block, array)
        return self._residents[block]

    def lease(
        self, key: ExpertKey, slot: TierSlot, generation: int, *, more: bool = False
    ) -> tuple[Lease[memoryview], Proof]:
        """Return a lease of the record in ``slot``, and the lease's proof.

        The lease is valid while the slot has this ``generation``, which the proof checks. ``more``: whether the next
        lease is available already. Raises ClosedError after ``close``, and ProtocolError if there is no such slot.
        """
        proof = Proof(self.directory.generation, slot, generation)
        try:
            return Lease(key, self._records[slot], slot, proof, more), proof
        except IndexError:
            if slot < self.layout.slots:
                raise ClosedError("The tier of this model was closed.", "Load the model again.") from None
            raise ProtocolError(
                f"The daemon has granted slot {slot} of an arena with {self.layout.slots} slots.", SAME_VERSION
            ) from None

    def close(self) -> None:
        """Release the records. Idempotent.

        A record that is still referenced stays readable, but its proof raises ClosedError.
        """
        self._records.clear()
        self._residents.clear()
        self._arena.close()
