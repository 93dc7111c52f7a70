"""The folder of pages on disk: their names, and which of them are removed.

A page's name is a digest of the name of the page before it and of its own token ids; the first pages follow a root,
which is a digest of all else that keys and values depend on, and of the API key. So a page is found without an index,
and one of another model, release or key is never found. The pages of a model are in a folder of their own, to be listed
by model. Several processes may use a folder: files are renamed into it, and one that another process has removed counts
as absent.

A page's time of last use is its file's time of modification.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import mmap
import os
import re
import shutil
import stat
import threading
import time
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moetier.tiers.errors import ConfigError
from moetier.tiers.ownership import access_fault
from moetier.tiers.store.atomic import PARTIAL, make_folders

from .page_file import MAX_BYTES, Buffers, DamagedFileError, FileContents, Payload, file_bytes, read_file, write_file

PAGE = ".page"  # suffix of pages
# names of folders and files; other ones are of other programs
FOLDER_NAME = re.compile(r"[0-9a-f]{16}")
FILE_NAME = re.compile(rf"[0-9a-f]{{64}}{re.escape(PAGE)}(\.[0-9a-f]{{8}}{re.escape(PARTIAL)})?")
MODEL = "model"  # name of the file with the model's name
UNFINISHED_SECONDS = 60.0  # seconds after which an unfinished file is removed, as its process has ended
RESERVE = 1 << 30  # bytes of the disk that are left to other programs, but no more than a tenth of it
KEPT_SHARE = 0.9  # share of the size that is left when pages are removed
SWEEP_SHARE = 1 / 16  # pages are counted anew after so much of the size was written: other processes write, too
STATE = (-1,)  # in place of tokens: their ids are not negative
DEPTH_NS = 1000  # ns between the times of pages that are used together: the last of a sequence is removed first

SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # errors that say nothing of a file

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PageOptions:
    """The folder for pages on disk, and its limits.

    Attributes:
        folder: the folder, for all models.
        size: most bytes of all pages.
        seconds: time after which a page that was not used is removed.
    """

    folder: Path
    size: int
    seconds: float


class SavedPage(NamedTuple):
    """A file in the folder."""

    used: int  # time of last use, in ns
    bytes: int
    path: str


def open_folder(folder: Path) -> int:
    """Make the folder of pages if it is missing, and check that no other user can enter it. Return its descriptor.

    Its files are reached by the descriptor. So others may write into its parents: if they put another folder in its
    place, that is not used. Raises ConfigError.
    """
    try:
        make_folders(folder.parent, 0o755)
        with contextlib.suppress(FileExistsError):  # whatever is there is checked below
            folder.mkdir(mode=0o700)
        if folder.is_symlink() or not folder.is_dir():
            raise ConfigError(f"{folder} is not a folder.", "Name another folder.")
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(
            f"The folder {folder} can't be used for keys and values: {error.strerror}.", "Name another folder."
        ) from None
    status = os.fstat(descriptor)
    if fault := access_fault(folder, status):
        os.close(descriptor)
        if status.st_uid != os.getuid() and os.access(folder, os.W_OK):
            fault = fault[0], f"Name a folder in it, which is then made for this user alone: {folder}/pages"
        raise ConfigError(*fault)
    return descriptor


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Path]:
    """Open the folder of pages as ``open_folder`` does. Yield a path on which only the opened folder is reached."""
    descriptor = open_folder(folder)
    try:
        yield _path_of(descriptor)
    finally:
        os.close(descriptor)


def _path_of(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}")


def entries(folder: Path) -> Iterator[SavedPage]:
    """Yield all pages and unfinished files in the folder, for all models. Raises OSError.

    Folders in it that this user can't enter are left out: they are not of servers that use it.
    """
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as models:
        for model in models:
            if FOLDER_NAME.fullmatch(model.name) and model.is_dir(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError, PermissionError), os.scandir(model) as files:
                    yield from filter(None, map(_entry, files))


class ModelPages(NamedTuple):
    """All pages of a model in a folder."""

    name: str
    files: int
    bytes: int
    used: int  # time at which the latest was used, in ns


def models_in(folder: Path) -> list[ModelPages]:
    """Return the models that have pages in a folder, the one that was used last first. Raises ConfigError."""
    _check_exists(folder)
    by_model = dict[Path, list[SavedPage]]()
    with opened(folder) as root:
        for entry in entries(root):
            by_model.setdefault(Path(entry.path).parent, []).append(entry)
        models = [
            ModelPages(_name(place), len(files), sum(file.bytes for file in files), max(files).used)
            for place, files in by_model.items()
        ]
    return sorted(models, key=lambda model: -model.used)


def clear(folder: Path) -> tuple[int, int]:
    """Remove all pages and unfinished files in a folder. Return their number, and their bytes. Raises ConfigError."""
    _check_exists(folder)
    with opened(folder) as root:
        removed = [entry for entry in entries(root) if remove(entry.path)]
        for place in {Path(entry.path).parent for entry in removed}:
            remove(place / MODEL)
            with contextlib.suppress(OSError):  # a server has just written a page
                place.rmdir()
    return len(removed), sum(entry.bytes for entry in removed)


def _name(place: Path) -> str:
    try:
        return (place / MODEL).read_text(errors="replace")[:200]
    except OSError:
        return place.name


def _check_exists(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(
            f"There is no folder {folder}.", "Name the folder that servers use (moetier serve --kv-cache-dir)."
        )


def _entry(file: os.DirEntry[str]) -> SavedPage | None:
    if not FILE_NAME.fullmatch(file.name):
        return None
    try:
        status = file.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    return SavedPage(status.st_mtime_ns, status.st_size, file.path) if stat.S_ISREG(status.st_mode) else None


def remove(path: str | Path) -> bool:
    """Remove a file. Return whether that was possible."""
    try:
        os.unlink(path)  # noqa: PTH108 - of a str
    except FileNotFoundError:
        return True
    except OSError as error:
        _log.warning("%s can't be removed: %s", os.path.realpath(path), error.strerror)
        return False
    return True


class PageFolder:
    """The pages of one model in a folder. Thread-safe, but only one thread may write."""

    def __init__(
        self, options: PageOptions, model: str, binding: bytes, clock: Callable[[], int] = time.time_ns
    ) -> None:
        """Open the folder of ``options``.

        Args:
            options: where the pages are.
            model: name of the model, for people.
            binding: digest of all that keys and values depend on besides the tokens.
            clock: returns the time in ns.

        Raises ConfigError if the folder can't be used.
        """
        self.options = options
        self.damaged = 0  # number of files that were no pages, or not those that they should have been
        self._binding = binding
        self._descriptor = open_folder(options.folder)
        self.close = weakref.finalize(self, os.close, self._descriptor)  # a thread whose disk hangs may still use it
        self._root = _path_of(self._descriptor)
        self._folder = self._root / binding.hex()[:16]
        self._model = model
        self._clock = clock
        self._buffers = Buffers()
        self._counting = threading.Lock()  # guards: ``damaged``
        self._bytes: int | None = None  # of all pages, when they were counted, and those written since; None: unknown
        self._unswept = 0  # bytes written since then
        self._is_named = False  # the file MODEL has the name that the model has now
        self._limit = options.size  # most bytes of all pages, less if the disk is nearly full

    def _open_again(self) -> None:
        """Make the folder again if another process has removed it. Raises ConfigError, and changes nothing then."""
        if self._root.stat().st_nlink:
            return
        descriptor = open_folder(self.options.folder)
        try:
            # at once, so that other threads, which read meanwhile, never reach another program's folder
            os.dup2(descriptor, self._descriptor, inheritable=False)
        finally:
            os.close(descriptor)

    # -- names --------------------------------------------------------------------------------------------------------

    def root(self, key: bytes) -> bytes:
        """Return the name that the first pages follow, for the digest of an API key."""
        return hashlib.sha256(self._binding + hashlib.sha256(key).digest()).digest()

    @staticmethod
    def follow(name: bytes, tokens: Sequence[int]) -> bytes:
        """Return the name of the page that follows the page ``name`` and has ``tokens``.

        If ``tokens`` is STATE, it is the name of the state behind the page ``name``.
        """
        return hashlib.sha256(name + array("q", tokens).tobytes()).digest()

    # -- pages --------------------------------------------------------------------------------------------------------

    def has(self, name: bytes) -> bool:
        """Return whether there is a file with the name of a page, which may be damaged or too old."""
        return os.path.exists(self._path(name))  # noqa: PTH110 - called for each page of a prompt

    def read(self, name: bytes, depth: int) -> FileContents | None:
        """Read a page, and note that it was used. Return None if there is none.

        A page that is damaged or can't be read is removed, so that it is written again. Give the memory of the result
        back with ``release``. ``depth`` is the page's number in its sequence.
        """
        path = self._path(name)
        try:
            if self._is_old(path.stat().st_mtime_ns):
                return None
            contents = read_file(path, name, self._buffers)
        except FileNotFoundError:
            return None
        except (OSError, DamagedFileError) as error:
            with self._counting:
                self.damaged += 1
            shown = self.options.folder / path.relative_to(self._root)
            _log.warning("%s is not used, but computed again: %s", shown, error)
            if getattr(error, "errno", None) not in SHORTAGES:
                remove(path)
            return None
        self.touch(name, depth)
        return contents

    def remove(self, name: bytes) -> None:
        """Remove a page that is of no use, so that it is written again."""
        remove(self._path(name))

    def release(self, memory: mmap.mmap) -> None:
        """Take back the memory of a page."""
        self._buffers.release(memory)

    def memory(self, size: int) -> mmap.mmap:
        """Return memory for a file of ``size`` bytes, which ``release`` takes back."""
        return self._buffers.take(size)

    def fits(self, layout: Any, size: int) -> bool:
        """Return whether a file with ``size`` bytes of data is within the limits of a file and of all files."""
        return file_bytes(layout, size) <= min(self.options.size, MAX_BYTES)

    def touch(self, name: bytes, depth: int) -> None:
        """Note that a page was used. ``depth`` is its number in its sequence."""
        now = self._clock() - DEPTH_NS * depth
        with contextlib.suppress(OSError):
            os.utime(self._path(name), ns=(now, now))

    def write(
        self,
        name: bytes,
        depth: int,
        payload: Payload,
        memory: mmap.mmap,
        before_piece: Callable[[int], None] = lambda _: None,
    ) -> int:
        """Write a page, as ``write_file`` does. If there are too many bytes then, remove other pages.

        ``depth`` is the page's number in its sequence. Returns the size of the file; 0 if it does not fit
        (``fits``), or if another process has removed it, or its folder, meanwhile. Raises OSError, and ConfigError if
        the folder was removed and can't be made again.
        """
        if not self.fits(payload.layout, len(payload.data)):
            return 0
        self._open_again()
        if self._bytes is None:
            self.sweep()
        if self._limit < file_bytes(payload.layout, len(payload.data)):  # it would be removed at once
            self._bytes = None
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        try:
            self._make_folder()
            written = write_file(self._path(name), name, payload, memory, before_piece)
        except FileNotFoundError:
            return 0
        except OSError:
            self._bytes = None  # other programs may have filled the disk
            raise
        self.touch(name, depth)
        assert self._bytes is not None
        self._bytes += written
        self._unswept += written
        if self._bytes > self._limit or self._unswept > SWEEP_SHARE * self._limit:
            self.sweep()
        return written

    def _make_folder(self) -> None:
        """Make the folder of the model, if it is missing, and the file with its present name. Raises OSError."""
        file = self._folder / MODEL
        if self._is_named and file.exists():
            return
        self._folder.mkdir(mode=0o700, exist_ok=True)
        file.touch(mode=0o600)
        if file.read_text(errors="replace") != self._model:
            file.write_text(self._model)
        self._is_named = True

    def sweep(self) -> None:
        """Remove pages that are too old, unfinished files, and if there are too many bytes, those least recently used.

        There are too many, too, if the disk has too little free space for other programs. A file whose time is in the
        future, because the clock was set back, counts as used now.
        """
        now, kept = self._clock(), list[SavedPage]()
        for entry in entries(self._root):
            is_unfinished = entry.path.endswith(PARTIAL)
            is_over = abs(now - entry.used) > UNFINISHED_SECONDS * 1e9 if is_unfinished else self._is_old(entry.used)
            if is_over:
                remove(entry.path)
                continue
            if entry.used > now + UNFINISHED_SECONDS * 1e9:
                with contextlib.suppress(OSError):
                    os.utime(entry.path, ns=(now, now))
                entry = entry._replace(used=now)
            kept.append(entry)
        total = sum(entry.bytes for entry in kept)
        disk = shutil.disk_usage(self._root)
        self._limit = min(self.options.size, total + disk.free - min(RESERVE, disk.total // 10))
        if total > self._limit:
            for entry in sorted(kept):
                if total <= KEPT_SHARE * self._limit:
                    break
                if remove(entry.path):
                    total -= entry.bytes
        self._bytes, self._unswept = total, 0

    def _is_old(self, used: int) -> bool:
        return self._clock() - used > self.options.seconds * 1e9

    def _path(self, name: bytes) -> Path:
        return self._folder / f"{name.hex()}{PAGE}"
