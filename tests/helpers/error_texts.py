"""Messages of commands for each fault, and the files that hold them. ``make golden`` writes them.

Each case injects its fault for real, runs the real command as a process of its own, and keeps what it says, with its
exit code. What differs from machine to machine, and from run to run, is written as a word in capitals.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import error_cases_of_models  # noqa: F401  # each registers its cases
import error_cases_of_runs  # noqa: F401
import error_cases_of_sources  # noqa: F401
import pytest
from checkpoints import save_checkpoint
from error_bench import CASES, workplace
from prepared import LOADS, prepared

from moetier.tools.convert.api import convert

GOLDEN = Path(__file__).parents[1] / "tools" / "golden" / "errors"
ASSETS = Path(__file__).parents[1] / "assets" / "tinymix"


def file_of(name: str) -> Path:
    return GOLDEN / f"{name}.txt"


def write() -> None:
    """All of them, and none besides. What can't be injected here stays as it was."""
    GOLDEN.mkdir(exist_ok=True)
    for stranger in set(GOLDEN.glob("*.txt")) - {file_of(name) for name in CASES}:
        stranger.unlink()
    os.environ["XDG_RUNTIME_DIR"], os.environ["MOETIER_CONFIG"] = "/nonexistent", os.devnull
    os.environ["XDG_DATA_HOME"] = os.devnull
    with tempfile.TemporaryDirectory() as name, prepared(*LOADS) as scripts:
        model, source = Path(name) / "model", save_checkpoint(Path(name) / "source")
        convert(ASSETS, model)
        for each, work in CASES.items():
            try:
                with workplace(model, source, scripts) as bench:
                    file_of(each).write_text(str(work(bench)))
            except pytest.skip.Exception as skipped:
                print(f"{each}: {skipped}", file=sys.stderr)


if __name__ == "__main__":
    write()
