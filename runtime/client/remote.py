"""RemoteReader: the records of a daemon on another host, read over the network into the slots of this one's tier."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from moetier.runtime.wire.address import Address, Credentials
from moetier.tiers.errors import ChecksumError, ClosedError, ProtocolError, UnavailableError
from moetier.tiers.layout import CHECKSUM_BYTES, ExpertKey
from moetier.tiers.locks import ForkGuard
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.checksum import crc32c

from .lines import Lines
from .transfer import Transfer

CHANNELS = 3  # connections; TLS of one keeps one core busy
ATTEMPTS = 2  # at a record, of which a broken stream brought a part
_ANSWER = 5.0  # seconds that a daemon has to say what it serves
_AGAIN = (UnavailableError, ChecksumError, ProtocolError)


class RemoteReader:
    """A RecordReader over one daemon. Thread-safe. A record is in the slot when its checksum is right, or not at all.

    Every call has a deadline: ``patience`` seconds, and what its bytes take when they come slowly.
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
        self._fork_guard = ForkGuard()
        self._channels = channels
        self._state = threading.Lock()  # guards what is exchanged and closed
        self._lines: Lines | None = None
        self._checked: Lines | None = None  # while they are not in use yet
        self._pool = ThreadPoolExecutor(channels, thread_name_prefix="moetier-remote")
        self._closed = False

    def check(self, patience: float = _ANSWER) -> None:
        """Connects anew, and asks whether the daemon serves this store. Raises UnavailableError, RefusedError,
        UnknownModelError, ProtocolError."""
        self._fork_guard.check()
        lines = Lines(self.address, self._credentials, self._channels)
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

    @property
    def parts(self) -> None:
        return None

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Callable[[], bool] | None = None) -> None:
        """As ``RecordReader`` says, without pauses. Raises MissingExpertError, ChecksumError, a DaemonError, and what
        the daemon's own tier has raised: StoreError, ExhaustedError. What the buffer holds then is undefined."""
        self._fork_guard.check()
        self.manifest.check_keys(key.block, [key])
        view = buffer.cast("B") if buffer.format != "B" or buffer.ndim != 1 else buffer
        assert len(view) == self.manifest.layout(key.block).slot_bytes, f"{len(view)} bytes are no slot"
        with self._state:
            self._check_open()
            if self._lines is None:
                self._lines = Lines(self.address, self._credentials, self._channels)
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
        if not self._fork_guard.is_owner:
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
        Transfer(key, view, self.manifest.digest, self.address, self._patience).run(lines, self._pool)
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
