"""Random reads of a disk: by fio or in threads, from whole records, and what can't be read."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from stores import make_store

from moetier.tiers.errors import CheckpointError, StoreError, StoreReadError
from moetier.tiers.store.folder import GROUP, read_manifest
from moetier.tiers.store.shard import ShardFile
from moetier.tools.rates.reads import RandomReads, read_rate, takes_direct


def test_reads_in_flight_are_counted_by_the_clock() -> None:
    most, present, count, lock = 0, 0, 0, threading.Lock()

    def read(buffer: memoryview) -> None:
        nonlocal most, present, count
        assert len(buffer) == 4096
        with lock:
            present += 1
            most = max(most, present)
        time.sleep(0.02)
        with lock:
            present -= 1
            count += 1

    began = time.perf_counter()
    rate = read_rate(read, 4096, depth=3, seconds=0.2)
    assert most == 3
    assert count * 4096 / (time.perf_counter() - began) <= rate <= 3 * 4096 / 0.02

    def fail(buffer: memoryview) -> None:
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        read_rate(fail, 4096, depth=2, seconds=10)


def test_both_ways_read_a_file_whose_name_fio_would_take_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a:b"
    path.write_bytes(os.urandom(64 * 4096))
    os.sync()
    reads = RandomReads((path,), 64 * 4096, 4 * 4096, is_direct=False)
    assert reads.rate(2, 0.05) > 0
    monkeypatch.setenv("PATH", "")
    assert (reads.by, reads.rate(2, 0.05) > 0) == ("preadv", True)


def test_the_rate_of_fio_is_the_bytes_that_it_read_by_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may say something before its JSON."""
    (tmp_path / "fio").write_text(
        """#!/bin/sh
echo 'note: a clock is slow'
echo '{"jobs": [{"read": {"io_bytes": 3000, "runtime": 500}}]}'
"""
    )
    (tmp_path / "fio").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    reads = RandomReads((tmp_path / "fio",), 4096, 4096, is_direct=False)
    assert (reads.by, reads.rate(1, 0.01)) == ("fio", 6000.0)


def test_records_that_are_damaged_are_not_measured(tmp_path: Path) -> None:
    make_store(tmp_path, experts=4)
    shard = ShardFile.of(tmp_path / GROUP, read_manifest(tmp_path / GROUP), 0).path
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(StoreError, match=str(shard)):
        RandomReads.of_records(tmp_path)


def test_files_below_a_page_are_too_small(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(4095))
    with pytest.raises(CheckpointError, match=r"weights is too small to measure reads"):
        RandomReads.of_files([tmp_path / "weights"])


def test_a_file_that_becomes_shorter_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # without fio
    (tmp_path / "weights").write_bytes(bytes(3 * 4096))
    reads = RandomReads.of_files([tmp_path / "weights"])
    os.truncate(tmp_path / "weights", 4096)
    with pytest.raises(StoreReadError, match="weights became shorter while it was read"):
        reads.rate(1, 0.01)


def test_a_file_that_takes_no_direct_reads_is_known(tmp_path: Path) -> None:
    assert not takes_direct(Path("/proc/self/status"))
