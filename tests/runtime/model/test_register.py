"""``register``: what from_pretrained of transformers makes of checkpoints that are not converted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model
from checkpoints import ordinary_model, save_checkpoint
from comparison import smallest_ram
from native_checkpoints import save_native
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import moetier

IDS = torch.tensor([[5, 17, 200, 31, 99, 4, 4, 120]])


@pytest.fixture
def register() -> Iterator[Callable[..., None]]:
    """``moetier.register``, whose options are gone after the test."""
    yield moetier.register
    moetier.register()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def slots(model: Any) -> int:
    found: int = model.tiers.snapshot()["host"]["slots"]
    return found


@pytest.mark.parametrize("loader", ["class", "auto"])
def test_a_checkpoint_gets_the_budget(tmp_path: Path, register: Callable[..., None], loader: str) -> None:
    folder = save_checkpoint(tmp_path / "src")
    expected = logits(ordinary_model(folder))
    register(ram=smallest_ram(folder), exact=True, daemon=None)
    if loader == "auto":
        model = AutoModelForCausalLM.from_pretrained(folder, rms_norm_eps=2e-5)
        assert model.config.rms_norm_eps == 2e-5  # what the caller changes stays
        model.tiers.close()
        model, found = AutoModelForCausalLM.from_pretrained(str(folder), output_loading_info=True)
        assert not any(found.values()), found
    else:
        model = type(tiny_model("mixtral", torch.bfloat16)).from_pretrained(folder)
    with model.tiers:
        assert slots(model) == 3  # of 24
        assert torch.equal(logits(model), expected)
        assert model.name_or_path == str(folder)


def test_a_quantised_checkpoint_gets_the_budget(tmp_path: Path, register: Callable[..., None]) -> None:
    native, decoded = save_native(tmp_path, "fp8-block")
    expected = logits(ordinary_model(decoded))
    register(ram=smallest_ram(native), exact=True, daemon=None)
    model: Any = AutoModelForCausalLM.from_pretrained(native, device_map="cpu")
    with model.tiers:
        assert torch.equal(logits(model), expected)
        assert slots(model) < 20


def test_a_gguf_file_gets_the_budget(tmp_path: Path, register: Callable[..., None]) -> None:
    pytest.importorskip("gguf")
    from gguf_files import mostly, tiny_weights, write_gguf

    file = write_gguf(tmp_path / "model.gguf", tiny_weights("qwen3moe"), mostly("Q4_K", "Q6_K"))
    register(ram=smallest_ram(file), daemon=None)
    loaded, _ = moetier.load(file, ram=smallest_ram(file), daemon=None)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=loaded.dtype)
    with model.tiers, loaded.tiers:
        assert torch.equal(logits(model), logits(loaded))
        assert slots(model) == slots(loaded)


def test_other_models_are_loaded_as_ever(tmp_path: Path, register: Callable[..., None]) -> None:
    """A dense one, one whose caller chose the experts' implementation, and any if no option is given."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=2, **sizes)).eval()
    dense.save_pretrained(tmp_path / "dense")
    folder = save_checkpoint(tmp_path / "src")
    register(ram="1GiB", daemon=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        chosen = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
        register()
        plain = AutoModel.from_pretrained(folder)
    assert torch.equal(logits(found), logits(dense))
    assert not [each for each in (found, chosen, plain) if hasattr(each, "tiers")]


def test_experts_that_cannot_be_used_as_they_are_are_named(tmp_path: Path, register: Callable[..., None]) -> None:
    folder = save_checkpoint(tmp_path / "src", dtype=torch.float32)
    register(ram="1GiB", daemon=None)
    with pytest.warns(RuntimeWarning, match=r"register\(ram='1GiB', daemon=None\) has no effect.* is in float32"):
        model = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(model, "tiers")
    assert torch.allclose(logits(model), logits(ordinary_model(folder)), atol=1e-4)


def test_a_model_of_the_hub_is_reported_to_be_elsewhere(register: Callable[..., None], tmp_path: Path) -> None:
    """Unless its config says that it is converted; a folder without a checkpoint is left to transformers."""
    register(ram="1GiB", daemon=None)

    def refused(name: str, **config: Any) -> None:
        with pytest.raises(OSError, match=name):
            MixtralForCausalLM.from_pretrained(name, config=MixtralConfig(**config), local_files_only=True)

    (tmp_path / "empty").mkdir()
    with pytest.warns(RuntimeWarning, match=r"has no effect.*acme/none is not in a folder of this machine"):
        refused("acme/none")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        refused("acme/converted", quantization_config={"quant_method": "moetier"})
        refused(str(tmp_path / "empty"))
