"""Options of sampling and of penalties, in generate, chat and serve."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moetier
from moetier.runtime.generation.decoding import ONE_SEQUENCE, behind, sampling_of
from moetier.tools.main import main

PROMPT = "La mattina seguente, don Rodrigo"
NEW = 12
QWEN3 = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0}
# The model continues with "ia". Its score leads by 4.3; company, a cached prefix or another processor moves it by less.
CERTAIN = {"prompt": "Agnese e Luc", "max_tokens": 1}


@pytest.fixture(scope="module")
def loaded(tinymix_4bit: Path) -> Iterator[tuple[Any, Any]]:
    model, tokenizer = moetier.load(tinymix_4bit, daemon=None)
    with model.tiers:
        yield model, tokenizer


def options(asked: dict[str, float]) -> list[str]:
    return [word for name, value in asked.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def text_of(loaded: tuple[Any, Any], **given: Any) -> str:
    """Of transformers' generate(), with these keyword arguments."""
    model, tokenizer = loaded
    inputs = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**inputs, **ONE_SEQUENCE, max_new_tokens=NEW, **given)
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def penalised(loaded: tuple[Any, Any], presence: float, frequency: float) -> str:
    """Text by the definition of the penalties. The model computes each token in the company that generate() has: a
    prompt at once, then one token after another. Otherwise the last bits differ, and with them a choice between two
    tokens of nearly the same score."""
    model, tokenizer = loaded
    step, past, new = tokenizer(PROMPT)["input_ids"], None, list[int]()
    for _ in range(NEW):
        with torch.no_grad():
            out = model(input_ids=torch.tensor([step]), past_key_values=past, use_cache=True)
        scores, past = out.logits[0, -1].float(), out.past_key_values
        for token in set(new):
            scores[token] -= presence + frequency * new.count(token)
        step = [int(scores.argmax())]
        new += step
    return str(tokenizer.decode(new, skip_special_tokens=True))


def allowed(scores: torch.Tensor, asked: dict[str, float]) -> torch.Tensor:
    """Which tokens samplers leave, by their definitions: of scores [tokens, vocabulary], one sampler alone."""
    probabilities = scores.float().softmax(dim=-1)
    ranked = probabilities.sort(dim=-1, descending=True).values
    match asked:
        case {"top_k": k}:
            return probabilities >= ranked[:, int(k) - 1, None]
        case {"top_p": p}:
            before = ranked.cumsum(dim=-1) - ranked
            return probabilities >= ranked.masked_fill(before > p + 1e-4, 2).amin(dim=-1, keepdim=True)
        case {"min_p": p}:
            return probabilities >= (p - 1e-4) * ranked[:, :1]
    raise AssertionError(asked)


@pytest.mark.parametrize("asked", [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.3}])
def test_a_sampler_leaves_out_what_it_should(loaded: tuple[Any, Any], asked: dict[str, float]) -> None:
    """And does so among all tokens: transformers' own top_k of 50 is off."""
    model, tokenizer = loaded
    inputs = tokenizer(PROMPT, return_tensors="pt")
    start = inputs["input_ids"].shape[1]
    torch.manual_seed(1)
    for given, is_within in (({"top_k": 0} | asked, True), ({"top_k": 0, "temperature": 1}, False)):
        raw = {"return_dict_in_generate": True, "output_logits": True}
        out = model.generate(**inputs, **sampling_of(given), **raw, max_new_tokens=24)
        sampled = allowed(torch.cat(out.logits), asked).gather(1, out.sequences[0, start:, None])
        assert bool(sampled.all()) == is_within


def test_a_sampler_that_leaves_out_tokens_samples() -> None:
    for asked in ({"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.1}, QWEN3):
        assert sampling_of(asked) == asked | {"do_sample": True}
    for neutral in ({"top_k": 0}, {"top_p": 1.0}, {"min_p": 0.0}, {"repetition_penalty": 1.1}):
        assert sampling_of(neutral) == neutral
    assert sampling_of(QWEN3 | {"temperature": 0.0, "repetition_penalty": 1.1}) == {
        "do_sample": False,
        "repetition_penalty": 1.1,
    }


@pytest.mark.parametrize(("presence", "frequency"), [(2.0, 0.0), (0.0, 1.5), (-1.0, 0.5)])
def test_penalties_are_those_of_their_definition(loaded: tuple[Any, Any], presence: float, frequency: float) -> None:
    tokens = len(loaded[1](PROMPT)["input_ids"])
    asked = {"presence_penalty": presence, "frequency_penalty": frequency}
    given = behind(tokens, {"do_sample": False} | asked)
    assert text_of(loaded, **given) == penalised(loaded, presence, frequency) != text_of(loaded, do_sample=False)


def test_generate_has_them_all(
    loaded: tuple[Any, Any], tinymix_4bit: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    """As options, in the environment and in a settings file."""

    def generated(*arguments: str) -> str:
        assert main(["generate", str(tinymix_4bit), PROMPT, "--json", "--max-new-tokens", str(NEW), *arguments]) == 0
        return str(json.loads(capsys.readouterr().out)["text"])

    torch.manual_seed(3)
    sampled = text_of(loaded, **sampling_of(QWEN3 | {"repetition_penalty": 1.2}))
    assert generated(*options(QWEN3 | {"repetition_penalty": 1.2}), "--seed", "3") == sampled
    assert generated(*options({"presence_penalty": 2.0, "frequency_penalty": 0.5})) == penalised(loaded, 2.0, 0.5)
    settings = tmp_path / "config.toml"
    settings.write_text("[generate]\ntop-p = 0.95\ntop-k = 20\nrepetition-penalty = 1.2\nseed = 3\n")
    monkeypatch.setenv("MOETIER_CONFIG", str(settings))
    monkeypatch.setenv("MOETIER_GENERATE_TEMPERATURE", "0.6")
    assert generated() == sampled


def test_chat_has_them_all(
    loaded: tuple[Any, Any], tinymix_4bit: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Penalties count the tokens of one answer: a second one to the same words is the same."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("To be?\n/reset\nTo be?\n"))
    asked = {"presence_penalty": 2.0, "frequency_penalty": 1.0}
    assert main(["chat", str(tinymix_4bit), "--json", "--max-new-tokens", "16", *options(asked)]) == 0
    first, second = (json.loads(line)["content"] for line in capsys.readouterr().out.splitlines())
    assert first == second
    monkeypatch.setattr(sys, "stdin", io.StringIO("To be?\n"))
    assert main(["chat", str(tinymix_4bit), "--json", "--max-new-tokens", "16", *options(QWEN3)]) == 0
    sampled = json.loads(capsys.readouterr().out)["content"]
    assert sampled != first


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top-k", "-1"),
        ("top-k", "1.5"),
        ("top-p", "0"),
        ("top-p", "1.01"),
        ("min-p", "-0.1"),
        ("min-p", "nan"),
        ("repetition-penalty", "0"),
        ("presence-penalty", "2.1"),
        ("frequency-penalty", "-2.1"),
    ],
)
def test_what_is_out_of_range_is_refused(
    tinymix_4bit: Path, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    for command in "generate", "chat":
        try:
            code = main([command, str(tinymix_4bit), f"--{name}", value])
        except SystemExit as ended:
            code = int(str(ended.code))
        assert code in (1, 2)
        said = capsys.readouterr().err
        assert name in said
        assert value in said


class Server:
    """An application, asked in this process."""

    def __init__(self, app: Any) -> None:
        self._app = app

    def ask(self, **asked: Any) -> Any:
        import httpx2

        async def post() -> Any:
            transport = httpx2.ASGITransport(app=self._app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
                return await client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": NEW} | asked)

        return asyncio.run(post())

    def text(self, **asked: Any) -> str:
        answer = self.ask(**asked)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def refuses(self, name: str, value: Any) -> str:
        answer = self.ask(**{name: value})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == name
        return str(answer.json()["error"]["message"])


@pytest.fixture(scope="module")
def server(tinymix_4bit: Path) -> Iterator[Server]:
    pytest.importorskip("starlette", reason='pip install ".[serve]"')
    from http_servers import serving

    with serving(tinymix_4bit, context=400) as (app, _):
        found = Server(app)
        found.text(max_tokens=1)  # its threads are there now
        yield found


def test_requests_have_samplers(server: Server) -> None:
    greedy = server.text(**CERTAIN, temperature=0)
    for asked in ({"top_k": 1}, {"top_k": 1, "temperature": 2.0}, {"top_p": 1e-9, "temperature": 2.0}):
        assert {server.text(**CERTAIN, **asked) for _ in range(8)} == {greedy}, asked
    assert len({server.text(**CERTAIN, temperature=2.0) for _ in range(32)}) > 1
    assert len({server.text(**QWEN3) for _ in range(3)}) > 1
    assert server.text(**CERTAIN, top_k=0, top_p=1, min_p=0, repetition_penalty=1, presence_penalty=0) == greedy


def test_requests_have_penalties_and_seeds(server: Server, loaded: tuple[Any, Any]) -> None:
    assert server.text(seed=0, presence_penalty=2.0, frequency_penalty=0.5) == penalised(loaded, 2.0, 0.5)
    torch.manual_seed(3)
    sampled = text_of(loaded, do_sample=True, **QWEN3)
    assert server.text(seed=3, **QWEN3) == sampled
    assert {server.text(**CERTAIN, min_p=1.0, temperature=2.0) for _ in range(8)} == {"ia"}
    expected = text_of(loaded, do_sample=False, repetition_penalty=1.2)
    assert server.text(seed=0, temperature=0, repetition_penalty=1.2) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", "much"),
    ],
)
def test_requests_out_of_range_are_refused(server: Server, name: str, value: Any) -> None:
    assert server.refuses(name, value).startswith(f"{name}: ")
