"""The interface of a source of experts, which every tier and the daemon's client implement.

``acquire`` is a *demand*: the caller is about to compute with the experts that it asks for. A *prefetch* is a request
that the source may ignore. ``pin`` is for the tier above, which copies a record that this source already has. This
is not a demand. A *lease* pins a record while its holder computes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import Generic, NamedTuple, Protocol, TypeVar

from .layout import PAGE_BYTES, ExpertKey, TierSlot
from .stats import TierStats

Record = TypeVar("Record", covariant=True)  # memoryview in the host tier, torch.Tensor in the device tier

LOADERS = 4  # number of records that a host tier reads at the same time, by default
LEASES = 8  # most slots that a session of a host tier may hold or claim, by default
SLOT_TIMEOUT = 10.0  # seconds without a slot after which a request to a host tier fails, by default
INTERRUPTIBLE_BYTES = 2 << 20  # smallest piece of a record that is read in pieces, in bytes


def interruptible_bytes(length: int) -> int:
    """Return the size of the pieces in which a prefetch reads a record of ``length`` bytes, in bytes.

    Between two pieces the read can pause or stop, so a demand waits for one piece at most. A piece is an eighth of the
    record, in whole pages. It has at least INTERRUPTIBLE_BYTES, so that the system call is worth its cost.
    """
    return min(length, max(INTERRUPTIBLE_BYTES, -(-length // (8 * PAGE_BYTES)) * PAGE_BYTES))


class Lease(NamedTuple, Generic[Record]):
    """A read-only view of one expert's record, ``record_bytes`` long, from the iterator that ``acquire`` returns.

    The lease is valid until the next lease is taken from the iterator. If ``more`` is true, the next lease is already
    available, and this lease stays valid as long as the next one does.

    The record may belong to another process, which may replace it during the computation. So call ``validate`` after
    the last use of the record and before any use of the result. If it returns False, discard the result; the iterator
    will yield a lease of the same key again.
    """

    key: ExpertKey
    record: Record
    slot: TierSlot  # in the tier that gave the lease
    proof: Callable[[], bool] | None = None  # returns whether the lease is still valid; None: the record is pinned
    more: bool = False  # the next lease is available now, so the caller can compute with both records together

    def validate(self) -> bool:
        """Return whether the slot has had the record until now. Call this once, after the last use of the record."""
        return self.proof is None or self.proof()


class Residents(NamedTuple):
    """Addresses with which compiled code finds the records of one block in an arena."""

    experts: int  # number of the block's experts
    table: int  # address of an array i64 [experts]: for each expert the slot of its record, or -1
    generations: int  # address of an array i64 [slots of the arena]: the generation of each slot
    first_slot: int  # number of the first slot in the block's region of the arena
    slots: int  # number of slots in that region
    records: int  # address of the first slot of the region
    slot_bytes: int  # size of each slot of the region, in bytes
    memory: object  # the arena's memory, which stays mapped while this object is referenced

    @property
    def numbers(self) -> tuple[int, ...]:
        """All fields except ``memory``, in order."""
        return self[:7]


class ResidentUses(Protocol):
    """Interface that counts uses without leases, of records at the addresses from ``ExpertSource.residents``."""

    def note_found(self, block: int, experts: Sequence[int]) -> None:
        """Count a demand for ``experts`` of a block.

        This has the effect of a demand that finds all its records: each record counts as a hit, and the block's
        prefetch requests are cancelled. The order of eviction is updated later, but before the next record is evicted.
        Returns at once.
        """

    def note_discarded(self, block: int, experts: Sequence[int]) -> None:
        """Count hits of an earlier ``note_found`` as discarded, too, because records were replaced during their use.

        The caller then repeats the demand, and the repeated demand is counted.
        """

    def touch(self, block: int, experts: Sequence[int]) -> None:
        """Let the records of ``experts`` stay in memory as if a demand had used them, if they are there.

        This is no demand: the source does not count it, and cancels no prefetch request. (A client of a daemon reports
        uses, which the daemon counts.) The order of eviction is updated later, but before the next record is evicted.
        Returns at once.
        """


class CopyUses(ResidentUses, Protocol):
    """Interface that also counts uses of copies in the tier above."""

    def note_copies(self, keys: Sequence[ExpertKey]) -> None:
        """Note that demands have found the records of ``keys`` in the tier above. Returns at once.

        If this source has prefetched one of the records, and the tier above copied it through ``pin``, the prefetch
        now counts as useful. The order of eviction does not change.
        """


class NoUses:
    """The ``ResidentUses`` of a source without residents: no caller uses its records without leases."""

    def note_found(self, block: int, experts: Sequence[int]) -> None:
        """Do nothing: what the caller has leased is counted already."""

    def note_discarded(self, block: int, experts: Sequence[int]) -> None:
        """Do nothing."""

    def touch(self, block: int, experts: Sequence[int]) -> None:
        """Do nothing."""


class PrefetchSource(Protocol):
    """Interface of a source to which predictions are sent."""

    def prefetch(self, block: int, keys: Sequence[ExpertKey]) -> None:
        """Request prefetches of ``keys``, which all belong to ``block``. Returns at once.

        The requests replace the block's earlier requests whose reads have not begun. A demand for the block cancels all
        of the block's requests whose reads have not begun.
        """

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """Return those of ``keys`` whose records are not READY in this source. Never waits for a read."""


class ExpertSource(PrefetchSource, Protocol[Record]):
    """Interface of a source of experts: a tier, or the client of a daemon. Thread-safe."""

    @property
    def uses(self) -> ResidentUses:
        """Counts the demands that are computed without leases."""

    def acquire(self, keys: Sequence[ExpertKey], of_total: int = 0) -> Generator[Lease[Record], None, None]:
        """Yield a lease for each distinct key: first for the records that the source holds, then for others on arrival.

        All keys must belong to one block. If a lease was not valid until its end, the same key is leased again. A lease
        ends when the next lease is taken, or when the iterator is exhausted or closed. Leases that are available
        together (see ``Lease.more``) end together, after the last of them. So a block can use more experts than there
        are slots, and no caller waits while it holds a lease that it has not processed. Therefore two callers can't
        deadlock, even with the smallest budget. Of these records, the record of the first key is evicted last.

        Args:
            keys: keys of one block.
            of_total: how many records of the block the caller takes in several calls, these included; 0: this is the
                only call. If the source can't keep so many, these evict few others. Prefetch requests for the block
                stay.

        Raises:
            StoreError: the load of a record has failed. Each caller that waits for this record gets the error, and no
                further leases. The records that the source holds stay cached.
        """

    def residents(self, block: int) -> Residents | None:
        """Return the addresses with which compiled code finds the block's records without leases.

        Returns None if compiled code can't read this source's records. A record without a lease may be replaced at any
        time. So look up its slot and the slot's generation, compute, and use the result only if the generation is still
        the same (see ``arena/directory.py``).

        Raises:
            ClosedError: the source was closed.
        """

    def release_leases(self) -> None:
        """End all leases of the calling thread. Call this after an exception, which may have left leases open.

        The iterators that gave these leases must not be used any more.
        """

    def stats(self) -> TierStats:
        """Return what the source has counted since it was opened, and the state of its slots."""

    def close(self) -> None:
        """Release memory, file descriptors and threads, once the loads in progress have ended. Idempotent."""


class CopySource(ExpertSource[Record], Protocol[Record]):
    """Interface of a source below another tier, which copies records from the source."""

    @property
    def uses(self) -> CopyUses:
        """Counts the demands that are computed without leases, or with copies in the tier above."""

    def pin(self, key: ExpertKey) -> AbstractContextManager[Lease[Record] | None]:
        """Return a context manager that gives a lease of the record if it is READY in this source, else None.

        The lease ends with the ``with`` block. Never waits. This is not a demand: it is not counted as a hit, miss or
        use, and it changes neither the order of eviction nor prefetch requests. A copy of the record is valid only if
        the lease is still valid when the copy has ended.
        """
