"""Random requests made from ``/openapi.json`` by schemathesis: no answer is a 500, none is lost, and nothing grows."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

import httpx2
from agent_model import write_model
from crowd import usage_of
from environments import with_packages
from http_servers import KEY, ServerProcess
from readers import PATIENCE

PACKAGES = ("schemathesis==4.32.5",)
REQUESTS = 10_000  # at least
EXAMPLES = 1200  # for each route; the phases of coverage and of examples make others
CLIENTS = 4
TIMEOUT = 900.0  # seconds: a busy machine answers late, and a request that hangs is found all the same
MAX_GROWN = 64 << 20  # bytes of memory, of which the server keeps some for each answer


@pytest.fixture(scope="module")
def model(tinymix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("random") / "model", tinymix)


def run(schemathesis: Path, url: str, examples: int, seed: int, place: Path) -> None:
    """Send requests from CLIENTS programs, of which some fit the description and others do not.

    Each program has one thread: in Python 3.11, two that parse source at a time may raise SystemError (gh-106905).
    """
    command = [
        *(schemathesis, "run", f"{url}/openapi.json", "-H", f"Authorization: Bearer {KEY}", "--no-color"),
        *("--max-examples", str(examples // CLIENTS), "--workers", "1", "--generation-database", "none"),
        *("--checks", "not_a_server_error", "--continue-on-failure", "--request-timeout", str(TIMEOUT)),
        *("--suppress-health-check", "all"),
    ]

    def run_one(number: int) -> subprocess.CompletedProcess[str]:
        # the other phases are the same with each seed
        phases = "fuzzing" if number else "examples,coverage,fuzzing"
        words = ["--phases", phases, "--seed", str(seed + number)]
        return subprocess.run([*command, *words], cwd=place, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(CLIENTS) as threads:
        for done in threads.map(run_one, range(CLIENTS)):
            assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_random_requests(model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    python = with_packages(Path(request.config.cache.mkdir("schemathesis")), PACKAGES)
    server = ServerProcess(model, tmp_path, ["--daemon", "none", "--context", "64"])
    try:
        run(python.parent / "schemathesis", server.url, EXAMPLES // 10, 0, tmp_path)
        before = usage_of(server.process.pid)
        run(python.parent / "schemathesis", server.url, EXAMPLES, CLIENTS, tmp_path)
        after = usage_of(server.process.pid)
        assert httpx2.get(f"{server.url}/health", timeout=PATIENCE).status_code == 200
        answered = re.findall(r'"[A-Z]+ /.* HTTP/1.1" (\d+)', server.log)
    finally:
        server.end()
    print({status: answered.count(status) for status in sorted({*answered})}, before, after)
    assert len(answered) >= REQUESTS
    assert not [status for status in answered if status >= "500"]
    assert "Traceback" not in server.log
    assert after[0] - before[0] < MAX_GROWN
    assert after[1] <= before[1] + 4  # connections of the client that are being closed
