"""What moetier doctor says of a model: its store, its disk, and the memory that it needs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from faults import mounted
from stores import make_store
from users import as_nobody

from moetier.tiers.store.folder import read_manifest
from moetier.tiers.store.shard import ShardFile
from moetier.tools.commands.doctor import findings
from moetier.tools.doctor import model_directory as doctor_store
from moetier.tools.doctor.machine import State

SECONDS = 0.01  # of disk reads


@pytest.fixture
def store(tmp_path: Path) -> Path:
    make_store(tmp_path / "model", experts=4)
    return tmp_path / "model"


def shard_of(directory: Path) -> Path:
    folder = directory / "experts.zarr"
    return ShardFile.of(folder, read_manifest(folder), 0).path


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


def test_a_control_group_that_is_too_small(tinymix_4bit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trunk and the fewest experts would fit twice: keys and values, what is computed in, and margins do not."""
    monkeypatch.setattr("moetier.runtime.machine.memory.PROCESS_BYTES", 0)  # whatever this process has imported
    root = control_group(tmp_path, 15_000_000)
    (found,) = doctor_store.memory(tinymix_4bit, root)
    assert (found.state, "the control group /job" in found.found) == (State.FAIL, True)
    assert re.search(
        r"a context of 256 tokens .* the experts that a token uses in a block \(440 KiB\) need", found.found
    )
    (found,) = doctor_store.memory(tinymix_4bit, control_group(tmp_path, 90_000_000))
    assert (found.state, "experts 440 KiB to 13.75 MiB: by default 13.75 MiB, 64 of 64" in found.found) == (
        State.OK,
        True,
    )
    (found,) = doctor_store.memory(tinymix_4bit, control_group(tmp_path, 49_000_000))
    assert (found.state, found.found.endswith(": fewer than one token uses")) == (State.WARN, True)
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


def test_a_model_that_cannot_be_fitted_is_advised_more_memory(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no config.json, which another check reports."""
    monkeypatch.setattr(doctor_store, "SLOW", 1e15)
    *_, found = doctor_store.disk(store, SECONDS)
    assert (found.name, found.state, "--ram" in found.advice) == ("disk", State.WARN, True)


def test_a_disk_that_cannot_be_measured_is_reported_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has little room, or can't be written."""
    monkeypatch.setattr(doctor_store, "SAMPLE_BYTES", 1 << 20)
    with mounted("tmpfs", tmp_path / "disk", "size=3m") as disk:
        monkeypatch.chdir(disk)
        (small,) = doctor_store.disk(None, SECONDS)
        subprocess.run(["mount", "-o", "remount,size=8m,ro", str(disk)], check=True)
        (read_only,) = doctor_store.disk(None, SECONDS)
        monkeypatch.undo()
    assert (small.state, read_only.state) == (State.WARN, State.WARN)
    assert small.found == f"The disk of {disk} has only 3 MiB free: it was not measured."
    assert re.search(r"(?i)read-only.* The speed of the disk was not measured\.$", read_only.found), read_only.found


def test_a_file_system_without_direct_reads_is_named(store: Path, tmp_path: Path) -> None:
    with mounted("ramfs", tmp_path / "disk") as disk:
        found, _ = doctor_store.disk(Path(shutil.copytree(store, disk / "model")), SECONDS)
    assert (found.name, found.state) == ("O_DIRECT", State.WARN)
    assert "files can only be read through the page cache" in found.found


def test_a_folder_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    said = as_nobody(lambda: [str(found.state) for found in doctor_store.disk(None, SECONDS)])
    assert "['warn']" in said
