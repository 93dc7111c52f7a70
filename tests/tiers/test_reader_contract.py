"""The contract of RecordReader (moetier.tiers.source), checked for each reader over a real store."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import pytest
from extent_files import open_extents, write_extents
from faults import flip_bit
from forks import in_fork
from object_servers import served_folder
from outlets import PLAIN, served
from stores import layout_of, make_plan, make_records, manifest_of, read_record, read_records, slot_of, write_store
from threads import run_all

from moetier.runtime.client.remote import RemoteReader
from moetier.runtime.client.spread import SpreadReader
from moetier.runtime.wire.address import Address
from moetier.tiers.errors import ChecksumError, ClosedError, MissingExpertError
from moetier.tiers.extents.reader import ExtentStore
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey
from moetier.tiers.objects.cache import CachedStore
from moetier.tiers.objects.fetch import fetch
from moetier.tiers.source import RecordReader
from moetier.tiers.store.checksum import PIECE_BYTES, checksum_bytes
from moetier.tiers.store.folder import GROUP
from moetier.tiers.store.mirror import MirroredStore
from moetier.tiers.store.reader import ExpertStore
from moetier.tiers.store.shard import ShardFile

SMALL = make_plan(blocks=2, experts=4)
LARGE = make_plan(blocks=1, experts=2, layout=layout_of(2048, 1560))  # 18 MB: read in several pieces
RECORDS = {"small": make_records(SMALL), "large": make_records(LARGE)}
KEY = ExpertKey(0, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two model directories, ``small`` and ``large``."""
    assert LARGE.layout(0).slot_bytes > 2 * PIECE_BYTES
    made = tmp_path_factory.mktemp("stores")
    for name, plan in (("small", SMALL), ("large", LARGE)):
        write_store(made / name, plan, RECORDS[name])
    return made


@contextlib.contextmanager
def open_reader(kind: str, folder: Path) -> Iterator[RecordReader]:
    with contextlib.ExitStack() as closing:
        store = closing.enter_context(ExpertStore.open(folder))
        if kind == "store":
            yield store
            return
        if kind == "cached":
            pytest.importorskip("obstore")
            with served_folder(folder) as server:
                yield closing.enter_context(CachedStore.open(fetch(server.address, folder / "cache")))
            return
        if kind == "extents":
            table = write_extents(folder / "extents", store.manifest, read_records(store))
            yield closing.enter_context(open_extents(folder / "extents", table))
            return
        if kind == "mirrored":
            second = closing.enter_context(ExpertStore.open(folder))
            yield closing.enter_context(MirroredStore([store, second]))
            return
        if kind == "spread over none":  # and so from the store
            nobody = [Address(target="127.0.0.1:1")]
            yield closing.enter_context(SpreadReader.open(nobody, PLAIN, store.manifest, folder))
            return
        host = closing.enter_context(HostTier(store, slots={"records": store.manifest.record_count}))
        address = closing.enter_context(served(host))
        if kind == "remote":
            yield closing.enter_context(RemoteReader(address, PLAIN, store.manifest))
        else:
            other = closing.enter_context(served(host))
            yield closing.enter_context(SpreadReader.open([address, other], PLAIN, store.manifest))


@pytest.fixture(params=["store", "cached", "extents", "mirrored", "remote", "spread", "spread over none"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("size", RECORDS)
def test_each_record_is_read_with_its_checksum(kind: str, folder: Path, size: str) -> None:
    with open_reader(kind, folder / size) as reader:
        assert reader.manifest == manifest_of(folder / size)
        for key, record in RECORDS[size].items():
            slot = slot_of(reader.manifest, key)
            reader.read_into(key, slot)
            assert slot == record + checksum_bytes(google_crc32c.value(record))


def test_many_threads_read_at_once(kind: str, folder: Path) -> None:
    def work(reader: RecordReader, seed: int) -> list[bool]:
        keys = list(RECORDS["large"])
        random.Random(seed).shuffle(keys)
        return [read_record(reader, key) == RECORDS["large"][key] for key in keys]

    with open_reader(kind, folder / "large") as reader:
        assert all(map(all, run_all([lambda seed=seed: work(reader, seed) for seed in range(6)])))


def test_a_pause_changes_nothing_and_its_exception_ends_the_read(kind: str, folder: Path) -> None:
    """Only readers that call ``pause`` are tested here."""
    asked = 0

    def pause() -> bool:
        nonlocal asked
        asked += 1
        if raises:
            raise InterruptedError
        return asked < most

    with open_reader(kind, folder / "large") as reader:
        slot = slot_of(reader.manifest, KEY)
        for most in (100, 2):
            asked, raises = 0, False
            slot[:] = bytes(len(slot))
            reader.read_into(KEY, slot, pause)
            assert slot[:-4] == RECORDS["large"][KEY]
            assert asked <= most
        asks, asked, raises = asked > 0, 0, True
        interrupted = False
        try:
            reader.read_into(KEY, slot, pause)
        except InterruptedError:
            interrupted = True
        assert asked == interrupted
        assert interrupted or not asks  # a cache may hold the record only now
        assert read_record(reader, KEY) == RECORDS["large"][KEY]


def test_what_the_model_does_not_have_is_an_error(kind: str, folder: Path) -> None:
    with open_reader(kind, folder / "small") as reader:
        slot = slot_of(reader.manifest, KEY)
        for key in (ExpertKey(-1, 0), ExpertKey(2, 0), ExpertKey(0, -1), ExpertKey(0, 4), ExpertKey(0, 10**9)):
            with pytest.raises(MissingExpertError, match="acme/tiny-moe") as caught:
                reader.read_into(key, slot)
            assert "from 0 to" in caught.value.fix
        assert not any(slot)
        assert read_record(reader, KEY) == RECORDS["small"][KEY]


def test_a_bad_record_is_an_error_and_others_are_read(kind: str, tmp_path: Path) -> None:
    write_store(tmp_path, SMALL, RECORDS["small"])
    bad, slot_bytes = ExpertKey(1, 2), SMALL.layout(1).slot_bytes
    path, position = ShardFile.of(tmp_path / GROUP, SMALL, 1).path, 2 * slot_bytes + 1000
    with open_reader(kind, tmp_path) as reader:
        if isinstance(reader, ExtentStore):
            extent = reader.table.extents(bad)[1]
            path, position = reader.paths[extent.shard], extent.offset
        flip_bit(path, position)
        for _ in range(2):
            with pytest.raises(ChecksumError, match="expert 2"):
                read_record(reader, bad)
            for key in (KEY, ExpertKey(1, 1), ExpertKey(1, 3)):
                assert read_record(reader, key) == RECORDS["small"][key]
        flip_bit(path, position)
        assert read_record(reader, bad) == RECORDS["small"][bad], "an error is not remembered"


def test_after_close_a_read_is_an_error(kind: str, folder: Path) -> None:
    with open_reader(kind, folder / "small") as reader:
        slot = slot_of(reader.manifest, KEY)
        reader.read_into(KEY, slot)
        for _ in range(2):
            reader.close()  # type: ignore[attr-defined]  # which a host tier does not call
            with pytest.raises(ClosedError):
                reader.read_into(KEY, slot)


def test_a_forked_child_is_told_and_closes_its_own(kind: str, folder: Path) -> None:
    with open_reader(kind, folder / "small") as reader:
        assert read_record(reader, KEY) == RECORDS["small"][KEY]
        assert "ClosedError" in in_fork(lambda: read_record(reader, KEY))
        assert in_fork(reader.close) == "returned None"  # type: ignore[attr-defined]
        assert read_record(reader, KEY) == RECORDS["small"][KEY], "the parent goes on"


def test_a_host_tier_stands_on_it(kind: str, folder: Path) -> None:
    """At the smallest budget."""
    with open_reader(kind, folder / "small") as reader, HostTier(reader, slots={"records": 2}) as host:
        for seed in range(20):
            wanted = [ExpertKey(seed % 2, expert) for expert in random.Random(seed).sample(range(4), 3)]
            seen = {lease.key: bytes(lease.record) for lease in host.acquire(wanted)}
            assert seen == {key: RECORDS["small"][key] for key in wanted}
        host.check_integrity()
