"""The one interface of every tier, and of the daemon's client: something that experts are acquired from.

*Acquire* is demand: the caller computes next with what it asks for. *Prefetch* is a wish: it may be refused.
A *lease* is a pin with an owner, for as long as it is computed on.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from .keys import ExpertKey
from .manifest import Manifest
from .stats import TierStats

Record = TypeVar("Record", covariant=True)  # memoryview in the host tier, torch.Tensor in the device tier


@dataclass(frozen=True, slots=True)
class Lease(Generic[Record]):
    """One expert's record, ``record_bytes`` long, read-only, valid until the next lease is taken from the iterator.

    A record that another process owns may be replaced while it is computed on. So ask ``holds`` behind the last use of
    the record, and before anything that came of it is used: if it does not hold, throw that away; the iterator will
    yield the key once more.
    """

    key: ExpertKey
    record: Record
    slot: int  # of the tier that gave it
    proof: Callable[[], bool] | None = None  # None: the record is held in place

    def holds(self) -> bool:
        """Whether the record still is what it was when the lease was given. To be asked once."""
        return self.proof is None or self.proof()


class RecordReader(Protocol):
    """What a host tier stands on: a store, or anything else that can read one record into a slot. Thread-safe."""

    @property
    def manifest(self) -> Manifest: ...

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Callable[[], bool] | None = None) -> None:
        """Fills a writable slot of ``slot_bytes``, which begins on a page, with a record and its checksum.

        Who can reads piece by piece where there is a ``pause``, and calls it between two of them. It returns when the
        read may go on: whether it may be interrupted again, or is to be over soon. What it raises ends the read. Raises
        StoreError.
        """
        ...


class ExpertSource(Protocol[Record]):
    def acquire(self, keys: Sequence[ExpertKey]) -> Generator[Lease[Record], None, None]:
        """Yields one lease for each distinct key of one block: resident ones first, then as they arrive. A key whose
        lease did not hold is yielded again.

        A lease ends when the next is taken, when the iterator is exhausted or closed. So a block with more wanted
        experts than slots streams through, and nobody waits for a lease while one that it holds is unprocessed:
        two callers at the smallest budget can't deadlock. Keys given first are evicted last. Raises StoreError when a
        load fails: nothing is cached then, and everyone who waits for that key gets the error.
        """
        ...

    def prefetch(self, block: int, wishes: Sequence[ExpertKey]) -> None:
        """Returns at once. Replaces the block's wishes that have not begun; a demand for the block clears them."""
        ...

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """Those that are neither here nor, as far as this tier knows, on their way. Never waits for a read."""
        ...

    def stats(self) -> TierStats:
        """Counters of this tier since it was opened."""
        ...

    def close(self) -> None:
        """Releases memory, descriptors and threads; waits for loads that have begun. Idempotent."""
        ...
