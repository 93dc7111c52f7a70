from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cgroups import memory_limit
from places import ASSETS
from prepared import MAIN
from stores import make_store

from moetier.runtime.machine.memory import PROCESS_BYTES
from moetier.tools.commands import doctor
from moetier.tools.commands.doctor import findings
from moetier.tools.doctor.machine import State
from moetier.tools.main import main

NAMES = ["python", "libraries", "config", "cpu", "kernel", "gpu", "memory", "memfd", "/dev/shm", "daemons"]
SECONDS = 0.01  # of disk reads


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE_SECONDS", SECONDS)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    make_store(tmp_path / "model", experts=4)
    return tmp_path / "model"


def test_a_machine_that_is_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As this one, on which the tests run. A disk may be slow, a processor old: that is a warning."""
    monkeypatch.chdir(tmp_path)
    found = [finding for finding in findings(None, seconds=SECONDS) if finding.name != "load"]  # of other tests
    assert [finding.name for finding in found] == [*NAMES, "O_DIRECT", "disk"]
    assert [finding for finding in found if finding.state is State.FAIL] == []
    assert all(finding.found and bool(finding.advice) == (finding.state is not State.OK) for finding in found)
    assert list(tmp_path.iterdir()) == []


def test_the_command_with_a_model(tinymix_4bit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tinymix_4bit), "--checksums", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = [finding["name"] for finding in found["findings"]]
    assert names in ([*NAMES, "store", "O_DIRECT", "disk"], [*NAMES, "store", "O_DIRECT", "disk", "load"])
    by_name = {finding["name"]: finding for finding in found["findings"]}
    assert "every byte is as it was written" in by_name["store"]["found"]
    assert "the trunk takes" in by_name["memory"]["found"]
    assert sum(found["counts"].values()) == len(found["findings"])


def test_a_report_does_not_name_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    main(["doctor", str(tmp_path / "model"), "--report"])
    out = capsys.readouterr().out
    assert out.startswith("```text\n")
    assert out.endswith("\n```\n")
    assert "~/model" in out
    assert str(tmp_path) not in out


def test_what_is_broken_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path / "nothing")]) == 1
    lines = capsys.readouterr().out.splitlines()
    (number,) = [number for number, line in enumerate(lines) if line.startswith("fail")]
    assert lines[number].startswith("fail  store")
    assert "-> Convert a model: moetier convert" in "\n".join(lines[number:])
    assert lines[-1].endswith("1 fail")


def test_checksums_of_nothing_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--checksums"]) == 1
    assert "moetier doctor DIR --checksums" in capsys.readouterr().err


@pytest.mark.slow
def test_doctor_plan_and_generate_agree_in_a_control_group(tinymix_4bit: Path) -> None:
    """All of them see what is left once the libraries are loaded, whichever of them are loaded by then."""
    for more, code in ((16 << 20, 1), (160 << 20, 0)):
        for words in (
            ["doctor", "DIR"],
            ["plan", "DIR", "--disk", "1"],
            ["generate", "DIR", "x", "--max-new-tokens", "1"],
        ):
            said = limited(PROCESS_BYTES + more, *(str(tinymix_4bit) if word == "DIR" else word for word in words))
            assert said.returncode == code, (words, said)
            assert "control group" in said.stdout + said.stderr or not code


def test_a_control_group_without_room_for_the_libraries(tinymix_4bit: Path) -> None:
    said = limited(200 << 20, "doctor", str(tinymix_4bit))
    assert said.returncode == 1
    assert said.stdout.endswith("1 fail\n")


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "x"),
        pytest.param(("plan",), marks=pytest.mark.slow),
        pytest.param(("quality", "--text", str(ASSETS / "texts")), marks=pytest.mark.slow),
    ],
    ids=lambda words: words[0],
)
def test_commands_say_so_before_they_import_the_libraries(tinymix_4bit: Path, words: tuple[str, ...]) -> None:
    """For which the process may be killed."""
    command, *more = words
    assert limited(200 << 20, command, str(tinymix_4bit), *more).stderr.startswith("Only ")


def limited(memory: int, *words: str) -> subprocess.CompletedProcess[str]:
    """A command in a control group of so many bytes."""
    with memory_limit(memory) as group:
        enter = f"import os; open({str(group.folder / 'cgroup.procs')!r}, 'w').write(str(os.getpid())); {MAIN}"
        return subprocess.run([sys.executable, "-c", enter, *words], capture_output=True, text=True, check=False)
