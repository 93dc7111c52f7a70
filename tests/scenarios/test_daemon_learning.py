"""A daemon that keeps which experts its clients use most."""

from __future__ import annotations

from pathlib import Path

import pytest
from daemons import DaemonProcess, running_daemon
from raw_client import RawClient
from stores import make_store

from moetier.proto import expert_store_pb2 as pb
from moetier.tiers.host.warmup import hot_set_path, load_hot_set
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.folder import read_manifest

EXPERTS = dict.fromkeys(range(3), 8)


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # which the daemon inherits
    make_store(tmp_path / "model", experts=8)
    return read_manifest(tmp_path / "model" / "experts.zarr")


def use(daemon: DaemonProcess, manifest: Manifest) -> None:
    """Two experts, of which one is found twice more."""
    with RawClient(daemon.folder, manifest) as client:
        client.acquire(1, 0, [1, 2])
        client.granted()
        client.granted()
        client.release(1)
        client.send(uses=pb.Uses(blocks=[pb.Experts(block=0, experts=[2])] * 2))
        daemon.wait_for("reported_hits == 2")


def test_sigterm_keeps_what_was_used_and_the_next_start_reads_it(manifest: Manifest, tmp_path: Path) -> None:
    with running_daemon(tmp_path / "model", folder=tmp_path / "d", extra=["--learn"]) as daemon:
        use(daemon, manifest)
        assert daemon.stop() == 0
        kept = {ExpertKey(0, 1): 1, ExpertKey(0, 2): 3}
        assert load_hot_set(manifest.digest, EXPERTS) == kept
        daemon.restart()
        assert daemon.wait_for("host.warmed == 2").host.ready == 2
        use(daemon, manifest)
        stats = daemon.stats().host
        assert (stats.misses, stats.recalled) == (0, 2)
        daemon.kill()
        assert load_hot_set(manifest.digest, EXPERTS) == kept, "what was kept last"


def test_a_damaged_file_is_a_warning_and_nothing_else(manifest: Manifest, tmp_path: Path) -> None:
    path = hot_set_path(manifest.digest)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with running_daemon(tmp_path / "model", folder=tmp_path / "d", extra=["--learn"]) as daemon:
        use(daemon, manifest)
        assert daemon.stop() == 0
        lines = [line for line in daemon.log.splitlines() if "level=info" not in line]
        assert len(lines) == 2, "when it begins, and before the file is made anew"
        assert all("level=warning" in line and "The counts of experts in " in line for line in lines)
        assert load_hot_set(manifest.digest, EXPERTS) == {ExpertKey(0, 1): 1, ExpertKey(0, 2): 3}


def test_where_all_fit_the_last_half_is_read_without_being_asked_for(manifest: Manifest, tmp_path: Path) -> None:
    with running_daemon(tmp_path / "model", folder=tmp_path / "d") as daemon:
        with RawClient(daemon.folder, manifest) as client:
            for block in range(3):
                client.acquire(block + 1, block, [0, 1, 2, 3])
                for _ in range(4):
                    client.granted()
                client.release(block + 1)
        found = daemon.wait_for("host.ready == 24").host
        assert (found.misses, found.warmed) == (12, 12)


def test_without_it_nothing_is_kept(manifest: Manifest, tmp_path: Path) -> None:
    with running_daemon(tmp_path / "model", folder=tmp_path / "d") as daemon:
        use(daemon, manifest)
        assert daemon.stop() == 0
    assert not (tmp_path / "cache").exists()
