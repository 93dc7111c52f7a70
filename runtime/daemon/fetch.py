"""The daemon's end of the call Fetch: sends a record, or a part of it, to another host, piece by piece."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping

import grpc

from moetier.proto import expert_store_pb2 as pb
from moetier.runtime.wire.piece import PIECE_BYTES, encode_piece
from moetier.tiers.errors import SAME_VERSION, ExhaustedError, ProtocolError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import SLOT_TIMEOUT

from .leases import CALLS, STALL, CallLeases, no_caller, timeout_of


class FetchCalls:
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
        self._state = threading.Condition()  # guards: the fields below
        # for each call under way: when (monotonic clock) the piece was offered that its client has yet to take
        self._offered: dict[grpc.ServicerContext, float] = {}
        self._held: dict[str, Counter[ExpertKey]] = {array: Counter() for array in slots}
        self._closed = False
        self._answered = 0  # calls answered in full
        self._sent_bytes = 0  # of records
        self._watcher = threading.Thread(target=self._watch, name="moetier-fetches", daemon=True)
        self._watcher.start()

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
                f"The bytes from {start:,} to {end:,} were asked for; the record has {size:,} bytes.",
                SAME_VERSION,
            )
        deadline = time.monotonic() + timeout
        batches = self._leases.batches([key], context, deadline)
        with self._admitted(key, entry.array, context, timeout), contextlib.closing(batches):
            (granted,) = next(batches)
            slot = self._host.whole(granted.slot)
            for at in range(start, end, PIECE_BYTES):
                piece = slot[at : min(at + PIECE_BYTES, end)]
                with self._state:
                    self._offered[context] = time.monotonic()
                is_last = at + PIECE_BYTES >= end
                yield encode_piece(piece, request.crc32c if is_last and request.HasField("crc32c") else None)
                with self._state:
                    self._sent_bytes += len(piece)
        with self._state:
            self._answered += 1

    def counts(self) -> dict[str, int]:
        """Return the counts of the calls. They are fields of ModelStats."""
        with self._state:
            return {"fetches": self._answered, "fetched_bytes": self._sent_bytes}

    def close(self) -> None:
        """Refuse new calls, and end those under way. Idempotent."""
        with self._state:
            self._closed = True
            self._state.notify_all()
            calls = list(self._offered)
        for call in calls:
            call.cancel()
        self._watcher.join()
        self._leases.close()

    @contextlib.contextmanager
    def _admitted(self, key: ExpertKey, array: str, context: grpc.ServicerContext, timeout: float) -> Iterator[None]:
        """Register a call, wait until fetches may hold its record, and count the record as held until the context ends.

        The number of distinct records that fetches hold is limited for each record layout (``array``). Raises
        ExhaustedError if too many calls are under way, or if the limit does not allow the record for ``timeout``
        seconds. Raises ClosedError if the call or the daemon has ended.
        """
        held = self._held[array]

        def free() -> bool:
            return self._closed or not context.is_active() or key in held or len(held) < self._limits[array]

        context.add_callback(self._wake)  # so that the wait for a slot ends when the client is gone
        with self._state:
            if len(self._offered) == CALLS:
                raise ExhaustedError(
                    f"{CALLS} fetches are under way, the most that the daemon allows.",
                    "Ask another daemon, or try again later.",
                )
            self._offered[context] = math.inf
        try:
            with self._state:
                if not self._state.wait_for(free, timeout):
                    raise ExhaustedError(
                        f"All slots that fetches may use were held for other records for {timeout:.1f} seconds.",
                        "Ask another daemon, or try again later.",
                    )
                if self._closed or not context.is_active():
                    raise no_caller()
                held[key] += 1
                self._state.notify_all()  # wakes the watcher
            try:
                yield
            finally:
                with self._state:
                    held[key] -= 1
                    if not held[key]:
                        del held[key]
        finally:
            with self._state:
                del self._offered[context]
                self._state.notify_all()

    def _wake(self) -> None:
        with self._state:
            self._state.notify_all()

    def _watch(self) -> None:
        """Cancel calls whose clients have taken no piece for too long, until ``close``.

        The threads of these calls then wake and release their leases.
        """
        with self._state:
            while not self._closed:
                late = time.monotonic() - self._stall
                for call, offered in self._offered.items():
                    if offered < late:
                        call.cancel()
                self._state.wait(self._stall / 4 if self._offered else None)
