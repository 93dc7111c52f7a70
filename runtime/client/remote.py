"""RemoteStore: reads records from a daemon on another host, over the network, into slots of this process.

It also sends computations to the daemon (``remote_compute.py``).
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from moetier.proto import expert_store_pb2 as pb
from moetier.proto.expert_store_pb2_grpc import ExpertStoreStub
from moetier.runtime.wire.address import DIGEST_CHARS, Address, Credentials
from moetier.runtime.wire.channel import SERVICE, open_channel
from moetier.runtime.wire.control import ControlConnection
from moetier.runtime.wire.piece import WIRE_PIECE_BYTES, decode_piece
from moetier.runtime.wire.request import encode_request
from moetier.runtime.wire.status_codes import CALL_ERRORS, error_of
from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import (
    SAME_VERSION,
    BudgetError,
    ChecksumError,
    ClosedError,
    ExhaustedError,
    MoetierError,
    ProtocolError,
    RefusedError,
    UnavailableError,
    UnknownModelError,
)
from moetier.tiers.layout import CHECKSUM_BYTES, ExpertKey
from moetier.tiers.locks import ForkGuard
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.base import Pause, Store
from moetier.tiers.store.checksum import crc32c, stored_checksum
from moetier.tiers.store.pieces import as_bytes

CHANNELS = 3  # number of connections, as one core limits the speed of TLS on a single connection
SPLIT_BYTES = 8 << 20  # larger records are read over all channels at once
SLOWEST = 4_000_000  # bytes per second of one call; slower calls are cut off
_PROBE_TIMEOUT = 5.0  # seconds for a daemon to answer which models it serves
_MAX_NAMES = 200  # longest list of a daemon's models in an error, in characters
# Errors after which a read is not tried again here. Any other may come from a request or an answer that was changed on
# its way: there is no block 70, or the call has no deadline.
_FINAL = (ClosedError, ExhaustedError, BudgetError, RefusedError, UnknownModelError)


class RemoteStore(Store):
    """Store that reads from one daemon. It never returns a record with a wrong checksum.

    Every call has a deadline: ``timeout`` seconds, plus the time that its bytes take at SLOWEST bytes per second.
    """

    def __init__(
        self,
        address: Address,
        credentials: Credentials,
        manifest: Manifest,
        *,
        channels: int = CHANNELS,
        timeout: float = 10.0,
    ) -> None:
        """Prepare ``channels`` connections to the daemon at ``address``.

        The first read or probe makes the connections. It raises ConfigError if the credentials can't be used.
        """
        self.manifest = manifest
        self.address = address
        self._credentials = credentials
        self.timeout = timeout
        self._fork_guard = ForkGuard()
        self._channel_count = channels
        self._state = threading.Lock()  # guards: ``_channels``, ``_is_closed``. Held while connections are made
        self._channels: _Channels | None = None
        self._is_closed = False
        self.computes: bool | None = None  # whether the daemon serves Compute; None before the first probe
        self.checks = False  # whether its answers repeat the checksums of requests: those of older daemons don't
        self._threads = ThreadPoolExecutor(channels, thread_name_prefix="moetier-remote")

    def probe(self, timeout: float = _PROBE_TIMEOUT, *, again: bool = True) -> None:
        """Check that the daemon serves this store, over new connections if ``again``.

        ``timeout``: seconds for the daemon to answer.

        Raises UnavailableError if the daemon does not answer, RefusedError if it refuses the credentials or is not
        trusted, UnknownModelError if it does not serve the store, and ProtocolError if its version does not fit.
        """
        self._fork_guard.check()
        channels = self._connected(again=again)
        try:
            reply = ExpertStoreStub(channels.first).Describe(pb.DescribeRequest(), timeout=timeout)
        except CALL_ERRORS as error:
            raise error_of(error, self.address.target) from None
        model_card = next((model for model in reply.models if model.digest == self.manifest.digest), None)
        self.checks = model_card is not None and model_card.checks
        self.computes = model_card is not None and model_card.computes and model_card.checks
        if model_card is None:
            served = (" ".join(f"{model.name} ({model.digest[:DIGEST_CHARS]})".split()) for model in reply.models)
            names = ", ".join(served)[:_MAX_NAMES] or "nothing"
            raise UnknownModelError(
                f"The daemon does not serve this machine's store of {self.manifest.model} "
                f"({self.manifest.digest[:DIGEST_CHARS]}); it serves {names}.",
                "Start the daemon on a copy of this model directory. If this directory was converted again, copy it "
                "again and restart the daemon.",
            )

    @property
    def where(self) -> str:
        """The address of the daemon."""
        return str(self.address)

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Pause | None = None) -> None:
        """Read a record from the daemon. ``pause`` is never called.

        Raises, beside the errors that ``Store`` names:
            ChecksumError: the daemon sent a damaged record, twice.
            StoreError: the daemon can't read the record.
            ExhaustedError: the daemon has no free slot.
            DaemonError: the daemon can't be reached, or failed.
        """
        self._fork_guard.check()
        self.manifest.check_keys(key.block, [key])
        view = as_bytes(buffer)
        assert len(view) == self.manifest.layout(key.block).slot_bytes, f"{len(view)} bytes are no slot"
        began = time.monotonic()
        try:
            return self._read(key, view)
        except MoetierError as error:
            # try again after a quick failure; after a slow one the caller should ask another daemon
            if isinstance(error, _FINAL) or time.monotonic() - began > self.timeout / 2 or self._is_closed:
                raise
        # not in the handler: an error there would refer to the first one, whose frames hold the slot
        return self._read(key, view)

    def compute(self, request: pb.ComputeRequest, nbytes: int) -> tuple[Any, int]:
        """Send a computation. Return the call, an iterator of serialised pieces, and the checksum of the request.

        ``nbytes`` is the size of the outputs. The last piece has the checksum of the request and the outputs.

        Raises DaemonError if the daemon can't be reached. The call raises one of CALL_ERRORS, by its deadline at
        the latest.
        """
        self._fork_guard.check()
        data, crc = encode_request(request)
        try:
            return self._connected().compute(data, timeout=self.timeout + (len(data) + nbytes) / SLOWEST), crc
        except CALL_ERRORS as error:
            raise error_of(error, self.address.target) from None

    def stop_computing(self) -> None:
        """Note that the daemon's answers to computations are wrong: it is asked for none until the next ``probe``."""
        self.computes = False

    def renew(self) -> None:
        """Open a new connection for computations, after headers were damaged on their way over the old one.

        HTTP/2 compresses headers by what it has sent before on the connection. Calls on the old connection go on until
        this is called again, which closes it.
        """
        with self._state, contextlib.suppress(MoetierError, *CALL_ERRORS):  # the next call raises these
            if self._channels is not None and not self._is_closed:
                self._channels.renew()

    def close(self) -> None:
        """Close the connections; reads under way end with an error. Idempotent. Does nothing in a forked child."""
        if not self._fork_guard.is_owner:
            return
        with self._state:
            self._is_closed = True
            if self._channels is not None:
                self._channels.close()
        self._threads.shutdown()

    def _connected(self, *, again: bool = False) -> _Channels:
        """Return the channels, opened now if there are none yet. With ``again``, replace the old channels."""
        with self._state:
            if self._is_closed:
                raise ClosedError(f"The connection to the daemon {self.address} was closed.", "Load the model again.")
            if self._channels is None or again:
                try:
                    opened = _Channels(self.address, self._credentials, self._channel_count)
                except (OSError, RuntimeError) as error:
                    raise error_of(error, self.address.target) from None
                if self._channels is not None:
                    self._channels.close()
                self._channels = opened
            return self._channels

    def _read(self, key: ExpertKey, view: memoryview) -> None:
        _Transfer(self, key, view).run(self._connected(), self._threads)
        crc = crc32c(view[:-CHECKSUM_BYTES])
        if crc != stored_checksum(view):
            raise ChecksumError(
                f"{self.manifest.model}, {key}: checksum mismatch in the record that the daemon {self.address} sent.",
                "Check the daemon's store (moetier verify) and the network.",
            )
        if not self.manifest.has_record(key, crc):
            raise ChecksumError(
                f"{self.manifest.model}, {key}: the daemon {self.address} sent a record of another conversion.",
                "On the daemon's host, check the store (moetier verify), copy its shards again, restart the daemon.",
            )


class _Channels(Closeable):
    """Channels to one daemon. ``fetches`` is an endless iterator of callables for Fetch, one channel after another.

    ``compute`` is the callable for Compute, on a channel of its own, so that hidden states don't wait for records.

    Over a Unix socket, the control connection that gave the session id stays open as long as the channels.
    """

    def __init__(self, address: Address, credentials: Credentials, channel_count: int) -> None:
        with contextlib.ExitStack() as undo:
            bearer = None
            if address.folder is not None:
                bearer = undo.enter_context(ControlConnection.open(address.folder, None)).session_id
            self._open = partial(open_channel, address, credentials, bearer=bearer)
            channels = [undo.enter_context(self._open()) for _ in range(channel_count)]
            self._computing = [self._open()]  # the channel for computations, and then the one that it replaced
            self._opened = undo.pop_all()
        self.first = channels[0]
        self.channel_count = channel_count
        # they take and yield serialised messages: see ``encode_request`` and ``decode_piece``
        self.fetches: Iterator[Any] = itertools.cycle(
            [channel.unary_stream(f"/{SERVICE}/Fetch") for channel in channels]
        )
        self.compute: Any = self._computing[0].unary_stream(f"/{SERVICE}/Compute")

    def renew(self) -> None:
        """Open another channel for computations. Calls on the old one go on, until this is called again."""
        self._computing.insert(0, self._open())
        self.compute = self._computing[0].unary_stream(f"/{SERVICE}/Compute")
        for channel in self._computing[2:]:
            channel.close()
        del self._computing[2:]

    def close(self) -> None:
        """Close all channels. Idempotent."""
        for channel in self._computing:
            channel.close()
        self._opened.close()


class _Transfer:
    """Transfer of one record in several parts, with a call for each part. An error in one call ends all calls."""

    def __init__(self, store: RemoteStore, key: ExpertKey, view: memoryview) -> None:
        self._store = store
        self._key = key
        self._view = view  # [slot_bytes]
        self._state = threading.Lock()  # guards: ``_calls``, ``_error``
        self._calls: list[Any] = []
        self._error: MoetierError | None = None

    def run(self, channels: _Channels, pool: ThreadPoolExecutor) -> None:
        """Read the record in parts over all ``channels``, with the threads of ``pool`` and the calling thread.

        Raises the error of the part that fails first. Afterwards no thread writes to the record's buffer.
        """
        fetches, parts = channels.fetches, list(_parts(len(self._view), channels.channel_count))
        others: list[Future[None]] = []
        try:
            for part in parts[1:]:  # one by one, so that ``finally`` waits for all that have begun
                others += [pool.submit(self._fetch, next(fetches), *part)]
            self._fetch(next(fetches), *parts[0])
            for other, part in zip(others, parts[1:], strict=True):
                if other.cancel():  # all threads of the pool were busy
                    self._fetch(next(fetches), *part)
                else:
                    other.result()
        except RuntimeError as error:  # the pool was closed, or can start no thread
            self._end(error_of(error, self._store.address.target))
        except BaseException:
            self._end(UnavailableError("The read was cancelled.", "Try again."))
            raise
        finally:
            for other in others:
                if not other.cancel():
                    other.exception()
        if self._error is not None:
            raise self._error

    def _fetch(self, fetch: Any, start: int, end: int) -> None:
        """Fetch the record's bytes from ``start`` to ``end``.

        An error of the network or the daemon ends the transfer.
        """
        store, key = self._store, self._key
        request = pb.FetchRequest(
            digest=store.manifest.digest, block=key.block, expert=key.expert, offset=start, length=end - start
        )
        try:
            data, crc = encode_request(request)
            call = fetch(data, timeout=store.timeout + (end - start) / SLOWEST)
            with self._state:
                if self._error is not None:
                    call.cancel()
                self._calls.append(call)
            at, repeated = start, None
            for message in call:
                piece, repeated = decode_piece(message)
                if len(piece) > min(WIRE_PIECE_BYTES, end - at):
                    raise ProtocolError(
                        f"The daemon {store.address} sent more bytes of {key} than were requested.", SAME_VERSION
                    )
                self._view[at : at + len(piece)] = piece
                at += len(piece)
            if at != end:
                raise ProtocolError(
                    f"The daemon {store.address} sent {at - start:,} of {end - start:,} bytes of {key}.",
                    "See the daemon's log.",
                )
            if store.checks and repeated != crc:  # a store without a table of checksums would not show it
                # not a ChecksumError: an older daemon may have taken its place, which the next check finds out
                raise ProtocolError(
                    f"The daemon {store.address} has answered another request than that for {key}.",
                    "Check the network, or use TLS.",
                )
        except MoetierError as error:
            self._end(error)
        except CALL_ERRORS as error:
            self._end(error_of(error, store.address.target))

    def _end(self, error: MoetierError) -> None:
        """Cancel all calls. ``run`` then raises the first ``error``."""
        with self._state:
            if self._error is None:
                self._error = error
            for call in self._calls:
                call.cancel()


def _parts(size: int, channels: int) -> Iterator[tuple[int, int]]:
    """Divide a record of ``size`` bytes into parts (start, end), one for each call.

    All parts but the last are a multiple of WIRE_PIECE_BYTES long.
    """
    pieces = -(-size // WIRE_PIECE_BYTES)
    length = -(-pieces // (channels if size > SPLIT_BYTES else 1)) * WIRE_PIECE_BYTES
    for start in range(0, size, length):
        yield start, min(start + length, size)
