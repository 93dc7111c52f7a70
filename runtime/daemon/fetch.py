"""The daemon's end of the call Fetch: sends a record, or a part of it, to another host, piece by piece."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping

import grpc

from moetier.proto import expert_store_pb2 as pb
from moetier.tiers.closeable import Closeable, closed_on_error
from moetier.tiers.errors import SAME_VERSION, ExhaustedError, ProtocolError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import SLOT_TIMEOUT
from moetier.tiers.threads import start_thread

from .leases import STALL, CallLeases, OpenCalls, no_caller, timeout_of


class FetchCalls(Closeable):
    """Fetch calls of other hosts on one host tier. A call holds a slot while its client takes the pieces.

    All calls together may hold a quarter of the slots of each record layout, and at least one slot. The other slots are
    left to sessions of this host. A call waits at most ``timeout`` seconds for a slot. A client that takes no
    piece for ``stall`` seconds is cut off, whatever its deadline.
    """

    def __init__(
        self,
        host: HostTier,
        manifest: Manifest,
        slots: Mapping[str, int],
        *,
        stall: float = STALL,
        timeout: float = SLOT_TIMEOUT,
    ) -> None:
        self._host = host
        self._leases = CallLeases(host, timeout=timeout)
        self._manifest = manifest
        self._limits = {array: max(1, count // 4) for array, count in slots.items()}
        self._stall = stall
        self._timeout = timeout
        self._calls = OpenCalls("fetches")
        self._state = threading.Condition()  # guards: ``_leased``, ``_is_closed``, ``_answered``
        # by array: the number of calls for each record that fetches lease or are about to lease
        self._leased: dict[str, Counter[ExpertKey]] = {array: Counter() for array in slots}
        self._is_closed = False
        self._answered = 0  # calls answered in full
        with closed_on_error(self._leases):
            self._watcher = start_thread("moetier-fetches", self._watch)

    def serve(self, request: pb.FetchRequest, context: grpc.ServicerContext) -> Generator[bytes, None, None]:
        """Yield the requested bytes of a record as serialised pieces. The last repeats the request's checksum, if any.

        Raises MissingExpertError if the model has no such expert, ProtocolError if the call has no deadline or asks for
        bytes outside the record, ExhaustedError if fetches hold all slots that they may, and the error of a failed
        load.
        """
        timeout = timeout_of(context, self._timeout, "A fetch")
        key = ExpertKey(request.block, request.expert)
        self._manifest.check_keys(key.block, [key])
        entry = self._manifest.blocks[key.block]
        size = self._manifest.layouts[entry.array].slot_bytes
        start, end = request.offset, request.offset + (request.length or size - request.offset)
        if not 0 <= start < end <= size:
            raise ProtocolError(
                f"The bytes from {start:,} to {end:,} were asked for; the record has {size:,} bytes.", SAME_VERSION
            )
        deadline = time.monotonic() + timeout
        batches = self._leases.batches([key], context, deadline)
        with self._calls.admit(context), self._counted(key, entry.array, context, timeout), contextlib.closing(batches):
            (granted,) = next(batches)
            crc = request.crc32c if request.HasField("crc32c") else None
            yield from self._calls.pieces(context, self._host.record_and_checksum(granted.slot)[start:end], crc)
        with self._state:
            self._answered += 1

    def counts(self) -> dict[str, int]:
        """Return the counts of the calls. They are fields of ModelStats."""
        with self._state:
            return {"fetches": self._answered, "fetched_bytes": self._calls.sent_bytes}

    def close(self) -> None:
        """Refuse new calls, and end those under way. Idempotent."""
        with self._state:
            self._is_closed = True
            self._state.notify_all()
        self._calls.cancel()
        self._watcher.join()
        self._leases.close()

    @contextlib.contextmanager
    def _counted(self, key: ExpertKey, array: str, context: grpc.ServicerContext, timeout: float) -> Iterator[None]:
        """Wait until fetches may lease a record, and count the record as leased until the ``with`` block ends.

        The number of distinct records that fetches lease is limited for each record layout (``array``). Raises
        ExhaustedError if the limit does not allow the record for ``timeout`` seconds, and ClosedError if the call or
        the daemon has ended.
        """
        leased = self._leased[array]

        def may_go_on() -> bool:
            is_over = self._is_closed or not context.is_active()
            return is_over or key in leased or len(leased) < self._limits[array]

        context.add_callback(self._wake)  # so that the wait for a slot ends when the client is gone
        with self._state:
            if not self._state.wait_for(may_go_on, timeout):
                raise ExhaustedError(
                    f"All slots that fetches may use were held for other records for {timeout:.1f} seconds.",
                    "Ask another daemon, or try again later.",
                )
            if self._is_closed or not context.is_active():
                raise no_caller()
            leased[key] += 1
            self._state.notify_all()  # wakes the watcher
        try:
            yield
        finally:
            with self._state:
                leased[key] -= 1
                if not leased[key]:
                    del leased[key]
                self._state.notify_all()

    def _wake(self) -> None:
        with self._state:
            self._state.notify_all()

    def _watch(self) -> None:
        """Cancel calls whose clients have taken no piece for too long, until ``close``.

        The threads of these calls then wake and release their leases.
        """
        while not self._is_closed:
            self._calls.cancel(self._stall)
            with self._state:
                if not self._is_closed:
                    self._state.wait(self._stall / 4 if self._calls else None)
