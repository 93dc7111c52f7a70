"""The scripts, run by the shells that they are for."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from moetier.tools.commands.completion import script
from moetier.tools.main import COMMANDS, main


def completed(tmp_path: Path, *words: str) -> set[str]:
    """What bash offers for the last of ``words``."""
    (tmp_path / "completion.bash").write_text(script("bash"))
    code = (
        'source completion.bash; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        'COMP_LINE="$*"; _shtab_moetier; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    result = subprocess.run(
        ["bash", "--norc", "-c", code, "bash", "moetier", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"LC_ALL": "C"},
        check=True,
    )
    assert result.stderr == ""
    return set(result.stdout.split())


def test_bash_completes_commands_options_and_values(tmp_path: Path) -> None:
    assert completed(tmp_path, "") >= set(COMMANDS)
    assert completed(tmp_path, "con") == {"convert", "config"}
    assert completed(tmp_path, "generate", "--pre") == {"--prefill-chunk", "--prefetch", "--presence-penalty"}
    assert completed(tmp_path, "generate", "--speculate", "a") == {"auto", "always"}
    assert completed(tmp_path, "bench", "de") == {"decode"}
    assert completed(tmp_path, "bench", "decode", "--lim") == {"--limit"}
    assert completed(tmp_path, "completion", "") == {"bash", "zsh"}
    assert completed(tmp_path, "config", "show", "con") == {"convert"}  # what has something to set
    assert completed(tmp_path, "config", "show", "ge") == {"generate"}


def test_bash_completes_paths(tmp_path: Path) -> None:
    (tmp_path / "model-4bit").mkdir()
    (tmp_path / "model.txt").touch()
    assert completed(tmp_path, "verify", "mod") == {"model-4bit"}
    assert completed(tmp_path, "trace", "--prompts", "model.") == {"model.txt"}
    assert completed(tmp_path, "plot", "hits", "model.") == {"model.txt"}


def test_bash_takes_it_from_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "said").write_text(capsys.readouterr().out)
    subprocess.run(["bash", "-n", tmp_path / "said"], check=True)
    shown = subprocess.run(
        ["bash", "--norc", "-c", f"source '{tmp_path}/said'; complete -p moetier"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "_shtab_moetier moetier" in shown.stdout


def test_zsh_reads_its_script(tmp_path: Path) -> None:
    text = script("zsh")
    assert text.startswith("#compdef moetier")
    if shutil.which("zsh") is None:
        pytest.skip("zsh is missing")
    (tmp_path / "_moetier").write_text(text)
    subprocess.run(["zsh", "-n", tmp_path / "_moetier"], check=True)
