"""A daemon's arena as its client sees it: records to compute on, and what proves them."""

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
    """Whether the record in a slot still is what it was. ``held`` is what it said last, True before it was asked."""

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
    """Mapped read-only for as long as anybody refers to it or to one of its records, the daemon's death included.

    The map keeps a descriptor of the memory file open: it is where a restarted daemon finds it.
    """

    @classmethod
    def of(cls, side: ControlConnection, manifest: Manifest, known: MappedArena | None = None) -> MappedArena:
        """What a connection came with: ``known``, if its daemon has taken that back. Raises ArenaError, and
        ProtocolError."""
        if side.descriptor is None or side.slots.keys() != manifest.layouts.keys() or min(side.slots.values()) < 1:
            raise ProtocolError("The daemon's arena is not of this store.", "Use moetier in one version.")
        plan = ArenaPlan.of(manifest, side.slots)
        if known is not None and known.plan == plan and Header.read(side.descriptor).identity == known.identity:
            return known
        try:
            return cls(Arena.map(side.descriptor, plan))
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
        # by slot: always the same object, so that who wraps it knows it again
        self._records = [arena.view(slot) for slot in range(arena.plan.slots)]

    def lease(
        self, key: ExpertKey, slot: int, generation: int, *, more: bool = False
    ) -> tuple[Lease[memoryview], Proof]:
        """The record in a slot, on the condition that the slot's generation stays. Raises ProtocolError for a slot that
        there is not, ClosedError."""
        proof = Proof(self._generation_of, slot, generation)
        try:
            return Lease(key, self._records[slot], slot, proof, more), proof
        except IndexError:
            if slot < self.plan.slots:
                raise ClosedError("The tier was closed.", "Load the model again.") from None
            raise ProtocolError(f"The arena has no slot {slot}.", "Use moetier in one version.") from None

    @property
    def ready(self) -> int:
        """How many slots hold a record now."""
        return sum(self._arena.directory.content(slot) is not None for slot in range(self.plan.slots))

    def close(self) -> None:
        """A record stays readable while somebody holds it; it can't be proved any more. Idempotent."""
        self._records.clear()
        self._arena.close()
