"""A store and a daemon of it, for tests of its clients."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from daemons import DaemonProcess, running_daemon
from readers import PATIENCE
from stores import keys, make_plan, make_records, write_store
from workers import Crew, crew

from moetier.runtime.client.tier import DaemonTier
from moetier.tiers.errors import UnavailableError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import ExpertSource


@dataclass(frozen=True)
class MappedStore:
    """A model directory, what is in it, and a folder for all else."""

    directory: Path
    manifest: Manifest
    records: dict[ExpertKey, bytes]
    scratch: Path

    @classmethod
    def make(cls, scratch: Path, *, blocks: int = 3, experts: int = 6, top_k: int = 2) -> MappedStore:
        plan = make_plan(blocks=blocks, experts=experts, top_k=top_k)
        records = make_records(plan)
        return cls(scratch / "model", write_store(scratch / "model", plan, records), records, scratch)

    @property
    def slot_bytes(self) -> int:
        return self.manifest.layout(0).slot_bytes

    @contextlib.contextmanager
    def daemon(self, slots: int, folder: Path, extra: Sequence[str] = ()) -> Iterator[DaemonProcess]:
        with running_daemon(self.directory, ram=slots * self.slot_bytes, folder=folder, extra=extra) as daemon:
            yield daemon

    @contextlib.contextmanager
    def crew(self, daemon: DaemonProcess) -> Iterator[Crew]:
        with crew(daemon.folder, self.directory, self.records, daemon.folder.parent) as made:
            yield made

    @contextlib.contextmanager
    def tier(self, daemon: DaemonProcess, *, fallback: bool = True, timeout: float = 30.0) -> Iterator[DaemonTier]:
        directory = self.directory if fallback else self.scratch / "no-store"
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                tier = DaemonTier.open(daemon.folder, directory, self.manifest, timeout=timeout)
                break
            except UnavailableError:  # a busy machine may hold the daemon for longer than a client waits for its packet
                if time.monotonic() > deadline:
                    raise
        with tier:
            yield tier

    def take(self, source: ExpertSource[memoryview], block: int, *experts: int) -> list[int]:
        """Acquires, checks the bytes of what holds, and returns the experts in order of arrival."""
        arrived = []
        for lease in source.acquire(keys(block, *experts)):
            data = bytes(lease.record)
            if lease.validate():
                assert data == self.records[lease.key], f"wrong bytes for {lease.key}"
                arrived.append(lease.key.expert)
        return arrived
