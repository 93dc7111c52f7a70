"""RemoteReader: reads records from a daemon on another host, over the network, into slots of this process."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc

from moetier.proto import expert_store_pb2 as pb
from moetier.proto.expert_store_pb2_grpc import ExpertStoreStub
from moetier.runtime.wire.address import DIGEST_CHARS, Address, Credentials
from moetier.runtime.wire.channel import SERVICE, open_channel
from moetier.runtime.wire.control import ControlConnection
from moetier.runtime.wire.piece import PIECE_BYTES, decode_piece
from moetier.runtime.wire.status_codes import error_of
from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import (
    ChecksumError,
    ClosedError,
    MoetierError,
    ProtocolError,
    UnavailableError,
    UnknownModelError,
)
from moetier.tiers.layout import CHECKSUM_BYTES, ExpertKey
from moetier.tiers.locks import ForkGuard
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.checksum import crc32c

CHANNELS = 3  # connections: TLS of a single one is limited by one core
SPLIT_BYTES = 8 << 20  # larger records come over all channels at once
SLOWEST = 4_000_000  # bytes per second of one call; slower calls are cut off
_ANSWER = 5.0  # seconds for a daemon to answer which models it serves
_MAX_NAMES = 200  # longest list of a daemon's models in an error, in characters
_AGAIN = (UnavailableError, ChecksumError, ProtocolError)


class RemoteReader(Closeable):
    """RecordReader over one daemon. Thread-safe. A record whose checksum is wrong is never returned.

    Every call has a deadline: ``patience`` seconds, plus the time that its bytes take at ``SLOWEST``.
    """

    def __init__(
        self,
        address: Address,
        credentials: Credentials,
        manifest: Manifest,
        *,
        channels: int = CHANNELS,
        patience: float = 10.0,
    ) -> None:
        """Use ``channels`` connections, which are made by the first read or check.

        That read or check raises ConfigError for credentials that can't be used.
        """
        self.manifest = manifest
        self.address = address
        self._credentials = credentials
        self.patience = patience
        self._fork_guard = ForkGuard()
        self.count = channels
        self._state = threading.Lock()  # guards the two fields below
        self._channels: _Channels | None = None
        self._closed = False
        self._pool = ThreadPoolExecutor(channels, thread_name_prefix="moetier-remote")

    def check(self, patience: float = _ANSWER) -> None:
        """Reconnect, and check that the daemon serves this store.

        Raises UnavailableError, RefusedError, UnknownModelError, ProtocolError.
        """
        self._fork_guard.check()
        channels = self._connected(again=True)
        try:
            reply = ExpertStoreStub(channels.first).Describe(pb.DescribeRequest(), timeout=patience)
        except (grpc.RpcError, ValueError) as error:
            raise error_of(error, self.address.target) from None
        if self.manifest.digest not in {model.digest for model in reply.models}:
            served = (" ".join(f"{model.name} ({model.digest[:DIGEST_CHARS]})".split()) for model in reply.models)
            names = ", ".join(served)[:_MAX_NAMES] or "nothing"
            raise UnknownModelError(
                f"The daemon does not serve the store of {self.manifest.model} that is here "
                f"({self.manifest.digest[:DIGEST_CHARS]}); it serves {names}.",
                "Start it on a copy of this model directory; start it again if that was converted again meanwhile.",
            )

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Callable[[], bool] | None = None) -> None:
        """Read a record as ``RecordReader`` says, without calling ``pause``.

        Raises MissingExpertError, ChecksumError, a DaemonError, and errors of the daemon's own tier: StoreError,
        ExhaustedError. After an error the content of the buffer is undefined.
        """
        self._fork_guard.check()
        self.manifest.check_keys(key.block, [key])
        view = buffer.cast("B") if buffer.format != "B" or buffer.ndim != 1 else buffer
        assert len(view) == self.manifest.layout(key.block).slot_bytes, f"{len(view)} bytes are no slot"
        began = time.monotonic()
        try:
            return self._read(key, view)
        except _AGAIN:
            # try again after a quick failure; after a slow one the caller should ask another daemon
            if time.monotonic() - began > self.patience / 2 or self._closed:
                raise
        # outside the handler: else its error would refer to the first one, whose frames hold the slot
        return self._read(key, view)

    def close(self) -> None:
        """Close the connections; reads under way end with an error. Idempotent. Does nothing in a forked child."""
        if not self._fork_guard.is_owner:
            return
        with self._state:
            self._closed = True
            if self._channels is not None:
                self._channels.close()
        self._pool.shutdown()

    def _connected(self, *, again: bool = False) -> _Channels:
        """Return the channels. Open them if there are none yet, or, with ``again``, in place of the old ones."""
        with self._state:
            if self._closed:
                raise ClosedError(f"The connection to the daemon {self.address} was closed.", "Load the model again.")
            if self._channels is None or again:
                opened = _Channels(self.address, self._credentials, self.count)
                if self._channels is not None:
                    self._channels.close()
                self._channels = opened
            return self._channels

    def _read(self, key: ExpertKey, view: memoryview) -> None:
        _Transfer(self, key, view).run(self._connected(), self._pool)
        crc = crc32c(view[:-CHECKSUM_BYTES])
        if crc != int.from_bytes(view[-CHECKSUM_BYTES:], "little"):
            raise ChecksumError(
                f"{self.manifest.model}, {key}: checksum mismatch in what the daemon {self.address} sent.",
                "Check its store (moetier verify) and the network.",
            )
        if (known := self.manifest.checksums(key.block)) and crc != known[key.expert]:
            raise ChecksumError(
                f"{self.manifest.model}, {key}: the daemon {self.address} sent a record of another conversion.",
                "On its host, check the store (moetier verify) and copy the shards again; then start it again.",
            )


class _Channels:
    """Channels to one daemon. ``fetches`` yields the callables for Fetch of all channels in turn, for ever.

    Over a Unix socket, a control connection is kept open with them, because it issued their credential.
    """

    def __init__(self, address: Address, credentials: Credentials, count: int) -> None:
        with contextlib.ExitStack() as opened:
            bearer = None
            if address.folder is not None:
                bearer = opened.enter_context(ControlConnection.open(address.folder, None)).session_id
            channels = [opened.enter_context(open_channel(address, credentials, bearer=bearer)) for _ in range(count)]
            self.close = opened.pop_all().close
        self.first = channels[0]
        # no deserialiser: decode_piece takes the bytes, without a copy
        self.fetches: Iterator[Any] = itertools.cycle(
            [channel.unary_stream(f"/{SERVICE}/Fetch", pb.FetchRequest.SerializeToString) for channel in channels]
        )


class _Transfer:
    """Transfer of one record, in parts with a call each. An error of one call ends all of them."""

    def __init__(self, reader: RemoteReader, key: ExpertKey, view: memoryview) -> None:
        self._reader = reader
        self._key = key
        self._view = view  # [slot_bytes]
        self._state = threading.Lock()  # guards the two fields below
        self._calls: list[Any] = []
        self._error: MoetierError | None = None

    def run(self, channels: _Channels, pool: ThreadPoolExecutor) -> None:
        """Read the record in parts over all ``channels``, with the threads of ``pool`` and this one.

        Raises the first error of a part. When it returns or raises, no thread writes to the view any more.
        """
        fetches, parts = channels.fetches, list(_parts(len(self._view), self._reader.count))
        others: list[Future[None]] = []
        try:
            for part in parts[1:]:  # one by one, so that ``finally`` waits for all that have begun
                others += [pool.submit(self._bring, next(fetches), *part)]
            self._bring(next(fetches), *parts[0])
            for other, part in zip(others, parts[1:], strict=True):
                if other.cancel():  # all threads of the pool were busy
                    self._bring(next(fetches), *part)
                else:
                    other.result()
        except RuntimeError as error:  # the pool was closed, or can start no thread
            self._end(UnavailableError(f"The record can't be read: {error}.", "Free what is short."))
        except BaseException:
            self._end(UnavailableError("The read was cancelled.", "Ask again."))
            raise
        finally:
            for other in others:
                if not other.cancel():
                    other.exception()
        if self._error is not None:
            raise self._error

    def _bring(self, fetch: Any, start: int, end: int) -> None:
        """Fetch the bytes from ``start`` to ``end`` into the view.

        An error of the network or the daemon ends the transfer.
        """
        reader, key = self._reader, self._key
        request = pb.FetchRequest(
            digest=reader.manifest.digest, block=key.block, expert=key.expert, offset=start, length=end - start
        )
        try:
            call = fetch(request, timeout=reader.patience + (end - start) / SLOWEST)
            with self._state:
                if self._error is not None:
                    call.cancel()
                self._calls.append(call)
            at = start
            for message in call:
                piece = decode_piece(message)
                if len(piece) > min(PIECE_BYTES, end - at):
                    raise ProtocolError(
                        f"A daemon sent more of {key} than it was asked for.", "Use moetier in one version."
                    )
                self._view[at : at + len(piece)] = piece
                at += len(piece)
            if at != end:
                raise ProtocolError(
                    f"A daemon sent {at - start:,} of {end - start:,} bytes of {key}.", "See the daemon's log."
                )
        except MoetierError as error:
            self._end(error)
        except (grpc.RpcError, ValueError) as error:
            self._end(error_of(error, reader.address.target))

    def _end(self, error: MoetierError) -> None:
        """Keep the first error, and cancel all calls."""
        with self._state:
            if self._error is None:
                self._error = error
            for call in self._calls:
                call.cancel()


def _parts(size: int, channels: int) -> Iterator[tuple[int, int]]:
    """Divide a record of ``size`` bytes into parts (start, end), one for each call.

    All parts but the last are a multiple of PIECE_BYTES long.
    """
    pieces = -(-size // PIECE_BYTES)
    step = -(-pieces // (channels if size > SPLIT_BYTES else 1)) * PIECE_BYTES
    for start in range(0, size, step):
        yield start, min(start + step, size)
