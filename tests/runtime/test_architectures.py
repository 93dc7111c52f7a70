"""Every architecture that has transformers' experts interface gives bitwise the same logits as with eager experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architecture_table import TABLE, listed
from architectures import FEW_REQUIRED, FURTHER, REQUIRED, SINCE_5_24, TINY, VARIED, model_types
from comparison import apart, compare, convert_tiny, farthest

import moetier
from moetier.tiers.errors import UnsupportedModelError
from moetier.tiers.layout import Bits

FP32, BF16 = torch.float32, torch.bfloat16


def test_no_type_is_skipped() -> None:
    """A type that transformers adds fails here until it is run."""
    assert len(REQUIRED) + len(FURTHER) == len(REQUIRED | FURTHER)
    assert set(model_types()) == REQUIRED | FURTHER


def test_the_table_in_the_documentation_has_them_all() -> None:
    """Made by: python tests/helpers/architecture_table.py."""
    assert listed(TABLE.read_text()) == dict.fromkeys(REQUIRED | FURTHER | SINCE_5_24, ("equal", "equal"))


@pytest.mark.parametrize("model_type", sorted(REQUIRED))
def test_required(model_type: str, tmp_path: Path) -> None:
    assert compare(model_type, BF16, tmp_path).differing == ()


@pytest.mark.parametrize("model_type", FEW_REQUIRED)
def test_required_in_fp32(model_type: str, tmp_path: Path) -> None:
    assert compare(model_type, FP32, tmp_path).differing == ()


@pytest.mark.parametrize("model_type", FEW_REQUIRED)
def test_required_without_a_conversion(model_type: str, tmp_path: Path) -> None:
    assert compare(model_type, BF16, tmp_path, converts=False).differing == ()


REARRANGED = {"ernie4_5_vl_moe", "inkling", "inkling2", "inkling2_loop", "qwen3_vl_moe"}  # on loading


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(FURTHER))
def test_further_without_a_conversion(model_type: str, tmp_path: Path) -> None:
    if model_type in REARRANGED:
        with pytest.raises(UnsupportedModelError, match="can't be used as they are"):
            compare(model_type, BF16, tmp_path, converts=False)
    else:
        assert compare(model_type, BF16, tmp_path, converts=False).differing == ()


@pytest.mark.parametrize("model_type", FEW_REQUIRED)
def test_required_with_records_where_they_lie(model_type: str, tmp_path: Path) -> None:
    assert 0 < farthest(model_type, BF16, tmp_path) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(FURTHER))
def test_further_with_records_where_they_lie(model_type: str, tmp_path: Path) -> None:
    assert 0 < farthest(model_type, BF16, tmp_path) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(FURTHER))
def test_further(model_type: str, tmp_path: Path) -> None:
    assert compare(model_type, BF16, tmp_path).differing == ()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(FURTHER))
def test_further_in_fp32(model_type: str, tmp_path: Path) -> None:
    assert compare(model_type, FP32, tmp_path).differing == ()


@pytest.fixture
def divisible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that groups divide, as those of real models are, so that as many matrices are quantised."""
    for name in ("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"):
        monkeypatch.setitem(TINY, name, 64)
    for name in ("q_lora_rank", "kv_lora_rank", "o_lora_rank"):
        monkeypatch.setitem(TINY, name, 32)


GATED = {"bailing_hybrid", "granitemoehybrid"}  # their norms take a gate, too


@pytest.mark.usefixtures("divisible")
@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(each, marks=[pytest.mark.slow] * (each not in VARIED | GATED))
        for each in sorted(REQUIRED | FURTHER)
    ],
)
def test_as_it_is_loaded_at_4_bits(model_type: str, tmp_path: Path) -> None:
    """With norms, attention, keys and matrices of the trunk as they are computed where records are multiplied.

    The farthest of all types is granitemoe: 0.090. Of its bf16 logits, transformers' own are .06 from those of fp32.
    """
    assert all(0 < far < 0.1 for far in apart(model_type, BF16, tmp_path))


@pytest.mark.usefixtures("divisible")
@pytest.mark.parametrize("model_type", FEW_REQUIRED)
def test_required_with_a_quantised_trunk(model_type: str, tmp_path: Path) -> None:
    assert compare(model_type, BF16, tmp_path, trunk_bits=4).differing == ()


@pytest.mark.slow
@pytest.mark.usefixtures("divisible")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model_type", sorted(REQUIRED | FURTHER))
def test_every_quantised_trunk(model_type: str, dtype: torch.dtype, bits: Bits, tmp_path: Path) -> None:
    assert compare(model_type, dtype, tmp_path, trunk_bits=bits).differing == ()


def test_two_experts_modules_in_a_layer_are_keyed_apart(tmp_path: Path) -> None:
    """ernie4_5_vl_moe sends tokens of images to other experts, of another size, than those of text."""
    ordinary, converted = convert_tiny("ernie4_5_vl_moe", FP32, tmp_path)
    tiered, _ = moetier.load(converted)
    ids = torch.randint(2, 250, (1, 12), generator=torch.Generator().manual_seed(0))
    images = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1, 0, 1, 1, 0]])
    with tiered.tiers, torch.no_grad():
        of_text, mixed = (
            [model(input_ids=ids, moe_mm_token_type_ids=kinds).logits for model in (ordinary, tiered)]
            for kinds in (torch.zeros_like(images), images)
        )
        paths = [block.path.rpartition("layers.")[2] for block in tiered.tiers.manifest.blocks]
    assert paths == [f"{layer}.mlp.{kind}_moe.experts" for layer in (1, 2) for kind in ("text", "vision")]
    assert torch.equal(*of_text)
    assert torch.equal(*mixed)
    assert not torch.equal(of_text[0], mixed[0])
