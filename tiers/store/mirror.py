"""Mirrors: complete copies of a store's records on other disks, which are read at the same time as the store itself.

The file MIRRORS in the model directory lists the folders of the mirrors. A *copy* is the store itself or a mirror. Each
record is read in two parts, from the two copies that should finish first, judging by the recent rates of their disks.
If only one copy can be read, that copy is enough.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from moetier.tiers.closeable import closed_on_error
from moetier.tiers.errors import ChecksumError, StoreError, StoreFormatError
from moetier.tiers.fields import Fields
from moetier.tiers.layout import PAGE_BYTES, ExpertKey
from moetier.tiers.locks import UseCount
from moetier.tiers.manifest import Manifest

from .base import DirectoryStore, Pause, WrapperStore
from .folder import MIRRORS, has_store, is_cache, read_json, read_manifest, store_folder
from .pieces import Read, RecordPart, as_bytes, read_in_pieces, run_reads
from .reader import ShardStore

MIN_BYTES = 256 << 10  # smallest part of a record that is worth a read of its own
RATE_SECONDS = 1.0  # seconds of reading over which the rate of a disk is averaged
FAILURES = 3  # number of failures in a row after which a copy is set aside
REST_SECONDS = 60.0  # seconds for which a copy is set aside
STALE = 10.0  # seconds without a read after which the rate of a disk is measured again

_log = logging.getLogger(__name__)


def read_mirrors(directory: Path) -> list[Path]:
    """Return the folders of the mirrors that the file MIRRORS of a model directory lists.

    Returns [] if there is no such file. Raises StoreFormatError if the file is malformed, StoreReadError if it can't be
    read.
    """
    path = directory / MIRRORS
    if not path.exists():
        return []
    fix = f"Remove this file, and run `moetier mirror {directory} FOLDER` again."
    try:
        return [directory / folder.text() for folder in Fields(read_json(path, fix))["mirrors"].items()]
    except ValueError as error:
        raise StoreFormatError(f"{path}: {error}.", fix) from error


def open_mirror(folder: Path, digest: str) -> ShardStore:
    """Open the mirror in ``folder``, even if shards are bad: the property ``faults`` of the result has their errors.

    Raises StoreError if there is no complete mirror in the folder, or if its digest is not ``digest``.
    """
    if (its_digest := read_manifest(store_folder(folder)).digest) != digest:
        raise StoreFormatError(
            f"{folder} is the copy of another store: its digest is {its_digest}, not {digest}.",
            "Remove this folder, and make the mirror again with moetier mirror.",
        )
    return ShardStore.open(folder, damaged=True)


def _check(store: ShardStore) -> None:
    """Log a warning for each bad shard of a store that was opened with ``damaged``. If none is bad, check the digest.

    Raises ChecksumError if the digest is wrong.
    """
    for _, fault in sorted(store.faults.items()):
        _log.warning("%s Another copy is read instead.", fault.cause)
    if not store.faults:
        store.check_digest()


class MirroredStore(WrapperStore):
    """The records of a model directory, read from the directory and from its mirrors."""

    @classmethod
    def recognises(cls, location: Path) -> bool:
        """Return whether ``location`` is a model directory, or its ``experts.zarr``, with a list of mirrors."""
        return (
            has_store(location)
            and not is_cache(folder := store_folder(location))
            and (folder.parent / MIRRORS).exists()
        )

    @classmethod
    def read_manifest(cls, location: Path) -> Manifest:
        """Return the manifest of the store at ``location``."""
        return ShardStore.read_manifest(location)

    @classmethod
    def open(cls, location: Path, *, damaged: bool = False) -> DirectoryStore:
        """Open the store at ``location`` with its mirrors; with ``damaged``, without them.

        Logs a warning for each mirror that can't be used. If at least one can be used, records of a bad shard are read
        from another copy; otherwise only the store itself is opened. Raises the same errors as ``ShardStore.open``, but
        errors of a shard only if the shard is bad in all copies.
        """
        if damaged:
            return ShardStore.open(location, damaged=True)
        directory, digest = store_folder(location).parent, cls.read_manifest(location).digest
        try:
            listed = read_mirrors(directory)
        except StoreError as error:
            _log.warning("No mirror is used: %s %s", error.cause, error.fix)
            listed = []
        with contextlib.ExitStack() as undo:
            mirrors = []
            for path in listed:
                try:
                    with closed_on_error(open_mirror(path, digest)) as mirror:
                        _check(mirror)
                except StoreError as error:
                    _log.warning("The mirror %s of %s is not used: %s", path, directory, error.cause)
                else:
                    mirrors.append(undo.enter_context(mirror))
            if not mirrors:
                return ShardStore.open(location)
            store = undo.enter_context(ShardStore.open(location, damaged=True))
            _check(store)
            mirrored = cls([store, *mirrors])
            undo.pop_all()
            return mirrored

    def __init__(self, stores: Sequence[ShardStore]) -> None:
        """Combine ``stores``: first the model directory's own store, then its mirrors. ``close`` closes all of them.

        Raises a StoreError if a shard is bad in all of them.
        """
        for block, fault in sorted(stores[0].faults.items()):
            if all(block in store.faults for store in stores):
                raise fault.fresh()
        super().__init__(stores[0])
        self._copies = [_Copy(store) for store in stores]
        self._lock = threading.Lock()  # guards: what changes in each of ``_copies``
        self._watchers: list[Callable[[], None]] = []
        self._use = UseCount(f"The store {stores[0].folder}")

    @property
    def faults(self) -> Mapping[int, StoreError]:
        """No faults: each shard is good in one of the copies."""
        return {}

    def on_failover(self, watcher: Callable[[], None]) -> None:
        """Register ``watcher``, to be called each time a read fails but succeeds from another copy."""
        self._watchers.append(watcher)

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Pause | None = None) -> None:
        """Read a record from two copies. After an error, read the whole record again from a single copy.

        Raises the same errors as ``ShardStore.read_into``.
        """
        with self._use.use():
            self.manifest.check_keys(key.block, (key,))
            view, used = as_bytes(buffer), set[_Copy]()
            try:
                crc = read_in_pieces(view, pause, partial(self._read_part, key, used))
                self._copies[0].store.compare_checksums(key, view, crc)
            except StoreError as error:
                self._fail_over(key, buffer, pause, used, error)
            else:
                with self._lock:
                    for copy in used:
                        copy.note_success()

    def close(self) -> None:
        """Wait for the reads in progress, and close all copies."""
        with contextlib.ExitStack() as closing:
            for copy in self._copies:
                closing.callback(copy.store.close)
            self._use.close()

    def _read_part(self, key: ExpertKey, used: set[_Copy], part: RecordPart, crc: int) -> int:
        """Read a part of a record, and add the copies from which it was read to ``used``. See ``ReadPart``."""
        with self._queued(key, len(part.memory)) as assigned:
            used.update(copy for copy, _ in assigned)
            reads, first = [], 0
            for copy, length in assigned:
                for at, memory, payload in part.pieces(first, first + length):
                    read = partial(self._read, copy, key, at, memory)
                    reads.append(Read(copy.store.threads, read, payload))
                first += length
            return run_reads(reads, crc)

    @contextlib.contextmanager
    def _queued(self, key: ExpertKey, length: int) -> Iterator[list[tuple[_Copy, int]]]:
        """Yield copies and numbers of bytes as ``_divide`` returns them. These count as queued within ``with``."""
        with self._lock:
            assigned = self._divide(key, length)
            for copy, nbytes in assigned:
                copy.enqueue(nbytes)
        try:
            yield assigned
        finally:
            with self._lock:
                for copy, nbytes in assigned:
                    copy.dequeue(nbytes)

    def _divide(self, key: ExpertKey, length: int) -> list[tuple[_Copy, int]]:
        """Divide ``length`` bytes between the two copies that would finish first, so that both finish at the same time.

        Returns each copy with its number of bytes. If the second copy would get less than MIN_BYTES, the first copy
        gets all bytes. A copy that was not read for STALE seconds takes the place of the second, so that its rate is
        measured again. Such a copy gets at least MIN_BYTES, or all bytes if ``length`` is less than that. The caller
        holds ``_lock``.
        """
        now = time.monotonic()
        usable = [copy for copy in self._copies if copy.may_read(key, now)] or self._copies
        first, *others = sorted(usable, key=lambda copy: copy.seconds(length))
        stale = [copy for copy in others if copy.is_stale(now)]
        assigned = [(first, length)]
        if others:
            second = (stale or others)[0]
            seconds = (first.queued + second.queued + length) / (first.rate + second.rate)
            rest = length - max(round((seconds * first.rate - first.queued) / PAGE_BYTES) * PAGE_BYTES, MIN_BYTES)
            if stale:
                rest = min(max(rest, MIN_BYTES), length)
            if rest >= MIN_BYTES or stale:
                assigned = [(first, length - rest), (second, rest)]
        return [(copy, nbytes) for copy, nbytes in assigned if nbytes]

    def _read(self, copy: _Copy, key: ExpertKey, start: int, part: memoryview) -> None:
        """Read bytes of a record from one copy into ``part``, beginning ``start`` bytes after the start of the record.

        The duration of the read, or its failure, is noted in ``copy``. Raises StoreError.
        """
        try:
            shard, offset = copy.store.locate(key)
            with self._lock:
                copy.begin(time.monotonic())
            length = 0
            try:
                shard.read(offset + start, part)
                length = len(part)
            finally:
                with self._lock:
                    copy.end(time.monotonic(), length)
            shard.uncache(offset + start, len(part))
        except StoreError as error:
            self._fail(copy, key, error)
            raise

    def _fail_over(
        self,
        key: ExpertKey,
        buffer: memoryview,
        pause: Pause | None,
        used: Collection[_Copy],
        error: StoreError,
    ) -> None:
        """Read a whole record from one copy after another, until a read succeeds. Raises the last error if none does.

        ``error`` is the error of an earlier read of the record, in parts, from the copies ``used``.
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
            if isinstance(error, ChecksumError):  # ``copy`` is good, so the part from another copy was wrong
                for other in {*used} - {copy, *failed}:
                    self._fail(other, key, error)
                    cause = f"{key}: checksum mismatch in {other.store.path(key.block)}."
            _log.warning("%s The record was read from %s instead.", cause, copy.store.folder.parent)
            for watcher in self._watchers:
                watcher()
            return
        raise last

    def _fail(self, copy: _Copy, key: ExpertKey, error: StoreError) -> None:
        """Note that a read from a copy has failed. After FAILURES failures in a row, set the copy aside for a while."""
        with self._lock:
            rests = copy.note_failure(key, error, time.monotonic())
        if rests:
            _log.warning("%s is set aside for %.0f s: %s", copy.store.folder.parent, REST_SECONDS, error.cause)


class _Copy:
    """One copy of the records, the recent rate of its disk, and the number of bytes that are yet to be read from it."""

    def __init__(self, store: ShardStore) -> None:
        self.store = store
        self.queued = 0  # number of bytes of parts that are not read yet
        self.damaged: set[ExpertKey] = set()  # records with a wrong checksum
        self.failures = 0  # number of failed reads since the last read that succeeded
        self.rests_until = 0.0  # time by ``time.monotonic`` until which the copy is set aside
        # recently read bytes, and the seconds that the reads took. The first values are assumptions with little weight
        self._bytes, self._seconds = 1e6, 1e-3
        self._reading = 0  # number of reads in progress
        self._since = 0.0  # time by ``time.monotonic`` up to which the duration of reads has been counted

    @property
    def rate(self) -> float:
        """Recent rate of the disk, in bytes per second."""
        return self._bytes / self._seconds

    def seconds(self, length: int) -> float:
        """Return how many seconds it would take to read the queued bytes and ``length`` more bytes."""
        return (self.queued + length) / self.rate

    def enqueue(self, nbytes: int) -> None:
        """Count ``nbytes`` more that are yet to be read."""
        self.queued += nbytes

    def dequeue(self, nbytes: int) -> None:
        """Count that many bytes less: they were read, or need no longer be read."""
        self.queued -= nbytes

    def note_success(self) -> None:
        """Note that a whole record was read."""
        self.failures = 0

    def note_failure(self, key: ExpertKey, error: StoreError, now: float) -> bool:
        """Note that a read failed at the time ``now``. Return whether the copy is set aside from now on."""
        if isinstance(error, ChecksumError):
            self.damaged.add(key)
        self.failures += 1
        if rests := self.failures >= FAILURES and now >= self.rests_until:
            self.rests_until = now + REST_SECONDS
        return rests

    def begin(self, now: float) -> None:
        """Note that a read begins at the time ``now``."""
        if not self._reading:
            self._since = now
        self._reading += 1

    def end(self, now: float, length: int) -> None:
        """Note that a read of ``length`` bytes ends at the time ``now``. Time that several reads share counts once."""
        passed, self._since = now - self._since, now
        fades = math.exp(-passed / RATE_SECONDS)
        self._bytes = fades * self._bytes + length
        self._seconds = fades * self._seconds + passed
        self._reading -= 1

    def is_stale(self, now: float) -> bool:
        """Return whether the copy was not read for STALE seconds, so that its rate may have changed."""
        return not self._reading and now - self._since > STALE

    def may_read(self, key: ExpertKey, now: float) -> bool:
        """Return whether the copy is not set aside, and neither the record nor its shard is known to be bad in it."""
        return now >= self.rests_until and key not in self.damaged and key.block not in self.store.faults
