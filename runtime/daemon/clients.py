"""Clients of the daemon, and their streams of requests and answers.

A control connection registers a client, which then has at most one stream at a time.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue

from google.protobuf.message import DecodeError

from moetier.proto import expert_store_pb2 as pb
from moetier.runtime.wire.address import DIGEST_CHARS
from moetier.runtime.wire.status_codes import message_of
from moetier.tiers.errors import (
    SAME_VERSION,
    MoetierError,
    ProtocolError,
    RefusedError,
    StoreError,
    UnavailableError,
    UnknownModelError,
)
from moetier.tiers.host.demands import Failed, Granted, SessionEvent
from moetier.tiers.layout import ExpertKey

from .client_counts import StreamCounts
from .control_server import Welcome
from .hosted_model import HostedModel
from .log import log_event

MAX_REQUESTS = 256  # most open requests of one client
MAX_UNREAD = 65_536  # most answers that a client has not taken yet

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Client:
    """A client that its control connection has registered. ``model`` is None if it wants only a session id."""

    pid: int
    model: HostedModel | None
    number: int = 0
    call: SessionCall | None = None
    began: float = field(default_factory=time.monotonic)

    def describe(self) -> pb.Client:
        """Return the message that describes the client in ``Stats``."""
        call = self.call  # read only once, as the thread of the stream sets it to None
        counts = StreamCounts() if self.model is None else self.model.counts.of(self.number)
        return pb.Client(
            number=self.number,
            pid=self.pid,
            connected_s=time.monotonic() - self.began,
            leases=0 if call is None else call.outstanding,
            reported_hits=counts.reported_hits,
            requested=counts.requested,
        )


class SessionCall:
    """A client's stream, which is one Session call. One thread reads the client's messages, another sends the answers.

    ``on_ended`` is called whenever a request has ended, in any thread.
    """

    def __init__(
        self, client: Client, model: HostedModel, *, max_leases: int, timeout: float, on_ended: Callable[[], None]
    ) -> None:
        self._refusal: UnavailableError | None = None  # set by ``refuse``: the error with which new requests fail
        self._client = client
        self._model = model
        self._on_ended = on_ended
        self._events: SimpleQueue[SessionEvent | None] = SimpleQueue()  # None ends the answers
        self._state = threading.Lock()  # guards: ``_error``, ``_is_over``
        self._error: Exception | None = None
        self._is_over = False
        self._session = model.host.session(self._events.put, max_leases=max_leases, timeout=timeout)

    @property
    def is_idle(self) -> bool:
        """Whether no request is open: nothing is awaited, and no lease is held."""
        return not self._session.open_requests

    @property
    def outstanding(self) -> int:
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
                self._on_ended()
                self._model.log_failure(event.error)
                message = pb.ServerMessage(failed=pb.Failed(request=event.request, error=message_of(event.error)))
            self._count(bytes_out=message.ByteSize())
            yield message
        if self._error is not None:
            raise self._error

    def read(self, messages: Iterable[bytes]) -> None:
        """Handle the client's messages (serialised ClientMessage) until the stream ends.

        Runs in a thread of its own.
        """
        arriving = iter(messages)
        while not self._is_over:
            try:
                message = next(arriving)
            except Exception:  # the stream has ended, or gRPC says that the client or the connection is gone
                self.end()
                return
            try:
                self._count(bytes_in=len(message))
                self._handle(pb.ClientMessage.FromString(message))
            except DecodeError:
                self.end(ProtocolError("A message of the session can't be parsed.", SAME_VERSION))
            except Exception as error:  # the client's error, or a bug of the daemon
                self.end(error)

    def refuse(self, error: UnavailableError) -> None:
        """Let new requests fail with ``error``. Earlier requests are still answered."""
        self._refusal = error

    def end(self, error: Exception | None = None) -> None:
        """End the call: release all leases, and send the answers queued so far. Idempotent; the first error counts."""
        with self._state:
            if self._is_over:
                return
            self._is_over = True
            self._error = error
        try:
            self._session.close()
        finally:  # whatever it raises, ``answers`` must end
            self._events.put(None)
            self._on_ended()

    def _handle(self, message: pb.ClientMessage) -> None:
        match message.WhichOneof("message"):
            case "acquire":
                self._acquire(message.acquire)
            case "release":
                self._release(message.release)
            case "uses":
                keys = [key for entry in message.uses.blocks for key in self._keys(entry)]
                self._count(reported_hits=self._session.note_uses(keys))
            case "prefetch":
                requested = message.prefetch.requested
                self._session.prefetch(requested.block, self._keys(requested))
            case _:  # a message of a later version
                pass

    def _acquire(self, message: pb.Acquire) -> None:
        request = message.request
        keys = [ExpertKey(message.block, expert) for expert in message.experts]
        if not keys or len(set(keys)) != len(keys):
            raise ProtocolError(f"Request {request} names no expert, or an expert twice.", SAME_VERSION)
        if self._events.qsize() > MAX_UNREAD:
            cause = f"The client has not read its latest {MAX_UNREAD:,} answers."
            raise ProtocolError(cause, "Read answers while requests are sent, and not only after the last one.")
        if self._session.open_requests >= MAX_REQUESTS:
            raise ProtocolError(
                f"The client has {MAX_REQUESTS} open requests, the most that it may have.",
                "Release requests that are not needed any more.",
            )
        self._count(requests=1, requested=len(keys))
        try:
            if self._refusal is not None:
                raise self._refusal.fresh()
            timeout = message.timeout_ms / 1e3 if message.timeout_ms else None
            self._session.acquire(request, keys, timeout, of_total=message.of_total)
        except ProtocolError:  # the request's number is in use
            raise
        except MoetierError as error:
            self._events.put(Failed(request, error))

    def _count(self, **events: int) -> None:
        self._model.counts.count(self._client.number, **events)

    def _release(self, message: pb.Release) -> None:
        if (block := self._session.block_of(message.request)) is None:  # it has failed since the client sent this
            return
        if message.experts:
            self._session.release(
                message.request, [ExpertKey(block, expert) for expert in dict.fromkeys(message.experts)]
            )
        else:
            self._session.end(message.request)
        if self._session.block_of(message.request) is None:
            self._on_ended()

    def _keys(self, named: pb.Experts) -> list[ExpertKey]:
        keys = [ExpertKey(named.block, expert) for expert in named.experts]
        self._model.manifest.check_keys(named.block, keys)
        return keys


class Clients:
    """Registry of clients by session id, which the control socket issues. Thread-safe."""

    def __init__(self, models: Mapping[str, HostedModel], *, max_leases: int, timeout: float) -> None:
        """Serve ``models``, a dictionary from digests to models.

        A client may hold ``max_leases`` slots at a time. A request waits at most ``timeout`` seconds for a slot.
        """
        self.models = models
        self.started = time.time()
        self.started_monotonic = time.monotonic()
        self._max_leases = max_leases
        self._timeout = timeout
        # guards: ``_clients``, ``_remote_calls``, ``_is_ending``, and the call of a client
        self._changed = threading.Condition()
        self._clients: dict[str, Client] = {}
        self._numbers = itertools.count(1)
        self._remote_calls = 0
        self._is_ending = False

    # -- for the control socket ---------------------------------------------------------------------------------------

    def register(self, session_id: str, digest: str | None, pid: int) -> Welcome:
        """Register the client in process ``pid`` under the id ``session_id``, and return the answer to it.

        ``digest`` names the store that the client will use; with None, the client gets only the session id. With a
        digest, raises UnknownModelError if the daemon does not serve the store, UnavailableError once the daemon is
        ending, and OSError if the process has no descriptor left.
        """
        with self._changed:
            if digest is None:
                self._clients[session_id] = Client(pid, None)
                return Welcome("", {})
            model = self._model(digest)
            welcome = Welcome(model.name, model.slots, model.host.export())
            client = self._clients[session_id] = Client(pid, model, next(self._numbers))
            model.counts.register(client.number)
        log_event(_log, "client", pid=pid, model=model.name)
        return welcome

    def unregister(self, session_id: str) -> None:
        """Remove a client whose control connection has ended, and end its stream."""
        with self._changed:
            client = self._clients.pop(session_id)
            call = client.call  # read only once, as the thread of the stream sets it to None
        if call is not None:
            call.end(_no_client())
        if client.model is not None:
            client.model.counts.unregister(client.number)
            log_event(_log, "client-gone", pid=client.pid, model=client.model.name)

    # -- for the gRPC service -----------------------------------------------------------------------------------------

    def knows(self, session_id: str | None) -> bool:
        """Return whether ``session_id`` is the id of a registered client."""
        return session_id in self._clients

    @property
    def is_serving(self) -> bool:
        """Whether the daemon serves: it is not ending, and at least one model is not condemned (``HostedModel``)."""
        return not self._is_ending and any(model.host.fault is None for model in self.models.values())

    @contextlib.contextmanager
    def stream(self, session_id: str) -> Iterator[SessionCall]:
        """Begin a stream of a client, and end the client's former one. The new stream ends with the ``with`` block.

        Raises RefusedError if no client has the id ``session_id``, UnknownModelError if the client has named no store,
        and UnavailableError once the daemon is ending.
        """
        with self._changed:
            if (client := self._clients.get(session_id)) is None:
                raise _no_client()
            if client.model is None:
                raise UnknownModelError(
                    "The client has registered without a model.", "Send the digest of a store on the control socket."
                )
            if self._is_ending:
                raise _ending()
            former = client.call
            client.call = call = SessionCall(
                client, client.model, max_leases=self._max_leases, timeout=self._timeout, on_ended=self._request_ended
            )
        try:
            if former is not None:
                former.end(UnavailableError("The client has opened another stream.", "Use the new stream."))
            yield call
        finally:
            call.end()
            with self._changed:
                if client.call is call:
                    client.call = None

    @contextlib.contextmanager
    def remote_call(self, digest: str) -> Iterator[HostedModel]:
        """Count a call of another host for the duration of the ``with`` block, and yield the model with ``digest``.

        Raises UnknownModelError if the daemon does not serve it, and UnavailableError once the daemon is ending.
        """
        with self._changed:
            model = self._model(digest)
            self._remote_calls += 1
        try:
            yield model
        except StoreError as error:
            model.log_failure(error)
            raise
        finally:
            with self._changed:
                self._remote_calls -= 1
                self._changed.notify_all()

    def stats(self) -> list[pb.ModelStats]:
        """Return the counters of all models."""
        counters = []
        for model, clients in self._by_model():
            calls = [call for client in clients if (call := client.call) is not None]
            leases = sum(call.outstanding for call in calls)
            counters.append(model.stats(clients=len(clients), sessions=len(calls), leases=leases))
        return counters

    def details(self) -> list[pb.Details]:
        """Return the clients and blocks of all models, in the order of ``stats``."""
        return [
            pb.Details(clients=[client.describe() for client in clients], blocks=model.blocks())
            for model, clients in self._by_model()
        ]

    # -- the end ------------------------------------------------------------------------------------------------------

    def refuse_new(self) -> None:
        """Refuse new clients and new requests. Earlier requests are still answered."""
        with self._changed:
            self._is_ending = True
            for call in self._calls():
                call.refuse(_ending())

    def wait(self, seconds: float) -> bool:
        """Wait until no request is open, for at most ``seconds``. Return whether none is open."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._remote_calls and all(call.is_idle for call in self._calls()),
                max(seconds, 0.0),
            )

    def end(self) -> None:
        """End every stream."""
        with self._changed:
            calls = self._calls()
        for call in calls:
            call.end(_ending())

    def _model(self, digest: str) -> HostedModel:
        if self._is_ending:
            raise _ending()
        if (model := self.models.get(digest)) is not None:
            return model
        names = ", ".join(f"{model.name} ({model.digest[:DIGEST_CHARS]})" for model in self.models.values())
        raise UnknownModelError(
            f"This daemon does not serve the store {digest[:DIGEST_CHARS]!r}; it serves {names}.",
            "If the model was converted again, restart the daemon. Or name another daemon (moetier ps lists them).",
        )

    def _by_model(self) -> list[tuple[HostedModel, list[Client]]]:
        with self._changed:
            clients = list(self._clients.values())
        return [(model, [one for one in clients if one.model is model]) for model in self.models.values()]

    def _calls(self) -> list[SessionCall]:
        return [call for client in self._clients.values() if (call := client.call) is not None]

    def _request_ended(self) -> None:
        with self._changed:
            self._changed.notify_all()


def _ending() -> UnavailableError:
    return UnavailableError("The daemon is ending.", 'Use another daemon, or set `daemon` to "none".')


def _no_client() -> RefusedError:
    return RefusedError("The control connection of this session id has ended.", "Connect to the control socket again.")
