"""A crowd of clients, half a minute long: every answer is complete or refused, and the server does not grow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

CROWD = Path(__file__).parent / "crowd.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_crowd_gets_its_answers(tinymix_4bit: Path) -> None:
    command = [sys.executable, CROWD, tinymix_4bit, "--seconds", "30"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "/health: median" in done.stdout
