"""A checkpoint is vetted before anything is read from it, and nothing that it brings is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from checkpoints import edit_json, save_checkpoint, tree
from hubs import cache_of

from moetier.runtime.checkpoint.config_json import read_config
from moetier.runtime.checkpoint.safetensors_folder import INDEX, WEIGHTS, open_safetensors
from moetier.tiers.errors import CheckpointError, StoreFormatError, UnsafeCheckpointError
from moetier.tools.convert.api import convert

TOUCH = "import pathlib; pathlib.Path({!r}).write_text('run')"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("original") / "tiny-moe")


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(original, tmp_path / "tiny-moe"))


def test_a_folder_is_listed(source: Path) -> None:
    checkpoint = open_safetensors(source)
    assert checkpoint.name == "tiny-moe"
    assert checkpoint.tensors.keys() == json.loads((source / INDEX).read_text())["weight_map"].keys()
    assert checkpoint.copied == ("generation_config.json",)
    assert checkpoint.digest == open_safetensors(str(source)).digest


def test_what_the_digest_knows(source: Path) -> None:
    before = open_safetensors(source).digest
    edit_json(source / "config.json", rms_norm_eps=1e-3)
    assert open_safetensors(source).digest != before


def test_a_conversion_leaves_out_settings_at_any_depth(source: Path, tmp_path: Path) -> None:
    """Those that a model directory may not have, in lists of lists too."""
    kept = {"name": "one"}
    edit_json(
        source / "config.json",
        parts=[kept | {"attn_implementation": "flash"}, [{"kernel_config": {}, "deep": [kept | {"fusion_config": 1}]}]],
    )
    convert(source, tmp_path / "made", bits=16)
    assert read_config(tmp_path / "made")["parts"] == [kept, [{"deep": [kept]}]]


class Trap:
    """Runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.code = TOUCH.format(str(mark))

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (self.code,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickle_is_refused_and_not_run(source: Path, tmp_path: Path, name: str) -> None:
    for path in source.glob("*.safetensors*"):
        path.unlink()
    mark = tmp_path / "mark"
    (source / name).write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(UnsafeCheckpointError, match=f"pickle.*{name}"):
        convert(source, tmp_path / "dst")
    assert not mark.exists()
    assert not (tmp_path / "dst").exists()


def test_pickle_beside_safetensors_is_ignored(source: Path, tmp_path: Path) -> None:
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "mark")))
    convert(source, tmp_path / "dst", fast=True)
    assert not (tmp_path / "mark").exists()
    assert not list((tmp_path / "dst").rglob("*.bin"))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_code_of_its_own_is_refused_and_with_ignore_code_left_behind(source: Path, tmp_path: Path, file: str) -> None:
    mark, dst = tmp_path / "mark", tmp_path / "dst"
    code = TOUCH.format(str(mark))
    for name in ("configuration_x.py", "modeling_x.py", "tokenization_x.py"):
        (source / name).write_text(f"{code}\nclass X: pass\n")
    if not (source / file).exists():
        (source / file).write_text("{}")
    edit_json(source / file, auto_map={"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"})
    with pytest.raises(UnsafeCheckpointError, match="auto_map") as caught:
        convert(source, dst)
    assert "--ignore-code" in caught.value.fix
    assert not dst.exists()
    convert(source, dst, fast=True, ignore_code=True)
    assert not mark.exists()
    assert not list(dst.rglob("*.py"))
    assert not any(b"auto_map" in data for data in tree(dst).values())


def test_code_that_a_part_of_the_config_names_is_refused(source: Path) -> None:
    edit_json(source / "config.json", text_config={"nested": [{"auto_map": {}}]})
    with pytest.raises(UnsafeCheckpointError, match="auto_map"):
        open_safetensors(source)


@pytest.mark.parametrize("levels", [150, 600, 100_000])  # json itself refuses only the last
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", INDEX])
def test_values_that_are_nested_too_deeply_are_refused(source: Path, file: str, levels: int) -> None:
    (source / file).write_text('{"a":' * levels + "0" + "}" * levels)
    with pytest.raises(CheckpointError, match=f"{file} has values that are nested in more than 100 levels"):
        open_safetensors(source)


def test_values_in_a_file_that_is_copied_without_auto_map_may_not_be_nested_too_deeply(
    source: Path, tmp_path: Path
) -> None:
    (source / "generation_config.json").write_text('{"auto_map": 0, "a":' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(StoreFormatError, match=r"generation_config\.json has values that are nested in more than"):
        convert(source, tmp_path / "dst", fast=True)


def test_an_integer_of_thousands_of_digits_in_a_file_that_is_copied_without_auto_map(
    source: Path, tmp_path: Path
) -> None:
    (source / "tokenizer_config.json").write_text('{"auto_map": 0, "a": ' + "1" * 5000 + "}")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json can't be read: Exceeds the limit"):
        convert(source, tmp_path / "dst", fast=True, ignore_code=True)


def test_what_a_config_names_to_be_loaded_is_not_carried_over(source: Path, tmp_path: Path) -> None:
    edit_json(source / "config.json", attn_implementation="evil/kernel", kernel_config={"x": 1}, fusion_config={"y": 1})
    convert(source, tmp_path / "dst", fast=True)
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert not config.keys() & {"attn_implementation", "kernel_config", "fusion_config", "auto_map"}


def redirect(source: Path, name: str) -> None:
    """The index says that one shard is ``name``."""
    index = json.loads((source / INDEX).read_text())
    victim = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"] = {key: name if file == victim else file for key, file in index["weight_map"].items()}
    (source / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["../x.safetensors", "a/../../x.safetensors", "absolute", "a\\b.safetensors"])
def test_an_index_that_leads_out_is_refused(source: Path, tmp_path: Path, kind: str) -> None:
    victim = sorted(source.glob("*.safetensors"))[0]
    outside = Path(shutil.copy(victim, tmp_path / "x.safetensors"))
    redirect(source, str(outside) if kind == "absolute" else kind)
    with pytest.raises(UnsafeCheckpointError, match="outside itself"):
        convert(source, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json", "shard"])
def test_a_link_that_leads_out_is_refused(source: Path, tmp_path: Path, name: str) -> None:
    victim = sorted(source.glob("*.safetensors"))[0] if name == "shard" else source / name
    outside = victim.rename(tmp_path / victim.name)
    victim.symlink_to(outside)
    with pytest.raises(UnsafeCheckpointError, match="leads out"):
        open_safetensors(source)


def test_a_config_that_names_weights_elsewhere_is_refused(source: Path) -> None:
    edit_json(source / "config.json", transformers_weights="../model.safetensors")
    with pytest.raises(UnsafeCheckpointError, match="outside itself"):
        open_safetensors(source)


def test_a_shard_that_is_missing_is_named(source: Path) -> None:
    victim = sorted(source.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {victim.name}"):
        open_safetensors(source)


def test_a_shard_that_is_cut_is_named(source: Path, tmp_path: Path) -> None:
    victim = sorted(source.glob("*.safetensors"))[1]
    os.truncate(victim, victim.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=f"{victim.name} is truncated"):
        convert(source, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_tensors_that_are_not_where_the_index_says_are_named(source: Path) -> None:
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["model.layers.9.ghost"] = next(iter(index["weight_map"].values()))
    (source / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"not in their files: model\.layers\.9\.ghost"):
        open_safetensors(source)


def test_a_tensor_that_is_there_twice_is_named(source: Path) -> None:
    first, second = sorted(source.glob("*.safetensors"))[:2]
    shutil.copy(first, second)
    with pytest.raises(CheckpointError, match=r"is in both .* and "):
        open_safetensors(source)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x80"])
def test_a_config_that_is_none_is_refused(source: Path, text: str) -> None:
    (source / "config.json").write_text(text, "latin-1")
    with pytest.raises(CheckpointError, match="JSON"):
        open_safetensors(source)


@pytest.mark.parametrize("value", ["fp8", 3, [{"quant_method": "fp8"}]])
def test_a_quantization_config_that_is_none_is_refused(source: Path, tmp_path: Path, value: object) -> None:
    edit_json(source / "config.json", quantization_config=value)
    with pytest.raises(CheckpointError, match=r"quantization_config of .* is not a JSON object"):
        convert(source, tmp_path / "dst")


def test_a_folder_without_config_or_weights_is_refused(source: Path, tmp_path: Path) -> None:
    for path in source.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=f"neither {WEIGHTS} nor {INDEX}"):
        open_safetensors(source)
    (source / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_safetensors(source)
    with pytest.raises(CheckpointError, match="no folder"):
        open_safetensors(tmp_path / "not" / "there" / "at all")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="not a folder"):
        open_safetensors(tmp_path / "file")


def test_the_links_of_a_hub_cache_are_its_own(original: Path, tmp_path: Path) -> None:
    snapshot = cache_of(original, tmp_path / "hub")
    assert open_safetensors(snapshot).name == "acme/tiny-moe"
    shutil.copy(original / "config.json", tmp_path / "config.json")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(UnsafeCheckpointError, match="leads out"):
        open_safetensors(snapshot)
