"""Calls of other hosts: how many may be under way, and their leases, for which each waits in its own thread."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from queue import Empty, SimpleQueue

import grpc

from moetier.runtime.wire.piece import WIRE_PIECE_BYTES, encode_piece
from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import ClosedError, ExhaustedError, ProtocolError
from moetier.tiers.host.demands import Failed, Granted, SessionEvent
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey

CALLS = 24  # most fetches, and most computations, at once, with those that wait: each takes a thread of the server
STALL = 10.0  # seconds for which a client may take no piece of an answer while other clients wait
MAX_TIMEOUT = 3600.0  # seconds to a call's deadline; a later deadline counts as none


class OpenCalls:
    """The fetches, or the computations, that are under way: at most CALLS. Thread-safe."""

    def __init__(self, name: str) -> None:
        """``name`` is the word for the calls in errors."""
        self._name = name
        self._lock = threading.Lock()  # guards: the fields below
        # for each call: when (monotonic clock) the piece was offered that its client has yet to take
        self._offered: dict[grpc.ServicerContext, float] = {}
        self.sent_bytes = 0  # number of bytes that clients have taken

    def __len__(self) -> int:
        return len(self._offered)

    @contextlib.contextmanager
    def admit(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Count a call as under way for the duration of the ``with`` block.

        If too many are, raise ExhaustedError, and cancel those whose clients have taken no piece for STALL seconds.
        """
        with self._lock:
            if is_admitted := len(self._offered) < CALLS:
                self._offered[context] = math.inf
        if not is_admitted:
            self.cancel(STALL)
            raise ExhaustedError(
                f"{CALLS} {self._name} are under way, the most that the daemon allows.",
                "Ask another daemon, or try again later.",
            )
        try:
            yield
        finally:
            with self._lock:
                del self._offered[context]

    def pieces(self, context: grpc.ServicerContext, data: memoryview, crc: int | None) -> Iterator[bytes]:
        """Yield the answer ``data`` of an admitted call as serialised pieces. The last has ``crc``."""
        for start in range(0, len(data), WIRE_PIECE_BYTES):
            piece, is_last = data[start : start + WIRE_PIECE_BYTES], start + WIRE_PIECE_BYTES >= len(data)
            with self._lock:
                self._offered[context] = time.monotonic()
            yield encode_piece(piece, crc if is_last else None)
            with self._lock:
                self.sent_bytes += len(piece)

    def cancel(self, stall: float = -math.inf) -> None:
        """Cancel the calls whose clients have taken no piece for ``stall`` seconds; by default all calls."""
        late = time.monotonic() - stall
        with self._lock:
            calls = [call for call, offered in self._offered.items() if offered <= late]
        for call in calls:
            call.cancel()


class CallLeases(Closeable):
    """Leases of all fetches, or of all computations. They share one session, so together they count as one client."""

    def __init__(self, host: HostTier, *, timeout: float) -> None:
        """A call waits at most ``timeout`` seconds for a slot."""
        self._timeout = timeout
        self._session = host.session(self._deliver, max_leases=CALLS, timeout=timeout)
        self._numbers = itertools.count(1)
        self._answers: dict[int, SimpleQueue[SessionEvent | None]] = {}  # keys: the numbers of the calls' requests

    def batches(
        self, keys: Sequence[ExpertKey], context: grpc.ServicerContext, deadline: float, *, waits_for_reads: bool = True
    ) -> Generator[list[Granted], None, None]:
        """Lease records of one block for a call, and yield lists of those that are available together.

        The leases of a list end when the next list is taken, or when the iterator is closed. Raises ExhaustedError if
        the call has no slot before ``deadline`` (monotonic clock), or, unless it ``waits_for_reads``, not all records;
        ClosedError if the call or the daemon has ended; and the error of a failed load. Reads that have begun go on.
        """
        number = next(self._numbers)
        answers = self._answers[number] = SimpleQueue[SessionEvent | None]()  # None: the call has ended
        try:
            self._session.acquire(number, keys, max(deadline - time.monotonic(), 0.0))
            if not context.add_callback(partial(answers.put, None)):
                raise no_caller()
            left = len(keys)
            while left:
                timeout = None if waits_for_reads else max(deadline - time.monotonic(), 0.0)
                try:
                    batch = [_granted(answers.get(timeout=timeout))]
                except Empty:
                    raise ExhaustedError("The daemon did not have the records in time.", "Fetch them.") from None
                with contextlib.suppress(Empty):
                    while True:
                        batch.append(_granted(answers.get_nowait()))
                yield batch
                left -= len(batch)
                if left:
                    self._session.release(number, [granted.key for granted in batch])
        finally:
            self._session.end(number)
            del self._answers[number]

    def close(self) -> None:
        """End all calls' requests. Idempotent."""
        self._session.close()
        for answers in list(self._answers.values()):
            answers.put(None)

    def _deliver(self, event: SessionEvent) -> None:
        if (answers := self._answers.get(event.request)) is not None:
            answers.put(event)


def _granted(event: SessionEvent | None) -> Granted:
    match event:
        case Granted():
            return event
        case Failed(error=error):
            raise error
        case None:
            raise no_caller()


def no_caller() -> ClosedError:
    """Return the error for a call that has ended."""
    return ClosedError("The daemon is ending, or the call has ended.", "Ask another daemon.")


def timeout_of(context: grpc.ServicerContext, most: float, what: str) -> float:
    """Return for how many seconds a call waits for a slot: half of its time, and at most ``most``.

    So it is answered before the client's deadline, after which the client would consider this daemon gone. Raises
    ProtocolError if the call has no deadline; ``what`` names the call.
    """
    if (remaining := context.time_remaining()) is None or remaining > MAX_TIMEOUT:
        raise ProtocolError(f"{what} needs a deadline.", f"Set a deadline of at most {MAX_TIMEOUT:.0f} seconds.")
    return min(remaining / 2, most)
