"""Owners and modes of folders: whether other users can change or replace what a process reads there."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from .errors import ConfigError

WRITABLE = stat.S_IWGRP | stat.S_IWOTH


def parent_fault(part: Path, status: os.stat_result) -> tuple[str, str] | None:
    """Return why other users could replace files below a folder, and what to do about it; None if they can't.

    ``part`` is the folder, or a symbolic link on the way, and ``status`` the result of its ``lstat``.
    """
    if status.st_uid in (0, os.getuid()):
        return None
    if stat.S_ISLNK(status.st_mode):
        cause = f"{part} is a symbolic link of another user."
        return cause, "Use a folder whose path does not contain this link."
    if status.st_mode & stat.S_ISVTX:
        return None
    cause = f"{part} belongs to another user, who could replace what is in it."
    return cause, "Use a folder whose parent folders belong to you or to root."


def private_fault(folder: Path) -> tuple[str, str] | None:
    """Return why other users could enter or replace a folder, and what to do about it; None if they can't.

    Raises OSError if the folder can't be reached.
    """
    if (fault := access_fault(folder, folder.lstat())) is not None:
        return fault
    parents = (parent_fault(parent, parent.lstat()) for parent in _parents(folder))
    return next(filter(None, parents), None)


def access_fault(folder: Path, status: os.stat_result) -> tuple[str, str] | None:
    """Return why other users could enter a folder with ``status``, and what to do about it; None if they can't."""
    if not stat.S_ISDIR(status.st_mode):
        return f"{folder} is not a folder.", "Name another folder."
    if status.st_uid != os.getuid():
        return f"{folder} belongs to another user.", "Use a folder of your own."
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return f"{folder} is open to other users.", f"Close it: chmod 700 {folder}"
    return None


def _parents(folder: Path) -> list[Path]:
    """Return all folders and symbolic links on the way to a folder."""
    return [*{path: None for start in (folder.absolute(), folder.resolve()) for path in start.parents}]


def check_cache_folder(root: Path, top: Path) -> None:
    """Check that no other user can change what is in ``top``, a folder in the cache ``root``, or replace it.

    Folders and files must belong to this user or to root, and only their owner may write to them. ``root`` may also be
    a folder like /tmp, in which no user can replace folders of others. Raises ConfigError.
    """
    for part in _parents(root):
        if fault := parent_fault(part, part.lstat()):
            raise ConfigError(*fault)
    status = root.stat()
    if not status.st_mode & stat.S_ISVTX:
        _check(root, root, status)
    status = top.lstat()
    _check(root, top, status)
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):  # else no other user can enter it
        for path in _below(top):
            with contextlib.suppress(FileNotFoundError):  # a writer has just given it its final name, or removed it
                _check(root, path, path.lstat())


def _below(top: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(top):
        yield from (Path(place, name) for name in (*folders, *files))


def _check(root: Path, path: Path, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise ConfigError(f"{path}, in a cache of models, is a symbolic link.", "Remove it.")
    if status.st_uid not in (0, os.getuid()):
        raise ConfigError(
            f"{path}, in which models are cached, belongs to another user.",
            "Name a folder of your own with `store_cache`.",
        )
    if status.st_mode & WRITABLE:
        raise ConfigError(
            f"{path}, in which models are cached, may be written by other users.",
            f"If none of them has changed it, close it: chmod -R go-w {root}. Else name another folder with "
            "`store_cache`.",
        )
