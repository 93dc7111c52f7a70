"""A store is checked before use, reads every record exactly, and reports faults instead of giving zeros."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from disks import cached_part
from faults import flip_bit, mounted, only, strace
from hypothesis import given, settings
from hypothesis import strategies as st
from places import HELPERS
from stores import layout_of, make_plan, make_store, read_record, read_records, shard
from threads import without_thread

from moetier.tiers.errors import (
    ChecksumError,
    ClosedError,
    MissingExpertError,
    StoreReadError,
)
from moetier.tiers.layout import ExpertKey, RecordLayout
from moetier.tiers.store.checksum import READ_PIECE_BYTES
from moetier.tiers.store.folder import GROUP
from moetier.tiers.store.reader import ShardStore
from moetier.tiers.store.shard import ShardFile

LARGE = RecordLayout(layout_of(2048, 1560).projections)  # 18.3 MiB: three pieces, the last one short


# --- reading ----------------------------------------------------------------------------------------------------------


def test_every_record_reads_back(tmp_path: Path) -> None:
    records = make_store(tmp_path)
    for folder in (tmp_path, tmp_path / GROUP):
        with ShardStore.open(folder) as store:
            assert read_records(store) == records
            assert store.manifest.model == "acme/tiny-moe"
            assert store.layout(2) == layout_of()


def test_large_records_are_read_in_pieces_by_a_pool_that_goes_with_the_store(tmp_path: Path) -> None:
    assert 2 * READ_PIECE_BYTES < LARGE.slot_bytes < 3 * READ_PIECE_BYTES
    records = make_store(tmp_path, blocks=1, experts=2, layout=LARGE)
    before = threading.active_count()
    for readers in (1, 4):
        with ShardStore.open(tmp_path, readers=readers) as store:
            assert threading.active_count() == before
            assert read_records(store) == records
            assert before < threading.active_count() <= before + readers
        assert threading.active_count() == before


def test_a_large_record_is_read_with_pauses_and_not_beyond_one_that_raises(tmp_path: Path) -> None:
    records = make_store(tmp_path, blocks=1, experts=2, layout=LARGE)
    with ShardStore.open(tmp_path, readers=1) as store:
        slot = np.frombuffer(mmap.mmap(-1, LARGE.slot_bytes), np.uint8)
        read: list[int] = []

        def pause() -> bool:
            read.append(int(np.count_nonzero(slot[::4096])))
            if len(read) == raises:
                raise InterruptedError
            return len(read) < enough

        raises, enough = 0, 1000
        store.read_into(ExpertKey(0, 0), slot.data, pause)
        assert bytes(slot[:-4]) == records[ExpertKey(0, 0)]
        assert len(read) == 7, "eighths"
        assert not any("moetier-store" in thread.name for thread in threading.enumerate())
        assert 0 < read[0] < read[1] < read[6] < np.count_nonzero(slot[::4096]), "nothing is read beyond a pause"

        read, raises = [], 2
        slot[:] = 0
        with pytest.raises(InterruptedError):
            store.read_into(ExpertKey(0, 0), slot.data, pause)
        assert not slot[LARGE.slot_bytes // 3 :].any()

        read, raises, enough = [], 0, 3
        store.read_into(ExpertKey(0, 0), slot.data, pause)
        assert bytes(slot[:-4]) == records[ExpertKey(0, 0)]
        assert len(read) == 3, "it asks no more once the read is to be over"
        assert any("moetier-store" in thread.name for thread in threading.enumerate()), "the rest is read side by side"
        assert read_records(store) == records


def test_what_is_opened_is_closed(tmp_path: Path) -> None:
    make_store(tmp_path)
    descriptors = Path("/proc/self/fd")
    before = {path.name for path in descriptors.iterdir()}
    store = ShardStore.open(tmp_path)
    assert len(list(descriptors.iterdir())) == len(before) + 3
    store.close()
    store.close()
    assert {path.name for path in descriptors.iterdir()} == before
    shard(tmp_path, 2).path.unlink()
    with pytest.raises(MissingExpertError):
        ShardStore.open(tmp_path)
    assert {path.name for path in descriptors.iterdir()} == before


def test_close_waits_for_reads_and_later_ones_are_refused(tmp_path: Path) -> None:
    """A descriptor that another file gets during a read would yield that file's bytes."""
    records = make_store(tmp_path, blocks=1, experts=2, layout=LARGE)
    key = ExpertKey(0, 0)
    for _ in range(10):
        store = ShardStore.open(tmp_path, readers=1)  # most pieces are read by the threads that call
        begun, ends = threading.Barrier(5, timeout=60), []

        def work(store: ShardStore = store, begun: threading.Barrier = begun, ends: list[Exception] = ends) -> None:
            begun.wait()
            try:
                while True:
                    assert read_record(store, key) == records[key]
            except Exception as error:
                ends.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        begun.wait()
        time.sleep(0.01)  # into the midst of their reads, wherever that is
        store.close()
        for thread in threads:
            thread.join()
        assert [type(end) for end in ends] == [ClosedError] * 4
        with pytest.raises(ClosedError, match="was closed"):
            read_record(store, key)


def test_nothing_writes_to_the_slot_of_a_read_that_failed(tmp_path: Path) -> None:
    """The first piece fails at once, as its first page can't be written, while the others are being read."""
    make_store(tmp_path, blocks=1, experts=2, layout=LARGE)
    slot = np.frombuffer(mmap.mmap(-1, LARGE.slot_bytes), np.uint8)
    slot[:] = 0xAA
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(slot.ctypes.data)
    assert libc.mprotect(address, ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ) == 0
    with ShardStore.open(tmp_path) as store:
        for expert in (0, 1, 0, 1):
            with pytest.raises(StoreReadError, match="Bad address"):
                store.read_into(ExpertKey(0, expert), slot.data)
            places = slot[READ_PIECE_BYTES - 1 :: READ_PIECE_BYTES // 8]
            before = places.copy()
            time.sleep(0.05)
            assert np.array_equal(places, before)


@pytest.mark.parametrize("number", [0, 1])
def test_a_read_for_which_there_is_no_further_thread_is_made_by_its_own(tmp_path: Path, number: int) -> None:
    """The pool keeps the piece for which it could start no thread. It must not be read later, into another record."""
    records = make_store(tmp_path, blocks=1, experts=2, layout=LARGE)
    slot = memoryview(mmap.mmap(-1, LARGE.slot_bytes))
    with ShardStore.open(tmp_path, readers=4) as store:
        with without_thread(f"moetier-store_{number}"):
            store.read_into(ExpertKey(0, 0), slot)
        assert slot[:-4] == records[ExpertKey(0, 0)]
        slot[:] = bytes(len(slot))
        assert read_record(store, ExpertKey(0, 1)) == records[ExpertKey(0, 1)]  # threads take what the pool has kept
        assert not any(slot)


@pytest.mark.parametrize("kind", ["ramfs", "tmpfs"])
def test_other_file_systems(tmp_path: Path, kind: str) -> None:
    """ramfs refuses O_DIRECT; with tmpfs it depends on the kernel's version."""
    with mounted(kind, tmp_path / "disk") as folder:
        records = make_store(folder)
        with ShardStore.open(folder) as store:
            assert read_records(store) == records
            if kind == "ramfs":
                assert not store.is_direct
            flip_bit(shard(folder).path, 0)
            with pytest.raises(ChecksumError):
                read_record(store, ExpertKey(0, 0))


def test_reads_bypass_the_page_cache(tmp_path: Path) -> None:
    make_store(tmp_path, blocks=1, experts=2, layout=LARGE)
    path = shard(tmp_path, layout=LARGE).path
    with path.open("rb") as stream:
        try:
            direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            pytest.skip("this file system refuses O_DIRECT")
        os.close(direct)
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        with ShardStore.open(tmp_path) as store:
            assert store.is_direct
            read_records(store)
    assert cached_part(path) < 0.1


def test_reading_needs_no_zarr_and_no_torch() -> None:
    heavy = "print([m for m in ('zarr', 'torch', 'transformers') if m in sys.modules])"
    code = f"import moetier.tiers.store.reader, sys; {heavy}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- bytes that are not what was written ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[ExpertKey, bytes]]:
    """A lasting store that a test damages and repairs."""
    folder = tmp_path_factory.mktemp("lasting")
    return folder, make_store(folder)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_one_flipped_bit_anywhere_in_a_record(
    lasting: tuple[Path, dict[ExpertKey, bytes]], data: st.DataObject
) -> None:
    folder, records = lasting
    file = shard(folder)
    layout = layout_of()
    parts = {
        "payload": (0, layout.payload_bytes),
        "padding": (layout.payload_bytes, layout.record_bytes),
        "checksum": (layout.record_bytes, layout.slot_bytes),
    }
    key = data.draw(st.sampled_from(sorted(records)))
    first, end = parts[data.draw(st.sampled_from(sorted(parts)))]
    position = key.expert * layout.slot_bytes + data.draw(st.integers(first, end - 1))
    bit = data.draw(st.integers(0, 7))
    path = ShardFile.of(folder / GROUP, make_plan(), key.block).path
    flip_bit(path, position, bit)
    try:
        with ShardStore.open(folder) as store:
            with pytest.raises(ChecksumError) as caught:
                read_record(store, key)
            for name in ("acme/tiny-moe", f"block {key.block} ", f"expert {key.expert}:", str(path)):
                assert name in caught.value.cause
            assert f"moetier verify {folder}" in caught.value.fix
            for other in set(records) - {key}:
                assert read_record(store, other) == records[other]
    finally:
        flip_bit(path, position, bit)
    assert file.experts == 4


def test_padding_is_part_of_the_record() -> None:
    layout = layout_of(64, 31)
    assert layout.payload_bytes < layout.record_bytes  # else the test above would have nothing to flip there


# --- disks that fail --------------------------------------------------------------------------------------------------

READ = f"""
# Prints, for each block, how many of its records were read right, and the error that ended it.
import json, mmap, sys
sys.path.insert(0, {str(HELPERS)!r})
from pathlib import Path
from moetier.tiers.errors import StoreError
from moetier.tiers.store.reader import ShardStore
from moetier.tiers.layout import ExpertKey
found = {{}}
with ShardStore.open(Path(sys.argv[1])) as store:
    for block, entry in enumerate(store.manifest.blocks):
        good, error = 0, None
        for expert in range(entry.experts):
            try:
                store.read_into(ExpertKey(block, expert), memoryview(mmap.mmap(-1, store.layout(block).slot_bytes)))
                good += 1
            except StoreError as caught:
                error = [type(caught).__name__, caught.cause, caught.fix]
        found[block] = [good, error]
print(json.dumps(found))
"""


def read_with_error(folder: Path, path: Path, when: str, error: str = "EIO") -> dict[str, Any]:
    """``when`` counts each thread's preadv of ``path``; the main thread's first is the trial of O_DIRECT."""
    trace = folder / "trace"
    inject = f"inject=preadv,preadv2:error={error}:when={when}"
    result = strace([*only("preadv,preadv2"), "-o", str(trace), "-P", str(path), "-e", inject], READ, folder)
    assert result.returncode == 0, result.stderr
    assert error in trace.read_text()
    found: dict[str, Any] = json.loads(result.stdout)
    return found


# A thread of the pool may read one piece of a large record and no more.
@pytest.mark.parametrize(
    ("layout", "when"), [*((layout_of(), when) for when in "123"), (LARGE, "1")], ids=["small-1", "-2", "-3", "large-1"]
)
def test_an_io_error_that_goes_away(tmp_path: Path, layout: RecordLayout, when: str) -> None:
    make_store(tmp_path, blocks=2, experts=2, layout=layout)
    assert read_with_error(tmp_path, shard(tmp_path, 1, layout).path, when) == {"0": [2, None], "1": [2, None]}


# Threads of the pool, which read the pieces of large records, make no trial: their first read has to fail. The trial
# then fails too, and the store is read without O_DIRECT.
@pytest.mark.parametrize(("layout", "when"), [(layout_of(), "2+"), (LARGE, "1+")], ids=["small", "large"])
def test_an_io_error_that_stays(tmp_path: Path, layout: RecordLayout, when: str) -> None:
    make_store(tmp_path, blocks=3, experts=2, layout=layout)
    path = shard(tmp_path, 1, layout).path
    found = read_with_error(tmp_path, path, when)
    assert found["0"] == found["2"] == [2, None]  # the other shards are served
    good, (kind, cause, fix) = found["1"]
    assert (good, kind) == (0, "StoreReadError")
    assert str(path) in cause
    assert os.strerror(errno.EIO) in cause
    assert fix.startswith("Check the disk")


@pytest.mark.parametrize(("error", "advice"), [("ENOMEM", "Free some memory"), ("EMFILE", "Raise the limit")])
def test_an_error_that_is_not_the_disks_has_other_advice(tmp_path: Path, error: str, advice: str) -> None:
    make_store(tmp_path, blocks=2, experts=2)
    found = read_with_error(tmp_path, shard(tmp_path, 1, layout_of()).path, "2+", error)
    assert found["0"] == [2, None]
    _, (kind, cause, fix) = found["1"]
    assert kind == "StoreReadError"
    assert os.strerror(getattr(errno, error)) in cause
    assert fix.startswith(advice)
    assert "disk" not in fix


def test_an_error_of_the_page_cache_names_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path)
    monkeypatch.setattr("moetier.tiers.store.shard.try_direct", lambda _: False)
    monkeypatch.setattr(os, "posix_fadvise", Mock(side_effect=OSError(errno.EIO, os.strerror(errno.EIO))))
    with ShardStore.open(tmp_path) as store, pytest.raises(StoreReadError, match=os.strerror(errno.EIO)) as caught:
        read_record(store, ExpertKey(1, 0))
    assert str(shard(tmp_path, 1, layout_of()).path) in caught.value.cause


def test_a_store_that_cannot_be_made_leaves_no_file_open(tmp_path: Path) -> None:
    make_store(tmp_path)
    with pytest.raises(AssertionError):
        ShardStore.open(tmp_path, readers=0)
    assert not [link for link in Path("/proc/self/fd").iterdir() if link.resolve().is_relative_to(tmp_path)]


def test_a_store_that_moved_is_the_same_store(tmp_path: Path) -> None:
    records = make_store(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    with ShardStore.open(tmp_path / "b") as store:
        assert read_records(store) == records


@pytest.fixture(autouse=True)
def repaired(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check after every test that the lasting store is as it was."""
    yield
    if "lasting" in request.fixturenames:
        folder, records = request.getfixturevalue("lasting")
        with ShardStore.open(folder) as store:
            assert read_records(store) == records
