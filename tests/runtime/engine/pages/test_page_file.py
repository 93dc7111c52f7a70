"""A page is read as it was written, or not at all: whatever was done to its file."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from faults import flip_bit, mounted

from moetier.runtime.engine.pages.page_file import (
    ALIGNMENT,
    NAME_BYTES,
    Buffers,
    DamagedFileError,
    Payload,
    head_bytes,
    read_file,
    write_file,
)

NAME, OTHER = bytes(range(NAME_BYTES)), bytes(NAME_BYTES)
LAYOUT = [[0, "bfloat16", 4, 16, 4, 16]]


def write(path: Path, data: bytes, name: bytes = NAME, layout: object = LAYOUT) -> int:
    begin, buffers = head_bytes(layout), Buffers()
    memory = buffers.take(begin + len(data))
    memory[: len(memory)] = b"x" * len(memory)  # it has been used before
    memory[begin : begin + len(data)] = data
    return write_file(path, name, Payload(layout, memoryview(memory)[begin : begin + len(data)]), memory)


def read(path: Path, name: bytes = NAME) -> tuple[object, bytes]:
    payload, _ = read_file(path, name, Buffers())
    return payload.layout, bytes(payload.data)


@pytest.mark.parametrize("size", [0, 1, ALIGNMENT - 1, ALIGNMENT, 3_000_000])
@pytest.mark.parametrize("layout", [LAYOUT, ["x" * 5000]], ids=["short", "long"])
def test_a_page_is_read_as_it_was_written(tmp_path: Path, size: int, layout: object) -> None:
    data, path = random.Random(size).randbytes(size), tmp_path / "page"
    written = write(path, data, layout=layout)
    assert read(path) == (layout, data)
    assert path.stat().st_size == written
    assert path.stat().st_mode & 0o777 == 0o600
    assert [*tmp_path.iterdir()] == [path]


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    """At 1,000 places; only those behind the end of the data change nothing."""
    data, path, random_ = random.Random(1).randbytes(3 * ALIGNMENT + 500), tmp_path / "page", random.Random(2)
    write(path, data)
    text, places = len(str(LAYOUT)) + 100, 0
    while places < 1000:
        place = random_.choice([random_.randrange(path.stat().st_size), random_.randrange(text)])
        places += 1
        flip_bit(path, place, bit := random_.randrange(8))
        try:
            assert read(path) == (LAYOUT, data)
            assert place >= ALIGNMENT + len(data) or 64 < place < ALIGNMENT, "zeros between the parts"
        except DamagedFileError:
            pass
        flip_bit(path, place, bit)
    assert read(path) == (LAYOUT, data)


@pytest.mark.parametrize("size", [0, 1, 100, ALIGNMENT, 2 * ALIGNMENT, 3 * ALIGNMENT - 1, 5 * ALIGNMENT])
def test_a_file_of_another_length_is_no_page(tmp_path: Path, size: int) -> None:
    path = tmp_path / "page"
    write(path, bytes(2 * ALIGNMENT))
    os.truncate(path, size)
    with pytest.raises(DamagedFileError):
        read(path)


def test_a_page_under_the_name_of_another_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "page", b"data", OTHER)
    with pytest.raises(DamagedFileError, match="another page"):
        read(tmp_path / "page")


def test_a_page_of_another_format_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "page", b"data")
    flip_bit(tmp_path / "page", 8)  # its version
    with pytest.raises(DamagedFileError, match="format"):
        read(tmp_path / "page")


def test_no_link_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "page", b"data")
    (tmp_path / "link").symlink_to(tmp_path / "page")
    with pytest.raises(OSError, match="symbolic"):
        read(tmp_path / "link")


@pytest.mark.parametrize("name", ["tmpfs", "ramfs"])
def test_file_systems_without_direct_reads_work(tmp_path: Path, name: str) -> None:
    with mounted(name, tmp_path / "disk") as disk:
        write(disk / "page", b"data" * 5000)
        assert read(disk / "page") == (LAYOUT, b"data" * 5000)


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "disk", "size=256k") as disk:
        with pytest.raises(OSError, match="No space"):
            write(disk / "page", bytes(1 << 20))
        assert not [*disk.iterdir()]
        write(disk / "page", b"data")
        assert read(disk / "page")[1] == b"data"
