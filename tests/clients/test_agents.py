"""Agents from npm edit a file in a repository, in two sessions by turns, and only what is new is computed.

The model's whole forward runs; a script chooses its tokens (scripted_server.py). No host but the server can be reached.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

import httpx2
from agent_model import write_model
from agents import CLAUDE, CODEX, MODEL, OPENCODE, PI, QWEN, Agent, Session, without_internet
from http_servers import KEY, ServerProcess
from prometheus import scrape
from readers import PATIENCE
from recorded_requests import Asked, Usage, computed_before, recorded
from transformers import AutoTokenizer

from moetier.runtime.kernels.layer.pages import PAGE_TOKENS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

HELPERS = Path(__file__).parent.parent / "helpers"
SESSIONS = ("[session A]", "[session B]")  # in the first message of each
SIDE = "A title"


@pytest.fixture(scope="module")
def model(tinymix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("agents") / "model", tinymix)


def thought(text: str) -> str:
    return f"<think>\n{text}\n</think>\n\n"


def call(name: str, arguments: dict[str, Any]) -> str:
    """A call in JSON that no template writes so."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, indent=1)}\n</tool_call>"


@dataclass(frozen=True, slots=True)
class Answer:
    """A text of the script, with the number of tool calls that the agent gets of it."""

    text: str
    calls: int = 0

    @property
    def thinks(self) -> bool:
        return self.text.startswith("<think>")


def answers(agent: Agent, mark: str, file: Path) -> list[list[Answer]]:
    """The answers of a session, for each message of the user."""

    def edit(number: int) -> str:
        return call(*agent.edit(file, f"line {number}\n", f'line {number}\nè "{mark}" \\ <b>\nline {number + 1}\n'))

    def say(text: str) -> str:
        return call(*agent.shell(f"echo '{text} of {mark}'"))

    again = [Answer(call(*agent.read(file)), 1)] if agent.forgets else []
    cut = Answer("A call that is cut:\n" + call(*agent.shell("true; " * 2000)))
    return [
        [
            Answer(thought("First look.") + "I look.\n" + call(*agent.read(file)), 1),
            Answer(edit(0), 1),
            Answer(f"Two at once.\n{say('result 1')}\n{say('result 2')}", 2),
            Answer(thought("That's all.") + "Done once."),
        ],
        [
            *again,
            Answer(edit(1), 1),
            Answer('A bad call: <tool_call>\n{"name": "x", "arguments": {"a": }\n</tool_call>'),
        ],
        [
            *again,
            Answer(edit(2), 1),
            *([cut] if agent.limits else ()),
            *([Answer("So far.")] if agent.goes_on or not agent.limits else ()),
        ],
        [*again, Answer(say("result 3"), 1), Answer(thought("One more.") + edit(3), 1), Answer("Done.")],
        [*again, Answer(edit(4), 1), Answer("Done again.")],
    ]


def edited(mark: str) -> str:
    """Return the text of the file that a session has edited."""
    return "line 0\n" + "".join(f'è "{mark}" \\ <b>\nline {number + 1}\n' for number in range(5))


@pytest.mark.parametrize("agent", [PI, OPENCODE, QWEN, CODEX, CLAUDE], ids=lambda agent: agent.name)
def test_only_what_is_new_is_computed(
    agent: Agent, model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    program = agent.installed(request.config.cache.mkdir("agents"))
    files = {mark: tmp_path / mark[-2] / "repository" / "notes.txt" for mark in SESSIONS}
    script = {mark: answers(agent, mark, file) for mark, file in files.items()}
    texts = {mark: [each.text for turn in turns for each in turn] for mark, turns in script.items()}
    (tmp_path / "script").write_text(json.dumps({"sessions": texts, "side": SIDE, "end": "The script has ended."}))
    with without_internet() as (host, before):
        server = ServerProcess(
            model,
            tmp_path,
            ["--name", MODEL, "--host", host, "--daemon", "none"],
            under=[str(HELPERS / "scripted_server.py"), str(tmp_path / "script"), str(tmp_path / "record")],
        )
        try:
            url = f"{server.url}/v1"
            sessions = {mark: Session(agent, program, tmp_path / mark[-2], url, before) for mark in SESSIONS}
            for number in range(len(script[SESSIONS[0]])):
                for mark, session in sessions.items():
                    session.say(f"{mark} Message {number}")
                    ask_for_title(url, mark)
            metrics = scrape(f"{server.url}/metrics", KEY)
        finally:
            server.end()
    asked = recorded(tmp_path / "record", AutoTokenizer.from_pretrained(model))
    for at, each in enumerate(asked):
        had = computed_before(each, asked[:at])
        assert had - PAGE_TOKENS < each.cached <= had
        assert each.usage == Usage(len(each.prompt), each.cached, len(each.answer))
    kept = float(sum(each.cached for each in asked))
    assert f'kept_tokens_total{{key="default",model="{MODEL}"}} {kept}' in metrics
    for mark in SESSIONS:
        check_prefixes(script[mark], [each for each in asked if mark in each.text and each.has_tools])
        assert files[mark].read_text() == edited(mark)


def ask_for_title(url: str, mark: str) -> None:
    """A request beside a session, about it: some agents make one at the start only, others none."""
    messages = [{"role": "user", "content": f"A title for {mark}?"}]
    with httpx2.Client(headers={"Authorization": f"Bearer {KEY}"}, timeout=PATIENCE) as client:
        done = client.post(f"{url}/chat/completions", json={"messages": messages})
    assert done.json()["choices"][0]["message"]["content"] == SIDE


def check_prefixes(turns: list[list[Answer]], asked: list[Asked]) -> None:
    """Every prompt has the results of all calls, and begins with the one before and its answer.

    But for what the template drops: reasoning of answers to earlier messages of the user; and for what the agent has
    changed in the messages before.
    """
    assert len(asked) == sum(map(len, turns))
    calls, before = 0, list[tuple[Answer, Asked]]()  # of the last message of the user
    requests = iter(asked)
    for turn in turns:
        dropped = next((each.prompt for answer, each in before if answer.thinks), None)
        for number, answer in enumerate(turn):
            each = next(requests)
            assert each.text.count("<tool_response>") == calls
            start = [*before[-1][1].prompt, *before[-1][1].answer] if before else []
            if number == 0 and dropped is not None:
                start = dropped[:-1]  # its last line's end may be one token with what follows
            if before:
                start = start[: unchanged(before[-1][1], each)]
            assert each.prompt[: len(start)] == start
            calls += answer.calls
            before = [*(before if number else ()), (answer, each)]
    for number in (1, 2, 3):
        assert any(re.search(rf"\sresult {number} of", each.text) for each in asked)  # it is quoted in the call


def unchanged(before: Asked, asked: Asked) -> int | None:
    """Return how many tokens of a prompt come before the first message of its chat that a later request has changed.

    None: all are as they were.
    """
    messages, later = (each.body["messages"] if "chat" in each.path else [] for each in (before, asked))
    pairs = zip(messages, later, strict=False)
    place = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
    if place is None:
        return None
    begins = [at for at, token in enumerate(before.prompt) if token == before.prompt[0]]
    is_result = [
        message["role"] == "tool" for message in messages[: place + 1]
    ]  # results that follow each other are one
    return begins[sum(not (each and last) for last, each in pairwise([False, *is_result])) - 1]
