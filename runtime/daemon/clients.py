"""Clients: who is connected to a daemon, what for, and whether they are still served."""

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
from .exchange import Asked, Exchange
from .log import say
from .model import Hosted

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Client:
    """A control connection; ``model`` is None for who only looks."""

    pid: int
    model: Hosted | None
    number: int = 0
    exchange: Exchange | None = None
    asked: Asked = field(default_factory=Asked)
    began: float = field(default_factory=time.monotonic)

    def describe(self) -> pb.Client:
        return pb.Client(
            number=self.number,
            pid=self.pid,
            connected_s=time.monotonic() - self.began,
            leases=0 if self.exchange is None else self.exchange.leases,
            hits=self.asked.hits,
            misses=self.asked.misses,
        )


class Clients:
    """Who is connected, by the ids that the control socket issued; and whether they are still served."""

    def __init__(self, models: Mapping[str, Hosted], *, leases: int, patience: float) -> None:
        """``models`` by digest; a client has at most ``leases``; ``patience`` seconds for a slot."""
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
        """Raises UnknownModelError; UnavailableError once the daemon is ending."""
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
        say(_log, "client", pid=pid, model=model.name)
        return welcome

    def leave(self, session: str) -> None:
        with self._changed:
            client = self._clients.pop(session)
        if client.exchange is not None:
            client.exchange.end(_left())
        if client.model is not None:
            say(_log, "client-gone", pid=client.pid, model=client.model.name)

    # -- the service's ------------------------------------------------------------------------------------------------

    def knows(self, session: str | None) -> bool:
        return session in self._clients

    def attach(self, session: str) -> Exchange:
        """The client's new stream; its former one ends. Raises MoetierError."""
        with self._changed:
            client = self._clients.get(session)
            if client is None:
                raise _left()
            if client.model is None:
                raise UnknownModelError("The credential is for no model.", "Name its digest on the control socket.")
            if self._stopping:
                raise _stopping()
            former = client.exchange
            client.exchange = exchange = Exchange(
                client.model, client.asked, leases=self._leases, patience=self._patience, settled=self._settled
            )
        if former is not None:
            former.end(UnavailableError("The client has opened another stream.", "Use that."))
        return exchange

    def detach(self, session: str, exchange: Exchange) -> None:
        exchange.end()
        with self._changed:
            client = self._clients.get(session)
            if client is not None and client.exchange is exchange:
                client.exchange = None

    @contextlib.contextmanager
    def fetching(self, digest: str) -> Iterator[Hosted]:
        """While another host fetches of a model. Raises MoetierError."""
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
        with self._changed:
            clients = list(self._clients.values())
        found = []
        for model in self.models.values():
            of_model = [client for client in clients if client.model is model]
            exchanges = [client.exchange for client in of_model if client.exchange is not None]
            leases = sum(exchange.leases for exchange in exchanges)
            found.append(model.stats(clients=len(of_model), sessions=len(exchanges), leases=leases))
        return found

    def details(self) -> list[pb.Details]:
        """Of the models, in the order of ``stats``."""
        with self._changed:
            clients = list(self._clients.values())
        return [
            pb.Details(clients=[one.describe() for one in clients if one.model is model], blocks=model.blocks())
            for model in self.models.values()
        ]

    # -- the end ------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Nobody is admitted, and nothing is asked for any more. What has been asked for is still answered."""
        with self._changed:
            self._stopping = True
            for exchange in self._exchanges():
                exchange.refuse(_stopping())

    def wait(self, seconds: float) -> bool:
        """Whether all that was asked for is over."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._fetching and all(exchange.is_settled for exchange in self._exchanges()),
                max(seconds, 0.0),
            )

    def end(self) -> None:
        """Of every stream."""
        with self._changed:
            exchanges = self._exchanges()
        for exchange in exchanges:
            exchange.end(_stopping())

    def _unknown(self, digest: str) -> UnknownModelError:
        names = ", ".join(f"{model.name} ({model.digest[:DIGEST_CHARS]})" for model in self.models.values())
        return UnknownModelError(
            f"This daemon does not serve the store {digest[:DIGEST_CHARS]!r}; it serves {names}.",
            "If the model was converted again meanwhile, start the daemon again; or name another (moetier ps).",
        )

    def _exchanges(self) -> list[Exchange]:
        return [client.exchange for client in self._clients.values() if client.exchange is not None]

    def _settled(self) -> None:
        with self._changed:
            self._changed.notify_all()


def _stopping() -> UnavailableError:
    return UnavailableError("The daemon is ending.", "Use another one, or the store itself.")


def _left() -> RefusedError:
    return RefusedError("The control connection of this credential has ended.", "Connect to the control socket again.")
