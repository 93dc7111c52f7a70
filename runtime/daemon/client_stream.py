"""One client of the daemon, and its stream of requests and answers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue

from google.protobuf.message import DecodeError

from moetier.proto import expert_store_pb2 as pb
from moetier.runtime.wire.status_codes import message_of
from moetier.tiers.errors import MoetierError, ProtocolError, UnavailableError
from moetier.tiers.host.demands import Event, Failed, Granted
from moetier.tiers.layout import ExpertKey

from .model import HostedModel

MAX_REQUESTS = 256  # most open requests of one client
MAX_UNREAD = 65_536  # most answers that a client has not taken yet


@dataclass(slots=True, eq=False)
class Client:
    """A client that its control connection has registered. ``model`` is None if it wants only a session id."""

    pid: int
    model: HostedModel | None
    number: int = 0
    call: SessionCall | None = None
    hits: int = 0  # number of hits that it has reported, over all its streams
    misses: int = 0  # number of experts that it has requested
    began: float = field(default_factory=time.monotonic)

    def describe(self) -> pb.Client:
        """Return the message that describes the client in ``Stats``."""
        call = self.call  # read only once, as the thread of the stream sets it to None
        return pb.Client(
            number=self.number,
            pid=self.pid,
            connected_s=time.monotonic() - self.began,
            leases=0 if call is None else call.leases,
            hits=self.hits,
            misses=self.misses,
        )


class SessionCall:
    """A client's stream, which is one Session call. One thread reads the client's messages, another sends the answers.

    ``settled`` is called whenever a request has ended, in any thread. Once ``refusal`` is set, new requests fail with
    that error. Earlier requests are still answered.
    """

    def __init__(
        self, client: Client, model: HostedModel, *, leases: int, patience: float, settled: Callable[[], None]
    ) -> None:
        self.refusal: UnavailableError | None = None
        self._client = client
        self._model = model
        self._settled = settled
        self._events: SimpleQueue[Event | None] = SimpleQueue()  # None ends the answers
        self._state = threading.Lock()  # guards the two fields below
        self._error: Exception | None = None
        self._ended = False
        self._session = model.host.session(self._events.put, leases=leases, patience=patience)

    @property
    def is_settled(self) -> bool:
        """Whether no request is open: nothing is awaited, and no lease is held."""
        return not self._session.demands

    @property
    def leases(self) -> int:
        """Number of slots that are leased or still being loaded for the client."""
        return self._session.outstanding

    def answers(self) -> Iterator[pb.ServerMessage]:
        """Yield the answers until the call ends. Raises the error that ended it, if any."""
        while (event := self._events.get()) is not None:
            if isinstance(event, Granted):
                message = pb.ServerMessage(
                    granted=pb.Granted(
                        request=event.request, expert=event.key.expert, slot=event.slot, generation=event.generation
                    )
                )
            else:
                self._settled()
                self._model.log_failure(event.error)
                message = pb.ServerMessage(failed=pb.Failed(request=event.request, error=message_of(event.error)))
            self._model.count(session_bytes_out=message.ByteSize())
            yield message
        if self._error is not None:
            raise self._error

    def read(self, messages: Iterable[bytes]) -> None:
        """Handle the client's messages (serialised ClientMessage) until the stream ends.

        Runs in a thread of its own.
        """
        with contextlib.suppress(Exception):  # gRPC raises once the client or the connection is gone
            for message in messages:
                self._model.count(session_bytes_in=len(message))
                try:
                    self._handle(pb.ClientMessage.FromString(message))
                except DecodeError:
                    self.end(
                        ProtocolError(
                            "A message of the session can't be parsed.",
                            "Use the same version of moetier on both sides.",
                        )
                    )
                except Exception as error:  # the client's error, or a bug of the daemon
                    self.end(error)
                if self._ended:
                    return
        self.end()

    def end(self, error: Exception | None = None) -> None:
        """End the call: release all leases, and send the answers queued so far. Idempotent; the first error counts."""
        with self._state:
            if self._ended:
                return
            self._ended = True
            self._error = error
        self._session.close()
        self._events.put(None)
        self._settled()

    def _handle(self, message: pb.ClientMessage) -> None:
        match message.WhichOneof("message"):
            case "acquire":
                self._acquire(message.acquire)
            case "release":
                self._release(message.release)
            case "used":
                keys = [key for entry in message.used.blocks for key in self._keys(entry)]
                self._session.used(keys)
                self._model.count(used=len(keys))
                self._client.hits += len(keys)
            case "prefetch":
                wanted = message.prefetch.wishes
                self._session.prefetch(wanted.block, self._keys(wanted))
            case _:  # a message of a later version
                pass

    def _acquire(self, message: pb.Acquire) -> None:
        request = message.request
        keys = [ExpertKey(message.block, expert) for expert in message.experts]
        if not keys or len(set(keys)) != len(keys):
            raise ProtocolError(
                f"Request {request} names no expert, or an expert twice.",
                "Use the same version of moetier on both sides.",
            )
        if self._events.qsize() > MAX_UNREAD:
            raise ProtocolError("The client does not read the answers.", "Read the answers from the stream.")
        if len(self._session.demands) >= MAX_REQUESTS:
            raise ProtocolError(
                f"The client has {MAX_REQUESTS} open requests, the most that it may have.",
                "Release requests that are not needed any more.",
            )
        self._model.count(requests=1)
        self._client.misses += len(keys)
        try:
            if self.refusal is not None:
                raise self.refusal
            self._session.acquire(request, keys, message.deadline_ms / 1e3 if message.deadline_ms else None)
        except ProtocolError:  # the request's number is in use
            raise
        except MoetierError as error:
            self._events.put(Failed(request, error))

    def _release(self, message: pb.Release) -> None:
        demand = self._session.demands.get(message.request)
        if demand is None:  # the request has failed since the client sent this
            return
        keys = [ExpertKey(demand.block, expert) for expert in dict.fromkeys(message.experts)]
        self._session.release(message.request, keys)
        if message.request not in self._session.demands:
            self._settled()

    def _keys(self, named: pb.Experts) -> list[ExpertKey]:
        keys = [ExpertKey(named.block, expert) for expert in named.experts]
        self._model.manifest.check_keys(named.block, keys)
        return keys
