"""Clients of the daemon. A control connection registers a client, which then has at most one stream of requests."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Iterator, Mapping

from moetier.proto import expert_store_pb2 as pb
from moetier.runtime.wire.address import DIGEST_CHARS
from moetier.tiers.errors import RefusedError, StoreError, UnavailableError, UnknownModelError

from .client_stream import Client, SessionCall
from .control_server import Welcome
from .log import log_event
from .model import HostedModel

_log = logging.getLogger(__name__)


class Clients:
    """Registry of clients by session id, which the control socket issues. Thread-safe."""

    def __init__(self, models: Mapping[str, HostedModel], *, leases: int, patience: float) -> None:
        """Serve ``models``, a dictionary from digests to models.

        A client may hold ``leases`` slots at a time. A request waits at most ``patience`` seconds for a slot.
        """
        self.models = models
        self.started = time.time()
        self.began = time.monotonic()
        self._leases = leases
        self._patience = patience
        self._changed = threading.Condition()  # guards the four fields below
        self._clients: dict[str, Client] = {}
        self._numbers = itertools.count(1)
        self._fetching = 0
        self._stopping = False

    # -- for the control socket ---------------------------------------------------------------------------------------

    def admit(self, session: str, digest: str | None, pid: int) -> Welcome:
        """Register the client in process ``pid`` under the id ``session``, and return the answer to it.

        ``digest`` names the store that the client will use; with None, the client gets only the session id. With a
        digest, raises UnknownModelError if the daemon does not serve the store, UnavailableError once the daemon is
        ending, and OSError if the process has no descriptor left.
        """
        with self._changed:
            if digest is None:
                self._clients[session] = Client(pid, None)
                return Welcome("", {})
            model = self._model(digest)
            welcome = Welcome(model.name, model.slots, model.host.export())
            self._clients[session] = Client(pid, model, next(self._numbers))
        log_event(_log, "client", pid=pid, model=model.name)
        return welcome

    def remove(self, session: str) -> None:
        """Remove a client whose control connection has ended, and end its stream."""
        with self._changed:
            client = self._clients.pop(session)
            call = client.call  # read only once, as the thread of the stream sets it to None
        if call is not None:
            call.end(_no_client())
        if client.model is not None:
            log_event(_log, "client-gone", pid=client.pid, model=client.model.name)

    # -- for the gRPC service -----------------------------------------------------------------------------------------

    def knows(self, session: str | None) -> bool:
        """Return whether ``session`` is the id of a registered client."""
        return session in self._clients

    @property
    def is_serving(self) -> bool:
        """Whether the daemon serves: it is not ending, and at least one model is not condemned (``HostedModel``)."""
        return not self._stopping and any(model.host.fault is None for model in self.models.values())

    @contextlib.contextmanager
    def stream(self, session: str) -> Iterator[SessionCall]:
        """Begin a stream of a client, and end the client's former one. The new stream ends with the ``with`` block.

        Raises RefusedError if no client has the id ``session``, UnknownModelError if the client has named no store, and
        UnavailableError once the daemon is ending.
        """
        with self._changed:
            client = self._clients.get(session)
            if client is None:
                raise _no_client()
            if client.model is None:
                raise UnknownModelError(
                    "This session id is not for a model.", "Send the digest of a store on the control socket."
                )
            if self._stopping:
                raise _stopping()
            former = client.call
            client.call = call = SessionCall(
                client, client.model, leases=self._leases, patience=self._patience, settled=self._settled
            )
        if former is not None:
            former.end(UnavailableError("The client has opened another stream.", "Use the new stream."))
        try:
            yield call
        finally:
            call.end()
            with self._changed:
                if client.call is call:
                    client.call = None

    @contextlib.contextmanager
    def fetching(self, digest: str) -> Iterator[HostedModel]:
        """Count a call of another host for the duration of the ``with`` block, and yield the model with ``digest``.

        Raises UnknownModelError if the daemon does not serve it, and UnavailableError once the daemon is ending.
        """
        with self._changed:
            model = self._model(digest)
            self._fetching += 1
        try:
            yield model
        except StoreError as error:
            model.log_failure(error)
            raise
        finally:
            with self._changed:
                self._fetching -= 1
                self._changed.notify_all()

    def stats(self) -> list[pb.ModelStats]:
        """Return the counters of all models."""
        found = []
        for model, clients in self._by_model():
            calls = [call for client in clients if (call := client.call) is not None]
            leases = sum(call.leases for call in calls)
            found.append(model.stats(clients=len(clients), sessions=len(calls), leases=leases))
        return found

    def details(self) -> list[pb.Details]:
        """Return the clients and blocks of all models, in the order of ``stats``."""
        return [
            pb.Details(clients=[client.describe() for client in clients], blocks=model.blocks())
            for model, clients in self._by_model()
        ]

    # -- the end ------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Refuse new clients and new requests. Earlier requests are still answered."""
        with self._changed:
            self._stopping = True
            for call in self._calls():
                call.refusal = _stopping()

    def wait(self, seconds: float) -> bool:
        """Wait until no request is open, for at most ``seconds``. Return whether none is open."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._fetching and all(call.is_settled for call in self._calls()),
                max(seconds, 0.0),
            )

    def end(self) -> None:
        """End every stream."""
        with self._changed:
            calls = self._calls()
        for call in calls:
            call.end(_stopping())

    def _model(self, digest: str) -> HostedModel:
        if self._stopping:
            raise _stopping()
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

    def _settled(self) -> None:
        with self._changed:
            self._changed.notify_all()


def _stopping() -> UnavailableError:
    return UnavailableError("The daemon is ending.", 'Use another daemon, or set `daemon` to "none".')


def _no_client() -> RefusedError:
    return RefusedError("The control connection of this session id has ended.", "Connect to the control socket again.")
