"""Large files are written behind their writer."""

from __future__ import annotations

import contextlib
import errno
import random
from pathlib import Path

import pytest

from moetier.tiers.store import atomic
from moetier.tiers.store.atomic import LargeFile, large_file


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


def test_what_the_disk_refuses_is_raised() -> None:
    """A device takes writes, and has no pages that could be written to a disk."""
    with Path("/dev/null").open("wb", buffering=0) as stream, pytest.raises(OSError, match="Illegal seek") as caught:
        LargeFile(stream.fileno(), contextlib.nullcontext).write(bytes(4 << 12))
    assert caught.value.errno == errno.ESPIPE
