"""One model that the daemon hosts: its host tier, its counters, and what is logged of its files."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from moetier.proto import expert_store_pb2 as pb
from moetier.tiers.errors import StoreError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.host.warmup import Learner
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import RecordReader, StagedPrefix
from moetier.tiers.store.trunk import check_sum

from .fetch import Fetches
from .log import RateLimitedLog, log_event

TRUNK_SHARE = 0.1  # of the time: reads of records come first

_log = logging.getLogger(__name__)


class HostedModel:
    """A model's host tier and what clients have asked of it. ``close`` closes the tier, but not the store beneath."""

    def __init__(
        self, manifest: Manifest, host: HostTier, directory: Path, *, patience: float, learn: bool = False
    ) -> None:
        self.manifest = manifest
        self.host = host
        self.directory = directory
        self.slots = host.plan.slots_by_array
        self.budget_bytes = host.stats().slot_bytes
        self.fetches = Fetches(host, manifest, self.slots, patience=patience)
        host.uses()  # from the first call on, uses are counted
        self.when_condemned: Callable[[], None] = lambda: None
        self._learner = Learner(host) if learn else None
        self._lock = threading.Lock()  # guards the four below
        self._requests = 0
        self._used = 0
        self._bytes_in = 0
        self._bytes_out = 0

    def condemn(self, error: StoreError) -> None:
        """Stop serving a store that is not that of its digest. The daemon goes on serving its other models."""
        log_event(_log, "condemned", logging.ERROR, model=self.name, cause=error.cause, fix=error.fix)
        self.host.condemn(error)
        self.when_condemned()

    @property
    def name(self) -> str:
        """The model's name in its manifest."""
        return self.manifest.model

    @property
    def digest(self) -> str:
        """Digest of the store, hexadecimal."""
        return self.manifest.digest

    def count(self, *, requests: int = 0, used: int = 0, bytes_in: int = 0, bytes_out: int = 0) -> None:
        """Add to the counters of the sessions."""
        with self._lock:
            self._requests += requests
            self._used += used
            self._bytes_in += bytes_in
            self._bytes_out += bytes_out

    def describe(self) -> pb.Model:
        """Return what clients are told of the model."""
        return pb.Model(
            name=self.name,
            digest=self.digest,
            budget_bytes=self.budget_bytes,
            slots=self.slots,
            directory=str(self.directory),
        )

    def stats(self, *, clients: int, sessions: int, leases: int) -> pb.ModelStats:
        """Return all counters, with those of ``Clients``, which it is given."""
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
        """Return, for each block, which experts are in slots now and how often each was used."""
        uses = self.host.uses()
        return [
            pb.Block(
                ready=self.host.ready(number),
                uses=[uses.get(ExpertKey(number, expert), 0) for expert in range(block.experts)],
            )
            for number, block in enumerate(self.manifest.blocks)
        ]

    def close(self) -> None:
        """Close the tier and what runs on it."""
        self.fetches.close()
        if self._learner is not None:
            self._learner.close()
        self.host.close()


class LoggingReader:
    """RecordReader that also logs failures of another one, which it does not own."""

    def __init__(self, reader: RecordReader) -> None:
        self._reader = reader
        self._failures = RateLimitedLog(_log, "read-failed")

    @property
    def manifest(self) -> Manifest:
        """The other reader's manifest."""
        return self._reader.manifest

    @property
    def parts(self) -> LoggingReader | None:
        """This reader if the other one can read parts of records, else None."""
        return None if self._reader.parts is None else self

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Callable[[], bool] | None = None) -> None:
        """As the other reader does."""
        with self._logged(key):
            self._reader.read_into(key, buffer, pause)

    def read_part(self, key: ExpertKey, start: int, part: memoryview) -> None:
        """As the other reader does. Failures are not logged, as the read of the rest fails again."""
        assert self._reader.parts is not None
        self._reader.parts.read_part(key, start, part)

    def read_rest(
        self, key: ExpertKey, buffer: memoryview, prefix: StagedPrefix, pause: Callable[[], bool] | None = None
    ) -> None:
        """As the other reader does."""
        assert self._reader.parts is not None
        with self._logged(key):
            self._reader.parts.read_rest(key, buffer, prefix, pause)

    @contextlib.contextmanager
    def _logged(self, key: ExpertKey) -> Iterator[None]:
        try:
            yield
        except StoreError as error:
            self._failures.log(model=self.manifest.model, expert=key, cause=error.cause)
            raise


class TrunkCheck:
    """Compares the checksums of the trunk's files once, in the background, and logs files that are damaged.

    The daemon itself does not use the trunk; processes that load the model do.
    """

    def __init__(self, manifest: Manifest, directory: Path) -> None:
        self._manifest = manifest
        self._directory = directory
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moetier-trunk", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the check. Idempotent."""
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        for name, entry in self._manifest.trunk.items():
            path = self._directory / name
            if not path.is_file():
                continue
            try:
                began = time.monotonic()
                for _ in check_sum(path, entry, cached=True):
                    if self._ending.wait((time.monotonic() - began) * (1 / TRUNK_SHARE - 1)):
                        return
                    began = time.monotonic()
            except StoreError as error:
                log_event(
                    _log, "trunk-damaged", logging.ERROR, model=self._manifest.model, cause=error.cause, fix=error.fix
                )
