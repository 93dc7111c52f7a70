"""Notice that an open file was written to, by its size and times, and by samples of its bytes.

Two kinds of writes are not noticed. A write through another process's mapping is noticed late: the kernel notes its
time when it writes the pages to the disk. If a program writes to a file and sets the modification time back, only the
change time (ctime) differs, and that of a file that was moved or backed up does too. So samples of the bytes decide.
They differ if all weights were written anew, but a program that has changed a few tensors may have missed them.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
from pathlib import Path

from moetier.tiers.errors import StoreFormatError
from moetier.tiers.layout import PAGE

from .atomic import read_errors
from .checksum import crc32c

SAMPLES = 8  # number of pages, from the first to the last; more of them would make the opening slower on a hard disk

_log = logging.getLogger(__name__)


class Unchanged:
    """An open file, compared with its size, its times and samples of its bytes when this object was made. Thread-safe.

    A file that is replaced by another one of the same name is not changed: the descriptor is still that of the old one.
    """

    def __init__(self, path: Path, descriptor: int, advice: str) -> None:
        """Note size, times and samples. ``path`` is the file's name in errors, and ``advice`` what they advise.

        Raises StoreReadError.
        """
        self._path = path
        self._descriptor = descriptor
        self._advice = advice
        with read_errors(path):
            self._known = os.fstat(descriptor)
        self._samples = _samples(descriptor, self._known.st_size)
        self._has_warned = False

    def check(self) -> None:
        """Raise StoreFormatError if the file was written to, and StoreReadError if the system reports an error.

        After a read it covers the bytes that were read, as the times change before the bytes do.
        """
        with read_errors(self._path):
            found = os.fstat(self._descriptor)
        known = self._known
        if _state(found) == _state(known):
            return
        if found.st_size != known.st_size:
            what = f"it had {known.st_size:,} bytes, and has {found.st_size:,}"
        elif found.st_mtime_ns != known.st_mtime_ns:
            what = "its modification time differs"
        elif _samples(self._descriptor, found.st_size) != self._samples:
            # a program has written to it and set the modification time back; ctime can't be set
            what = "its change time (ctime) and its content differ"
        else:
            self._known = found
            if _attributes(found) == _attributes(known) and not self._has_warned:
                self._has_warned = True
                _log.warning(
                    "%s is still used. Its change time (ctime) differs, as after it was moved or backed up; its size, "
                    "its modification time and samples of its content do not.",
                    self._path,
                )
            return
        raise StoreFormatError(f"{self._path} was changed while it was in use: {what}.", self._advice)


def _state(found: os.stat_result) -> tuple[int, ...]:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _attributes(found: os.stat_result) -> tuple[int, ...]:
    """Return what explains another ctime: links (a replaced file has one less), mode and owner."""
    return found.st_nlink, found.st_mode, found.st_uid, found.st_gid


def _samples(descriptor: int, size: int) -> int:
    """Return the CRC-32C of SAMPLES pages of a file of ``size`` bytes. A page that can't be read counts as zeros."""
    last = max(size - 1, 0) // PAGE
    with mmap.mmap(-1, SAMPLES * PAGE) as pages, memoryview(pages) as view:  # aligned, as O_DIRECT requires
        for number in range(SAMPLES):
            with view[number * PAGE : (number + 1) * PAGE] as page, contextlib.suppress(OSError):
                os.preadv(descriptor, [page], last * number // (SAMPLES - 1) * PAGE)
        return crc32c(view)
