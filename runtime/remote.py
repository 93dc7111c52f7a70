"""RemoteReader: the records of a daemon on another host, read over the network into the slots of this one's tier."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import google_crc32c
import grpc
import numpy as np

from moetier.proto import expert_store_pb2 as pb
from moetier.tiers.errors import (
    ChecksumError,
    ClosedError,
    MoetierError,
    ProtocolError,
    RefusedError,
    UnavailableError,
    UnknownModelError,
)
from moetier.tiers.keys import CHECKSUM_BYTES, ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.monitor import Home

from .address import Address, Credentials
from .channel import open_channel, speaks_tls
from .fetch import SERVICE
from .piece import PIECE_BYTES, decode_piece
from .running import SHORT
from .side import SideConnection
from .status import METADATA, error_of

CHANNELS = 3  # connections; TLS of one keeps one core busy
SPLIT_BYTES = 8 << 20  # a record that is larger comes over all channels at once
SLOWEST = 4_000_000  # bytes a second of one call: what comes slower is not waited for
ATTEMPTS = 2  # at a record, of which a broken stream brought a part
_ANSWER = 5.0  # seconds that a daemon has to say what it serves
_AGAIN = (UnavailableError, ChecksumError, ProtocolError)
_NAMES = 200  # characters of what a stranger says that it serves
_TOO_LARGE = "larger than max"  # a message; otherwise the daemon takes no more calls
_NO_TRUST = ("handshake failed", "certificate_verify_failed", "hostname verification")
_PLAIN = "wrong_version_number"  # the answer to TLS of who speaks none
_CUT_OFF = ("failed to connect", "socket closed")  # both: before it was a connection
_HANDSHAKE = 2.0  # seconds


class RemoteReader:
    """A RecordReader over one daemon. Thread-safe. A record is in the slot when its checksum is right, or not at all.

    Every call has a deadline: ``patience`` seconds, and what its bytes take at ``SLOWEST``.
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
        """Connects when it is first used or checked, which raise ConfigError for credentials that can't be used."""
        assert channels >= 1
        self.manifest = manifest
        self.address = address
        self._credentials = credentials
        self._patience = patience
        self._home = Home()
        self._channels = channels
        self._state = threading.Lock()  # guards what is exchanged and closed
        self._lines: _Lines | None = None
        self._checked: _Lines | None = None  # while they are not in use yet
        self._pool = ThreadPoolExecutor(channels, thread_name_prefix="moetier-remote")
        self._closed = False

    def check(self, patience: float = _ANSWER) -> None:
        """Connects anew, and asks whether the daemon serves this store. Raises UnavailableError, RefusedError,
        UnknownModelError, ProtocolError."""
        self._home.check()
        lines = _Lines(self.address, self._credentials, self._channels)
        try:
            with self._state:
                self._check_open()
                self._checked = lines
            lines.check(self.manifest, patience)
            with self._state:
                self._check_open()
                former, self._lines = self._lines, lines
        except BaseException:
            lines.close()
            raise
        finally:
            self._checked = None
        if former is not None:
            former.close()

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Callable[[], bool] | None = None) -> None:
        """As ``RecordReader`` says, without pauses. Raises MissingExpertError, ChecksumError, a DaemonError, and what
        the daemon's own tier has raised: StoreError, ExhaustedError. What the buffer holds then is undefined."""
        self._home.check()
        self.manifest.check_keys(key.block, [key])
        view = buffer.cast("B") if buffer.format != "B" or buffer.ndim != 1 else buffer
        assert len(view) == self.manifest.layout(key.block).slot_bytes, f"{len(view)} bytes are no slot"
        with self._state:
            self._check_open()
            if self._lines is None:
                self._lines = _Lines(self.address, self._credentials, self._channels)
        began = time.monotonic()
        for attempt in itertools.count(1):
            try:
                return self._read(key, view)
            except _AGAIN:
                # a record that came in time, but not whole; not one that never came: others shall be asked then
                if attempt == ATTEMPTS or time.monotonic() - began > self._patience / 2 or self._closed:
                    raise
        raise AssertionError

    def close(self) -> None:
        """What is being read ends with an error. Idempotent. A forked child has nothing to close."""
        if not self._home.is_here:
            return
        with self._state:
            self._closed = True
            open_lines, self._lines = [self._lines, self._checked], None
        for lines in open_lines:
            if lines is not None:
                lines.close()
        self._pool.shutdown()

    def __enter__(self) -> RemoteReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"The connection to the daemon {self.address} was closed.", "Load the model again.")

    def _read(self, key: ExpertKey, view: memoryview) -> None:
        with self._state:
            self._check_open()
            lines = self._lines
        assert lines is not None
        transfer = _Transfer(key, view, self.manifest.digest, self.address, self._patience)
        parts = list(_parts(len(view), len(lines.fetches)))
        others: list[Future[None]] = []
        try:
            for part in parts[1:]:  # one by one: those that have begun are waited for, whatever comes
                others += [self._pool.submit(transfer.run, lines.next(), *part)]
            transfer.run(lines.next(), *parts[0])
            for other, part in zip(others, parts[1:], strict=True):
                if other.cancel():  # nobody has begun it
                    transfer.run(lines.next(), *part)
                else:
                    other.result()
        except RuntimeError as error:  # the pool's: it was closed meanwhile, or there is no thread to be had
            transfer.end(UnavailableError(f"The record can't be read: {error}.", "Free what is short."))
        except BaseException:
            transfer.end(UnavailableError("It was given up.", "Ask again."))
            raise
        finally:
            for other in others:  # nobody may write to the slot once this has returned
                if not other.cancel():
                    other.exception()
        if transfer.error is not None:
            raise transfer.error
        payload = np.frombuffer(view, np.uint8)[:-CHECKSUM_BYTES]
        if google_crc32c.value(payload) != int.from_bytes(view[-CHECKSUM_BYTES:], "little"):
            raise ChecksumError(
                f"{self.manifest.model}, {key}: checksum mismatch in what the daemon {self.address} sent.",
                "Check its store (moetier verify) and the network.",
            )


class _Lines:
    """Channels to one daemon, used in turn; over a Unix socket with the connection that their credential hangs on."""

    def __init__(self, address: Address, credentials: Credentials, channels: int) -> None:
        self._address = address
        self._side = SideConnection.open(address.folder, None) if address.folder is not None else None
        self._channels: list[grpc.Channel] = []
        self._turn = itertools.count()
        try:
            bearer = self._side.session_id if self._side is not None else None
            for _ in range(channels):
                self._channels.append(open_channel(address, credentials, bearer=bearer))
        except BaseException:
            self.close()
            raise
        # no deserialiser: decode_piece does without a copy
        self.fetches: list[Any] = [
            channel.unary_stream(f"/{SERVICE}/Fetch", pb.FetchRequest.SerializeToString) for channel in self._channels
        ]

    def next(self) -> Any:
        """A multi-callable of Fetch."""
        return self.fetches[next(self._turn) % len(self.fetches)]

    def check(self, manifest: Manifest, patience: float) -> None:
        describe = self._channels[0].unary_unary(
            f"/{SERVICE}/Describe", pb.DescribeRequest.SerializeToString, pb.DescribeReply.FromString
        )
        try:
            reply = describe(pb.DescribeRequest(), timeout=patience)
        except grpc.RpcError as error:
            raise _error_of(error, self._address) from None
        except ValueError:  # what gRPC raises when the channel was closed
            raise _closed_channel() from None
        if manifest.digest not in {model.digest for model in reply.models}:
            served = (" ".join(f"{model.name} ({model.digest[:SHORT]})".split()) for model in reply.models)
            names = ", ".join(served)[:_NAMES] or "nothing"
            raise UnknownModelError(
                f"The daemon does not serve the store of {manifest.model} that is here ({manifest.digest[:SHORT]}); "
                f"it serves {names}.",
                "Start it on a copy of this model directory; start it again if that was converted again meanwhile.",
            )

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        if self._side is not None:
            self._side.close()


class _Transfer:
    """One record on its way: the calls that bring its parts end together."""

    def __init__(self, key: ExpertKey, view: memoryview, digest: str, address: Address, patience: float) -> None:
        self.error: MoetierError | None = None
        self._key = key
        self._view = view
        self._digest = digest
        self._address = address
        self._patience = patience
        self._state = threading.Lock()
        self._calls: list[Any] = []

    def run(self, fetch: Any, start: int, end: int) -> None:
        """Brings the bytes ``start`` to ``end``; never raises what is the network's or the daemon's to fail at."""
        try:
            self._run(fetch, start, end)
        except MoetierError as error:
            self.end(error)
        except grpc.RpcError as error:
            self.end(_error_of(error, self._address))
        except ValueError:  # what gRPC raises when the channel was closed
            self.end(_closed_channel())

    def _run(self, fetch: Any, start: int, end: int) -> None:
        request = pb.FetchRequest(
            digest=self._digest, block=self._key.block, expert=self._key.expert, offset=start, length=end - start
        )
        call = fetch(request, timeout=self._patience + (end - start) / SLOWEST)
        with self._state:
            if self.error is not None:
                call.cancel()
            self._calls.append(call)
        at = start
        for message in call:
            piece = decode_piece(message)
            if len(piece) > min(PIECE_BYTES, end - at):
                raise ProtocolError(
                    f"A daemon sent more of {self._key} than it was asked for.", "Use moetier in one version."
                )
            self._view[at : at + len(piece)] = piece
            at += len(piece)
        if at != end:
            raise ProtocolError(
                f"A daemon sent {at - start:,} of {end - start:,} bytes of {self._key}.", "See the daemon's log."
            )

    def end(self, error: MoetierError) -> None:
        """The first error is the transfer's; all of its calls end."""
        with self._state:
            if self.error is None:
                self.error = error
            for call in self._calls:
                call.cancel()


def _parts(size: int, channels: int) -> Iterator[tuple[int, int]]:
    """Of a record of ``size`` bytes: (start, end) for each call; whole pieces but the last."""
    if size <= SPLIT_BYTES:
        yield 0, size
        return
    pieces = -(-size // PIECE_BYTES)
    step = -(-pieces // channels) * PIECE_BYTES
    for start in range(0, size, step):
        yield start, min(start + step, size)


def _error_of(error: grpc.RpcError, address: Address) -> MoetierError:
    """What a failed call tells, where gRPC itself may have been the one to end it."""
    call: Any = error
    code, details = call.code(), " ".join((call.details() or "").split())
    if not any(name == METADATA for name, _ in call.trailing_metadata() or ()):
        said = details.lower()
        if code is grpc.StatusCode.UNAVAILABLE and _PLAIN in said:
            return RefusedError(
                "The daemon does not speak TLS, and this client would speak nothing else.",
                "Give --insecure if that daemon has no TLS.",
            )
        if code is grpc.StatusCode.UNAVAILABLE and any(sign in said for sign in _NO_TRUST):
            return RefusedError(
                f"The daemon and this client do not trust each other: {details}",
                "Give the authority that signed its certificate (--tls-ca), and the host's name as it is in there.",
            )
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE in said:
            return ProtocolError(
                f"A daemon sent what is no piece of a record: {details}", "Use moetier in one version."
            )
        if (
            code is grpc.StatusCode.UNAVAILABLE
            and all(sign in said for sign in _CUT_OFF)
            and address.target
            and speaks_tls(address.target, _HANDSHAKE)
        ):
            return RefusedError(
                "The daemon wants TLS, and a certificate of the client's if it was started with --tls-client-ca.",
                "Give its authority (--tls-ca), and not --insecure; with --tls-cert and --tls-key, if it wants them.",
            )
    return error_of(error)


def _closed_channel() -> UnavailableError:
    return UnavailableError("The connection to the daemon was closed.", "Connect again.")
