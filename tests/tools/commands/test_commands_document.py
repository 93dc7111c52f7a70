"""docs/commands.md against the code."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from places import DOCS

from moetier.tools.cli import failure
from moetier.tools.cli.parser import commands_of, settable
from moetier.tools.cli.settings import GENERAL_KEYS
from moetier.tools.main import COMMANDS, EXIT_INTERRUPTED, EXIT_PIPE_CLOSED, build_parser, main

TEXT = (DOCS / "commands.md").read_text()


def test_every_command_has_a_row() -> None:
    rows = {line.split()[1].strip("`"): line for line in TEXT.splitlines() if re.match(r"\| `\w+", line)}
    assert set(rows) == set(COMMANDS)
    for name, command in commands_of(build_parser()).items():
        _, _, has_json, has_settings, _ = (cell.strip() for cell in re.split(r"(?<!\\)\|", rows[name])[1:])
        assert (has_settings == "yes") == bool(settable(command)), name
        if name not in ("bench", "cache", "config"):  # their commands have it
            assert (has_json == "yes") == any("--json" in action.option_strings for action in command._actions), name


def test_every_general_key_and_exit_code_is_named() -> None:
    assert all(f"`{key}`" in TEXT for key in GENERAL_KEYS)
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", TEXT, re.MULTILINE)}
    assert codes >= {0, failure.EXIT_ERROR, 2, failure.EXIT_FAULT, EXIT_INTERRUPTED, EXIT_PIPE_CLOSED}


def test_the_example_is_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "config.toml").write_text(example)
    monkeypatch.setenv("MOETIER_CONFIG", str(tmp_path / "config.toml"))
    assert main(["config", "show"]) == 0
    said = capsys.readouterr().out
    for section, keys in tomllib.loads(example).items():
        assert all(f"config.toml, [{section}] {key}" in said for key in keys)
