"""Views: tensors over the host tier's memory, for computing on a CPU and for copying to another device."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any

import torch

from moetier.tiers.errors import ClosedError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.source import ExpertSource, Lease, Residents
from moetier.tiers.stats import TierStats


class SlotViews:
    """Tensors over the host tier's slots. Each is made only once, so that a decode step allocates nothing."""

    def __init__(
        self,
        prepare: Callable[[Any], None] = lambda memory: None,
        retire: Callable[[Any], None] = lambda memory: None,
    ) -> None:
        """
        Args:
            prepare: called with the host's whole memory before the first view of it is made.
            retire: called with the former memory when the host uses another.
        """
        self._lock = threading.Lock()
        self._prepare = prepare
        self._retire = retire
        self._memories: list[object] = []  # memory that has views: one, except while it is being replaced
        self._views: dict[int, tuple[memoryview, torch.Tensor]] = {}

    def of(self, lease: Lease[memoryview]) -> torch.Tensor:
        """Return a read-only tensor, uint8 [record bytes], over a leased record's memory, which it keeps alive."""
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
        """Release all views of memory that the host has replaced, as a single view would keep all of it mapped."""
        self._views = {slot: known for slot, known in self._views.items() if known[0].obj is not replaced}
        self._memories = [memory for memory in self._memories if memory is not replaced]
        self._retire(replaced)

    def clear(self) -> None:
        """Release all views."""
        self._views.clear()  # without the lock, which may never be released in a forked child
        self._memories.clear()


class HostViews:
    """The device tier of a CPU: it gives views of the host tier's records, and copies and caches nothing."""

    def __init__(self, source: ExpertSource[memoryview]) -> None:
        self._source = source
        self._views = SlotViews()
        self._closed = False

    def acquire(self, keys: Sequence[ExpertKey]) -> Generator[Lease[torch.Tensor], None, None]:
        """Lease records as ``ExpertSource`` specifies. They are uint8 [record bytes] over the host's memory."""
        self._check_open()
        with closing(self._source.acquire(keys)) as leases:
            for lease in leases:
                if self._closed:
                    self._check_open()
                yield Lease(lease.key, self._views.of(lease), lease.slot, lease.proof, lease.more)

    def residents(self, block: int) -> Residents | None:
        """Return where compiled code finds the block's records in the source's memory, or None if it can't."""
        self._check_open()
        return self._source.residents(block)

    def note_uses(self, block: int, experts: Sequence[int]) -> None:
        """Tell the source that a demand is about to be met with its records, without leases."""
        self._source.note_uses(block, experts)

    def take_back_uses(self, block: int, experts: Sequence[int]) -> None:
        """Take back the hits of ``note_uses`` in the source: records were replaced before they were used."""
        self._source.take_back_uses(block, experts)

    def reclaim(self) -> None:
        """End the calling thread's leases, which are leases of the source."""
        self._source.reclaim()

    def prefetch(self, block: int, keys: Sequence[ExpertKey]) -> None:
        """Request a prefetch from the source."""
        self._check_open()
        self._source.prefetch(block, keys)

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """Return the keys whose records are not READY in the source."""
        return self._source.absent(keys)

    def stats(self) -> TierStats:
        """Return the statistics of the source, as views count nothing themselves."""
        return self._source.stats()

    def close(self) -> None:
        """Release the views. The source stays open. Idempotent."""
        self._closed = True
        self._views.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("The device tier was closed.", "Load the model again.")
