"""The fallback of a daemon's client: a small host tier over the local store, used while the daemon is away or full."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from moetier.runtime.stores.registry import open_store
from moetier.tiers.cache.budget import slots_for, smallest_budget
from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import BudgetError, CheckpointError, ClosedError, ExhaustedError, StoreError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.locks import ForkGuard
from moetier.tiers.manifest import Manifest

AWAY_TIMEOUT = 30.0  # seconds that a read waits while all daemons are away and there is no local store


class Fallback(Closeable):
    """Host tier with the smallest budget over the store at ``location``, opened when it is first needed."""

    def __init__(self, location: Path, manifest: Manifest) -> None:
        self.first_slot = manifest.record_count  # its slots are numbered after those that an arena may have
        self._location = location
        self._manifest = manifest
        self._fork_guard = ForkGuard()
        # guards: the fields below; ``try_again`` does not take it. Held while the tier is opened
        self._lock = threading.Lock()
        self._closing = contextlib.ExitStack()
        self._is_closed = False
        self.host: HostTier | None = None  # None before it is first needed
        self.error = ""  # why the tier could not be opened

    def open(self) -> HostTier | None:
        """Return the host tier, and open it first if it is not open yet.

        Returns None if the store can't be opened, or there is too little memory or no thread; ``error`` then says why.
        Raises ClosedError after ``close``.
        """
        self._fork_guard.check()
        with self._lock:
            if self._is_closed:
                raise ClosedError("The tier of this model was closed.", "Load the model again.")
            if self.host is None and not self.error:
                self._closing.close()  # what an earlier attempt has opened that an exception interrupted
                with contextlib.ExitStack() as undo:
                    try:
                        store = undo.enter_context(open_store(self._location))
                        if store.manifest.digest != self._manifest.digest:
                            raise StoreError(
                                f"{self._location} holds another store than the daemon.", "Load the model again."
                            )
                        slots = slots_for(self._manifest, smallest_budget(self._manifest))
                        host = undo.enter_context(HostTier(store, slots=slots, loads_rest=store.is_local))
                    except (StoreError, CheckpointError, BudgetError, ExhaustedError) as error:
                        self.error = error.cause
                    else:
                        self._closing = undo.pop_all()
                        self.host = host
            return self.host

    def try_again(self) -> None:
        """Let the next ``open`` try again, as a daemon is back. Never waits.

        If an attempt fails at this moment, its error is kept until this is called once more.
        """
        self.error = ""

    def close(self) -> None:
        """Close the tier and its store. Idempotent."""
        if self._fork_guard.is_owner:  # in a forked child the lock may be held for ever
            with self._lock:
                self._is_closed = True
        self._closing.close()
