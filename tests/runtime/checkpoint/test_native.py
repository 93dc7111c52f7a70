"""Quantised checkpoints that are used as they are: results are those of their own decoders and transformers."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_tensors, ordinary_model, stored_experts, tree
from comparison import smallest_ram
from native_checkpoints import FORMS, save_native
from stores import read_records

import moetier
from moetier.runtime.moe.experts import experts_modules
from moetier.runtime.stores.registry import open_store, read_manifest
from moetier.tiers.extents.table import NAME
from moetier.tiers.quant.codec import decode
from moetier.tools.convert.api import convert
from moetier.tools.main import main

CODINGS = {
    "gpt-oss": ("e2m1", "e8m0", 32, 1, 1),
    "deepseek-v4": ("e2m1", "e8m0", 32, 1, 1),
    "kimi-k2.5": ("int4", "bfloat16", 32, 1, 1),
    "fp8-block": ("e4m3", "float32", 32, 16, 1),
    "fp8-channel": ("e4m3", "bfloat16", 64, 1, 1),
    "mxfp8": ("e4m3", "e8m0", 32, 1, 1),
    "mxfp4": ("e2m1", "e8m0", 32, 1, 1),
    "nvfp4": ("e2m1", "e4m3", 16, 1, 2),
    "nvfp4-modelopt": ("e2m1", "e4m3", 16, 1, 2),
}
# forms whose records are like those of another
QUICKLY = pytest.mark.parametrize(
    "made",
    [pytest.param(form, marks=[pytest.mark.slow] * (form in ("mxfp4", "nvfp4-modelopt"))) for form in sorted(FORMS)],
    indirect=True,
)
IDS = torch.randint(2, 250, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=sorted(FORMS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A checkpoint, and the one with decoded weights. Tests must not change them."""
    return (request.param, *save_native(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="module")
def ordinary(made: tuple[str, Path, Path]) -> Any:
    """The model of transformers with the decoded weights."""
    return ordinary_model(made[2])


def digest(folder: Path) -> str:
    return hashlib.sha256(repr(sorted(tree(folder).items())).encode()).hexdigest()


def logits(folder: Path, **options: Any) -> torch.Tensor:
    model, _ = moetier.load(folder, exact=True, **options)
    with model.tiers, torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def test_records_decode_as_the_formats_own_decoder_does(made: tuple[str, Path, Path], ordinary: Any) -> None:
    form, native, _ = made
    modules = experts_modules(ordinary)
    with open_store(native) as store:
        first = store.manifest.layout(0).projections[0]
        assert (first.coding, first.scales, first.group, first.block_rows, first.parts) == CODINGS[form]
        for key, data in read_records(store).items():
            layout, path = store.layout(key.block), store.manifest.blocks[key.block].path
            record = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            for p in layout.projections:
                out = torch.empty(p.shape, dtype=torch.bfloat16)
                assert torch.equal(decode(record, layout, p.name, out), getattr(modules[path], p.name)[key.expert])


def test_logits_are_those_of_transformers_with_decoded_weights(made: tuple[str, Path, Path], ordinary: Any) -> None:
    """At the smallest budget, and linked. Nothing of the checkpoint changes, and nothing is written beside it."""
    _, native, _ = made
    before = digest(native)
    with torch.no_grad():
        expected = ordinary(input_ids=IDS).logits
    assert torch.equal(logits(native, ram=smallest_ram(native)), expected)
    assert digest(native) == before
    assert main(["link", str(native)]) == 0
    assert main(["verify", str(native)]) == 0
    assert torch.equal(logits(native), expected)
    (native / NAME).unlink()
    assert digest(native) == before


@QUICKLY
def test_quick_products_are_near(made: tuple[str, Path, Path], ordinary: Any) -> None:
    _, native, _ = made
    model, _ = moetier.load(native)
    with model.tiers, torch.no_grad():
        quick = model(input_ids=IDS).logits
        exact = ordinary(input_ids=IDS).logits
    assert (quick - exact).norm() / exact.norm() < 0.1


@QUICKLY
def test_a_conversion_keeps_the_coding_or_decodes_it(
    made: tuple[str, Path, Path], ordinary: Any, tmp_path: Path
) -> None:
    _, native, _ = made
    convert(native, tmp_path / "kept", bits="native")
    with open_store(native) as extents, open_store(tmp_path / "kept") as store:
        assert store.manifest.layouts == extents.manifest.layouts
        assert read_records(store) == read_records(extents)
    with torch.no_grad():
        expected = ordinary(input_ids=IDS).logits
    assert torch.equal(logits(tmp_path / "kept"), expected)
    convert(native, tmp_path / "decoded", bits=16)
    modules = experts_modules(ordinary)
    for (path, expert), parameters in stored_experts(tmp_path / "decoded").items():
        for name, tensor in parameters.items():
            assert torch.equal(tensor, getattr(modules[path], name)[expert]), (path, expert, name)


@QUICKLY
def test_by_default_a_conversion_keeps_what_has_few_bits(
    made: tuple[str, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """FP8 is quantised to 4 bits, the other forms are kept. The output says so, and how to keep them."""
    form, native, _ = made
    assert main(["convert", str(native), str(tmp_path / "default")]) == 0
    said = capsys.readouterr().err
    with open_store(native) as extents, open_store(tmp_path / "default") as store:
        coding = CODINGS[form][0]
        assert (store.manifest.method == "native") is (coding != "e4m3")
        if coding == "e4m3":
            assert {p.bits for p in store.manifest.layout(0).projections} == {4}
            assert "as the checkpoint has them" not in said
            assert "--bits native keeps them as they are" in said
            return
        assert read_records(store) == read_records(extents)
    assert f"experts stay as the checkpoint has them: {'INT4' if coding == 'int4' else 'FP4'} in groups of" in said
    assert main(["convert", str(native), str(tmp_path / "4 bits"), "--bits", "4"]) == 0
    assert "--bits native keeps them as they are" in capsys.readouterr().err


def test_no_disk_is_used_for_experts(made: tuple[str, Path, Path]) -> None:
    _, native, _ = made
    manifest = read_manifest(native)
    assert manifest.bits in (4, 8)
    size = sum(path.stat().st_size for path in native.glob("*.safetensors"))
    assert sum(manifest.layout(n).payload_bytes * b.experts for n, b in enumerate(manifest.blocks)) < size


def test_layers_that_the_model_does_not_have_are_left_out_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as those that predict several tokens."""
    native, _ = save_native(tmp_path, "fp8-block")
    expected = logits(native)

    def more(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.2.")]:
            tensors[name.replace(".2.", ".7.", 1)] = tensors[name].clone()

    edit_tensors(native, more)
    with caplog.at_level(logging.WARNING, "moetier"):
        assert torch.equal(logits(native), expected)
    (line,) = [record.message for record in caplog.records if "does not use" in record.message]
    assert "model.layers.7." in line
