"""FP8 and MXFP4 checkpoints are read as what transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from checkpoints import edit_json, ordinary_model, save_checkpoint, stored_experts, trunk_tensors
from quantised_checkpoints import BLOCK, FP8, quantise_fp8, quantise_mxfp4, quantised, to_fp8
from safetensors.torch import load_file, save_file
from torch import Tensor

from moetier.runtime.formats import scaled as dequantize
from moetier.runtime.formats.registry import format_of
from moetier.runtime.formats.scaled import ScaledTensor
from moetier.runtime.formats.tensors import SourceTensor, read_tensors
from moetier.runtime.moe.experts import experts_modules
from moetier.testing import FormatTests
from moetier.tiers.errors import CheckpointError, UnsupportedModelError
from moetier.tiers.quant.codings import E2M1
from moetier.tools.convert.api import convert


def from_fp8(weight: Tensor, scale: Tensor, rows: int = BLOCK, columns: int = BLOCK) -> Tensor:
    """Multiply in fp32, and round to bf16."""
    scales = scale.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return (weight.float() * scales[: weight.shape[0], : weight.shape[1]]).bfloat16()


def sources(path: Path) -> dict[str, SourceTensor]:
    return format_of(read_tensors(path), FP8, {}).sources("bfloat16")


class TestFp8(FormatTests):
    quantization: ClassVar = FP8
    is_used_as_it_is = True
    needed = ("weight_scale_inv",)

    def quantise(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scale = to_fp8(weight)
        return {"weight_scale_inv": scale, "weight": codes}, from_fp8(codes, scale)


class TestInt4(FormatTests):
    """The format "pack-quantized" of compressed-tensors."""

    quantization: ClassVar = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}},
    }
    is_used_as_it_is = True
    needed = ("weight_scale",)

    def quantise(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        groups = weight.float().unflatten(1, (-1, 32))
        scales = (groups.abs().amax(2).clamp_min(2**-100) / 7).bfloat16()
        codes = (groups / scales.float()[:, :, None]).round().clamp(-8, 7)
        words = (codes.flatten(1).long() + 8).unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)
        packed = words.sum(2).to(torch.int32)
        stored = {"weight_packed": packed, "weight_scale": scales, "weight_shape": torch.tensor(weight.shape)}
        return stored, (codes * scales.float()[:, :, None]).flatten(1).to(weight.dtype)


@pytest.fixture
def deepseek(tmp_path: Path) -> Path:
    """FP8 in blocks; every extent is a multiple of the block: transformers can't read others."""
    folder = save_checkpoint(tmp_path / "src", "deepseek_v3", shards=1)
    quantise_fp8(folder)
    return folder


def same_experts(folder: Path, source: Path) -> None:
    """A model directory of 16 bits holds what transformers loads."""
    modules = experts_modules(ordinary_model(source))
    stored = stored_experts(folder)
    assert len(stored) == sum(module.num_experts for module in modules.values())
    for (path, expert), parameters in stored.items():
        for name, tensor in parameters.items():
            assert torch.equal(tensor, getattr(modules[path], name)[expert]), (path, expert, name)


def test_an_fp8_checkpoint_is_what_transformers_loads(deepseek: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    convert(deepseek, dst, bits=16)
    same_experts(dst, deepseek)
    trunk = trunk_tensors(dst)
    ordinary = dict(ordinary_model(deepseek).named_parameters())
    touched = [name for name in trunk if quantised(name)]
    assert len(touched) > 10
    for name in touched:
        assert trunk[name].dtype == torch.bfloat16
        assert torch.equal(trunk[name], ordinary[name]), name
    assert not [name for name in trunk if "scale" in name]
    config = json.loads((dst / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "moetier", "format": 1, "bits": 16}


@pytest.mark.parametrize("scale_name", ["{}_scale_inv", "{stem}.scale", "{stem}.qscale_weight"])
def test_the_names_of_scales(tmp_path: Path, scale_name: str) -> None:
    codes, scale = to_fp8(torch.randn(32, 48))
    name = scale_name.format("a.weight", stem="a")
    tensors = {"a.weight": codes, name: scale, "a.activation_scale": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = sources(tmp_path / "x.safetensors")
    assert list(found) == ["a.weight"]
    assert torch.equal(found["a.weight"].read(), from_fp8(codes, scale))


@pytest.mark.parametrize(("rows", "columns"), [(64, 48), (40, 48), (64, 40), (9, 7), (100, 33)])
def test_blocks_at_the_edges_and_rows_read_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, columns: int
) -> None:
    """DeepSeek-V3's own kv_a_proj_with_mqa has 576 rows in blocks of 128."""
    monkeypatch.setattr(dequantize, "TILE_WEIGHTS", columns * BLOCK)  # one row of blocks at a time
    codes, scale = to_fp8(torch.randn(rows, columns))
    save_file({"a.weight": codes, "a.weight_scale_inv": scale}, tmp_path / "x.safetensors")
    tensor = sources(tmp_path / "x.safetensors")["a.weight"]
    expected = from_fp8(codes, scale)
    assert torch.equal(tensor.read(), expected)
    for first in range(rows):
        count = min(BLOCK + 3, rows - first)
        assert torch.equal(tensor.read(first, count), expected[first : first + count]), first


def test_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    codes, scale = to_fp8(torch.randn(64, 48))
    save_file({"a.weight": codes, "a.weight_scale_inv": scale[:3].clone()}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.weight_scale_inv of .* has shape .* does not fit a\.weight"):
        sources(tmp_path / "x.safetensors")


def test_one_scale_for_a_tensor(tmp_path: Path) -> None:
    codes = torch.randn(8, 8).to(torch.float8_e4m3fn)
    save_file({"a.weight": codes, "a.weight_scale_inv": torch.tensor(0.5)}, tmp_path / "x.safetensors")
    tensor = sources(tmp_path / "x.safetensors")["a.weight"]
    assert torch.equal(tensor.read(), (codes.float() * 0.5).bfloat16())


def test_experts_that_are_stacked_are_read_one_by_one(tmp_path: Path) -> None:
    pairs = [to_fp8(torch.randn(32, 48)) for _ in range(3)]
    codes, scales = (torch.stack(list(parts)) for parts in zip(*pairs, strict=True))
    save_file({"e.gate_up_proj": codes, "e.gate_up_proj_scale_inv": scales}, tmp_path / "x.safetensors")
    tensor = sources(tmp_path / "x.safetensors")["e.gate_up_proj"]
    expected = torch.stack([from_fp8(*pair) for pair in pairs])
    assert torch.equal(tensor.read(), expected)
    assert torch.equal(tensor.read(2, 1), expected[2:])


@pytest.mark.parametrize("exponents", [torch.uint8, torch.float8_e8m0fnu])
def test_fp4_with_exponents_as_scales(tmp_path: Path, exponents: torch.dtype) -> None:
    """DeepSeek-V4's experts: two values a byte, a power of two for each 32 of a row."""
    random = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (6, 32), dtype=torch.uint8, generator=random)
    exponent = torch.randint(120, 132, (6, 2), dtype=torch.uint8, generator=random)
    tensors = {"a.weight": packed.view(torch.int8), "a.scale": exponent.view(exponents)}
    save_file(tensors, tmp_path / "x.safetensors")
    tensor = sources(tmp_path / "x.safetensors")["a.weight"]
    expected = torch.empty(6, 64)
    for i in range(6):
        for j in range(64):
            code = int(packed[i, j // 2]) >> 4 * (j % 2) & 0xF
            expected[i, j] = E2M1[code] * 2.0 ** (int(exponent[i, j // 32]) - 127)
    assert tensor.shape == (6, 64)
    assert torch.equal(tensor.read(), expected.bfloat16())


def test_an_mxfp4_checkpoint_is_what_transformers_loads(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "src", "gpt_oss", shards=1)
    quantise_mxfp4(source)
    convert(source, tmp_path / "dst", bits=16)
    same_experts(tmp_path / "dst", source)
    assert trunk_tensors(tmp_path / "dst").keys() == {
        n for n in load_file(source / "model.safetensors") if "experts" not in n
    }


@pytest.mark.parametrize("model_type", ["mixtral", "gemma4"])
def test_other_methods_are_refused(tmp_path: Path, model_type: str) -> None:
    source, found = save_checkpoint(tmp_path / "src", model_type, shards=1), {"quant_method": "aqlm"}
    if model_type == "gemma4":  # where a part of the model says it
        config = json.loads((source / "config.json").read_text())
        edit_json(source / "config.json", text_config=config["text_config"] | {"quantization_config": found})
    else:
        edit_json(source / "config.json", quantization_config=found)
    with pytest.raises(UnsupportedModelError, match="quantised with aqlm"):
        convert(source, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_a_large_matrix_is_dequantised_in_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in fp32 at a time does not grow with the matrix."""
    made: list[int] = []
    real = dequantize.decode_rows

    def counted(*arguments: Any) -> Tensor:
        found = real(*arguments)
        made.append(found.numel())
        return found

    monkeypatch.setattr(dequantize, "decode_rows", counted)
    monkeypatch.setattr(dequantize, "TILE_WEIGHTS", 4096)
    codes, scale = to_fp8(torch.randn(512, 64))
    save_file({"a.weight": codes, "a.weight_scale_inv": scale}, tmp_path / "x.safetensors")
    tensor = sources(tmp_path / "x.safetensors")["a.weight"]
    assert isinstance(tensor, ScaledTensor)
    tensor.read()
    assert sum(made) == 512 * 64
    assert max(made) <= 4096


SCHEME = TestInt4.quantization["config_groups"]["group_0"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"format": "marlin-24"}, "the format marlin-24"),
        ({"weights": {"num_bits": 8, "type": "int"}}, "weights of 8 bits of type int"),
        ({"weights": {"num_bits": 2, "type": "int"}}, "weights of 2 bits of type int"),
        ({"weights": {"num_bits": 4, "type": "int", "symmetric": False}}, "weights with zero points"),
    ],
)
def test_other_schemes_of_compressed_tensors_are_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    save_file({"a.weight_packed": torch.zeros(8, 4, dtype=torch.int32)}, tmp_path / "x.safetensors")
    quantization = TestInt4.quantization | {"config_groups": {"group_0": SCHEME | changed}}
    with pytest.raises(UnsupportedModelError, match=f"with compressed-tensors, in {said}, which moetier can't read"):
        format_of(read_tensors(tmp_path / "x.safetensors"), quantization, {}).sources("bfloat16")


@pytest.mark.parametrize("name", ["weight_zero_point", "weight_g_idx"])
def test_zero_points_of_compressed_tensors_are_refused(tmp_path: Path, name: str) -> None:
    stored, _ = TestInt4().quantise(torch.randn(8, 32))
    tensors = {f"a.{part}": tensor for part, tensor in stored.items()} | {f"a.{name}": torch.zeros(8, 1)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UnsupportedModelError, match="weights with zero points or an order of groups"):
        format_of(read_tensors(tmp_path / "x.safetensors"), TestInt4.quantization, {}).sources("bfloat16")
