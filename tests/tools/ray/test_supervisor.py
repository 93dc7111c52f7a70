"""What supervises a daemon beside Ray, in a process of its own; test_cluster.py has it in Ray's daemon_actor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from readers import PATIENCE

from moetier.tiers.store.folder import read_manifest, store_folder
from moetier.tools.ray.supervisor import BOUND, daemon_bytes

SUPERVISOR = """
import sys, threading, time, types
from pathlib import Path
from moetier.runtime.wire.address import DaemonCard
from moetier.tools.ray import supervisor

killed, calls = threading.Event(), []
def kill():
    calls.append(None)
    if len(calls) == 1:
        raise RuntimeError("Ray's control store restarts")
    killed.set()
    threading.Event().wait()  # does not return, as in Ray
supervisor.LINGER, supervisor.RETRY = 0.2, 0.1  # less than any daemon needs to start
folder, change, *words = sys.argv[1:]
exec(change)
supervised = supervisor.Supervisor([*words, "--folder", folder], kill)
try:
    while not supervised.hold():
        time.sleep(0.05)
    card = DaemonCard.read(Path(folder))
    print("runs" if card and not killed.is_set() else "does not run")
except RuntimeError as error:
    card = None
    print(error)
killed.wait()
print("left behind" if card and Path(f"/proc/{card.pid}").exists() else "ended")
"""


def run(folder: Path, *words: str | Path, change: str = "") -> list[str]:
    command = [sys.executable, "-c", SUPERVISOR, str(folder), change, *map(str, words)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=PATIENCE).stdout.splitlines()


def test_a_daemon_that_starts_slowly_is_kept_and_then_ends(tinymix_4bit: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "daemon", tinymix_4bit, "--ram", "100%") == ["runs", "ended"]


def test_a_daemon_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    fault, end = run(tmp_path / "daemon", tmp_path / "no-model")
    assert "ended with status" in fault
    assert "no-model" in fault
    assert end == "ended"


def test_a_daemon_for_which_there_is_no_process_is_an_error(tmp_path: Path) -> None:
    change = "supervisor.sys = types.SimpleNamespace(executable='/nonexistent', stderr=sys.stderr)"
    fault, end = run(tmp_path / "daemon", tmp_path / "no-model", change=change)
    assert "can't be started" in fault
    assert end == "ended"


CHILDREN = """
supervisor.BOUND = "import time; time.sleep(600)"
supervisor.Supervisor(words, kill)
killed.wait()
print("left behind" if any(each.read_text() for each in Path("/proc/self/task").glob("*/children")) else "ended")
sys.exit()
"""


def test_a_daemon_that_is_not_held_while_it_starts_ends(tmp_path: Path) -> None:
    assert run(tmp_path / "daemon", "model", change=CHILDREN) == ["ended"]


@pytest.mark.parametrize("is_parent", [True, False])
def test_a_daemon_does_not_start_without_its_supervisor(is_parent: bool) -> None:
    parent = os.getpid() if is_parent else os.getppid()
    command = [sys.executable, "-c", BOUND, str(parent), "-c", "print('started')"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == ("started\n" if is_parent else "")


def test_no_more_memory_is_reserved_than_the_experts_have(tinymix_4bit: Path) -> None:
    stored = read_manifest(store_folder(tinymix_4bit)).stored_bytes
    for ram, expected in (("64GiB", stored), (f"{stored // 2}B", stored // 2), ("100%", stored)):
        assert daemon_bytes(tinymix_4bit, ram, 1 << 40) == expected
