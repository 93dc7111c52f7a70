from __future__ import annotations

import logging
import random
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_device import FakeDevice
from stores import make_store
from threads import wait_until

from moetier.testing import in_fork
from moetier.tiers.device.tier import DeviceTier
from moetier.tiers.host.tier import HostTier
from moetier.tiers.host.warmup import Learner, hot_set_path, load_hot_set
from moetier.tiers.layout import ExpertKey
from moetier.tiers.store.reader import ExpertStore

EXPERTS = {0: 4, 1: 4, 2: 4}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moetier"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ExpertStore]:
    make_store(tmp_path)
    with ExpertStore.open(tmp_path) as opened:
        yield opened


@contextmanager
def learning(store: ExpertStore, slots: int = 6) -> Iterator[HostTier]:
    with HostTier(store, slots={"records": slots}) as tier:
        learner = Learner(tier)
        yield tier
        learner.close()


def take(tier: HostTier, block: int, *experts: int) -> None:
    for _ in tier.acquire([ExpertKey(block, expert) for expert in experts]):
        pass


def kept(store: ExpertStore) -> dict[ExpertKey, float]:
    return {key: round(count) for key, count in load_hot_set(store.manifest.digest, EXPERTS).items()}


def test_the_next_run_begins_with_what_was_used_most(store: ExpertStore) -> None:
    with learning(store) as tier:
        for _ in range(3):
            take(tier, 0, 2, 3)
        take(tier, 0, 0, 1)
        take(tier, 2, 1)
        assert tier.stats().warmed == 0
    assert kept(store) == {(0, 0): 1, (0, 1): 1, (0, 2): 3, (0, 3): 3, (2, 1): 1}
    with learning(store) as tier:
        wait_until(lambda: tier.stats().warmed == 3)
        assert tier.absent([ExpertKey(0, 2), ExpertKey(0, 3), ExpertKey(2, 1)]) == []
        take(tier, 0, 2, 3)
        stats = tier.stats()
        assert (stats.hits, stats.misses, stats.recalled, stats.evictions) == (2, 0, 2, 0)
    assert kept(store)[ExpertKey(0, 2)] == 4


def test_closing_twice_keeps_once_and_a_forked_child_nothing(store: ExpertStore) -> None:
    with HostTier(store, slots={"records": 6}) as tier:
        learner = Learner(tier)
        take(tier, 0, 2)
        tier.note_copy_uses([ExpertKey(0, 1)])  # as a tier above says
        assert in_fork(learner.close) == "returned None"
        assert kept(store) == {}
    learner.close()  # behind the tier
    learner.close()
    assert kept(store) == {(0, 1): 1, (0, 2): 1}


def test_what_a_device_holds_is_used_too(store: ExpertStore) -> None:
    with HostTier(store, slots={"records": 6}) as tier:
        learner = Learner(tier)
        fake = FakeDevice(random.Random(0))
        device = DeviceTier(tier, store.manifest, slots={"records": 6}, device=fake)
        for experts in ((0, 1), (1,), (1,)):
            for _ in device.acquire([ExpertKey(0, expert) for expert in experts]):
                pass
        assert tier.stats().misses == 2
        device.close()
        learner.close()
    assert kept(store) == {(0, 0): 1, (0, 1): 3}


def test_a_damaged_file_is_a_warning_and_nothing_else(store: ExpertStore, caplog: pytest.LogCaptureFixture) -> None:
    with learning(store) as tier:
        take(tier, 0, 2)
    path = hot_set_path(store.manifest.digest)
    path.write_text(path.read_text()[:-9])
    with caplog.at_level(logging.WARNING), learning(store) as tier:
        wait_until(lambda: bool(caplog.records))
        take(tier, 0, 1)
        assert tier.stats().warmed == 0
    assert all("are ignored" in record.getMessage() for record in caplog.records)
    assert kept(store) == {(0, 1): 1}


def test_a_process_that_is_killed_leaves_what_it_kept_last(store: ExpertStore, cache: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from moetier.tiers.host.tier import HostTier
        from moetier.tiers.layout import ExpertKey
        from moetier.tiers.host.warmup import Learner
        from moetier.tiers.store.reader import ExpertStore
        tier = HostTier(ExpertStore.open(Path(sys.argv[1])), slots={"records": 6})
        learner = Learner(tier, every=0.05)
        list(tier.acquire([ExpertKey(0, 2)]))
        print("used", flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(store.folder.parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "used\n"
        wait_until(hot_set_path(store.manifest.digest).exists)
        process.kill()
    assert process.returncode == -9
    assert kept(store) == {(0, 2): 1}
    assert {path.suffix for path in cache.iterdir()} == {".json", ".lock"}
