"""Files that survive a crash: written whole, synced, renamed into place; and what a disk answers, as errors."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from moetier.tiers.errors import DiskSpaceError, StoreReadError, TargetError

PARTIAL = ".partial"  # ends the names of files that are being written; zarr never looks for these


@contextlib.contextmanager
def disk_errors(folder: Path, needed: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Turns what the disk answers into errors that say what to do; ``needed`` bytes are still to be written."""
    try:
        yield
    except BrokenPipeError:  # no disk's: of who reads what is said meanwhile
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            disk = os.statvfs(folder)
            raise DiskSpaceError(
                f"The disk of {folder.parent} is full: {needed():,} bytes are still needed, "
                f"{disk.f_bavail * disk.f_frsize:,} are free.",
                "Free some space and run the same command again: it resumes where it stopped.",
            ) from error
        raise TargetError(
            f"{error.filename or folder}: can't be written ({error.strerror}).",
            "Check the folder's permissions and its disk, then run the same command again.",
        ) from error


class read_errors:
    """Turns what the disk answers into a StoreReadError with the path; FileNotFoundError passes."""

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
                "Check the disk and the file's permissions; if it is lost, convert the model again.",
            ) from error


def allocate(descriptor: int, size: int) -> None:
    """Takes the blocks now, so that a full disk shows before the work is done and not after."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError:
        os.ftruncate(descriptor, 0)  # it may have got some of them
        raise


def write_all(descriptor: int, data: memoryview | bytes, position: int) -> None:
    """Writes all of ``data`` at ``position``: one call may write less, and an error then comes with the next."""
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, position)
        if not count:
            raise OSError(errno.EIO, "nothing was written")
        view = view[count:]
        position += count


def make_folders(folder: Path) -> None:
    """Like mkdir -p, and each new name is durable in its parent."""
    if not folder.is_dir():
        make_folders(folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes) -> None:
    """The file has these bytes, whole, after a crash at any moment; or it is as it was."""
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(path)
    sync_folder(path.parent)
