"""Short-lived connections to a daemon that ask for its models and counters, as ``moetier ps`` does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from moetier.proto import expert_store_pb2 as pb
from moetier.proto.expert_store_pb2_grpc import ExpertStoreStub
from moetier.tiers.errors import DaemonError

from .address import Address, Credentials, DaemonCard, ServedModel, known_daemons
from .channel import open_channel
from .control import PACKET_SECONDS, ControlConnection
from .status_codes import error_of

PS_TIMEOUT = 2.0  # seconds for each daemon to answer when all daemons are listed


class DaemonProbe:
    """A connection to a daemon, made by ``probe``.

    Every method raises DaemonError if the daemon refuses the call or does not answer within ``timeout`` seconds.
    """

    def __init__(self, channel: grpc.Channel, address: Address, timeout: float) -> None:
        self._stub = ExpertStoreStub(channel)
        self._target = address.target
        self._timeout = timeout

    def describe(self) -> pb.DescribeReply:
        """Return the daemon's process, version and models."""
        return self._ask(self._stub.Describe, pb.DescribeRequest())

    def stats(self, *, details: bool = False) -> pb.StatsReply:
        """Return the daemon's counters. With ``details``, the reply also describes its clients and blocks."""
        return self._ask(self._stub.Stats, pb.StatsRequest(details=details))

    def _ask(self, call: Callable[..., Any], request: object) -> Any:
        try:
            return call(request, timeout=self._timeout)
        except grpc.RpcError as error:
            raise error_of(error, self._target) from None


@contextlib.contextmanager
def probe(
    address: Address, credentials: Credentials | None = None, *, timeout: float = PACKET_SECONDS
) -> Iterator[DaemonProbe]:
    """Connect to a daemon for the duration of the ``with`` block. ``timeout``: seconds to wait for each answer.

    Raises ConfigError if the credentials can't be used, UnavailableError if no daemon answers, and RefusedError if
    another user runs the daemon.
    """
    with contextlib.ExitStack() as closing:
        bearer = None
        if address.folder is not None:
            bearer = closing.enter_context(ControlConnection.open(address.folder, None, timeout=timeout)).session_id
        channel = closing.enter_context(open_channel(address, credentials or Credentials(), bearer=bearer))
        yield DaemonProbe(channel, address, timeout)


@dataclass(frozen=True, slots=True)
class RunningDaemon:
    """A running daemon of this user. ``stats`` is None if the daemon does not answer."""

    folder: Path
    card: DaemonCard
    stats: pb.StatsReply | None

    @property
    def models(self) -> list[tuple[ServedModel, pb.ModelStats | None]]:
        """The models on the card, each with its counters.

        The counters are None if the daemon does not answer or no longer serves the model.
        """
        stats = {model.digest: model for model in self.stats.models} if self.stats is not None else {}
        return [(model, stats.get(model.digest)) for model in self.card.models]


def client_processes(stats: pb.StatsReply) -> dict[str, list[int]]:
    """Return the process ids of the clients of each model, by digest; none if ``stats`` has no details."""
    return {
        model.digest: sorted({client.pid for client in details.clients})
        for model, details in zip(stats.models, stats.details, strict=False)
    }


def running_daemons(*, details: bool = False) -> list[RunningDaemon]:
    """Probe the daemons in ``runtime_folder()``, and return those that still run. ``details`` is as in ``stats``."""
    daemons = []
    for address, card in known_daemons().items():
        assert address.folder is not None
        try:
            with probe(address, timeout=PS_TIMEOUT) as connected:
                daemons.append(RunningDaemon(address.folder, card, connected.stats(details=details)))
        except DaemonError:
            if _is_running(card, address.folder):
                daemons.append(RunningDaemon(address.folder, card, None))
    return daemons


def _is_running(card: DaemonCard, folder: Path) -> bool:
    """Return whether the daemon of a card still runs: its process has the folder's lock file open."""
    try:
        links = list(Path(f"/proc/{card.pid}/fd").iterdir())
        return any(link.exists() and link.samefile(folder / "lock") for link in links)
    except OSError:
        return False
