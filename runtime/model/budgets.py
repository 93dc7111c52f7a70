"""Memory that a model needs besides its experts, and the budgets that are left for experts.

Loading and planning both use it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from moetier.runtime.config import DEFAULT_CONTEXT, Size
from moetier.runtime.kernels.api import Kernels
from moetier.runtime.memory import Available, budget_for
from moetier.runtime.moe.experts import ROWS, experts_modules, output_bytes
from moetier.tiers.cache.budget import smallest_budget
from moetier.tiers.layout import RecordLayout
from moetier.tiers.manifest import Manifest

# parts of the names of layer types whose state does not grow with the context
NOTHING_PER_TOKEN = ("linear", "mamba", "conv", "moe", "mlp")
WINDOWED = ("sliding", "chunked")


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes needed besides the experts. With a GPU, cache and scratch are on the GPU, and not on the host."""

    trunk: int  # of the trunk, as far as its memory still counts as free
    cache: int  # keys and values of a context, and outputs of experts that are computed early
    scratch: int  # scratch memory of computations

    @property
    def reserve(self) -> int:
        """Bytes for cache and scratch together."""
        return self.cache + self.scratch

    def host_budget(self, manifest: Manifest, asked: Size | None, available: Available, device: torch.device) -> int:
        """Return the bytes for the host tier's slots, given what is ``available`` on the host. Raises BudgetError."""
        return budget_for(
            asked,
            smallest=smallest_budget(manifest),
            largest=manifest.stored_bytes,
            reserve=self.reserve if device.type == "cpu" else 0,
            available=Available(max(available.bytes - self.trunk, 0), available.limiter),
        )

    def device_budget(self, manifest: Manifest, asked: Size | None, available: Available) -> int:
        """Return the bytes for the device tier, given what is ``available`` there once the trunk is loaded.

        Raises BudgetError.
        """
        return budget_for(
            asked,
            smallest=smallest_budget(manifest),
            largest=manifest.stored_bytes,
            reserve=self.reserve,
            available=available,
            name="device_memory",
        )


def context_bytes(model: Any, manifest: Manifest, tokens: int) -> int:
    """Return the bytes for a context of ``tokens``: keys and values, and outputs of experts that are not yet added up.

    Experts compute as their records arrive, and their outputs are added up in a fixed order, so early outputs are kept.
    Memory for these is counted for a prefill of DEFAULT_CONTEXT tokens at most, and for one block, as blocks compute
    one after another.
    """
    modules = experts_modules(model)
    early = max(
        output_bytes(
            modules[block.path], manifest.layout(number), min(tokens, DEFAULT_CONTEXT), block.top_k, model.dtype
        )
        for number, block in enumerate(manifest.blocks)
    )
    return kv_cache_bytes(model.config, tokens, dtype=model.dtype) + early


def largest_decoded(matrices: Iterable[RecordLayout], kernels: Kernels) -> int:
    """Return the number of weights of the largest of the trunk's ``matrices`` that has to be decoded; 0 if none has."""
    return max((layout.weights for layout in matrices if not kernels.packs(layout)), default=0)


def scratch_numbers(manifest: Manifest, kernels: Kernels) -> int:
    """Return the size of the scratch memory for computing with experts, in numbers.

    It holds the largest projection that has to be decoded, or what compiled code keeps between products for ROWS
    tokens: less than three times the inputs and outputs of the widest projection.
    """
    layouts = manifest.layouts.values()
    decoded = [p.rows * p.columns for layout in layouts for p in layout.projections if not kernels.packs(layout)]
    wide = [3 * ROWS * (p.rows + p.columns) for layout in layouts for p in layout.projections if kernels.packs(layout)]
    return max(decoded + wide)


def kv_cache_bytes(config: Any, tokens: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
    """Estimate the bytes of the KV caches of ``batch`` contexts of ``tokens`` each, from a transformers config.

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
    """Return the first of a config's attributes ``names`` that is a positive integer; else ``default``."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return default
