"""Clients from PyPI and npm, unchanged, ask ``moetier serve`` for answers of a given form, and parse them.

The model has random weights, so its answers are of this form only if the server sees to it. No host but the server can
be reached.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')
pytest.importorskip("llguidance", reason='pip install ".[serve]"')

from agent_model import write_model
from agents import npm_packages, without_internet
from environments import with_packages
from http_servers import KEY, ServerProcess
from python_clients import PACKAGES
from structured_clients import CLIENTS, MODEL
from transformers import AutoTokenizer, GenerationConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

HELPERS = Path(__file__).parent.parent / "helpers"
OF_NPM = ("openai@7.59.0", "zod@4.6.7")
RUN_SECONDS = 250


@pytest.fixture(scope="module")
def server(tinymix: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """Its URL, and words before a command that reaches nothing else."""
    place = tmp_path_factory.mktemp("structured")
    with without_internet() as (host, before):
        model = without_reasoning(write_model(place / "model", tinymix))
        server = ServerProcess(model, place, ["--name", MODEL, "--host", host, "--daemon", "none", "--context", "4096"])
        try:
            yield f"{server.url}/v1", before
        finally:
            server.end()


def without_reasoning(model: Path) -> Path:
    """Suppress the tokens that may begin reasoning: a model of random weights would never end it."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    kept = {"<tool_call>", "</tool_call>", tokenizer.eos_token}
    config = GenerationConfig.from_pretrained(model)
    vocabulary = tokenizer.get_vocab().items()
    config.suppress_tokens = [number for token, number in vocabulary if "<" in token and token not in kept]
    config.save_pretrained(model)
    return model


def run(command: Sequence[str | Path], home: Path) -> None:
    done = subprocess.run(
        command,
        env={"HOME": str(home), "PATH": "/usr/local/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("client", CLIENTS)
def test_of_python(client: str, server: tuple[str, list[str]], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url, before = server
    python = with_packages(Path(request.config.cache.mkdir("python-clients")), PACKAGES)
    run([*before, python, HELPERS / "structured_clients.py", url, KEY, client], tmp_path)


def test_of_npm(server: tuple[str, list[str]], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url, before = server
    folder = npm_packages(Path(request.config.cache.mkdir("agents")) / "structured", OF_NPM)
    script = folder / "structured_clients.mjs"  # it imports from the folder in which it is
    script.write_text((HELPERS / "structured_clients.mjs").read_text())
    run([*before, "node", script, url, KEY], tmp_path)
