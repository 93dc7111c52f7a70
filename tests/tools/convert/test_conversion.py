"""A conversion with a quantised trunk: what it makes, cut and gone on with; what other commands say of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import save_checkpoint, tree
from faults import flip_bit

from moetier.runtime.checkpoint.safetensors_folder import open_safetensors
from moetier.tiers.errors import StoreFormatError, TargetExistsError
from moetier.tiers.manifest import FEATURES, TrunkRecords
from moetier.tiers.store.folder import read_manifest, store_folder
from moetier.tools.convert.api import convert
from moetier.tools.convert.conversion import Conversion
from moetier.tools.convert.options import Options
from moetier.tools.main import main


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("original") / "tiny-moe")


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With experts and a trunk of 4 bits."""
    folder = tmp_path_factory.mktemp("made") / "dst"
    convert(source, folder, trunk_bits=4)
    return folder


def test_what_it_says_of_itself(source: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read_manifest(store_folder(made))
    assert manifest.trunk_records == TrunkRecords(4, 64, "bfloat16")
    assert set(manifest.requires) == FEATURES == {"trunk-records"}
    assert json.loads((made / "config.json").read_text())["quantization_config"]["trunk_bits"] == 4
    names = json.loads((made / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name.rpartition(".")[2] for name in names} == {"record", "weight"}
    assert main(["inspect", str(made)]) == 0
    assert "13 matrices of 4 bits, groups of 64, bfloat16 pairs" in capsys.readouterr().out
    assert main(["inspect", str(made), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trunk_records"] == {"bits": 4, "group": 64, "pairs": "bfloat16"}
    assert found["trunk_matrices"] == 13
    assert main(["verify", str(made)]) == 0


def test_a_trunk_of_sixteen_bits_is_what_it_was(source: Path, tmp_path: Path) -> None:
    """So that older readers go on reading it."""
    convert(source, tmp_path / "dst")
    manifest = read_manifest(store_folder(tmp_path / "dst"))
    assert (manifest.requires, manifest.trunk_records, manifest.trunk_bits) == ((), None, 16)
    assert "trunk_records" not in manifest.to_json()
    assert "trunk_bits" not in json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"]


def test_sizes_are_those_that_were_announced(source: Path, made: Path, tmp_path: Path) -> None:
    conversion = Conversion.plan(open_safetensors(source), tmp_path / "dst", Options(trunk_bits=4))
    files = {name: len(data) for name, data in tree(made).items() if name.startswith("trunk-")}
    assert files == {file.name: file.size for file in conversion.target.trunk}
    weights = 3 * (2 * 64 * 64 + 2 * 32 * 64) + 256 * 64
    size = weights // 2 + (3 * (2 * 64 + 2 * 64) + 256) * 4  # 32 rows are padded to 64 ...
    size += 3 * 2 * 32 * 64 // 2  # ... and so are their codes
    (line,) = [line for line in conversion.announce() if "matrices of the trunk" in line]
    assert line.startswith(f"13 matrices of the trunk, {weights:,} weights, are quantised: ")
    assert f" {size * 8 / weights:.2f} bits a weight" in line
    assert f"trunk {sum(files.values()) / 1024:.4g} KiB" in conversion.announce()[1]


def test_the_report(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "dst", trunk_bits=8)
    assert (report.trunk_bits, report.trunk_matrices) == (8, 7)  # k and v would grow
    assert report.trunk_error is not None
    assert 0 < report.trunk_error < 0.01
    assert f"its 7 matrices of 8 bits error {report.trunk_error:.4f}" in " ".join(report.table().split())
    assert report.to_json()["trunk_error"] == report.trunk_error
    fast = convert(source, tmp_path / "fast", bits=16, trunk_bits=8, fast=True)
    assert fast.trunk_error is not None
    assert fast.trunk_error > report.trunk_error
    again = convert(source, tmp_path / "dst", trunk_bits=8)
    assert again.was_complete
    assert "experts of 4 bits and a trunk of 8 already" in again.table()


def test_another_width_is_another_conversion(source: Path, made: Path) -> None:
    for bits in (16, 8):
        with pytest.raises(TargetExistsError, match=rf": it has a trunk of 4 bits, not {bits}\."):
            convert(source, made, trunk_bits=bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("left", ["experts", "trunk"])
def test_what_was_cut_is_gone_on_with(source: Path, made: Path, tmp_path: Path, left: str) -> None:
    """Whatever is left of it is looked through, and what is not as it would be written is written again."""
    folder = Path(shutil.copytree(made, tmp_path / "dst"))
    (folder / "experts.zarr" / "zarr.json").unlink()
    plan = read_manifest(store_folder(made)).plan.to_json()
    (folder / "experts.zarr" / "plan.json").write_text(json.dumps(plan))
    trunk = folder / "trunk-00001-of-00001.safetensors"
    if left == "experts":
        trunk.unlink()
    else:
        flip_bit(trunk, trunk.stat().st_size // 2, 5)
    assert main(["convert", str(source), str(folder), "--trunk-bits", "4"]) == 0
    assert tree(folder) == tree(made)


def test_the_command_that_resumes_it(source: Path, tmp_path: Path) -> None:
    conversion = Conversion.plan(open_safetensors(source), tmp_path / "dst", Options(trunk_bits=4))
    assert conversion.command[-4:] == ("--bits", "4", "--trunk-bits", "4")


def test_a_bit_of_a_record_that_flipped_is_found(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "dst"))
    trunk = folder / "trunk-00001-of-00001.safetensors"
    flip_bit(trunk, trunk.stat().st_size - 1, 0)
    assert main(["verify", str(folder)]) == 1


def test_an_older_reader_is_told(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetier.tiers.manifest.FEATURES", frozenset())
    with pytest.raises(StoreFormatError, match="requires trunk-records, which this version"):
        read_manifest(store_folder(made))
