"""Tiny random models as GGUF files, as llama.cpp writes them, by the package gguf's own writer and quantisers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
import transformers
from coded_records import random_blocks
from transformers.convert_slow_tokenizer import bytes_to_unicode

HIDDEN, INNER, LAYERS, EXPERTS, TOP_K, VOCABULARY = 256, 256, 2, 4, 2, 264
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "num_experts_per_tok": TOP_K, "head_dim": 64,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
MODELS: dict[str, tuple[str, Callable[[], Any]]] = {  # by architecture of llama.cpp: class of the model, its config
    "qwen3moe": (
        "Qwen3MoeForCausalLM",
        lambda: transformers.Qwen3MoeConfig(
            **COMMON, num_experts=EXPERTS, moe_intermediate_size=INNER, intermediate_size=INNER, norm_topk_prob=True
        ),
    ),
    "qwen2moe": (
        "Qwen2MoeForCausalLM",
        lambda: transformers.Qwen2MoeConfig(
            **{key: value for key, value in COMMON.items() if key != "head_dim"},
            num_experts=EXPERTS,
            moe_intermediate_size=INNER,
            shared_expert_intermediate_size=INNER,
            intermediate_size=INNER,
        ),
    ),
    "qwen35moe": (
        "Qwen3_5MoeForCausalLM",
        lambda: transformers.Qwen3_5MoeTextConfig(
            **{key: value for key, value in COMMON.items() if key != "rope_theta"},
            num_experts=EXPERTS,
            moe_intermediate_size=INNER,
            shared_expert_intermediate_size=INNER,
            full_attention_interval=2,
            linear_key_head_dim=32,
            linear_value_head_dim=32,
            linear_num_key_heads=2,
            linear_num_value_heads=6,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        ),
    ),
    "llama": (
        "MixtralForCausalLM",
        lambda: transformers.MixtralConfig(**COMMON, num_local_experts=EXPERTS, intermediate_size=INNER),
    ),
    "minimax-m2": (
        "MiniMaxM2ForCausalLM",
        lambda: transformers.MiniMaxM2Config(
            **COMMON, num_local_experts=EXPERTS, intermediate_size=INNER, rotary_dim=32, use_routing_bias=True
        ),
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        lambda: transformers.GptOssConfig(
            **{key: value for key, value in COMMON.items() if key != "rope_theta"},
            num_local_experts=EXPERTS,
            intermediate_size=INNER,
            sliding_window=4,
            rope_parameters={
                "rope_type": "yarn",
                "factor": 8.0,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 64,
                "truncate": False,
            },
        ),
    ),
}
Kind = Callable[[str], str]  # returns the type of a tensor, by its name in the file


@dataclass(frozen=True)
class Vocabulary:
    """Tokens of a byte-level tokenizer, with their types (1: ordinary, 3: control, 4: the user's, 5: unused)."""

    tokens: list[str]
    types: list[int]
    end: str  # token that ends an answer
    template: str


def plain_vocabulary() -> Vocabulary:
    """Bytes, a merge of two, and a token that ends an answer."""
    tokens = [*bytes_to_unicode().values(), "he", "<|end|>"]
    tokens += [f"[PAD{each}]" for each in range(len(tokens), VOCABULARY)]
    types = [3 if each == "<|end|>" else 5 if each.startswith("[PAD") else 1 for each in tokens]
    return Vocabulary(tokens, types, "<|end|>", "{% for message in messages %}{{ message.content }}{% endfor %}")


def mostly(experts: str, down: str | None = None, trunk: str = "Q8_0") -> Kind:
    """Experts' matrices of one type, or of another for those of ``down``; other matrices of a third."""

    def kind(name: str) -> str:
        if "_exps" in name:
            return down if down is not None and "down" in name else experts
        return trunk

    return kind


def tiny_weights(architecture: str, seed: int = 0) -> Any:
    """A random model in fp32."""
    name, config = MODELS[architecture]
    torch.manual_seed(seed)
    model = getattr(transformers, name)(config()).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("_proj_bias"):  # bf16 numbers, which llama.cpp writes as fp32
                parameter.copy_((torch.randn_like(parameter) * 0.1).bfloat16())
            elif parameter.dim() > 1:
                parameter.normal_(0, 0.05)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def write_gguf(
    path: Path,
    model: Any,
    ggml_type: Kind,
    *,
    vocabulary: bool | Vocabulary = True,
    tensors_of_a_part: int = 0,
    seed: int = 0,
) -> Path:
    """Writes the model; returns the path of the file, or of the first part."""
    config = model.config
    architecture = next(each for each, (name, _) in MODELS.items() if name == type(model).__name__)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_of_a_part)
    _describe(writer, config, vocabulary)
    random = np.random.default_rng(seed)
    for name, (_, _, weights) in _tensors(model).items():
        if weights.ndim == 1 or "ffn_gate_inp" in name or "conv1d" in name or name.endswith(".bias"):
            writer.add_tensor(name, weights)
            continue
        wanted = ggml_type(name)
        data = encoded(weights, wanted, random)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[wanted])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))[0]


def encoded(weights: npt.NDArray[np.float32], ggml_type: str, random: np.random.Generator) -> npt.NDArray[Any]:
    """In blocks; of a type that the package gguf does not quantise, random ones."""
    number = gguf.GGMLQuantizationType[ggml_type]
    try:
        return np.asarray(gguf.quants.quantize(weights, number))
    except NotImplementedError:
        return random_blocks(weights.shape, ggml_type, random)


def reference(path: Path, model: Any, dtype: torch.dtype) -> Any:
    """``model`` with the weights of its file, decoded by the package gguf, as transformers computes it."""
    files = [path, *sorted(path.parent.glob(path.name.replace("-00001-of-", "-*-of-")))]
    stored = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for file in dict.fromkeys(files)
        for tensor in gguf.GGUFReader(file).tensors
    }
    state = {}
    for name, keys in _tensors(model).items():
        weights, (key, undo, _) = torch.from_numpy(np.array(stored[name])), keys
        state.setdefault(key, []).append(undo(weights))
    twin = type(model)._from_config(model.config, dtype=dtype, experts_implementation="eager").eval()
    whole = {key: _united(parts, type(model).__name__, key) for key, parts in state.items()}
    shaped = {key: whole[key].reshape(tensor.shape) for key, tensor in twin.state_dict().items()}
    twin.load_state_dict(shaped)
    return twin


def _united(parts: list[torch.Tensor], model: str, key: str) -> torch.Tensor:
    """Gate and up, or the one part, as the model has them."""
    if model != "GptOssForCausalLM":
        return torch.cat(parts, 1) if parts[1:] else parts[0]
    whole = torch.stack(parts, 2).flatten(1, 2) if parts[1:] else parts[0]
    return whole.transpose(1, 2) if key.endswith("_proj") else whole


Undo = Callable[[torch.Tensor], torch.Tensor]  # makes the model's weights of those that llama.cpp stores


def _same(weights: torch.Tensor) -> torch.Tensor:
    return weights


def _tensors(model: Any) -> dict[str, tuple[str, Undo, npt.NDArray[np.float32]]]:
    """For each tensor of a file: the parameter that it belongs to, what undoes llama.cpp's change of it, itself.

    Gate comes before up.
    """
    config = model.config
    architecture = next(each for each, (name, _) in MODELS.items() if name == type(model).__name__)
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    tensors: dict[str, tuple[str, Undo, npt.NDArray[np.float32]]] = {}
    for key, tensor in model.state_dict().items():
        weights, undo = tensor.float().numpy(), _same
        if match := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)(_bias)?", key):
            suffix, parts = "bias" if match[3] else "weight", {"down": weights}
            if architecture == "gpt-oss" and not match[3]:
                parts = {"down": weights.swapaxes(1, 2)}
            if match[2] == "gate_up_proj":
                (weights,) = parts.values()
                halves = [weights[:, ::2], weights[:, 1::2]] if architecture == "gpt-oss" else np.split(weights, 2, 1)
                parts = dict(zip(("gate", "up"), halves, strict=True))
            for part, matrix in parts.items():
                tensors[f"blk.{match[1]}.ffn_{part}_exps.{suffix}"] = (key, _same, np.ascontiguousarray(matrix))
            continue
        if match := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.(gate\.)?e_score_correction_bias", key):
            tensors[f"blk.{match[1]}.exp_probs_b.bias"] = (key, _same, weights)
            continue
        name = names.get_name(key.replace("dt_bias", "dt_proj.bias"), try_suffixes=(".weight", ".bias"))
        assert name is not None, key
        if architecture == "llama" and (match := re.search(r"\.(attn_[qk])\.weight", name)):
            heads = config.num_attention_heads if match[1] == "attn_q" else config.num_key_value_heads
            weights = weights.reshape(heads, 2, -1, weights.shape[1]).swapaxes(1, 2).reshape(weights.shape)
            undo = partial(_in_halves, heads)
        if architecture == "qwen35moe":
            changed, undo = _of_qwen35(key, torch.from_numpy(weights), config)
            weights = changed.numpy()
        if name.endswith("ffn_gate_inp_shexp.weight"):
            weights = weights[0]
        tensors[name] = (key, undo, np.ascontiguousarray(weights))
    return tensors


def _in_halves(heads: int, weights: torch.Tensor) -> torch.Tensor:
    """Rows of queries or keys, which llama.cpp interleaves in each head."""
    return weights.view(heads, -1, 2, weights.shape[1]).transpose(1, 2).reshape(weights.shape)


def _of_qwen35(key: str, weights: torch.Tensor, config: Any) -> tuple[torch.Tensor, Undo]:
    """Convert weights of Qwen3.5 to what llama.cpp stores of them, and back.

    Heads of values are by their number in a group of heads of keys, and not by the group; norms have 1 added.
    """
    keys, size = config.linear_num_key_heads, config.linear_value_head_dim
    heads = config.linear_num_value_heads // keys

    def turned(one: int, other: int, first: int, rows: int, given: torch.Tensor) -> torch.Tensor:
        values = given[first:]
        swapped = values.reshape(one, other, rows, -1).transpose(0, 1).reshape(values.shape)
        return torch.cat([given[:first], swapped])

    def swaps(first: int = 0, rows: int = 1) -> tuple[Undo, Undo]:
        return partial(turned, keys, heads, first, rows), partial(turned, heads, keys, first, rows)

    leaf = key.removesuffix(".weight").rpartition(".")[2]
    if leaf == "A_log":
        tiled, grouped = swaps()
        return tiled(-weights.exp()), lambda given: grouped(torch.log(-given))
    if leaf in ("dt_bias", "in_proj_a", "in_proj_b"):
        tiled, grouped = swaps()
        return tiled(weights), grouped
    if leaf in ("in_proj_z", "in_proj_qkv", "conv1d"):
        tiled, grouped = swaps(0 if leaf == "in_proj_z" else 2 * keys * config.linear_key_head_dim, size)
        return tiled(weights.squeeze(1)), grouped
    if leaf == "out_proj":
        tiled, grouped = swaps(0, size)
        return tiled(weights.T).T, lambda given: grouped(given.T).T
    if leaf.endswith("norm") and not key.endswith("linear_attn.norm.weight"):
        return weights + 1, lambda given: given - 1
    return weights, _same


def _describe(writer: Any, config: Any, vocabulary: bool | Vocabulary) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    if hasattr(config, "intermediate_size"):
        writer.add_feed_forward_length(config.intermediate_size)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    part = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(getattr(config, "rotary_dim", None) or int(head * part))
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(TOP_K)
    if type(config).__name__ == "GptOssConfig":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])
    if type(config).__name__ == "MiniMaxM2Config":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if type(config).__name__ == "Qwen3_5MoeTextConfig":
        writer.add_full_attention_interval(2)
        writer.add_rope_dimension_sections([*config.rope_parameters["mrope_section"], 0])
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_ssm_state_size(config.linear_key_head_dim)
        writer.add_ssm_group_count(config.linear_num_key_heads)
        writer.add_ssm_time_step_rank(config.linear_num_value_heads)
        writer.add_ssm_inner_size(config.linear_num_value_heads * config.linear_value_head_dim)
    if not vocabulary:
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(config.vocab_size)
        return
    given = vocabulary if isinstance(vocabulary, Vocabulary) else plain_vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(given.tokens)
    writer.add_token_types(given.types)
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(given.tokens.index(given.end))
    writer.add_bos_token_id(given.tokens.index(given.end))
    writer.add_add_bos_token(False)
    writer.add_chat_template(given.template)
