"""Small files of a model in an object store: which are fetched, checked and refused."""

from __future__ import annotations

import shutil
import tracemalloc
from pathlib import Path

import pytest
from object_servers import served_bucket, served_folder, silent

from moetier.tiers.errors import (
    StoreError,
    StoreFormatError,
    StoreReadError,
)
from moetier.tiers.objects import client
from moetier.tiers.objects import push as module
from moetier.tiers.objects.cache_folder import fetch
from moetier.tiers.objects.push import push
from moetier.tiers.store.folder import GROUP, METADATA

pytest.importorskip("obstore")

ARRAY = f"{GROUP}/records/{METADATA}"


def test_a_model_that_cannot_be_listed_is_fetched_by_usual_names(
    tinymix_4bit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 refuses what does not exist to those who may not list."""
    shutil.copytree(tinymix_4bit, tmp_path / "bucket/model")
    with served_bucket(tmp_path, monkeypatch) as server:
        server.fault = lambda name: "" if (tmp_path / name).is_file() else "refused"
        folder = fetch("s3://bucket/model", tmp_path / "one")
        assert (folder / "tokenizer.json").read_bytes() == (tinymix_4bit / "tokenizer.json").read_bytes()
        server.fault = lambda name: "refused" if name.endswith("tokenizer.json") else ""
        with pytest.raises(StoreReadError, match=r"tokenizer\.json"):
            fetch("s3://bucket/model", tmp_path / "two")


def test_a_failed_listing_does_not_leave_a_cache_without_its_tokenizer(
    tinymix_4bit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(client, "RETRY_SECONDS", 0.1)
    (shutil.copytree(tinymix_4bit, tmp_path / "bucket/model") / "unusual.json").write_text("{}")
    with served_bucket(tmp_path, monkeypatch) as server:
        server.fault = lambda name: "error" if "list-type" in name else ""
        with pytest.raises(StoreReadError, match="list of objects"):
            fetch("s3://bucket/model", tmp_path / "cache")
        server.fault = lambda name: "error" if "list-type" in name and "list-type" not in server.gets[-2] else ""
        assert (fetch("s3://bucket/model", tmp_path / "cache") / "unusual.json").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", ARRAY])
def test_a_damaged_small_file_is_refused_and_not_kept(
    name: str, tinymix_4bit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(tinymix_4bit, f"file://{tmp_path}/bucket/model", silent)
    with served_bucket(tmp_path, monkeypatch) as server:
        for fault, said in (("altered", "other bytes than the manifest says"), ("page", "is a web page")):
            server.gets.clear()
            server.fault = lambda asked, fault=fault: fault if asked.endswith(f"/{name}") else ""  # type: ignore[misc]
            with pytest.raises(StoreError, match=f"{name} at s3://bucket/model .* {said}") as error:
                fetch("s3://bucket/model", tmp_path / "cache")
            assert "Convert" not in error.value.fix
            assert sum(asked.endswith(f"/{name}") for asked in server.gets) == 1 + client.RETRIES
            assert not list((tmp_path / "cache").glob(f"*/*/{name}"))
        server.fault = lambda asked: "" if server.fresh[-1] else "page"  # as a proxy does that keeps a wrong answer
        assert (fetch("s3://bucket/model", tmp_path / "cache") / name).read_bytes() == (
            tinymix_4bit / name
        ).read_bytes()


def test_a_model_without_sums_is_used_with_a_warning(
    tinymix_4bit: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As other tools copy it, and earlier versions push it."""
    with served_folder(tinymix_4bit) as server:
        folder = fetch(server.address, tmp_path / "one")
        assert (folder / "tokenizer.json").read_bytes() == (tinymix_4bit / "tokenizer.json").read_bytes()
        assert f"{server.address} has no checksums of its config and tokenizer" in caplog.text
        server.fault = lambda name: "page" if name == "tokenizer.json" else ""
        with pytest.raises(StoreFormatError, match=r"tokenizer\.json at http.* is a web page"):
            fetch(server.address, tmp_path / "two")
        server.fault = lambda name: "altered" if name == "config.json" else ""
        with pytest.raises(StoreFormatError, match=r"config\.json at http.* is not JSON"):
            fetch(server.address, tmp_path / "two")


def test_small_files_have_at_most_what_is_accepted_in_all(
    tinymix_4bit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = (tinymix_4bit / "tokenizer.json").stat().st_size + 1000
    push(tinymix_4bit, f"file://{tmp_path / 'there'}", silent)
    monkeypatch.setattr("moetier.tiers.objects.small_files.MAX_SMALL_BYTES", most)
    with served_folder(tinymix_4bit) as server:  # one that does not list
        with pytest.raises(StoreReadError, match="the answer has more than"):
            fetch(server.address, tmp_path / "one")
        server.folder = tmp_path / "there"
        server.gets.clear()
        with pytest.raises(StoreFormatError, match=r"http.* has .* small files with "):
            fetch(server.address, tmp_path / "two")
        assert {*server.gets} == {module.MANIFEST}, "said by their sums"
    with pytest.raises(StoreFormatError, match=rf"{tinymix_4bit} has .* small files with .* more than"):
        push(tinymix_4bit, f"file://{tmp_path / 'elsewhere'}", silent)
    assert not [*(tmp_path / "elsewhere").rglob("*")], "nothing was uploaded"


def test_large_json_is_not_parsed(tinymix_4bit: Path, tmp_path: Path) -> None:
    """It could take twenty times its size in memory."""
    model = shutil.copytree(tinymix_4bit, tmp_path / "model")
    (model / "tokenizer.json").write_text("[" + "[]," * (1 << 20) + "[]]\n")
    with served_folder(model) as server:
        tracemalloc.start()
        try:
            fetch(server.address, tmp_path / "one")
            assert tracemalloc.get_traced_memory()[1] < 40 << 20
        finally:
            tracemalloc.stop()
        for name, text in (("large", "{" + " " * (3 << 20)), ("small", '{"a": ')):
            (model / "tokenizer.json").write_text(text)
            with pytest.raises(StoreFormatError, match=r"tokenizer\.json at http.* is not JSON"):
                fetch(server.address, tmp_path / name)
