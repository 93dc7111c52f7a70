"""Space on disks: what is free, and what a folder takes.

A module of its own, because the commands for pulled models use it as well as the converter.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path


def nearest_folder(path: Path) -> Path:
    """Return the deepest existing folder of ``path``: the disk on which it would be made."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def free_bytes(folder: Path) -> int:
    """Return the bytes free on the disk of ``folder``, which need not exist."""
    return shutil.disk_usage(nearest_folder(folder)).free


def disk_bytes(folder: Path) -> int:
    """Return the bytes that the files of ``folder`` take, without holes and targets of links."""
    taken = 0
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
                taken += os.lstat(Path(place, name)).st_blocks * 512
    return taken
