"""A shard of another conversion with the same shape is refused, however its records are read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from stores import (
    make_plan,
    make_records,
    make_store,
    read_record,
    shard,
    with_foreign_shard,
    without_table,
    write_store,
)
from threads import without_thread

from moetier.tiers.errors import ChecksumError, StoreReadError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.store.folder import GROUP, read_manifest
from moetier.tiers.store.reader import ShardStore
from moetier.tiers.store.shard import ShardFile

PLAN = make_plan()


@pytest.fixture
def swapped(tmp_path: Path) -> Path:
    """Make a store whose block 1 belongs to another store."""
    return with_foreign_shard(tmp_path)


def test_it_is_refused_when_the_store_is_opened(swapped: Path) -> None:
    with pytest.raises(ChecksumError, match="to another conversion than the manifest") as caught:
        ShardStore.open(swapped)
    path = shard(swapped, 1).path
    assert f"block 1 (model.layers.1.mlp.experts): its shard {path}" in caught.value.cause
    assert f"Copy {path} from the original" in caught.value.fix


def test_a_record_of_another_conversion_is_refused_when_it_is_read(tmp_path: Path) -> None:
    """The shard belongs to a model that has the same record at the shard's end."""
    records = make_records(PLAN)
    write_store(tmp_path, PLAN, records)
    key = ExpertKey(1, 2)
    other = dict(records)
    other[key] = make_records(PLAN, seed=1)[key]
    write_store(tmp_path / "other", PLAN, other)
    shutil.copy(shard(tmp_path / "other", 1).path, shard(tmp_path, 1).path)
    with ShardStore.open(tmp_path) as store:
        for each in records:
            if each != key:
                assert read_record(store, each) == records[each]
        with pytest.raises(ChecksumError, match="to another conversion than the manifest") as caught:
            read_record(store, key)
    assert "block 1 (model.layers.1.mlp.experts), expert 2: its record in" in caught.value.cause
    assert str(shard(tmp_path, 1).path) in caught.value.cause
    assert str(shard(tmp_path, 1).path) in caught.value.fix


def test_the_table_is_that_of_the_digest(tmp_path: Path) -> None:
    make_store(tmp_path)
    manifest = read_manifest(tmp_path / GROUP)
    files = [ShardFile.of(tmp_path / GROUP, manifest, block) for block in range(3)]
    assert [manifest.checksums(block) for block in range(3)] == [tuple(file.stored_checksums()) for file in files]
    without_table(tmp_path)
    assert read_manifest(tmp_path / GROUP).checksums(0) == ()
    assert read_manifest(tmp_path / GROUP).digest == manifest.digest


def test_an_older_store_cannot_be_opened_without_a_thread_for_the_check(tmp_path: Path) -> None:
    make_store(tmp_path)
    without_table(tmp_path)
    with without_thread("moetier-digest"), pytest.raises(StoreReadError, match="can't start new thread"):
        ShardStore.open(tmp_path)


def test_an_older_store_of_small_size_is_refused_when_it_is_opened(swapped: Path) -> None:
    without_table(swapped)
    with pytest.raises(ChecksumError, match=r"not all of one conversion.* too old to tell which") as caught:
        ShardStore.open(swapped)
    assert "Copy the shards" in caught.value.fix
