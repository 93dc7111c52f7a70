"""What is known of a checkpoint before its weights are there is what its conversion finds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import save_checkpoint
from hubs import READ_SETTINGS, serve_hub
from prepared import Prepared
from quantised_checkpoints import quantise_fp8, quantise_mxfp4
from safetensors import safe_open

from moetier.runtime.checkpoint.safetensors_folder import INDEX, WEIGHTS
from moetier.tiers.errors import CheckpointError, UnsafeCheckpointError
from moetier.tools.convert.api import convert
from moetier.tools.plan.choices import open_choices, open_headers

# experts apart and renamed; fused; beside shared experts and dense layers; with biases; head tied to the embedding
ARCHITECTURES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "qwen3_next")


def small_files(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", INDEX):
        shutil.copy(source / name, folder / name)
    return folder


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_index_says_as_much_as_the_headers(model_type: str, tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", model_type)
    whole, named = open_choices(source), open_choices(small_files(source, tmp_path / "small"))
    assert whole.headers is not None
    assert named.headers is not None
    assert (whole.headers.shaped, named.headers.shaped) == (True, False)
    assert len(whole.choices) == 15
    for choice, same in zip(whole.choices, named.choices, strict=True):
        assert choice.manifest.layouts == same.manifest.layouts
        assert choice.manifest.blocks == same.manifest.blocks
        assert choice.matrices == same.matrices
        assert same.trunk_bytes == pytest.approx(choice.trunk_bytes, abs=4096)  # headers name tensors' shapes


@pytest.mark.parametrize("form", ["fp8", "mxfp4"])
def test_of_a_quantised_checkpoint_too(form: str, tmp_path: Path) -> None:
    """Its experts are as large as those that it is made of, and so are the plans for them."""
    model_type, quantise = {"fp8": ("deepseek_v3", quantise_fp8), "mxfp4": ("gpt_oss", quantise_mxfp4)}[form]
    source = save_checkpoint(tmp_path / "source", model_type, shards=1)
    plain = open_choices(source)
    quantise(source)
    with safe_open(source / WEIGHTS, "pt") as file:
        (source / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(file.keys(), WEIGHTS)}))
    whole, named = open_choices(source), open_choices(small_files(source, tmp_path / "small"))
    assert whole.source_bytes < plain.source_bytes
    kept, quantised = ([each for each in whole.choices if each.native is kept] for kept in (True, False))
    assert [(each.trunk_bits, each.as_it_is) for each in kept] == [(16, True), (8, False), (4, False)]
    for expected, choice, same in zip(plain.choices, quantised, named.choices, strict=True):
        assert expected.manifest.layouts == choice.manifest.layouts == same.manifest.layouts
        assert expected.manifest.blocks == choice.manifest.blocks == same.manifest.blocks
        assert expected.matrices == choice.matrices == same.matrices
        assert choice.trunk_bytes == pytest.approx(expected.trunk_bytes, abs=4096)
        assert same.trunk_bytes == pytest.approx(choice.trunk_bytes, abs=4096)


def test_shards_of_which_some_are_missing(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source")
    sorted(source.glob("*.safetensors"))[0].unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00001.*which model\.safetensors\.index\.json names"):
        open_headers(source)


@pytest.mark.parametrize("name", ["../x.safetensors", "x.bin"])
def test_an_index_that_names_something_else(tmp_path: Path, name: str) -> None:
    folder = small_files(save_checkpoint(tmp_path / "source"), tmp_path / "small")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UnsafeCheckpointError):
        open_headers(folder)


def test_a_folder_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has neither") as caught:
        open_headers(tmp_path)
    assert caught.value.fix.endswith(f"For moetier plan, {INDEX} beside config.json is enough.")


def test_a_trunk_that_was_quantised_is_as_large_as_was_planned(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source")
    (planned,) = open_choices(source).chosen([4], [4])
    convert(source, tmp_path / "model", bits=4, trunk_bits=4, fast=True)
    (choice,) = open_choices(tmp_path / "model").choices
    assert choice.matrices == planned.matrices
    assert choice.matrices
    assert (choice.bits, choice.trunk_bits, choice.trunk_bytes) == (4, 4, planned.trunk_bytes)


OPEN = """
from moetier.tiers.errors import CheckpointError
from moetier.tools.plan.choices import open_choices
found = open_choices("acme/tiny-moe")
print(found.name, found.headers.on_hub, found.source_bytes, *(choice.disk_bytes for choice in found.choices))
try:
    open_choices("acme/nothing")
except CheckpointError as error:
    print(error.cause)
"""


def test_of_a_hub_only_headers_are_fetched(scripts: Prepared, tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    weights = [name for name in files if name.endswith(".safetensors")]
    files |= {name: files[name] + bytes(1 << 20) for name in weights}  # far larger than a header and what goes with it
    expected = open_choices(source)
    with serve_hub(files, tmp_path / "hub") as hub:
        result = scripts.run(READ_SETTINGS + OPEN, environment=hub.settings)
        assert result.stdout.split("\n")[0].split() == [
            *("acme/tiny-moe", "True", str(expected.source_bytes)),
            *(str(choice.disk_bytes) for choice in expected.choices),
        ], result.stderr
        assert "The hub did not give a model with the id acme/nothing, and there is no such folder" in result.stdout
        assert hub.downloaded() == {"config.json", INDEX, *weights}
        assert all(hub.sent[name] <= 100_001 for name in weights)
    assert not list((tmp_path / "hub").rglob("*.safetensors"))
