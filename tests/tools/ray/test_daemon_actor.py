"""The actor that supervises a daemon, in a process of its own without Ray; test_cluster.py has it in Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason='pip install ".[ray]"')

from readers import PATIENCE

from moetier.tiers.store.folder import read_manifest, store_folder
from moetier.tools.ray.daemon_actor import BOUND
from moetier.tools.ray.replica import daemon_bytes

ACTOR = """
import sys, threading, time, types
from pathlib import Path
import ray
from moetier.runtime.wire.address import DaemonCard
from moetier.tools.ray import daemon_actor

killed = threading.Event()
def kill(actor):
    killed.set()
    threading.Event().wait()  # does not return, as in Ray
ray.kill = kill
ray.get_runtime_context = lambda: types.SimpleNamespace(current_actor=None)
daemon_actor.LINGER, daemon_actor.RETRY = 0.2, 0.1  # less than any daemon needs to start
folder, change, *words = sys.argv[1:]
exec(change)
actor = daemon_actor.DaemonActor([*words, "--folder", folder])
try:
    while not actor.hold():
        time.sleep(0.05)
    card = DaemonCard.read(Path(folder))
    print("runs" if card and not killed.is_set() else "does not run")
except RuntimeError as error:
    card = None
    print(error)
killed.wait()
print("left behind" if card and Path(f"/proc/{card.pid}").exists() else "ended")
"""


def actor(folder: Path, *words: str | Path, change: str = "") -> list[str]:
    command = [sys.executable, "-c", ACTOR, str(folder), change, *map(str, words)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=PATIENCE).stdout.splitlines()


def test_a_daemon_that_starts_slowly_is_kept_and_then_ends(tinymix_4bit: Path, tmp_path: Path) -> None:
    assert actor(tmp_path / "daemon", tinymix_4bit, "--ram", "100%") == ["runs", "ended"]


def test_a_daemon_that_can_not_start_is_an_error(tmp_path: Path) -> None:
    fault, end = actor(tmp_path / "daemon", tmp_path / "no-model")
    assert "ended with status" in fault
    assert "no-model" in fault
    assert end == "ended"


def test_a_daemon_for_which_there_is_no_process_is_an_error(tmp_path: Path) -> None:
    change = "daemon_actor.sys = types.SimpleNamespace(executable='/nonexistent', stderr=sys.stderr)"
    fault, end = actor(tmp_path / "daemon", tmp_path / "no-model", change=change)
    assert "can't be started" in fault
    assert end == "ended"


CHILDREN = """
daemon_actor.BOUND = "import time; time.sleep(600)"
daemon_actor.DaemonActor(words)
killed.wait()
print("left behind" if any(each.read_text() for each in Path("/proc/self/task").glob("*/children")) else "ended")
sys.exit()
"""


def test_a_daemon_that_is_not_held_while_it_starts_ends(tmp_path: Path) -> None:
    assert actor(tmp_path / "daemon", "model", change=CHILDREN) == ["ended"]


@pytest.mark.parametrize("is_parent", [True, False])
def test_a_daemon_does_not_start_without_its_actor(is_parent: bool) -> None:
    parent = os.getpid() if is_parent else os.getppid()
    command = [sys.executable, "-c", BOUND, str(parent), "-c", "print('started')"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == ("started\n" if is_parent else "")


def test_no_more_memory_is_reserved_than_the_experts_have(tinymix_4bit: Path) -> None:
    stored = read_manifest(store_folder(tinymix_4bit)).stored_bytes
    for ram, expected in (("64GiB", stored), (f"{stored // 2}B", stored // 2), ("100%", stored)):
        assert daemon_bytes(tinymix_4bit, ram, 1 << 40) == expected
