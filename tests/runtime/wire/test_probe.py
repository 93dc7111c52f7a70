"""Which daemons run: those that answer, and those that do not answer but hold their lock file open."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from moetier.proto import expert_store_pb2 as pb
from moetier.runtime.wire import probe as probe_module
from moetier.runtime.wire.address import Address, DaemonCard, ServedModel, runtime_folder
from moetier.runtime.wire.probe import probe, running_daemons
from moetier.tiers.errors import UnavailableError

MODEL = ServedModel("acme/tiny", "ab" * 32, "/models/tiny", 1 << 20)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a daemon that has written its card, as this process would."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = runtime_folder() / "daemon"
    folder.mkdir(parents=True, mode=0o700)
    runtime_folder().chmod(0o700)
    DaemonCard(os.getpid(), "1.0", time.time(), (MODEL,)).write(folder)
    return folder


def test_a_daemon_that_was_killed_is_not_listed(folder: Path) -> None:
    (folder / "lock").touch()
    assert running_daemons() == []


def test_a_daemon_that_does_not_answer_is_listed_without_counters(folder: Path) -> None:
    with (folder / "lock").open("w"):
        (daemon,) = running_daemons()
    assert (daemon.folder, daemon.stats) == (folder, None)
    assert daemon.models == [(MODEL, None)]


def test_a_model_gets_the_counters_of_its_digest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = pb.ModelStats(name="acme/tiny", digest=MODEL.digest, clients=3)

    class Answers:
        def stats(self, *, details: bool) -> pb.StatsReply:
            assert not details
            return pb.StatsReply(models=[pb.ModelStats(digest="cd" * 32), stats])

    @contextmanager
    def answering(address: Address, **_: Any) -> Iterator[Answers]:
        assert address.folder == folder
        yield Answers()

    monkeypatch.setattr(probe_module, "probe", answering)
    (daemon,) = running_daemons()
    assert daemon.models == [(MODEL, stats)]


def test_a_folder_without_a_daemon_is_named(folder: Path) -> None:
    with pytest.raises(UnavailableError, match="daemon"), probe(Address(folder=folder), timeout=1.0):
        pass
