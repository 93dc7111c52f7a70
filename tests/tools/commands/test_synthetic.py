"""Checkpoints of a large model's geometry."""

from __future__ import annotations

import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import tree

import moetier
from moetier.tiers.errors import DiskSpaceError, IncompleteStoreError, TargetExistsError
from moetier.tiers.store.atomic import PARTIAL
from moetier.tiers.store.folder import GROUP, read_manifest
from moetier.tiers.store.reader import ShardStore
from moetier.tiers.store.writer import ShardWriter
from moetier.tools.convert.api import convert
from moetier.tools.main import main
from moetier.tools.synthetic.checkpoint import GEOMETRIES, WHOLE, config_of, read_tokens, shapes_of
from moetier.tools.synthetic.tensors import make_synthetic

SMALL: dict[str, dict[str, Any]] = {
    "mixtral-4L": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3-8L": {
        "hidden_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "num_experts": 16,
    },
    "fine-4L": {
        "hidden_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "num_experts": 16,
    },
    "qwen3-30b-a3b": {
        "hidden_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "num_experts": 16,
    },
    "gpt-oss-20b": {
        "hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "num_local_experts": 16,
    },
}  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, changes in SMALL.items():
        monkeypatch.setitem(GEOMETRIES, name, GEOMETRIES[name] | changes)


@pytest.mark.parametrize(
    "geometry",  # the slow ones are of the architecture of qwen3-8L
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in ("fine-4L", "qwen3-30b-a3b")))
        for name in sorted(GEOMETRIES)
    ],
)
@pytest.mark.usefixtures("small")
def test_transformers_loads_it_whole(geometry: str, tmp_path: Path) -> None:
    size = make_synthetic(tmp_path / "src", geometry=geometry, blocks=2)
    assert size == sum(path.stat().st_size for path in (tmp_path / "src").glob("*.safetensors"))
    architecture = json.loads((tmp_path / "src" / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, architecture).from_pretrained(tmp_path / "src", output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    experts = model.model.layers[1].mlp.experts
    assert abs(float(experts.gate_up_proj.detach().float().std()) - 64**-0.5) < 5e-3
    for one in range(experts.num_experts):
        for other in range(one):
            assert not torch.equal(experts.down_proj[one], experts.down_proj[other])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "src")
    assert max(tokenizer("To be, or not to be").input_ids) < model.config.vocab_size
    assert len(convert(tmp_path / "src", tmp_path / "dst").blocks) == 2


@pytest.mark.usefixtures("small")
def test_the_seed_decides(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_synthetic(tmp_path / name, blocks=1, seed=seed)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert tree(tmp_path / "a") != tree(tmp_path / "c")


def test_the_geometries_are_what_they_say() -> None:
    """Two of them have the published numbers of parameters."""
    sizes = {
        "mixtral-4L": 5.84e9,
        "qwen3-8L": 5.0e9,
        "fine-4L": 6.55e9,
        "qwen3-30b-a3b": 30.53e9,
        "gpt-oss-20b": 20.91e9,
    }
    for name, expected in sizes.items():
        weights = sum(torch.Size(shape).numel() for shape in shapes_of(config_of(name)).values())
        assert abs(weights / expected - 1) < 0.02, weights


def test_sizes_take_the_place_of_a_geometrys(tmp_path: Path) -> None:
    make_synthetic(tmp_path / "src", blocks=1, sizes=SMALL["mixtral-4L"] | {"num_local_experts": 4})
    config = json.loads((tmp_path / "src" / "config.json").read_text())
    assert (config["hidden_size"], config["num_local_experts"], config["num_experts_per_tok"]) == (64, 4, 2)
    model, info = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "src", output_loading_info=True)
    assert not any(info.values()), info
    assert model.model.layers[0].mlp.experts.num_experts == 4


def test_it_writes_nowhere_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TargetExistsError):
        make_synthetic(tmp_path)
    with pytest.raises(DiskSpaceError, match="needs"):
        make_synthetic(tmp_path / "dst", blocks=1000)
    assert main(["synthetic", str(tmp_path)]) == 1
    assert "not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("geometry", [WHOLE[0], pytest.param(WHOLE[1], marks=pytest.mark.slow)])
@pytest.mark.usefixtures("small")
def test_a_whole_model_is_made_without_a_checkpoint(
    geometry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The store equals the one that ``convert`` makes of the same checkpoint, also if it was resumed."""
    make_synthetic(tmp_path / "src", geometry=geometry, blocks=3, seed=5)
    convert(tmp_path / "src", tmp_path / "converted", bits=4, trunk_bits=4, fast=True)
    words = ["synthetic", str(tmp_path / "dst"), "--geometry", geometry, "--blocks", "3", "--seed", "5"]
    write, written = ShardWriter.write, 0

    def cut(shard: ShardWriter, payload: Any) -> None:
        nonlocal written
        written += 1
        if written == 40:
            os.kill(os.getpid(), signal.SIGINT)
        write(shard, payload)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", cut)
        assert main(words) == 130
    assert "resumes where it stopped" in capsys.readouterr().err
    assert not [path for path in tree(tmp_path / "dst") if path.endswith(PARTIAL)]
    with pytest.raises(IncompleteStoreError) as caught:
        ShardStore.open(tmp_path / "dst")
    resume = shlex.split(caught.value.fix.partition(": ")[2])
    assert main(resume[1:]) == 0
    assert "resumed: 2 of 3 blocks" in capsys.readouterr().err
    made, wanted = (read_manifest(tmp_path / name / GROUP) for name in ("dst", "converted"))
    assert (made.digest, made.trunk) == (wanted.digest, wanted.trunk)
    assert main(["verify", str(tmp_path / "dst")]) == 0
    model, _ = moetier.load(tmp_path / "dst", daemon=None)
    with model.tiers, torch.inference_mode():
        assert torch.isfinite(model(torch.tensor([read_tokens(tmp_path / "dst")[:64]])).logits).all()
    assert main(words) == 0
    assert "is complete" in capsys.readouterr().out


def test_a_whole_model_has_no_store_beside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["synthetic", str(tmp_path / "dst"), "--geometry", WHOLE[0], "--store", str(tmp_path / "store")]
    assert main(words) == 2
    assert "Leave out --store." in capsys.readouterr().err
