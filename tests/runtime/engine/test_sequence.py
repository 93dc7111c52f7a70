"""A sequence tells how far it is, and when it is over."""

from __future__ import annotations

import threading

import pytest
from readers import PATIENCE
from toy_runner import ToyRunner

from moetier.runtime.engine import sequence
from moetier.runtime.engine.engine import Engine
from moetier.runtime.engine.sequence import PATIENCE as WAITS
from moetier.runtime.engine.sequence import Finish, Request, Sampled, TokenSequence


def test_progress_tells_tokens_and_time() -> None:
    entered, may = threading.Event(), threading.Event()

    class Slow(ToyRunner):
        def run(self, *given: object) -> object:  # type: ignore[override]
            if self.computed:
                entered.set()
                may.wait(PATIENCE)
            return super().run(*given)  # type: ignore[arg-type]

    with Engine(Slow(), pages=20, max_sequences=1, chunk=64, context=1000) as engine:
        stream = engine.stream(Request((5,) * 192, 1))
        assert entered.wait(PATIENCE)
        progress = stream.sequence.progress
        assert (progress.done, progress.total) == (64, 192)
        assert progress.seconds_left is not None
        assert str(progress).startswith("64 of 192 prompt tokens, ")
        may.set()
        assert len([*stream]) == 1
        assert stream.sequence.progress.done == 192


def test_tokens_to_compute_are_those_behind_the_kept_ones() -> None:
    tokens = list[int]()
    made = TokenSequence(Request((5, 6, 7), 2), lambda _, sampled: tokens.append(sampled.token))
    made.resume_at(1)
    assert (made.remaining, made.new_tokens) == (2, 0)
    made.advance(2)
    made.append(Sampled(8))
    assert (made.ids, tokens, made.remaining, made.new_tokens) == ([5, 6, 7, 8], [8], 1, 1)


def test_only_the_first_beginning_counts_tokens_as_cached() -> None:
    made = TokenSequence(Request((5, 6, 7), 2))
    made.resume_at(2)
    made.begin()
    began = made.began
    made.resume_at(0)  # it has waited for pages, and begins again
    made.begin()
    assert (made.cached, made.began, made.computed) == (2, began, 0)


def test_it_should_end_once_it_is_cancelled_or_its_deadline_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(sequence, "monotonic", lambda: now[0])
    cancelled, late, early = (TokenSequence(Request((5,), 1, deadline=at)) for at in (None, 1010.0, 2000.0))
    assert [each.due for each in (cancelled, late, early)] == [1000.0 + WAITS, 1010.0, 1000.0 + WAITS]
    assert not any(each.should_end for each in (cancelled, late, early))
    cancelled.cancel()
    now[0] = 1010.0
    assert [each.should_end for each in (cancelled, late, early)] == [True, True, False]


def test_who_is_told_of_the_end_sees_its_error() -> None:
    seen = list[tuple[Finish | None, BaseException | None]]()
    made = TokenSequence(Request((5,), 1), on_end=lambda ended: seen.append((ended.finish, ended.error)))
    error = ValueError()
    made.end(Finish.FAILED, error)
    assert seen == [(Finish.FAILED, error)]
