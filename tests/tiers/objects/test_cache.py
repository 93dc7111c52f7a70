"""Records of an object store through the cache: counts of requests, hostile and dead servers, eviction, crashes."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from faults import flip_bit, mounted, remounted
from object_servers import FolderServer, served_folder
from readers import PATIENCE
from stores import keys, layout_of, make_store, read_record, read_records, without_table
from threads import Task, run_all, wait_until, without_thread

from moetier.tiers.errors import (
    ChecksumError,
    ClosedError,
    IncompleteStoreError,
    MissingExpertError,
    StoreError,
    StoreFormatError,
    StoreReadError,
)
from moetier.tiers.layout import ExpertKey
from moetier.tiers.objects import access_times, cache, cache_writer, client
from moetier.tiers.objects.cache import CachedStore
from moetier.tiers.objects.cache_folder import fetch
from moetier.tiers.store.checksum import READ_PIECE_BYTES
from moetier.tiers.store.folder import CACHE, is_cache
from moetier.tiers.store.reader import ShardStore
from moetier.tiers.store.shard import ShardFile

pytest.importorskip("obstore")

KEY = ExpertKey(1, 2)
NAME = "experts.zarr/records/c/1/0/0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with 3 blocks of 4 experts, 16 KiB each."""
    made = tmp_path_factory.mktemp("origin")
    make_store(made)
    return made


@pytest.fixture(scope="module")
def records(folder: Path) -> dict[ExpertKey, bytes]:
    with ShardStore.open(folder) as store:
        return read_records(store)


@pytest.fixture
def server(folder: Path) -> Iterator[FolderServer]:
    with served_folder(folder) as running:
        yield running


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(client, "RETRY_SECONDS", 0.1)


def opened(server: FolderServer, root: Path, limit: int | None = None) -> CachedStore:
    return CachedStore.open(fetch(server.address, root, limit))


def test_each_record_is_fetched_once_and_then_never(
    server: FolderServer, tmp_path: Path, records: dict[ExpertKey, bytes]
) -> None:
    with opened(server, tmp_path) as store:
        some = keys(1, 0, 2)
        assert [read_record(store, key) for key in some] == [records[key] for key in some]
        assert [read_record(store, key) for key in some] == [records[key] for key in some]
        assert server.records == [NAME] * 2
        assert store.objects.gets == 2
        assert [(share.records, share.bytes) for share in store.shares()] == [(2, 32768)] * 2
        assert is_cache(store.folder)
    server.gets.clear()
    with opened(server, tmp_path) as store:
        assert read_record(store, KEY) == records[KEY]
        assert not server.gets, "nothing at all is asked"
        assert read_records(store) == records
        assert len(server.records) == len(records) - 2
    server.stop()
    with ShardStore.open(store.directory) as store:
        assert read_records(store) == records, "an ordinary store"


def test_an_incomplete_cache_is_not_taken_for_a_store(server: FolderServer, tmp_path: Path) -> None:
    with opened(server, tmp_path) as store:
        read_record(store, KEY)
    with pytest.raises(IncompleteStoreError, match="does not have all experts"):
        ShardStore.open(store.directory)


def test_large_records_come_in_parallel_pieces(tmp_path: Path) -> None:
    expected = make_store(tmp_path / "large", blocks=1, experts=2, layout=layout_of(2048, 1560))
    with served_folder(tmp_path / "large") as server, opened(server, tmp_path / "cache") as store:
        pieces = -(-store.layout(0).slot_bytes // READ_PIECE_BYTES)
        assert pieces == 3
        assert read_record(store, ExpertKey(0, 1)) == expected[ExpertKey(0, 1)]
        assert len(server.records) == pieces
        asked = 0

        def pause() -> bool:
            nonlocal asked
            asked += 1
            return True

        slot = memoryview(bytearray(store.layout(0).slot_bytes))
        store.read_into(ExpertKey(0, 0), slot, pause)
        assert slot[:-4] == expected[ExpertKey(0, 0)]
        assert len(server.records) == 2 * pieces
        assert asked == pieces - 1


def test_a_record_that_cannot_be_kept_is_read_all_the_same(
    server: FolderServer, tmp_path: Path, records: dict[ExpertKey, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """There is no thread to write it. The next record that arrives is stored with it."""
    with opened(server, tmp_path) as store:
        with without_thread("moetier-cache_0"):
            assert read_record(store, KEY) == records[KEY]
        assert caplog.messages[-1] == "Records were not kept in the cache."
        other = ExpertKey(1, 3)
        assert read_record(store, other) == records[other]
    server.gets.clear()
    with opened(server, tmp_path) as store:
        assert [read_record(store, key) for key in (KEY, other)] == [records[key] for key in (KEY, other)]
        assert not server.records


@pytest.mark.parametrize("fault", ["short", "little", "range", "whole", "endless", "error", "drop"])
def test_a_wrong_answer_is_an_error_that_names_key_and_endpoint(
    fault: str,
    server: FolderServer,
    tmp_path: Path,
    records: dict[ExpertKey, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # tried again for RETRY_SECONDS; after other faults, RETRIES times
    is_outage = fault in ("error", "drop", "short", "whole")
    monkeypatch.setattr(client, "RETRY_SECONDS", 1.0 if is_outage else PATIENCE)
    with opened(server, tmp_path) as store:
        server.fault = lambda name: fault if name == NAME else ""
        with pytest.raises(StoreReadError) as error:
            read_record(store, KEY)
        assert NAME in error.value.cause
        assert server.address in error.value.cause
        assert "block 1 expert 2" in error.value.cause
        assert store.objects.gets == 1
        assert store.objects.retries >= (1 if is_outage else client.RETRIES)
        assert read_record(store, ExpertKey(0, 0)) == records[ExpertKey(0, 0)], "others are served"
        server.fault = lambda name: ""
        assert read_record(store, KEY) == records[KEY]


def test_what_passes_is_tried_again_and_counted_apart(
    server: FolderServer, tmp_path: Path, records: dict[ExpertKey, bytes]
) -> None:
    with opened(server, tmp_path) as store:
        server.fault = lambda name: "error" if server.gets.count(NAME) == 1 else ""
        assert read_record(store, KEY) == records[KEY]
        assert (store.objects.gets, store.objects.retries) == (1, 1)


@pytest.mark.parametrize("fault", ["error", "drop", "short"])
def test_an_outage_is_survived_and_said_once(
    fault: str,
    server: FolderServer,
    tmp_path: Path,
    records: dict[ExpertKey, bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(client, "RETRY_SECONDS", 60.0)
    with opened(server, tmp_path) as store:
        server.fault = lambda name: fault if name == NAME and server.gets.count(NAME) <= 8 else ""
        assert read_record(store, KEY) == records[KEY]
        assert (store.objects.gets, store.objects.retries) == (1, 8)
    (said,) = [message for message in caplog.messages if "It is tried again, for up to 60 s." in message]
    assert NAME in said


def test_a_damaged_copy_of_a_cache_on_the_way_is_passed_by(
    server: FolderServer, tmp_path: Path, records: dict[ExpertKey, bytes]
) -> None:
    with opened(server, tmp_path) as store:
        server.fault = lambda name: "" if server.fresh[-1] else "altered"
        assert read_record(store, KEY) == records[KEY]
        assert (store.objects.gets, store.objects.retries) == (1, 1)


def test_an_altered_byte_is_found_and_never_cached(
    server: FolderServer, tmp_path: Path, records: dict[ExpertKey, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "RETRY_SECONDS", PATIENCE)  # time for all retries on a busy machine
    with opened(server, tmp_path) as store:
        server.fault = lambda name: "altered"
        for _ in range(2):
            with pytest.raises(ChecksumError) as error:
                read_record(store, KEY)
            assert NAME in error.value.cause
            assert server.address in error.value.cause
            assert "came 3 times" in error.value.cause
            assert "proxy" in error.value.fix
        assert server.records == [NAME] * 6, "asked for again, and not cached"
        server.fault = lambda name: ""
        assert read_record(store, KEY) == records[KEY]


def test_the_cache_is_served_when_the_server_is_dead(
    server: FolderServer, tmp_path: Path, records: dict[ExpertKey, bytes]
) -> None:
    with opened(server, tmp_path) as store:
        read_record(store, KEY)
        server.stop()
        began = time.monotonic()
        with pytest.raises(StoreReadError, match=server.address):
            read_record(store, ExpertKey(0, 0))
        assert time.monotonic() - began < PATIENCE
        assert read_record(store, KEY) == records[KEY]
    with opened(server, tmp_path) as store:  # and in another process
        assert read_record(store, KEY) == records[KEY]


def test_a_slow_server_ends_by_the_deadline(
    server: FolderServer, tmp_path: Path, records: dict[ExpertKey, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.fault = lambda name: "slow"
    server.seconds = 0.3
    with opened(server, tmp_path) as store:
        assert read_record(store, KEY) == records[KEY], "slow, but in time"
    server.seconds = 2.0
    monkeypatch.setattr(client, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(client, "RETRY_SECONDS", 0.5)
    with opened(server, tmp_path) as store:
        began = time.monotonic()
        with pytest.raises(StoreReadError, match="records/c/0/0/0"):
            read_record(store, ExpertKey(0, 0))
        assert time.monotonic() - began < 60, "by default it would be tried again for two minutes"


def test_a_slow_link_is_waited_for_as_long_as_bytes_come(
    server: FolderServer, tmp_path: Path, records: dict[ExpertKey, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(client, "ATTEMPT_SECONDS", 1.0, raising=False)  # of all bytes, in earlier versions
    server.fault, server.seconds = lambda name: "drip" if name == NAME else "", 2.0
    retries = []
    while not retries or (retries[-1] and len(retries) < 20):  # no byte may come for a second on a busy machine
        with opened(server, tmp_path / f"{len(retries)}") as store:
            assert read_record(store, KEY) == records[KEY]
            retries.append(store.objects.retries)
    assert retries[-1] == 0


def test_a_primed_cache_on_a_disk_that_is_read_only_is_used(
    server: FolderServer, tmp_path: Path, records: dict[ExpertKey, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    with mounted("tmpfs", tmp_path / "disk") as disk:
        with opened(server, disk) as store:
            read_record(store, KEY)
        with remounted(disk, "ro"):
            server.gets.clear()
            with opened(server, disk) as store:
                assert [read_record(store, KEY) for _ in range(2)] == [records[KEY]] * 2
                assert not server.gets
                assert [message for message in caplog.messages if "can't be written" in message] == [
                    f"{store.directory} can't be written: experts that it lacks are fetched at each use."
                ]
                assert read_records(store) == records
                assert len(server.records) == len(records) - 1
        with opened(server, disk) as store:
            assert read_records(store) == records
        caplog.clear()
        server.stop()
        with remounted(disk, "ro"):
            with ShardStore.open(fetch(server.address, disk)) as complete:
                assert read_records(complete) == records
            assert not caplog.messages


def test_a_redirect_to_another_host_is_no_record(folder: Path, server: FolderServer, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    for shard in other.rglob("c/*/0/0"):
        flip_bit(shard, 10)
    with served_folder(other) as elsewhere, opened(server, tmp_path / "cache") as store:
        server.elsewhere = elsewhere.address
        server.fault = lambda name: "redirect"
        with pytest.raises(StoreError, match=NAME):
            read_record(store, ExpertKey(1, 0))


def test_an_object_that_is_missing_is_named(server: FolderServer, tmp_path: Path) -> None:
    with opened(server, tmp_path / "cache") as store:
        server.folder = tmp_path
        with pytest.raises(MissingExpertError, match=NAME):
            read_record(store, KEY)


def test_a_damaged_record_of_the_cache_is_fetched_again(
    server: FolderServer, tmp_path: Path, records: dict[ExpertKey, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    with opened(server, tmp_path) as store:
        read_record(store, KEY)
    flip_bit(ShardFile.of(store.folder, store.manifest, 1).path, KEY.expert * 16384 + 7)
    with opened(server, tmp_path) as store:
        assert read_record(store, KEY) == records[KEY]
        assert "fetched again" in caplog.text
        assert len(server.records) == 2
    with opened(server, tmp_path) as store:
        read_record(store, KEY)
        assert len(server.records) == 2


def test_the_least_recently_used_records_go(
    server: FolderServer, tmp_path: Path, records: dict[ExpertKey, bytes]
) -> None:
    limit = 4 * 16384 + 100
    with opened(server, tmp_path, limit) as store:
        for expert in range(4):
            read_record(store, ExpertKey(0, expert))
    with opened(server, tmp_path) as store:  # the size is kept
        read_record(store, ExpertKey(0, 0))
        read_record(store, ExpertKey(1, 0))
    server.gets.clear()
    with opened(server, tmp_path) as store:
        assert store.cached_bytes == 4 * 16384
        used = [*keys(0, 2, 3, 0), ExpertKey(1, 0)]
        assert [read_record(store, key) for key in used] == [records[key] for key in used]
        assert not server.records
        taken = sum(shard.stat().st_blocks for shard in store.folder.rglob("c/*/0/0")) * 512
        assert taken < limit + 3 * 4096, "and their space is given back"
        assert read_records(store) == records
        assert is_cache(store.folder)


def test_a_full_disk_ends_the_caching_and_not_the_work(
    server: FolderServer, tmp_path: Path, records: dict[ExpertKey, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    with mounted("tmpfs", tmp_path / "small", "size=160k") as root:
        with opened(server, root) as store:
            assert read_records(store) == records
            assert read_records(store) == records
        assert "are no longer kept" in caplog.text
        with opened(server, root) as store:
            check(store, records)


def test_an_error_while_records_are_written_is_logged(
    server: FolderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(writer: cache_writer.CacheWriter) -> None:
        raise StoreError("The store is bad.", "Get another.")

    monkeypatch.setattr(cache_writer.CacheWriter, "_evict", refuse)
    with opened(server, tmp_path) as store:
        read_record(store, KEY)
    assert "The store is bad." in caplog.text


def test_a_read_that_would_fetch_ends_once_the_store_is_closed(
    server: FolderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The read has begun when ``close`` is called, which waits for the read; the server's address is not opened."""
    begun, goes_on = threading.Event(), threading.Event()

    def wait(read: Callable[[bool], None]) -> None:
        begun.set()
        assert goes_on.wait(PATIENCE)
        client.until_right(read)

    def is_closed() -> bool:
        try:
            return not store.objects
        except ClosedError:
            return True

    monkeypatch.setattr(cache, "until_right", wait)
    opened_clients = list[client.Objects]()
    monkeypatch.setattr(cache, "Objects", lambda address: opened_clients.append(client.Objects(address)))
    store = opened(server, tmp_path)
    reading = Task(lambda: read_record(store, KEY))
    assert begun.wait(PATIENCE)
    closing_store = Task(store.close)
    wait_until(is_closed)
    opened_clients.clear()
    goes_on.set()
    with pytest.raises(ClosedError):
        reading.result()
    closing_store.result()
    assert not opened_clients


def test_threads_and_stores_share_a_cache(
    server: FolderServer, tmp_path: Path, records: dict[ExpertKey, bytes]
) -> None:
    def work(store: CachedStore, seed: int) -> bool:
        order = list(records) * 3
        random.Random(seed).shuffle(order)
        return all(read_record(store, key) == records[key] for key in order)

    with opened(server, tmp_path, 5 * 16384) as one, opened(server, tmp_path) as other:
        stores = (one, other)
        assert all(run_all([lambda seed=seed: work(stores[seed % 2], seed) for seed in range(4)]))
    with opened(server, tmp_path) as store:
        assert store.cached_bytes <= 5 * 16384
        check(store, records)


def test_a_record_that_is_evicted_while_it_is_read_is_not_noted(
    server: FolderServer, tmp_path: Path, records: dict[ExpertKey, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ShardStore.read_into

    def read_slowly(store: ShardStore, key: ExpertKey, *rest: Any) -> None:
        read(store, key, *rest)
        kept = blocks_of(store, KEY)
        for expert in range(4):  # of another block, by another process
            read_record(other, ExpertKey(0, expert))
        wait_until(lambda: blocks_of(store, KEY) < kept)

    with opened(server, tmp_path) as store:
        read_record(store, KEY)
    with opened(server, tmp_path, 4 * 16384) as other, opened(server, tmp_path) as store:
        monkeypatch.setattr(ShardStore, "read_into", read_slowly)
        assert read_record(store, KEY) == records[KEY]
        assert store.cached_bytes == 4 * 16384, "those of the other block"


def blocks_of(store: ShardStore, key: ExpertKey) -> int:
    """Blocks on the disk of the shard with a record."""
    return ShardFile.of(store.folder, store.manifest, key.block).path.stat().st_blocks


def test_a_cache_is_complete_only_with_the_bytes_of_all(
    server: FolderServer, tmp_path: Path, records: dict[ExpertKey, bytes]
) -> None:
    with opened(server, tmp_path) as store:
        with closing(access_times.AccessTimes(store.folder / access_times.ACCESS_TIMES, store.manifest)) as used:
            used.set(KEY)  # as a reader that races with an eviction might
        for key in records.keys() - {KEY}:
            read_record(store, key)
    with opened(server, tmp_path) as store:
        assert is_cache(store.folder)
        assert read_record(store, KEY) == records[KEY]
    assert not is_cache(store.folder)
    with ShardStore.open(store.directory) as complete:
        assert read_records(complete) == records


def test_a_record_that_two_threads_fetch_is_kept_once(
    server: FolderServer, tmp_path: Path, records: dict[ExpertKey, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    together, copy = threading.Barrier(2), cache_writer.copy_bytes

    def copy_together(target: memoryview, source: memoryview) -> None:
        copy(target, source)
        together.wait(30)

    with opened(server, tmp_path) as store:
        with monkeypatch.context() as patched:
            patched.setattr(cache_writer, "copy_bytes", copy_together)
            assert run_all([lambda: read_record(store, KEY)] * 2) == [records[KEY]] * 2
        wait_until(lambda: store.cached_bytes == 16384)
        monkeypatch.setattr(cache_writer, "QUEUE_BYTES", 16384)
        monkeypatch.setattr(cache_writer, "ROOM_TIMEOUT", 2 * PATIENCE)
        began = time.monotonic()
        read_record(store, ExpertKey(0, 0))
        assert time.monotonic() - began < PATIENCE, "there is room for others"
    with opened(server, tmp_path) as store:
        assert check(store, records) == 2


def test_a_stopped_process_with_the_lock_does_not_hold_up_reads(
    server: FolderServer, tmp_path: Path, records: dict[ExpertKey, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_writer, "QUEUE_BYTES", 16384)
    monkeypatch.setattr(cache_writer, "ROOM_TIMEOUT", 2.0)
    with opened(server, tmp_path) as store, (store.folder / access_times.ACCESS_TIMES).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        began = time.monotonic()
        assert read_records(store) == records
        assert time.monotonic() - began < 2.0 * len(records) / 2, "only the first waits"
        fcntl.flock(held, fcntl.LOCK_UN)
        wait_until(lambda: store.cached_bytes > 0)
        assert read_records(store) == records
    with opened(server, tmp_path) as store:
        assert check(store, records) > 1, "then records are kept again"


def test_a_stopped_process_with_the_lock_is_reported_when_a_cache_is_opened(
    server: FolderServer, tmp_path: Path, records: dict[ExpertKey, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_times, "TIMEOUT", 0.1)
    with opened(server, tmp_path) as store:
        path = store.folder / access_times.ACCESS_TIMES
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match=f"Another process has held the lock of {path}"):
            opened(server, tmp_path)
    with opened(server, tmp_path) as store:
        assert read_records(store) == records


def check(store: CachedStore, records: dict[ExpertKey, bytes]) -> int:
    """Read all records that the cache says it has, past the fetching; return their number."""
    with closing(access_times.AccessTimes(store.folder / access_times.ACCESS_TIMES, store.manifest)) as used:
        there = [key for key in records if key in used]
    for key in there:
        slot = memoryview(bytearray(16384))
        shard, offset = store.store.locate(key)
        with shard.file.path.open("rb") as stream:
            stream.seek(offset)
            stream.readinto(slot)
        assert slot[:-4] == records[key], key
        store.store.compare_checksums(key, slot, int.from_bytes(slot[-4:], "little"))
    return len(there)


READER = """
import random, sys
from pathlib import Path
from typing import Any
from moetier.tiers.layout import ExpertKey
from moetier.tiers.objects.cache import CachedStore
from moetier.tiers.objects.cache_folder import fetch
store = CachedStore.open(fetch(sys.argv[1], Path(sys.argv[2]), 6 * 16384))
chosen = random.Random(int(sys.argv[3]))
print("ready", flush=True)
while True:
    store.read_into(ExpertKey(chosen.randrange(3), chosen.randrange(4)), memoryview(bytearray(16384)))
"""


@pytest.mark.parametrize("kills", [8, pytest.param(20, marks=pytest.mark.slow)])
def test_a_cache_is_consistent_after_each_kill(
    server: FolderServer, tmp_path: Path, records: dict[ExpertKey, bytes], kills: int
) -> None:
    """Each comes at a random moment of fetching, writing and evicting."""
    chosen, found = random.Random(0), 0
    for seed in range(kills):
        command = [sys.executable, "-c", READER, server.address, str(tmp_path), str(seed)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.2 * chosen.random())
            os.kill(process.pid, signal.SIGKILL)
        with opened(server, tmp_path) as store:
            found += check(store, records)
            assert store.cached_bytes <= 6 * 16384 + 4 * 16384, "at most what was being settled is more"
    assert found > kills
    with opened(server, tmp_path) as store:
        assert read_records(store) == records


def test_a_store_without_a_table_of_checksums_is_refused(folder: Path, tmp_path: Path) -> None:
    without_table(shutil.copytree(folder, tmp_path / "old"))
    with served_folder(tmp_path / "old") as server, pytest.raises(StoreFormatError, match="no checksums of records"):
        opened(server, tmp_path / "cache")


def test_an_address_without_a_model_is_reported(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with served_folder(tmp_path / "empty") as server, pytest.raises(StoreFormatError, match="no model at http"):
        opened(server, tmp_path / "cache")


def test_a_process_that_waits_for_another_one_says_so(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = f"file://{folder}"
    made = fetch(address, tmp_path)
    (made / CACHE).unlink()
    other = os.open(made / "experts.zarr", os.O_RDONLY)
    waiting = threading.Thread(target=fetch, args=(address, tmp_path))
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting.start()
        wait_until(lambda: f"Waiting for another process, which fetches {address} into {made}." in caplog.messages)
        assert waiting.is_alive()
    finally:
        os.close(other)
        waiting.join()


def test_a_damaged_record_of_a_complete_cache_is_an_error_as_of_any_store(
    server: FolderServer, tmp_path: Path, records: dict[ExpertKey, bytes]
) -> None:
    with opened(server, tmp_path) as store:
        assert read_records(store) == records
        wait_until(lambda: store.is_complete)
        flip_bit(ShardFile.of(store.folder, store.manifest, 1).path, KEY.expert * 16384 + 7)
        server.gets.clear()
        with pytest.raises(ChecksumError, match=r"block 1 .*expert 2: checksum mismatch"):
            read_record(store, KEY)
        assert not server.gets


def test_a_fetch_that_need_not_pause_any_more_gets_the_rest_at_once(
    server: FolderServer, tmp_path: Path, records: dict[ExpertKey, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "READ_PIECE_BYTES", 4096)
    asked = list[int]()

    def pause() -> bool:
        asked.append(len(server.records))
        return len(asked) < 2

    with opened(server, tmp_path) as store:
        slot = bytearray(16384)
        store.read_into(KEY, memoryview(slot), pause)
        assert slot[:-4] == records[KEY]
    assert asked == [1, 2]
    assert len(server.records) == 4


def test_without_memory_a_record_is_read_and_not_kept(
    server: FolderServer,
    tmp_path: Path,
    records: dict[ExpertKey, bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    slot = bytearray(16384)
    with opened(server, tmp_path) as store:
        with monkeypatch.context() as patched:
            patched.setattr(mmap, "mmap", refuse)
            store.read_into(KEY, memoryview(slot))
        assert slot[:-4] == records[KEY]
        assert cache_writer.NOT_KEPT in caplog.messages
        assert store.cached_bytes == 0
        assert read_record(store, KEY) == records[KEY]
        wait_until(lambda: store.cached_bytes == 16384)


def test_an_interrupt_while_a_record_is_copied_leaves_room_for_the_next(
    server: FolderServer, tmp_path: Path, records: dict[ExpertKey, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(target: memoryview, source: memoryview) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_writer, "QUEUE_BYTES", 16384)
    monkeypatch.setattr(cache_writer, "ROOM_TIMEOUT", 2 * PATIENCE)
    with opened(server, tmp_path) as store:
        with monkeypatch.context() as patched:
            patched.setattr(cache_writer, "copy_bytes", interrupt)
            with pytest.raises(KeyboardInterrupt):
                read_record(store, KEY)
        began = time.monotonic()
        for _ in range(2):
            assert read_record(store, ExpertKey(0, 0)) == records[0, 0]
        assert time.monotonic() - began < PATIENCE


def test_what_a_locked_cache_does_not_keep_is_read_all_the_same(
    server: FolderServer, tmp_path: Path, records: dict[ExpertKey, bytes], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(access_times, "TIMEOUT", 0.05)
    caplog.set_level(logging.INFO)
    with opened(server, tmp_path) as store, (store.folder / access_times.ACCESS_TIMES).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert read_record(store, KEY) == records[KEY]
        wait_until(lambda: "Another process has held the lock" in caplog.text)
        assert store.cached_bytes == 0
