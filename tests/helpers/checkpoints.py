"""Tiny random checkpoints of real architectures, saved by transformers in the form in which they are published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

# model class -> what its configuration needs besides SMALL
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": {"num_local_experts": 4},
    "Qwen2MoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 32},
    "Qwen3MoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2},
    "Qwen3NextForCausalLM": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "OlmoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2},
    "GptOssForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
    "DeepseekV3ForCausalLM": {
        **LATENT,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
    "GraniteMoeForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "MiniMaxM2ForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8},
    "PhimoeForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "NemotronHForCausalLM": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "moe_shared_expert_intermediate_size": 32,
        "moe_latent_size": None,
    },
    "Gemma4ForConditionalGeneration": {},
    "Ernie4_5_VLMoeForConditionalGeneration": {},
}


def make_config(architecture: str) -> Any:
    kind = getattr(transformers, architecture).config_class
    own = ARCHITECTURES[architecture]
    if architecture == "Gemma4ForConditionalGeneration":
        text = {
            **SMALL,
            "num_experts": 4,
            "top_k_experts": 2,
            "enable_moe_block": True,
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 128,
            "num_kv_shared_layers": 0,
            "global_head_dim": 16,
        }
        vision = {
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "position_embedding_size": 16,
        }  # fmt: skip
        return kind(text_config=text, vision_config=vision, audio_config=None)
    if architecture == "Ernie4_5_VLMoeForConditionalGeneration":
        text = {
            **SMALL,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": [32, 16],
            "mlp_layer_types": ["dense", "sparse"],
            "moe_num_shared_experts": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [2, 2, 4]},
        }
        vision = {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "patch_size": 4}
        return kind(text_config=text, vision_config=vision)
    return kind(**{**SMALL, **own})


def save_checkpoint(
    folder: Path,
    architecture: str = "MixtralForCausalLM",
    *,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 3,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """``shards`` is about how many files there will be; ``changes`` go into the configuration."""
    config = make_config(architecture)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // shards + 1 if shards > 1 else "50GB")
    return folder


def ordinary_model(folder: Path, architecture: str) -> Any:
    """The checkpoint as transformers itself loads it."""
    return getattr(transformers, architecture).from_pretrained(folder, experts_implementation="eager")
