"""Notice that an open file was written to, by its size and times.

A write through another process's mapping is not noticed at once: the kernel notes its time when it writes the pages to
the disk.
"""

from __future__ import annotations

import os
from pathlib import Path

from moetier.tiers.errors import StoreFormatError

from .atomic import read_errors


class Unchanged:
    """An open file, compared with its size and times when this object was made. Thread-safe.

    A file that is replaced by another one of the same name is not changed: the descriptor is still that of the old one.
    """

    def __init__(self, path: Path, descriptor: int, advice: str) -> None:
        """Note size and times. ``path`` is the file's name in errors, and ``advice`` what they advise.

        Raises StoreReadError.
        """
        self._path = path
        self._descriptor = descriptor
        self._advice = advice
        with read_errors(path):
            self._known = os.fstat(descriptor)

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
        elif _attributes(found) != _attributes(known):
            # a new link, owner or mode explains the new ctime; so does the removal of the name, as by a replacement
            self._known = found
            return
        else:
            # a program may have written to it and set the modification time back; ctime can't be set
            what = "its change time (ctime) differs, and its links, owner and permissions do not"
        raise StoreFormatError(f"{self._path} was changed while it was in use: {what}.", self._advice)


def _state(found: os.stat_result) -> tuple[int, ...]:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _attributes(found: os.stat_result) -> tuple[int, ...]:
    return found.st_nlink, found.st_mode, found.st_uid, found.st_gid
