"""Spare: the local store, for as long as a daemon is away or full."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from moetier.tiers.cache.budget import slots_for, smallest_budget
from moetier.tiers.errors import BudgetError, ClosedError, StoreError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.locks import ForkGuard
from moetier.tiers.manifest import Manifest
from moetier.tiers.stats import TierStats
from moetier.tiers.store.reader import ExpertStore


class Spare:
    """A host tier of the smallest budget over the store in a model directory, opened when it is first needed."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory = directory
        self._manifest = manifest
        self._fork_guard = ForkGuard()
        self._lock = threading.Lock()
        self._closing = contextlib.ExitStack()
        self._host: HostTier | None = None
        self._error: StoreError | BudgetError | None = None
        self._closed = False

    def open(self) -> HostTier | None:
        """None where it can't be had: then there is no such store, or no memory. ``why`` says it."""
        self._fork_guard.check()
        with self._lock:
            if self._closed:
                raise ClosedError("The tier was closed.", "Load the model again.")
            if self._host is None and self._error is None:
                self._closing.close()  # of an attempt that an exception cut
                with contextlib.ExitStack() as opening:
                    try:
                        store = opening.enter_context(ExpertStore.open(self._directory))
                        if store.manifest.digest != self._manifest.digest:
                            raise StoreError(f"{self._directory} holds another store by now.", "Load the model again.")
                        slots = slots_for(self._manifest, smallest_budget(self._manifest))
                        host = opening.enter_context(HostTier(store, slots=slots))
                        store.on_fault(host.condemn)
                    except (StoreError, BudgetError) as error:
                        self._error = error
                    else:
                        self._closing = opening.pop_all()
                        self._host = host
            return self._host

    @property
    def why(self) -> str:
        """Why it could not be had."""
        return self._error.cause if self._error is not None else ""

    def forgive(self) -> None:
        """What could not be had is tried again when it is needed next."""
        self._error = None

    def reclaim(self) -> None:
        """Ends all that the calling thread has acquired of it."""
        if self._host is not None:
            self._host.reclaim()

    def stats(self) -> TierStats | None:
        """None before it was needed."""
        host = self._host
        return host.stats() if host is not None else None

    def close(self) -> None:
        """Idempotent."""
        if self._fork_guard.is_owner:  # in a fork the lock may be held for ever
            with self._lock:
                self._closed = True
        self._closing.close()
