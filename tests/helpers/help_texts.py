"""What each command says with --help, the files that hold it, and the page that shows them: by ``make golden``."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path

from moetier.tools.cli.options import walk
from moetier.tools.main import build_parser, main

GOLDEN = Path(__file__).parents[1] / "tools" / "golden"
PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
COLUMNS = "100"
_TWICE = re.compile(r"(-\w) (\S+), (--[\w-]+) \2(?!\S)")


def all_commands() -> list[tuple[str, ...]]:
    """() is moetier itself; ("bench", "disk") a command of a command."""
    return [path for path, _ in walk(build_parser())]


def file_of(path: tuple[str, ...]) -> Path:
    return GOLDEN / f"{'-'.join(('moetier', *path))}.txt"


def help_of(path: tuple[str, ...]) -> str:
    """As it is printed on a terminal of 100 columns."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = COLUMNS
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
            main([*path, "--help"])
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return said.getvalue()


def page() -> str:
    """docs/cli.md."""
    parts = [
        "# Command line",
        "What each command says with `--help`. [Commands](commands.md) has what they have in common: exit codes,\n"
        "`--json`, options that are set beforehand. `make golden` writes this page.",
    ]
    for path in all_commands():
        source = os.path.relpath(file_of(path), PAGE.parent)
        parts.append(f"## {' '.join(('moetier', *path))}\n\n```{{literalinclude}} {source}\n:language: text\n```")
    return "\n\n".join(parts) + "\n"


def words(text: str) -> list[str]:
    """What all versions of Python print alike: they break lines in different places, and from 3.13 on "-o FILE,
    --output FILE" is "-o, --output FILE"."""
    return _TWICE.sub(r"\1, \3 \2", " ".join(text.split())).split()


def write() -> None:
    """All of them, and none besides; a file whose words are as they were stays as it is."""
    GOLDEN.mkdir(exist_ok=True)
    paths = {file_of(path): path for path in all_commands()}
    for stranger in set(GOLDEN.glob("*.txt")) - paths.keys():
        stranger.unlink()
    for file, path in paths.items():
        text = help_of(path)
        if not file.exists() or words(file.read_text()) != words(text):
            file.write_text(text)
    PAGE.write_text(page())


if __name__ == "__main__":
    write()
