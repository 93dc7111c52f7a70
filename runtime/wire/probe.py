"""A look at a daemon: what it is and what it has counted, without being one of its clients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from moetier.proto import expert_store_pb2 as pb
from moetier.proto.expert_store_pb2_grpc import ExpertStoreStub
from moetier.tiers.errors import DaemonError

from .address import Address, Credentials
from .channel import open_channel
from .failures import failure_of
from .running import DaemonCard, daemons
from .side import SideConnection
from .side_packets import PATIENCE

PS_PATIENCE = 2.0  # seconds for each daemon of a list to answer


class Visit:
    """Every method raises DaemonError when the daemon does not answer within ``patience`` seconds."""

    def __init__(self, channel: grpc.Channel, address: Address, patience: float) -> None:
        self._stub = ExpertStoreStub(channel)
        self._address = address
        self._patience = patience

    def describe(self) -> pb.DescribeReply:
        with self._errors():
            reply: pb.DescribeReply = self._stub.Describe(pb.DescribeRequest(), timeout=self._patience)
        return reply

    def stats(self, *, details: bool = False) -> pb.StatsReply:
        with self._errors():
            reply: pb.StatsReply = self._stub.Stats(pb.StatsRequest(details=details), timeout=self._patience)
        return reply

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise failure_of(error, self._address) from None


@contextlib.contextmanager
def visit(address: Address, credentials: Credentials | None = None, *, patience: float = PATIENCE) -> Iterator[Visit]:
    """Raises ConfigError for credentials that can't be used, UnavailableError, RefusedError."""
    with contextlib.ExitStack() as closing:
        bearer = None
        if address.folder is not None:
            side = closing.enter_context(SideConnection.open(address.folder, None, patience=patience))
            bearer = side.session_id
        channel = closing.enter_context(open_channel(address, credentials or Credentials(), bearer=bearer))
        yield Visit(channel, address, patience)


@dataclass(frozen=True, slots=True)
class Running:
    """``stats`` is None for a daemon that does not answer."""

    folder: Path
    card: DaemonCard
    stats: pb.StatsReply | None


def running() -> list[Running]:
    """Those beneath ``runtime_folder()``; what a killed one left is none."""
    found = []
    for address, card in daemons().items():
        assert address.folder is not None
        try:
            with visit(address, patience=PS_PATIENCE) as visited:
                found.append(Running(address.folder, card, visited.stats()))
        except DaemonError:
            if _lives(card, address.folder):
                found.append(Running(address.folder, card, None))
    return found


def _lives(card: DaemonCard, folder: Path) -> bool:
    """Whether the process has its folder's lock open: it is stopped, or busy."""
    try:
        links = list(Path(f"/proc/{card.pid}/fd").iterdir())
        return any(link.exists() and link.samefile(folder / "lock") for link in links)
    except OSError:
        return False
