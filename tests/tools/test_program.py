"""``python -m moetier``: the command line, or a program whose models have budgets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from comparison import smallest_ram

import moetier
from moetier.tools.program import main

PROGRAM = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
print(sys.argv[1], model.tiers.snapshot()["host"]["slots"], model.tiers.where, __name__)
model.tiers.close()
sys.exit(3)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that knows nothing of moetier, and runs in this process."""
    (tmp_path / "unaware.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moetier"])
    return "unaware"


def test_a_program_gets_the_budget(program: str, tinymix_4bit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ram = smallest_ram(tinymix_4bit)
    try:
        with pytest.raises(SystemExit) as ended:
            main(["--ram", str(ram), "--daemon", "none", "-m", program, "--ram", str(tinymix_4bit)])
    finally:
        moetier.register()
    assert ended.value.code == 3
    assert capsys.readouterr().out.split() == ["--ram", "2", "this", "process", "__main__"]


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--ram", "much", "-m", "json.tool"], "'much' is not an amount of memory"),
        (["--ram", "1GiB", "--daemon", "work", "-m", "json.tool"], "holds the experts in its own memory"),
        (["--device", "cpu", "-m", "json.tool"], "chooses the device"),
        (["--rma", "1GiB", "-m", "json.tool"], "has no option --rma"),
        (["--ram", "1GiB", "-m"], "-m MODULE is missing."),
        (["--ram", "1GiB"], "-m MODULE is missing."),
        (["-m", "nosuch"], "There is no module 'nosuch' that can be run as a program."),
        (["-m", "moetier.nosuch.thing"], "There is no module 'moetier.nosuch.thing' that can be run as a program."),
        (["-m", "email"], "There is no module 'email' that can be run as a program."),  # a package without __main__
    ],
)
def test_a_wrong_command_line(words: list[str], cause: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = main(words)
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    assert cause in said.err
    assert "`" not in said.err


def test_without_a_module_it_is_the_command_line() -> None:
    run = subprocess.run([sys.executable, "-m", "moetier", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout == f"moetier {moetier.__version__}\n"
