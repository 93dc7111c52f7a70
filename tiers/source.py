"""The interface of every tier and of the daemon's client: a source that experts are acquired from.

To *acquire* is a demand: the caller computes next with the experts that it asks for. A *prefetch* is a request that may
be refused. To *borrow* is neither: the tier above copies a record that is here already, for a prefetch of its own. A
*lease* pins a record for as long as its owner computes on it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import Generic, NamedTuple, Protocol, TypeVar

from .layout import PAGE, ExpertKey
from .manifest import Manifest
from .stats import TierStats

Record = TypeVar("Record", covariant=True)  # memoryview in the host tier, torch.Tensor in the device tier

INTERRUPTIBLE_BYTES = 2 << 20  # smallest piece of an interruptible read


def interruptible_bytes(length: int) -> int:
    """Bytes per read of a record of ``length`` bytes that may be interrupted between reads.

    They are an eighth of the record in whole pages, as others wait for one such read, but enough to be worth a call.
    """
    return min(length, max(INTERRUPTIBLE_BYTES, -(-length // (8 * PAGE)) * PAGE))


class Lease(NamedTuple, Generic[Record]):
    """A read-only view of one expert's record, ``record_bytes`` long.

    It is valid until the next lease is taken from the iterator. If there are ``more``, the next lease is available
    already, and this one stays valid as long as that one.

    Another process may own the record and replace it during the computation. So ask ``holds`` after the last use of the
    record and before any use of the result. If it returns False, discard the result; the iterator yields the key again.
    """

    key: ExpertKey
    record: Record
    slot: int  # number of the slot in the tier that gave the lease
    proof: Callable[[], bool] | None = None  # None: the record is pinned
    more: bool = False  # further leases are available now: they can be computed together with this one

    def holds(self) -> bool:
        """Return whether the record is still the one that was leased. Call it once."""
        return self.proof is None or self.proof()


class Pace(NamedTuple):
    """Timing of the reads of one block's records, in seconds."""

    read: float  # duration of a whole read
    grain: float  # longest part of a read that can't be interrupted
    saved: float  # mean time that a right prefetch has saved: what was read of the record when its demand came
    beside: float = 0.0  # time for which a prefetch reads into a staging buffer and has evicted nothing yet


class StagedPrefix(NamedTuple):
    """The first bytes of a record, which a staging buffer has or is receiving."""

    length: int  # bytes, of whole pages
    copy: Callable[[memoryview], None]  # waits for these bytes and copies them into a slot


class RecordReader(Protocol):
    """Reads records for a host tier: a store, or anything else that can read one record into a slot. Thread-safe."""

    @property
    def manifest(self) -> Manifest:
        """The manifest of the records."""

    @property
    def parts(self) -> PartReader | None:
        """The reader itself if it can read parts of records, else None."""

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Callable[[], bool] | None = None) -> None:
        """Read a record and its checksum into ``buffer``: a writable slot of ``slot_bytes`` that begins on a page.

        Args:
            key: the expert.
            buffer: the slot.
            pause: if given and the reader is able to, it reads in pieces and calls ``pause`` between two of them.
                ``pause`` blocks until the read may go on, and returns whether the rest may be interrupted too. An
                exception from it ends the read.

        Raises:
            StoreError: the record can't be read.
        """


class PartReader(Protocol):
    """Reads parts of records, for prefetches that begin in a staging buffer."""

    def read_part(self, key: ExpertKey, start: int, part: memoryview) -> None:
        """Read the bytes of a record's slot from byte ``start`` on into ``part``: whole pages, or up to the slot's end.

        No checksum is compared. Raises a StoreError that does not name the record.
        """

    def read_rest(
        self, key: ExpertKey, buffer: memoryview, prefix: StagedPrefix, pause: Callable[[], bool] | None = None
    ) -> None:
        """Read a record as ``read_into`` does, except for its ``prefix``, which is copied.

        The read of the rest is begun before the copy waits for the prefix. Raises StoreError, and any exception of
        ``prefix.copy``.
        """


class ExpertSource(Protocol[Record]):
    """A source of experts: a tier, or a daemon's client. Thread-safe."""

    def acquire(self, keys: Sequence[ExpertKey]) -> Generator[Lease[Record], None, None]:
        """Yield one lease for each distinct key of one block, resident ones first, the others as they arrive.

        A key whose lease did not hold is yielded again. A lease ends when the next is taken (of leases that are
        available together, after the last of them) and when the iterator is exhausted or closed. So a block that wants
        more experts than there are slots streams through them, and no caller waits while it holds an unprocessed lease:
        two callers can't deadlock, even at the smallest budget. Keys given first are evicted last.

        Raises:
            StoreError: a load has failed. That record is not cached, others stay. All callers that wait for it get the
                error, and none of the call's further leases.
        """

    def reclaim(self) -> None:
        """End all leases of the calling thread, whose regular end an exception may have cut.

        Their iterators must not be used any more.
        """

    def prefetch(self, block: int, keys: Sequence[ExpertKey]) -> None:
        """Request prefetches of one block and return at once.

        They replace the block's requests that have not begun. A demand for the block cancels those.
        """

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """Return the keys whose records are not READY here, so that a demand would wait. Never waits for a read."""

    def pace(self, block: int) -> Pace | None:
        """Return the timing of the latest reads of the block's records, or None if too little is known."""

    def stats(self) -> TierStats:
        """Return the counters of this tier since it was opened."""

    def close(self) -> None:
        """Release memory, descriptors and threads. Waits for loads that have begun. Idempotent."""


class Lender(ExpertSource[Record], Protocol[Record]):
    """A source below another tier, which copies records out of it for demands and for prefetches."""

    def borrow(self, key: ExpertKey) -> AbstractContextManager[Lease[Record] | None]:
        """Lease a record that is READY here for as long as the context lasts, else give None. Never waits.

        It is not a demand: it counts as no hit, miss or use, changes no order of eviction and cancels no prefetch
        request. The copy is good only if the lease holds at its end.
        """

    def used(self, keys: Sequence[ExpertKey]) -> None:
        """Note that demands found ``keys`` in the tier above, and return at once.

        A prefetch of this tier then counts as useful if the tier above copied its record through ``borrow``. The order
        of eviction does not change.
        """
