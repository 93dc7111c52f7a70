"""Whatever company a request has, and however few pages there are, its answer is that of its run alone."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from readers import PATIENCE
from threads import run_all, wait_until
from toy_runner import PROMPTS, Endless, ToyRunner, answer_alone, tokens_of

from moetier.runtime.engine.engine import Engine
from moetier.runtime.engine.scheduler import SCORED
from moetier.runtime.engine.sequence import EngineError, Finish, Request, TokenSequence
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS

DESCRIPTORS = Path("/proc/self/fd")


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


def test_a_model_that_cannot_resume_scores_only_short_prompts() -> None:
    """It computes a prompt in one piece, and each token has logits for the whole vocabulary."""
    runner = ToyRunner()
    runner.can_resume = False
    with Engine(runner, pages=20, max_sequences=1, chunk=64, context=1000) as engine:
        assert tokens_of(engine, [5] * SCORED, 1, scores_prompt=True)
        with pytest.raises(ValueError, match="can be scored"):
            tokens_of(engine, [5] * (SCORED + 1), 1, scores_prompt=True)


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


def test_an_engine_is_closed_while_a_long_prompt_is_computed() -> None:
    runner, ended = Endless(), threading.Event()
    with Engine(runner, pages=60, max_sequences=4, chunk=4000, context=4000) as engine:
        long = engine.submit(Request((1,) * 3000, 1), lambda *_: None, lambda _: ended.set())
        wait_until(lambda: "part of 1" in runner.events)
    assert ended.is_set()
    assert long.finish is Finish.CANCELLED
    assert runner.events.count("part of 1") < 375


def test_sequences_end_though_the_end_of_another_one_fails(caplog: pytest.LogCaptureFixture) -> None:
    """Their runner does not end them, when the engine is closed."""
    entered, may = threading.Event(), threading.Event()

    class Broken(ToyRunner):
        def run(self, *given: object) -> object:  # type: ignore[override]
            entered.set()
            may.wait(PATIENCE)
            return super().run(*given)  # type: ignore[arg-type]

        def end(self, sequence: TokenSequence) -> None:
            raise ValueError("a file is gone")

    engine = Engine(Broken(), pages=8, max_sequences=1, chunk=64, context=1000)
    streams = [engine.stream(Request((1, 2, 3), 100)) for _ in range(2)]
    assert entered.wait(PATIENCE)
    run_all([engine.close, may.set])
    assert [stream.sequence.finish for stream in streams] == [Finish.CANCELLED] * 2
    assert caplog.messages == ["The end of a sequence has failed: a file is gone"] * 2
