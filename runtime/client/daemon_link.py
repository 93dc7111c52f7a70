"""Link to a daemon on this machine: a stream of messages that is reopened when it breaks.

The link uses two threads. Its own thread reads the daemon's messages and reconnects; a thread of gRPC sends. A caller
that finds its record in the arena's directory waits for neither.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import grpc

from moetier.proto import expert_store_pb2 as pb
from moetier.proto.expert_store_pb2_grpc import ExpertStoreStub
from moetier.runtime.wire.address import Address, Credentials
from moetier.runtime.wire.channel import open_channel
from moetier.runtime.wire.control import ControlConnection
from moetier.runtime.wire.status_codes import error_from_message, error_of
from moetier.tiers.closeable import Closeable, closed_on_error
from moetier.tiers.errors import ClosedError, MoetierError, UnavailableError
from moetier.tiers.host.demands import Failed, Granted
from moetier.tiers.inbox import Inbox
from moetier.tiers.layout import ExpertKey, TierSlot
from moetier.tiers.threads import start_thread

from .mapped_arena import MappedArena

REPORT_KEPT = 65_536  # most uses that wait to be reported; the oldest are dropped while the daemon is away
REPORT_SECONDS = 0.5  # longest time until a hit is reported to the daemon
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0  # seconds between attempts to connect; each pause is twice the last
_ANSWER_TIMEOUT = 2.0  # seconds to wait for an answer that a working daemon gives at once
_STEADY = 1.0  # seconds after which a connection counts as established, even without a message
_log = logging.getLogger(__name__)


Outbox = SimpleQueue[pb.ClientMessage | None]  # messages to be sent on one stream; None is its end


@dataclass(eq=False, slots=True)
class SlotRequest:
    """Request to the daemon for experts of one block. The link's thread puts the answers into ``answers``."""

    block: int
    awaited: dict[int, None]  # experts not granted yet; only the link's thread removes them
    answers: Inbox[SlotAnswer | None]  # None: the daemon has gone away or come back, or the link was closed
    of_total: int = 0  # as in ``ExpertSource.acquire``
    is_over: bool = False  # the daemon holds no lease for this request, or was told to release all
    number: int = field(default_factory=itertools.count(1).__next__)

    def message(self) -> pb.ClientMessage:
        """Return the message that asks for the experts still awaited."""
        acquire = pb.Acquire(request=self.number, block=self.block, experts=list(self.awaited), of_total=self.of_total)
        return pb.ClientMessage(acquire=acquire)


class SlotAnswer(NamedTuple):
    """An answer of the daemon."""

    request: SlotRequest
    event: Granted | Failed
    arena: MappedArena  # has the slot that is granted


class Link(Closeable):
    """Connection to a daemon. When it breaks, the link reconnects and sends open requests again, until ``close``.

    The link's thread calls ``connected`` with each new control connection, and gets that connection's arena.
    """

    def __init__(
        self,
        folder: Path,
        digest: str,
        first: ControlConnection,
        connected: Callable[[ControlConnection], MappedArena],
    ) -> None:
        """Take over the open connection ``first`` to the daemon in ``folder``."""
        self._folder = folder
        self._digest = digest
        self._connected = connected
        self._requests: dict[int, SlotRequest] = {}
        # guards: ``_outbox`` and additions to ``_requests``, so that each request is sent once on each stream.
        # ``cancel`` and ``_handle`` remove requests without it, and ``_send`` reads ``_outbox``
        self._lock = threading.Lock()
        self._outbox: Outbox | None = None  # None while the daemon is away
        self._uses: deque[ExpertKey] = deque(maxlen=REPORT_KEPT)
        self._closed = threading.Event()
        self._tried = threading.Event()  # the first stream was opened, or failed to open
        self._call: Any = None
        self.away_since: float | None = None  # on the monotonic clock; None while the daemon is connected
        self._error: MoetierError | None = None
        self._messages = 0  # number of messages received
        self.connections = 0  # number of connections made, with the first
        self._thread = start_thread("moetier-link", self._run, first)
        with closed_on_error(self):  # the error is a Ctrl-C
            self._tried.wait()  # so that prefetch requests that follow at once are not lost

    @property
    def error(self) -> MoetierError:
        """The reason why the daemon is away."""
        return self._error or UnavailableError(f"No daemon runs in {self._folder}.", "Start one: moetier daemon DIR")

    # -- callers ------------------------------------------------------------------------------------------------------

    def submit(self, request: SlotRequest) -> None:
        """Send a request now, or once the daemon is back. Raises ClosedError after ``close``."""
        with self._lock:
            if self._closed.is_set():
                raise ClosedError("The connection to the daemon was closed.", "Load the model again.")
            self._requests[request.number] = request
            if self._outbox is not None:
                self._outbox.put(request.message())

    def cancel(self, request: SlotRequest) -> None:
        """Cancel a request: release its leases, and no longer wait for its other records.

        It never waits, because a finalizer may call it. If an exception has interrupted it, it can be called again.
        """
        self._requests.pop(request.number, None)
        if not request.is_over:
            self._send(pb.ClientMessage(release=pb.Release(request=request.number)))
            request.is_over = True

    def release(self, request: SlotRequest, expert: int) -> None:
        """Release one lease of a request."""
        self._send(pb.ClientMessage(release=pb.Release(request=request.number, experts=[expert])))

    def prefetch(self, block: int, experts: Sequence[int]) -> None:
        """Send a prefetch request. It is lost while the daemon is away."""
        self._send(pb.ClientMessage(prefetch=pb.Prefetch(requested=pb.Experts(block=block, experts=experts))))

    def report_uses(self, keys: Iterable[ExpertKey]) -> None:
        """Report uses of records that were found in the arena's directory, the least recently used first.

        The report is sent before the next request, and after half a second at the latest.
        """
        self._uses.extend(keys)

    def close(self) -> None:
        """End the connection and both threads, and wake all callers that wait for a request. Idempotent.

        Uses that wait are reported first. If the daemon does not take the report for two seconds, they are lost.
        """
        with self._lock:
            self._closed.set()
            outbox = self._outbox
        call = self._call
        if outbox is not None and self._uses:
            outbox.put(None)  # the stream ends after a last report, and so does the link's thread
            self._thread.join(_ANSWER_TIMEOUT)
        if call is not None:
            call.cancel()
        self._thread.join()
        for request in list(self._requests.values()):
            request.answers.put(None)

    def _send(self, message: pb.ClientMessage) -> None:
        if (outbox := self._outbox) is not None:
            outbox.put(message)

    # -- the link's thread --------------------------------------------------------------------------------------------

    def _run(self, control: ControlConnection | None) -> None:
        pause = FIRST_PAUSE
        while not self._closed.is_set():
            began, messages, connections = time.monotonic(), self._messages, self.connections
            try:
                if control is None:
                    control = ControlConnection.open(self._folder, self._digest, timeout=_ANSWER_TIMEOUT)
                    began = time.monotonic()  # leave out the time that connecting took
                with control:
                    self._error = self._run_connection(control)
            except MoetierError as error:
                self._error = error.fresh()  # without the traceback, whose frames refer to the arena
            except (OSError, RuntimeError) as error:  # out of descriptors, memory or threads
                self._error = UnavailableError(
                    f"The daemon can't be reached: {error}.",
                    "Free memory, or raise the limits of open files and threads (ulimit -n, ulimit -u).",
                )
            except Exception as error:  # callers must not wait for a thread that has ended
                _log.exception("The connection to a daemon has failed.")
                self._error = UnavailableError(
                    f"The connection to the daemon has failed ({type(error).__name__}).",
                    "See the log, and report this bug.",
                )
            control = None
            self._tried.set()
            lasted = time.monotonic() - began
            if self._messages > messages or (self.connections > connections and lasted > _STEADY):
                pause = FIRST_PAUSE
                self.away_since = time.monotonic()
            elif self.away_since is None:
                self.away_since = began
            for request in list(self._requests.values()):
                request.answers.put(None)
            # random, so that the clients of a restarted daemon do not all reconnect at the same time
            self._closed.wait(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _run_connection(self, control: ControlConnection) -> MoetierError | None:
        """Serve a control connection until it ends. Return why it ended; None if the daemon ended it."""
        arena = self._connected(control)
        self.connections += 1
        with open_channel(Address(folder=self._folder), Credentials(), bearer=control.session_id) as channel:
            stub = ExpertStoreStub(channel)
            while True:
                messages = self._messages
                error = self._run_stream(stub, arena)
                # a stream may break by accident; if the next one ends without a message, the daemon ended it on purpose
                if error is None or self._closed.is_set() or self._messages == messages or not control.is_alive():
                    return error
                # check that the daemon answers: one that was stopped (SIGSTOP) keeps its sockets open
                if stub.Describe.future(pb.DescribeRequest(), timeout=_ANSWER_TIMEOUT).code() is not grpc.StatusCode.OK:
                    return error
                self._closed.wait(FIRST_PAUSE)  # a pause, as streams may break again and again

    def _run_stream(self, stub: ExpertStoreStub, arena: MappedArena) -> MoetierError | None:
        """Serve a stream of messages until it ends. Return why it ended; None if the daemon ended it."""
        outbox: Outbox = SimpleQueue()
        sent = threading.Event()
        call = stub.Session(self._outgoing(outbox, sent))
        self._call = call
        try:
            self._attach(outbox)
            if self._closed.is_set():  # close() may have come before there was a call
                call.cancel()
            for message in call:
                self._handle(message, arena)
        except grpc.RpcError as error:
            error.__traceback__ = None  # error and call are one object: a cycle with this frame would keep the arena
            return error_of(error)
        finally:
            with self._lock:
                self._outbox = None
            self._call = None
            call.cancel()
            outbox.put(None)
            sent.wait(_ANSWER_TIMEOUT)
        return None

    def _attach(self, outbox: Outbox) -> None:
        """Send all open requests on a new stream."""
        with self._lock:
            requests = list(self._requests.values())
            for request in requests:
                if request.awaited:
                    outbox.put(request.message())
            self._outbox = outbox
            self.away_since = None
        self._tried.set()
        for request in requests:  # cancel() may have been called while there was no outbox
            if request.number not in self._requests:
                self._send(pb.ClientMessage(release=pb.Release(request=request.number)))
            request.answers.put(None)

    def _handle(self, message: pb.ServerMessage, arena: MappedArena) -> None:
        self._messages += 1
        if message.HasField("granted"):
            granted = message.granted
            request = self._requests.get(granted.request)
            if request is not None and granted.expert in request.awaited:
                del request.awaited[granted.expert]
                key = ExpertKey(request.block, granted.expert)
                event = Granted(request.number, key, TierSlot(granted.slot), granted.generation)
                request.answers.put(SlotAnswer(request, event, arena))
        elif message.HasField("failed") and (request := self._requests.pop(message.failed.request, None)) is not None:
            request.is_over = True
            error = error_from_message(message.failed.error)
            request.answers.put(SlotAnswer(request, Failed(request.number, error), arena))

    # -- gRPC's thread ------------------------------------------------------------------------------------------------

    def _outgoing(self, outbox: Outbox, sent: threading.Event) -> Iterator[pb.ClientMessage]:
        """Yield the messages to send on one stream, and reports of uses between them; at the end, set ``sent``."""
        try:
            while True:
                message: pb.ClientMessage | None = pb.ClientMessage()
                with contextlib.suppress(Empty):
                    message = outbox.get(timeout=REPORT_SECONDS)
                if message is None and not self._closed.is_set():
                    return  # the stream is broken: uses are reported on the next one
                # reported first, because the request might otherwise evict the records that were used last
                if self._uses and (message is None or not message.HasField("release")):
                    yield self._report()
                if message is None:
                    return
                if message.WhichOneof("message"):
                    yield message
        finally:
            sent.set()

    def _report(self) -> pb.ClientMessage:
        blocks: list[pb.Experts] = []
        for _ in range(len(self._uses)):
            block, expert = self._uses.popleft()
            if not blocks or blocks[-1].block != block:
                blocks.append(pb.Experts(block=block))
            blocks[-1].experts.append(expert)
        return pb.ClientMessage(uses=pb.Uses(blocks=blocks))
