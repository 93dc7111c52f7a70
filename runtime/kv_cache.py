"""How much memory the keys and values of a context take."""

from __future__ import annotations

from typing import Any

import torch

NOTHING_PER_TOKEN = ("linear", "mamba", "conv", "recurrent", "moe", "mlp")  # kinds of layers whose state does not grow
WINDOWED = ("sliding", "chunked")


def kv_cache_bytes(config: Any, tokens: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
    """An estimate from above for a transformers config: bytes that ``batch`` contexts of ``tokens`` tokens take.

    transformers caches latent attention (``kv_lora_rank``) expanded: keys and values for every head.
    """
    text = config.get_text_config()
    heads = _first(text, "num_key_value_heads", "num_attention_heads")
    head_dim = _first(text, "head_dim", "global_head_dim", default=text.hidden_size // text.num_attention_heads)
    keys = values = head_dim
    if latent := _first(text, "qk_nope_head_dim"):
        keys = latent + _first(text, "qk_rope_head_dim")
    values = _first(text, "v_head_dim", default=values)
    window = _first(text, "sliding_window", "attention_chunk_size", default=tokens)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    cached = 0
    for kind in kinds:
        if any(name in kind for name in WINDOWED):
            cached += min(tokens, window)
        elif not any(name in kind for name in NOTHING_PER_TOKEN):
            cached += tokens
    return batch * cached * heads * (keys + values) * dtype.itemsize


def _first(config: Any, *names: str, default: int = 0) -> int:
    """The first of a config's attributes that is a positive number."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return default
