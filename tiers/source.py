"""The one interface of every tier, and of the daemon's client: something that experts are acquired from.

*Acquire* is demand: the caller computes next with what it asks for. *Prefetch* is a wish: it may be refused.
*Borrow* is neither: the tier above copies what is here already, for a wish of its own.
A *lease* is a pin with an owner, for as long as it is computed on.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import Generic, NamedTuple, Protocol, TypeVar

from .layout import PAGE, ExpertKey
from .manifest import Manifest
from .stats import TierStats

Record = TypeVar("Record", covariant=True)  # memoryview in the host tier, torch.Tensor in the device tier

INTERRUPTIBLE_BYTES = 2 << 20  # at least


def interruptible_bytes(length: int) -> int:
    """Of one read at a time, where a record of ``length`` bytes may be interrupted: an eighth, in whole pages, so that
    others wait for no more; and enough to be worth a call."""
    return min(length, max(INTERRUPTIBLE_BYTES, -(-length // (8 * PAGE)) * PAGE))


class Lease(NamedTuple, Generic[Record]):
    """One expert's record, ``record_bytes`` long, read-only, valid until the next lease is taken from the iterator.
    Where there are ``more``, the next one is there already, and this one stays valid as long as that.

    A record that another process owns may be replaced while it is computed on. So ask ``holds`` behind the last use of
    the record, and before anything that came of it is used: if it does not hold, throw that away; the iterator will
    yield the key once more.
    """

    key: ExpertKey
    record: Record
    slot: int  # of the tier that gave it
    proof: Callable[[], bool] | None = None  # None: the record is held in place
    more: bool = False  # of this group: what is there together can be computed together

    def holds(self) -> bool:
        """Whether the record still is what it was when the lease was given. To be asked once."""
        return self.proof is None or self.proof()


class Pace(NamedTuple):
    """Of one record, in seconds."""

    read: float  # that its read takes
    grain: float  # for which its read can't stand back
    saved: float  # that a right wish has saved, on average: what was read of it when its demand came
    beside: float = 0.0  # for which it is read beside the slots, and has evicted nothing


class StagedPrefix(NamedTuple):
    """What is there of a record already."""

    length: int  # bytes, of whole pages
    copy: Callable[[memoryview], None]  # puts it into a slot, as soon as it is there


class RecordReader(Protocol):
    """What a host tier stands on: a store, or anything else that can read one record into a slot. Thread-safe."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def parts(self) -> PartReader | None:
        """Itself, if it can read parts of records."""

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Callable[[], bool] | None = None) -> None:
        """Fills a writable slot of ``slot_bytes``, which begins on a page, with a record and its checksum.

        Who can reads piece by piece where there is a ``pause``, and calls it between two of them. It returns when the
        read may go on: whether it may be interrupted again, or is to be over soon. What it raises ends the read. Raises
        StoreError.
        """
        ...


class PartReader(Protocol):
    def read_part(self, key: ExpertKey, start: int, part: memoryview) -> None:
        """Fills ``part`` with what a slot of the record has from byte ``start`` on: whole pages, or to its end. Nothing
        is checked. Raises StoreError, which does not name the record."""

    def read_rest(
        self, key: ExpertKey, buffer: memoryview, prefix: StagedPrefix, pause: Callable[[], bool] | None = None
    ) -> None:
        """As ``read_into``, but for what is there: that is waited for only when the rest has been asked for. Raises
        StoreError, and what ``prefix.copy`` raises."""


class ExpertSource(Protocol[Record]):
    def acquire(self, keys: Sequence[ExpertKey]) -> Generator[Lease[Record], None, None]:
        """Yields one lease for each distinct key of one block: resident ones first, then as they arrive. A key whose
        lease did not hold is yielded again.

        A lease ends when the next is taken (behind the last of those that come together), when the iterator is
        exhausted or closed. So a block with more wanted experts than slots streams through, and nobody waits for a
        lease while one that it holds is unprocessed: two callers at the smallest budget can't deadlock. Keys given
        first are evicted last. Raises StoreError when a load fails: nothing is cached then, and everyone who waits for
        that key gets the error.
        """
        ...

    def reclaim(self) -> None:
        """End all that the calling thread has acquired here: an exception from outside may have cut its end. Iterators
        of it must not go on."""
        ...

    def prefetch(self, block: int, wishes: Sequence[ExpertKey]) -> None:
        """Returns at once. Replaces the block's wishes that have not begun; a demand for the block clears them."""
        ...

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """Those whose records are not READY here, be they on their way or not: a demand now would wait for them. Never
        waits for a read."""
        ...

    def pace(self, block: int) -> Pace | None:
        """How long reading one of the block's records takes, as the latest did; None where too little is known."""
        ...

    def stats(self) -> TierStats:
        """Counters of this tier since it was opened."""
        ...

    def close(self) -> None:
        """Releases memory, descriptors and threads; waits for loads that have begun. Idempotent."""
        ...


class Lender(ExpertSource[Record], Protocol[Record]):
    """A source under a tier that copies records out of it, for demands and before any comes."""

    def borrow(self, key: ExpertKey) -> AbstractContextManager[Lease[Record] | None]:
        """A lease of what is READY here, for as long as the context lasts; else None. Never waits.

        It is no demand: no hit or miss is counted, no use, and nothing of a guess yet; no order of eviction changes,
        and all wishes stand. Who copies the record asks whether the lease held: only then is it a loan.
        """
        ...

    def used(self, keys: Sequence[ExpertKey]) -> None:
        """Demands found these in the tier above. What a wish of this one brought, and was borrowed, was a right guess;
        no order of eviction changes. Returns at once."""
        ...
