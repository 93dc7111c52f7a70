"""SessionCall: handles the messages of one client's stream, and sends it what the host tier answers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue

from google.protobuf.message import DecodeError

from moetier.proto import expert_store_pb2 as pb
from moetier.runtime.wire.status_codes import message_of
from moetier.tiers.errors import MoetierError, ProtocolError, UnavailableError
from moetier.tiers.host.demands import Failed, Granted
from moetier.tiers.layout import ExpertKey

from .model import HostedModel

MAX_REQUESTS = 256  # of one client at a time
MAX_UNREAD = 65_536  # answers that a client has not taken


@dataclass(slots=True)
class ClientCounts:
    """Demands of one client, over all its streams."""

    hits: int = 0  # reported by the client
    misses: int = 0  # experts requested


class SessionCall:
    """One Session call, between a thread that reads the client's messages and one that answers.

    ``settled`` is called by any thread whenever a request is over.
    """

    def __init__(
        self, model: HostedModel, counts: ClientCounts, *, leases: int, patience: float, settled: Callable[[], None]
    ) -> None:
        self._model = model
        self._counts = counts
        self._settled = settled
        self._events: SimpleQueue[Granted | Failed | None] = SimpleQueue()  # None at the end
        self._state = threading.Lock()  # guards the two below
        self._error: Exception | None = None
        self._ended = False
        self._refusal: UnavailableError | None = None
        self._session = model.host.session(self._events.put, leases=leases, patience=patience)

    @property
    def is_settled(self) -> bool:
        """Whether nothing is awaited and nothing held."""
        return not self._session.demands

    @property
    def leases(self) -> int:
        """Number of slots that are held, or on their way."""
        return self._session.outstanding

    def refuse(self, error: UnavailableError) -> None:
        """Refuse new requests with an error. Earlier ones are still answered."""
        self._refusal = error

    def answers(self) -> Iterator[pb.ServerMessage]:
        """Yield the answers until the call ends. Raises the error that ended it."""
        while (event := self._events.get()) is not None:
            message = self._message(event)
            self._model.count(bytes_out=message.ByteSize())
            yield message
        if self._error is not None:
            raise self._error

    def read(self, messages: Iterable[bytes]) -> None:
        """Handle serialised ClientMessages until the stream ends. Runs in a thread of its own."""
        error: Exception | None = None
        with contextlib.suppress(Exception):  # of gRPC: the client or the connection is gone
            for message in messages:
                error = self._try_message(message)
                if error is not None or self._ended:
                    break
        self.end(error)

    def _try_message(self, message: bytes) -> Exception | None:
        """Handle a message. Return the error that ends the stream: the client's, or a fault of ours."""
        try:
            self._model.count(bytes_in=len(message))
            self._handle(pb.ClientMessage.FromString(message))
        except DecodeError:
            return ProtocolError("A message of the session can't be parsed.", "Use moetier in one version.")
        except Exception as error:
            return error
        return None

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

    # -- messages of the client ---------------------------------------------------------------------------------------

    def _handle(self, message: pb.ClientMessage) -> None:
        match message.WhichOneof("message"):
            case "acquire":
                self._acquire(message.acquire)
            case "release":
                self._release(message.release)
            case "used":
                keys = [key for entry in message.used.blocks for key in self._keys(entry.block, entry.experts)]
                self._session.used(keys)
                self._model.count(used=len(keys))
                self._counts.hits += len(keys)
            case "prefetch":
                wanted = message.prefetch.wishes
                self._session.prefetch(wanted.block, self._keys(wanted.block, wanted.experts))
            case _:  # of a later version
                pass

    def _acquire(self, message: pb.Acquire) -> None:
        request = message.request
        keys = [ExpertKey(message.block, expert) for expert in message.experts]
        if not keys or len(set(keys)) != len(keys):
            raise ProtocolError(f"Request {request} names no expert, or one twice.", "Use moetier in one version.")
        if self._events.qsize() > MAX_UNREAD:
            raise ProtocolError("The client does not read the answers.", "Read the stream.")
        if len(self._session.demands) >= MAX_REQUESTS:
            raise ProtocolError(f"{MAX_REQUESTS} requests are not over yet.", "Release those that are not needed.")
        self._model.count(requests=1)
        self._counts.misses += len(keys)
        try:
            if self._refusal is not None:
                raise self._refusal
            self._session.acquire(request, keys, message.deadline_ms / 1e3 if message.deadline_ms else None)
        except ProtocolError:  # the number is in use
            raise
        except MoetierError as error:
            self._events.put(Failed(request, error))

    def _release(self, message: pb.Release) -> None:
        demand = self._session.demands.get(message.request)
        if demand is None:  # the request has failed meanwhile
            return
        self._session.release(message.request, [ExpertKey(demand.block, expert) for expert in message.experts])
        if message.request not in self._session.demands:
            self._settled()

    def _keys(self, block: int, experts: Iterable[int]) -> list[ExpertKey]:
        keys = [ExpertKey(block, expert) for expert in experts]
        self._model.manifest.check_keys(block, keys)
        return keys

    # -- answers ------------------------------------------------------------------------------------------------------

    def _message(self, event: Granted | Failed) -> pb.ServerMessage:
        if isinstance(event, Granted):
            granted = pb.Granted(
                request=event.request, expert=event.key.expert, slot=event.slot, generation=event.generation
            )
            return pb.ServerMessage(granted=granted)
        self._settled()
        return pb.ServerMessage(failed=pb.Failed(request=event.request, error=message_of(event.error)))
