"""The lock of a daemon's folder. ``test_entry.py`` runs whole daemons."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from moetier.runtime.daemon.process import LOCK, locked_folder
from moetier.runtime.wire.address import SOCKET
from moetier.tiers.errors import AlreadyRunningError


def descriptors() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def test_a_folder_has_one_daemon_and_what_a_killed_one_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / SOCKET).touch()
    before = descriptors()
    with locked_folder(tmp_path) as was_killed:
        assert was_killed
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
        with pytest.raises(AlreadyRunningError, match=f"it is process {os.getpid()}"), locked_folder(tmp_path):
            pass
    with locked_folder(tmp_path) as was_killed:
        assert not was_killed
    assert list(tmp_path.iterdir()) == []
    assert descriptors() == before


def test_a_lock_that_the_system_refuses_leaves_no_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    before = descriptors()
    with pytest.raises(OSError, match="No locks available"), locked_folder(tmp_path):
        pass
    assert descriptors() == before


def test_the_lock_of_a_file_that_is_removed_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a daemon that ends just now."""
    before, lock, removed = descriptors(), fcntl.flock, list[int]()

    def remove_first(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append(os.stat(descriptor).st_ino)
            (tmp_path / LOCK).unlink()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with locked_folder(tmp_path):
        assert removed
        assert (tmp_path / LOCK).read_text() == f"{os.getpid()}\n"
        with pytest.raises(AlreadyRunningError), locked_folder(tmp_path):
            pass
    assert descriptors() == before
