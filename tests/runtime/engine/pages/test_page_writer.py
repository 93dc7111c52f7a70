"""Pages are written after their sequences, at a limited rate, and old ones are removed meanwhile."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from saved_engines import FULL, LONG, Waiting, answer, engine_with, files, written
from threads import wait_until

from moetier.runtime.client.disk_order import ClientDiskOrder
from moetier.runtime.engine.pages import page_writer, saved_pages
from moetier.runtime.engine.pages.page_folder import PageFolder
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS


def test_a_page_that_is_evicted_before_it_is_written_is_lost(tmp_path: Path) -> None:
    order = Waiting()
    order.may_read.set()
    with engine_with(tmp_path, pages=8, order=order, most=1) as engine:
        for number in range(1, 5):
            answer(engine, [number, *LONG])
        order.may_write.set()
    with engine_with(tmp_path) as engine:
        found = [answer(engine, [number, *LONG])[1] for number in range(1, 5)]
        assert found[3] == FULL, "the last one was still there"
        assert found[1] < PAGE_TOKENS


def test_pages_are_written_at_a_limited_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_writer, "RATE", 7 * 8192)
    with engine_with(tmp_path) as engine:
        begin = time.monotonic()
        answer(engine, LONG)
        wait_until(lambda: len(files(tmp_path)) == 7)
        assert time.monotonic() - begin > 0.8, "they take a second, but for the pause after the last one"


def test_pages_are_written_though_reads_never_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_writer, "MAX_WAIT", 0.05)
    order = ClientDiskOrder()
    with engine_with(tmp_path, order=order) as engine, order.waiting_for_records():
        answer(engine, LONG)
        wait_until(lambda: len([path for path in files(tmp_path) if path.suffix == ".page"]) == 7)


def test_pages_that_are_too_old_are_removed_though_the_server_is_never_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_writer, "SWEEP_SECONDS", 0.05)
    with engine_with(tmp_path) as engine:
        written(engine, [8, *LONG])
        for path in (old := files(tmp_path)):
            os.utime(path, (0, 0))
        while any(path.exists() for path in old):
            answer(engine, LONG, 2)


def test_pages_that_are_too_old_are_removed_while_a_turn_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_writer, "SWEEP_SECONDS", 0.0)
    order, before = Waiting(), list[list[Path]]()
    order.may_read.set()

    def wait_to_write(_: object) -> None:
        before.append([path for path in files(tmp_path) if path.suffix == ".page"])
        if len(before) == 2:
            os.utime(before[1][0], (0, 0))

    monkeypatch.setattr(order, "wait_to_write", wait_to_write)
    with engine_with(tmp_path, order=order) as engine:
        written(engine, LONG)
    assert [len(paths) for paths in before[:3]] == [0, 1, 1]
    assert before[2] != before[1]


def test_a_failed_sweep_is_logged_as_such(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: PageFolder) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(PageFolder, "sweep", fail)
    with engine_with(tmp_path):
        wait_until(lambda: bool(caplog.messages))
    assert caplog.messages == [f"Old keys and values are not removed in {tmp_path}: Input/output error."]


def test_closing_ends_in_time_though_many_turns_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_pages, "CLOSING", 0.5)
    folders = [tmp_path / str(number) for number in range(5)]
    for folder in folders:  # a busy machine may need longer by itself
        order = Waiting()
        order.may_read.set()
        with engine_with(folder, pages=200, order=order) as engine:
            for number in range(1, 21):
                answer(engine, [number, *LONG], 2)
            monkeypatch.setattr(order, "wait_to_write", lambda _: time.sleep(0.4))  # a slow disk
            order.may_write.set()
            begin = time.monotonic()
        if time.monotonic() - begin < 4 and files(folder):
            return
    pytest.fail("a page of each turn takes 8 seconds")
