"""Large files are written behind their writer."""

from __future__ import annotations

import contextlib
import errno
import random
from pathlib import Path

import pytest
from faults import mounted

from moetier.tiers.errors import DiskSpaceError
from moetier.tiers.store import atomic
from moetier.tiers.store.atomic import LargeFile, disk_errors, durable_file, exchange, large_file


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "BEGIN_BYTES", 3 << 12)
    monkeypatch.setattr(atomic, "FLUSH_BYTES", 16 << 12)


@pytest.mark.parametrize("piece", [1000, 5 << 12, 40 << 12])
def test_all_pieces_arrive(tmp_path: Path, piece: int) -> None:
    data = random.Random(piece).randbytes((1 << 20) + 17)
    with large_file(tmp_path / "file", len(data)) as file:
        for start in range(0, len(data), piece):
            file.write(data[start : start + piece])
    assert (tmp_path / "file").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_is_not_written_to_its_end_is_removed_and_the_old_one_stays(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with contextlib.suppress(KeyError), durable_file(tmp_path / "file") as stream:
        stream.write(b"half")
        raise KeyError
    with contextlib.suppress(KeyError), large_file(tmp_path / "file", 4) as file:
        file.write(b"half")
        raise KeyError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}


def test_what_the_disk_refuses_is_raised() -> None:
    """A device takes writes, and has no pages that could be written to a disk."""
    with Path("/dev/null").open("wb", buffering=0) as stream, pytest.raises(OSError, match="Illegal seek") as caught:
        LargeFile(stream.fileno(), contextlib.nullcontext).write(bytes(4 << 12))
    assert caught.value.errno == errno.ESPIPE


def test_a_full_disk_with_free_bytes_is_not_said_to_need_none(tmp_path: Path) -> None:
    """It has no room for another file's name."""
    with mounted("tmpfs", tmp_path / "disk", "size=1m,nr_inodes=2") as disk:
        file = disk / "file"
        file.touch()
        with pytest.raises(DiskSpaceError, match="/disk is full: no more can be written"), disk_errors(file):
            (disk / "another").touch()
        needed = "/disk is full: 9,000,000 bytes are still needed, 1,0[0-9,]+ are free"
        with pytest.raises(DiskSpaceError, match=needed), disk_errors(file, lambda: 9_000_000):
            (disk / "another").touch()


def test_names_are_exchanged_if_both_exist(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"1")
    with pytest.raises(FileNotFoundError, match="other"):
        exchange(one, other)
    other.mkdir()
    assert exchange(one, other)
    assert other.read_bytes() == b"1"
    assert one.is_dir()


def test_the_end_of_a_reader_is_no_fault_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(BrokenPipeError), disk_errors(tmp_path):
        raise BrokenPipeError
