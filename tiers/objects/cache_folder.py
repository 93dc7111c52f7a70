"""The cache of an address: a folder like a model directory, whose records are fetched when they are needed.

The manifest, small files and the trunk are fetched once. If the manifest has sums of the small files, as `moetier push`
writes them, a file whose bytes are others is not cached, and one that was damaged in the cache is fetched again. Until
all records are in the cache, its manifest has the name FETCHED, and the file CACHE says where the rest is. Once all are
there, the folder is an ordinary model directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moetier.tiers.addresses import check_address, endpoint_of
from moetier.tiers.errors import ChecksumError, MissingExpertError, StoreFormatError
from moetier.tiers.fields import Fields
from moetier.tiers.headers.safetensors import MAX_HEADER_BYTES
from moetier.tiers.manifest import FileSum, Manifest
from moetier.tiers.ownership import check_cache_folder
from moetier.tiers.store.atomic import PARTIAL, disk_errors, make_folders, sync_folder, write_all, write_durably
from moetier.tiers.store.checksum import READ_PIECE_BYTES
from moetier.tiers.store.folder import (
    CACHE,
    FETCHED,
    GROUP,
    MAX_JSON_BYTES,
    METADATA,
    parse_json,
    read_json,
    read_manifest,
    user_cache,
)
from moetier.tiers.store.trunk import check_sum

from .client import Objects, until_right, wait_for_all
from .small_files import DAMAGED, fetch_small

READS = 8  # GETs of the trunk at the same time
HEADER_BYTES = 1 << 20  # first bytes of a trunk file that are fetched for its header
Advance = Callable[[int], object]
Progress = Callable[[int], contextlib.AbstractContextManager[Advance]]
"""Type of a function that takes the bytes of a whole transfer, and shows its progress.

It returns a context manager, which yields a function: this is called with the bytes of each piece.
"""

_log = logging.getLogger(__name__)

_outlines: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


@contextlib.contextmanager
def _silent(_: int) -> Iterator[Advance]:
    yield lambda count: None


def folder_of(address: str, root: Path | None) -> Path:
    """Return the folder of an address in the cache ``root``; None: ``$XDG_CACHE_HOME/moetier/objects``.

    Its own name is the last part of the address. The folder depends on the endpoint, too, if the environment names one.
    Raises TargetError if the user has no home folder, and as ``check_address``.
    """
    check_address(address)
    address = address.rstrip("/")
    name = re.sub(r"[^\w.-]", "-", address.rpartition("/")[2]).strip(".") or "model"
    root = user_cache("objects") if root is None else root
    what = address + endpoint_of(address).rstrip("/")
    return root.absolute() / hashlib.sha256(what.encode()).hexdigest()[:16] / name


def fetch(address: str, root: Path | None = None, limit: int | None = None, progress: Progress = _silent) -> Path:
    """Return the cache's folder of the model at ``address``, with its manifest and trunk, which are fetched if absent.

    Args:
        address: a URL, such as s3://bucket/model.
        root: folder of all caches; None: ``$XDG_CACHE_HOME/moetier/objects``.
        limit: bytes of records that the cache may hold; None: as before, and no limit for a new cache.
        progress: shows the progress of the trunk's download.

    A cache that needs no change is not written to, so it may be on a disk that is read only.

    Raises StoreError if something is missing, damaged or can't be read, TargetError if the cache can't be written, and
    ConfigError if the address can't be used, or if other users may write to the cache.
    """
    folder = folder_of(address, root)
    top = folder.parent
    with disk_errors(folder):
        make_folders(top.parent, 0o755)
        if not top.exists():
            top.mkdir(0o700, exist_ok=True)  # other users can't enter it, whatever the modes of its files are
        check_cache_folder(top.parent, top)
        if (folder / CACHE).exists() and limit in (None, cache_of(folder)[1]) and not _damaged(folder):
            return folder
        make_folders(folder / GROUP)
        with _locked(folder, address):
            if not (folder / CACHE).exists():
                with _fetching(address, folder) as fetcher:
                    fetcher.fetch_all(progress)
                _write_cache(folder, address, limit)
                return folder
            if damaged := _damaged(folder):
                _log.warning("Files of %s are damaged, and are fetched again: %s.", folder, ", ".join(damaged))
                with _fetching(address, folder) as fetcher:
                    fetcher.fetch_again(damaged)
            if limit not in (None, cache_of(folder)[1]):
                _write_cache(folder, address, limit)
    return folder


@contextlib.contextmanager
def _locked(folder: Path, address: str) -> Iterator[None]:
    """Hold the lock of a cache's folder: one process fetches into it."""
    lock = os.open(folder / GROUP, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("Waiting for another process, which fetches %s into %s.", address, folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _damaged(folder: Path) -> list[str]:
    """Return the names of a cache's small files that are missing or damaged, as far as its manifest has their sums."""
    files = read_manifest(folder / GROUP).files
    return [name for name, entry in files.items() if not _is_there(folder / name, entry)]


def outline(address: str, root: Path | None = None) -> Path:
    """Return a folder that describes the model at ``address``: its cache, or else a temporary folder without weights.

    The temporary folder has the manifest, small files, and trunk files of the right size, of which only the headers are
    there. Raises as ``fetch``.
    """
    folder = folder_of(address, root)
    if (folder / CACHE).exists():
        check_cache_folder(folder.parent.parent, folder.parent)
        return folder
    temporary = tempfile.TemporaryDirectory(prefix="moetier-")
    _outlines.append(temporary)
    folder = Path(temporary.name) / folder.name
    with disk_errors(folder), _fetching(address, folder) as fetcher:
        make_folders(folder / GROUP)
        fetcher.fetch_all(_silent, headers=True)
        _write_cache(folder, address, None)
    return folder


def cache_of(folder: Path) -> tuple[str, int | None]:
    """Return the address of a cache's folder, and the bytes of records that it may hold. Raises StoreError."""
    fix = f"Remove {folder}, and give the address of the model again."
    cache = Fields(read_json(folder / CACHE, fix))
    try:
        limit = cache["bytes"].number(1, 1 << 60) if cache["bytes"].value is not None else None
        return cache["address"].text(), limit
    except ValueError as error:
        raise StoreFormatError(f"{folder / CACHE}: {error}.", fix) from error


def _write_cache(folder: Path, address: str, limit: int | None) -> None:
    write_durably(folder / CACHE, json.dumps({"address": address.rstrip("/"), "bytes": limit}).encode() + b"\n")


@contextlib.contextmanager
def _fetching(address: str, folder: Path) -> Iterator[_Fetcher]:
    """Yield a fetcher of the model at ``address``, which fetches into ``folder`` in threads of its own.

    The threads of the pool, and those that obstore starts in them, block all signals, as signals of a daemon must reach
    its main thread, which blocks them only later.
    """
    pool = ThreadPoolExecutor(
        READS,
        thread_name_prefix="moetier-fetch",
        initializer=signal.pthread_sigmask,
        initargs=(signal.SIG_BLOCK, signal.valid_signals()),
    )
    try:
        with pool.submit(Objects, address).result() as objects:
            yield _Fetcher(objects, pool, folder)
    finally:
        pool.shutdown(cancel_futures=True)


class _Fetcher:
    """Fetches a model's objects into a folder, in the threads of a pool."""

    def __init__(self, objects: Objects, pool: ThreadPoolExecutor, folder: Path) -> None:
        self._objects, self._pool, self._folder = objects, pool, folder

    def fetch_all(self, progress: Progress, *, headers: bool = False) -> None:
        """Fetch the manifest, small files and the trunk; with ``headers``, only the headers of the trunk's files.

        Raises as ``fetch``.
        """

        def fetch_described(fresh: bool) -> tuple[bytes, Manifest]:  # both again, as a push may just be changing both
            data, manifest = self._pool.submit(_read_manifest, self._objects, fresh).result()
            fetch_small(self._objects, self._pool, self._folder, manifest, fresh=fresh)
            return data, manifest

        data, manifest = until_right(fetch_described)
        absent = {name: entry for name, entry in manifest.trunk.items() if not _is_there(self._folder / name, entry)}
        with progress(sum(entry.bytes for entry in absent.values())) as advance:
            for name, entry in absent.items():
                (self._fetch_header if headers else self._fetch_trunk)(self._folder / name, entry, advance)
        write_durably(self._folder / GROUP / FETCHED, data)

    def fetch_again(self, names: Iterable[str]) -> None:
        """Fetch small files that a cache has lost. Raises StoreError."""
        manifest = read_manifest(self._folder / GROUP)
        try:
            until_right(
                lambda fresh: fetch_small(self._objects, self._pool, self._folder, manifest, names, fresh=fresh)
            )
        except (ChecksumError, StoreFormatError, MissingExpertError) as error:
            raise type(error)(
                f"{error.cause} So {self._folder} is of an earlier push, or what came is damaged.",
                f"Remove {self._folder}, and give the address of the model again.",
            ) from error

    def _fetch_trunk(self, path: Path, entry: FileSum, advance: Advance) -> None:
        """Fetch a file of the trunk in parallel pieces, check it, and give it its name. Raises ChecksumError."""
        partial_path = path.with_name(path.name + PARTIAL)

        def read(fresh: bool) -> None:
            self._fetch_pieces(path.name, partial_path, entry, (lambda count: None) if fresh else advance, fresh)
            if not _is_there(partial_path, entry):
                raise ChecksumError(f"{path.name} at {self._objects.where}: checksum mismatch.", DAMAGED)

        try:
            until_right(read)
        except BaseException:
            partial_path.unlink(missing_ok=True)  # it may have its whole size
            raise
        partial_path.rename(path)
        sync_folder(path.parent)

    def _fetch_pieces(self, name: str, path: Path, entry: FileSum, advance: Advance, fresh: bool) -> None:
        """Write the object ``name`` to a new file, in parallel pieces. If it fails, the objects are closed."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            os.posix_fallocate(descriptor, 0, entry.bytes)

            def fetch_piece(start: int) -> int:
                view = memoryview(bytearray(min(READ_PIECE_BYTES, entry.bytes - start)))
                self._objects.read(name, start, view, fresh=fresh)
                write_all(descriptor, view, start)
                return len(view)

            pieces = [self._pool.submit(fetch_piece, start) for start in range(0, entry.bytes, READ_PIECE_BYTES)]
            wait_for_all(self._objects, pieces, advance)  # none may write once the descriptor is closed
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _fetch_header(self, path: Path, entry: FileSum, _: Advance) -> None:
        """Make a file of the trunk with its whole size and its header. The rest of it is a hole."""
        first = memoryview(bytearray(min(HEADER_BYTES, entry.bytes)))
        self._pool.submit(self._objects.read, path.name, 0, first).result()
        end = min(8 + int.from_bytes(first[:8], "little"), 8 + MAX_HEADER_BYTES, entry.bytes)
        rest = memoryview(bytearray(max(end - len(first), 0)))
        if rest:
            self._pool.submit(self._objects.read, path.name, len(first), rest).result()
        with path.open("wb") as stream:
            stream.write(first[:end])
            stream.write(rest)
            stream.truncate(entry.bytes)


def _read_manifest(objects: Objects, fresh: bool) -> tuple[bytes, Manifest]:
    """Return the manifest's file, and the manifest. Raises as ``fetch``."""
    key = f"{GROUP}/{METADATA}"
    try:
        data = objects.read_whole(key, MAX_JSON_BYTES, fresh=fresh)
    except MissingExpertError as error:
        raise StoreFormatError(
            f"There is no model at {objects.where}: it has no {key}.",
            "Check the address. If `moetier push` was interrupted, run it again.",
        ) from error
    return data, parse_manifest(data, objects.where)


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Parse the manifest's file of a model at ``where``. Raises StoreFormatError if it can't be fetched from."""
    attributes = parse_json(data, f"{GROUP}/{METADATA} at {where}", DAMAGED).get("attributes")
    manifest = Manifest.from_json(attributes.get("moetier") if isinstance(attributes, dict) else None, where)
    if not manifest.record_checksums:
        raise StoreFormatError(
            f"The manifest at {where} has no checksums of records: an old version of moetier wrote it.",
            "Convert the model again, and push it.",
        )
    return manifest


def _is_there(path: Path, entry: FileSum) -> bool:
    """Return whether a file of the trunk is there, with the right bytes."""
    try:
        for _ in check_sum(path, entry, cached=True):
            pass
    except (FileNotFoundError, ChecksumError):
        return False
    return True
