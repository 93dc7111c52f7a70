"""One model that the daemon serves: its host tier, its counters, and the log of damage in its files."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from moetier.proto import expert_store_pb2 as pb
from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import ConfigError, ExhaustedError, MissingExpertError, MoetierError, StoreError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.host.warmup import Learner
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.trunk import check_sum
from moetier.tiers.threads import start_thread

from .client_counts import ClientCounts
from .fetch import FetchCalls
from .log import RateLimitedLog, log_event

if TYPE_CHECKING:
    from .compute import ComputeCalls

TRUNK_SHARE = 0.1  # share of the time in which the trunk is checked; the rest is left to reads of records

_log = logging.getLogger(__name__)


class HostedModel(Closeable):
    """A model's host tier, and counters of the requests of its clients.

    A fetch waits at most ``timeout`` seconds for a slot. With ``learn``, the most used experts are recorded and loaded
    at the next start. ``close`` does not close the tier.

    A background thread checks the checksums of the trunk's files once, and logs files that are damaged. The daemon
    itself does not use the trunk; processes that load the model do.
    """

    def __init__(
        self,
        manifest: Manifest,
        host: HostTier,
        location: Path,
        *,
        timeout: float,
        learn: bool = False,
        name: str = "",
    ) -> None:
        self.manifest = manifest
        self.name = name or manifest.model
        self.digest = manifest.digest
        self.host = host
        self.location = location
        self.slots = host.layout.slots_by_array
        self.budget_bytes = host.stats().memory_bytes
        self._timeout = timeout
        self._opening = threading.Lock()  # guards: ``_opener``
        self._opener: threading.Thread | None = None
        self._compute_calls = Future["ComputeCalls"]()  # set by the opener
        self._failures = RateLimitedLog(_log, "read-failed")
        self.counts = ClientCounts()
        self._closing = threading.Event()
        with contextlib.ExitStack() as undo:
            if learn:
                undo.callback(Learner(host).close)
            undo.callback(self._close_compute_calls)
            self.fetch_calls = FetchCalls(host, manifest, self.slots, timeout=timeout)
            undo.callback(self.fetch_calls.close)
            undo.callback(start_thread("moetier-trunk", self._check_trunk).join)
            undo.callback(self._closing.set)
            self._release = undo.pop_all().close

    def open_compute_calls(self) -> ComputeCalls:
        """Return the compute calls of other hosts. The first call imports the compiler, in the background.

        Raises ExhaustedError until that is done, or if there is no thread for it; ConfigError if no code can be
        compiled here; and StoreError if the tier was condemned before.
        """
        with self._opening:
            if self._opener is None and not self._closing.is_set():
                self._opener = start_thread("moetier-opener", self._import_compiler, daemon=False)
        if not self._compute_calls.done():
            raise ExhaustedError("The daemon is still loading its compiler.", "Fetch records meanwhile.")
        if isinstance(refusal := self._compute_calls.exception(), MoetierError):
            raise refusal.fresh()
        return self._compute_calls.result()

    def log_condemned(self, error: StoreError) -> None:
        """Log that the tier was condemned: clients of the model get ``error``. Other models are still served."""
        log_event(_log, "condemned", logging.ERROR, model=self.name, cause=error.cause, fix=error.fix)

    def log_failure(self, error: BaseException) -> None:
        """Log ``error``, with which a request has failed, if a failed read is its cause."""
        if isinstance(error, StoreError) and not isinstance(error, MissingExpertError) and self.host.fault is None:
            self._failures.log(model=self.name, cause=error.cause)

    def describe(self) -> pb.Model:
        """Return the message that describes the model to clients."""
        return pb.Model(
            name=self.name,
            digest=self.digest,
            budget_bytes=self.budget_bytes,
            slots=self.slots,
            directory=str(self.location),
            computes=True,
            checks=True,
        )

    def stats(self, *, clients: int, sessions: int, leases: int) -> pb.ModelStats:
        """Return all counters. ``clients``, ``sessions`` and ``leases`` are the present numbers of each."""
        counts = self.counts.sum()
        stats, fetched = self.host.stats(), self.fetch_calls.counts()
        computed = self._compute_calls.result().counts() if self._has_compute_calls() else {}
        return pb.ModelStats(
            name=self.name,
            digest=self.digest,
            host=pb.Tier(**asdict(stats)),
            clients=clients,
            sessions=sessions,
            leases=leases,
            recovered=self.host.recovered,
            fault="" if self.host.fault is None else self.host.fault.cause,
            requests=counts.requests,
            reported_hits=counts.reported_hits,
            session_bytes_in=counts.bytes_in,
            session_bytes_out=counts.bytes_out,
            **fetched,
            **computed,
        )

    def blocks(self) -> list[pb.Block]:
        """Return, for each block, which experts are in slots now and how often each was used."""
        uses = self.host.uses.counts()
        return [
            pb.Block(
                ready=self.host.ready_experts(number),
                uses=[uses.get(ExpertKey(number, expert), 0) for expert in range(block.experts)],
            )
            for number, block in enumerate(self.manifest.blocks)
        ]

    def close(self) -> None:
        """End the trunk's check, the calls of other hosts, and the learner. Idempotent."""
        self._release()

    def _close_compute_calls(self) -> None:
        with self._opening:  # none is started any more
            opener = self._opener
        if opener is not None:
            opener.join()
        if self._has_compute_calls():
            self._compute_calls.result().close()

    def _has_compute_calls(self) -> bool:
        return self._compute_calls.done() and self._compute_calls.exception() is None

    def _import_compiler(self) -> None:
        try:
            from .compute import ComputeCalls

            self._compute_calls.set_result(ComputeCalls(self.host, self.manifest, timeout=self._timeout))
        except MoetierError as error:
            self._compute_calls.set_exception(error.with_traceback(None))
        except Exception as error:  # llvmlite can't be imported, or there is no memory: callers must not wait for more
            _log.exception("Nothing can be computed for other hosts.")
            refusal = ConfigError(f"This daemon can't compute experts ({error}).", "Fetch records instead.")
            self._compute_calls.set_exception(refusal)

    def _check_trunk(self) -> None:
        for name, entry in self.manifest.trunk.items():
            path = self.location / name
            if not path.is_file():
                continue
            try:
                began = time.monotonic()
                for _ in check_sum(path, entry, cached=True):
                    if self._closing.wait((time.monotonic() - began) * (1 / TRUNK_SHARE - 1)):
                        return
                    began = time.monotonic()
            except StoreError as error:
                log_event(_log, "trunk-damaged", logging.ERROR, model=self.name, cause=error.cause, fix=error.fix)
