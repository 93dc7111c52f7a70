"""Python clients, unchanged, in an environment of their own, at ``moetier serve``: chats, streams and tools.

The model's whole forward runs; a script chooses its tokens (scripted_server.py). No host but the server can be reached.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

from agent_model import write_model
from agents import without_internet
from environments import with_packages
from http_servers import KEY, ServerProcess
from python_clients import CLIENTS, MODEL, PACKAGES, SCRIPT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

HELPERS = Path(__file__).parent.parent / "helpers"
RUN_SECONDS = 250


@pytest.fixture(scope="module")
def python(request: pytest.FixtureRequest) -> Path:
    return with_packages(Path(request.config.cache.mkdir("python-clients")), PACKAGES)


@pytest.fixture(scope="module")
def server(tinymix: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """Its URL, and words before a command that reaches nothing else."""
    place = tmp_path_factory.mktemp("clients")
    (place / "script").write_text(json.dumps(SCRIPT))
    with without_internet() as (host, before):
        server = ServerProcess(
            write_model(place / "model", tinymix),
            place,
            ["--name", MODEL, "--host", host, "--daemon", "none"],
            under=[str(HELPERS / "scripted_server.py"), str(place / "script"), str(place / "record")],
        )
        try:
            yield f"{server.url}/v1", before
        finally:
            server.end()


@pytest.mark.parametrize("client", CLIENTS)
def test_it_gets_what_the_model_says(client: str, python: Path, server: tuple[str, list[str]], tmp_path: Path) -> None:
    url, before = server
    done = subprocess.run(
        [*before, python, HELPERS / "python_clients.py", url, KEY, client],
        env={"HOME": str(tmp_path), "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
