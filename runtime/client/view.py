"""A daemon's arena in a client's address space: leases of its records, and proofs that they are still the same."""

from __future__ import annotations

from collections.abc import Callable

from moetier.runtime.wire.control import ControlConnection
from moetier.tiers.arena.arena import Arena
from moetier.tiers.arena.directory import Header
from moetier.tiers.arena.plan import ArenaPlan
from moetier.tiers.errors import ArenaError, ClosedError, ProtocolError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import Lease


class Proof:
    """Checks that a slot has not been refilled. ``held`` is the last answer, and True before the first."""

    __slots__ = ("_generation", "_generation_of", "_slot", "held", "was_asked")

    def __init__(self, generation_of: Callable[[int], int], slot: int, generation: int) -> None:
        self._generation_of = generation_of
        self._slot = slot
        self._generation = generation
        self.held = True
        self.was_asked = False

    def __call__(self) -> bool:
        self.was_asked = True
        self.held = self._generation_of(self._slot) == self._generation
        return self.held


class MappedArena:
    """An arena, mapped read-only for as long as it or one of its records is referenced, even after the daemon's death.

    The map keeps a descriptor of the memory file open, through which a restarted daemon finds the arena again.
    """

    @classmethod
    def of(cls, control: ControlConnection, manifest: Manifest, known: MappedArena | None = None) -> MappedArena:
        """Map a connection's arena, or return ``known`` if it is that one, which the daemon has reclaimed.

        Raises ArenaError, ProtocolError.
        """
        slots = control.slots
        if control.descriptor is None or slots.keys() != manifest.layouts.keys() or min(slots.values()) < 1:
            raise ProtocolError("The daemon's arena is not of this store.", "Use moetier in one version.")
        plan = ArenaPlan.of(manifest, slots)
        if known is not None and known.plan == plan and Header.read(control.descriptor).identity == known.identity:
            return known
        try:
            return cls(Arena.map(control.descriptor, plan))
        except OSError as error:
            raise ArenaError(
                f"The {plan.nbytes:,} bytes of the daemon's arena can't be mapped ({error.strerror}).",
                "Raise this process's limit of address space (ulimit -v).",
            ) from None

    def __init__(self, arena: Arena) -> None:
        self.plan = arena.plan
        self.identity = arena.directory.identity
        self.find = arena.directory.find
        self._generation_of = arena.directory.generation
        self._arena = arena
        # by slot; always the same objects, so that wrappers can recognise them
        self._records = [arena.view(slot) for slot in range(arena.plan.slots)]

    def lease(
        self, key: ExpertKey, slot: int, generation: int, *, more: bool = False
    ) -> tuple[Lease[memoryview], Proof]:
        """Lease the record in a slot, valid while the slot's generation stays the same.

        Raises ProtocolError if there is no such slot, ClosedError.
        """
        proof = Proof(self._generation_of, slot, generation)
        try:
            return Lease(key, self._records[slot], slot, proof, more), proof
        except IndexError:
            if slot < self.plan.slots:
                raise ClosedError("The tier was closed.", "Load the model again.") from None
            raise ProtocolError(f"The arena has no slot {slot}.", "Use moetier in one version.") from None

    @property
    def ready(self) -> int:
        """Number of slots that hold a record now."""
        return sum(self._arena.directory.content(slot) is not None for slot in range(self.plan.slots))

    def close(self) -> None:
        """Drop the records. One that is still referenced stays readable, but can't be proved any more. Idempotent."""
        self._records.clear()
        self._arena.close()
