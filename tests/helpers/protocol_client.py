"""A client of a daemon that was written from docs/protocol.md alone: gRPC, the generated messages, and nothing else of
moetier's.

It is the proof that the page says enough, and an example for who writes another.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import socket
import stat
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any
from urllib.parse import quote

import grpc

from moetier.proto import expert_store_pb2 as pb
from moetier.proto.expert_store_pb2_grpc import ExpertStoreStub

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
PAGE = 4096


class Client:
    """Of the daemon in ``folder``, for the store whose manifest it is given (``format_reader.Reader.manifest``)."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        status = folder.lstat()
        assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (os.getuid(), 0o700)
        self._control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(60.0)
        self._control.connect(str(folder / "side.sock"))
        peer = self._control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        assert struct.unpack("3i", peer)[1] == os.getuid()
        self._control.send(json.dumps({"protocol": 1, "digest": manifest["digest"]}).encode())
        packet, descriptors, _, _ = socket.recv_fds(self._control, 65_536, 1)
        self.welcome = json.loads(packet)
        if "error" in self.welcome:
            self._control.close()
            raise ConnectionError(self.welcome["error"]["kind"])
        (descriptor,) = descriptors
        assert fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS == SEALS
        self.arena = Arena(descriptor, [block["experts"] for block in manifest["blocks"]])
        os.close(descriptor)
        self._channel = grpc.insecure_channel("unix:" + quote(str(folder / "grpc.sock")))
        self._stub = ExpertStoreStub(self._channel)
        self._shown = (("authorization", f"Bearer {self.welcome['session']}"),)
        self._said: SimpleQueue[pb.ClientMessage | None] = SimpleQueue()
        self._answers = self._stub.Session(iter(self._said.get, None), metadata=self._shown)
        self._requests = 0

    def describe(self) -> pb.DescribeReply:
        return self._stub.Describe(pb.DescribeRequest(), metadata=self._shown, timeout=60)

    def hits(self, block: int, experts: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Return copies of the records that are in slots, verified by their generations, and report the hits."""
        used = []
        for expert in experts:
            if (copied := self.arena.copy(block, expert)) is not None:
                used.append(expert)
                yield expert, copied
        self._said.put(pb.ClientMessage(uses=pb.Uses(blocks=[pb.Experts(block=block, experts=used)])))

    def demand(self, block: int, experts: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Request all of them, and return copies of their slots in order of arrival."""
        self._requests += 1
        acquire = pb.Acquire(request=self._requests, block=block, experts=experts, timeout_ms=60_000)
        self._said.put(pb.ClientMessage(acquire=acquire))
        for _ in experts:
            message = next(self._answers)
            while message.WhichOneof("message") not in ("granted", "failed"):
                message = next(self._answers)
            if message.WhichOneof("message") == "failed":
                raise LookupError(message.failed.error.type)
            granted = message.granted
            slot = self.arena.slot(granted.slot)
            assert self.arena.generation(granted.slot) == granted.generation
            # before the next is waited for
            self._said.put(pb.ClientMessage(release=pb.Release(request=granted.request, experts=[granted.expert])))
            yield granted.expert, slot

    def fetch(self, digest: str, block: int, expert: int, offset: int = 0, length: int = 0) -> bytes:
        request = pb.FetchRequest(digest=digest, block=block, expert=expert, offset=offset, length=length)
        return b"".join(piece.data for piece in self._stub.Fetch(request, metadata=self._shown, timeout=60))

    def close(self) -> None:
        self._said.put(None)
        self._answers.cancel()
        self._channel.close()
        self.arena.close()
        self._control.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Arena:
    """A daemon's memory, mapped for reading. ``experts`` are how many each block has."""

    def __init__(self, descriptor: int, experts: Sequence[int]) -> None:
        size = os.fstat(descriptor).st_size
        self._map = mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ)
        self._experts = experts
        magic, version, nbytes, keys, slots, regions = struct.unpack_from("<8s5Q", self._map)
        assert (magic, version, nbytes, keys) == (b"moetier\0", 1, size, sum(experts))
        self.digest = self._map[64:96].hex()
        pairs = struct.unpack_from(f"<{2 * regions}Q", self._map, 16 * 8)
        self._regions = list(zip(pairs[::2], pairs[1::2], strict=True))  # slots, bytes of each
        self._table = 8 * (16 + 2 * regions)
        self._generations = self._table + 8 * keys
        end = self._generations + 2 * 8 * slots
        self._slots = -(-end // PAGE) * PAGE

    def copy(self, block: int, expert: int) -> bytes | None:
        """The slot of a record that is there; None for a miss, or where it was replaced meanwhile."""
        number = sum(self._experts[:block]) + expert
        slot = self._number(self._table, number)
        if slot < 0:
            return None
        generation = self.generation(slot)
        if generation & 1 or self._number(self._table, number) != slot:
            return None
        copied = self.slot(slot)
        return copied if self.generation(slot) == generation else None

    def generation(self, slot: int) -> int:
        return self._number(self._generations, slot) % 2**64

    def slot(self, slot: int) -> bytes:
        start = self._slots
        for slots, slot_bytes in self._regions:
            if slot < slots:
                start += slot * slot_bytes
                return self._map[start : start + slot_bytes]
            slot -= slots
            start += slots * slot_bytes
        raise IndexError(slot)

    def _number(self, words: int, index: int) -> int:
        return int(struct.unpack_from("<q", self._map, words + 8 * index)[0])

    def close(self) -> None:
        self._map.close()
