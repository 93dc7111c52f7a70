"""Shards: their checksums, and what is said of one that is missing, of another size, or damaged."""

from __future__ import annotations

import os
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from faults import flip_bit
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import layout_of, make_plan, make_store, read_record, shard

from moetier.tiers.errors import MissingExpertError, StoreError, StoreFormatError, StoreReadError
from moetier.tiers.layout import ExpertKey, RecordLayout
from moetier.tiers.store.folder import GROUP
from moetier.tiers.store.reader import ShardStore
from moetier.tiers.store.shard import ShardFile

LARGE = RecordLayout(layout_of(2048, 1560).projections)  # 18.3 MiB: three pieces, the last one short


def test_the_stored_checksums(tmp_path: Path) -> None:
    records = make_store(tmp_path)
    for block in range(3):
        file = ShardFile.of(tmp_path / GROUP, make_plan(), block)
        assert list(file.stored_checksums()) == [
            google_crc32c.value(records[ExpertKey(block, expert)]) for expert in range(4)
        ]


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[ExpertKey, bytes]]:
    """A lasting store that a test damages and repairs."""
    folder = tmp_path_factory.mktemp("lasting")
    return folder, make_store(folder)


@settings(max_examples=40, deadline=None)
@given(position=st.integers(1, 16 * 4 + 4), bit=st.integers(0, 7), block=st.integers(0, 2))
def test_one_flipped_bit_anywhere_in_an_index(
    lasting: tuple[Path, dict[ExpertKey, bytes]], position: int, bit: int, block: int
) -> None:
    folder, records = lasting
    path = shard(folder, block).path
    flip_bit(path, -position, bit)
    try:
        with pytest.raises(StoreFormatError, match="the index at the end of its shard") as caught:
            ShardStore.open(folder)
        assert str(path) in caught.value.cause
        with ShardStore.open(folder, damaged=True) as store:
            assert set(store.faults) == {block}
            with pytest.raises(StoreFormatError):
                read_record(store, ExpertKey(block, 0))
            other = ExpertKey((block + 1) % 3, 3)
            assert read_record(store, other) == records[other]
    finally:
        flip_bit(path, -position, bit)


@pytest.mark.parametrize("size", [0, 1, 4095, 16384 * 4, 16384 * 4 + 67, 16384 * 4 + 69, 1 << 20])
def test_a_shard_of_the_wrong_size(tmp_path: Path, size: int) -> None:
    records = make_store(tmp_path)
    file = shard(tmp_path, 1)
    os.truncate(file.path, size)
    with pytest.raises(StoreFormatError) as caught:
        ShardStore.open(tmp_path)
    assert f"{file.path} has {size:,} bytes; 65,604 were expected" in caught.value.cause
    with ShardStore.open(tmp_path, damaged=True) as store:
        with pytest.raises(StoreFormatError):
            read_record(store, ExpertKey(1, 0))
        assert read_record(store, ExpertKey(2, 0)) == records[ExpertKey(2, 0)]


def test_a_missing_shard(tmp_path: Path) -> None:
    records = make_store(tmp_path)
    path = shard(tmp_path, 1).path
    path.unlink()
    with pytest.raises(MissingExpertError) as caught:
        ShardStore.open(tmp_path)
    assert f"block 1 (model.layers.1.mlp.experts): its shard {path} is missing; it should have" in caught.value.cause
    with ShardStore.open(tmp_path, damaged=True) as store:
        with pytest.raises(MissingExpertError):
            read_record(store, ExpertKey(1, 3))
        assert read_record(store, ExpertKey(0, 3)) == records[ExpertKey(0, 3)]


def test_a_folder_where_a_shard_has_to_be(tmp_path: Path) -> None:
    make_store(tmp_path)
    path = shard(tmp_path, 1).path
    path.unlink()
    path.mkdir()
    with pytest.raises(StoreError, match=str(path)):
        ShardStore.open(tmp_path)


@pytest.mark.parametrize(
    ("expert", "entry"),
    [(1, (16384 + 1, 16384)), (1, (16384, 16384 - 4096)), (3, (2**63, 16384)), (2, (0, 16384)), (2, (2**64 - 1,) * 2)],
)
def test_an_index_with_a_right_checksum_that_leads_astray(tmp_path: Path, expert: int, entry: tuple[int, int]) -> None:
    make_store(tmp_path)
    file = shard(tmp_path, 2)
    index = np.frombuffer(file.make_index()[:-4], "<u8").reshape(-1, 2).copy()
    index[expert] = entry
    with file.path.open("r+b") as stream:
        stream.seek(file.data_bytes)
        stream.write(index.tobytes() + google_crc32c.value(index.tobytes()).to_bytes(4, "little"))
    with pytest.raises(StoreFormatError, match="the index at the end of its shard") as caught:
        ShardStore.open(tmp_path)
    assert str(file.path) in caught.value.cause


@pytest.mark.parametrize("layout", [layout_of(), LARGE], ids=["small", "large"])
def test_a_shard_that_is_cut_while_it_is_in_use(tmp_path: Path, layout: RecordLayout) -> None:
    records = make_store(tmp_path, blocks=2, experts=2, layout=layout)
    path = shard(tmp_path, 0, layout).path
    with ShardStore.open(tmp_path) as store:
        os.truncate(path, layout.slot_bytes + layout.slot_bytes // 2 + 100)
        with pytest.raises(StoreReadError, match="it was truncated while in use") as caught:
            read_record(store, ExpertKey(0, 1))
        assert str(path) in caught.value.cause
        assert read_record(store, ExpertKey(0, 0)) == records[ExpertKey(0, 0)]
        assert read_record(store, ExpertKey(1, 1)) == records[ExpertKey(1, 1)]
