"""What moetier doctor says of this machine: libraries, configuration, memory files and daemons; and its lines."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
from daemons import running_daemon
from stores import NASTY, layout_of, make_store

from moetier.runtime.kernels.jit import processor
from moetier.runtime.wire.address import CARD
from moetier.testing import in_fork
from moetier.tools.doctor import machine as doctor_machine
from moetier.tools.doctor.machine import Finding, State, fail, findings_of, lines_of, ok


@pytest.fixture
def store(tmp_path: Path) -> Path:
    make_store(tmp_path / "model", experts=4)
    return tmp_path / "model"


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


def test_another_system_than_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    (found,) = doctor_machine.python()
    assert (found.state, found.advice) == (State.FAIL, "Use Linux: moetier needs memfd.")


def test_a_processor_without_fast_products(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = processor.Processor(features="")
    monkeypatch.setattr(processor, "this_processor", lambda: plain)
    (found,) = doctor_machine.kernel()
    assert (found.state, "fast code needs AVX2" in found.advice) == (State.WARN, True)


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_a_build_for_cuda_that_lies_unused(cuda: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", cuda)
    (found,) = doctor_machine.gpus()
    assert found.state is State.OK
    assert ("torch is a build for CUDA 13.0" in found.found) == (cuda is not None)


def test_a_broken_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.toml"
    monkeypatch.setenv("MOETIER_CONFIG", str(path))
    path.write_text("[convert]\nbits = 3\n")
    (found,) = findings_of("config", doctor_machine.configuration)
    assert (found.state, f"{path}, [convert] bits" in found.found) == (State.OK, True)
    monkeypatch.setenv("MOETIER_VERSION", "1")
    unknown, _ = findings_of("config", doctor_machine.configuration)
    assert (unknown.state, "MOETIER_VERSION" in unknown.found) == (State.WARN, True)
    path.write_text("[convert]\nbits = 5\n")
    _, found = findings_of("config", doctor_machine.configuration)
    assert (found.state, "16, 8, 4, 3, 2" in found.advice) == (State.FAIL, True)


def test_no_memory_files() -> None:
    """The system gives no byte to a file."""

    def starved() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        (found,) = doctor_machine.memory_files()
        return f"{found.state}: {found.found}"

    assert in_fork(starved) == "returned fail: No sealed memory file can be made: File too large."


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

    (found,) = findings_of("thing", break_down)
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
