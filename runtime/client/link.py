"""The way to a daemon of this host: its control socket, the stream beside it, and both again when it was away.

Two threads: one reads what the daemon says and, when the connection has ended, makes the next; the other, which is
gRPC's, sends. Neither is waited for where a record is found in the directory.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic

import grpc

from moetier.proto import expert_store_pb2 as wire
from moetier.proto.expert_store_pb2_grpc import ExpertStoreStub
from moetier.runtime.wire.address import Address, Credentials
from moetier.runtime.wire.channel import open_channel
from moetier.runtime.wire.control import ControlConnection
from moetier.runtime.wire.status_codes import error_from_message, error_of
from moetier.tiers.errors import ClosedError, MoetierError, UnavailableError
from moetier.tiers.layout import ExpertKey

from .outbox import Outbox
from .requests import Changed, Failed, Granted, Place, Request
from .traffic import Meter, Traffic

REPORT_KEPT = 65_536  # hits, the latest; more are forgotten while there is nobody to tell
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0  # seconds between attempts to connect; each is twice the one before
_ANSWER = 2.0  # seconds for what a daemon that works says at once
_STEADY = 1.0  # seconds after which a connection that has brought nothing counts as one


class Link(Generic[Place]):
    """Keeps a connection until it is closed. Requests that are in flight when one ends are repeated on the next.

    ``arrive`` is called with each new control connection, by the link's thread, and says what its slots are of.
    """

    def __init__(
        self, folder: Path, digest: str, first: ControlConnection, arrive: Callable[[ControlConnection], Place]
    ) -> None:
        """``first`` is an open connection, which is the link's from now on."""
        self._folder = folder
        self._digest = digest
        self._arrive = arrive
        self._requests: dict[int, Request] = {}
        self._lock = threading.Lock()  # held where a request is sent, for the first time or again
        self._outbox: Outbox | None = None  # None: away
        self._used: deque[ExpertKey] = deque(maxlen=REPORT_KEPT)
        self._closed = threading.Event()
        self._tried = threading.Event()  # to connect
        self._call: Any = None
        self._away_since: float | None = None
        self._error: MoetierError | None = None
        self._meter = Meter()
        self._thread = threading.Thread(target=self._run, args=(first,), name="moetier-link", daemon=True)
        self._thread.start()
        self._tried.wait()  # a wish that comes now is not forgotten

    @property
    def away_since(self) -> float | None:
        """When the daemon went (by time.monotonic); None while it is here."""
        return self._away_since

    @property
    def error(self) -> MoetierError:
        """Why it is away."""
        return self._error or UnavailableError(f"No daemon runs in {self._folder}.", "Start one: moetier daemon DIR")

    @property
    def traffic(self) -> Traffic:
        return self._meter.traffic

    # -- callers ------------------------------------------------------------------------------------------------------

    def ask(self, request: Request) -> None:
        """Sends a request, now or when the daemon is back. Raises ClosedError."""
        with self._lock:
            if self._closed.is_set():
                raise ClosedError("The way to the daemon was closed.", "Load the model again.")
            self._requests[request.number] = request
            if self._outbox is not None:
                self._outbox.put(request.message())

    def withdraw(self, request: Request) -> None:
        """Ends a request: what it holds and waits for is given back. Never waits: a finalizer may call it. What an
        exception has cut can be repeated."""
        self._requests.pop(request.number, None)
        if not request.is_over:
            self._say(wire.ClientMessage(release=wire.Release(request=request.number)))
            request.is_over = True

    def release(self, request: Request, expert: int) -> None:
        """Ends one lease."""
        self._say(wire.ClientMessage(release=wire.Release(request=request.number, experts=[expert])))

    def prefetch(self, block: int, experts: Sequence[int]) -> None:
        """Tells wishes; while the daemon is away they are forgotten."""
        self._say(wire.ClientMessage(prefetch=wire.Prefetch(wishes=wire.Experts(block=block, experts=experts))))

    def report(self, keys: Iterable[ExpertKey]) -> None:
        """Keys that were found in the directory, least recently used first. They are told before the next request, or
        half a second later."""
        self._used.extend(keys)

    def close(self) -> None:
        """Ends the connection and both threads; whoever waits for an event gets a Changed. Idempotent."""
        with self._lock:
            self._closed.set()
        call = self._call
        if call is not None:
            call.cancel()
        self._thread.join()
        for request in list(self._requests.values()):
            request.deliver(Changed())

    def _say(self, message: wire.ClientMessage) -> None:
        outbox = self._outbox
        if outbox is not None:
            outbox.put(message)

    # -- the link's thread --------------------------------------------------------------------------------------------

    def _run(self, side: ControlConnection | None) -> None:
        pause = FIRST_PAUSE
        while not self._closed.is_set():
            began, heard, connections = time.monotonic(), self._meter.messages_in, self._meter.connections
            try:
                if side is None:
                    side = ControlConnection.open(self._folder, self._digest, patience=_ANSWER)
                    began = time.monotonic()  # who does not answer is no connection, however long that takes
                with side:
                    self._error = self._attend(side)
            except MoetierError as error:
                self._error = type(error)(error.cause, error.fix)  # without the frames, which refer to the arena
            except (OSError, RuntimeError) as error:  # no descriptor to be had, no memory, no thread
                self._error = UnavailableError(f"The daemon can't be reached: {error}.", "Free what is short.")
            side = None
            self._tried.set()
            lasted = time.monotonic() - began
            if self._meter.messages_in > heard or (self._meter.connections > connections and lasted > _STEADY):
                pause = FIRST_PAUSE
                self._away_since = time.monotonic()
            elif self._away_since is None:
                self._away_since = began
            for request in list(self._requests.values()):
                request.deliver(Changed())
            # not all at once: every client of a daemon that was restarted comes now
            self._closed.wait(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _attend(self, side: ControlConnection) -> MoetierError | None:
        """A connection's life, and why it ended; None when its daemon ended it. Raises what ``arrive`` does."""
        place = self._arrive(side)
        self._meter.connections += 1
        with open_channel(Address(folder=self._folder), Credentials(), bearer=side.session_id) as channel:
            stub = ExpertStoreStub(channel)
            while True:
                heard = self._meter.messages_in
                error = self._talk(stub, place)
                # one stream may break; who gives the same answer twice means it
                if error is None or self._closed.is_set() or self._meter.messages_in == heard or not side.is_alive():
                    return error
                # one that is stopped keeps its sockets
                if stub.Describe.future(wire.DescribeRequest(), timeout=_ANSWER).code() is not grpc.StatusCode.OK:
                    return error
                self._closed.wait(FIRST_PAUSE)  # one that breaks again and again is not repeated in a hurry

    def _talk(self, stub: ExpertStoreStub, place: Place) -> MoetierError | None:
        """A stream's life, and why it ended; None when its daemon ended it."""
        outbox = Outbox(self._used, self._meter)
        call = stub.Session(outbox.messages())
        self._call = call
        try:
            self._connect(outbox)
            if self._closed.is_set():  # close() may have come before there was a call
                call.cancel()
            for message in call:
                self._hear(message, place)
        except grpc.RpcError as error:
            error.__traceback__ = None  # it is the call itself: a circle through this frame would keep the arena
            return error_of(error)
        finally:
            with self._lock:
                self._outbox = None
            self._call = None
            call.cancel()
            outbox.end(_ANSWER)
        return None

    def _connect(self, outbox: Outbox) -> None:
        with self._lock:
            requests = list(self._requests.values())
            for request in requests:
                if request.awaited:
                    outbox.put(request.message())
            self._outbox = outbox
            self._away_since = None
        self._tried.set()
        for request in requests:  # who withdrew one meanwhile may have seen no outbox
            if request.number not in self._requests:
                self._say(wire.ClientMessage(release=wire.Release(request=request.number)))
            request.deliver(Changed())

    def _hear(self, message: wire.ServerMessage, place: Place) -> None:
        self._meter.heard(message)
        if message.HasField("granted"):
            granted = message.granted
            request = self._requests.get(granted.request)
            if request is not None and granted.expert in request.awaited:
                del request.awaited[granted.expert]
                request.deliver(Granted(request, granted.expert, granted.slot, granted.generation, place))
        elif message.HasField("failed"):
            request = self._requests.pop(message.failed.request, None)
            if request is not None:
                request.is_over = True
                request.deliver(Failed(request, error_from_message(message.failed.error)))
