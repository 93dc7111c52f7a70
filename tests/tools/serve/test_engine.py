"""Answers that go wrong, over HTTP, and those beside them, of which each must come to its end."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

import httpx2
import scripted
from http_servers import listening
from prepared import Prepared
from readers import PATIENCE
from tokenizers import decoders
from tokenizers.decoders import Decoder
from transformers.generation.continuous_batching.requests import GenerationOutput

import moetier
from moetier.tools.serve.app import application
from moetier.tools.serve.batched import Together
from moetier.tools.serve.engine import Answer, Job
from moetier.tools.serve.refusal import Refusal
from moetier.tools.serve.sequential import OneByOne

KIND = "qwen3_moe"
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
STEPS = range(1, 13)  # tokens of answers beside the one that goes wrong: in each step one of them ends


@pytest.fixture(scope="module", params=["one by one", "together"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    model, tokenizer = moetier.load(scripted.write_checkpoint(tmp_path_factory.mktemp("scripted"), KIND), daemon=None)
    with model.tiers:
        parts = model, tokenizer, 200, 400
        found: Any = Together(*parts, 16) if request.param == "together" else OneByOne(*parts)
        with found.running():
            asyncio.run(ask_all(found, [(TEXT, text(1))]))  # whatever thread it needs is there now
            yield found


async def ask_all(engine: Any, requests: list[tuple[str, dict[str, Any]]]) -> list[httpx2.Response]:
    """Their answers, to be computed at the same time."""
    with listening(application("small", engine, None, 64)) as url:
        async with httpx2.AsyncClient(base_url=url, timeout=PATIENCE) as client:
            return await asyncio.gather(*(client.post(path, json=body) for path, body in requests))


def text(tokens: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": scripted.LOOP, "max_tokens": tokens, "temperature": 0} | fields


def chat(start: str, **fields: Any) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": "?"}], "chat_template_kwargs": {"start": start}, "tools": TOOLS}
    return asked | {"max_tokens": 16, "temperature": 0} | fields


def texts(answers: list[httpx2.Response]) -> list[str]:
    return [answer.json()["choices"][0]["text"] for answer in answers]


@pytest.mark.parametrize("stream", [False, True])
def test_a_malformed_call_reaches_nobody_else(engine: Any, stream: bool) -> None:
    bad = [(CHAT, chat(start, stream=stream)) for start in (scripted.NO_JSON, scripted.NO_NAME, scripted.CUT)]
    others = [(TEXT, text(tokens)) for tokens in STEPS]
    answers = asyncio.run(ask_all(engine, [*bad, *others]))
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    assert texts(answers[3:]) == ["x" * tokens for tokens in STEPS]
    assert all("tool_call>" in answer.text for answer in answers[:3])


def test_stop_strings_reach_nobody_else(engine: Any) -> None:
    stopped = [(TEXT, text(16, stop="x" * tokens)) for tokens in (1, 3, 3)]
    answers = asyncio.run(ask_all(engine, [*stopped, *((TEXT, text(tokens)) for tokens in STEPS)]))
    assert texts(answers) == ["", "", "", *("x" * tokens for tokens in STEPS)]


@pytest.fixture
def odd_decoder(engine: Any) -> Iterator[None]:
    """A tokenizer that takes back what it wrote: x, then y of xx. Text can't be decoded piece by piece."""
    tokenizer = engine.tokenizer.backend_tokenizer
    before: Decoder = tokenizer.decoder
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("xx", "y")])
    yield
    tokenizer.decoder = before


def test_a_decoders_error_reaches_nobody_else(engine: Any, odd_decoder: None) -> None:
    good = [(CHAT, chat(scripted.GOES_ON, max_tokens=tokens)) for tokens in (1, 2, 3, 4)]
    answers = asyncio.run(ask_all(engine, [(TEXT, text(8)), *good, (TEXT, text(1))]))
    assert [answer.status_code for answer in answers] == [500, 200, 200, 200, 200, 200]
    assert answers[0].json()["error"]["message"] == "The answer failed; the server's log says why."


def test_a_closed_event_loop_reaches_nobody_else(engine: Any) -> None:
    """The request has ended with its program, in the middle of its answer."""
    before = engine.tally.counts()
    loop = asyncio.new_event_loop()

    async def begun() -> None:
        answer = engine.submit(Job(engine.tokenizer(scripted.LOOP)["input_ids"], 150))
        assert await anext(answer.pieces()) == "x"

    loop.run_until_complete(begun())
    loop.close()
    answers = asyncio.run(ask_all(engine, [(TEXT, text(tokens)) for tokens in STEPS]))
    assert texts(answers) == ["x" * tokens for tokens in STEPS]
    after = engine.tally.counts()
    assert after["under_way"] == 0
    assert after["cancelled"] - before["cancelled"] == 1


def test_an_end_that_fails_is_an_end(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine can't remove an answer."""
    drop = engine.drop

    def fail(answer: Answer) -> None:
        drop(answer)
        raise OSError

    monkeypatch.setattr(engine, "drop", fail)
    answers = asyncio.run(ask_all(engine, [(TEXT, text(2)), (TEXT, text(4, stop="xxx"))]))
    assert texts(answers) == ["xx", ""]


@pytest.mark.parametrize("engine", ["together"], indirect=True)
def test_outputs_of_cancelled_answers_are_not_kept(engine: Any) -> None:
    """Their clients leave while a step computes the next token."""
    leaving = list[Answer]()

    def leave(*_: Any) -> None:
        while leaving:
            leaving.pop().cancel()

    async def ask() -> None:
        ids = engine.tokenizer(scripted.LOOP)["input_ids"]
        for _ in range(20):
            answer = engine.submit(Job(ids, 150))
            leaving.append(answer)
            async with asyncio.timeout(PATIENCE):
                while not answer.ended:
                    await asyncio.sleep(0.001)
        assert len([piece async for piece in engine.submit(Job(ids, 8)).pieces()]) == 8

    hook = engine.model.register_forward_pre_hook(leave)
    try:
        asyncio.run(ask())
    finally:
        hook.remove()
    assert sum(isinstance(each, GenerationOutput) for each in gc.get_objects()) < 5


def test_a_request_that_comes_while_the_thread_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was let in before, and is queued after the thread has looked at its queue for the last time."""
    model, tokenizer = moetier.load(scripted.write_checkpoint(tmp_path, KIND), daemon=None)

    async def ask() -> None:
        engine.submit(Job([0], 1))

    with model.tiers:
        engine = Together(model, tokenizer, 200, 400, 2)
        with engine.running():
            queue = engine._batching.input_queue
            put = queue.put

            def late(*given: Any, **named: Any) -> None:
                engine._batching.stop(hard_stop=True)
                put(*given, **named)

            monkeypatch.setattr(queue, "put", late)
            with pytest.raises(Refusal, match="failed"):
                asyncio.run(ask())
        assert engine.tally.counts()["under_way"] == 0


INTERRUPTED = """
import gc, os, signal, sys
from transformers import ContinuousBatchingManager
from moetier.tools.main import main
def interrupt(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
{} = interrupt
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("place", "parallel"),
    [
        ("gc.freeze", 1),
        pytest.param("gc.freeze", 2, marks=pytest.mark.slow),
        ("ContinuousBatchingManager.get_result", 2),
    ],
)
def test_ctrl_c_while_the_server_starts_ends_it(
    scripts: Prepared, tinymix_4bit: Path, place: str, parallel: int
) -> None:
    """Its thread computes already, or is being tried."""
    words = ["serve", tinymix_4bit, "--port", 0, "--daemon", "none", "--parallel", parallel, "--context", 64]
    done = scripts.run(INTERRUPTED.replace("{}", place), *words, timeout=PATIENCE)
    assert done.returncode == 130
    assert done.stderr.endswith("moetier: interrupted\n")
    assert "Traceback" not in done.stderr
