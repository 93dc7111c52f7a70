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
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

from moetier.tiers.addresses import check_address, endpoint_of
from moetier.tiers.errors import ChecksumError, MissingExpertError, StoreFormatError
from moetier.tiers.fields import Fields
from moetier.tiers.manifest import FileSum, Manifest
from moetier.tiers.ownership import check_cache_folder
from moetier.tiers.store.atomic import PARTIAL, disk_errors, make_folders, sync_folder, write_all, write_durably
from moetier.tiers.store.checksum import PIECE_BYTES, crc32c
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
from moetier.tiers.store.safetensors import MAX_HEADER_BYTES
from moetier.tiers.store.trunk import INDEX, check_sum

from .client import Objects, RefusedReadError, until_right

READS = 8  # GETs of the trunk at the same time
MAX_SMALL_BYTES = 256 << 20  # most bytes of all small files, such as the tokenizer's
MAX_SMALL_FILES = 100
SLACK_BYTES = 1 << 20  # by which an answer may be longer than the small file, so that it can be said what it is
PAGE = re.compile(rb"\s*<(!doctype html|html)\b", re.IGNORECASE)
DAMAGED = (
    "Nothing of it was cached. See what the server sends (a proxy or a sign-in page may answer in its place). If the "
    "object itself is damaged, write it again: moetier push --overwrite DIR ADDRESS"
)
HEADER_BYTES = 1 << 20  # first bytes of a trunk file that are fetched for its header
# names of the small files that are fetched, if objects can be listed
SMALL = re.compile(r"(additional_chat_templates/)?\w[\w.-]*\.(json|jinja|txt|tiktoken|model(\.v\d+)?)")
NOT_SMALL = ("mirrors.json", "conversion.json", CACHE)
REQUIRED = ("config.json", INDEX)
# names of the small files that are tried, if objects can't be listed
GUESSED = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "origin.json"),
)

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
                with _fetching(address) as source:
                    _fetch_all(*source, folder, progress)
                _write_cache(folder, address, limit)
                return folder
            if damaged := _damaged(folder):
                _log.warning("Files of %s are damaged, and are fetched again: %s.", folder, ", ".join(damaged))
                with _fetching(address) as source:
                    _fetch_small(*source, folder, read_manifest(folder / GROUP), damaged)
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
    with disk_errors(folder), _fetching(address) as source:
        make_folders(folder / GROUP)
        _fetch_all(*source, folder, _silent, headers=True)
        _write_cache(folder, address, None)
    return folder


def cache_of(folder: Path) -> tuple[str, int | None]:
    """Return the address of a cache's folder, and the bytes of records that it may hold. Raises StoreError."""
    fix = f"Remove {folder}, and give the address of the model again."
    found = Fields(read_json(folder / CACHE, fix))
    try:
        limit = found["bytes"].number(1, 1 << 60) if found["bytes"].value is not None else None
        return found["address"].text(), limit
    except ValueError as error:
        raise StoreFormatError(f"{folder / CACHE}: {error}.", fix) from error


def _write_cache(folder: Path, address: str, limit: int | None) -> None:
    write_durably(folder / CACHE, json.dumps({"address": address.rstrip("/"), "bytes": limit}).encode() + b"\n")


@contextlib.contextmanager
def _fetching(address: str) -> Iterator[tuple[Objects, ThreadPoolExecutor]]:
    """Yield the objects at an address, and threads in which to call them.

    These threads, and those that obstore starts in them, block all signals. A daemon must handle signals in one thread
    only, and it fetches before it has blocked them in its other threads.
    """
    pool = ThreadPoolExecutor(
        READS,
        thread_name_prefix="moetier-fetch",
        initializer=signal.pthread_sigmask,
        initargs=(signal.SIG_BLOCK, signal.valid_signals()),
    )
    try:
        with pool.submit(Objects, address).result() as objects:
            yield objects, pool
    finally:
        pool.shutdown(cancel_futures=True)


def _fetch_all(
    objects: Objects, pool: ThreadPoolExecutor, folder: Path, progress: Progress, *, headers: bool = False
) -> None:
    """Fetch the manifest, small files and the trunk; with ``headers``, only the headers of the trunk's files.

    Raises as ``fetch``.
    """
    data, manifest = pool.submit(until_right, partial(_read_manifest, objects)).result()
    _fetch_small(objects, pool, folder, manifest)
    absent = {name: entry for name, entry in manifest.trunk.items() if not _is_there(folder / name, entry)}
    with progress(sum(entry.bytes for entry in absent.values())) as advance:
        for name, entry in absent.items():
            (_fetch_header if headers else _fetch_trunk)(objects, pool, folder / name, entry, advance)
    write_durably(folder / GROUP / FETCHED, data)


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
    attributes = parse_json(data, f"{key} at {objects.where}", DAMAGED).get("attributes")
    manifest = Manifest.from_json(attributes.get("moetier") if isinstance(attributes, dict) else None, objects.where)
    if not manifest.record_checksums:
        raise StoreFormatError(
            f"The manifest at {objects.where} has no checksums of records: an old version of moetier wrote it.",
            "Convert the model again, and push it.",
        )
    return data, manifest


def is_small(name: str) -> bool:
    """Return whether an object or file of this name is fetched with a model, as the tokenizer's files are."""
    return SMALL.fullmatch(name) is not None and name not in NOT_SMALL


def _fetch_small(
    objects: Objects, pool: ThreadPoolExecutor, folder: Path, manifest: Manifest, names: Iterable[str] = ()
) -> None:
    """Fetch and check the small files of a model, or only those of ``names``. Raises StoreError."""
    required = [f"{GROUP}/{name}/{METADATA}" for name in manifest.layouts]
    if manifest.trunk:
        required += REQUIRED
    sizes: dict[str, int] | None
    if manifest.files:
        sizes = {name: entry.bytes for name, entry in manifest.files.items()}
        if strangers := [name for name in sizes if not is_small(name) and name not in required]:
            raise StoreFormatError(f"The manifest at {objects.where} has the file {strangers[0]}.", DAMAGED)
    else:
        _log.warning(
            "%s has no checksums of its config and tokenizer, so they are used without a check: `moetier push` of this "
            "version writes them.",
            objects.where,
        )
        sizes = pool.submit(objects.sizes).result()
    there = GUESSED if sizes is None and manifest.trunk else sizes or ()
    wanted = list(names) or list(dict.fromkeys([*required, *filter(is_small, there)]))
    if len(wanted) > MAX_SMALL_FILES or sum((sizes or {}).get(name, 0) for name in wanted) > MAX_SMALL_BYTES:
        raise StoreFormatError(
            f"The small files at {objects.where} are more than {MAX_SMALL_FILES}, or more than {MAX_SMALL_BYTES:,} "
            "bytes.",
            "Check the address.",
        )

    def copy(name: str, most: int) -> int:
        try:
            data = until_right(partial(_read_small, objects, name, manifest.files.get(name), most))
        except MissingExpertError:
            if name in required or name in manifest.files:
                raise
            return 0
        except RefusedReadError:  # S3 answers so for what does not exist, where it may not be listed
            if name in required or sizes is not None:
                raise
            return 0
        make_folders((folder / name).parent)
        write_durably(folder / name, data)
        return len(data)

    if sizes is not None:  # of all of them
        for _ in pool.map(copy, wanted, [sizes.get(name, 0) + SLACK_BYTES for name in wanted]):
            pass
        return
    left = MAX_SMALL_BYTES
    for name in wanted:
        left -= pool.submit(copy, name, left).result()


def _read_small(objects: Objects, name: str, entry: FileSum | None, most: int, fresh: bool) -> bytes:
    """Return a small file, of at most ``most`` bytes. Raises ChecksumError or StoreFormatError if it is damaged.

    Without a sum (``entry`` is None), a file is damaged if it is a web page, or is called .json and is not JSON.
    """
    data, where = objects.read_whole(name, most, fresh=fresh), f"{name} at {objects.where}"
    if PAGE.match(data):
        raise StoreFormatError(f"{where} is a web page, and not the file of a model.", DAMAGED)
    if entry is not None and entry != FileSum(len(data), crc32c(data)):
        raise ChecksumError(f"{where} has other bytes than the manifest says.", DAMAGED)
    if entry is None and name.endswith(".json"):
        try:
            json.loads(data)
        except (ValueError, RecursionError) as error:
            raise StoreFormatError(f"{where} is not JSON ({error}).", DAMAGED) from error
    return data


def _is_there(path: Path, entry: FileSum) -> bool:
    """Return whether a file of the trunk is there, with the right bytes."""
    try:
        for _ in check_sum(path, entry, cached=True):
            pass
    except (FileNotFoundError, ChecksumError):
        return False
    return True


def _fetch_trunk(objects: Objects, pool: ThreadPoolExecutor, path: Path, entry: FileSum, advance: Advance) -> None:
    """Fetch a file of the trunk in parallel pieces, check it, and give it its name. Raises ChecksumError."""
    partial_path = path.with_name(path.name + PARTIAL)

    def read(fresh: bool) -> None:
        _fetch_pieces(objects, pool, path.name, partial_path, entry, (lambda count: None) if fresh else advance, fresh)
        if not _is_there(partial_path, entry):
            raise ChecksumError(f"{path.name} at {objects.where}: checksum mismatch.", DAMAGED)

    try:
        until_right(read)
    except BaseException:
        partial_path.unlink(missing_ok=True)  # it may have its whole size
        raise
    partial_path.rename(path)
    sync_folder(path.parent)


def _fetch_pieces(
    objects: Objects, pool: ThreadPoolExecutor, name: str, path: Path, entry: FileSum, advance: Advance, fresh: bool
) -> None:
    """Write the object ``name`` to a new file, in parallel pieces. If it fails, ``objects`` is closed."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        os.posix_fallocate(descriptor, 0, entry.bytes)

        def piece(start: int) -> int:
            view = memoryview(bytearray(min(PIECE_BYTES, entry.bytes - start)))
            objects.read(name, start, view, fresh=fresh)
            write_all(descriptor, view, start)
            return len(view)

        pieces = [pool.submit(piece, start) for start in range(0, entry.bytes, PIECE_BYTES)]
        try:
            for each in pieces:
                advance(each.result())
        except BaseException:
            objects.close()  # so that none waits for a retry
            raise
        finally:
            for each in pieces:  # none may write once the descriptor is closed
                each.cancel()
            wait(pieces)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fetch_header(objects: Objects, pool: ThreadPoolExecutor, path: Path, entry: FileSum, _: Advance) -> None:
    """Make a file of the trunk with its whole size and its header. The rest of it is a hole."""
    first = memoryview(bytearray(min(HEADER_BYTES, entry.bytes)))
    pool.submit(objects.read, path.name, 0, first).result()
    end = min(8 + int.from_bytes(first[:8], "little"), 8 + MAX_HEADER_BYTES, entry.bytes)
    rest = memoryview(bytearray(max(end - len(first), 0)))
    if rest:
        pool.submit(objects.read, path.name, len(first), rest).result()
    with path.open("wb") as stream:
        stream.write(first[:end])
        stream.write(rest)
        stream.truncate(entry.bytes)
