"""The interface of every tier and of the daemon's client: a source from which experts are acquired.

``acquire`` is a *demand*: the caller computes next with the experts that it asks for. A *prefetch* is a request that
may be ignored. To *borrow* is neither: the tier above copies a record that is already here, for a prefetch of its own.
A *lease* pins a record for as long as its holder computes on it.
"""

from __future__ import annotations

import warnings
from collections import namedtuple
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

from .layout import PAGE, ExpertKey
from .manifest import Manifest
from .stats import TierStats

Record = TypeVar("Record", covariant=True)  # memoryview in the host tier, torch.Tensor in the device tier

LOADERS = 4  # records that a host tier reads at a time, by default
INTERRUPTIBLE_BYTES = 2 << 20  # smallest piece of a read that may be interrupted between pieces


def interruptible_bytes(length: int) -> int:
    """Return the bytes per piece when a record of ``length`` bytes is read in pieces, between which the read may stop.

    A piece is an eighth of the record, in whole pages, because a demand may have to wait for one piece. It has at least
    INTERRUPTIBLE_BYTES, so that the system call is worth its cost.
    """
    return min(length, max(INTERRUPTIBLE_BYTES, -(-length // (8 * PAGE)) * PAGE))


class Lease(NamedTuple, Generic[Record]):
    """A read-only view of one expert's record, ``record_bytes`` long.

    The lease is valid until the next one is taken from the iterator. If ``more`` is true, the next lease is already
    available, and this lease stays valid as long as the next one does.

    Another process may own the record and replace it during the computation. So call ``holds`` after the last use of
    the record and before any use of the result. If it returns False, discard the result; the iterator will yield the
    key again.
    """

    key: ExpertKey
    record: Record
    slot: int  # number of the slot in the tier that gave the lease
    proof: Callable[[], bool] | None = None  # tells whether the lease still holds; None: the record is pinned
    more: bool = False  # the next lease is available now and can be computed together with this one

    def holds(self) -> bool:
        """Return whether the record is still the one that was leased. Call it once."""
        return self.proof is None or self.proof()


class Residents(NamedTuple):
    """Place of a block's records in an arena, for compiled code that looks them up."""

    experts: int  # number of the block's experts
    table: int  # address of an array i64 [experts]: the slot of each expert's record, or -1
    generations: int  # address of an array i64 [slots of the arena]: the generation of each slot
    first_slot: int  # number of the first slot for records of the block's size
    slots: int  # number of slots for such records
    records: int  # address at which the first of these slots begins
    slot_bytes: int  # size of each of them
    memory: object  # keeps the arena's memory mapped

    @property
    def numbers(self) -> tuple[int, ...]:
        """All fields except ``memory``."""
        return self[:7]


class RecordReader(Protocol):
    """Interface of a host tier's source: a store, or another object that reads records into slots. Thread-safe."""

    @property
    def manifest(self) -> Manifest:
        """The manifest of the records."""

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Callable[[], bool] | None = None) -> None:
        """Read a record and its checksum into ``buffer``: a writable slot of ``slot_bytes`` that begins on a page.

        Args:
            key: the expert.
            buffer: the slot.
            pause: if given, a reader that can do so reads in pieces and calls ``pause`` between two of them. ``pause``
                blocks until the read may go on, and returns whether to call it again between the remaining pieces. An
                exception from ``pause`` ends the read.

        Raises:
            StoreError: the record can't be read. A reader of other hosts may also raise UnavailableError and
                ExhaustedError.
        """


class ExpertSource(Protocol[Record]):
    """Interface of a source of experts: a tier, or a daemon's client. Thread-safe."""

    def acquire(self, keys: Sequence[ExpertKey]) -> Generator[Lease[Record], None, None]:
        """Yield a lease for each distinct key: resident records first, others as they arrive.

        All keys are of one block. A key whose lease did not hold is yielded again. A lease ends when the next one is
        taken, or when the iterator is exhausted or closed. Leases that are available together (see ``Lease.more``) end
        together, after the last of them. So a block can use more experts than there are slots, and no caller waits
        while it holds a lease that it has not processed. Two callers therefore can't deadlock, even at the smallest
        budget. Records of the keys given first are evicted last.

        Raises:
            StoreError: a load has failed. Its record is not cached; other records stay. Every caller that waits for
                this record gets the error and no further leases.
        """

    def residents(self, block: int) -> Residents | None:
        """Return where compiled code finds the block's records without a lease; None if it can't read them here.

        A record without a lease may be replaced at any time. So look it up together with its slot's generation,
        compute, and use the result only if the generation is the same afterwards (``arena/directory.py``).

        Raises ClosedError.
        """

    def note_uses(self, block: int, experts: Sequence[int]) -> None:
        """Count a demand for ``experts`` of a block that is about to be met through ``residents``, without leases.

        The effect is that of a demand that finds all its records: each is a hit, and the block's prefetch requests are
        cancelled. The order of eviction is updated later, but before the next record is evicted. Returns at once.
        """

    def take_back_uses(self, block: int, experts: Sequence[int]) -> None:
        """Count the hits of a ``note_uses`` as discarded: records were replaced before they were used.

        The caller repeats the demand, which is counted then.
        """

    def reclaim(self) -> None:
        """End all leases of the calling thread that an exception may have kept from ending in the regular way.

        The iterators that gave these leases must no longer be used.
        """

    def prefetch(self, block: int, keys: Sequence[ExpertKey]) -> None:
        """Request prefetches of records of one block, and return at once.

        The requests replace earlier ones for the block that have not begun. A demand for the block cancels all of its
        requests that have not begun.
        """

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """Return the keys whose records are not READY here, so that a demand would wait. Never waits for a read."""

    def stats(self) -> TierStats:
        """Return the counters of this tier since it was opened."""

    def close(self) -> None:
        """Release memory, descriptors and threads, once the loads that have begun are done. Idempotent."""


class Lender(ExpertSource[Record], Protocol[Record]):
    """Interface of a source below another tier, which copies records from it for demands and for prefetches."""

    def borrow(self, key: ExpertKey) -> AbstractContextManager[Lease[Record] | None]:
        """Lease a record for the duration of the context if it is READY here, else give None. Never waits.

        This is not a demand: it is not counted as a hit, miss or use, and it changes neither the order of eviction nor
        prefetch requests. A copy of the record is valid only if the lease still holds after it.
        """

    def used(self, keys: Sequence[ExpertKey]) -> None:
        """Note that demands have found ``keys`` in the tier above, and return at once.

        A prefetch of this tier then counts as useful if the tier above copied its record through ``borrow``. The order
        of eviction does not change.
        """


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name != "Pace":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        warnings.warn(f"{__name__}.Pace has no use any more; it goes with the next release.", DeprecationWarning, 2)
        return namedtuple("Pace", ("read", "grain", "saved", "beside"), defaults=(0.0,))
