"""What passes between a client and its daemon, counted."""

from __future__ import annotations

from dataclasses import dataclass

from moetier.proto import expert_store_pb2 as wire


@dataclass(frozen=True, slots=True)
class Traffic:
    """What passed between a client and its daemon since it was opened. Bytes are those of the messages."""

    round_trips: int  # requests: one for the missing experts of a block
    messages_out: int
    messages_in: int
    bytes_out: int
    bytes_in: int
    connections: int


class Meter:
    """Each of its numbers has one thread that writes it."""

    def __init__(self) -> None:
        self.connections = 0
        self.messages_in = 0
        self._bytes_in = 0
        self._round_trips = self._messages_out = self._bytes_out = 0

    def sent(self, message: wire.ClientMessage) -> None:
        self._messages_out += 1
        self._bytes_out += message.ByteSize()
        self._round_trips += message.HasField("acquire")

    def heard(self, message: wire.ServerMessage) -> None:
        self.messages_in += 1
        self._bytes_in += message.ByteSize()

    @property
    def traffic(self) -> Traffic:
        return Traffic(
            self._round_trips,
            self._messages_out,
            self.messages_in,
            self._bytes_out,
            self._bytes_in,
            self.connections,
        )
