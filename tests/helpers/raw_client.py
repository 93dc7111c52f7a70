"""A client of a daemon that does as it is told: the control socket, the stream, and nothing of the product's client."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType

import grpc
from readers import PATIENCE
from threads import Task

from moetier.proto import expert_store_pb2 as pb
from moetier.proto.expert_store_pb2_grpc import ExpertStoreStub
from moetier.runtime.wire.address import Address, Credentials
from moetier.runtime.wire.channel import open_channel
from moetier.runtime.wire.control import ControlConnection
from moetier.tiers.arena.layout import ArenaLayout
from moetier.tiers.manifest import Manifest


class RawClient:
    """``answers`` are the messages of the stream; None is its end, with ``error`` if it ended with one."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.control = ControlConnection.open(folder, manifest.digest, timeout=PATIENCE)
        self.layout = ArenaLayout.of(manifest, self.control.slots)
        assert self.control.descriptor is not None
        self._map = mmap.mmap(self.control.descriptor, self.layout.nbytes, mmap.MAP_SHARED, mmap.PROT_READ)
        self.channel = open_channel(Address.of(folder), Credentials(), bearer=self.control.session_id)
        self.stub = ExpertStoreStub(self.channel)
        self.messages: SimpleQueue[pb.ClientMessage | None] = SimpleQueue()
        self.open_stream()

    def open_stream(self) -> None:
        self.messages.put(None)  # gRPC has a thread that waits for the former stream's
        self.answers: SimpleQueue[pb.ServerMessage | None] = SimpleQueue()
        self.error: grpc.RpcError | None = None
        self.messages = SimpleQueue()
        self.stream = self.stub.Session(iter(self.messages.get, None))
        self.reader = Task(lambda: self._read(self.stream, self.answers), "raw client")

    def _read(self, stream: Iterable[pb.ServerMessage], answers: SimpleQueue[pb.ServerMessage | None]) -> None:
        try:
            for message in stream:
                answers.put(message)
        except grpc.RpcError as error:
            self.error = error
        answers.put(None)

    def send(self, **message: object) -> None:
        self.messages.put(pb.ClientMessage(**message))

    def acquire(self, request: int, block: int, experts: Iterable[int], timeout_ms: int = 0) -> None:
        self.send(acquire=pb.Acquire(request=request, block=block, experts=experts, timeout_ms=timeout_ms))

    def release(self, request: int, experts: Iterable[int] = ()) -> None:
        self.send(release=pb.Release(request=request, experts=experts))

    def answer(self, timeout: float = PATIENCE) -> pb.ServerMessage | None:
        try:
            return self.answers.get(timeout=timeout)
        except Empty:
            raise AssertionError("no answer") from None

    def granted(self) -> pb.Granted:
        message = self.answer()
        assert message is not None, self.error
        assert message.WhichOneof("message") == "granted", message
        return message.granted

    def failed(self) -> pb.Failed:
        message = self.answer()
        assert message is not None, self.error
        assert message.WhichOneof("message") == "failed", message
        return message.failed

    def ended(self) -> grpc.RpcError | None:
        """Once the stream has; its error."""
        while self.answer() is not None:
            pass
        return self.error

    def record(self, slot: int) -> bytes:
        """Return the bytes of a slot's record in the arena now."""
        start = self.layout.offset(slot)
        return self._map[start : start + self.layout.slot_bytes(slot) - 4]

    def close(self) -> None:
        self.messages.put(None)
        self.stream.cancel()
        self.reader.result()
        self.channel.close()
        self._map.close()
        self.control.close()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
