"""The file of a cache with the times of last access: what it keeps, what processes share, and what is refused."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from stores import keys, layout_of, make_plan
from threads import Task

from moetier.tiers.errors import StoreFormatError, TargetError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.objects import access_times
from moetier.tiers.objects.access_times import AccessTimes

MANIFEST = make_plan(blocks=3, experts=4)
SLOT = layout_of().slot_bytes
EVERY = [key for block in range(3) for key in keys(block, *range(4))]


def test_entries_go_block_after_block_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "uses"
    with closing(AccessTimes(path, MANIFEST)) as times:
        for number, key in enumerate(EVERY, 1):
            assert not times.has_all
            times.set(key)
            times.sync()
            assert np.flatnonzero(np.frombuffer(path.read_bytes(), np.uint64)).tolist() == [*range(number)]
        assert times.has_all


def test_the_least_recently_used_records_are_given_until_they_have_enough_bytes(tmp_path: Path) -> None:
    with closing(AccessTimes(tmp_path / "uses", MANIFEST)) as times:
        used = [EVERY[number] for number in (7, 2, 11, 0)]
        for key in (used[2], *used):
            times.set(key)
        assert times.least_recent(0) == []
        assert times.least_recent(1) == used[:1]
        assert times.least_recent(2 * SLOT) == used[:2]
        assert times.least_recent(2 * SLOT + 1) == used[:3]
        assert times.least_recent(100 * SLOT) == used


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
