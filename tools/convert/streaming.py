"""Download of a hub checkpoint during its conversion: a file is deleted once all blocks in it are converted.

The trunk's tensors, and the samples for the source's digest, are read after all blocks. So each file is replaced by a
sparse copy, which has these bytes at the same offsets. The download's folder contains:

    whole/NAME          the file as huggingface_hub downloads it
    shards/NAME         the path at which the file is read: first a link to whole/NAME or into huggingface_hub's cache,
                        later the sparse copy
    shards/NAME.kept    the byte ranges that the sparse copy has; all its other bytes read as zeros

Links and sparse copies are made under other names and then renamed, so a run that was killed can be resumed.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from itertools import zip_longest
from pathlib import Path

import numpy as np

from moetier.runtime.checkpoint import hub
from moetier.runtime.checkpoint.blueprint import build_on_meta
from moetier.runtime.checkpoint.containers import Checkpoint, samples
from moetier.runtime.checkpoint.hub import RemoteFile
from moetier.runtime.checkpoint.safetensors_folder import (
    INDEX,
    WEIGHTS,
    copied_files,
    gathered,
    read_json,
    refuse_code,
    weights_of,
    without_weights,
)
from moetier.runtime.formats.tensors import CHUNK_BYTES, StoredTensor, listed, read_range, read_tensors
from moetier.tiers.errors import CheckpointError
from moetier.tiers.layout import PAGE_BYTES
from moetier.tiers.store.atomic import PARTIAL, make_folders, sync_folder, write_all, write_durably
from moetier.tiers.text import format_bytes, some
from moetier.tiers.threads import start_thread
from moetier.tools.cli.progress import ByteProgress

from .conversion_plan import Stage

DOWNLOAD_GRACE = 15.0  # seconds for a download that was told to stop; huggingface_hub gives a silent hub up after 10
MIN_START = 8 + len("{}")  # least number of bytes before a file's tensors: the header's length, and an empty header


class DownloadStopped(BaseException):
    """Raised in the thread that downloads, to stop it before the download is complete."""


class Download:
    """Download of a hub checkpoint, each file of which is on the disk only while blocks are made from it.

    A thread of its own downloads the next file. Not thread-safe. While ``stream`` runs, this process must hold the lock
    of the store that is written (``StoreWriter`` takes it).
    """

    def __init__(
        self,
        name: str,
        revision: str,
        folder: Path,
        files: Mapping[str, RemoteFile],
        tensors: Mapping[str, StoredTensor],
        *,
        keep: bool,
    ) -> None:
        """Prepare the download of a checkpoint, without starting it.

        Args:
            name: id of the checkpoint on the hub.
            revision: the commit.
            folder: folder of the download.
            files: size and sha256 of each file with weights, by name.
            tensors: all tensors of the files, by name; the path in each is the ``shard_path`` of its file.
            keep: download into huggingface_hub's cache, and delete nothing.
        """
        self.revision = revision
        self.keep = keep
        self._name = name
        self._folder = folder
        self._whole = folder.resolve() / "whole"  # resolved, as it is compared with resolved targets of links
        self._names = {shard_path(folder, file): file for file in files}
        self._files = {path: files[file] for path, file in self._names.items()}
        self._tensors: dict[Path, dict[str, StoredTensor]] = {path: {} for path in self._names}
        for tensor in tensors.values():
            self._tensors[tensor.file][tensor.name] = tensor
        self._kept: frozenset[str] = frozenset()
        self._next: Future[None] | None = None
        self._halted = threading.Event()

    def keep_tensors(self, names: Collection[str]) -> None:
        """Set the ``names`` of the tensors that are read after all blocks. Call this before any other method."""
        self._kept = frozenset(names)

    def announce(self, in_order: Sequence[Stage]) -> str:
        """Return a sentence: how many bytes will be downloaded, and how many are on the disk at any one time."""
        coming = sum(self._coming(in_order).values())
        if self.keep:
            return f"{format_bytes(coming)} will be downloaded, and kept in {hub.cache_folder()}"
        largest = _most(in_order, {path: file.size for path, file in self._files.items()})
        return f"{format_bytes(coming)} will be downloaded; at most {format_bytes(largest)} on the disk at any one time"

    def disk_bytes(self, in_order: Sequence[Stage]) -> tuple[int, int]:
        """Return two numbers: the most bytes that the download takes in its folder, and in huggingface_hub's cache."""
        coming = self._coming(in_order)
        if self.keep:
            return 0, sum(coming.values())
        copies = [path for path in self._tensors if not self._cached(path) and not self._has_copy(path)]
        pages = sum(-(-size // PAGE_BYTES) + 1 for path in copies for _, size in self._ranges(path))
        return _most(in_order, coming) + PAGE_BYTES * pages, 0

    def stream(self, in_order: Sequence[Stage], quiet: bool) -> Generator[Stage, None, None]:
        """Yield each stage, ``in_order``, once its files are on the disk; delete files that no later stage needs.

        Files that no stage needs are downloaded last, for their sparse copies. With ``quiet``, no progress is shown.
        Close the generator to stop the download. Raises CheckpointError if the hub does not give a file, or if the file
        is not the expected one.
        """
        try:
            for stage, after in zip_longest(in_order, in_order[1:]):
                if self._next is not None:
                    self._next.result()
                for path in sorted(stage.files):
                    self._fetch(path, quiet)
                if stage.ahead is not None:
                    self._fetch_ahead(stage.ahead, quiet)
                yield stage
                self._release(stage.present - (after.present if after else frozenset()))
            for path in self._tensors:
                if not self._has_copy(path):
                    self._fetch(path, quiet)
                self._release([path])
        finally:
            self._halted.set()
            wait([self._next] if self._next else [], DOWNLOAD_GRACE)

    # what is to be downloaded

    def _coming(self, in_order: Iterable[Stage]) -> dict[Path, int]:
        """Return the size of each file that is still to be downloaded, in bytes."""
        lost = {path for path in self._tensors if not self._has_copy(path)}
        needed = lost.union(*(stage.files for stage in in_order))
        return {path: self._files[path].size for path in needed if not _is_whole(path) and not self._cached(path)}

    def _cached(self, path: Path) -> Path | None:
        return hub.cached(self._name, self._names[path], self.revision)

    # downloading

    def _fetch_ahead(self, path: Path, quiet: bool) -> None:
        self._next = future = Future[None]()

        def fetch() -> None:
            try:
                self._fetch(path, quiet)
                future.set_result(None)
            except BaseException as error:
                future.set_exception(error)

        # a daemon thread: the process can end without waiting for it
        start_thread("moetier-download", fetch)

    def _fetch(self, path: Path, quiet: bool) -> None:
        """Make the file readable at ``path``: download it unless it is on this machine, check it, and link to it.

        Raises CheckpointError as in ``stream``.
        """
        if _is_whole(path):
            return
        name, remote = self._names[path], self._files[path]
        with ByteProgress(name, remote.size, quiet=quiet) as progress:
            file = self._cached(path)
            if file is None:

                def advance(count: int) -> None:
                    self._check_halted()
                    progress.advance(count)

                if not self.keep:
                    make_folders((self._whole / name).parent)
                file = hub.download(self._name, name, self.revision, None if self.keep else self._whole, advance)
                self._check_sum(file, remote, name)
        if read_tensors(file, path) != self._tensors[path]:
            raise CheckpointError(
                f"{file} does not have the tensors that the hub listed for it earlier.",
                "Remove this file, and run the same command again.",
            )
        make_folders(path.parent)
        link = path.with_name(path.name + PARTIAL)
        link.unlink(missing_ok=True)
        link.symlink_to(file.absolute())
        self._check_halted()  # after DOWNLOAD_GRACE seconds stream() returns, and another conversion may use the folder
        link.rename(path)
        sync_folder(path.parent)

    def _check_halted(self) -> None:
        if self._halted.is_set():
            raise DownloadStopped

    def _check_sum(self, file: Path, remote: RemoteFile, name: str) -> None:
        """Check the size and sha256 of a downloaded file, and sync it to the disk, so that a link may mark it as whole.

        If they differ from the hub's, delete the file and raise CheckpointError.
        """
        problem = None
        with file.open("rb") as stream:
            if (size := os.fstat(stream.fileno()).st_size) != remote.size:
                problem = f"it has {size:,} bytes instead of {remote.size:,}"
            elif remote.sha256 is not None and hashlib.file_digest(stream, "sha256").hexdigest() != remote.sha256:
                problem = "its sha256 is not the one that the hub gives"
            if problem is None:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if problem:
            file.resolve().unlink()
            raise CheckpointError(
                f"{name} of {self._name} was damaged during the download: {problem}.",
                "Run the same command again: it resumes where it stopped.",
            )
        for folder in {file.parent, file.resolve().parent}:  # the cache has a link, and the file in another folder
            sync_folder(folder)

    # replacing files by sparse copies

    def _release(self, paths: Iterable[Path]) -> None:
        """Replace the files at ``paths`` by their sparse copies, except those in huggingface_hub's cache."""
        for path in sorted(paths):
            if path.is_symlink() and (whole := path.resolve()).is_relative_to(self._whole):
                self._write_copy(path)
                whole.unlink()
                sync_folder(whole.parent)

    def _ranges(self, path: Path) -> list[list[int]]:
        """Return [offset, number of bytes] of each part of a file that its sparse copy keeps.

        The parts are the header, the tensors given to ``keep_tensors``, and of each other tensor the samples (see
        ``samples``) from which the digest of the checkpoint is computed.
        """
        tensors = sorted(self._tensors[path].values(), key=lambda tensor: tensor.offset)
        ranges = [[0, tensors[0].offset if tensors else self._files[path].size]]
        for tensor in tensors:
            kept = [(tensor.offset, tensor.nbytes)] if tensor.name in self._kept else samples(tensor)
            ranges += [[offset, size] for offset, size in kept]
        return ranges

    def _has_copy(self, path: Path) -> bool:
        """Return whether ``path`` is a sparse copy with the byte ranges of ``_ranges``."""
        if path.is_symlink() or not path.exists():
            return False
        try:
            return bool(json.loads(_kept_path(path).read_bytes()) == self._ranges(path))
        except (FileNotFoundError, ValueError):
            return False

    def _write_copy(self, path: Path) -> None:
        partial, ranges = path.with_name(path.name + PARTIAL), self._ranges(path)
        partial.unlink(missing_ok=True)
        with partial.open("wb", buffering=0) as stream:
            os.ftruncate(stream.fileno(), self._files[path].size)
            for offset, size in ranges:
                for start in range(offset, offset + size, CHUNK_BYTES):
                    piece = np.empty(min(CHUNK_BYTES, offset + size - start), np.uint8)
                    read_range(path, start, piece)
                    write_all(stream.fileno(), piece.data, start)
            os.fsync(stream.fileno())
        write_durably(_kept_path(path), json.dumps(ranges).encode())
        partial.rename(path)
        sync_folder(path.parent)


def open_on_hub(
    name: str,
    folder: Path,
    *,
    revision: str | None = None,
    keep: bool = False,
    or_folder: bool = False,
    ignore_code: bool = False,
) -> tuple[Checkpoint, Download]:
    """Open a hub checkpoint without its weights. Return it, with the download of the weights, which has not begun.

    Small files and the headers of files with weights are downloaded; no network is needed if they are all on this
    machine.

    Args:
        name: id of the checkpoint on the hub.
        folder: the download uses a subfolder of it, named by the commit.
        revision: branch, tag or commit.
        keep: download into huggingface_hub's cache, and delete nothing.
        or_folder: errors also say that there is no folder called ``name``.
        ignore_code: accept a checkpoint that names code of its own. The code is never run.

    Raises CheckpointError, also if the model can't be converted.
    """
    snapshot = hub.fetch(name, revision=revision, or_folder=or_folder)
    config = read_json(snapshot, "config.json")
    if not ignore_code:
        refuse_code(snapshot, config)
    build_on_meta(config, None)  # raises if it can't be converted, before weights are downloaded
    weight_files, named = weights_of(snapshot, config)
    commit = snapshot.name
    place = folder / commit
    local = {}  # by name: the path of a file on this machine, or of its sparse copy, which has the same header and size
    for file in weight_files:
        path = shard_path(place, file)
        if (source := path if path.exists() else hub.cached(name, file, commit)) is not None:
            local[file] = source
    files = _files(name, commit, weight_files, local)
    headers = _headers(name, commit, files, local, place)
    places = {tensor: shard_path(place, file) for tensor, file in named.items()}
    tensors = gathered(headers, places, snapshot / INDEX)
    checkpoint = Checkpoint(
        name=name,
        folder=snapshot,
        source=name,
        ignored_code=ignore_code,
        config=config,
        tensors=tensors,
        copied=copied_files(snapshot),
        revision=commit,
    )
    return checkpoint, Download(name, commit, place, files, tensors, keep=keep)


def _files(name: str, commit: str, weight_files: Sequence[str], local: Mapping[str, Path]) -> dict[str, RemoteFile]:
    if len(local) == len(weight_files):
        return {file: RemoteFile(path.stat().st_size, None) for file, path in local.items()}
    listing = hub.listing(name, commit)
    missing = [file for file in weight_files if file not in listing]
    if missing == [WEIGHTS]:
        raise without_weights(name, listing)
    if missing:
        raise CheckpointError(
            f"{name} lacks {some(missing)}, which its index names.", "Choose another --revision, or another model."
        )
    return {file: listing[file] for file in weight_files}


def _headers(
    name: str, commit: str, files: Mapping[str, RemoteFile], local: Mapping[str, Path], place: Path
) -> dict[Path, dict[str, StoredTensor]]:
    """Return the tensors of each file, by the path at which the file will be read. Raises CheckpointError."""
    fetched = (
        hub.headers(name, [file for file in files if file not in local], commit) if len(local) < len(files) else {}
    )
    tensors = {}
    for file, remote in files.items():
        path = shard_path(place, file)
        if file in local:
            tensors[path] = read_tensors(local[file], path)
            continue
        try:
            tensors[path], start = listed(path, fetched[file], remote.size)
            if start < MIN_START:
                raise ValueError(f"its tensors take {remote.size - start:,} of the file's {remote.size:,} bytes")
        except ValueError as error:
            raise CheckpointError(
                f"{file} of {name} has a malformed header ({error}).", "Choose another --revision, or another model."
            ) from error
    return tensors


def shard_path(folder: Path, file: str) -> Path:
    """Return the path in the download's ``folder`` at which a file of the checkpoint is read."""
    return folder / "shards" / file


def _is_whole(path: Path) -> bool:
    return path.is_symlink() and path.exists()


def _kept_path(path: Path) -> Path:
    return path.with_name(path.name + ".kept")


def _most(in_order: Iterable[Stage], sizes: Mapping[Path, int]) -> int:
    """Return the most bytes of files that are on the disk at any one time. ``sizes``: bytes of each file."""
    together = [stage.at_once for stage in in_order] + [frozenset([path]) for path in sizes]
    return max((sum(sizes.get(path, 0) for path in files) for files in together), default=0)
