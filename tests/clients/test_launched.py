"""Clients from npm, started by ``moetier launch`` or with the configuration that it prints, ask as it tells them to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

from agent_model import write_model
from agents import CLAUDE, CODEX, OPENCODE, PI, RUN_SECONDS, Agent, without_internet
from http_servers import KEY, ServerProcess

from moetier.tools.cli.settings import API_KEY_VARIABLE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

HELPERS = Path(__file__).parent.parent / "helpers"
MARK, ANSWER, MODEL, CONTEXT = "[launched]", "I am here.", "a-model", 32_000
LAUNCH = [sys.executable, "-m", "moetier.tools.main", "launch"]
# what each is told to do with one message, without a terminal; the second list only if it is not started by launch
WORDS = {
    "opencode": (["run"], []),
    "pi": (["-p"], ["--model", f"moetier/{MODEL}"]),
    "codex": (["exec"], []),
    "claude": (["-p"], []),
}
OFFLINE = {"PI_OFFLINE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1", "OPENCODE_DISABLE_LSP_DOWNLOAD": "1"}


@dataclass(frozen=True, slots=True)
class Place:
    """A server, words before a command that reaches nothing else, and the file with the requests."""

    url: str
    before: Sequence[str]
    record: Path


@pytest.fixture(scope="module")
def place(tinymix: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("launched")
    model = write_model(folder / "model", tinymix)
    (folder / "script").write_text(json.dumps({"sessions": {MARK: [ANSWER]}, "side": "A title", "end": "No more."}))
    with without_internet() as (host, before):
        server = ServerProcess(
            model,
            folder,
            ["--name", MODEL, "--host", host, "--daemon", "none", "--context", str(CONTEXT)],
            under=[str(HELPERS / "scripted_server.py"), str(folder / "script"), str(folder / "record")],
        )
        try:
            yield Place(server.url, before, folder / "record")
        finally:
            server.end()


def answered(place: Place) -> list[dict[str, Any]]:
    lines = place.record.read_text().splitlines() if place.record.exists() else []
    return [line for line in map(json.loads, lines) if MARK in json.dumps(line["body"])]


@pytest.mark.parametrize("way", ["started", "configured"])
@pytest.mark.parametrize("agent", [PI, OPENCODE, CODEX, CLAUDE], ids=lambda agent: agent.name)
def test_a_client_asks_as_it_is_told(
    agent: Agent, way: str, place: Place, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    program = agent.installed(request.config.cache.mkdir("agents"))
    home, repository = tmp_path / "home", tmp_path / "repository"
    for folder in (home, repository):
        folder.mkdir()
    subprocess.run(["git", "init", "-q", repository], check=True)
    environment = {
        "HOME": str(home), "PATH": f"{program.parent}:{os.environ['PATH']}", API_KEY_VARIABLE: KEY,
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""), **OFFLINE,
    }  # fmt: skip

    def run(*command: str) -> str:
        done = subprocess.run(
            [*place.before, *command], cwd=repository, env=environment, stdin=subprocess.DEVNULL, text=True,
            capture_output=True, timeout=RUN_SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    before = len(answered(place))
    launch = [*LAUNCH, agent.name, "--url", place.url, "--no-estimate"]
    words, further = WORDS[agent.name]
    message = f"{MARK} Are you here?"
    if way == "started":
        said = run(*launch, "--run", "--", *words, message)
    else:
        comment, _, configuration = run(*launch).partition("\n")
        configuration = configuration.partition("\n\n# or")[0]
        where = comment.removeprefix("# ").replace("~", str(home))
        shell = 'exec "$@"'
        if where == "the environment":
            shell = f"{configuration}\n{shell}"
        else:
            (repository / where).parent.mkdir(parents=True, exist_ok=True)
            (repository / where).write_text(configuration)
        said = run("sh", "-c", shell, "sh", agent.name, *further, *words, message)
    assert ANSWER in said
    asked = answered(place)[before:]
    assert {line["status"] for line in asked} == {200}
    assert {line["headers"]["authorization"] for line in asked} == {f"Bearer {KEY}"}
    assert {line["body"]["model"] for line in asked} == {MODEL}
    if agent.limits:
        most = [line["body"].get("max_tokens") or line["body"]["max_completion_tokens"] for line in asked]
        assert CONTEXT // 4 in most
