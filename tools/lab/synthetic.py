"""The models that ``moetier synthetic`` can make: their sizes, tensors, and how large those are.

Every matrix keeps the size of what goes through it: its weights' deviation is one over the root of its inputs, but for
what writes to the residual stream. There an attention or a block adds about a third of an embedding, so that the stream
stays what the embedding says, changed a little by every layer, as in a trained model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

GEOMETRIES: dict[str, dict[str, Any]] = {
    "mixtral-4L": {  # 4 of the 32 blocks of Mixtral-8x7B; the bundled model's vocabulary
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rope_theta": 1000000.0,
    },
    "qwen3-8L": {  # 8 of the 48 blocks of Qwen3-30B-A3B
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "rope_theta": 1000000.0,
    },
    "fine-4L": {  # many small experts: 512 of 2048 x 512, in the architecture of Qwen3's
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "norm_topk_prob": True,
        "rope_theta": 1000000.0,
    },
}
COMMON = {
    "vocab_size": 4096,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
GATE_GAIN = 1.5  # a gate's logits deviate by so much
OUTPUT_GAIN = 0.55  # of what writes to the residual stream


def config_of(geometry: str, blocks: int | None = None, sizes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """config.json, with ``blocks`` in place of the geometry's own number, and other ``sizes`` by their names there."""
    config = {**COMMON, **GEOMETRIES[geometry], **(sizes or {})}
    return config if blocks is None else config | {"num_hidden_layers": blocks}


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of every tensor, in the published names of the architecture."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.self_attn.q_proj.weight"] = (queries, hidden)
        shapes[f"{prefix}.self_attn.k_proj.weight"] = (keys, hidden)
        shapes[f"{prefix}.self_attn.v_proj.weight"] = (keys, hidden)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, queries)
        if config["model_type"] == "qwen3_moe":
            shapes[f"{prefix}.self_attn.q_norm.weight"] = shapes[f"{prefix}.self_attn.k_norm.weight"] = (head,)
            moe, names, inner = "mlp", ("gate_proj", "down_proj", "up_proj"), config["moe_intermediate_size"]
        else:
            moe, names, inner = "block_sparse_moe", ("w1", "w2", "w3"), config["intermediate_size"]
        experts = config.get("num_experts") or config["num_local_experts"]
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.{moe}.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            for name, shape in zip(names, ((inner, hidden), (hidden, inner), (inner, hidden)), strict=True):
                shapes[f"{prefix}.{moe}.experts.{expert}.{name}.weight"] = shape
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def deviation_of(name: str, shape: tuple[int, ...], config: dict[str, Any]) -> float:
    """Of the weights of a matrix."""
    plain = 1 / math.sqrt(shape[1])
    if name.endswith(".gate.weight"):
        return GATE_GAIN * plain
    if name.endswith("o_proj.weight"):
        return OUTPUT_GAIN * plain
    if name.endswith(("w2.weight", "down_proj.weight")):  # the mean of k independent outputs is smaller by its root
        return OUTPUT_GAIN * math.sqrt(config["num_experts_per_tok"]) * plain
    return plain
