from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cgroups import memory_limit
from daemons import running_daemon
from places import ASSETS
from prepared import MAIN
from stores import NASTY, layout_of, make_store
from users import as_nobody

from moetier.runtime.machine.memory import PROCESS_BYTES
from moetier.runtime.wire.address import CARD
from moetier.testing import in_fork
from moetier.tiers.store.folder import read_manifest
from moetier.tiers.store.shard import ShardFile
from moetier.tools.commands.doctor import findings
from moetier.tools.doctor import machine as doctor_machine
from moetier.tools.doctor import model_directory as doctor_store
from moetier.tools.doctor.machine import Finding, State, fail, lines_of, look, ok
from moetier.tools.main import main

NAMES = ["python", "libraries", "config", "cpu", "kernel", "gpu", "memory", "memfd", "memlock", "/dev/shm", "daemons"]
SECONDS = 0.01  # of disk reads


@pytest.fixture
def store(tmp_path: Path) -> Path:
    make_store(tmp_path / "model", experts=4)
    return tmp_path / "model"


def shard_of(directory: Path) -> Path:
    folder = directory / "experts.zarr"
    return ShardFile.of(folder, read_manifest(folder), 0).path


def test_a_machine_that_is_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As this one, on which the tests run. A disk may be slow, a processor old: that is a warning."""
    monkeypatch.chdir(tmp_path)
    found = list(findings(None, seconds=SECONDS))
    assert [finding.name for finding in found] == [*NAMES, "O_DIRECT", "disk"]
    assert [finding for finding in found if finding.state is State.FAIL] == []
    assert all(finding.found and bool(finding.advice) == (finding.state is not State.OK) for finding in found)
    assert list(tmp_path.iterdir()) == []


def test_the_command_with_a_model(tinymix_4bit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tinymix_4bit), "--checksums", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [finding["name"] for finding in found["findings"]] == [*NAMES, "store", "O_DIRECT", "disk"]
    by_name = {finding["name"]: finding for finding in found["findings"]}
    assert "every byte is as it was written" in by_name["store"]["found"]
    assert "the trunk takes" in by_name["memory"]["found"]
    assert sum(found["counts"].values()) == len(found["findings"])


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


def test_a_store_that_is_whole(store: Path) -> None:
    (found,) = doctor_store.health(store, checksums=False)
    assert found.state is State.OK
    assert f"moetier verify {store}" in found.found


def test_a_file_that_was_cut(store: Path) -> None:
    shard = shard_of(store)
    shard.write_bytes(shard.read_bytes()[:-1])
    (found,) = doctor_store.health(store, checksums=False)
    assert (found.state, str(shard) in found.found, "run the same conversion again" in found.advice) == (
        State.FAIL,
        True,
        True,
    )
    assert list(findings(store, seconds=SECONDS))[-1] == found  # and its disk is not measured


def test_a_byte_that_was_flipped_is_found_by_checksums(store: Path) -> None:
    with shard_of(store).open("r+b") as stream:
        first = stream.read(1)
        stream.seek(0)
        stream.write(bytes([first[0] ^ 1]))
    (found,) = doctor_store.health(store, checksums=False)
    assert found.state is State.OK
    (found,) = doctor_store.health(store, checksums=True)
    assert (found.state, "checksum" in found.found) == (State.FAIL, True)


def control_group(folder: Path, memory: int) -> Path:
    """The root of a file system in which the kernel shows a control group (version 2) of so many bytes."""
    group = folder / "root/sys/fs/cgroup/job"
    for made in (group, folder / "root/proc/self"):
        made.mkdir(parents=True, exist_ok=True)
    (folder / "root/proc/self/cgroup").write_text("0::/job\n")
    for name, text in (("memory.max", str(memory)), ("memory.current", "0"), ("memory.stat", "anon 0")):
        (group / name).write_text(text)
    return folder / "root"


def test_a_control_group_that_is_too_small(tinymix_4bit: Path, tmp_path: Path) -> None:
    """The trunk and the fewest experts would fit twice: keys and values, what is computed in, and margins do not."""
    root = control_group(tmp_path, 15_000_000)
    (found,) = doctor_store.memory(tinymix_4bit, root)
    assert (found.state, "the control group /job" in found.found) == (State.FAIL, True)
    assert re.search(
        r"a context of 2048 tokens .* the experts that a token uses in a block \(440 KiB\) need", found.found
    )
    (found,) = doctor_store.memory(tinymix_4bit, control_group(tmp_path, 90_000_000))
    assert (found.state, "experts 440 KiB to 13.75 MiB: by default 13.75 MiB, 64 of 64" in found.found) == (
        State.OK,
        True,
    )
    (found,) = doctor_store.memory(None, control_group(tmp_path, 1024))
    assert found.state is State.WARN


@pytest.mark.parametrize(("memory", "advised"), [(90_000_000, False), (45_000_000, True)])
def test_more_memory_is_advised_for_a_slow_disk_only_if_it_helps(
    tinymix_4bit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int, advised: bool
) -> None:
    monkeypatch.setattr(doctor_store, "SLOW", 1e15)
    monkeypatch.setattr("moetier.runtime.machine.memory.PROCESS_BYTES", 0)  # whatever this process has imported
    root = control_group(tmp_path, memory)
    (about_memory,) = doctor_store.memory(tinymix_4bit, root)
    assert ("64 of 64" not in about_memory.found) is advised
    *_, found = doctor_store.disk(tinymix_4bit, SECONDS, root)
    assert (found.name, found.state) == ("disk", State.WARN)
    assert ("--ram" in found.advice) is advised


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
    """It is said before they are imported, for which the process may be killed."""
    said = limited(200 << 20, "doctor", str(tinymix_4bit))
    assert said.returncode == 1
    assert said.stdout.endswith("1 fail\n")
    quality = ["quality", str(tinymix_4bit), "--text", str(ASSETS / "texts")]
    for words in (["plan", str(tinymix_4bit)], ["generate", str(tinymix_4bit), "x"], quality):
        assert limited(200 << 20, *words).stderr.startswith("Only ")


def limited(memory: int, *words: str) -> subprocess.CompletedProcess[str]:
    """A command in a control group of so many bytes."""
    with memory_limit(memory) as group:
        enter = f"import os; open({str(group.folder / 'cgroup.procs')!r}, 'w').write(str(os.getpid())); {MAIN}"
        return subprocess.run([sys.executable, "-c", enter, *words], capture_output=True, text=True, check=False)


def test_libraries_out_of_range_and_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an environment has them in which somebody upgraded one and removed another."""
    wanted = (
        "Requires-Dist: tqdm<5\nRequires-Dist: no-such-library>=1\nRequires-Dist: no-such-plotter; extra == 'plots'"
    )
    for name, number, more in (
        ("moetier", "0.1.0", f"Requires-Python: >=3.11\nProvides-Extra: plots\n{wanted}\n"),
        ("tqdm", "9.0", ""),
    ):
        (tmp_path / f"{name}-{number}.dist-info").mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n{more}"
        (tmp_path / f"{name}-{number}.dist-info/METADATA").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    old, missing, good = doctor_machine.libraries()
    assert (old.state, old.found) == (State.FAIL, "tqdm is 9.0; moetier needs <5.")
    assert missing.found == "no-such-library is missing."
    assert missing.advice == 'Install it: pip install "no-such-library>=1"'
    assert (good.state, "without no-such-plotter (the extra plots)" in good.found) == (State.OK, True)


def test_a_python_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "moetier-0.1.0.dist-info").mkdir()
    text = "Metadata-Version: 2.1\nName: moetier\nVersion: 0.1.0\nRequires-Python: >=4\n"
    (tmp_path / "moetier-0.1.0.dist-info/METADATA").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = doctor_machine.python()
    assert (found.state, ">=4" in found.advice) == (State.FAIL, True)


def test_a_broken_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.toml"
    monkeypatch.setenv("MOETIER_CONFIG", str(path))
    path.write_text("[convert]\nbits = 3\n")
    (found,) = look("config", doctor_machine.configuration)
    assert (found.state, f"{path}, [convert] bits" in found.found) == (State.OK, True)
    monkeypatch.setenv("MOETIER_VERSION", "1")
    unknown, _ = look("config", doctor_machine.configuration)
    assert (unknown.state, "MOETIER_VERSION" in unknown.found) == (State.WARN, True)
    path.write_text("[convert]\nbits = 5\n")
    _, found = look("config", doctor_machine.configuration)
    assert (found.state, "16, 8, 4, 3, 2" in found.advice) == (State.FAIL, True)


def test_no_memory_files() -> None:
    """The system gives no byte to a file."""

    def starved() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        (found,) = doctor_machine.memory_files()
        return f"{found.state}: {found.found}"

    assert "fail: No sealed memory file" in in_fork(starved)


def test_a_folder_that_can_not_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    said = as_nobody(lambda: [str(found.state) for found in doctor_store.disk(None, SECONDS)])
    assert "['warn']" in said


def test_daemons(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run/moetier").mkdir(mode=0o700, parents=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    folder = tmp_path / "run/moetier/default"
    with running_daemon(store, ram=4 * layout_of().slot_bytes, folder=folder) as daemon:
        (found,) = doctor_machine.daemons()
        assert (found.state, str(daemon.pid) in found.found) == (State.OK, True)
        card = json.loads((folder / CARD).read_text())
        (folder / CARD).write_text(json.dumps(card | {"version": "0.0.1"}))  # as one that runs since before an upgrade
        (found,) = doctor_machine.daemons()
        assert (found.state, "0.0.1" in found.found) == (State.WARN, True)


def test_a_look_that_breaks_is_a_finding() -> None:
    def break_down() -> list[Finding]:
        raise RuntimeError("no\nsuch thing")

    (found,) = look("thing", break_down)
    assert (found.state, found.found) == (State.FAIL, "RuntimeError: no such thing")


def test_lines_are_as_wide_as_the_terminal() -> None:
    width = shutil.get_terminal_size((100, 24)).columns
    assert list(lines_of([ok("cpu", "fine")], width)) == ["ok    cpu           fine"]
    lines = list(lines_of([fail("disk", "slow " * 30, "Buy another, " * 10)], 80))
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].startswith("fail  disk          slow slow")
    assert sum(line.startswith(" " * 17 + "-> Buy") for line in lines) == 1


def test_what_others_call_themselves_is_told_in_what_can_be_read() -> None:
    lines = "\n".join(lines_of([fail("store", f"{NASTY}: {NASTY}", f"restore {NASTY}")], 60))
    assert all(line.isprintable() for line in lines.split("\n"))
    assert lines.startswith("fail  store         x?[31m?]0;owned? y: x?[31m?]0;owned? y")
