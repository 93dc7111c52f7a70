"""Views: tensors over the host tier's memory, which a CPU computes on, and which are copied to another device."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any

import torch

from moetier.tiers.errors import ClosedError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.source import ExpertSource, Lease, Pace
from moetier.tiers.stats import TierStats


class SlotViews:
    """One tensor over each of the host's slots, made once, so that a decode step allocates nothing."""

    def __init__(
        self,
        prepare: Callable[[Any], None] = lambda memory: None,
        retire: Callable[[Any], None] = lambda memory: None,
    ) -> None:
        """
        Args:
            prepare: called with the whole of the host's memory before the first view of it is made.
            retire: called with memory that other memory has replaced.
        """
        self._lock = threading.Lock()
        self._prepare = prepare
        self._retire = retire
        self._memories: list[object] = []  # one, except while it is being replaced
        self._views: dict[int, tuple[memoryview, torch.Tensor]] = {}

    def of(self, lease: Lease[memoryview]) -> torch.Tensor:
        """Return the record as uint8 [record bytes] on its own memory, which lives as long as the tensor. Read-only."""
        known = self._views.get(lease.slot)
        if known is None or known[0] is not lease.record:
            with self._lock:
                known = self._views.get(lease.slot)
                if known is None or known[0] is not lease.record:
                    if known is not None and known[0].obj is not lease.record.obj:
                        self._drop(known[0].obj)
                    known = self._views[lease.slot] = (lease.record, self._make(lease.record))
        return known[1]

    def _make(self, record: memoryview) -> torch.Tensor:
        if not any(memory is record.obj for memory in self._memories):
            self._prepare(record.obj)  # may be called again for the same memory
            self._memories.append(record.obj)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(record, dtype=torch.uint8)

    def _drop(self, replaced: object) -> None:
        """Drop the views of memory that was replaced: one of them would keep all of it."""
        self._views = {slot: known for slot, known in self._views.items() if known[0].obj is not replaced}
        self._memories = [memory for memory in self._memories if memory is not replaced]
        self._retire(replaced)

    def clear(self) -> None:
        """Drop all views."""
        self._views.clear()  # without the lock, which in a forked child may be held for ever
        self._memories.clear()


class HostViews:
    """The device tier of a CPU, which computes on the host's records where they lie. Nothing is copied or cached."""

    def __init__(self, source: ExpertSource[memoryview]) -> None:
        self._source = source
        self._views = SlotViews()
        self._closed = False

    def acquire(self, keys: Sequence[ExpertKey]) -> Generator[Lease[torch.Tensor], None, None]:
        """Lease the host's records as uint8 [record bytes] on the host's own memory."""
        self._check_open()
        with closing(self._source.acquire(keys)) as leases:
            for lease in leases:
                if self._closed:
                    self._check_open()
                yield Lease(lease.key, self._views.of(lease), lease.slot, lease.proof, lease.more)

    def reclaim(self) -> None:
        """End the calling thread's leases, which are the source's."""
        self._source.reclaim()

    def prefetch(self, block: int, keys: Sequence[ExpertKey]) -> None:
        """Request a prefetch from the source."""
        self._check_open()
        self._source.prefetch(block, keys)

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """Return the keys whose records are not READY in the source."""
        return self._source.absent(keys)

    def pace(self, block: int) -> Pace | None:
        """Return the timing of the source's reads, or None if too little is known."""
        return self._source.pace(block)

    def stats(self) -> TierStats:
        """The source's statistics: there is nothing else to count."""
        return self._source.stats()

    def close(self) -> None:
        """The source stays open."""
        self._closed = True
        self._views.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("The device tier was closed.", "Load the model again.")
