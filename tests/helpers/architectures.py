"""A tiny random model of every architecture that has transformers' experts interface.

A configuration class is shrunk field by field: TINY says what a name means in any of them, OWN what one of them needs.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

MODELS = Path(transformers.__file__).parent / "models"

# must give bitwise equal logits in fp32 and bf16
REQUIRED = {
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "qwen4_exp", "olmoe", "gpt_oss", "deepseek_v2",
    "deepseek_v3", "deepseek_v4", "glm4_moe", "glm_moe_dsa", "minimax_m2", "kimi_linear", "ernie4_5_moe", "granitemoe",
    "lfm2_moe", "gemma4", "nemotron_h",
}  # fmt: skip
# do so too
FURTHER = {
    "afmoe", "aria", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_ocr2", "deepseek_v32",
    "diffusion_gemma", "dots1", "dots3_note", "ernie4_5_vl_moe", "exaone_moe", "flex_olmo", "flint", "glm4_moe_lite",
    "glm4v_moe", "glm5_next", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3",
    "hy_v4", "hy_v4_vl", "inkling", "inkling2", "inkling2_loop", "jamba", "kolibri1", "laguna", "lara_mini", "mellum",
    "mimo_v2_flash", "minimax", "minimax_m3_vl", "mistral4", "mistral_large4", "muse_spark", "openai_privacy_filter",
    "phimoe", "qwen3_omni_moe", "qwen3_vl_moe", "solar_open", "unlimited_ocr", "zaya",
}  # fmt: skip
SINCE_5_24 = {"hy_v4_vl", "inkling2_loop", "lara_mini"}  # of FURTHER; transformers 5.23 has not got them
FURTHER -= {name for name in SINCE_5_24 if not (MODELS / name).exists()}

# a gate of softmax, and one of sigmoids; shared experts; biases and sinks; layers with a state
VARIED = {"deepseek_v3", "gpt_oss", "mixtral", "qwen2_moe", "qwen3_next"}

# values of a parameter, where a test of all types takes long and those of REQUIRED, or the varied ones, say most
TYPES = [*sorted(REQUIRED), *(pytest.param(each, marks=pytest.mark.slow) for each in sorted(FURTHER))]
FEW_REQUIRED = [pytest.param(each, marks=[pytest.mark.slow] * (each not in VARIED)) for each in sorted(REQUIRED)]

TINY: dict[str, Any] = {
    "vocab_size": 256, "max_position_embeddings": 256, "hidden_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False,
    # feed-forward
    "intermediate_size": 96, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48, "dense_intermediate_size": 96, "moe_shared_expert_intermediate_size": 48,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8,
    "num_experts_per_tok": 3, "moe_topk": 3, "moe_k": 3, "top_k_experts": 3,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1,
    # latent, indexed and linear attention
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "index_topk": 8, "index_head_dim": 16,
    "index_n_heads": 64,  # with few, many scores of an index are exactly 0, and any of these positions may be chosen
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_head_dim": 16, "linear_num_heads": 4,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "rel_extent": 32,
    "o_lora_rank": 16, "o_groups": 2, "hc_lowrank": 16, "moe_hidden_size": 32, "router_hidden_size": 32,
    "shared_experts_intermediate_size": 48, "num_code_groups": 4,
    # what joins a tower to the text
    "out_hidden_size": 64, "text_hidden_size": 64, "projector_hidden_size": 32, "projection_hidden_dim": 32,
}  # fmt: skip
TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "depth": 1, "num_hidden_layers": 1, "num_heads": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "image_size": 16,
    "num_position_embeddings": 16, "position_embedding_size": 16, "max_image_size": 64,
    "pos_emb_height": 4, "pos_emb_width": 4, "deepstack_visual_indexes": [0],
    "d_model": 32, "encoder_layers": 1, "encoder_ffn_dim": 48, "encoder_attention_heads": 2, "output_dim": 64,
    "downsample_hidden_size": 8, "n_mel_bins": 8, "mel_vocab_size": 16,
    "decoder_dim": 32, "upsample_rates": [2], "upsampling_ratios": [2],
}  # fmt: skip
HYBRID = ["linear_attention", "full_attention", "linear_attention"]
DENSE_FIRST = ["dense", "sparse", "sparse"]
SMALL_SAM = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64, "patch_size": 16,
    "mlp_dim": 32, "output_channels": 8, "downsample_channels": [8, 32], "window_size": 2, "global_attn_indexes": [0],
}  # fmt: skip

# configuration class -> its own fields
OWN: dict[str, dict[str, Any]] = {
    "BailingHybridConfig": {"layer_group_size": 2},
    "BeamConfig": {"mlp_layer_types": DENSE_FIRST},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": DENSE_FIRST},
    "UnlimitedOcrTextConfig": {"mlp_layer_types": DENSE_FIRST},
    "FlintConfig": {"mlp_only_layers": [0]},
    "DeepseekV2Config": {"n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"},
    "DeepseekV3Config": {"n_group": 2, "topk_group": 1},
    "DeepseekV4Config": {"mlp_layer_types": ["hash_moe", "moe", "moe"]},
    "Dots3NoteTextConfig": {"layer_types": ["indexed_attention"] * 3},
    "Dots3NoteVisionConfig": {
        "mlp_layer_types": ["sparse"], "num_experts_per_tok": 2, "adapter_in_dim": 32, "adapter_out_dim": 64,
    },
    "Dots3NoteAudioConfig": {"adapter_input_size": 32, "adapter_out_dim": 64},
    "Ernie4_5_VLMoeTextConfig": {
        "moe_intermediate_size": [48, 32], "mlp_layer_types": DENSE_FIRST,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 4]},
    },
    "Gemma4TextConfig": {
        "enable_moe_block": True, "pad_token_id": 0,
        "vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "Gemma4Config": {"audio_config": None},
    "Glm4vMoeTextConfig": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
        }
    },
    "Glm5NextTextConfig": {
        "index_kpool": 4, "qk_rope_head_dim": 0, "layer_types": HYBRID, "mlp_layer_types": DENSE_FIRST,
    },
    "GraniteMoeHybridConfig": {"layer_types": HYBRID, "mamba_n_heads": 4, "mamba_d_state": 16, "mamba_chunk_size": 16},
    "MistralLarge4TextConfig": {
        "kv_source_layers": [0, 0, 0], "indexer_types": ["full", "full", "shared"],
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 128,
            "attention_factor": 1.0,
        },
    },
    "HYV4VLTextConfig": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    "InklingVisionConfig": {"num_hidden_layers": 6},
    "Inkling2TextConfig": {"unpadded_vocab_size": 256},
    "Inkling2LoopTextConfig": {"unpadded_vocab_size": 256},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention", "conv"]},
    "MuseSparkAudioConfig": {"patch_sizes": [4], "hidden_sizes": [32], "depths": [1]},
    "NemotronHConfig": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"], "mamba_num_heads": 4, "mamba_head_dim": 16,
        "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16,
    },
    "Qwen3_5MoeTextConfig": {"layer_types": HYBRID},
    "Qwen3NextConfig": {"layer_types": HYBRID},
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2, "thinker_hidden_size": 64},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 48},
    "Qwen4ExpTextConfig": {
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
        "indexer_budget": 8, "indexer_compress_ratio": 4,
        "ple_layer_ids": [3], "ngram_vocab_size_base": 100, "split_ngram_parts": 1, "heads_per_ngram": 2,
        "eos_token_id": 255,
    },
    "KimiLinearConfig": {"layer_types": HYBRID},
    "LaraMiniConfig": {"layer_types": HYBRID},
    "ZayaConfig": {"num_experts_per_tok": 1},
}  # fmt: skip

# towers that a configuration leaves to AutoConfig, with their sizes
TOWERS: dict[str, dict[str, Any]] = {
    "AriaConfig": {"vision_config": {"model_type": "idefics3_vision"}},
    "DiffusionGemmaConfig": {"vision_config": {"model_type": "gemma4_vision"}},
    "Inkling2LoopConfig": {"vision_config": {"model_type": "inkling2_vision"}},
    "MistralLarge4Config": {"vision_config": {"model_type": "pixtral"}},
}


RENAMED = {"Ernie4_5_VL_MoeForConditionalGeneration"}  # old names of a class, kept by transformers


def model_types() -> list[str]:
    """Those in whose source transformers decorates a class with its experts interface."""
    return sorted(
        path.parent.name for path in MODELS.glob("*/modeling_*.py") if "@use_experts_implementation" in path.read_text()
    )


def model_class(model_type: str) -> type[PreTrainedModel]:
    """The one that generates; of an image-text model the whole, not its text part. Skips the test of a type that this
    version of transformers does not have."""
    if model_type in SINCE_5_24 - FURTHER:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    endings = ("ForConditionalGeneration", "ForBlockDiffusion", "ForCausalLM", "ForTokenClassification")
    for ending in endings:
        classes = [
            value
            for name, value in vars(module).items()
            if name.endswith(ending)
            and name not in RENAMED
            and inspect.isclass(value)
            and value.__module__ == module.__name__
        ]
        if classes:
            return classes[-1]  # the class itself is the last one of its module
    raise AssertionError(f"{model_type} has no class that ends in one of {endings}")


def tiny_config(config_class: Any, **changes: Any) -> Any:
    """The smallest that has what the architecture has; parts of parts too."""
    name, fields = config_class.__name__, {field.name for field in dataclasses.fields(config_class)}
    chosen = dict(TINY)
    if any(word in name for word in ("Vision", "Audio", "Sam", "Encoder", "Code2Wav")):
        chosen |= TOWER
    if "SamVision" in name:
        chosen |= SMALL_SAM
    if "kv_lora_rank" in fields:
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]  # transformers caches latent attention expanded
    chosen = {key: value for key, value in chosen.items() if key in fields}
    for part, part_class in config_class.sub_configs.items():
        if part_class.__name__ != "AutoConfig" and part in fields:
            chosen[part] = tiny_config(part_class).to_dict()
    for part, tower in TOWERS.get(name, {}).items():
        part_class = type(transformers.AutoConfig.for_model(**tower))
        chosen[part] = tiny_config(part_class).to_dict()
    return config_class(**chosen | OWN.get(name, {}) | changes)


def tiny_model(model_type: str, dtype: torch.dtype, **changes: Any) -> PreTrainedModel:
    """Random weights that bf16 can hold; with transformers' eager experts. ``changes`` go into the configuration."""
    torch.manual_seed(0)
    of = model_class(model_type)
    model = of._from_config(tiny_config(of.config_class, **changes), dtype=dtype, experts_implementation="eager").eval()
    # from_pretrained keeps these in fp32; since 5.24 models do so themselves
    for part in model._keep_in_fp32_modules_strict or ():
        for name, weights in model.named_parameters():
            if re.search(part, name):
                weights.data = weights.data.float()
    for name, weights in model.state_dict().items():  # buffers that are not saved stay as they are: frequencies of RoPE
        if weights.is_floating_point():
            if weights.ndim > 1:
                weights.normal_(0, 0.12)
            elif "bias" in name:
                weights.normal_(0, 0.05)
            weights.copy_(weights.bfloat16())
        elif name.endswith("tid2eid"):  # deepseek_v4: which experts a token is sent to, [vocabulary, k]
            weights.copy_(torch.rand(len(weights), TINY["n_routed_experts"]).argsort(-1)[:, : weights.shape[1]])
    return model
