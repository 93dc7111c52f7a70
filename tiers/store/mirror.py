"""Mirrors: complete copies of a store's records on other disks, which are read at the same time as the store itself.

The file MIRRORS beside the store lists the copies' folders. Each record is read in two parts, from the two disks that
should finish soonest, judging by their recent rates. If all other copies fail, one is enough. ``open_store`` opens a
store with its mirrors, or one that has none.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import ChecksumError, StoreError, StoreFormatError
from moetier.tiers.fields import Fields
from moetier.tiers.layout import PAGE, ExpertKey
from moetier.tiers.locks import UseCount
from moetier.tiers.manifest import Manifest

from .folder import MIRRORS, read_json, read_manifest, store_folder
from .reader import ExpertStore, Read, as_bytes, read_in_steps, run_reads

LEAST_BYTES = 256 << 10  # least part of a record that is worth a read of its own
MEMORY = 1.0  # seconds of reading over which a disk's rate is averaged
FAILURES = 3  # failures in a row after which a copy is set aside
REST = 60.0  # seconds for which such a copy is set aside
STALE = 10.0  # seconds without a read after which a disk's rate is measured again

_log = logging.getLogger(__name__)


def read_mirrors(directory: Path) -> list[Path]:
    """Return the folders of the mirrors that a model directory names. Raises StoreFormatError or StoreReadError."""
    path = directory / MIRRORS
    if not path.exists():
        return []
    fix = f"Remove it, and run `moetier mirror {directory} FOLDER` again."
    try:
        return [directory / folder.text() for folder in Fields(read_json(path, fix))["mirrors"].items()]
    except ValueError as error:
        raise StoreFormatError(f"{path}: {error}.", fix) from error


def open_mirror(folder: Path, digest: str, *, readers: int = 4) -> ExpertStore:
    """Open the mirror in ``folder`` of the store with ``digest``. The result's ``faults`` has the errors of bad shards.

    Raises StoreError if the mirror is missing, incomplete, or the copy of another store.
    """
    if (found := read_manifest(store_folder(folder)).digest) != digest:
        raise StoreFormatError(
            f"{folder} is the copy of another store: its digest is {found}, and not {digest}.",
            "Remove that folder, and make the mirror again.",
        )
    return ExpertStore.open(folder, readers=readers, damaged=True)


def open_store(folder: Path) -> ExpertStore | MirroredStore:
    """Open a model directory or its ``experts.zarr``, with its mirrors.

    Mirrors that can't be used are named in the log. If any mirror can be used, a shard that is bad in one copy is read
    from another. If there is none, this does the same as ``ExpertStore.open``, and raises the same errors.
    """
    directory = store_folder(folder).parent
    try:
        listed = read_mirrors(directory)
    except StoreError as error:
        _log.warning("No mirror is used: %s %s", error.cause, error.fix)
        listed = []
    with contextlib.ExitStack() as opening:
        mirrors = []
        for path in listed:
            try:
                mirror = opening.enter_context(open_mirror(path, read_manifest(store_folder(folder)).digest))
                _check(mirror)
            except StoreError as error:
                _log.warning("The mirror %s of %s is not used: %s", path, directory, error.cause)
            else:
                mirrors.append(mirror)
        if not mirrors:
            return ExpertStore.open(folder)
        store = opening.enter_context(ExpertStore.open(folder, damaged=True))
        _check(store)
        found = MirroredStore([store, *mirrors])
        opening.pop_all()
        return found


def _check(store: ExpertStore) -> None:
    """Log each bad shard of a store that was opened with ``damaged``. If there is none, check the digest."""
    for _, fault in sorted(store.faults.items()):
        _log.warning("%s Another copy is read.", fault.cause)
    if not store.faults:
        store.check_digest()


class MirroredStore(Closeable):
    """The records of a model directory and of its mirrors. Thread-safe."""

    def __init__(self, stores: Sequence[ExpertStore]) -> None:
        """Read from ``stores``, which are closed with this one: the model directory's, and its mirrors.

        Raises the StoreError of a shard that is bad in all of them.
        """
        for block, fault in sorted(stores[0].faults.items()):
            if all(block in store.faults for store in stores):
                raise fault
        self.folder = stores[0].folder
        self.manifest: Manifest = stores[0].manifest
        self._copies = [_Copy(store) for store in stores]
        self._lock = threading.Lock()  # guards the copies' state
        self._watchers: list[Callable[[], None]] = []
        self._use = UseCount(f"The store {self.folder}")

    def on_fault(self, watcher: Callable[[ChecksumError], None]) -> None:
        """Register a watcher of the model directory's own records, as ``ExpertStore.on_fault`` does."""
        self._copies[0].store.on_fault(watcher)

    def on_recovery(self, watcher: Callable[[], None]) -> None:
        """Register ``watcher``. It is called in any thread after each record that one copy failed and another gave."""
        self._watchers.append(watcher)

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Callable[[], bool] | None = None) -> None:
        """Read a record, as ``RecordReader`` specifies. After an error, the whole record is read from a single copy.

        Raises the same errors as ``ExpertStore.read_into``.
        """
        with self._use:
            self.manifest.check_keys(key.block, (key,))
            view, used = as_bytes(buffer), set[_Copy]()
            try:
                crc = read_in_steps(view, pause, partial(self._fill, key, used))
                self._copies[0].store.check_record(key, view, crc)
            except StoreError as error:
                self._recover(key, buffer, pause, used, error)
            else:
                for copy in used:
                    copy.failures = 0

    def close(self) -> None:
        """Wait for running reads, and close all copies. Idempotent."""
        self._use.close()
        for copy in self._copies:
            copy.store.close()

    def _fill(
        self,
        key: ExpertKey,
        used: set[_Copy],
        start: int,
        part: memoryview,
        payload: memoryview,
        piece: int,
        crc: int,
    ) -> int:
        """Read a part of a record, as a ``Fill`` for ``read_in_steps``. Add the copies that are read to ``used``."""
        shares = self._share(key, len(part))
        used.update(copy for copy, _ in shares)
        reads, first = [], 0
        for copy, length in shares:
            for begin in range(first, first + length, piece):
                end = min(begin + piece, first + length)
                read = partial(self._read, copy, key, start + begin, part[begin:end])
                reads.append(Read(copy.store.pool, read, payload[begin:end]))
            first += length
        try:
            return run_reads(reads, crc)
        finally:
            with self._lock:
                for copy, length in shares:
                    copy.queued -= length

    def _share(self, key: ExpertKey, length: int) -> list[tuple[_Copy, int]]:
        """Divide ``length`` bytes between two copies so that both finish at the same time.

        Return each copy and its number of bytes. The copies are the two that would finish soonest. If the second of
        them would get less than LEAST_BYTES, the first gets all, as so little is not worth a read. But a copy that was
        not read for STALE seconds takes the place of the second, and gets at least LEAST_BYTES (or all if ``length`` is
        less). So its rate is measured again.
        """
        with self._lock:
            now = time.monotonic()
            usable = [copy for copy in self._copies if copy.may_read(key, now)] or self._copies
            first, *others = sorted(usable, key=lambda copy: copy.seconds(length))
            stale = [copy for copy in others if copy.is_stale(now)]
            shares = [(first, length)]
            if others:
                second = (stale or others)[0]
                seconds = (first.queued + second.queued + length) / (first.rate + second.rate)
                rest = length - max(round((seconds * first.rate - first.queued) / PAGE) * PAGE, LEAST_BYTES)
                if stale:
                    rest = min(max(rest, LEAST_BYTES), length)
                if rest >= LEAST_BYTES or stale:
                    shares = [(first, length - rest), (second, rest)]
            shares = [(copy, share) for copy, share in shares if share]
            for copy, share in shares:
                copy.queued += share
            return shares

    def _read(self, copy: _Copy, key: ExpertKey, start: int, part: memoryview) -> None:
        """Read ``part`` from one copy, and note how long the read took or that it failed."""
        try:
            shard, record = copy.store.locate(key)
            with self._lock:
                copy.begin(time.monotonic())
            length = 0
            try:
                shard.read(record + start, part)
                length = len(part)
            finally:
                with self._lock:
                    copy.end(time.monotonic(), length)
            shard.uncache(record + start, len(part))
        except StoreError as error:
            self._fail(copy, key, error)
            raise

    def _recover(
        self,
        key: ExpertKey,
        buffer: memoryview,
        pause: Callable[[], bool] | None,
        used: Collection[_Copy],
        error: StoreError,
    ) -> None:
        """Read a record from one copy after another until one succeeds. Raises the last error if none does.

        ``error`` was raised by the read of the record from the copies ``used``.
        """
        now, failed, last = time.monotonic(), [], error
        with self._lock:
            copies = sorted(self._copies, key=lambda copy: (not copy.may_read(key, now), copy in used, copy.failures))
        for copy in copies:
            try:
                copy.store.read_into(key, buffer, pause)
            except StoreError as again:
                self._fail(copy, key, again)
                failed.append(copy)
                last = again
                continue
            cause = (last if failed else error).cause
            if isinstance(error, ChecksumError):  # this copy is good, so the part of another one was wrong
                for other in {*used} - {copy, *failed}:
                    self._fail(other, key, error)
                    cause = f"{key}: checksum mismatch in {other.store.path(key.block)}."
            _log.warning("%s It was read from %s instead.", cause, copy.store.folder.parent)
            for watcher in self._watchers:
                watcher()
            return
        raise last

    def _fail(self, copy: _Copy, key: ExpertKey, error: StoreError) -> None:
        """Note that a copy failed a read. After FAILURES failures in a row, set the copy aside for REST seconds."""
        with self._lock:
            if isinstance(error, ChecksumError):
                copy.damaged.add(key)
            copy.failures += 1
            now = time.monotonic()
            rests = copy.failures >= FAILURES and now >= copy.rests_until
            if rests:
                copy.rests_until = now + REST
        if rests:
            _log.warning("%s is set aside for %.0f s: %s", copy.store.folder.parent, REST, error.cause)


class _Copy:
    """One copy of the records, the recent rate of its disk, and the number of bytes still to be read from it."""

    def __init__(self, store: ExpertStore) -> None:
        self.store = store
        self.queued = 0  # bytes of parts that are not read yet
        self.damaged: set[ExpertKey] = set()  # records with a wrong checksum
        self.failures = 0  # failed reads since the last good one
        self.rests_until = 0.0  # time until which the copy is set aside
        # bytes that were read recently, and the seconds that it took; they begin with a guess of little weight
        self._bytes, self._seconds = 1e6, 1e-3
        self._reading = 0  # number of reads in progress
        self._since = 0.0  # when the latest read ended or, if that is later, the first of those in progress began

    @property
    def rate(self) -> float:
        """Recent rate of the disk, in bytes per second."""
        return self._bytes / self._seconds

    def seconds(self, length: int) -> float:
        """Return the seconds until the queued bytes and ``length`` more would be read."""
        return (self.queued + length) / self.rate

    def begin(self, now: float) -> None:
        """Note that a read begins."""
        if not self._reading:
            self._since = now
        self._reading += 1

    def end(self, now: float, length: int) -> None:
        """Note that a read of ``length`` bytes has ended. Time that several reads share counts once."""
        passed, self._since = now - self._since, now
        fades = math.exp(-passed / MEMORY)
        self._bytes = fades * self._bytes + length
        self._seconds = fades * self._seconds + passed
        self._reading -= 1

    def is_stale(self, now: float) -> bool:
        """Return whether the copy was not read for so long that its rate may have changed."""
        return not self._reading and now - self._since > STALE

    def may_read(self, key: ExpertKey, now: float) -> bool:
        """Return whether a record should be read from this copy if another copy has it too."""
        return now >= self.rests_until and key not in self.damaged and key.block not in self.store.faults
