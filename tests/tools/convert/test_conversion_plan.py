"""Which of the trunk's matrices are quantised, and the records that become of them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import TINY, tiny_model
from checkpoints import edit_tensors, save_checkpoint, trunk_tensors

from moetier.runtime.checkpoint.safetensors_folder import open_safetensors
from moetier.runtime.machine.memory import Available
from moetier.runtime.moe.linear import WEIGHT, matrix_layout
from moetier.tiers.errors import CheckpointError, ConfigError
from moetier.tiers.layout import Bits
from moetier.tiers.quant.codec import encode
from moetier.tools.convert import encoder, trunk_writer
from moetier.tools.convert.api import convert
from moetier.tools.convert.conversion import Conversion
from moetier.tools.convert.conversion_plan import choose_matrices, trunk_records_of
from moetier.tools.convert.options import Options

BF16 = torch.bfloat16


def matrices_of(folder: Path, bits: Bits = 4) -> set[str]:
    """Module paths of the matrices that become records."""
    planned = Conversion.plan(open_safetensors(folder), folder.parent / "dst", Options(trunk_bits=bits))
    return set(planned.planned.blueprint.matrices)


def saved(folder: Path, model_type: str, **changes: object) -> Path:
    tiny_model(model_type, BF16, **changes).save_pretrained(folder / model_type)
    return folder / model_type


@pytest.mark.parametrize("bits", [8, 4])
def test_of_an_ordinary_model_all_but_the_gates(tmp_path: Path, bits: Bits) -> None:
    """A gate of mixtral is no linear module, and one of afmoe holds one."""
    found = matrices_of(saved(tmp_path, "mixtral", num_key_value_heads=4), bits)
    attention = {f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(3) for name in "qkvo"}
    assert found == attention | {"lm_head"}
    found = matrices_of(saved(tmp_path, "afmoe"), bits)
    assert found
    assert not found & {f"model.layers.{layer}.mlp.router.gate" for layer in (1, 2)}


@pytest.mark.parametrize(
    ("model_type", "path"),
    [
        ("qwen2_moe", "model.layers.0.mlp.shared_expert_gate"),  # one row: it would not get smaller
        ("jamba", "model.layers.0.mamba.dt_proj"),  # which the architecture reads itself
        ("granitemoehybrid", "model.layers.0.mamba.out_proj"),  # likewise
        ("gemma4", "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear"),  # a part without experts
        ("gemma4", "model.language_model.layers.0.router.proj"),  # a gate
        ("zaya", "model.layers.0.mlp.gate.down_proj"),  # a gate
        ("deepseek_v3", "model.layers.0.self_attn.q_b_proj"),  # 24 columns: it would not get smaller
        ("lara_mini", "model.layers.0.linear_attn.in_proj_qkv"),  # which the checkpoint fuses with some too small
    ],
)
def test_what_stays(tmp_path: Path, model_type: str, path: str) -> None:
    source = saved(tmp_path, model_type)
    assert path in dict(tiny_model(model_type, BF16).named_modules())
    found = matrices_of(source)
    assert found
    assert path not in found


def test_what_is_kept_in_fp32_stays() -> None:
    """As an architecture says by the names of its modules."""
    model = tiny_model("mixtral", BF16)
    model._keep_in_fp32_modules_strict = {"o_proj"}
    trunk_records = trunk_records_of(4)
    assert trunk_records
    found = choose_matrices(model, BF16, trunk_records)
    assert found
    assert not any("o_proj" in path for path in found)


def test_what_two_modules_share_stays() -> None:
    model = tiny_model("mixtral", BF16)
    first, second = (f"model.layers.{i}.self_attn.o_proj" for i in range(2))
    model.all_tied_weights_keys = {f"{first}.weight": f"{second}.weight"}
    trunk_records = trunk_records_of(4)
    assert trunk_records
    found = choose_matrices(model, BF16, trunk_records)
    assert found
    assert not found.keys() & {first, second}


def test_what_a_checkpoint_fuses_is_quantised_as_the_module_has_it(tmp_path: Path) -> None:
    """lara_mini's checkpoints hold four of its matrices as one."""
    source = saved(tmp_path, "lara_mini", linear_num_value_heads=64, linear_num_key_heads=64)
    found = matrices_of(source)
    assert "model.layers.0.linear_attn.in_proj_a" in found
    convert(source, tmp_path / "dst", bits=16, trunk_bits=4)
    (fused,) = (name for name in open_safetensors(source).tensors if name.endswith("0.linear_attn.in_proj.weight"))
    stored = trunk_tensors(tmp_path / "dst")
    assert fused not in stored
    ordinary = tiny_model("lara_mini", BF16, linear_num_value_heads=64, linear_num_key_heads=64)
    for name in ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b"):
        path = f"model.layers.0.linear_attn.{name}"
        assert torch.equal(stored[f"{path}.record"], record_of(ordinary.get_submodule(path).weight))


def record_of(weights: torch.Tensor, bits: Bits = 4) -> torch.Tensor:
    """Made in one piece."""
    trunk_records = trunk_records_of(bits)
    assert trunk_records
    layout = matrix_layout(*weights.shape, trunk_records)
    out = np.empty(layout.record_bytes, np.uint8)
    encode({WEIGHT: weights}, layout, out)
    return torch.from_numpy(out)[: layout.payload_bytes]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("workers", [1, 3])
def test_pieces_make_the_record_of_the_whole(
    tmp_path: Path, bits: Bits, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever their number; and their errors add up to its error."""
    monkeypatch.setattr(trunk_writer, "PIECE_WEIGHTS", 64 * 64)
    monkeypatch.setitem(TINY, "vocab_size", 300)  # no multiple of 64
    source = saved(tmp_path, "mixtral", num_key_value_heads=4)
    report = convert(source, tmp_path / "dst", bits=16, trunk_bits=bits, workers=workers)
    stored = trunk_tensors(tmp_path / "dst")
    model = tiny_model("mixtral", BF16, num_key_value_heads=4)
    assert len(model.lm_head.weight) == 300
    for path in ("lm_head", "model.layers.2.self_attn.k_proj"):
        assert torch.equal(stored[f"{path}.record"], record_of(model.get_submodule(path).weight, bits)), path
        assert f"{path}.weight" not in stored
    assert report.trunk_error
    assert (0.05 < report.trunk_error < 0.12) if bits == 4 else (0 < report.trunk_error < 0.01)


def test_where_memory_is_short_fewer_work_on_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_safetensors(saved(tmp_path, "mixtral", num_key_value_heads=4))
    options = Options(bits=4, trunk_bits=4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))

    def peaks(options: Options) -> tuple[int, list[int]]:
        plan = Conversion.plan(source, tmp_path / "dst", options)
        return plan.encoder.workers, [record.peak_bytes for record in plan.matrices]

    workers, many = peaks(options)
    assert workers == 8
    monkeypatch.setattr(encoder, "available_memory", lambda: Available(1, "a test"))
    workers, one = peaks(options)
    assert workers == 1
    assert one == peaks(replace(options, workers=1))[1]
    assert all(few < more for few, more in zip(one, many, strict=True))


def test_a_tied_head_has_a_record_beside_the_embedding(tmp_path: Path) -> None:
    source = saved(tmp_path, "mixtral", tie_word_embeddings=True)
    assert "lm_head.weight" not in open_safetensors(source).tensors
    convert(source, tmp_path / "dst", bits=16, trunk_bits=4)
    stored = trunk_tensors(tmp_path / "dst")
    embedding = tiny_model("mixtral", BF16, tie_word_embeddings=True).get_input_embeddings().weight
    assert torch.equal(stored["model.embed_tokens.weight"], embedding)
    assert torch.equal(stored["lm_head.record"], record_of(embedding))


def test_a_checkpoint_that_has_only_the_head_of_both_keeps_it(tmp_path: Path) -> None:
    """transformers makes the embedding of it."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    source = saved(tmp_path, "mixtral", tie_word_embeddings=True)
    edit_tensors(source, edit)
    found = matrices_of(source)
    assert found
    assert "lm_head" not in found
    convert(source, tmp_path / "dst", bits=16, trunk_bits=4)
    assert "lm_head.weight" in trunk_tensors(tmp_path / "dst")


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "src", shards=1)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.v_proj.weight"][3, 5] = float("inf")

    edit_tensors(source, edit)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.v_proj\.weight has weights that"):
        convert(source, tmp_path / "dst", trunk_bits=4)


def test_widths_that_no_kernel_has() -> None:
    for bits in (3, 2, 5):
        with pytest.raises(ConfigError, match=f"`trunk_bits` is {bits}"):
            Options(trunk_bits=bits)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="nothing is quantised"):
        Options(bits=16, fast=True)
    Options(bits=16, trunk_bits=4, fast=True)
