"""The folder of a store: its files are those of a store, and agree with the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stores import edit, make_plan, make_store

from moetier.tiers.errors import IncompleteStoreError, StoreFormatError
from moetier.tiers.store.folder import GROUP, METADATA
from moetier.tiers.store.reader import ShardStore
from moetier.tiers.store.writer import StoreWriter


def test_a_store_without_manifest_is_incomplete(tmp_path: Path) -> None:
    make_store(tmp_path)
    (tmp_path / GROUP / METADATA).unlink()
    with pytest.raises(IncompleteStoreError, match="has no manifest") as caught:
        ShardStore.open(tmp_path)
    assert "moetier convert SRC" in caught.value.fix


def test_a_conversion_that_was_cut_names_what_resumes_it(tmp_path: Path) -> None:
    folder = tmp_path / "a model"
    with StoreWriter.open(folder / GROUP, make_plan(model="/models/my moe")):
        pass
    with pytest.raises(IncompleteStoreError, match="0 of 3 blocks") as caught:
        ShardStore.open(folder)
    assert caught.value.fix == f"Resume it: moetier convert '/models/my moe' '{folder}'"


CODECS = ("codecs", 0, "configuration")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("shape",), [4, 4, 16380]),
        (("data_type",), "uint16"),
        (("node_type",), "group"),
        (("chunk_grid", "configuration", "chunk_shape"), [1, 2, 16380]),
        (("chunk_key_encoding", "configuration", "separator"), "."),
        ((*CODECS, "chunk_shape"), [1, 2, 16380]),
        ((*CODECS, "codecs"), [{"name": "bytes"}]),
        ((*CODECS, "codecs"), [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 3}}, {"name": "crc32c"}]),
        ((*CODECS, "index_codecs"), [{"name": "bytes", "configuration": {"endian": "little"}}]),
        ((*CODECS, "index_location"), "start"),
    ],
)
def test_array_metadata_that_contradicts_the_manifest(tmp_path: Path, keys: tuple[str | int, ...], value: Any) -> None:
    make_store(tmp_path)
    path = tmp_path / GROUP / "records" / METADATA
    edit(path, *keys, to=value)
    with pytest.raises(StoreFormatError, match="does not match the manifest") as caught:
        ShardStore.open(tmp_path)
    assert f"{path}: {keys[0]}" in caught.value.cause


@pytest.mark.parametrize("name", [METADATA, f"records/{METADATA}"])
@pytest.mark.parametrize("text", ["", "{", "[]", '"text"', "\x00\x01"])
def test_metadata_that_is_no_json_object(tmp_path: Path, name: str, text: str) -> None:
    make_store(tmp_path)
    (tmp_path / GROUP / name).write_text(text)
    with pytest.raises(StoreFormatError, match=r"is not (a )?JSON"):
        ShardStore.open(tmp_path)


def test_array_metadata_that_is_missing(tmp_path: Path) -> None:
    make_store(tmp_path)
    (tmp_path / GROUP / "records" / METADATA).unlink()
    with pytest.raises(StoreFormatError, match="is missing"):
        ShardStore.open(tmp_path)


def test_places_that_are_no_model_directory(tmp_path: Path) -> None:
    with pytest.raises(StoreFormatError, match="There is no folder"):
        ShardStore.open(tmp_path / "nowhere")
    with pytest.raises(StoreFormatError, match="it has no experts"):
        ShardStore.open(tmp_path)
    (tmp_path / "file").write_text("text")
    with pytest.raises(StoreFormatError, match="is not a folder"):
        ShardStore.open(tmp_path / "file")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StoreFormatError, match="is a checkpoint, and not"):
        ShardStore.open(tmp_path)
