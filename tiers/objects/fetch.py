"""The cache of an address: a folder like a model directory, whose records are fetched when they are needed.

The manifest and the trunk are fetched once. Until all records are in the cache, its manifest has the name FETCHED, and
the file CACHE says where the rest is. Once all are there, the folder is an ordinary model directory.
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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from moetier.tiers.errors import ChecksumError, MissingExpertError, StoreFormatError
from moetier.tiers.fields import Fields
from moetier.tiers.manifest import FileSum, Manifest
from moetier.tiers.store.atomic import PARTIAL, disk_errors, make_folders, sync_folder, write_all, write_durably
from moetier.tiers.store.checksum import PIECE_BYTES
from moetier.tiers.store.folder import (
    CACHE,
    FETCHED,
    GROUP,
    MAX_JSON_BYTES,
    METADATA,
    parse_json,
    read_json,
    user_cache,
)
from moetier.tiers.store.safetensors import MAX_HEADER_BYTES
from moetier.tiers.store.trunk import INDEX, check_sum

from .client import Objects, RefusedReadError, endpoint_of

READS = 8  # GETs of the trunk at the same time
MAX_SMALL_BYTES = 256 << 20  # largest small file, such as the tokenizer's
MAX_SMALL_FILES = 100
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
    Raises TargetError if the user has no home folder.
    """
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

    Raises StoreError if something is missing, damaged or can't be read, TargetError if the cache can't be written, and
    ConfigError if the address can't be used.
    """
    folder = folder_of(address, root)
    with disk_errors(folder):
        make_folders(folder / GROUP)
        lock = os.open(folder / GROUP, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.warning("Waiting for another process, which fetches %s into %s.", address, folder)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / CACHE).exists():
                if limit is not None and limit != cache_of(folder)[1]:
                    _write_cache(folder, address, limit)
            else:
                with _fetching(address) as source:
                    _fetch_all(*source, folder, progress)
                _write_cache(folder, address, limit)
        finally:
            os.close(lock)
    return folder


def outline(address: str, root: Path | None = None) -> Path:
    """Return a folder that describes the model at ``address``: its cache, or else a temporary folder without weights.

    The temporary folder has the manifest, small files, and trunk files of the right size, of which only the headers are
    there. Raises as ``fetch``.
    """
    folder = folder_of(address, root)
    if (folder / CACHE).exists():
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
    key = f"{GROUP}/{METADATA}"
    try:
        data = pool.submit(objects.read_whole, key, MAX_JSON_BYTES).result()
    except MissingExpertError as error:
        raise StoreFormatError(
            f"There is no model at {objects.where}: it has no {key}.",
            "Check the address. If `moetier push` was interrupted, run it again.",
        ) from error
    fix = "Push the model again."
    attributes = parse_json(data, f"{key} at {objects.where}", fix).get("attributes")
    manifest = Manifest.from_json(attributes.get("moetier") if isinstance(attributes, dict) else None, objects.where)
    if not manifest.record_checksums:
        raise StoreFormatError(
            f"The manifest at {objects.where} has no checksums of records: an old version of moetier wrote it.",
            "Convert the model again, and push it.",
        )
    _fetch_small(objects, pool, folder, manifest)
    absent = {name: entry for name, entry in manifest.trunk.items() if not _is_there(folder / name, entry)}
    with progress(sum(entry.bytes for entry in absent.values())) as advance:
        for name, entry in absent.items():
            (_fetch_header if headers else _fetch_trunk)(objects, pool, folder / name, entry, advance)
    write_durably(folder / GROUP / FETCHED, data)


def is_small(name: str) -> bool:
    """Return whether an object or file of this name is fetched with a model, as the tokenizer's files are."""
    return SMALL.fullmatch(name) is not None and name not in NOT_SMALL


def _fetch_small(objects: Objects, pool: ThreadPoolExecutor, folder: Path, manifest: Manifest) -> None:
    listed, required = pool.submit(objects.sizes).result(), [f"{GROUP}/{name}/{METADATA}" for name in manifest.layouts]
    if manifest.trunk:
        required += REQUIRED
    if listed is None:
        names = list(GUESSED if manifest.trunk else ())
    else:
        names = [name for name in listed if is_small(name) and name not in REQUIRED]
    if len(names) > MAX_SMALL_FILES:
        raise StoreFormatError(f"{objects.where} has {len(names)} small files.", "Check the address.")

    def copy(name: str) -> None:
        try:
            data = objects.read_whole(name, MAX_SMALL_BYTES)
        except MissingExpertError:
            if name in required:
                raise
            return
        except RefusedReadError:  # S3 answers so for what does not exist, where it may not be listed
            if name in required or listed is not None:
                raise
            return
        make_folders((folder / name).parent)
        write_durably(folder / name, data)

    for _ in pool.map(copy, [*required, *names]):
        pass


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
    partial = path.with_name(path.name + PARTIAL)
    try:
        _fetch_pieces(objects, pool, path.name, partial, entry, advance)
        if not _is_there(partial, entry):
            raise ChecksumError(
                f"{path.name} at {objects.where}: checksum mismatch.",
                "Push the original again with `moetier push --overwrite`.",
            )
    except BaseException:
        partial.unlink(missing_ok=True)  # it may have its whole size
        raise
    partial.rename(path)
    sync_folder(path.parent)


def _fetch_pieces(
    objects: Objects, pool: ThreadPoolExecutor, name: str, path: Path, entry: FileSum, advance: Advance
) -> None:
    """Write the object ``name`` to a new file, in parallel pieces. If it fails, ``objects`` is closed."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        os.posix_fallocate(descriptor, 0, entry.bytes)

        def piece(start: int) -> int:
            view = memoryview(bytearray(min(PIECE_BYTES, entry.bytes - start)))
            objects.read(name, start, view)
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
