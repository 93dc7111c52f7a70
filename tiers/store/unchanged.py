"""Notice that an open file was written to, by its size and times, and by samples of its bytes.

Two sorts of writes are noticed late or not at all. A write through another process's mapping is noticed late: the
kernel notes its time when it writes the pages to the disk. If a program writes to a file and sets the modification time
back, only the change time (ctime) differs, and that of a file that was moved or backed up does too. So samples of the
bytes decide. They differ if all weights were written anew, but a program that has changed a few tensors may have missed
them.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
from pathlib import Path

from moetier.tiers.closeable import descriptor_closed_on_error
from moetier.tiers.errors import StoreFormatError
from moetier.tiers.layout import PAGE_BYTES

from .atomic import read_errors
from .checksum import crc32c

SAMPLES = 8  # number of pages, from the first to the last; more of them would make the opening slower on a hard disk

_log = logging.getLogger(__name__)


class Unchanged:
    """An open file, compared with its size, its times and samples of its bytes when this object was made. Thread-safe.

    A file that is replaced by another one of the same name is not changed: the descriptor is still that of the old one.
    """

    @classmethod
    def open(cls, path: Path, fix: str) -> Unchanged:
        """Open the file ``path``, which ``close`` closes. Raises StoreReadError, and FileNotFoundError."""
        with read_errors(path):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with descriptor_closed_on_error(descriptor):
            return cls(path, descriptor, fix)

    def __init__(self, path: Path, descriptor: int, fix: str) -> None:
        """Note size, times and samples. ``path`` is the file's name in errors, and ``fix`` the fix that they name.

        Raises StoreReadError.
        """
        self.path = path
        self._descriptor = descriptor
        self._fix = fix
        with read_errors(path):
            self._status = os.fstat(descriptor)
        self._samples = _samples(descriptor, self._status.st_size)
        self._has_warned = False

    def check(self) -> None:
        """Raise StoreFormatError if the file was written to, and StoreReadError if the system reports an error.

        After a read it covers the bytes that were read, as the times change before the bytes do.
        """
        with read_errors(self.path):
            now = os.fstat(self._descriptor)
        before = self._status
        if _state(now) == _state(before):
            return
        if now.st_size != before.st_size:
            what = f"it had {before.st_size:,} bytes, and has {now.st_size:,}"
        elif now.st_mtime_ns != before.st_mtime_ns:
            what = "its modification time differs"
        elif _samples(self._descriptor, now.st_size) != self._samples:
            # a program has written to it and set the modification time back; ctime can't be set
            what = "its change time (ctime) and its content differ"
        else:
            self._status = now
            if _attributes(now) == _attributes(before) and not self._has_warned:
                self._has_warned = True
                _log.warning(
                    "%s is still used. Its change time (ctime) differs, as after it was moved or backed up; its size, "
                    "its modification time and samples of its content do not.",
                    self.path,
                )
            return
        raise StoreFormatError(f"{self.path} was changed while it was in use: {what}.", self._fix)

    def is_replaced(self) -> bool:
        """Return whether the path names another file now, or none."""
        try:
            return not os.path.samestat(self.path.stat(), os.fstat(self._descriptor))
        except OSError:
            return True

    def close(self) -> None:
        """Close the file. Call it once."""
        os.close(self._descriptor)


def _state(status: os.stat_result) -> tuple[int, ...]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _attributes(status: os.stat_result) -> tuple[int, ...]:
    """Return the metadata whose change also changes ctime: link count, mode, owner.

    If they differ, the content may still be the same.
    """
    return status.st_nlink, status.st_mode, status.st_uid, status.st_gid


def _samples(descriptor: int, size: int) -> int:
    """Return the CRC-32C of SAMPLES pages of a file of ``size`` bytes. A page that can't be read counts as zeros."""
    last = max(size - 1, 0) // PAGE_BYTES
    with mmap.mmap(-1, SAMPLES * PAGE_BYTES) as pages, memoryview(pages) as view:  # aligned, as O_DIRECT requires
        for number in range(SAMPLES):
            with view[number * PAGE_BYTES : (number + 1) * PAGE_BYTES] as page, contextlib.suppress(OSError):
                os.preadv(descriptor, [page], last * number // (SAMPLES - 1) * PAGE_BYTES)
        return crc32c(view)
