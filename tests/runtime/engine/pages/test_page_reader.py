"""Reading of pages ends, and what can not be read is computed."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from faults import flip_bit
from readers import PATIENCE
from saved_engines import FULL, LONG, Waiting, answer, engine_with, files

from moetier.runtime.engine.sequence import Finish, Request
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS


@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "cancelled"])
def test_reading_ends_if_nothing_wants_it(tmp_path: Path, is_closed: bool) -> None:
    with engine_with(tmp_path) as engine:
        answer(engine, LONG)
    order = Waiting()
    order.may_write.set()
    with engine_with(tmp_path, order=order) as engine:
        ended = threading.Event()
        sequence = engine.submit(Request(tuple(LONG), 3), lambda *_: None, lambda _: ended.set())
        assert order.asked.wait(PATIENCE)
        if is_closed:
            threading.Timer(0.2, order.may_read.set).start()
        else:
            sequence.cancel()
            assert ended.wait(PATIENCE)
            order.may_read.set()
            assert answer(engine, LONG)[1] == FULL
    assert sequence.finish is Finish.CANCELLED


def test_a_process_ends_though_a_disk_hangs() -> None:
    """Threads that Python waits for would keep it."""
    script = """
import sys, threading
from moetier.runtime.engine.pages.page_reader import Readers
begun, readers = threading.Event(), Readers()
for _ in range(5):
    last = readers.submit(lambda: begun.set() or threading.Event().wait())
assert begun.wait(20)
assert not readers.close(0.1)
assert last.cancelled()
assert readers.submit(print).cancelled()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=PATIENCE)


def test_what_is_cut_short_by_a_damaged_page_is_computed(tmp_path: Path) -> None:
    with engine_with(tmp_path) as engine:
        answer(engine, LONG)
    by_time = sorted(files(tmp_path), key=lambda path: -path.stat().st_mtime_ns)  # the first page is the latest
    flip_bit(by_time[3], 5000)
    with engine_with(tmp_path) as engine:
        assert answer(engine, LONG)[1] == 3 * PAGE_TOKENS
        assert engine.saved.traffic().damaged == 1  # type: ignore[union-attr]
    with engine_with(tmp_path) as engine:
        assert answer(engine, LONG)[1] == FULL, "it was written again"
