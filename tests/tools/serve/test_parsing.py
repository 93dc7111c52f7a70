"""Thoughts, calls and text of an answer over HTTP, for each form of them that transformers knows, and for none.

The models write given texts (``scripted``). What a prompt has, marks among it, is no part of an answer.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

import httpx2
import scripted
from http_servers import answering, application, listening
from hypothesis import given, settings
from hypothesis import strategies as st
from readers import PATIENCE

import moetier
from moetier.tools.serve.constraints import Constraints
from moetier.tools.serve.parsing import form_of

CHAT = "/v1/chat/completions"
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    }
]


@dataclass(frozen=True)
class Served:
    """A model's engine, in a server of any chat template."""

    kind: str  # type of the model
    engine: Any

    @contextlib.contextmanager
    def asks(self, template: str | None) -> Iterator[Callable[..., dict[str, Any]]]:
        """A function that asks twice and returns the choice: the stream of the answer must be the same."""
        self.engine.tokenizer.chat_template = template
        with (
            listening(application("small", self.engine, None, 8)) as url,
            httpx2.Client(base_url=url, timeout=PATIENCE) as client,
        ):

            def ask(start: str | None = None, **fields: Any) -> dict[str, Any]:
                _, _, think, _, call, _ = scripted.FORMS[self.kind]
                body: dict[str, Any] = {"messages": [{"role": "user", "content": f"Segreto {think} {call}" + "{"}]}
                if start is not None:
                    body["chat_template_kwargs"] = {"start": start}
                body |= {"max_tokens": 16, "temperature": 0} | fields
                whole = client.post(CHAT, json=body)
                assert whole.status_code == 200, whole.text
                choice: dict[str, Any] = whole.json()["choices"][0]
                stream = client.post(CHAT, json=body | {"stream": True})
                assert stream.text.endswith("data: [DONE]\n\n"), stream.text
                assert _of(stream.text) == _shown(choice)
                return choice

            yield ask


def _shown(choice: dict[str, Any]) -> tuple[Any, ...]:
    message = choice["message"]
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    return message["content"], message.get("reasoning_content"), calls, choice["finish_reason"]


def _of(stream: str) -> tuple[Any, ...]:
    """The same of a stream."""
    lines = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: {")]
    choices = [json.loads(line)["choices"][0] for line in lines]
    message: dict[str, Any] = {"content": "", "tool_calls": []}
    for delta in (choice["delta"] for choice in choices):
        message["content"] += delta.get("content", "")
        message["tool_calls"] += delta.get("tool_calls", ())
        if "reasoning_content" in delta:
            message["reasoning_content"] = message.get("reasoning_content", "") + delta["reasoning_content"]
    return _shown({"message": message, "finish_reason": choices[-1]["finish_reason"]})


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the checkpoint of a type of models, or its GGUF file ("qwen3_moe.gguf")."""
    made: dict[str, Path] = {}

    def path(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("scripted") / kind
            made[kind] = (
                scripted.write_file(folder) if kind.endswith(".gguf") else scripted.write_checkpoint(folder, kind)
            )
        return made[kind]

    return path


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, paths: Callable[[str], Path]) -> Iterator[Served]:
    kind = request.param
    model, tokenizer = moetier.load(paths(kind), daemon=None)
    with model.tiers, answering(model, tokenizer, context=400, chunk=64) as engine:
        found = Served(kind.removesuffix(".gguf"), engine)
        with found.asks(None) as ask:
            ask(max_tokens=1)  # whatever thread it needs is there now
        yield found


KINDS = ["qwen3_moe", "qwen3_5_moe_text", "gemma4", "mixtral", "qwen3_moe.gguf"]  # types of models with an engine each
of_each_kind = pytest.mark.parametrize("served", KINDS, indirect=True)


def templates(kind: str) -> dict[str, str | None]:
    return {"none": None, "own": scripted.own_template(kind), "foreign": scripted.FOREIGN}


@pytest.mark.parametrize("template", ["none", "own", "foreign"])
@of_each_kind
def test_an_answer_has_nothing_of_its_prompt(served: Served, template: str) -> None:
    with served.asks(templates(served.kind)[template]) as ask:
        assert _shown(ask()) == ("\n\nCiao mondo", "Penso", [], "stop")


@pytest.mark.parametrize("template", ["none", "own", "foreign"])
@pytest.mark.parametrize("served", ["olmoe"], indirect=True)
def test_an_unknown_form_stays_text(served: Served, template: str) -> None:
    with served.asks(templates(served.kind)[template]) as ask:
        assert _shown(ask()) == ("<think>Penso</think>\n\nCiao mondo", None, [], "stop")


@pytest.mark.parametrize("template", ["own", "foreign"])
@of_each_kind
def test_what_a_template_writes_of_an_answer_is_no_part_of_it(served: Served, template: str) -> None:
    """Thoughts that it has ended, and thoughts that go on."""
    _, _, think, thought, *_ = scripted.FORMS[served.kind]
    with served.asks(templates(served.kind)[template]) as ask:
        assert _shown(ask(f"{think}\n\n{thought}\n\n{scripted.LOOP}", max_tokens=3)) == ("xxx", None, [], "length")
        assert _shown(ask(f"{think}{scripted.GOES_ON}")) == (" Fatto", "Ancora", [], "stop")


@pytest.mark.parametrize("template", ["own", "foreign"])
@of_each_kind
def test_calls(served: Served, template: str) -> None:
    with served.asks(templates(served.kind)[template]) as ask:
        content, reasoning, calls, reason = _shown(ask(scripted.TOOL, tools=TOOLS))
    assert (content.strip(), reasoning, reason) == ("Ecco:", None, "tool_calls")
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [("f", {"a": 1})]


@pytest.mark.parametrize("served", ["qwen3_moe"], indirect=True)
def test_no_calls_without_tools_and_one_call_alone(served: Served) -> None:
    text = scripted.texts_of(served.kind)[scripted.TOOL]
    with served.asks(scripted.own_template(served.kind)) as ask:
        without = ask(scripted.TOOL)
        assert _shown(without) == ("".join(text[:-1]), None, [], "stop")
        assert _shown(ask(scripted.TOOL, tools=TOOLS, tool_choice="none")) == _shown(without)
        called = _shown(ask(scripted.TOOL, tools=TOOLS, tool_choice="auto", parallel_tool_calls=True))
        assert [name for name, _ in called[2]] == ["f"]
        both = _shown(ask(scripted.TWICE, tools=TOOLS))
        assert [json.loads(arguments)["a"] for _, arguments in both[2]] == [1, 2]
        one = _shown(ask(scripted.TWICE, tools=TOOLS, parallel_tool_calls=False))
        assert one == (both[0], None, both[2][:1], "tool_calls")
        malformed = f"<tool_call>]</tool_call>{scripted.LOOP}"  # in the prompt, where the answer begins
        assert _shown(ask(malformed, tools=TOOLS, max_tokens=3)) == ("xxx", None, [], "length")


@pytest.fixture
def unconstrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls may be malformed, as with models of which it is not known how they write calls."""
    monkeypatch.setattr(Constraints, "of_dialogue", lambda *_, **__: None)


@pytest.mark.usefixtures("unconstrained")
@pytest.mark.parametrize("mark", [scripted.NO_JSON, scripted.NO_NAME])
@pytest.mark.parametrize("served", ["qwen3_moe", "gemma4", "mixtral"], indirect=True)
def test_a_malformed_call_is_text(served: Served, mark: str) -> None:
    """So is what follows, without special tokens."""
    text = scripted.texts_of(served.kind).get(mark)
    if text is None:
        pytest.skip("this form has no such call")
    with served.asks(scripted.own_template(served.kind)) as ask:
        assert _shown(ask(mark, tools=TOOLS)) == ("".join(text[:-1]), None, [], "stop")


@pytest.mark.usefixtures("unconstrained")
@of_each_kind
def test_a_call_that_is_cut_is_text(served: Served) -> None:
    """By the limit of tokens, or because the model ends its turn there."""
    text = scripted.texts_of(served.kind)[scripted.CUT]
    with served.asks(scripted.own_template(served.kind)) as ask:
        assert _shown(ask(scripted.CUT, tools=TOOLS, max_tokens=3)) == ("".join(text[:-1]), None, [], "length")
        assert _shown(ask(scripted.CUT, tools=TOOLS)) == ("".join(text[:-1]), None, [], "stop")


@cache
def form(kind: str) -> Any:
    return form_of(SimpleNamespace(config=SimpleNamespace(model_type=kind)), scripted.tokenizer_of(kind))


def parsed(kind: str, pieces: Iterable[str]) -> list[tuple[str, Any]]:
    """(type, text) of an answer's parts; texts of one type that follow each other are one."""
    parser = form(kind).parser("", TOOLS)
    parts = [part for piece in pieces for part in parser.feed(piece)] + parser.finish()
    texts = [
        (type(part).__name__, part if isinstance(part, str) else f"{part.name} {part.arguments}") for part in parts
    ]
    return [(name, "".join(text for _, text in like)) for name, like in itertools.groupby(texts, lambda each: each[0])]


@pytest.mark.parametrize("kind", [kind for kind in scripted.FORMS if kind != "olmoe"])
@settings(max_examples=50)
@given(data=st.data())
def test_an_answer_has_the_same_parts_in_any_pieces(kind: str, data: st.DataObject) -> None:
    """With malformed calls, and with what looks like the beginning of a mark."""
    _, _, think, thought, call, called = scripted.FORMS[kind]
    inner = [text for token in (scripted.TOOL, scripted.NO_JSON) for text in scripted.texts_of(kind).get(token, ())]
    fragments = ["a", "t", "<", " ", "\n", "]", "\u00e9", think, thought, call, called, call[:2], call[2:], *inner]
    text = "".join(data.draw(st.lists(st.sampled_from(fragments), max_size=8)))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(text) - 1, 1)))))
    pieces = [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
    whole = parsed(kind, [text])
    assert whole == parsed(kind, text) == parsed(kind, pieces)


@pytest.mark.parametrize("template", [{"fields": {}}, {"fields": {"content": 5}, "start_anchor": "<a>"}, ["x"]])
def test_a_response_template_that_cannot_be_used_is_logged(template: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = scripted.tokenizer_of("mixtral")
    tokenizer.response_template = template
    assert form_of(SimpleNamespace(config=SimpleNamespace(model_type="mixtral")), tokenizer) is None
    assert "The tokenizer's response_template can't be used" in caplog.text


def test_a_call_whose_arguments_are_no_object_is_text() -> None:
    text = '<C>{"name": "f", "arguments": [1]}</C>'
    assert parsed("mixtral", text) == [("str", text)]


def test_a_malformed_call_takes_no_text_from_what_is_before_it() -> None:
    for pieces in (["t<t", "ool_call>]</tool_call> after"], ["a", "<tool_call>a </tool_call>", "x"]):
        assert parsed("qwen3_moe", pieces) == [("str", "".join(pieces))]
