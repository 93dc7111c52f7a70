"""`moetier launch`: what it prints, and programs that it starts, at a small server in place of one with a model.

tests/clients/test_launched.py has the programs themselves.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import socket
import subprocess
import threading
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from places import DOCS

from moetier.tiers.errors import UnavailableError
from moetier.tools.cli.settings import API_KEY_VARIABLE
from moetier.tools.commands import launch
from moetier.tools.launch.clients import CLIENTS, ServerModel
from moetier.tools.launch.server import has_tools, models_of, seconds_of
from moetier.tools.main import main

KEY = "a-key-of-the-tests"
# prints what it was given, and the temporary file if an argument names one
PROGRAM = """#!/bin/sh
for word; do printf '%s\\n' "$word"; done
for word; do [ -f "$word" ] && cat "$word"; done
env | grep -E '^(ANTHROPIC|CLAUDE_CODE|OPENCODE|MOETIER_API)'
exit 3
"""


class Server(http.server.BaseHTTPRequestHandler):
    """Has the models "one" and "two" for all who show the key."""

    def do_GET(self) -> None:
        may = self.path == "/v1/models" and self.headers["authorization"] == f"Bearer {KEY}"
        models = [
            {"id": "one", "aliases": ["first"], "loaded": True, "max_model_len": 4000},
            {"id": "two", "aliases": [], "loaded": False, "max_model_len": None},
            {"id": "three", "loaded": True, "max_model_len": 2048, "trained_context": 2048},
        ]
        body = json.dumps({"data": models}).encode()
        self.send_response(200 if may else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        """Refuse tools, as a server does whose model's template has none."""
        body = json.dumps({"error": {"param": "tools"}}).encode()
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(400 if self.path == "/tokenize" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MOETIER_API_KEY", KEY)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for client in CLIENTS.values():
        (folder / client.command).write_text(PROGRAM)
        (folder / client.command).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def printed(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    return both(capsys, *words, status=status)[0]


def both(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> tuple[str, str]:
    assert main(["launch", *words, "--no-estimate"]) == status
    return capsys.readouterr()


def test_its_page_has_the_options_that_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["launch", "--help"])
    own = capsys.readouterr().out.partition("\noptions:\n")[2].partition("\n\n")[0]
    options = set(re.findall(r"--[a-z-]+", own)) - {"--help", "--estimate", "--directory"}  # these need no words
    section = (DOCS / "serve.md").read_text().partition("\n### Programs for coding\n")[2].partition("\n### ")[0]
    assert "--run" in options
    assert not [option for option in options if not re.search(rf"`{option}[`\s=]", section)]


def test_it_prints_what_belongs_into_the_file_of_each(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """None of it has the key itself."""
    said = {name: printed(capsys, name, "--url", url, "--model", "first", status=1) for name in CLIENTS}
    bodies = {name: text.partition("\n")[2].partition("\n\n# ")[0] for name, text in said.items()}
    assert all(KEY not in text for text in said.values())
    opencode, pi = json.loads(bodies["opencode"]), json.loads(bodies["pi"])
    assert opencode["model"] == "moetier/one"
    assert opencode["provider"]["moetier"]["options"] == {"baseURL": f"{url}/v1", "apiKey": "{env:MOETIER_API_KEY}"}
    assert opencode["provider"]["moetier"]["models"]["one"]["limit"] == {"context": 4000, "output": 1000}
    assert pi["providers"]["moetier"]["apiKey"] == "MOETIER_API_KEY"
    assert pi["providers"]["moetier"]["models"] == [{"id": "one", "contextWindow": 4000, "maxTokens": 1000}]
    codex = tomllib.loads(bodies["codex"])
    assert (codex["model"], codex["model_provider"], codex["model_context_window"]) == ("one", "moetier", 4000)
    assert codex["model_providers"]["moetier"] == {
        "name": "moetier", "base_url": f"{url}/v1", "wire_api": "responses", "env_key": "MOETIER_API_KEY",
    }  # fmt: skip
    assert f"export ANTHROPIC_BASE_URL={url}\n" in bodies["claude"]
    assert 'export ANTHROPIC_AUTH_TOKEN="$MOETIER_API_KEY"' in bodies["claude"]


def test_it_says_what_a_model_lacks(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    said, first = both(capsys, "opencode", "--url", url, "--model", "one", status=1)
    assert "--run" not in said
    lacks = "its context has 4,000 tokens, and the program's first prompt about 10,104; its chat template has no tools"
    assert first.startswith(f"moetier: one can't be used with opencode: {lacks}.\n")
    assert first.endswith("Its configuration would be:\n")
    assert '"tool_call": false' in said
    said, first = both(capsys, "pi", "--url", url, "--model", "one", status=1)
    assert first.startswith("moetier: one can't be used with pi: its chat template")
    said, first = both(capsys, "pi", "--url", url, "--model", "one", "--run", status=1)
    assert said == "", "nothing is started"
    assert first.startswith("moetier: one can't be used with pi: its chat template")
    said = printed(capsys, "opencode", "--url", url, "--model", "two")  # it is not loaded, and is not for this
    assert '"tool_call": true' in said
    assert "can't" not in said
    assert said.endswith(f"moetier launch opencode --url {url} --model two --run\n")
    _, first = both(capsys, "opencode", "--url", url, "--model", "three", status=1)
    assert "it was trained for 2,048 tokens, and the program's first prompt has about 10,104" in first
    assert "--context" not in first, "the model has no longer one"
    assert "Serve another model" in first


@pytest.mark.parametrize("name", CLIENTS)
def test_it_starts_each_with_what_is_temporary(
    name: str, url: str, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    words = [
        "launch",
        name,
        "--url",
        f"{url}/v1/",
        "--model",
        "two",
        "--run",
        "--no-estimate",
        "--",
        "--continue",
        "-x",
    ]
    assert main(words) == 3, "the program's own status"
    said: str = capfd.readouterr().out
    assert "--continue\n-x\n" in said
    assert url in said
    assert "two" in said
    assert KEY in said
    assert not [*home.iterdir()]
    for path in (line for line in said.splitlines() if line.startswith("/")):
        assert not Path(path).exists(), "it is gone with the program"


def test_values_reach_codex_as_toml() -> None:
    target = ServerModel("http://h:1", 'a "b" \\ c', 8192, "k")
    words = CLIENTS["codex"].launch(target).arguments
    values: dict[str, Any] = {}
    for word in words[1::2]:
        values |= tomllib.loads(word)
    assert {*words[::2]} == {"--config"}
    assert values["model"] == target.model
    assert values["model_providers"]["moetier"]["base_url"] == "http://h:1/v1"


def test_names_reach_codex_and_a_shell_as_they_are() -> None:
    """TOML has no surrogate pairs, and a shell replaces variables and commands in double quotes."""
    target = ServerModel("http://h:1", 'qwen-🦙 $(touch x) `y` " $MOETIER_API_KEY', 8192, "k")
    assert tomllib.loads(CLIENTS["codex"].configuration(target))["model"] == target.model
    script = CLIENTS["claude"].configuration(target) + '\nprintf "%s\\n%s" "$ANTHROPIC_MODEL" "$ANTHROPIC_AUTH_TOKEN"'
    shell = subprocess.run(
        ["sh", "-c", script], env={API_KEY_VARIABLE: "k"}, capture_output=True, text=True, check=True
    )
    assert shell.stdout.splitlines() == [target.model, "k"]


@pytest.mark.parametrize(
    "body", [b'[{"id": "a\\u001b[2J"}]', b'[{"id": "a", "max_model_len": "8"}]', b'[{"id": "a", "aliases": 5}]']
)
def test_models_that_cannot_be_named_are_left_out(body: bytes) -> None:
    with raw_server(b"HTTP/1.0 200 OK\r\n\r\n" + b'{"data": ' + body + b"}") as url:
        assert models_of(url, None) == []


@pytest.mark.parametrize("body", [b"[" * 100_000, b" " * (2 << 20)], ids=["nested", "long"])
def test_an_answer_that_cannot_be_read_is_of_no_server_of_ours(body: bytes) -> None:
    with (
        raw_server(b"HTTP/1.0 200 OK\r\n\r\n" + b'{"data": ' + body) as url,
        pytest.raises(UnavailableError, match="There is no server of moetier"),
    ):
        models_of(url, None)


def test_an_answer_that_comes_byte_by_byte_is_not_waited_for() -> None:
    """Each byte begins the socket's timeout anew, of the headers, too."""
    is_over = threading.Event()

    def send(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.0 200 OK\r\n")
        with contextlib.suppress(OSError):
            while not is_over.wait(0.05):
                connection.sendall(b"x")

    with raw_server(send) as url:
        with pytest.raises(UnavailableError, match="did not end within"):
            models_of(url, None, 0.5)
        is_over.set()


def test_another_status_is_reported() -> None:
    with (
        raw_server(b"HTTP/1.0 500 Internal Server Error\r\n\r\n") as url,
        pytest.raises(UnavailableError, match="it answers with status 500"),
    ):
        models_of(url, None)


@pytest.mark.parametrize("body", [b"[" * 200_000, b" " * (2 << 20), b"{}", b'{"error": 5}'], ids=len)
def test_of_an_answer_that_cannot_be_read_nothing_is_known_of_tools(body: bytes) -> None:
    with raw_server(b"HTTP/1.0 400 Bad Request\r\n\r\n" + body) as url:
        assert has_tools(url, None, {"id": "m", "loaded": True}) is None


def test_what_is_no_http_is_no_server() -> None:
    with raw_server(b"220 mail\r\n") as url, pytest.raises(UnavailableError, match="There is no server of moetier"):
        models_of(url, None)


@contextlib.contextmanager
def raw_server(answer: bytes | Callable[[socket.socket], None]) -> Iterator[str]:
    """URL at which one request is answered with ``answer``, or by it."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as thread:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                if callable(answer):
                    answer(connection)
                else:
                    with contextlib.suppress(OSError):  # the client has read enough
                        connection.sendall(answer)

        served = thread.submit(serve)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        served.result()


def test_without_a_key_none_is_named() -> None:
    target = ServerModel("http://h:1", "m")
    for name, client in CLIENTS.items():
        assert "MOETIER_API_KEY" not in client.configuration(target), name
        assert "MOETIER_API_KEY" not in str(client.launch(target)), name


def test_what_cannot_be_used_is_reported(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*words: str) -> str:
        assert main(["launch", "pi", "--no-estimate", *words]) != 0
        return capsys.readouterr().err

    assert "has 3 models: one, two, three" in error("--url", url)
    assert "has no model 'four'" in error("--url", url, "--model", "four")
    assert "Add --run" in error("--url", url, "word")
    assert "There is no server of moetier at http://127.0.0.1:1" in error("--url", "http://127.0.0.1:1")
    assert "There is no server of moetier at file:///etc" in error("--url", "file:///etc")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "Install it: npm install -g @mariozechner/pi-coding-agent" in error("--url", url, "--model", "two", "--run")
    monkeypatch.setenv("MOETIER_API_KEY", "another")
    assert "does not accept the API key" in error("--url", url)


def test_a_first_prompt_is_estimated_from_a_plan(
    url: str, tinymix_4bit: Path, short_probes: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["launch", "pi", "--url", url, "--model", "two", "--directory", str(tinymix_4bit)]
    assert main(words) == 0
    assert "A first prompt of pi has about 1,909 tokens" in capsys.readouterr().out
    assert [seconds_of(tokens, [(1000, 2.0), (8000, 30.0)]) for tokens in (500, 1000, 4500, 8000, 8001)] == [
        1.0, 2.0, 16.0, 30.0, None,
    ]  # fmt: skip
    assert seconds_of(10, []) is None


def test_a_first_prompt_that_takes_long_has_a_shorter_way(
    tinymix_4bit: Path, tmp_path: Path, short_probes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, target = replace(CLIENTS["claude"], prompt_tokens=100), ServerModel("http://h:1", "m")
    monkeypatch.setattr(launch, "LONG_SECONDS", 0.0)
    said = launch.first_prompt(client, target, tinymix_4bit)
    assert re.search(r"A first prompt of claude has about 100 tokens: about \d+ s here\. .* A shorter way: pi\.$", said)
    assert launch.first_prompt(client, target, tmp_path / "nothing") == ""
    assert "The time of a first prompt is not known: " in launch.first_prompt(client, target, tmp_path)


def test_the_key_may_be_in_a_file(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file := tmp_path / "key").write_text(f"{KEY}\n")
    file.chmod(0o600)
    assert launch.key_of(file) == KEY
    said = printed(capsys, "pi", "--url", url, "--model", "two", "--api-key-file", str(file))
    assert f"--api-key-file {file} --run" in said
