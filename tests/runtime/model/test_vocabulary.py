"""Tokenizers whose ids exceed a model's embeddings: those of another model, and those with further added tokens."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')

import httpx2
import scripted
from http_servers import serving

import moetier
from moetier.runtime.generation.decoding import encode
from moetier.runtime.model.vocabulary import embeddings_of
from moetier.tiers.errors import ConfigError, StoreFormatError
from moetier.tools.chat.answer import Answering, AnswerOptions
from moetier.tools.main import main

FURTHER = "<further>"  # added, beyond the embeddings
ROWS = len(scripted.tokens_of("qwen3_moe"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted.write_checkpoint(tmp_path_factory.mktemp("model"), "qwen3_moe")


@pytest.fixture(scope="module")
def another_models(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer of 600 ordinary tokens; the model has fewer embeddings."""
    return _changed(checkpoint, tmp_path_factory.mktemp("another"), _enlarge)


@pytest.fixture(scope="module")
def further(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With one more added token, as fine-tuned models have for padding."""
    return _changed(checkpoint, tmp_path_factory.mktemp("further"), _add)


def _changed(source: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(source, folder, dirs_exist_ok=True)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    change(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def _enlarge(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"word{number}": number for number in range(len(vocabulary), 600)}
    tokenizer["added_tokens"] = [each | {"id": each["id"] + 400} for each in tokenizer["added_tokens"]]


def _add(tokenizer: dict[str, Any]) -> None:
    last = tokenizer["added_tokens"][-1]
    tokenizer["added_tokens"].append(last | {"id": last["id"] + 1, "content": FURTHER})


def test_another_models_tokenizer_is_refused_at_load(another_models: Path) -> None:
    with pytest.raises(StoreFormatError) as refused:
        moetier.load(another_models, daemon=None)
    assert refused.value.cause == (
        f"The tokenizer of {another_models} has token ids up to 599, but the model has only {ROWS} embeddings."
    )


@pytest.mark.parametrize("command", [["generate", "DIR", "Ciao"], ["chat", "DIR"], ["serve", "DIR", "--port", "0"]])
def test_commands_refuse_it(another_models: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(another_models) if each == "DIR" else each for each in command] + ["--daemon", "none"]) == 1
    said = capsys.readouterr().err
    assert f"only {ROWS} embeddings" in said
    assert "bug" not in said


def test_quality_refuses_both(
    another_models: Path, further: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(f"Ciao mondo {FURTHER}")
    for folder, cause in (another_models, f"only {ROWS} embeddings"), (further, "The text text has the token"):
        assert main(["quality", str(folder), "--text", str(tmp_path / "text.txt")]) == 1
        assert cause in capsys.readouterr().err


def test_a_token_without_embedding_is_refused_where_it_stands(further: Path) -> None:
    model, tokenizer = moetier.load(further, daemon=None)
    assert tokenizer is not None
    with model.tiers:
        assert (embeddings_of(model), len(tokenizer)) == (ROWS, ROWS + 1)
        assert encode(model, tokenizer, "Ciao")["input_ids"].max() < ROWS
        with pytest.raises(ConfigError, match="has the token '<further>'"):
            encode(model, tokenizer, f"Ciao {FURTHER}", "Prompt 2")
        answering = Answering(model, tokenizer, None, AnswerOptions({}), is_plain=False)  # type: ignore[arg-type] # not used
        with pytest.raises(ConfigError, match="has the token '<further>'"):
            answering.answer(tokenizer(FURTHER)["input_ids"], most=2, is_interrupted=lambda: False, echo=False)  # type: ignore[arg-type]


def test_a_server_refuses_it_and_goes_on(further: Path) -> None:
    async def ask(app: Any) -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            chat = {"messages": [{"role": "user", "content": FURTHER}]}
            return [
                await client.post("/v1/completions", json={"prompt": FURTHER, "max_tokens": 2}),
                await client.post("/v1/chat/completions", json=chat),
                await client.post("/v1/completions", json={"prompt": scripted.LOOP, "max_tokens": 2}),
            ]

    with serving(further, context=200) as (app, _):
        answers = asyncio.run(ask(app))
    assert [answer.status_code for answer in answers] == [400, 400, 200]
    said = [answer.json()["error"] for answer in answers[:2]]
    assert {each["message"] for each in said} == {
        "The prompt has the token '<further>', for which the model has no embedding."
    }
    assert [each["param"] for each in said] == ["prompt", "messages"]
