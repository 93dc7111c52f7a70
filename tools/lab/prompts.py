"""The prompts of a file: a text, one a line; or JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

from moetier.tiers.errors import ConfigError

KEYS = ("prompt", "turns", "text")  # of turns, the first


def read_prompts(path: Path) -> list[str]:
    """Read the prompts of a file, without empty lines. Raises ConfigError."""
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{path}: can't be read ({why}).", "Give a text, or a .jsonl file.") from error
    of = _of_json if path.suffix == ".jsonl" else _of_text
    prompts = [of(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ConfigError(f"{path} has no prompts.", "Write one into each line.")
    return prompts


def _of_text(line: str, _: str) -> str:
    return line.removesuffix("\r")


def _of_json(line: str, place: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place} is not JSON.", "Write one object into each line.") from error
    value = next((found[key] for key in KEYS if key in found), None) if isinstance(found, dict) else None
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{place} has no prompt.", f"Write it as one of {', '.join(KEYS)}.")
    return value
