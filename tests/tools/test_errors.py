"""Each fault that a person sees on a command line: what is said of it, word for word. ``make golden`` writes the files
anew; docs/acceptance.md says of every fault where its test is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from checkpoints import save_checkpoint
from error_bench import CASES, workplace
from error_texts import GOLDEN, file_of
from places import DOCS, ROOT
from prepared import Prepared

LONGEST = 400  # characters of a line


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "source")


@pytest.mark.parametrize("name", CASES)
def test_what_is_reported_of_a_fault(name: str, tinymix_4bit: Path, source: Path, scripts: Prepared) -> None:
    with workplace(tinymix_4bit, source, scripts) as bench:
        said = CASES[name](bench)
    assert file_of(name).exists(), "make golden"
    assert str(said) == file_of(name).read_text(), "make golden, if it is meant"


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*")), ids=lambda file: file.stem)
def test_it_is_a_cause_and_what_to_do(file: Path) -> None:
    assert file.stem in CASES, "make golden"
    command, *said, code = file.read_text().splitlines()
    assert command.split("moetier ")[0] == "$ " or "=" in command
    assert code in ("exit 1", "exit 2")
    assert not any("Traceback" in line for line in said)
    assert max(map(len, said)) < LONGEST
    if said[0].startswith(("bad: ", "fail  ")):
        assert not said[-1].startswith("bad: ")  # what to do
    else:
        cause, fix = said
        assert re.match(r"moetier: \S.*[^\s]$", cause)
        assert re.match(r"  [A-Z\-m].*\S$", fix)


def test_every_fault_has_a_test() -> None:
    """Those that the table in docs/acceptance.md names are there, and each of those here is named."""
    section = (DOCS / "acceptance.md").read_text().split("## Faults\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 25
    assert all("::" in row for row in rows)
    named = set(re.findall(r"`(\S+)::(\S+)`", "\n".join(rows)))
    assert {name for file, name in named if file == "errors"} == set(CASES)
    for file, name in named:
        assert file == "errors" or f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"
