"""Learner: keeps a host tier's uses for the next run, and warms the tier with what earlier runs used most."""

from __future__ import annotations

import threading

from moetier.tiers.errors import ClosedError, StoreError
from moetier.tiers.locks import ForkGuard

from .tier import HostTier
from .warmup import HotSet, keep_hot_set, load_hot_set

EVERY = 300.0  # seconds between writes; a process that is killed loses the uses since the latest


class Learner:
    """Warms an open tier and counts its uses until ``close``. Nothing waits for it, and its errors end nothing."""

    def __init__(self, host: HostTier, *, every: float = EVERY) -> None:
        self._host = host
        self._fork_guard = ForkGuard()
        self._digest = host.manifest.digest
        self._experts = {number: block.experts for number, block in enumerate(host.manifest.blocks)}
        self._every = every
        self._ending = threading.Event()
        self._kept = host.uses()
        self._thread = threading.Thread(target=self._run, name="moetier-learner", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Keep what was counted, before or after the tier is closed. Idempotent. Does nothing in a forked child."""
        if self._fork_guard.is_owner:
            self._ending.set()
            self._thread.join()
            self._keep()

    def _run(self) -> None:
        hot = load_hot_set(self._digest, self._experts)
        try:
            self._host.warm(hot)
        except (ClosedError, StoreError):
            return
        while not self._ending.wait(self._every):
            self._keep()

    def _keep(self) -> None:
        uses = self._host.uses()
        new = {key: count - self._kept.get(key, 0) for key, count in uses.items()}
        self._kept = uses
        if used := {key: count for key, count in new.items() if count}:
            keep_hot_set(self._digest, self._experts, HotSet(used))
