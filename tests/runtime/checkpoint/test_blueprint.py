"""Which of a checkpoint's tensors make which expert: as transformers itself loads them, for every architecture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import FURTHER, REQUIRED
from checkpoints import edit_json, edit_tensors, ordinary_model, save_checkpoint, stored_experts, trunk_tensors
from safetensors.torch import load_file
from torch import Tensor

import moetier
from moetier.runtime.checkpoint import blueprint
from moetier.runtime.checkpoint.blueprint import build_on_meta, make_blueprint, supported_types
from moetier.runtime.checkpoint.safetensors_folder import open_safetensors
from moetier.runtime.moe.experts import experts_modules
from moetier.runtime.stores.checkpoint_store import table_of
from moetier.tiers.errors import CheckpointError, StoreFormatError, UnsupportedModelError
from moetier.tools.convert.api import convert
from moetier.tools.convert.conversion import Conversion
from moetier.tools.convert.options import Options
from moetier.tools.plan.choices import open_choices

# beside the required ones: fused, interleaved or transposed checkpoints, two Experts modules in a layer, several towers
TELLING = {"phimoe", "ernie4_5_vl_moe", "inkling", "inkling2_loop", "aria", "openai_privacy_filter", "qwen3_omni_moe"}
READ_WHOLE = {"ernie4_5_vl_moe", "inkling2_loop"}  # transformers' rules for these mix experts


def plan(source: Path) -> Conversion:
    return Conversion.plan(open_safetensors(source), source.parent / "dst", Options(bits=16))


def source_trunk(source: Path) -> dict[str, Tensor]:
    return {name: t for file in source.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize(
    "model_type",
    [
        *sorted(REQUIRED)[::2],
        *(pytest.param(t, marks=pytest.mark.slow) for t in sorted(REQUIRED)[1::2]),
        *sorted(TELLING),
        *(pytest.param(t, marks=pytest.mark.slow) for t in sorted(FURTHER - TELLING)),
    ],
)
def test_each_expert_is_what_transformers_loads(model_type: str, tmp_path: Path) -> None:
    source, dst = save_checkpoint(tmp_path / "src", model_type), tmp_path / "dst"
    convert(source, dst, bits=16)
    modules = experts_modules(ordinary_model(source))
    stored = stored_experts(dst)
    assert list(stored) == [(path, e) for path, module in modules.items() for e in range(module.num_experts)]
    for (path, expert), parameters in stored.items():
        whole = dict(modules[path].named_parameters(recurse=False))
        assert list(parameters) == sorted(whole, key=lambda name: (name.endswith("_bias"), list(whole).index(name)))
        for name, tensor in parameters.items():
            assert torch.equal(tensor, whole[name][expert]), (path, expert, name)
    trunk, original = trunk_tensors(dst), source_trunk(source)
    assert trunk  # the rest, bit for bit, under its own names
    for name, tensor in trunk.items():
        assert tensor.dtype == original[name].dtype
        assert torch.equal(
            tensor.view(torch.uint8) if tensor.ndim else tensor,
            original[name].view(torch.uint8) if tensor.ndim else original[name],
        )
    of_experts = sum(t.nbytes for parameters in stored.values() for t in parameters.values())
    assert of_experts + sum(t.nbytes for t in trunk.values()) == sum(t.nbytes for t in original.values())
    apart = {block.is_separable for block in plan(source).planned.blueprint.blocks}
    assert apart == {model_type not in READ_WHOLE}


def test_a_block_that_is_read_whole_is_reported_before(tmp_path: Path) -> None:
    whole = plan(save_checkpoint(tmp_path / "a" / "src", "ernie4_5_vl_moe"))
    assert any("as whole blocks" in line for line in whole.announce())
    apart = plan(save_checkpoint(tmp_path / "b" / "src", "mixtral"))
    assert not any("as whole blocks" in line for line in apart.announce())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types_of_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    source, dst = save_checkpoint(tmp_path / "src", dtype=dtype), tmp_path / "dst"
    said = any("rounded to bfloat16" in line for line in plan(source).announce())
    assert said == (dtype == torch.float32)
    convert(source, dst, bits=16)
    modules = experts_modules(ordinary_model(source))
    kept = torch.bfloat16 if dtype == torch.float32 else dtype
    for (path, expert), parameters in stored_experts(dst).items():
        for name, tensor in parameters.items():
            assert torch.equal(tensor, getattr(modules[path], name)[expert].to(kept))
    assert all(tensor.dtype == dtype for tensor in trunk_tensors(dst).values())


def test_the_config_decides_the_type_and_else_the_weights(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "src")
    assert plan(source).planned.blueprint.dtype == "bfloat16"
    edit_json(source / "config.json", dtype=None)
    found = plan(source)
    assert found.planned.blueprint.dtype == "bfloat16"
    assert json.loads(found.target.small["config.json"])["dtype"] == "bfloat16"
    edit_json(source / "config.json", torch_dtype="float16")
    assert plan(source).planned.blueprint.dtype == "float16"


def test_one_expert_only(tmp_path: Path) -> None:
    source, dst = tmp_path / "src", tmp_path / "dst"
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=1, num_experts_per_tok=1, dtype="bfloat16",
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).bfloat16().save_pretrained(source)
    convert(source, dst, bits=16)
    module = next(iter(experts_modules(ordinary_model(source)).values()))
    (parameters,) = stored_experts(dst).values()
    assert all(torch.equal(tensor, getattr(module, name)[0]) for name, tensor in parameters.items())


def test_tensors_that_the_model_does_not_use_are_left_out_and_named(tmp_path: Path) -> None:
    """DeepSeek-V3 publishes a layer for training behind the last."""
    source = save_checkpoint(tmp_path / "src", "deepseek_v3", shards=1)
    extra = {f"model.layers.9.mlp.experts.{e}.gate_proj.weight": torch.ones(4, 4).bfloat16() for e in range(3)}
    extra["model.layers.9.eh_proj.weight"] = torch.ones(4, 4).bfloat16()
    edit_tensors(source, lambda tensors: tensors.update(extra))
    found = plan(source)
    assert set(found.planned.blueprint.unused) == set(extra)
    assert any("4 tensors (128 B) are left out" in line for line in found.announce())
    convert(source, tmp_path / "dst", bits=16)
    assert not trunk_tensors(tmp_path / "dst").keys() & extra.keys()


@pytest.mark.parametrize("what", ["tensor", "expert", "block"])
def test_an_expert_that_is_missing_is_named(tmp_path: Path, what: str) -> None:
    source = save_checkpoint(tmp_path / "src", shards=1)

    def edit(tensors: dict[str, Tensor]) -> None:
        gone = {"tensor": ".1.*experts.3.w1", "expert": ".1.*experts.3.", "block": "layers.1.*experts."}[what]
        start, end = gone.split("*")
        for name in [name for name in tensors if start in name and end in name]:
            del tensors[name]

    edit_tensors(source, edit)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts"):
        convert(source, tmp_path / "dst", bits=16)


@pytest.mark.parametrize("use", [plan, open_choices, table_of, moetier.load], ids=lambda use: use.__name__)
def test_a_tensor_of_the_trunk_that_is_missing_is_named(use: Callable[[Path], object], tmp_path: Path) -> None:
    """transformers would fill it with random numbers."""
    source = save_checkpoint(tmp_path / "src", shards=1)
    edit_tensors(source, lambda tensors: [tensors.pop(n) for n in list(tensors) if "q_proj" in n or "o_proj" in n])
    with pytest.raises(
        CheckpointError, match=r"no tensor for model\.layers\.0\.self_attn\.o_proj.* and 3 more\."
    ) as error:
        use(source)
    assert "\n" not in error.value.cause


def test_tied_weights_and_what_the_model_declares_may_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_checkpoint(tmp_path / "src", shards=1)
    edit_tensors(source, lambda tensors: [tensors.pop("lm_head.weight"), tensors.pop("model.norm.weight")])
    edit_json(source / "config.json", tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"no tensor for model\.norm\.weight\."):
        plan(source)
    monkeypatch.setattr(transformers.MixtralForCausalLM, "_keys_to_ignore_on_load_missing", [r"model\.norm"])
    assert "lm_head.weight" not in plan(source).planned.blueprint.trunk


def test_a_model_directory_without_a_tensor_of_the_trunk_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier conversions of such checkpoints did not notice it."""
    source = save_checkpoint(tmp_path / "src", shards=1)
    edit_tensors(source, lambda tensors: [tensors.pop(name) for name in list(tensors) if "q_proj" in name])
    with monkeypatch.context() as patch:
        patch.setattr(blueprint, "_lacking", lambda *given: [])
        convert(source, tmp_path / "dst", bits=16)
    with pytest.raises(StoreFormatError, match=r"no tensor for model\.layers\.0\.self_attn\.q_proj\.weight, "):
        moetier.load(tmp_path / "dst", daemon="none")


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "src", shards=1)
    edit_json(source / "config.json", intermediate_size=32)
    with pytest.raises(CheckpointError, match=r"experts.* in the model"):
        convert(source, tmp_path / "dst", bits=16)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bits", [16, 4])
def test_weights_that_are_no_finite_numbers_are_refused(tmp_path: Path, value: float, bits: Any) -> None:
    source = save_checkpoint(tmp_path / "src", shards=1)

    def edit(tensors: dict[str, Tensor]) -> None:
        name = next(name for name in tensors if "layers.1." in name and "experts.5.w2" in name)
        tensors[name][3, 7] = value

    edit_tensors(source, edit)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts expert 5: down_proj .*not finite"):
        convert(source, tmp_path / "dst", bits=bits)
    assert not (tmp_path / "dst" / "experts.zarr" / "zarr.json").exists()


def test_a_dense_model_is_refused_with_what_is_supported(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "src")
    with pytest.raises(UnsupportedModelError, match="is dense") as caught:
        convert(tmp_path / "src", tmp_path / "dst")
    assert f"models of {len(supported_types())} types, such as mixtral, qwen3_moe and gpt_oss" in caught.value.fix
    assert "docs/architectures.md" in caught.value.fix
    assert len(caught.value.fix) < 160
    assert not (tmp_path / "dst").exists()


def test_experts_without_the_interface_are_refused(tmp_path: Path) -> None:
    config = transformers.SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
    )  # fmt: skip
    transformers.SwitchTransformersForConditionalGeneration(config).save_pretrained(tmp_path / "src")
    with pytest.raises(UnsupportedModelError, match="experts interface does not know"):
        convert(tmp_path / "src", tmp_path / "dst")


@pytest.mark.parametrize("name", ["NoSuchModel", "pipeline", "AutoConfig", None])
def test_an_architecture_that_is_none_is_refused(tmp_path: Path, name: str | None) -> None:
    source = save_checkpoint(tmp_path / "src")
    edit_json(source / "config.json", architectures=[name] if name else None)
    with pytest.raises(UnsupportedModelError, match=f"no architecture {name}"):
        convert(source, tmp_path / "dst")


def test_a_config_that_transformers_cannot_build_is_refused(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "src")
    edit_json(source / "config.json", num_local_experts="many")
    with pytest.raises(CheckpointError, match="can't build MixtralForCausalLM"):
        convert(source, tmp_path / "dst")


@pytest.mark.parametrize("place", ["num_hidden_layers", "vision_config"])
def test_a_config_with_endless_layers_is_refused(tmp_path: Path, place: str) -> None:
    source = save_checkpoint(tmp_path / "src")
    edit_json(source / "config.json", **{place: 1 << 40 if place == "num_hidden_layers" else {"num_layers": 1 << 40}})
    with pytest.raises(CheckpointError, match="1,099,511,627,776 layers"):
        convert(source, tmp_path / "dst")


def test_what_is_kept_for_each_expert_and_unknown_is_refused(tmp_path: Path) -> None:
    checkpoint = open_safetensors(save_checkpoint(tmp_path / "src"))
    model, dtype = build_on_meta(checkpoint.config, None)
    tensors = checkpoint.format.sources("bfloat16")
    path, module = next(iter(experts_modules(model).items()))
    module.register_parameter("router_scale", torch.nn.Parameter(torch.empty(module.num_experts, device="meta")))
    with pytest.raises(UnsupportedModelError, match=f"{path} has an unknown expert parameter router_scale"):
        make_blueprint(model, dtype, tensors)


def test_the_supported_types_are_those_of_the_interface() -> None:
    assert supported_types() == sorted([*REQUIRED, *FURTHER])
