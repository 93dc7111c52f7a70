"""Pushing a model directory, and using it from there: from S3 and from folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from faults import flip_bit
from object_servers import moto_bucket, served_bucket, silent, weed_bucket
from stores import make_store, read_records, without_table

from moetier.tiers.errors import (
    ChecksumError,
    ConfigError,
    StoreFormatError,
    StoreReadError,
    TargetError,
    TargetExistsError,
)
from moetier.tiers.objects import client
from moetier.tiers.objects import push as module
from moetier.tiers.objects.cache import CachedStore
from moetier.tiers.objects.cache_folder import fetch, outline
from moetier.tiers.objects.client import Objects
from moetier.tiers.objects.push import push
from moetier.tiers.store.checksum import crc32c
from moetier.tiers.store.folder import GROUP, METADATA, read_manifest
from moetier.tiers.store.reader import ShardStore

pytest.importorskip("obstore")

ARRAY = f"{GROUP}/records/{METADATA}"


@pytest.fixture(params=["file", "moto", "weed"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    opening: AbstractContextManager[str]
    if request.param == "file":
        (tmp_path / "bucket" / "model").mkdir(parents=True)
        yield f"file://{tmp_path / 'bucket'}"
        return
    opening = moto_bucket(monkeypatch) if request.param == "moto" else weed_bucket(tmp_path / "weed", monkeypatch)
    with opening as address:
        yield address


def test_what_was_pushed_is_the_same_model(bucket: str, tinymix_4bit: Path, tmp_path: Path) -> None:
    address = f"{bucket}/model"
    push(tinymix_4bit, address, silent)
    folder = fetch(address, tmp_path / "cache")
    with ShardStore.open(tinymix_4bit) as origin, CachedStore.open(folder) as store:
        assert read_records(store) == read_records(origin)
        assert store.objects.gets == origin.manifest.record_count
        assert store.objects.retries == 0
    there = {path.relative_to(tinymix_4bit) for path in tinymix_4bit.rglob("*") if path.is_file()}
    there.remove(Path("README.md"))  # which the command pushes
    there.remove(Path(module.MANIFEST))  # it has got the sums of small files
    assert all((folder / name).read_bytes() == (tinymix_4bit / name).read_bytes() for name in there)
    files = read_manifest(folder / GROUP).files
    others = {str(name) for name in there if name.suffix == ".safetensors" or "c" in name.parts}
    assert set(map(str, there)) - others == {*files}
    assert push(tinymix_4bit, address, silent) < 1 << 20, "only small files again"


@pytest.mark.parametrize("bucket", ["moto", "weed"], indirect=True)
def test_a_bucket_that_does_not_exist_is_named(bucket: str, tmp_path: Path) -> None:
    make_store(tmp_path / "store")
    address = f"{bucket}-of-nobody/model"
    with pytest.raises(StoreReadError, match=rf"^The bucket of {address} \(http.*\) does not exist\."):
        push(tmp_path / "store", address, silent)


def test_an_outline_has_headers_alone(bucket: str, tinymix_4bit: Path, tmp_path: Path) -> None:
    push(tinymix_4bit, f"{bucket}/model", silent)
    folder = outline(f"{bucket}/model", tmp_path / "cache")
    for path in tinymix_4bit.glob("trunk-*"):
        assert (folder / path.name).stat().st_size == path.stat().st_size
    assert not (tmp_path / "cache").exists()


def test_a_push_resumes_and_writes_its_manifest_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address, written = f"file://{tmp_path / 'there'}", []
    make_store(tmp_path / "one")
    put = Objects.put

    def fails(self: Objects, name: str, data: object) -> None:
        if len(written) == 3:
            raise TargetError("cut", "")
        written.append(name)
        put(self, name, data)  # type: ignore[arg-type]

    monkeypatch.setattr(Objects, "put", fails)
    with pytest.raises(TargetError, match="cut"):
        push(tmp_path / "one", address, silent)
    assert not (tmp_path / "there" / GROUP / METADATA).exists()
    with pytest.raises(StoreFormatError, match="no model"):
        fetch(address, tmp_path / "cache")
    make_store(tmp_path / "two", seed=1)
    with pytest.raises(TargetExistsError, match="another model"):
        push(tmp_path / "two", address, silent)
    written.clear()
    monkeypatch.setattr(Objects, "put", lambda self, name, data: written.append(name) or put(self, name, data))
    push(tmp_path / "one", address, silent)
    assert written[-1] == module.MANIFEST
    assert sum("/c/" in name for name in written) < 3, "shards that were there stay"
    assert not (tmp_path / "there" / module.PUSH).exists()
    with ShardStore.open(tmp_path / "there") as there, ShardStore.open(tmp_path / "one") as one:
        assert read_records(there) == read_records(one)
    with pytest.raises(TargetExistsError, match="another model"):
        push(tmp_path / "two", address, silent)
    push(tmp_path / "two", address, silent, overwrite=True)
    with ShardStore.open(tmp_path / "there") as there, ShardStore.open(tmp_path / "two") as two:
        assert read_records(there) == read_records(two)


def test_an_address_that_cannot_be_used_is_reported() -> None:
    with pytest.raises(ConfigError, match="can't be used"):
        Objects("s3://")


@pytest.mark.parametrize("name_of_the_cut", [module.PUSH, "/c/"])
def test_a_push_that_replaces_another_model_keeps_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name_of_the_cut: str
) -> None:
    """Also where it was cut, and goes on without --overwrite."""
    address, put = f"file://{tmp_path / 'there'}", Objects.put
    one, two = make_store(tmp_path / "one"), make_store(tmp_path / "two", seed=1)
    template = "chat_template.jinja"
    (tmp_path / "one" / template).write_text("of one")
    push(tmp_path / "one", address, silent)

    def fails(self: Objects, name: str, data: object) -> None:
        if name_of_the_cut in name:
            raise TargetError("cut", "")
        put(self, name, data)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Objects, "put", fails)
        with pytest.raises(TargetError, match="cut"):
            push(tmp_path / "two", address, silent, overwrite=True)
    push(tmp_path / "two", address, silent)
    assert not (tmp_path / "there" / template).exists()
    with ShardStore.open(tmp_path / "there") as there:
        assert read_records(there) == two
    push(tmp_path / "one", address, silent, overwrite=True)
    with ShardStore.open(tmp_path / "there") as there:
        assert read_records(there) == one


def test_a_replaced_model_leaves_nothing_of_its_own(bucket: str, tinymix_4bit: Path, tmp_path: Path) -> None:
    address = f"{bucket}/model"
    make_store(tmp_path / "two", blocks=1, seed=1)
    others = {"README.md", "other/config.json", "photos.zip"}
    with Objects(address, uploads=True) as objects:
        for name in (*others, "notes.txt"):
            objects.put(name, b"{}")
        push(tinymix_4bit, address, silent, overwrite=True)
        assert {*others, "notes.txt"} < {*(objects.sizes() or ())}, "no model was replaced"
        with pytest.raises(TargetExistsError):
            push(tmp_path / "two", address, silent)
        push(tmp_path / "two", address, silent, overwrite=True)
        own = {
            path.relative_to(tmp_path / "two").as_posix() for path in (tmp_path / "two").rglob("*") if path.is_file()
        }
        assert {*(objects.sizes() or ())} == own | others


def test_a_damaged_copy_is_written_again_with_overwrite(tmp_path: Path) -> None:
    address, records = f"file://{tmp_path / 'there'}", make_store(tmp_path / "one")
    push(tmp_path / "one", address, silent)
    flip_bit(next((tmp_path / "there").rglob("c/1/0/0")), 10)
    push(tmp_path / "one", address, silent, overwrite=True)
    with ShardStore.open(tmp_path / "there") as there:
        assert read_records(there) == records


def test_a_trunk_of_the_same_size_is_another_model(tinymix_4bit: Path, tmp_path: Path) -> None:
    address, changed = f"file://{tmp_path / 'there'}", shutil.copytree(tinymix_4bit, tmp_path / "changed")
    trunk, manifest = next(changed.glob("trunk-*")), changed / GROUP / METADATA
    flip_bit(trunk, -100)
    found = json.loads(manifest.read_text())
    found["attributes"]["moetier"]["trunk"][trunk.name]["crc32c"] = crc32c(trunk.read_bytes())
    manifest.write_text(json.dumps(found))
    push(tinymix_4bit, address, silent)
    with pytest.raises(TargetExistsError, match="another model"):
        push(changed, address, silent)
    push(changed, address, silent, overwrite=True)
    assert (fetch(address, tmp_path / "cache") / trunk.name).read_bytes() == trunk.read_bytes()


@pytest.mark.parametrize("fault", ["error", "refused", "all refused"])
def test_another_model_is_kept_where_it_cannot_be_listed(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(client, "RETRY_SECONDS", 0.1)
    make_store(tmp_path / "bucket/model")
    make_store(tmp_path / "two", seed=1)
    with served_bucket(tmp_path, monkeypatch) as server:
        server.fault = lambda name: fault.split()[-1] if "list-type" in name or "all" in fault else ""
        with pytest.raises(StoreReadError if fault == "error" else TargetExistsError):
            push(tmp_path / "two", "s3://bucket/model", silent)
        assert not server.puts


def test_a_card_is_kept_where_it_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path / "model")
    (there := tmp_path / "there").mkdir()
    (there / module.CARD).write_text("mine")
    monkeypatch.setattr(Objects, "sizes", lambda self: None)
    push(tmp_path / "model", f"file://{there}", silent, card=b"card")
    assert (there / module.CARD).read_text() == "mine"
    with pytest.raises(TargetExistsError, match="that moetier did not write"):
        push(tmp_path / "model", f"file://{there}", silent, card=b"card", card_mark=b"yours")
    push(tmp_path / "model", f"file://{there}", silent, card=b"card", card_mark=b"mi")
    assert (there / module.CARD).read_text() == "card"


def test_a_changed_small_file_is_pushed_with_its_sum(tinymix_4bit: Path, tmp_path: Path) -> None:
    """The model stays the same one. So does one that was pushed without sums."""
    address, changed = f"file://{tmp_path / 'there'}", shutil.copytree(tinymix_4bit, tmp_path / "changed")
    shutil.copytree(tinymix_4bit, tmp_path / "there")
    push(tinymix_4bit, address, silent)
    (changed / "generation_config.json").write_text('{"top_k": 7}')
    push(changed, address, silent)
    folder = fetch(address, tmp_path / "cache")
    assert (folder / "generation_config.json").read_text() == '{"top_k": 7}'


def test_what_does_not_belong_to_the_model_is_not_pushed(tmp_path: Path) -> None:
    """Metadata of zarr in other folders, as a killed `convert --overwrite` leaves them."""
    model, address = tmp_path / "model", f"file://{tmp_path / 'there'}"
    records = make_store(model)
    for other in ("backup", "replaced~", f"replaced~/{GROUP}/records", f"{GROUP}/records/old", f"{GROUP}/old"):
        (model / other).mkdir(parents=True)
        shutil.copy(model / ARRAY, model / other)
    push(model, address, silent)
    assert {*map(str, read_manifest(tmp_path / "there" / GROUP).files)} == {ARRAY}
    with CachedStore.open(fetch(address, tmp_path / "cache")) as store:
        assert read_records(store) == records


def test_a_model_that_cannot_be_fetched_is_not_pushed(tmp_path: Path) -> None:
    make_store(tmp_path / "model")
    without_table(tmp_path / "model")
    with pytest.raises(StoreFormatError, match="no checksums of records"):
        push(tmp_path / "model", f"file://{tmp_path / 'there'}", silent)
    assert not [*(tmp_path / "there").rglob("*")], "nothing was uploaded"


@pytest.fixture
def changed(tinymix_4bit: Path, tmp_path: Path) -> Path:
    """tinymix with another small file, which has the same size. tinymix itself is at bucket/model."""
    push(tinymix_4bit, f"file://{tmp_path}/bucket/model", silent)
    copy = shutil.copytree(tinymix_4bit, tmp_path / "changed")
    text = (copy / "generation_config.json").read_text()
    (copy / "generation_config.json").write_text(text.replace("}", " }").replace("  ", " ", 1))
    assert (copy / "generation_config.json").read_text() != text
    return copy


def test_a_push_of_changed_small_files_that_is_cut_leaves_a_model(
    changed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each of its uploads."""
    monkeypatch.setattr(client, "RETRY_SECONDS", 0.1)
    with served_bucket(tmp_path, monkeypatch) as server:
        for cut in range(7):
            server.puts.clear()
            server.fault = lambda name, cut=cut: "error" if len(server.puts) > cut else ""  # type: ignore[misc]
            with pytest.raises(TargetError):
                push(changed, "s3://bucket/model", silent)
            assert read_manifest(fetch(f"file://{tmp_path}/bucket/model", tmp_path / f"cache{cut}") / GROUP).trunk
    push(changed, f"file://{tmp_path}/bucket/model", silent)
    folder = fetch(f"file://{tmp_path}/bucket/model", tmp_path / "cache")
    assert read_manifest(folder / GROUP).files
    assert (folder / "generation_config.json").read_bytes() == (changed / "generation_config.json").read_bytes()


def test_a_push_of_changed_small_files_is_no_fault_of_a_fetch(
    changed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That began before it."""
    done: list[int] = []

    def pushes(name: str) -> str:
        if name.endswith("/generation_config.json") and not done:
            done.append(1)
            push(changed, f"file://{tmp_path}/bucket/model", silent)
        return ""

    with served_bucket(tmp_path, monkeypatch) as server:
        server.fault = pushes
        folder = fetch("s3://bucket/model", tmp_path / "cache")
    assert done
    assert (folder / "generation_config.json").read_bytes() == (changed / "generation_config.json").read_bytes()
    assert read_manifest(folder / GROUP).files == read_manifest(tmp_path / "bucket/model" / GROUP).files


def test_an_old_cache_that_lost_a_changed_file_says_what_to_do(changed: Path, tmp_path: Path) -> None:
    address = f"file://{tmp_path}/bucket/model"
    folder = fetch(address, tmp_path / "cache")
    push(changed, address, silent)
    (folder / "generation_config.json").unlink()
    with pytest.raises(ChecksumError, match=rf"{folder} is of an earlier push") as error:
        fetch(address, tmp_path / "cache")
    assert error.value.fix == f"Remove {folder}, and give the address of the model again."
    shutil.rmtree(folder)
    assert (fetch(address, tmp_path / "cache") / "generation_config.json").exists()


def test_a_slow_upload_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "STALL_SECONDS", 0.3)
    with served_bucket(tmp_path, monkeypatch) as server, Objects("s3://bucket/model", uploads=True) as objects:
        server.fault, server.seconds = lambda name: "slow", 1.0
        objects.put("small", b"here")
        assert len(server.puts) == 1


@pytest.mark.parametrize("found", [b"[]", b"{", b'{"attributes": {"moetier": 7}}'])
def test_what_is_no_manifest_is_another_model(found: bytes, tmp_path: Path) -> None:
    address, there = f"file://{tmp_path / 'there'}", tmp_path / "there" / GROUP / METADATA
    make_store(tmp_path / "one")
    there.parent.mkdir(parents=True)
    there.write_bytes(found)
    with pytest.raises(TargetExistsError, match="another model"):
        push(tmp_path / "one", address, silent)
    assert there.read_bytes() == found
    push(tmp_path / "one", address, silent, overwrite=True)
    with ShardStore.open(tmp_path / "there") as pushed, ShardStore.open(tmp_path / "one") as one:
        assert read_records(pushed) == read_records(one)
