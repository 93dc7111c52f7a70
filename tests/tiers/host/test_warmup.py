from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_device import FakeDevice
from faults import mounted
from hypothesis import given
from hypothesis import strategies as st
from stores import make_store
from threads import wait_until

from moetier.testing import in_fork
from moetier.tiers.device.tier import DeviceTier
from moetier.tiers.host.tier import HostTier
from moetier.tiers.host.warmup import HOT_SET_HALF_LIFE, HotSet, Learner, hot_set_path, load_hot_set, save_hot_set
from moetier.tiers.layout import ExpertKey
from moetier.tiers.store.reader import ShardStore

DIGEST = "0123abcd" * 8
EXPERTS = {0: 4, 1: 8}


def used(*uses: tuple[int, int]) -> HotSet:
    found = HotSet()
    found.add(ExpertKey(*use) for use in uses)
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5))), st.integers(0, 8))
def test_the_hottest(uses: list[tuple[int, int]], most: int) -> None:
    found = used(*uses)
    for block in range(3):
        counts = {expert: uses.count((block, expert)) for expert in range(6)}
        hottest = [key.expert for key in found.hottest(block, most)]
        expected = sorted((e for e in counts if counts[e]), key=lambda e: (-counts[e], e))
        assert hottest == expected[:most]


def test_earlier_runs_fade_by_use() -> None:
    earlier = HotSet({ExpertKey(0, 0): 100.0, ExpertKey(1, 0): 100.0})
    now = used(*[(0, 1)] * (HOT_SET_HALF_LIFE * 4))
    found = now.plus_decayed(earlier, EXPERTS)
    assert found[ExpertKey(0, 0)] == pytest.approx(50)
    assert found[ExpertKey(0, 1)] == HOT_SET_HALF_LIFE * 4
    assert found[ExpertKey(1, 0)] == 100, "its block was not used"


def test_what_is_kept_is_there_again(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_hot_set(DIGEST, EXPERTS) == {}
    save_hot_set(DIGEST, EXPERTS, used((0, 3), (0, 3), (1, 7)))
    assert load_hot_set(DIGEST, EXPERTS) == {ExpertKey(0, 3): 2, ExpertKey(1, 7): 1}
    save_hot_set(DIGEST, EXPERTS, used((0, 1)))
    assert load_hot_set(DIGEST, EXPERTS)[ExpertKey(0, 3)] == pytest.approx(2, abs=0.01)
    assert load_hot_set("0" * 64, EXPERTS) == {}, "another store's"
    assert hot_set_path(DIGEST).parent == cache / "moetier"
    assert not caplog.records
    assert json.loads(hot_set_path(DIGEST).read_text())["format"] == 1


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "relative/folder"):  # which the specification says to ignore
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert hot_set_path(DIGEST) == Path.home() / ".cache" / "moetier" / f"hot-{DIGEST}.json"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", no_home)
    assert load_hot_set(DIGEST, EXPERTS) == {}
    assert not caplog.records
    save_hot_set(DIGEST, EXPERTS, used((0, 3)))
    assert "in $XDG_CACHE_HOME can't be saved (the user has no home directory)." in caplog.text


def spoilt(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return spoil


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


SPOILT: dict[str, Callable[[Path], None]] = {
    "cut": lambda path: os.truncate(path, 30),
    "empty": lambda path: os.truncate(path, 0),
    "not text": lambda path: path.write_bytes(b"\xff\xfe\x00") and None,
    "a list": lambda path: path.write_text("[]") and None,
    "deep": lambda path: path.write_text("[" * 100_000) and None,
    "a later format": spoilt(lambda value: value.update(format=2)),
    "another store's": spoilt(lambda value: value.update(digest="f" * 64)),
    "an expert too many": spoilt(lambda value: value.update(counts={"0": {"4": 1.0}})),
    "a block too many": spoilt(lambda value: value.update(counts={"2": {"0": 1.0}})),
    "no number": spoilt(lambda value: value.update(counts={"0": {"0": "many"}})),
    "not finite": spoilt(lambda value: value.update(counts={"0": {"0": float("nan")}})),
    "negative": spoilt(lambda value: value.update(counts={"0": {"0": -1}})),
    "a link": link,
    "a pipe": pipe,
    "a folder": folder,
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_wrong_is_ignored_with_a_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    save_hot_set(DIGEST, EXPERTS, used((0, 3)))
    SPOILT[name](hot_set_path(DIGEST))
    with caplog.at_level(logging.WARNING):
        assert load_hot_set(DIGEST, EXPERTS) == {}
    (record,) = caplog.records
    assert str(hot_set_path(DIGEST)) in record.getMessage()
    save_hot_set(DIGEST, EXPERTS, used((1, 2)))  # and made anew, where that is possible
    if name != "a folder":
        assert load_hot_set(DIGEST, EXPERTS) == {ExpertKey(1, 2): 1}


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_another_users_file_is_not_read(caplog: pytest.LogCaptureFixture) -> None:
    save_hot_set(DIGEST, EXPERTS, used((0, 3)))
    os.chown(hot_set_path(DIGEST), 65534, 65534)
    assert load_hot_set(DIGEST, EXPERTS) == {}
    assert "not a regular file of this user" in caplog.text


def test_where_nothing_can_be_kept(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    (cache / "moetier").write_text("a file in the folder's place")
    save_hot_set(DIGEST, EXPERTS, used((0, 3)))
    assert "be saved" in caplog.text


def test_a_full_disk_is_a_warning_and_what_was_kept_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with mounted("tmpfs", tmp_path / "disk", "size=64k") as disk:
        monkeypatch.setenv("XDG_CACHE_HOME", str(disk))
        save_hot_set(DIGEST, EXPERTS, used((0, 3)))
        with contextlib.suppress(OSError), (disk / "other").open("wb", buffering=0) as other:
            while True:
                other.write(bytes(4096))
        assert not caplog.records
        save_hot_set(DIGEST, EXPERTS, used((1, 7)))
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "No space left on device" in record.getMessage()
        assert load_hot_set(DIGEST, EXPERTS) == {ExpertKey(0, 3): 1}


def test_processes_that_write_at_the_same_time_lose_nothing(cache: Path) -> None:
    code = (
        "import sys; from moetier.tiers.host.warmup import HotSet, save_hot_set\n"
        "from moetier.tiers.layout import ExpertKey\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "used = HotSet(); used.add([ExpertKey(0, int(sys.argv[1]))])\n"
        f"for _ in range(20): save_hot_set({DIGEST!r}, {EXPERTS}, used)"
    )
    command = [sys.executable, "-c", code]
    writers = [
        subprocess.Popen([*command, str(expert)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for expert in range(3)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=120)
        assert writer.returncode == 0
    counts = load_hot_set(DIGEST, EXPERTS)
    assert counts == {ExpertKey(0, expert): pytest.approx(20, abs=1) for expert in range(3)}
    assert {path.name for path in (cache / "moetier").iterdir()} == {f"hot-{DIGEST}.json", f"hot-{DIGEST}.lock"}


def test_a_writer_that_is_killed_leaves_what_was_there(cache: Path) -> None:
    """In the middle of the write, by the kernel; the lock goes with it."""
    save_hot_set(DIGEST, EXPERTS, used((0, 3)))
    code = (
        "import os, signal; import moetier.tiers.store.atomic as durable\n"
        "durable.os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from moetier.tiers.host.warmup import HotSet, save_hot_set; from moetier.tiers.layout import ExpertKey\n"
        f"u = HotSet(); u.add([ExpertKey(1, 1)]); save_hot_set({DIGEST!r}, {EXPERTS}, u)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert load_hot_set(DIGEST, EXPERTS) == {ExpertKey(0, 3): 1}
    save_hot_set(DIGEST, EXPERTS, used((1, 1)))
    assert load_hot_set(DIGEST, EXPERTS) == {ExpertKey(0, 3): 1, ExpertKey(1, 1): 1}


COUNTS = {0: 4, 1: 4, 2: 4}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ShardStore]:
    make_store(tmp_path)
    with ShardStore.open(tmp_path) as opened:
        yield opened


@contextmanager
def learning(store: ShardStore, slots: int = 6) -> Iterator[HostTier]:
    with HostTier(store, slots={"records": slots}) as tier:
        learner = Learner(tier)
        yield tier
        learner.close()


def take(tier: HostTier, block: int, *experts: int) -> None:
    for _ in tier.acquire([ExpertKey(block, expert) for expert in experts]):
        pass


def kept(store: ShardStore) -> dict[ExpertKey, float]:
    return {key: round(count) for key, count in load_hot_set(store.manifest.digest, COUNTS).items()}


def test_the_next_run_begins_with_what_was_used_most(store: ShardStore) -> None:
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


def test_closing_twice_keeps_once_and_a_forked_child_nothing(store: ShardStore) -> None:
    with HostTier(store, slots={"records": 6}) as tier:
        learner = Learner(tier)
        take(tier, 0, 2)
        tier.uses.note_copies([ExpertKey(0, 1)])  # as a tier above says
        assert in_fork(learner.close) == "returned None"
        assert kept(store) == {}
    learner.close()  # behind the tier
    learner.close()
    assert kept(store) == {(0, 1): 1, (0, 2): 1}


def test_what_a_device_holds_is_used_too(store: ShardStore) -> None:
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


def test_a_damaged_file_is_a_warning_and_nothing_else(store: ShardStore, caplog: pytest.LogCaptureFixture) -> None:
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


def test_a_process_that_is_killed_leaves_what_it_kept_last(store: ShardStore, cache: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from moetier.tiers.host.tier import HostTier
        from moetier.tiers.layout import ExpertKey
        from moetier.tiers.host.warmup import Learner
        from moetier.tiers.store.reader import ShardStore
        tier = HostTier(ShardStore.open(Path(sys.argv[1])), slots={"records": 6})
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
    assert {path.suffix for path in (cache / "moetier").iterdir()} == {".json", ".lock"}
