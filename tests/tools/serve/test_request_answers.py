"""The answers to one request: in order of prompts, some at a time, and none after its client has left."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')

from http_servers import answering

import moetier
from moetier.runtime.engine.sequence import Request
from moetier.tools.serve.answers import Job
from moetier.tools.serve.prompts import Prompts
from moetier.tools.serve.protocols.events import Answered
from moetier.tools.serve.protocols.refusal import ENDING, Refusal
from moetier.tools.serve.request_answers import AT_ONCE, RequestAnswers


@pytest.fixture(scope="module")
def service(tinymix_4bit: Path) -> Iterator[Any]:
    model, tokenizer = moetier.load(tinymix_4bit, daemon=None)
    with model.tiers, answering(model, tokenizer, context=200, parallel=4) as found:
        yield found


def answers_of(service: Any, texts: list[str], each: int, tokens: int = 3) -> RequestAnswers:
    """Begin ``each`` answers to each text."""
    prompts = Prompts(service.model, service.tokenizer, context=service.context, max_scored=service.max_scored)
    asked = [tuple(service.tokenizer(text)["input_ids"]) for text in texts]
    jobs = [
        [Job(Request(ids, tokens, {"do_sample": False}), counts_prompt=not number) for number in range(each)]
        for ids in asked
    ]
    return RequestAnswers(service, prompts, jobs)


async def complete(answers: RequestAnswers) -> list[Answered]:
    found = defaultdict[int, Answered](Answered)
    async for number, event in answers.events():
        found[number].add(event)
    return [found[number] for number in range(answers.count)]


def test_they_are_numbered_prompt_by_prompt(service: Any) -> None:
    async def ask(texts: list[str], each: int) -> tuple[list[Answered], int]:
        answers = answers_of(service, texts, each)
        return await complete(answers), answers.prompt_tokens

    (first,), of_first = asyncio.run(ask(["Quel ramo"], 1))
    (second,), of_second = asyncio.run(ask(["Agnese e Lucia"], 1))
    several, of_both = asyncio.run(ask(["Quel ramo", "Agnese e Lucia"], 2))
    assert [each.text for each in several] == [first.text] * 2 + [second.text] * 2
    assert first.text != second.text
    assert of_both == of_first + of_second


def test_only_some_are_computed_at_a_time(service: Any) -> None:
    before, most = service.tally.counts()["answered"], 0

    async def ask() -> None:
        nonlocal most
        async for _ in answers_of(service, ["Quel ramo"], 3 * AT_ONCE).events():
            most = max(most, service.tally.counts()["under_way"])

    asyncio.run(ask())
    assert 1 < most <= AT_ONCE
    assert service.tally.counts()["answered"] - before == 3 * AT_ONCE


def test_an_answer_that_fails_ends_the_request(service: Any) -> None:
    async def ask() -> None:
        with answering(service.model, service.tokenizer, context=200, parallel=4) as closing:
            events = answers_of(closing, ["Quel ramo"], 2, 100).events()
            await anext(events)
        with pytest.raises(Refusal) as refused:
            [_ async for _ in events]
        assert refused.value.detail == ENDING
        assert closing.tally.counts()["under_way"] == 0

    asyncio.run(ask())


def test_none_begins_after_the_client_has_left(service: Any) -> None:
    before = service.tally.counts()

    async def ask() -> None:
        answers = answers_of(service, ["Quel ramo"], 3 * AT_ONCE, 100)
        events = answers.events()
        await anext(events)
        answers.cancel()
        await events.aclose()

    asyncio.run(ask())
    after = service.tally.counts()
    assert after["under_way"] == before["under_way"] == 0
    assert after["answered"] == before["answered"]
    assert 0 < after["cancelled"] - before["cancelled"] <= AT_ONCE
