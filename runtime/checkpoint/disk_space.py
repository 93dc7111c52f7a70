"""What there is on a disk, and what files take of it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def nearest_folder(path: Path) -> Path:
    """What there is of the way to it: on the same disk, until it is made."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def free_bytes(folder: Path) -> int:
    """Of the disk that a folder, which need not be there, is on."""
    disk = os.statvfs(nearest_folder(folder))
    return disk.f_bavail * disk.f_frsize


def disk_bytes(folder: Path) -> int:
    """That its files take; holes and what links lead to don't count."""
    taken = 0
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
                taken += os.lstat(Path(place, name)).st_blocks * 512
    return taken
