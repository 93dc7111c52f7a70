"""A model directory that came from anywhere: load() takes nothing from outside it, and says what is broken."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from comparison import convert_tiny
from faults import flip_bit
from safetensors import safe_open
from stores import without_sums
from transformers import AutoModelForCausalLM

import moetier
from moetier.runtime.checkpoint.config_json import NOT_CARRIED
from moetier.tiers.errors import MoetierError, StoreFormatError, UnsafeCheckpointError
from moetier.tiers.store.folder import GROUP
from moetier.tiers.store.trunk import INDEX
from moetier.tools.main import main

TRUNK = "trunk-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory. Tests must not change it."""
    return convert_tiny("mixtral", torch.bfloat16, tmp_path_factory.mktemp("mixtral"))[1]


@pytest.fixture
def directory(made: Path, tmp_path: Path) -> Path:
    """A copy."""
    return Path(copytree(made, tmp_path / "model"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def point_index(directory: Path, place: str) -> None:
    edit(directory / INDEX, lambda index: index.update(weight_map=dict.fromkeys(index["weight_map"], place)))


def refused(directory: Path, error: type[MoetierError], words: str) -> None:
    """By load and by plain from_pretrained."""
    with pytest.raises(error, match=words) as caught:
        moetier.load(directory)
    assert "\n" not in caught.value.cause
    assert caught.value.fix
    moetier.register()
    with pytest.raises(error, match=words):
        AutoModelForCausalLM.from_pretrained(directory)


# nothing from outside


@pytest.mark.parametrize("place", ["../other/" + TRUNK, "{other}/" + TRUNK, f"../model/{TRUNK}"])
@pytest.mark.parametrize("summed", [True, False])
def test_an_index_that_leads_out(directory: Path, tmp_path: Path, place: str, summed: bool) -> None:
    other = copytree(directory, tmp_path / "other")
    if not summed:
        without_sums(directory)
    point_index(directory, place.format(other=other))
    with pytest.raises(StoreFormatError, match="not the name of a trunk file in the model directory"):
        moetier.load(directory)
    moetier.register()
    with pytest.raises(MoetierError, match="trunk file"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_the_store_is_that_of_the_directory_asked_for(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whatever name."""
    link = directory.with_name("link")
    link.symlink_to(directory)
    monkeypatch.chdir(directory)
    for name in (directory, link, Path(), Path("../model")):
        model, _ = moetier.load(name)
        with model.tiers:
            opened = [link.resolve() for link in Path("/proc/self/fd").iterdir()]
            assert any(path.is_relative_to((directory / GROUP).resolve()) for path in opened)


class Witness:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_a_trunk_in_pickle(directory: Path, tmp_path: Path) -> None:
    """With and without an index that names it, and with an index of its own."""
    with safe_open(directory / TRUNK, "pt") as opened:
        torch.save({name: opened.get_tensor(name) for name in opened.keys()}, directory / "pytorch_model.bin")  # noqa: SIM118
    (directory / TRUNK).unlink()
    without_sums(directory)  # else it is refused for that alone
    point_index(directory, "pytorch_model.bin")
    with pytest.raises(StoreFormatError, match=r"'pytorch_model\.bin', not the name of a trunk file"):
        moetier.load(directory)
    (directory / INDEX).rename(directory / "pytorch_model.bin.index.json")
    with pytest.raises(StoreFormatError, match="is missing"):
        moetier.load(directory)
    moetier.register()
    with pytest.raises(UnsafeCheckpointError, match=r"pytorch_model\.bin, which is not a trunk file"):
        AutoModelForCausalLM.from_pretrained(directory)
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Witness(tmp_path / "witness")))
    for load in (moetier.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(Exception):  # noqa: B017, PT011 - transformers' own, where it is the first to look
            load(directory)
    assert not (tmp_path / "witness").exists()


def test_weights_that_transformers_prefers_to_the_index(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes((directory / TRUNK).read_bytes())
    refused(directory, UnsafeCheckpointError, r"model\.safetensors, which is not a trunk file")


def test_an_adapter_with_a_base_in_another_folder(directory: Path) -> None:
    (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "../other"}')
    with pytest.raises(UnsafeCheckpointError, match=r"adapter_config\.json"):
        moetier.load(directory)


HARMFUL = {
    "attn_implementation": "someone/kernel",
    "_attn_implementation": "someone/kernel",
    "_attn_implementation_internal": "someone/kernel",
    "experts_implementation": "someone/kernel",
    "_experts_implementation": "someone/kernel",
    "_experts_implementation_internal": "someone/kernel",
    "auto_map": {"AutoConfig": "evil.Config"},
    "fusion_config": {"rms_norm": True},
    "kernel_config": {"kernel_mapping": {"RMSNorm": "someone/kernel:RMSNorm"}},
    "transformers_weights": "other.safetensors",
    "quantization_config": {"quant_method": "gptq"},
    "compression_config": {"quant_method": "compressed-tensors"},
    "configuration_files": ["config.1.0.0.json"],
}


def test_every_key_is_tried() -> None:
    assert HARMFUL.keys() == set(NOT_CARRIED)


@pytest.mark.parametrize("key", HARMFUL)
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_config_that_names_code_or_files(directory: Path, key: str, depth: int) -> None:
    """At the top, in a part, and in a part within a list."""
    harmful = {key: HARMFUL[key]}
    change = (harmful, {"text_config": harmful}, {"parts": [{"x": harmful}]})[depth]
    edit(directory / "config.json", lambda config: config.update(change))
    if depth == 0 and key == "quantization_config":
        with pytest.raises(StoreFormatError, match="does not name moetier"):
            moetier.load(directory)
    else:
        with pytest.raises(UnsafeCheckpointError, match=f"has {key}, which"):
            moetier.load(directory)


@pytest.mark.parametrize("key", ["auto_map", "fusion_config", "compression_config"])
def test_plain_from_pretrained_refuses_it_too(directory: Path, key: str) -> None:
    """Where transformers gets as far as asking moetier."""
    edit(directory / "config.json", lambda config: config.update(parts=[{key: {"x": "y"}}]))
    refused(directory, UnsafeCheckpointError, f"has {key}, which")


def test_what_a_config_may_say(directory: Path) -> None:
    """Keys that say nothing, as transformers writes them."""
    edit(directory / "config.json", lambda config: config.update(auto_map=None, attn_implementation=None))
    moetier.load(directory)[0].tiers.close()


# what is broken is said in a line


def flip(name: str, position: int) -> Callable[[Path], object]:
    return lambda folder: flip_bit(folder / name, position)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda folder: (folder / TRUNK).unlink(), "is missing; it should have"),
        (lambda folder: os.truncate(folder / TRUNK, 0), "has 0 bytes"),
        (lambda folder: os.truncate(folder / TRUNK, 5000), r"has 5,000 bytes; [\d,]+ were written"),
        (lambda folder: (folder / INDEX).unlink(), "is missing"),
        (lambda folder: (folder / INDEX).write_text("{"), "is not JSON"),
        (
            lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": 1}}'),
            "weight_map.a is 1, not the name of a trunk file",
        ),
        (flip(TRUNK, 3), "a header of"),  # the length of its header
        (flip(TRUNK, 9), "The header of .* is not JSON"),  # the header
        (lambda folder: edit(folder / "config.json", lambda c: c.update(hidden_size="wide")), "can't be loaded"),
        (
            lambda folder: edit(folder / "config.json", lambda c: c.update(eos_token_id="x")),
            r"/config\.json: eos_token_id is 'x', not the id of a token\.",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer of .* can't be loaded"),
        (
            lambda folder: (folder / "generation_config.json").write_text("[]"),
            r"generation_config\.json is not a JSON object",
        ),
        (
            lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": [1, "x"]}'),
            r"generation_config\.json: eos_token_id is \[1, 'x'\], not the id of a token\.",
        ),
        (
            lambda folder: (folder / "generation_config.json").write_text('{"pad_token_id": [0]}'),
            r"generation_config\.json: pad_token_id is \[0\], not the id of a token\.",
        ),
        (
            lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0"}'),
            "tokenizer of .* can't be loaded",
        ),
    ],
)
def test_a_broken_file(
    directory: Path, fault: Callable[[Path], object], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fault(directory)
    with pytest.raises(StoreFormatError, match=words) as caught:
        moetier.load(directory)
    assert "\n" not in caught.value.cause
    assert main(["generate", str(directory), "hello", "--max-new-tokens", "1"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("moetier: ")]) == 1
    assert not any("Traceback" in line for line in lines)


def test_a_generation_config_may_have_several_ends_and_no_temperature(directory: Path) -> None:
    (directory / "generation_config.json").write_text(
        '{"bos_token_id": [], "eos_token_id": [0, 2], "temperature": null}'
    )
    model, _ = moetier.load(directory, daemon=None)
    with model.tiers:
        assert (model.generation_config.eos_token_id, model.generation_config.temperature) == ([0, 2], None)


def test_a_generation_config_that_is_not_json_is_ignored(directory: Path) -> None:
    (directory / "generation_config.json").write_text("{")
    model, _ = moetier.load(directory, daemon=None)
    with model.tiers:
        assert model.generation_config.max_new_tokens is None


@pytest.mark.parametrize("levels", [600, 100_000])  # json itself refuses only the latter
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX]
)
def test_values_that_are_nested_too_deeply(
    directory: Path, name: str, levels: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / name).write_text('{"a":' * levels + "0" + "}" * levels)
    assert main(["generate", str(directory), "hello", "--max-new-tokens", "1"]) == 1
    said = capsys.readouterr().err
    assert f"{directory / name} has values that are nested in more than 100 levels." in said
    assert "bug" not in said


def test_an_integer_of_thousands_of_digits(directory: Path) -> None:
    (directory / "generation_config.json").write_text('{"a": ' + "1" * 5000 + "}")
    with pytest.raises(StoreFormatError, match=r"generation_config\.json can't be read: Exceeds the limit"):
        moetier.load(directory, daemon=None)
