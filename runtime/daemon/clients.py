"""Clients of the daemon: registered by their control connections, and admitted until the daemon stops."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from moetier.proto import expert_store_pb2 as pb
from moetier.runtime.wire.address import DIGEST_CHARS
from moetier.tiers.errors import RefusedError, UnavailableError, UnknownModelError

from .control_server import Welcome
from .log import log_event
from .model import HostedModel
from .session_call import ClientCounts, SessionCall

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Client:
    """A control connection; ``model`` is None for one that only wants a credential."""

    pid: int
    model: HostedModel | None
    number: int = 0
    call: SessionCall | None = None
    counts: ClientCounts = field(default_factory=ClientCounts)
    began: float = field(default_factory=time.monotonic)

    def describe(self) -> pb.Client:
        """Return what the daemon tells of a client."""
        return pb.Client(
            number=self.number,
            pid=self.pid,
            connected_s=time.monotonic() - self.began,
            leases=0 if self.call is None else self.call.leases,
            hits=self.counts.hits,
            misses=self.counts.misses,
        )


class Clients:
    """Clients by the ids that the control socket issued. Thread-safe."""

    def __init__(self, models: Mapping[str, HostedModel], *, leases: int, patience: float) -> None:
        """``models`` are by digest. A client holds ``leases`` slots at most, and waits ``patience`` seconds for one."""
        self.models = models
        self._leases = leases
        self._patience = patience
        self._changed = threading.Condition()  # guards the four below
        self._clients: dict[str, _Client] = {}
        self._numbers = itertools.count(1)
        self._fetching = 0
        self._stopping = False

    # -- the control socket's -----------------------------------------------------------------------------------------

    def admit(self, session: str, digest: str | None, pid: int) -> Welcome:
        """Register a client of process ``pid``, and return what it gets. ``digest`` is None for a credential only.

        Raises UnknownModelError, and UnavailableError once the daemon is ending.
        """
        with self._changed:
            if digest is None:
                self._clients[session] = _Client(pid, None)
                return Welcome("", {})
            if self._stopping:
                raise _stopping()
            model = self.models.get(digest)
            if model is None:
                raise self._unknown(digest)
            welcome = Welcome(model.name, model.slots, model.host.export())
            self._clients[session] = _Client(pid, model, next(self._numbers))
        log_event(_log, "client", pid=pid, model=model.name)
        return welcome

    def remove(self, session: str) -> None:
        """Remove a client whose control connection has ended, and end its session."""
        with self._changed:
            client = self._clients.pop(session)
        if client.call is not None:
            client.call.end(_no_client())
        if client.model is not None:
            log_event(_log, "client-gone", pid=client.pid, model=client.model.name)

    # -- the service's ------------------------------------------------------------------------------------------------

    def knows(self, session: str | None) -> bool:
        """Return whether ``session`` is the id of a client."""
        return session in self._clients

    def attach(self, session: str) -> SessionCall:
        """Begin the client's new stream, and end its former one.

        Raises RefusedError, UnknownModelError, UnavailableError.
        """
        with self._changed:
            client = self._clients.get(session)
            if client is None:
                raise _no_client()
            if client.model is None:
                raise UnknownModelError("The credential is for no model.", "Name its digest on the control socket.")
            if self._stopping:
                raise _stopping()
            former = client.call
            client.call = call = SessionCall(
                client.model, client.counts, leases=self._leases, patience=self._patience, settled=self._settled
            )
        if former is not None:
            former.end(UnavailableError("The client has opened another stream.", "Use that."))
        return call

    def detach(self, session: str, call: SessionCall) -> None:
        """End a stream."""
        call.end()
        with self._changed:
            client = self._clients.get(session)
            if client is not None and client.call is call:
                client.call = None

    @contextlib.contextmanager
    def fetching(self, digest: str) -> Iterator[HostedModel]:
        """Count a fetch of another host while it is under way, and yield its model.

        Raises UnknownModelError, UnavailableError.
        """
        with self._changed:
            if self._stopping:
                raise _stopping()
            model = self.models.get(digest)
            if model is None:
                raise self._unknown(digest)
            self._fetching += 1
        try:
            yield model
        finally:
            with self._changed:
                self._fetching -= 1
                self._changed.notify_all()

    def stats(self) -> list[pb.ModelStats]:
        """Return the counters of all models."""
        with self._changed:
            clients = list(self._clients.values())
        found = []
        for model in self.models.values():
            of_model = [client for client in clients if client.model is model]
            calls = [client.call for client in of_model if client.call is not None]
            leases = sum(call.leases for call in calls)
            found.append(model.stats(clients=len(of_model), sessions=len(calls), leases=leases))
        return found

    def details(self) -> list[pb.Details]:
        """Return the clients and blocks of all models, in the order of ``stats``."""
        with self._changed:
            clients = list(self._clients.values())
        return [
            pb.Details(clients=[one.describe() for one in clients if one.model is model], blocks=model.blocks())
            for model in self.models.values()
        ]

    # -- the end ------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Refuse new clients and new requests. Earlier requests are still answered."""
        with self._changed:
            self._stopping = True
            for call in self._calls():
                call.refuse(_stopping())

    def wait(self, seconds: float) -> bool:
        """Wait until all requests are over; return whether they are."""
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

    def _unknown(self, digest: str) -> UnknownModelError:
        names = ", ".join(f"{model.name} ({model.digest[:DIGEST_CHARS]})" for model in self.models.values())
        return UnknownModelError(
            f"This daemon does not serve the store {digest[:DIGEST_CHARS]!r}; it serves {names}.",
            "If the model was converted again meanwhile, start the daemon again; or name another (moetier ps).",
        )

    def _calls(self) -> list[SessionCall]:
        return [client.call for client in self._clients.values() if client.call is not None]

    def _settled(self) -> None:
        with self._changed:
            self._changed.notify_all()


def _stopping() -> UnavailableError:
    return UnavailableError("The daemon is ending.", "Use another one, or the store itself.")


def _no_client() -> RefusedError:
    return RefusedError("The control connection of this credential has ended.", "Connect to the control socket again.")
