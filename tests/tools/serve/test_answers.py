"""Answers that go wrong, over HTTP, and those beside them, of which each must come to its end."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

import httpx2
import scripted
from http_servers import answering, application, listening
from prepared import Prepared
from readers import PATIENCE
from tokenizers import decoders
from tokenizers.decoders import Decoder

import moetier
from moetier.runtime.engine.sequence import Request
from moetier.tools.serve.answers import Answer, Job
from moetier.tools.serve.constraints import Constraints
from moetier.tools.serve.protocols.events import Text
from moetier.tools.serve.protocols.refusal import ENDING, FAILED, Refusal

KIND = "qwen3_moe"
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
STEPS = range(1, 13)  # tokens of answers beside the one that goes wrong: in each step one of them ends


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    model, tokenizer = moetier.load(scripted.write_checkpoint(tmp_path_factory.mktemp("scripted"), KIND), daemon=None)
    with model.tiers, answering(model, tokenizer, context=200, chunk=400, parallel=16) as service:
        asyncio.run(ask_all(service, [(TEXT, text(1))]))  # whatever thread it needs is there now
        yield service


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


@pytest.mark.parametrize("stream", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_malformed_call_reaches_nobody_else(engine: Any, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Constraints, "of_dialogue", lambda *_, **__: None)  # as for a model whose calls are not known
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
    tally = engine.tally  # that of the server, to which others are added below, is another one
    before = tally.counts()
    loop = asyncio.new_event_loop()

    async def begun() -> None:
        answer = engine.submit(Job(Request(tuple(engine.tokenizer(scripted.LOOP)["input_ids"]), 150)))
        assert await anext(answer.events()) == Text("x")

    loop.run_until_complete(begun())
    loop.close()
    answers = asyncio.run(ask_all(engine, [(TEXT, text(tokens)) for tokens in STEPS]))
    assert texts(answers) == ["x" * tokens for tokens in STEPS]
    after = tally.counts()
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


def test_log_probabilities_have_the_token_that_ends_an_answer(engine: Any) -> None:
    """Its text is empty."""
    (answer,) = asyncio.run(ask_all(engine, [(CHAT, chat(scripted.GOES_ON, logprobs=True, tools=None))]))
    (choice,) = answer.json()["choices"]
    found = [entry["token"] for entry in choice["logprobs"]["content"]]
    assert (choice["finish_reason"], found[-1]) == ("stop", "<|im_end|>")
    assert len(found) == answer.json()["usage"]["completion_tokens"]


def test_an_engine_that_closes_ends_its_answers_and_takes_no_others(engine: Any) -> None:
    job = Job(Request(tuple(engine.tokenizer(scripted.LOOP)["input_ids"]), 150))

    async def ask() -> None:
        with answering(engine.model, engine.tokenizer, context=200, chunk=400) as closing:
            answer = closing.submit(job)
            events = answer.events()
            assert await anext(events) == Text("x")
        with pytest.raises(Refusal) as cut:
            [_ async for _ in events]
        assert (cut.value.status_code, cut.value.detail) == (503, ENDING)
        with pytest.raises(Refusal) as failed:
            closing.submit(job)
        assert (failed.value.status_code, failed.value.detail) == (503, FAILED)
        assert closing.tally.counts()["under_way"] == 0
        closing.cut()
        with pytest.raises(Refusal, match=re.escape(ENDING)):
            closing.submit(job)

    asyncio.run(ask())


INTERRUPTED = """
import gc, os, signal, sys
from moetier.tools.main import main
def interrupt(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
{} = interrupt
sys.exit(main())
"""


@pytest.mark.parametrize("place", ["gc.freeze", "gc.collect"])
def test_ctrl_c_while_the_server_starts_ends_it(scripts: Prepared, tinymix_4bit: Path, place: str) -> None:
    """Its thread computes already."""
    words = ["serve", tinymix_4bit, "--port", 0, "--daemon", "none", "--context", 64]
    done = scripts.run(INTERRUPTED.replace("{}", place), *words, timeout=PATIENCE)
    assert done.returncode == 130
    assert done.stderr.endswith("moetier: interrupted\n")
    assert "Traceback" not in done.stderr
