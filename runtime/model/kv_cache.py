"""How much memory the keys and values of a context take."""

from __future__ import annotations

from typing import Any

import torch

NOTHING_PER_TOKEN = ("linear", "mamba", "conv", "moe", "mlp")  # kinds of layers whose state does not grow
WINDOWED = ("sliding", "chunked")


def kv_cache_bytes(config: Any, tokens: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
    """An estimate for a transformers config: bytes that ``batch`` contexts of ``tokens`` tokens take.

    States of a constant size (convolutions, recurrent layers) are not counted, nor are indexers' keys.
    """
    text = config.get_text_config(decoder=True)
    layers = text.per_layer_config  # some models differ from layer to layer
    numbers = 0
    for layer, kind in zip(layers, getattr(text, "layer_types", None) or [""] * len(layers), strict=True):
        if any(name in kind for name in NOTHING_PER_TOKEN):
            continue
        windowed = any(name in kind for name in WINDOWED)
        window = _first(layer, "sliding_window", "attention_chunk_size", default=tokens) if windowed else tokens
        numbers += min(tokens, window) * _numbers_per_token(layer)
    return batch * numbers * dtype.itemsize


def _numbers_per_token(layer: Any) -> int:
    if latent := _first(layer, "kv_lora_rank"):
        return latent + _first(layer, "qk_rope_head_dim")
    heads = _first(layer, "num_key_value_heads", "num_attention_heads", default=1)
    keys = _first(layer, "head_dim", default=layer.hidden_size // layer.num_attention_heads)
    return heads * (keys + _first(layer, "v_head_dim", default=keys))


def _first(config: Any, *names: str, default: int = 0) -> int:
    """The first of a config's attributes that is a positive number."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return default
