"""Tests that llama.cpp computes with an exported GGUF file what transformers computes with the checkpoint."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engines import llama_logits
from gguf_export import Kind, export_gguf

from moetier.tiers.errors import TargetExistsError, UnsupportedModelError
from moetier.tools.synthetic.checkpoint import GEOMETRIES, read_tokens
from moetier.tools.synthetic.tensors import make_synthetic

pytest.importorskip("gguf")

SMALL: dict[str, dict[str, Any]] = {  # Q4_0 has blocks of 32
    "mixtral-4L": {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3-8L": {
        "hidden_size": 128, "moe_intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "num_experts": 16, "num_experts_per_tok": 4,
    },
}  # fmt: skip


@pytest.fixture(params=sorted(SMALL))
def checkpoint(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setitem(GEOMETRIES, request.param, GEOMETRIES[request.param] | SMALL[request.param])
    make_synthetic(tmp_path / "src", geometry=request.param, blocks=2)
    return tmp_path / "src"


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize(("ggml_type", "within"), [("F32", 3e-3), ("F16", 1e-2), ("Q4_0", 0.4)])
def test_llama_cpp_says_what_transformers_says(
    checkpoint: Path, tmp_path: Path, ggml_type: Kind, within: float
) -> None:
    """Logits of deviation 1. llama.cpp keeps keys and values in 16 bits; four bits change more."""
    size = export_gguf(checkpoint, tmp_path / "model.gguf", ggml_type=ggml_type)
    assert (tmp_path / "model.gguf").stat().st_size == size
    ids = read_tokens(checkpoint)[:24]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, experts_implementation="eager"
    )
    with torch.inference_mode():
        wanted = model(torch.tensor([ids])).logits[0, -1]
    logits = torch.tensor(llama_logits(tmp_path / "model.gguf", ids))
    error = float((logits - wanted).norm() / wanted.norm())
    assert error < within, error


def test_it_takes_four_and_a_half_bits_a_weight(checkpoint: Path, tmp_path: Path) -> None:
    weights = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) / 2
    size = export_gguf(checkpoint, tmp_path / "model.gguf")
    assert 4.5 < 8 * size / weights < 4.7


def test_it_replaces_nothing_and_refuses_other_models(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "there.gguf").touch()
    with pytest.raises(TargetExistsError):
        export_gguf(checkpoint, tmp_path / "there.gguf")
    config = checkpoint / "config.json"
    config.write_text(config.read_text().replace("mixtral", "gpt_oss").replace("qwen3_moe", "gpt_oss"))
    with pytest.raises(UnsupportedModelError, match="is no mixtral or qwen3_moe"):
        export_gguf(checkpoint, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("model.gguf*"))


def test_a_tensor_that_it_lacks_or_does_not_know_is_reported(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    experts = "num_experts" if "num_experts" in config else "num_local_experts"
    for change, said in (({experts: config[experts] + 1}, "has no 'model.layers.0"), ({experts: 2}, "no name for")):
        (checkpoint / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UnsupportedModelError, match=said):
            export_gguf(checkpoint, tmp_path / "model.gguf")
