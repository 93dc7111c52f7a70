"""The file of a cache with the times of last access: what it keeps, what processes share, and what is refused."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest
from stores import keys, layout_of, make_plan
from threads import Task

from moetier.tiers.errors import StoreFormatError, TargetError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.objects import access_times
from moetier.tiers.objects.access_times import AccessTimes

MANIFEST = make_plan(blocks=3, experts=4)
SLOT = layout_of().slot_bytes


def test_numbers_of_records_go_block_after_block(tmp_path: Path) -> None:
    with closing(AccessTimes(tmp_path / "uses", MANIFEST)) as times:
        every = [key for block in range(3) for key in keys(block, *range(4))]
        assert [times.index(key) for key in every] == list(range(12))
        assert [times.key(number) for number in range(12)] == every


def test_what_is_noted_is_in_the_file_and_seen_by_others(tmp_path: Path) -> None:
    path = tmp_path / "uses"
    first, last = ExpertKey(0, 0), ExpertKey(2, 3)
    with closing(AccessTimes(path, MANIFEST)) as times, closing(AccessTimes(path, MANIFEST)) as other:
        assert times.cached_bytes == 0
        times.set(first)
        times.set(last)
        assert first in other
        assert last in other
        assert ExpertKey(1, 0) not in other
        assert other.cached_bytes == 2 * SLOT
        other.clear(first)
        assert first not in times
        times.sync()
    with closing(AccessTimes(path, MANIFEST)) as times:
        assert [key for key in (first, last) if key in times] == [last]


def test_a_file_of_another_size_is_refused_and_closed(tmp_path: Path) -> None:
    path = tmp_path / "uses"
    path.write_bytes(bytes(8 * 11))
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    with pytest.raises(StoreFormatError, match="has 88 bytes; 96 were expected"):
        AccessTimes(path, MANIFEST)
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


def test_a_lock_that_is_not_released_is_an_error_with_the_files_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_times, "TIMEOUT", 0.02)
    path = tmp_path / "uses"
    with closing(AccessTimes(path, MANIFEST)) as times, closing(AccessTimes(path, MANIFEST)) as other:

        def lock() -> None:
            with other.locked():
                pass

        with times.locked(), pytest.raises(TargetError, match=f"the lock of {path}"):
            Task(lock).result()
        Task(lock).result()
