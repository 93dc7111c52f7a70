"""Whatever company a request has, and however few pages there are, its answer is that of its run alone."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from readers import PATIENCE
from threads import run_all, wait_until
from torch import Tensor
from toy_runner import ToyRunner, answer_alone, next_token

from moetier.runtime.engine.engine import Engine
from moetier.runtime.engine.kv_cache import KVCache
from moetier.runtime.engine.runner import Task
from moetier.runtime.engine.sampling import Sampler
from moetier.runtime.engine.scheduler import SCORED
from moetier.runtime.engine.sequence import DeadlineError, EngineError, Finish, Request, Sampled, TokenSequence
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS

DESCRIPTORS = Path("/proc/self/fd")
PROMPTS = [[*range(1, 100)], [*range(1, 70)], [*range(1, 65)], [7] * 150, [7] * 20, [9]]


def tokens_of(engine: Engine, ids: list[int], most: int = 20, **options: object) -> list[int]:
    return [*engine.stream(Request(tuple(ids), most, **options))]  # type: ignore[arg-type]


@given(
    requests=st.lists(
        st.tuples(st.sampled_from(PROMPTS), st.integers(1, 90), st.one_of(st.none(), st.integers(0, 5))),
        min_size=1,
        max_size=12,
    ),
    pages=st.integers(4, 12),
    most=st.integers(1, 5),
    chunk=st.sampled_from([1, 7, 64, 200]),
    pass_tokens=st.sampled_from([None, 1, 16]),
)
@settings(max_examples=60, deadline=None)
def test_company_changes_no_answer(
    requests: list[tuple[list[int], int, int | None]], pages: int, most: int, chunk: int, pass_tokens: int | None
) -> None:
    runner = ToyRunner(pass_tokens=pass_tokens)
    with Engine(runner, pages=pages, max_sequences=most, chunk=chunk, context=1000) as engine:
        streams = [engine.stream(Request(tuple(ids), tokens)) for ids, tokens, _ in requests]
        for stream, (ids, tokens, cancelled_after) in zip(streams, requests, strict=True):
            answer, expected = list[int](), answer_alone(ids, tokens, engine.context)
            for token in stream:
                answer.append(token)
                if len(answer) == cancelled_after:
                    break
            assert answer == expected[: len(answer)]
            if not cancelled_after:
                assert answer == expected
        assert not engine.sequences
    assert len(runner.pages) <= pages


def test_a_turn_computes_only_what_is_new() -> None:
    runner = ToyRunner()
    with Engine(runner, pages=20, max_sequences=2, chunk=64, context=1000) as engine:
        first = tokens_of(engine, [*range(1, 300)], 40)
        before = runner.computed
        stream = engine.stream(Request((*range(1, 300), *first, 5, 6), 1))
        assert len([*stream]) == 1
        # the last token of an answer was sampled, but not computed
        assert stream.sequence.cached == 299 + len(first) - 1
        assert runner.computed - before == 3


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


def test_a_model_that_can_not_resume_scores_only_short_prompts() -> None:
    """It computes a prompt in one piece, and each token has logits for the whole vocabulary."""
    runner = ToyRunner()
    runner.can_resume = False
    with Engine(runner, pages=20, max_sequences=1, chunk=64, context=1000) as engine:
        assert tokens_of(engine, [5] * SCORED, 1, scores_prompt=True)
        with pytest.raises(ValueError, match="can be scored"):
            tokens_of(engine, [5] * (SCORED + 1), 1, scores_prompt=True)


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


def test_a_sequence_that_can_not_begin_ends_alone() -> None:
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


@pytest.mark.parametrize("most", [0, -5])
def test_no_tokens_are_refused(most: int) -> None:
    with (
        Engine(ToyRunner(), pages=4, max_sequences=1, chunk=64, context=100) as engine,
        pytest.raises(ValueError, match="new"),
    ):
        engine.stream(Request((5,), most))


def test_a_thread_that_fails_fails_all_and_refuses_further_requests() -> None:
    runner = ToyRunner()
    with Engine(runner, pages=20, max_sequences=3, chunk=64, context=1000) as engine:
        runner.begin = lambda _: (_ for _ in ()).throw(SystemExit)  # type: ignore[method-assign]
        with pytest.raises(SystemExit):
            tokens_of(engine, [1])
        wait_until(lambda: not engine.is_alive)
        with pytest.raises(EngineError, match="has ended"):
            tokens_of(engine, [1])


def test_closing_cancels_what_runs_and_what_waits() -> None:
    entered, may = threading.Event(), threading.Event()

    class Slow(ToyRunner):
        def run(self, *given: object) -> object:  # type: ignore[override]
            entered.set()
            may.wait(PATIENCE)
            return super().run(*given)  # type: ignore[arg-type]

    engine = Engine(Slow(), pages=8, max_sequences=1, chunk=64, context=1000)
    streams = [engine.stream(Request((1, 2, 3), 100)) for _ in range(3)]
    assert entered.wait(PATIENCE)
    run_all([engine.close, may.set])
    assert [stream.sequence.finish for stream in streams] == [Finish.CANCELLED] * 3


@pytest.mark.parametrize("ids", [(), (1,) * (2 * PAGE_TOKENS)])
def test_a_prompt_that_does_not_fit_is_refused(ids: tuple[int, ...]) -> None:
    with (
        Engine(ToyRunner(), pages=2, max_sequences=1, chunk=64, context=1000) as engine,
        pytest.raises(ValueError, match="it must have 1 to 127"),
    ):
        engine.stream(Request(ids, 1))


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_requests_leave_nothing_but_pages(count: int) -> None:
    """Some are cancelled, and there are pages for a few at a time."""
    random_, runner, pages = random.Random(0), ToyRunner(), 30
    with Engine(runner, pages=pages, max_sequences=6, chunk=64, context=2000) as engine:

        def run(requests: int) -> None:
            streams = []
            for _ in range(requests):
                ids = random_.choice(PROMPTS)[: random_.randrange(1, 150)]
                streams.append(engine.stream(Request(tuple(ids), random_.randrange(1, 30))))
                if random_.random() < 0.2:
                    streams[-1].sequence.cancel()
                if len(streams) > 20:
                    tuple(streams.pop(0))
            for stream in streams:
                tuple(stream)
            assert not engine.sequences

        run(100)
        gc.collect()
        before = len([*DESCRIPTORS.iterdir()]), threading.active_count(), len(gc.get_objects())
        run(count)
        gc.collect()
        after = len([*DESCRIPTORS.iterdir()]), threading.active_count(), len(gc.get_objects())
        assert after[:2] == before[:2]
        assert after[2] < before[2] + 1000
        # all pages can be had again
        assert len(tokens_of(engine, [3] * (pages * PAGE_TOKENS - 5), 5)) in range(1, 6)
    assert len(runner.pages) <= pages


def test_tokens_come_in_an_event_loop() -> None:
    async def ask(engine: Engine, ids: list[int], most: int = 20) -> list[int]:
        return [token async for token in engine.stream_async(Request(tuple(ids), most))]

    async def first(engine: Engine) -> int:
        tokens = engine.stream_async(Request((1, 2, 3), 900))
        token = await anext(tokens)
        await tokens.aclose()
        return token

    async def ask_all(engine: Engine) -> list[list[int]]:
        assert await first(engine) == answer_alone([1, 2, 3], 1, 1000)[0]
        with pytest.raises(OSError, match="a disk failed"):
            await ask(engine, [8] * 200)
        return await asyncio.gather(*(ask(engine, ids) for ids in PROMPTS))

    with Engine(ToyRunner(fails_after=180), pages=30, max_sequences=3, chunk=64, context=1000) as engine:
        assert asyncio.run(ask_all(engine)) == [answer_alone(ids, 20, 1000) for ids in PROMPTS]
        wait_until(lambda: not engine.sequences)


class Endless(ToyRunner):
    """Notes when a part of a long prompt is computed. No token ends a sequence."""

    def __init__(self) -> None:
        super().__init__(pass_tokens=8)
        self.events = list[str]()

    def begin(self, sequence: TokenSequence) -> Sampler:
        return Sampler(sequence.ids, lambda _, scores: scores)

    def compute(self, task: Task, should_stop: Callable[[], bool]) -> Tensor | None:
        if len(task.sequence.request.ids) > 500:
            self.events.append(f"part of {task.sequence.request.ids[0]}")
            time.sleep(0.001)
        return super().compute(task, should_stop)


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


def test_an_engine_is_closed_while_a_long_prompt_is_computed() -> None:
    runner, ended = Endless(), threading.Event()
    with Engine(runner, pages=60, max_sequences=4, chunk=4000, context=4000) as engine:
        long = engine.submit(Request((1,) * 3000, 1), lambda *_: None, lambda _: ended.set())
        wait_until(lambda: "part of 1" in runner.events)
    assert ended.is_set()
    assert long.finish is Finish.CANCELLED
    assert runner.events.count("part of 1") < 375


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
