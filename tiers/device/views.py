"""Views: tensors that share the host tier's memory, to compute on a CPU and to copy records to another device."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Generator, Sequence
from contextlib import closing

import torch

from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import ClosedError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.source import ExpertSource, Lease, Residents
from moetier.tiers.stats import TierStats


class SlotViews:
    """Tensors that share the memory of the host tier's slots. They are cached, so that a decode step makes none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards: ``_views``; ``clear`` does not take it
        self._views: dict[int, tuple[memoryview, torch.Tensor]] = {}  # from slot to the leased record and its view

    def of(self, lease: Lease[memoryview]) -> torch.Tensor:
        """Return a tensor uint8 [record bytes] that shares the memory of a leased record, and keeps the memory alive.

        The caller must not write to the tensor.
        """
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
        """Make the view of a record. The caller holds ``_lock``, as filters of warnings are the process's."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(record, dtype=torch.uint8)

    def _drop(self, replaced: object) -> None:
        """Release all views of memory that the host tier has replaced. A single view would keep all of it mapped.

        The caller holds ``_lock``.
        """
        self._views = {slot: known for slot, known in self._views.items() if known[0].obj is not replaced}

    def clear(self) -> None:
        """Release all views."""
        self._views.clear()  # without taking the lock, which may stay held for ever in a forked child


class HostViews(Closeable):
    """The device tier of a CPU. It leases views of the source's records, and neither copies nor caches records."""

    def __init__(self, source: ExpertSource[memoryview]) -> None:
        self.uses = source.uses
        self._source = source
        self._views = SlotViews()
        self._is_closed = False

    def acquire(self, keys: Sequence[ExpertKey], of_total: int = 0) -> Generator[Lease[torch.Tensor], None, None]:
        """Yield leases as ``ExpertSource`` specifies. Records are uint8 [record bytes] in the source's memory."""
        self._check_open()
        with closing(self._source.acquire(keys, of_total)) as leases:
            for lease in leases:
                if self._is_closed:
                    self._check_open()
                yield Lease(lease.key, self._views.of(lease), lease.slot, lease.proof, lease.more)

    def residents(self, block: int) -> Residents | None:
        """Return what the source returns: the addresses with which compiled code finds the block's records, or None."""
        self._check_open()
        return self._source.residents(block)

    def release_leases(self) -> None:
        """End all leases of the calling thread in the source."""
        self._source.release_leases()

    def prefetch(self, block: int, keys: Sequence[ExpertKey]) -> None:
        """Request prefetches from the source."""
        self._check_open()
        self._source.prefetch(block, keys)

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """Return the keys whose records are not READY in the source."""
        return self._source.absent(keys)

    def stats(self) -> TierStats:
        """Return the statistics of the source, because this object counts nothing itself."""
        return self._source.stats()

    def close(self) -> None:
        """Release the views. The source stays open. Idempotent."""
        self._is_closed = True
        self._views.clear()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError("The tiers of the model were closed.", "Load the model again.")
