"""A checkpoint that is used as it is: its records are those of a conversion, and nothing of it changes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from architectures import FEW_REQUIRED
from checkpoints import edit_json, edit_tensors, reshard, save_checkpoint, tree
from comparison import smallest_ram
from faults import flip_bit
from stores import read_records

import moetier
from moetier.runtime.stores.checkpoint_store import table_of
from moetier.runtime.stores.registry import open_store, read_manifest
from moetier.tiers.errors import (
    CheckpointError,
    ChecksumError,
    MissingExpertError,
    MoetierError,
    StoreFormatError,
    UnsafeCheckpointError,
    UnsupportedModelError,
)
from moetier.tiers.extents.reader import ExtentStore
from moetier.tiers.extents.table import NAME, cached
from moetier.tiers.layout import ExpertKey
from moetier.tools.convert.api import convert
from moetier.tools.main import main


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixtral in several shards. Tests must not change it."""
    return save_checkpoint(tmp_path_factory.mktemp("made") / "mixtral")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy."""
    return Path(copytree(made, tmp_path / "mixtral"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def digest(folder: Path) -> str:
    return hashlib.sha256(repr(sorted(tree(folder).items())).encode()).hexdigest()


@pytest.mark.parametrize("model_type", FEW_REQUIRED)
def test_records_are_those_of_a_conversion(model_type: str, tmp_path: Path) -> None:
    """Before and after it is linked; the digest stays."""
    folder = save_checkpoint(tmp_path / "source", model_type)
    convert(folder, tmp_path / "converted", bits=16)
    before = digest(folder)
    with open_store(tmp_path / "converted") as store, open_store(folder) as extents:
        assert extents.manifest.layouts == store.manifest.layouts
        assert extents.manifest.blocks == store.manifest.blocks
        assert read_records(extents) == read_records(store)
        known = extents.manifest.digest
        assert digest(folder) == before
        assert main(["link", str(folder)]) == 0
        (folder / NAME).rename(tmp_path / NAME)
        assert digest(folder) == before
        (tmp_path / NAME).rename(folder / NAME)
        with open_store(folder) as linked:
            assert linked.manifest.record_checksums == store.manifest.record_checksums
            assert linked.manifest.digest == known
            assert read_records(linked) == read_records(store)


def test_experts_may_be_scattered_over_files(made: Path, tmp_path: Path) -> None:
    with open_store(made) as whole, open_store(reshard(made, tmp_path / "many", 17)) as many:
        assert isinstance(many, ExtentStore)
        assert read_records(whole) == read_records(many)
        assert any(len({extent.shard for extent in many.table.extents(key)}) > 1 for key in read_records(whole))


# what is refused


def refused(folder: Path, error: type[MoetierError], words: str) -> MoetierError:
    with pytest.raises(error, match=words) as caught:
        moetier.load(folder)
    assert "\n" not in caught.value.cause
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize("model_type", ["ernie4_5_vl_moe", "inkling"])
def test_weights_that_transformers_rearranges(model_type: str, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "source", model_type)
    error = refused(folder, UnsupportedModelError, r"source is a checkpoint .*experts\.gate_up_proj on loading")
    assert error.fix == f"Convert it: moetier convert {folder} DST"


def test_other_types_and_quantised_weights(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "source", dtype=torch.float32)
    refused(folder, UnsupportedModelError, r"experts.*weight is in float32, and a record holds bfloat16")
    edit_json(folder / "config.json", dtype="float16")
    refused(folder, UnsupportedModelError, r"is in float32, and a record holds float16")
    edit_json(folder / "config.json", quantization_config={"quant_method": "aqlm"})
    refused(folder, UnsupportedModelError, "quantised with aqlm, which moetier can't read")


def test_weights_of_another_size(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "source", shards=1)

    def cut(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if ".experts." in name and ".w1." in name]:
            tensors[name] = tensors[name][:-1].clone()

    edit_tensors(folder, cut)
    refused(folder, CheckpointError, r"gate_up_proj of an expert comes out as \[191, 64\].*the model has \[192, 64\]")


def test_code_adapters_and_files_outside_are_refused(folder: Path, tmp_path: Path) -> None:
    linked = copytree(folder, tmp_path / "linked")
    assert main(["link", str(linked)]) == 0
    for place in (folder, Path(linked)):
        edit_json(place / "config.json", auto_map={"AutoModel": "code.Model"})
        refused(place, UnsafeCheckpointError, "auto_map")
        edit_json(place / "config.json", auto_map=None)
        (place / "adapter_config.json").write_text("{}")
        refused(place, UnsafeCheckpointError, "adapter_config.json")
        (place / "adapter_config.json").unlink()
        edit_json(place / "config.json", transformers_weights="model.safetensors.index.json")
        refused(place, UnsafeCheckpointError, "transformers_weights")
        edit_json(place / "config.json", transformers_weights=None)
        first = shards(place)[0]
        first.rename(tmp_path / first.name)
        first.symlink_to(tmp_path / first.name)
        refused(place, UnsafeCheckpointError, "leads out of the checkpoint")
        first.unlink()


def test_code_is_ignored_if_it_was_linked_so(folder: Path) -> None:
    expected = read_manifest(folder).digest
    edit_json(folder / "config.json", auto_map={"AutoModel": "code.Model"})
    (folder / "code.py").write_text("raise AssertionError")
    assert main(["link", str(folder)]) != 0
    assert main(["link", str(folder), "--ignore-code"]) == 0
    model, _ = moetier.load(folder)
    with model.tiers:
        assert model.tiers.manifest.digest == expected
    assert main(["link", str(folder)]) != 0


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def edit(path: Path) -> None:
    flip_bit(path, -1)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def swap(path: Path) -> None:
    other = next(each for each in shards(path.parent) if each != path)
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize(
    ("change", "error"),
    [(cut, StoreFormatError), (edit, StoreFormatError), (swap, StoreFormatError), (Path.unlink, MissingExpertError)],
)
def test_a_shard_that_is_no_longer_the_one_that_was_linked(
    change: Any, error: type[MoetierError], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["link", str(folder)]) == 0
    victim = shards(folder)[1]
    change(victim)
    assert "moetier link" in refused(folder, error, victim.name).fix
    capsys.readouterr()
    assert main(["inspect", str(folder)]) == 1
    assert victim.name in capsys.readouterr().out
    assert main(["verify", str(folder)]) == 1
    assert victim.name in capsys.readouterr().out


def test_an_edit_that_hides_its_time_is_found_by_the_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["link", str(folder)]) == 0
    extent = table_of(folder).extents(ExpertKey(1, 2))[0]
    victim = shards(folder)[extent.shard]
    found = victim.stat()
    flip_bit(victim, extent.offset)
    os.utime(victim, ns=(found.st_atime_ns, found.st_mtime_ns))
    model, _ = moetier.load(folder)
    with model.tiers, pytest.raises(ChecksumError, match=rf"block 1 .*expert 2: checksum mismatch in .*{victim.name}"):
        model(input_ids=torch.arange(2, 130)[None])
    assert main(["verify", str(folder)]) == 1
    assert "expert 2: checksum mismatch" in capsys.readouterr().out


def test_a_shard_that_is_cut_is_refused_without_a_link_too(folder: Path) -> None:
    cut(shards(folder)[0])
    refused(folder, CheckpointError, f"{shards(folder)[0].name} is truncated")


# what is said


def test_that_reads_are_not_proved_is_reported_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "moetier"):
        model, _ = moetier.load(folder)
        with model.tiers:
            model(input_ids=torch.arange(2, 30)[None])
        (line,) = [record.message for record in caplog.records if "without a check" in record.message]
        assert line.endswith(f"moetier link {folder}")
        caplog.clear()
        assert main(["link", str(folder)]) == 0
        moetier.load(folder)[0].tiers.close()
    assert not caplog.records


def test_verify_wants_checksums(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder)]) == 1
    assert f"moetier link {folder}" in capsys.readouterr().err
    assert main(["link", str(folder), "--cache"]) == 0
    assert cached(folder).exists()
    assert not (folder / NAME).exists()
    assert main(["verify", str(folder)]) == 0
    assert capsys.readouterr().out.endswith("all good\n")
    assert main(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["checkpoint"], found["linked"], found["faults"]) == (True, True, [])
    trunk = sum(path.stat().st_size for path in shards(folder))
    layout = read_manifest(folder).layout(0)
    assert found["trunk_bytes"] == trunk - found["records"] * layout.payload_bytes


def test_fine_tunes_have_other_digests(folder: Path, tmp_path: Path) -> None:
    """The two checkpoints have files with the same headers and sizes."""
    other = Path(copytree(folder, tmp_path / "other"))
    assert read_manifest(folder).digest == read_manifest(other).digest
    flip_bit(shards(other)[1], -1)
    assert read_manifest(folder).digest != read_manifest(other).digest


# it computes


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_generated_text_is_that_of_transformers_at_the_smallest_budget(model_type: str, tmp_path: Path) -> None:
    from architectures import tiny_model

    folder = save_checkpoint(tmp_path / "source", model_type)
    assert main(["link", str(folder)]) == 0
    ids = torch.randint(2, 250, (1, 9), generator=torch.Generator().manual_seed(3))
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    ordinary = tiny_model(model_type, torch.bfloat16)
    model, _ = moetier.load(folder, ram=smallest_ram(folder), exact=True, speculate="always")
    with model.tiers:
        assert torch.equal(model.generate(ids, **how), ordinary.generate(ids, **how))
        assert model.tiers.host.stats().evictions > 0
