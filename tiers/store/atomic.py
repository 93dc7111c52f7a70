"""Write files durably: under a temporary name, then synced, then renamed. Turn OSErrors into errors of moetier."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from moetier.tiers.errors import DiskSpaceError, StoreReadError, TargetError

PARTIAL = ".partial"  # suffix of the temporary names of files; zarr does not open files with this suffix
FLUSH_BYTES = 64 << 20  # most dirty bytes of a large file: more dirty pages would stall in a small cgroup
BEGIN_BYTES = 8 << 20  # the disk begins to write a large file after each of so many bytes

_LIBRARY = ctypes.CDLL(None, use_errno=True)
_LIBRARY.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_LIBRARY.renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
_BEGIN, _FINISH = 2, 7  # SYNC_FILE_RANGE_WRITE, and that with WAIT_BEFORE and WAIT_AFTER
_LIMITS = {  # errors that say nothing of the disk -> what to do
    errno.EMFILE: "Raise the limit on open files: ulimit -n 4096",
    errno.ENFILE: "Close other programs: all open files that this system allows are in use.",
    errno.ENOMEM: "Free some memory, or give smaller values of `ram` and `context`.",
}


@contextlib.contextmanager
def disk_errors(folder: Path, needed: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Turn OSErrors in the ``with`` block, which writes files in ``folder``, into DiskSpaceError or TargetError.

    ``needed`` returns the number of bytes that are still to be written, as far as that is known. The message of
    DiskSpaceError has the number if it explains the error: a disk or a quota may be used up before all bytes that
    statvfs(3) counts as free, and records of the file system take some too.
    """
    try:
        yield
    except BrokenPipeError:  # not an error of the disk: a process that reads this program's output has ended
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            left, free = needed(), shutil.disk_usage(folder).free
            why = "a quota is used up" if error.errno == errno.EDQUOT else "no more can be written"
            if left > free:
                why = f"{left:,} bytes are still needed, {free:,} are free"
            raise DiskSpaceError(
                f"The disk of {folder.parent} is full: {why}.",
                "Free some space and run the same command again: it resumes where it stopped.",
            ) from error
        raise TargetError(
            f"{error.filename or folder} can't be written ({error.strerror}).",
            _LIMITS.get(
                error.errno or 0, "Check the folder's permissions and its disk, then run the same command again."
            ),
        ) from error


class read_errors:
    """Turn OSErrors in the ``with`` block, which reads ``path``, into StoreReadError, except FileNotFoundError."""

    __slots__ = ("_path",)

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise StoreReadError(
                f"{self._path} can't be read: {error.strerror} (errno {error.errno}).",
                _LIMITS.get(
                    error.errno or 0,
                    "Check the disk and the file's permissions. If the file is lost, convert the model again.",
                ),
            ) from error


def write_all(descriptor: int, data: memoryview | bytes, position: int) -> None:
    """Write all of ``data`` to a file, beginning at the offset ``position``. Raises OSError.

    A system call may write only a part of the data. The next call then reports the reason, such as a full disk.
    """
    view = memoryview(data)
    while view:
        if not (count := os.pwrite(descriptor, view, position)):
            raise OSError(errno.EIO, "nothing was written")
        view = view[count:]
        position += count


def make_folders(folder: Path, mode: int = 0o777) -> None:
    """Create a folder and its missing parents, with ``mode`` less the umask.

    The parent of each new folder is synced, so that the new name is durable.
    """
    if not folder.is_dir():
        make_folders(folder.parent, mode)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make new and changed names in a folder durable, with fsync."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LargeFile:
    """A file that ``large_file`` has opened. At most FLUSH_BYTES are dirty; flushed pages leave the page cache.

    The disk writes while the caller works on. ``write`` waits only for what was written FLUSH_BYTES earlier.
    """

    def __init__(self, descriptor: int, errors: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self.written = 0  # number of bytes written so far
        self._begun = 0  # number of bytes that the disk has written or is writing
        self._flushed = 0  # number of bytes that the disk has written, and that are no longer in the page cache
        self._descriptor = descriptor
        self._errors = errors

    def write(self, data: memoryview | bytes) -> None:
        """Append ``data``."""
        with self._errors():
            write_all(self._descriptor, data, self.written)
            self.written += len(data)
            if self.written - self._begun >= BEGIN_BYTES:
                self._sync(self._begun, self.written, _BEGIN)
                self._begun = self.written
                if self.written - self._flushed >= FLUSH_BYTES:
                    self._flush(self.written - FLUSH_BYTES + BEGIN_BYTES)

    def flush(self) -> None:
        """Make all that was written durable, and drop it from the page cache."""
        os.fsync(self._descriptor)
        self._flush(self.written)

    def _flush(self, stop: int) -> None:
        self._sync(self._flushed, stop, _FINISH)
        os.posix_fadvise(self._descriptor, self._flushed, stop - self._flushed, os.POSIX_FADV_DONTNEED)
        self._flushed = stop

    def _sync(self, start: int, stop: int, how: int) -> None:
        """Call sync_file_range, which promises nothing after a crash, unlike ``finish``."""
        if _LIBRARY.sync_file_range(self._descriptor, start, stop - start, how):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


@contextlib.contextmanager
def large_file(
    path: Path, size: int, errors: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
) -> Iterator[LargeFile]:
    """Open a new file of ``size`` bytes, to be written piece by piece. At the end, it replaces ``path``.

    In the ``with`` block, the file has a temporary name. If the block raises an exception, the file is removed. The
    disk space is allocated before the block begins, so that a full disk is detected before the caller's work.
    ``errors`` returns a context manager that translates errors of writing. It encloses each write, but not the whole
    block.
    """
    with _replacing(path) as partial:
        with errors():
            stream = partial.open("wb", buffering=0)
        with stream:
            with errors():
                allocate(stream.fileno(), size)
            file = LargeFile(stream.fileno(), errors)
            yield file
            assert file.written == size, f"{file.written:,} of {size:,} bytes were written"
            with errors():
                file.flush()
        with errors():
            partial.rename(path)
            sync_folder(path.parent)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield the temporary name of a file that will replace ``path``. If the block raises, remove the file."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def allocate(descriptor: int, size: int) -> None:
    """Allocate the disk space of a new file. If that fails, the file is left empty. Raises OSError."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError:
        os.ftruncate(descriptor, 0)  # free what may have been allocated
        raise


@contextlib.contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that the ``with`` block writes, from its beginning to its end.

    After a crash at any moment, the file has either its old content or all of the new. If the block raises an
    exception, the file keeps its old content.
    """
    with _replacing(path) as partial:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(path)
        sync_folder(path.parent)


def write_durably(path: Path, data: bytes) -> None:
    """Write a whole file as a ``durable_file``."""
    with durable_file(path) as stream:
        stream.write(data)


def rename_durably(path: Path, goal: Path) -> None:
    """Rename a file or a folder, and make both names durable. An empty folder at ``goal`` is replaced."""
    path.rename(goal)
    for folder in {path.parent, goal.parent}:
        sync_folder(folder)


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two files or folders atomically and durably. Return False if the file system can't.

    Neither may contain the other. Raises OSError for any other failure.
    """
    if _LIBRARY.renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE):
        number = ctypes.get_errno()
        if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            return False
        raise OSError(number, os.strerror(number), str(other))
    for folder in {one.parent, other.parent}:
        sync_folder(folder)
    return True
