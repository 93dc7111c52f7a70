"""The unmodified openai client at a real server: one after the other, and together with a daemon's experts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

import httpx2
import openai
from daemons import running_daemon
from http_servers import KEY, ServerProcess, listening, serving
from openai import AsyncOpenAI, OpenAI
from prometheus import scrape
from prometheus_client.parser import text_string_to_metric_families as parsed
from readers import PATIENCE
from threads import wait_until

from moetier.tools.cli.arguments import resources_of
from moetier.tools.commands.serve import first_lines
from moetier.tools.launch.server import has_tools, models_of
from moetier.tools.main import build_parser, main
from moetier.tools.serve.catalogue import Catalogue
from moetier.tools.serve.models import Models
from moetier.tools.serve.options import ServeConfig
from moetier.tools.serve.serving import ModelLoader

PROMPT = "La mattina seguente, don Rodrigo"
NAME = "small"
QUEUED = ["--context", "1500", "--queue", "8"]
SHOWN = {"Authorization": f"Bearer {KEY}"}
LONG = "la mattina " * 100_000
SAMPLED = {"temperature": 1.0, "max_tokens": 16}
CERTAIN = "Agnese e Luc"  # the score of "ia" leads by 4.3, and company moves it by less


@pytest.fixture(scope="module")
def server(tinymix_4bit: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One after the other."""
    place = tmp_path_factory.mktemp("serve")
    found = ServerProcess(tinymix_4bit, place, ["--name", NAME, "--daemon", "none", "--parallel", "1", *QUEUED])
    yield found
    found.end()


@pytest.fixture(scope="module")
def together(tinymix_4bit: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Eight at a time, with the experts of a daemon."""
    place = tmp_path_factory.mktemp("together")
    with running_daemon(tinymix_4bit, folder=place / "daemon") as daemon:
        options = ["--parallel", "8", "--daemon", str(daemon.folder), *QUEUED]
        found = ServerProcess(tinymix_4bit, place, ["--name", NAME, *options])
        yield found
        found.end()


@pytest.fixture(params=["server", "together"])
def either(request: pytest.FixtureRequest, server: ServerProcess, together: ServerProcess) -> ServerProcess:
    return {"server": server, "together": together}[request.param]


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with server.client() as found:
        yield found


def text_of(client: OpenAI, prompt: str = PROMPT, **asked: Any) -> str:
    return client.completions.create(**{"model": NAME, "prompt": prompt, "max_tokens": 24} | asked).choices[0].text


def streamed(client: OpenAI, **asked: Any) -> tuple[str, Any]:
    """The text, and the last piece."""
    pieces = list(client.completions.create(**{"model": NAME, "prompt": PROMPT, "stream": True} | asked))
    return "".join(piece.choices[0].text for piece in pieces), pieces[-1]


def test_it_says_where_it_is_and_whose_experts_it_has(server: ServerProcess, together: ServerProcess) -> None:
    first, context, experts, bits, kept = server.said.splitlines()
    assert first == f"{NAME}: {server.url}/v1"
    assert context.startswith("  a context of 1,500 tokens (")
    assert context.endswith("; at most 1 requests are computed together")
    assert experts == "  the experts are held by this process"
    assert "requests" in bits
    assert kept.startswith("  keys and values are kept in memory only; with --kv-cache-dir FOLDER, on disk too: ")
    held = r"\n  the experts are held by the daemon \S+, with room for \d+ of 64, as its --ram says "
    assert re.search(held, together.said)


def test_launch_finds_out_that_the_template_has_no_tools(server: ServerProcess) -> None:
    (model,) = models_of(server.url, KEY)
    assert (model["max_model_len"], model["trained_context"]) == (1500, 2048)
    assert has_tools(server.url, KEY, model) is False
    assert has_tools(server.url, KEY, model | {"loaded": False}) is None, "that would load it"


def test_one_model_is_there_under_its_own_name(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "moetier"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_text_is_that_of_generate(client: OpenAI, tinymix_4bit: Path) -> None:
    import moetier

    model, tokenizer = moetier.load(tinymix_4bit, daemon=None)
    assert tokenizer is not None
    with model.tiers:
        ids = tokenizer(PROMPT, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=24, do_sample=False)
    expected = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    done = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=24, seed=0)
    assert done.choices[0].text == expected
    assert done.choices[0].finish_reason == "length"
    assert done.usage is not None
    assert done.usage.completion_tokens == 24
    assert done.usage.total_tokens == done.usage.prompt_tokens + 24


def test_a_stream_is_the_same_text(either: ServerProcess) -> None:
    with either.client() as client:
        whole = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=24, temperature=0)
        text, last = streamed(client, max_tokens=24, temperature=0)
    assert text == whole.choices[0].text
    assert last.choices[0].finish_reason == "length"
    assert last.usage.completion_tokens == 24


def test_a_chat_without_a_template_ends_where_the_person_would_speak(either: ServerProcess) -> None:
    messages: list[Any] = [{"role": "system", "content": "Sii breve."}, {"role": "user", "content": PROMPT}]
    with either.client() as client:
        done = client.chat.completions.create(model=NAME, messages=messages, max_tokens=12)
        pieces = list(client.chat.completions.create(model=NAME, messages=messages, max_tokens=12, stream=True))
    assert done.choices[0].message.role == pieces[0].choices[0].delta.role == "assistant"
    assert done.choices[0].message.content == "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert "User:" not in (done.choices[0].message.content or "")
    assert pieces[-1].usage is not None
    assert done.model == pieces[-1].model == NAME


def test_stop_strings_end_an_answer_and_are_no_part_of_it(either: ServerProcess) -> None:
    with either.client() as client:
        whole = text_of(client, temperature=0)
        stop = whole[len(whole) // 2 :][:3]
        done = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=24, temperature=0, stop=["§", stop])
        text, last = streamed(client, max_tokens=24, temperature=0, stop=stop)
    assert done.choices[0].text == text == whole[: whole.index(stop)]
    assert done.choices[0].finish_reason == last.choices[0].finish_reason == "stop"
    assert 0 < last.usage.completion_tokens < 24


def test_a_seed_says_what_is_sampled(client: OpenAI) -> None:
    first, again, other = (text_of(client, seed=seed, **SAMPLED) for seed in (1, 1, 2))
    assert first == again != other


def test_together_each_samples_by_its_own_options_and_seed(together: ServerProcess) -> None:
    with together.client() as client, ThreadPoolExecutor(8) as pool:
        warm = pool.map(lambda _: text_of(client, **SAMPLED), range(4))
        cold = pool.map(lambda _: text_of(client, CERTAIN, temperature=0, max_tokens=1), range(4))
        seeded = [*pool.map(lambda seed: text_of(client, seed=seed, **SAMPLED), (1, 2, 1, 2))]
        assert len(set(warm)) > 1
        assert set(cold) == {"ia"}
        assert seeded == [text_of(client, seed=seed, **SAMPLED) for seed in (1, 2, 1, 2)]
        assert seeded[0] != seeded[1]


def test_eight_requests_at_once(either: ServerProcess) -> None:
    prompts = [f"{PROMPT} {number}" for number in range(8)]

    async def ask() -> list[Any]:
        async with AsyncOpenAI(base_url=either.url + "/v1", api_key=KEY, max_retries=0) as client:
            asked = [
                client.completions.create(model=NAME, prompt=prompt, max_tokens=8, temperature=0) for prompt in prompts
            ]
            return await asyncio.gather(*asked)

    answers = asyncio.run(ask())
    assert [answer.usage.completion_tokens for answer in answers] == [8] * 8
    assert len({answer.id for answer in answers}) == 8


def test_more_than_the_queue_holds_is_told_to_come_back(either: ServerProcess) -> None:
    most = 8 + (8 if "--daemon none" not in " ".join(map(str, either.process.args)) else 1)  # type: ignore[operator]
    counted_at_rest(either)
    with either.client() as client:
        with contextlib.ExitStack() as several:
            for number in range(most):
                several.enter_context(streaming(client, f"{number}."))
            with pytest.raises(openai.RateLimitError, match="Try again later") as refused:
                text_of(client)
            assert refused.value.code == "queue_full"
            assert refused.value.response.headers["retry-after"] == "5"
            assert httpx2.get(either.url + "/health").status_code == 200
        counted_at_rest(either)
        assert text_of(client, max_tokens=1)


def test_bad_clients_do_not_keep_others_out(either: ServerProcess) -> None:
    """Half of a header on 400 connections, a megabyte as a prompt, 40 MiB in chunks that claim to be five bytes."""
    host, port = either.url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\n".encode()
    authorised = head + f"Authorization: Bearer {KEY}\r\n".encode()
    with contextlib.ExitStack() as several, either.client() as client, ThreadPoolExecutor(1) as thread:
        idle = [several.enter_context(socket.create_connection((host, int(port)))) for _ in range(400)]
        for connection in idle[::-1]:
            with contextlib.suppress(ConnectionError):  # it has made room already
                connection.sendall(head)
        with contextlib.suppress(ConnectionResetError):
            assert idle[0].recv(1) == b""
        large = thread.submit(lambda: httpx2.post(either.url + "/v1/completions", headers=SHOWN, json={"prompt": LONG}))
        while not large.done():
            assert httpx2.get(either.url + "/health", timeout=PATIENCE).status_code == 200
        assert large.result().json()["error"]["code"] == "context_length_exceeded"
        chunked = several.enter_context(socket.create_connection((host, int(port))))
        with contextlib.suppress(ConnectionError):
            chunked.sendall(authorised + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n")
            for _ in range(40):
                chunked.sendall(b"100000\r\n" + bytes(1 << 20) + b"\r\n")
            chunked.sendall(b"0\r\n\r\n")
        assert chunked.recv(12) == b"HTTP/1.1 413"
        assert text_of(client, max_tokens=1)


def streaming(client: OpenAI, prompt: str) -> Any:
    """An answer that has begun, or waits for its turn."""
    return client.completions.create(model=NAME, prompt=prompt, max_tokens=1400, stream=True)


def test_what_was_said_before_is_not_computed_anew(client: OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Chi era don Abbondio? " * 8}]
    first = client.chat.completions.create(model=NAME, messages=messages, max_tokens=16)
    messages += [
        first.choices[0].message.model_dump(include={"role", "content"}),
        {"role": "user", "content": "E poi?"},
    ]
    second = client.chat.completions.create(model=NAME, messages=messages, max_tokens=4)
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    kept = second.usage.prompt_tokens_details.cached_tokens
    assert kept is not None
    assert first.usage.prompt_tokens - 4 <= kept < second.usage.prompt_tokens


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"n": 0}, "n"),
        ({"frequency_penalty": 3.0}, "frequency_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"extra_body": {"generation_config": "{}"}}, "generation_config"),
    ],
)
def test_what_is_not_done_is_refused(client: OpenAI, asked: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        text_of(client, **asked)
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"


def test_null_and_what_changes_nothing_are_taken(client: OpenAI) -> None:
    neutral = {"n": 1, "presence_penalty": 0, "echo": False, "user": "somebody", "logit_bias": {}}
    assert text_of(client, max_tokens=2, suffix=None, stream_options={"include_usage": True}, **neutral)


def test_chats_that_make_no_sense_are_refused(client: OpenAI) -> None:
    for messages in ([], [{"content": "?"}], [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]):
        with pytest.raises(openai.BadRequestError, match="messages") as refused:
            client.chat.completions.create(model=NAME, messages=messages)  # type: ignore[arg-type]
        assert refused.value.param == "messages"


def test_parts_of_text_are_taken(client: OpenAI) -> None:
    messages: list[Any] = [
        {"role": "developer", "content": "Sii breve."},
        {"role": "user", "content": [{"type": "text", "text": PROMPT}]},
    ]
    assert client.chat.completions.create(model=NAME, messages=messages, max_tokens=2).choices[0].message.content


def test_a_prompt_that_does_not_fit_is_refused(either: ServerProcess) -> None:
    with either.client() as client:
        with pytest.raises(openai.BadRequestError) as refused:
            text_of(client, "la mattina " * 1500)
        assert refused.value.code == "context_length_exceeded"


def test_another_model_is_not_found(client: OpenAI, tinymix_4bit: Path) -> None:
    for name in ("another", str(tinymix_4bit), "mistralai/Mixtral-8x7B-v0.1"):
        with pytest.raises(openai.NotFoundError) as refused:
            text_of(client, model=name)
        assert refused.value.code == "model_not_found"


@pytest.mark.parametrize("path", ["/load_model", "/reset", "/v1/systemone", "/docs", "/v1/models/"])
def test_other_routes_are_not_there(server: ServerProcess, path: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    for method in ("GET", "POST"):
        answer = httpx2.request(method, server.url + path, headers=headers, json={"model": NAME})
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("shown", [None, "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x"])
def test_without_the_key_nothing_but_health(server: ServerProcess, shown: str | None) -> None:
    headers = {} if shown is None else {"Authorization": shown}
    assert httpx2.get(server.url + "/health", headers=headers).status_code == 200
    for path in ("/v1/models", "/metrics", "/nothing"):
        answer = httpx2.get(server.url + path, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx2.post(server.url + "/v1/completions", headers=headers, json={}).status_code == 401


def counted(server: ServerProcess) -> dict[str, float]:
    """By name and outcome, without that of the program."""
    text = scrape(server.url + "/metrics", KEY)
    found = [sample for family in parsed(text) for sample in family.samples if "moetier_serve" in sample.name]
    assert len({sample.labels["model"] for sample in found}) == 1
    return {" ".join([each.name[14:], *filter(None, [each.labels.get("outcome")])]): each.value for each in found}


def counted_at_rest(server: ServerProcess) -> dict[str, float]:
    """When nothing is under way: who is told the last of an answer may ask before it is counted."""
    wait_until(lambda: not counted(server)["requests_under_way"])
    return counted(server)


def test_what_was_asked_for_is_counted(either: ServerProcess) -> None:
    before = counted_at_rest(either)
    with either.client() as client:
        usage = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=8, temperature=0).usage
        assert usage is not None
        with pytest.raises(openai.BadRequestError):
            text_of(client, max_tokens=0)
        with client.completions.create(model=NAME, prompt="Quattro.", max_tokens=1400, stream=True) as pieces:
            next(iter(pieces))
            now = counted(either)
            assert now["requests_under_way"] == 1
            assert now["new_tokens_total"] > before["new_tokens_total"] + 8
        after = counted_at_rest(either)
    change = {name: after[name] - before[name] for name in after}
    assert [change[f"requests_total {outcome}"] for outcome in ("answered", "cancelled", "failed")] == [1, 1, 0]
    assert change["prompt_tokens_total"] > usage.prompt_tokens
    assert 8 < change["new_tokens_total"] < 1400
    details = usage.prompt_tokens_details
    assert change["kept_tokens_total"] >= ((details.cached_tokens or 0) if details is not None else 0)


@pytest.mark.parametrize(("either", "tier"), [("server", "host"), ("together", "daemon")], indirect=["either"])
def test_its_tiers_are_in_the_metrics(either: ServerProcess, tier: str) -> None:
    with either.client() as client:
        text_of(client, max_tokens=2)
    answer = httpx2.get(either.url + "/metrics", headers={"Authorization": f"Bearer {KEY}"})
    assert answer.headers["content-type"].startswith("text/plain; version=")
    samples = [sample for family in parsed(answer.text) for sample in family.samples]
    assert {sample.labels["tier"] for sample in samples if "tier" in sample.labels} == {tier}
    hits = [sample.value for sample in samples if sample.name == "moetier_tier_hits_total"]
    assert len(hits) == 1
    assert hits[0] > 0


def test_what_is_no_json_is_refused(server: ServerProcess) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    answer = httpx2.post(server.url + "/v1/completions", headers=headers, content=b"{")
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_stream_ends_as_openais(server: ServerProcess) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    asked = {"prompt": PROMPT, "max_tokens": 2, "stream": True}
    answer = httpx2.post(server.url + "/v1/completions", headers=headers, json=asked)
    assert answer.text.endswith("data: [DONE]\n\n")


def cancelled_since(server: ServerProcess, before: dict[str, float]) -> float:
    """Requests, when none is under way any more; none of them was answered, or had nearly all of its tokens."""
    after = counted_at_rest(server)
    assert after["requests_total answered"] == before["requests_total answered"]
    assert after["new_tokens_total"] < before["new_tokens_total"] + 1000
    return after["requests_total cancelled"] - before["requests_total cancelled"]


def test_who_goes_away_ends_a_stream(either: ServerProcess) -> None:
    before = counted_at_rest(either)
    with either.client() as client:
        with client.completions.create(model=NAME, prompt="Uno.", max_tokens=1400, stream=True) as pieces:
            assert [next(iter(pieces)) for _ in range(3)]
        assert cancelled_since(either, before) == 1
        assert text_of(client)
    assert re.search(r"cancelled: \d+ prompt tokens( \(\d+ of them cached\))?, \d{1,3} new tokens\n", either.log)


def test_who_goes_away_ends_an_answer_that_does_not_stream(server: ServerProcess) -> None:
    """It waits for its turn behind a stream, and goes first."""
    before = counted_at_rest(server)
    with server.client() as client:
        with client.completions.create(model=NAME, prompt="Due.", max_tokens=1400, stream=True) as busy:
            next(iter(busy))
            host, port = server.url.removeprefix("http://").split(":")
            body = b'{"prompt": "Tre.", "max_tokens": 1400}'
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(head.encode() + body)
                wait_until(lambda: counted(server)["requests_under_way"] == 2)
        assert cancelled_since(server, before) == 2
        assert text_of(client)


def test_the_log_has_no_prompts(either: ServerProcess) -> None:
    with either.client() as client:
        text_of(client, "parola-segreta")
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model=NAME, messages=[{"parola-segreta": "parola-segreta"}])  # type: ignore[list-item]
    either.wait_for("answered:")
    assert "segreta" not in either.log
    assert "Traceback" not in either.log


@pytest.mark.parametrize(
    ("either", "number"), [("server", signal.SIGTERM), ("together", signal.SIGINT)], indirect=["either"]
)
def test_a_signal_ends_streams_and_then_the_server(either: ServerProcess, number: int) -> None:
    with either.client() as client:
        pieces = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=1400, stream=True)
        next(iter(pieces))
        asked = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 1400, "stream": True}
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx2.stream("POST", either.url + "/v1/chat/completions", headers=headers, json=asked) as other:
            either.process.send_signal(number)
            with pytest.raises(openai.APIError) as told:
                list(pieces)
            events = [line for line in other.iter_lines() if line]
    error = {"message": "The server is shutting down.", "type": "server_error", "param": None, "code": None}
    assert (told.value.message, told.value.body) == (error["message"], error)
    assert json.loads(events[-1].removeprefix("data: ")) == {"error": error}
    assert not any("[DONE]" in event for event in events)
    assert either.process.wait(60) == 0
    assert "Traceback" not in either.log


def test_it_does_not_serve_others_without_a_key(
    tinymix_4bit: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOETIER_API_KEY", raising=False)
    assert main(["serve", str(tinymix_4bit), "--host", "0.0.0.0", "--port", "0"]) == 1
    assert "there is no API key" in capsys.readouterr().err


def test_a_port_that_is_taken_is_reported(tinymix_4bit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(tinymix_4bit), "--port", str(taken.getsockname()[1])]) == 1
    assert "can't listen on" in capsys.readouterr().err


def test_the_models_of_another_server_at_the_port_are_reported(
    tinymix_4bit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(tinymix_4bit, context=256) as (app, _), listening(app) as url:
        assert main(["serve", str(tinymix_4bit), "--port", url.rpartition(":")[2]]) == 1
    cause, fix = capsys.readouterr().err.splitlines()
    assert cause.endswith(": Address already in use. Another server of moetier answers there, with small.")
    assert fix == "  Give another --host or --port."


def test_it_promises_no_context_that_was_not_trained_and_says_how_to_share(
    tinymix_4bit: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["serve", str(tinymix_4bit), "--context", "4096", "--daemon", "none"]
    arguments = build_parser().parse_args(words)
    config = ServeConfig.of(vars(arguments))
    loader = ModelLoader(resources_of(arguments, sequences=1), config, None)
    with Models(Catalogue([tinymix_4bit]), loader) as models:
        _, (context, held, *_) = first_lines(models, 1, shares=True)
    assert context.startswith("a context of 2,048 tokens (")
    assert held == "the experts are held by this process; to share them with other processes, start a daemon first"
    assert "--context 4096 is more than the 2,048 tokens of the model's training: no more are used." in caplog.text


def test_a_key_that_is_none_is_reported(
    tmp_path: Path, tinymix_4bit: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("two words\n")
    (tmp_path / "key").chmod(0o600)
    assert main(["serve", str(tinymix_4bit), "--api-key-file", str(tmp_path / "key")]) == 1
    said = capsys.readouterr().err
    assert f"The API key's file {tmp_path / 'key'} does not hold one line of printable ASCII" in said
    assert "Make a key: openssl" in said
    assert main(["serve", str(tinymix_4bit), "--api-key-file", str(tmp_path / "none")]) == 1
    assert f"The API key's file {tmp_path / 'none'} can't be read" in capsys.readouterr().err
    monkeypatch.setenv("MOETIER_API_KEY", "two words")
    assert main(["serve", str(tinymix_4bit)]) == 1
    assert "MOETIER_API_KEY" in capsys.readouterr().err


def test_the_extra_is_named_where_it_is_missing(
    tinymix_4bit: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "starlette", None)
    assert main(["serve", str(tinymix_4bit)]) == 1
    said = capsys.readouterr().err
    assert "needs starlette" in said
    assert 'pip install ".[serve]"' in said
