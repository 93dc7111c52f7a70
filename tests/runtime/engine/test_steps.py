"""Steps: short tasks beside long ones, errors and deadlines that end only their own sequences."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest
from readers import PATIENCE
from threads import wait_until
from torch import Tensor
from toy_runner import PROMPTS, Endless, ToyRunner, answer_alone, next_token, tokens_of

from moetier.runtime.engine.engine import Engine
from moetier.runtime.engine.kv_cache import KVCache
from moetier.runtime.engine.runner import Task
from moetier.runtime.engine.sampling import Sampler
from moetier.runtime.engine.sequence import DeadlineError, EngineError, Finish, Request, Sampled, TokenSequence


@pytest.mark.parametrize("pages", [5, 20])
def test_scores_of_a_prompt_are_the_same_whatever_waits_for_pages(pages: int) -> None:
    """All of it is computed, though another request had the same prompt."""
    runner, ids = ToyRunner(), [at % 49 + 1 for at in range(149)]
    with Engine(runner, pages=pages, max_sequences=3, chunk=64, context=1000) as engine:
        tokens_of(engine, ids, 1)
        before = runner.computed
        streams = [engine.stream(Request(tuple(ids), 30, logprobs=1, scores_prompt=True)) for _ in range(3)]
        for stream in streams:
            assert [*stream] == answer_alone(ids, 30, 1000)
            scores = stream.sequence.prompt_scores
            assert [scores[at].token for at in range(1, 149)] == ids[1:]
            assert [scores[at].top[0][0] for at in range(1, 149)] == [next_token(ids[:at]) for at in range(1, 149)]
        assert runner.computed - before >= 3 * 149


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    ended, arrived = list[int](), threading.Event()

    class Begun(ToyRunner):
        def run(self, *given: object) -> object:  # type: ignore[override]
            arrived.wait(PATIENCE)
            return super().run(*given)  # type: ignore[arg-type]

    with Engine(Begun(), pages=40, max_sequences=3, chunk=64, context=2000) as engine:
        sequences = [
            engine.submit(Request((1,) * tokens, 1), lambda *_: None, lambda sequence: ended.append(len(sequence.ids)))
            for tokens in (1000, 100)
        ]
        arrived.set()
        wait_until(lambda: all(sequence.finish is not None for sequence in sequences))
    assert ended == [101, 1001]


def test_an_error_ends_only_its_sequence() -> None:
    with Engine(ToyRunner(fails_after=70), pages=20, max_sequences=3, chunk=64, context=1000) as engine:
        streams = [engine.stream(Request(tuple(ids), 5)) for ids in ([1] * 100, [2] * 20)]
        assert [*streams[1]] == answer_alone([2] * 20, 5, 1000)
        with pytest.raises(OSError, match="a disk failed"):
            [*streams[0]]
        assert streams[0].sequence.finish is Finish.FAILED


def test_a_sequence_that_cannot_begin_ends_alone() -> None:
    """It begins with a part of a page of another one, which can't be copied."""

    class NoCopies(ToyRunner):
        def copy_page(self, source: int, target: int, tokens: int) -> None:
            raise MemoryError("no memory for a copy")

    with Engine(NoCopies(), pages=8, max_sequences=2, chunk=64, context=1000) as engine:
        expected = answer_alone(PROMPTS[0], 20, engine.context)
        assert tokens_of(engine, PROMPTS[0]) == expected
        with pytest.raises(MemoryError, match="no memory for a copy"):
            tokens_of(engine, [*range(1, 80), 5])
        assert tokens_of(engine, PROMPTS[4]) == answer_alone(PROMPTS[4], 20, engine.context)
        assert engine.is_alive


def test_a_sequence_for_which_pages_are_missing_fails_though_nothing_else_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would begin and stop for ever."""
    with Engine(ToyRunner(), pages=8, max_sequences=2, chunk=64, context=1000) as engine:
        monkeypatch.setattr(KVCache, "reserve", lambda *_: False)
        with pytest.raises(EngineError, match="Pages for keys and values are missing"):
            tokens_of(engine, PROMPTS[0])
        monkeypatch.undo()
        assert tokens_of(engine, PROMPTS[4]) == answer_alone(PROMPTS[4], 20, engine.context)


def test_an_error_while_a_token_is_sampled_ends_only_its_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(ToyRunner(), pages=20, max_sequences=2, chunk=64, context=1000) as engine:
        other = engine.stream(Request((5, 6, 7), 30))

        def refuse(_: TokenSequence, __: Sampled) -> None:
            raise ValueError("no")

        ended = threading.Event()
        bad = engine.submit(Request((9,), 30), refuse, lambda _: ended.set())
        assert [*other] == answer_alone([5, 6, 7], 30, 1000)
        assert ended.wait(PATIENCE)
        assert bad.finish is Finish.FAILED
        assert engine.is_alive


def test_prompts_that_are_cancelled_do_not_stop_other_sequences() -> None:
    """Each prompt is cancelled while it is computed; the other sequence gets a token in each step all the same."""
    runner, others = ToyRunner(), list[int]()
    ids = next(ids for token in range(10, 50) if len(answer_alone(ids := [token] * 20, 40, 1000)) == 40)
    compute = runner.compute

    def cancelled(task: Task, should_stop: Callable[[], bool]) -> Tensor | None:
        if task.tokens > 1 and task.sequence.request.ids[0] == 8:
            task.sequence.cancel()
            others.append(len(first.sequence.ids))
        return compute(task, should_stop)

    runner.compute = cancelled  # type: ignore[method-assign]
    with Engine(runner, pages=20, max_sequences=2, chunk=64, context=1000) as engine:
        first = engine.stream(Request((*ids,), 40))
        prompts = [engine.submit(Request((8,) * 30, 5), lambda *_: None, lambda _: None) for _ in range(10)]
        assert [*first] == answer_alone(ids, 40, 1000)
        wait_until(lambda: all(prompt.finish is Finish.CANCELLED for prompt in prompts))
    assert others == sorted(set(others)), "a token more for each prompt"


def test_streams_and_short_prompts_go_on_beside_a_long_one() -> None:
    runner = Endless()
    with Engine(runner, pages=40, max_sequences=4, chunk=2000, context=2000) as engine:
        engine.submit(Request((5,), 1500), lambda *_: runner.events.append("token"), lambda _: None)
        long = engine.submit(Request((1,) * 800, 1), lambda *_: None, lambda _: None)
        wait_until(lambda: "part of 1" in runner.events)
        assert long.progress.done < 800
        assert len(tokens_of(engine, [7] * 5, 3)) == 3
        runner.events.append("short")
        wait_until(lambda: long.finish is not None)
    begin = runner.events.index("part of 1")
    end = len(runner.events) - runner.events[::-1].index("part of 1")
    assert runner.events[begin:end].count("token") > 3
    assert "short" in runner.events[begin:end]


def test_a_prompt_of_some_passes_does_not_wait_for_a_long_one() -> None:
    runner = Endless()
    with Engine(runner, pages=60, max_sequences=4, chunk=2000, context=2000) as engine:
        long = engine.submit(Request((1,) * 1500, 1), lambda *_: None, lambda _: None)
        wait_until(lambda: "part of 1" in runner.events)
        assert len(tokens_of(engine, [7] * 30, 3)) == 3
        assert long.finish is None
        long.cancel()
        wait_until(lambda: long.finish is not None)


def test_long_prompts_share_a_step_and_one_that_is_cancelled_stops_no_other() -> None:
    runner = Endless()
    with Engine(runner, pages=60, max_sequences=4, chunk=4000, context=2000) as engine:
        blocker = engine.submit(Request((5,), 1500), lambda *_: time.sleep(0.002), lambda _: None)
        long = [engine.submit(Request((n,) * 700, 1), lambda *_: None, lambda _: None) for n in (1, 2, 3)]
        wait_until(lambda: "part of 2" in runner.events)
        long[1].cancel()
        wait_until(lambda: all(sequence.finish is not None for sequence in long))
        blocker.cancel()
    assert [sequence.finish for sequence in long] == [Finish.LENGTH, Finish.CANCELLED, Finish.LENGTH]
    parts = [event for event in runner.events if event.startswith("part")]
    assert (parts.count("part of 1"), parts.count("part of 3")) == (88, 88), "each is computed once"
    assert parts.count("part of 2") < 88


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time for deadlines, which only the test changes."""
    now = [1000.0]
    monkeypatch.setattr("moetier.runtime.engine.sequence.monotonic", lambda: now[0])
    return now


def test_a_request_whose_deadline_has_passed_computes_nothing() -> None:
    runner = ToyRunner()
    with Engine(runner, pages=8, max_sequences=1, chunk=64, context=100) as engine:
        late = engine.stream(Request((5, 6), 10, deadline=time.monotonic()))
        with pytest.raises(DeadlineError, match="after 0 of at most 10 tokens"):
            list(late)
        assert late.sequence.finish is Finish.DEADLINE
        assert runner.computed == 0
        assert tokens_of(engine, [5, 6]) == answer_alone([5, 6], 20, 100)


def test_an_answer_ends_at_its_deadline_and_others_go_on(clock: list[float]) -> None:
    with Engine(ToyRunner(), pages=40, max_sequences=2, chunk=64, context=1000) as engine:
        ids = next(ids for token in range(10, 50) if len(answer_alone(ids := [token] * 20, 40, 1000)) == 40)
        other = engine.stream(Request(tuple(ids), 40))

        def pass_deadline(_: TokenSequence, __: Sampled) -> None:
            clock[0] += 4.0

        ended = threading.Event()
        limited = engine.submit(Request(tuple(ids), 40, deadline=1010.0), pass_deadline, lambda _: ended.set())
        assert ended.wait(PATIENCE)
        assert [*other] == answer_alone(ids, 40, 1000)
    assert limited.finish is Finish.DEADLINE
    assert limited.ids[20:] == answer_alone(ids, 3, 1000)
    assert "3 of at most 40 tokens" in str(limited.error)


def test_a_long_prompt_stops_at_its_deadline(clock: list[float]) -> None:
    """Between two passes; in an event loop the error is raised, too."""
    runner = Endless()

    async def ask(engine: Engine) -> None:
        with pytest.raises(DeadlineError):
            async for _ in engine.stream_async(Request((1,) * 3000, 1, deadline=1001.0)):
                pass

    with Engine(runner, pages=60, max_sequences=4, chunk=4000, context=4000) as engine:
        thread = threading.Thread(target=lambda: asyncio.run(ask(engine)))
        thread.start()
        wait_until(lambda: "part of 1" in runner.events)
        clock[0] = 1001.0
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert not engine.sequences
    assert runner.events.count("part of 1") < 375


def test_who_fails_at_the_end_of_a_sequence_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: TokenSequence) -> None:
        raise ValueError("the client has gone")

    with Engine(ToyRunner(), pages=20, max_sequences=2, chunk=64, context=1000) as engine:
        sequence = engine.submit(Request((9,), 3), lambda *_: None, fail)
        assert tokens_of(engine, PROMPTS[4]) == answer_alone(PROMPTS[4], 20, engine.context)
        wait_until(lambda: bool(caplog.messages))
        assert sequence.finish is not None
    assert caplog.messages == [
        "A function that was to be called at the end of a sequence has failed: the client has gone"
    ]


def test_a_sequence_without_a_sampler_ends_alone() -> None:
    class Choosy(ToyRunner):
        def begin(self, sequence: TokenSequence) -> Sampler:
            if sequence.ids[0] == 9:
                raise ValueError("no sampler for 9")
            return super().begin(sequence)

    with Engine(Choosy(), pages=20, max_sequences=2, chunk=64, context=1000) as engine:
        with pytest.raises(ValueError, match="no sampler for 9"):
            tokens_of(engine, [9])
        assert tokens_of(engine, PROMPTS[4]) == answer_alone(PROMPTS[4], 20, engine.context)
