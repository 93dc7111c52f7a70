"""One model of a daemon: its host tier, and what clients have asked of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from moetier.proto import expert_store_pb2 as pb
from moetier.tiers.errors import StoreError
from moetier.tiers.host.learner import Learner
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest

from .fetch import Fetches
from .log import say

_log = logging.getLogger(__name__)


class Hosted:
    """``close`` closes the tier; the store beneath it is its owner's."""

    def __init__(
        self, manifest: Manifest, host: HostTier, directory: Path, *, patience: float, learn: bool = False
    ) -> None:
        self.manifest = manifest
        self.host = host
        self.directory = directory
        self.slots = host.plan.slots_by_array
        self.budget_bytes = host.stats().slot_bytes
        self.fetches = Fetches(host, manifest, self.slots, patience=patience)
        host.uses()  # are counted from now on
        self.when_condemned: Callable[[], None] = lambda: None
        self._learner = Learner(host) if learn else None
        self._lock = threading.Lock()  # of the four below
        self._requests = 0
        self._used = 0
        self._bytes_in = 0
        self._bytes_out = 0

    def condemn(self, error: StoreError) -> None:
        """Ends the service of a store that is not that of its digest. The daemon serves its other models on."""
        say(_log, "condemned", logging.ERROR, model=self.name, cause=error.cause, fix=error.fix)
        self.host.condemn(error)
        self.when_condemned()

    @property
    def name(self) -> str:
        return self.manifest.model

    @property
    def digest(self) -> str:
        return self.manifest.digest

    def count(self, *, requests: int = 0, used: int = 0, bytes_in: int = 0, bytes_out: int = 0) -> None:
        """Of sessions, in addition."""
        with self._lock:
            self._requests += requests
            self._used += used
            self._bytes_in += bytes_in
            self._bytes_out += bytes_out

    def describe(self) -> pb.Model:
        return pb.Model(
            name=self.name,
            digest=self.digest,
            budget_bytes=self.budget_bytes,
            slots=self.slots,
            directory=str(self.directory),
        )

    def stats(self, *, clients: int, sessions: int, leases: int) -> pb.ModelStats:
        stats = self.host.stats()
        with self._lock:
            return pb.ModelStats(
                name=self.name,
                digest=self.digest,
                host=pb.Tier(**asdict(stats)),
                clients=clients,
                sessions=sessions,
                leases=leases,
                requests=self._requests,
                used=self._used,
                fetches=self.fetches.count,
                fetched_bytes=self.fetches.bytes,
                session_bytes_in=self._bytes_in,
                session_bytes_out=self._bytes_out,
                recovered=self.host.recovered,
                fault="" if self.host.fault is None else self.host.fault.cause,
            )

    def blocks(self) -> list[pb.Block]:
        """What is in the slots now, and what was used since the beginning."""
        uses = self.host.uses()
        return [
            pb.Block(
                ready=self.host.ready(number),
                uses=[uses.get(ExpertKey(number, expert), 0) for expert in range(block.experts)],
            )
            for number, block in enumerate(self.manifest.blocks)
        ]

    def close(self) -> None:
        self.fetches.close()
        if self._learner is not None:
            self._learner.close()
        self.host.close()
