"""A look at a daemon: what it is and what it has counted, without being one of its clients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import grpc

from moetier.proto import expert_store_pb2 as pb
from moetier.proto.expert_store_pb2_grpc import ExpertStoreStub

from .address import Address, Credentials
from .channel import open_channel
from .failures import failure_of
from .side import SideConnection
from .side_packets import PATIENCE


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
