"""Pages are fetched for the sequence that waits first, while others are computed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from readers import PATIENCE
from saved_engines import FULL, LONG, Waiting, answer, engine_with, written
from toy_runner import ToyStateRunner, answer_alone

from moetier.runtime.engine import page_fetch
from moetier.runtime.engine.kv_cache import LAST_TOKENS
from moetier.runtime.engine.pages import saved_pages
from moetier.runtime.engine.sequence import Request
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS


def test_others_are_computed_while_pages_are_read(tmp_path: Path) -> None:
    with engine_with(tmp_path) as engine:
        answer(engine, LONG)
    order = Waiting()
    order.may_write.set()
    with engine_with(tmp_path, order=order) as engine:
        first = iter(engine.stream(Request((5, 6, 7), 900)))
        next(first)
        slow = engine.stream(Request(tuple(LONG), 3))
        assert order.asked.wait(PATIENCE)
        begun = [next(first) for _ in range(20)]
        assert slow.sequence.began is None
        order.may_read.set()
        assert [*slow] == answer_alone(LONG, 3, 1000)
        assert slow.sequence.cached == FULL
        assert [*begun, *first] == answer_alone([5, 6, 7], 900, 1000)[1:]


def test_a_disk_that_hangs_stops_neither_requests_nor_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_with(tmp_path) as engine:
        answer(engine, LONG)
    monkeypatch.setattr(page_fetch, "READ_SECONDS", 0.2)
    monkeypatch.setattr(saved_pages, "CLOSING", 0.2)
    order = Waiting()
    order.may_write.set()
    try:
        begin = time.monotonic()
        with engine_with(tmp_path, order=order) as engine:
            assert answer(engine, LONG)[1] == 0
        assert time.monotonic() - begin < PATIENCE / 2, "each read waits for twice as long"
    finally:
        order.may_read.set()


def test_reads_that_cannot_begin_keep_no_page(tmp_path: Path) -> None:
    with engine_with(tmp_path) as engine:
        answer(engine, LONG)
    with engine_with(tmp_path, pages=8) as engine:
        assert answer(engine, LONG[:100])[1]
        with pytest.MonkeyPatch.context() as broken:
            broken.setattr(engine.saved.reader, "read", lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                answer(engine, LONG)
        answer(engine, [3] * (8 * PAGE_TOKENS - 5), 3)  # it needs all pages


def test_a_state_that_has_no_room_is_not_read(tmp_path: Path) -> None:
    with engine_with(tmp_path, runner=ToyStateRunner(size=8), pages=60) as engine:
        tokens = written(engine, LONG)
    with engine_with(tmp_path, runner=ToyStateRunner(size=8), pages=9) as engine:
        assert answer(engine, [*LONG, *tokens, 5], 1)[1] == 0
        answer(engine, [3] * (9 * PAGE_TOKENS - 5), 3)  # no page is lost


# ----------------------------------------------------------------------------------------------------------------------


def test_a_state_that_has_left_memory_is_read_for_pages_that_are_there(tmp_path: Path) -> None:
    runner = ToyStateRunner(size=8)
    with engine_with(tmp_path, runner=runner, pages=30, most=1) as engine:
        tokens = written(engine, LONG)
        for number in range(1, 4):
            written(engine, [number] * 200)
        before = runner.computed
        assert answer(engine, [*LONG, *tokens, 5], 1)[1] >= len(LONG) - LAST_TOKENS
        assert runner.computed - before < 2 * PAGE_TOKENS
