"""Python clients, unchanged, in an environment of their own, at ``moetier serve``: chats, streams and tools.

The model's whole forward runs; a script chooses its tokens (scripted_server.py). No host but the server can be reached.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

from agent_model import write_model
from agents import INSTALL_SECONDS, without_internet
from http_servers import KEY, ServerProcess
from python_clients import CLIENTS, MODEL, SCRIPT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

HELPERS = Path(__file__).parent.parent / "helpers"
PACKAGES = ("openai==3.57.0", "anthropic==2.14.0", "langchain-openai==1.7.4", "litellm==1.110.2")
RUN_SECONDS = 250


@pytest.fixture(scope="module")
def python(request: pytest.FixtureRequest) -> Path:
    """The Python of an environment with the clients. Skips if pip can't install them."""
    folder = Path(request.config.cache.mkdir("python-clients"))
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "installed").exists() or (folder / "installed").read_text() != str(PACKAGES):
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder / "environment"], check=True)
            command = [folder / "environment" / "bin" / "python", "-m", "pip", "install", "--quiet", *PACKAGES]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
            except subprocess.TimeoutExpired:
                pytest.skip(f"pip did not install {', '.join(PACKAGES)} in {INSTALL_SECONDS} seconds")
            if done.returncode:
                pytest.skip(f"pip can't install {', '.join(PACKAGES)}: {done.stderr.strip()[-200:]}")
            (folder / "installed").write_text(str(PACKAGES))
    return folder / "environment" / "bin" / "python"


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
