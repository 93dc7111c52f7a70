"""``moetier mirror``, ``convert --mirror``, and what other commands say of mirrors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import tree
from faults import flip_bit
from stores import make_store

import moetier
from moetier.runtime.model.names import models_folder
from moetier.runtime.stores.registry import open_store
from moetier.tiers.layout import ExpertKey
from moetier.tiers.store.atomic import PARTIAL
from moetier.tiers.store.folder import GROUP, METADATA, MIRRORS, read_manifest
from moetier.tiers.store.mirror import MirroredStore
from moetier.tiers.store.shard import ShardFile
from moetier.tiers.store.writer import ShardWriter
from moetier.tools.main import main


def mirrored(place: Path) -> dict[ExpertKey, bytes]:
    records = make_store(place / "a")
    assert main(["mirror", str(place / "a"), str(place / "b")]) == 0
    return records


def test_a_mirror_holds_the_same_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mirrored(tmp_path)
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'b'}: mirror of {tmp_path / 'a'}, 192 KiB\n"
    assert "is on the same disk" in said.err
    of_store, of_mirror = (tree(tmp_path / name / GROUP) for name in "ab")
    assert of_store == of_mirror
    assert json.loads((tmp_path / "a" / MIRRORS).read_text()) == {"mirrors": [str(tmp_path / "b")]}
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "b").rglob("*")}
    assert main(["mirror", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "b").rglob("*")}, "nothing is written again"
    assert main(["mirror", str(tmp_path / "a"), str(tmp_path / "c")]) == 0
    assert json.loads((tmp_path / "a" / MIRRORS).read_text()) == {"mirrors": [str(tmp_path / name) for name in "bc"]}
    with open_store(tmp_path / "a") as store:
        assert isinstance(store, MirroredStore)


def test_a_cut_run_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path / "a")
    write, written = ShardWriter.write, 0

    def cut(shard: ShardWriter, payload: memoryview) -> None:
        nonlocal written
        written += 1
        if written == 6:
            raise KeyboardInterrupt
        write(shard, payload)

    words = ["mirror", str(tmp_path / "a"), str(tmp_path / "b")]
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", cut)
        assert main(words) == 130
    found = tree(tmp_path / "b" / GROUP)
    assert not (tmp_path / "a" / MIRRORS).exists()
    assert METADATA not in found
    assert not [path for path in found if path.endswith(PARTIAL)]
    stamp = (tmp_path / "b" / GROUP / "records/c/0/0/0").stat().st_mtime_ns
    assert main(words) == 0
    assert tree(tmp_path / "a" / GROUP) == tree(tmp_path / "b" / GROUP)
    assert (tmp_path / "b" / GROUP / "records/c/0/0/0").stat().st_mtime_ns == stamp


def test_it_is_not_made_where_it_would_overwrite_something(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path / "a")
    make_store(tmp_path / "b", seed=1)
    before = tree(tmp_path / "b")
    for target, said in (("b", "holds the experts of another model"), ("a/in", "overlap"), ("a", "overlap")):
        assert main(["mirror", str(tmp_path / "a"), str(tmp_path / target)]) == 1
        assert said in capsys.readouterr().err
    assert tree(tmp_path / "b") == before
    assert not (tmp_path / "a" / MIRRORS).exists()
    assert not (tmp_path / "a" / "in").exists()


def test_verify_checks_mirrors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mirrored(tmp_path)
    manifest = read_manifest(tmp_path / "a" / GROUP)
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "a")]) == 0
    assert "12 records in 3 blocks in 2 copies" in capsys.readouterr().out
    path = ShardFile.of(tmp_path / "b" / GROUP, manifest, 1).path
    flip_bit(path, 20000)
    assert main(["verify", str(tmp_path / "a"), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [(bad["block"], bad["expert"], bad["file"]) for bad in report["bad"]] == [(1, 1, str(path))]
    assert report["mirrors"] == [str(tmp_path / "b")]
    assert report["bytes_read"] == 2 * manifest.stored_bytes
    (tmp_path / "b").rename(tmp_path / "away")
    assert main(["verify", str(tmp_path / "a")]) == 0, "its disk may be away"
    assert f"mirror {tmp_path / 'b'}: missing, so it was not checked" in capsys.readouterr().out
    make_store(tmp_path / "b", seed=1)
    assert main(["verify", str(tmp_path / "a")]) == 1
    assert "is the copy of another store" in capsys.readouterr().out
    (tmp_path / "a" / MIRRORS).write_text("[]")
    assert main(["verify", str(tmp_path / "a")]) == 1
    assert "is not a JSON object" in capsys.readouterr().out


def test_inspect_names_mirrors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mirrored(tmp_path)
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "a")]) == 0
    assert f"\nmirror           {tmp_path / 'b'}\n" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "b")
    assert main(["inspect", str(tmp_path / "a")]) == 0
    assert f"\nmirror           {tmp_path / 'b'} (not there)\n" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mirrors"] == [str(tmp_path / "b")]


def test_a_conversion_with_a_mirror(tinymix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", str(tinymix), str(tmp_path / "a"), "--fast", "--mirror"]
    assert main([*words, str(tmp_path / "a" / "b")]) == 1
    assert not (tmp_path / "a").exists()
    assert main([*words, str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["target"] == str(tmp_path / "a")
    tokens = torch.tensor([[5, 6, 7, 8]])
    found = []
    for _ in range(2):
        model, _ = moetier.load(tmp_path / "a", daemon=None)
        with model.tiers, torch.inference_mode():
            found.append(model(tokens).logits)
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
    assert torch.equal(*found)
    assert main([*words, str(tmp_path / "b")]) == 0, "the model is there, and its mirror is made"
    with open_store(tmp_path / "a") as store:
        assert isinstance(store, MirroredStore)


def test_a_pulled_model_and_its_mirror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    folder = models_folder() / "acme--tiny" / "4bit"
    folder.parent.mkdir(parents=True)
    make_store(folder)
    assert main(["mirror", "acme/tiny:4bit", str(tmp_path / "b")]) == 0
    capsys.readouterr()
    assert main(["list"]) == 0
    assert f"pulled, mirror {tmp_path / 'b'}" in capsys.readouterr().out
    assert main(["rm", "acme/tiny:4bit", "--yes"]) == 0
    assert f"{tmp_path / 'b'}: mirror of acme/tiny:4bit, which is not removed" in capsys.readouterr().out
    assert (tmp_path / "b" / GROUP / METADATA).exists()
