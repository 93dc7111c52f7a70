"""The cache of an address: which folder it has, and what is fetched again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from faults import flip_bit
from object_servers import silent

from moetier.tiers.errors import ChecksumError, StoreFormatError
from moetier.tiers.objects.cache_folder import cache_of, fetch, folder_of
from moetier.tiers.objects.push import push
from moetier.tiers.store.folder import CACHE

pytest.importorskip("obstore")


def test_a_damaged_trunk_is_refused_and_not_kept(tinymix_4bit: Path, tmp_path: Path) -> None:
    address = f"file://{tmp_path / 'there'}"
    push(tinymix_4bit, address, silent)
    trunk = next((tmp_path / "there").glob("trunk-*"))
    flip_bit(trunk, -100)
    with pytest.raises(ChecksumError, match=trunk.name):
        fetch(address, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("trunk-*"))
    flip_bit(trunk, -100)
    assert (fetch(address, tmp_path / "cache") / trunk.name).read_bytes() == trunk.read_bytes()


def test_a_trunk_that_an_interrupted_fetch_left_is_checked(tinymix_4bit: Path, tmp_path: Path) -> None:
    address = f"file://{tmp_path / 'there'}"
    push(tinymix_4bit, address, silent)
    folder = fetch(address, tmp_path / "cache")
    trunk = next(folder.glob("trunk-*"))
    (folder / CACHE).unlink()
    flip_bit(trunk, -100)
    assert fetch(address, tmp_path / "cache") == folder
    assert trunk.read_bytes() == (tinymix_4bit / trunk.name).read_bytes()


def test_another_endpoint_has_another_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://one")
    one = folder_of("s3://bucket/model", tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://two")
    assert folder_of("s3://bucket/model", tmp_path) != one


def test_a_small_file_that_is_damaged_in_the_cache_is_fetched_again(
    tinymix_4bit: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    push(tinymix_4bit, f"file://{tmp_path / 'there'}", silent)
    folder = fetch(f"file://{tmp_path / 'there'}", tmp_path / "cache")
    flip_bit(folder / "tokenizer.json", 100)
    (folder / "config.json").unlink()
    assert fetch(f"file://{tmp_path / 'there'}", tmp_path / "cache") == folder
    for name in ("tokenizer.json", "config.json"):
        assert (folder / name).read_bytes() == (tinymix_4bit / name).read_bytes()
    assert f"Files of {folder} are damaged, and are fetched again: config.json, tokenizer.json." in caplog.messages
    caplog.clear()
    fetch(f"file://{tmp_path / 'there'}", tmp_path / "cache")
    assert not caplog.messages


@pytest.mark.parametrize(("field", "value"), [("address", 5), ("bytes", -1), ("bytes", "much")])
def test_a_malformed_description_of_a_cache_is_refused(tmp_path: Path, field: str, value: object) -> None:
    (tmp_path / CACHE).parent.mkdir(exist_ok=True)
    (tmp_path / CACHE).write_text(json.dumps({"address": "file:///there", "bytes": None} | {field: value}))
    with pytest.raises(StoreFormatError, match=rf"{CACHE}: .*{field}") as caught:
        cache_of(tmp_path)
    assert caught.value.fix == f"Remove {tmp_path}, and give the address of the model again."
