"""The files of a hub's checkpoint on their way through: each is here for as long as the experts of a block need it.

What is needed longer than that, the trunk's tensors and the samples of the digest, stays where it was in its file: in
a sparse file, which has holes in the place of all else, and takes the whole one's place. So who reads tensors need not
know of any of this. Below ``folder``:

    whole/NAME      as it was downloaded
    shards/NAME     what is read: a link to that, or into huggingface_hub's cache; once it has passed, the sparse file
    shards/NAME.kept    what that has: a hole looks like zeros, and another version may want more than this one kept

Links and files are renamed into place, so a process that is killed leaves what the next one goes on with.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from moetier.runtime.checkpoint import hub
from moetier.runtime.checkpoint.files import samples
from moetier.runtime.checkpoint.hub import RemoteFile
from moetier.runtime.checkpoint.safetensors import CHUNK_BYTES, StoredTensor, read_at, read_header
from moetier.runtime.config import format_bytes
from moetier.tiers.errors import CheckpointError
from moetier.tiers.layout import PAGE
from moetier.tiers.store.atomic import PARTIAL, make_folders, sync_folder, write_all, write_durably
from moetier.tools.cli.progress import Progress

from .ahead import Ahead
from .stages import Stage


class Passage:
    """Used by one thread of the process that holds the lock of the model directory ``folder`` is in; another of its own
    looks ahead."""

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
        """``files`` and ``tensors`` are those of the hub's ``name`` at a commit; the tensors lie in ``shard_path``.
        With ``keep`` files stay in huggingface_hub's cache."""
        self.revision = revision
        self.keep = keep
        self._name = name
        self._folder = folder
        self._names = {shard_path(folder, file): file for file in files}
        self._files = {path: files[file] for path, file in self._names.items()}
        self._tensors: dict[Path, dict[str, StoredTensor]] = {path: {} for path in self._names}
        for tensor in tensors.values():
            self._tensors[tensor.file][tensor.name] = tensor
        self._lasting: frozenset[str] = frozenset()
        self._ahead = Ahead()

    def last(self, tensors: Collection[str]) -> None:
        """Says, before anything passes, which tensors are read behind the blocks."""
        self._lasting = frozenset(tensors)

    # what it takes

    def largest(self, route: Iterable[Stage]) -> int:
        """Bytes of the files that are here at a time, at most."""
        together = [stage.at_once for stage in route] + [frozenset([path]) for path in self._tensors]
        return max(sum(self._files[path].size for path in files) for files in together)

    def here(self, route: Iterable[Stage]) -> int:
        """Bytes that it takes at most beside what it has, on the disk of the model directory."""
        coming = {path: self._files[path].size for path in self._coming(self._needed(route)) if not self._stays(path)}
        together = [stage.at_once for stage in route] + [frozenset([path]) for path in coming]
        most = max((sum(coming.get(path, 0) for path in files) for files in together), default=0)
        staying = sum(
            self._rest_bytes(path) for path in self._tensors if not self._stays(path) and not self._rests(path)
        )
        return most + staying

    def in_cache(self, route: Iterable[Stage]) -> int:
        """Bytes that will be kept in huggingface_hub's cache."""
        return sum(self._files[path].size for path in self._coming(self._needed(route)) if self.keep)

    # what passes

    def let_in(self, paths: Iterable[Path], quiet: bool) -> None:
        """Has them here, whole. Raises CheckpointError, for what was downloaded ahead too."""
        self._ahead.wait()  # for one of these
        for path in sorted(paths):
            if not _is_whole(path):
                self._fetch(path, quiet)

    def look_ahead(self, path: Path, quiet: bool) -> None:
        """Lets it in meanwhile."""
        if not _is_whole(path):
            self._ahead.begin(lambda: self._fetch(path, quiet))

    def halt(self) -> None:
        """Ends what is under way: who resumes it goes on from there."""
        self._ahead.halt()

    def let_go(self, paths: Iterable[Path]) -> None:
        """Of each only what lasts stays, unless it is the cache's."""
        for path in sorted(paths):
            if path.is_symlink() and (whole := path.resolve()).is_relative_to(self._whole):
                self._write_rest(path)
                whole.unlink()
                sync_folder(whole.parent)

    def rest(self, quiet: bool) -> None:
        """Lets those pass that no block has needed."""
        for path in self._tensors:
            if not self._serves(path):
                self.let_in([path], quiet)
            self.let_go([path])

    @property
    def _whole(self) -> Path:
        return self._folder.resolve() / "whole"  # what is compared has no link in it, wherever the folder is

    def _needed(self, route: Iterable[Stage]) -> set[Path]:
        """Those that have to be whole once more."""
        lost = {path for path in self._tensors if not self._serves(path)}
        return lost.union(*(stage.files for stage in route))

    def _coming(self, needed: Iterable[Path]) -> Iterator[Path]:
        """Of those the ones to be downloaded."""
        for path in needed:
            if not _is_whole(path) and not (self._whole / self._names[path]).exists() and not self._cached(path):
                yield path

    def _cached(self, path: Path) -> Path | None:
        return hub.cached(self._name, self._names[path], self.revision)

    def _stays(self, path: Path) -> bool:
        return self.keep or self._cached(path) is not None

    def _fetch(self, path: Path, quiet: bool) -> None:
        name, remote = self._names[path], self._files[path]
        if not self.keep:
            make_folders((self._whole / name).parent)
        with Progress(name, remote.size, quiet=quiet) as progress:
            found = self._cached(path)
            if found is None:
                into = None if self.keep else self._whole

                def told(count: int) -> None:
                    self._ahead.check()
                    progress.advance(count)

                found = hub.download(self._name, name, self.revision, into, told)
                self._check_sum(found, remote, name)
        if moved(read_header(found), path) != self._tensors[path]:
            raise CheckpointError(
                f"{found} is not what the hub said of it before: it has other tensors.",
                "Remove it, and run the same command again.",
            )
        make_folders(path.parent)
        link = path.with_name(path.name + PARTIAL)
        link.unlink(missing_ok=True)
        link.symlink_to(found.absolute())
        self._ahead.check()  # who was told to end may have gone on for longer than anybody waited
        link.rename(path)
        sync_folder(path.parent)

    def _check_sum(self, found: Path, remote: RemoteFile, name: str) -> None:
        """Has it on the disk before a link says that it is whole. Raises CheckpointError, and removes a file whose
        bytes are not the hub's."""
        problem = None
        with found.open("rb") as stream:
            if (size := os.fstat(stream.fileno()).st_size) != remote.size:
                problem = f"it has {size:,} bytes, and should have {remote.size:,}"
            elif remote.sha256 is not None and hashlib.file_digest(stream, "sha256").hexdigest() != remote.sha256:
                problem = "its sha256 is another than the hub says"
            if problem is None:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if problem:
            found.resolve().unlink()
            raise CheckpointError(
                f"{name} of {self._name} was damaged on its way: {problem}.",
                "Run the same command again: it resumes where it stopped.",
            )
        for folder in {found.parent, found.resolve().parent}:  # of the cache's link, and of what it leads to
            sync_folder(folder)

    # what stays

    def _ranges(self, path: Path) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of what stays of a file: its header, what lasts, and samples of all else."""
        tensors = sorted(self._tensors[path].values(), key=lambda tensor: tensor.offset)
        yield 0, tensors[0].offset if tensors else self._files[path].size
        for tensor in tensors:
            yield from [(tensor.offset, tensor.nbytes)] if tensor.name in self._lasting else samples(tensor)

    def _rests(self, path: Path) -> bool:
        """Whether all that is to stay of it is in the sparse file."""
        if not path.is_file() or path.is_symlink():
            return False
        try:
            kept = {(offset, size) for offset, size in json.loads(_kept(path).read_bytes())}
        except (FileNotFoundError, ValueError, TypeError):
            return False
        return kept.issuperset(self._ranges(path))

    def _serves(self, path: Path) -> bool:
        """Whether the trunk, and the samples, can be read from it."""
        return _is_whole(path) or self._rests(path)

    def _rest_bytes(self, path: Path) -> int:
        """About what those take on a disk: whole pages."""
        return sum(-(-size // PAGE) * PAGE + PAGE for _, size in self._ranges(path))

    def _write_rest(self, path: Path) -> None:
        partial = path.with_name(path.name + PARTIAL)
        partial.unlink(missing_ok=True)
        with partial.open("wb", buffering=0) as stream:
            os.ftruncate(stream.fileno(), self._files[path].size)
            for offset, size in self._ranges(path):
                for start in range(offset, offset + size, CHUNK_BYTES):
                    piece = np.empty(min(CHUNK_BYTES, offset + size - start), np.uint8)
                    read_at(path, start, piece)
                    write_all(stream.fileno(), piece.data, start)
            os.fsync(stream.fileno())
        write_durably(_kept(path), json.dumps(list(self._ranges(path))).encode())
        partial.rename(path)
        sync_folder(path.parent)

    def announce(self, route: Iterable[Stage]) -> str:
        coming = sum(self._files[path].size for path in self._coming(self._needed(route)))
        if self.keep:
            return f"{format_bytes(coming)} are downloaded, and kept in {hub.cache_place()}"
        return f"{format_bytes(coming)} are downloaded; at most {format_bytes(self.largest(route))} are here at a time"


def shard_path(folder: Path, file: str) -> Path:
    return folder / "shards" / file


def _is_whole(path: Path) -> bool:
    return path.is_symlink() and path.exists()


def _kept(path: Path) -> Path:
    return path.with_name(path.name + ".kept")


def moved(tensors: Mapping[str, StoredTensor], file: Path) -> dict[str, StoredTensor]:
    """The same, in another file."""
    return {name: replace(tensor, file=file) for name, tensor in tensors.items()}
