"""Memory that a model needs besides its experts, and the memory budgets that are left for experts.

Both loading and planning use this module.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from moetier.runtime.config import Size
from moetier.runtime.devices.device import ComputeDevice
from moetier.runtime.kernels.products.api import Kernels
from moetier.runtime.machine.memory import Available, budget_for, usable
from moetier.runtime.moe.grouped import BATCH_OUTPUTS
from moetier.tiers.cache.budget import smallest_budget
from moetier.tiers.layout import RecordLayout
from moetier.tiers.manifest import Manifest

from .prefill import NOTHING_PER_TOKEN, WINDOWED, Prefill


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of memory that a model needs besides its experts.

    If the device that computes has memory, all but ``trunk`` are bytes of that memory, not of the host's.
    """

    trunk: int  # the part of the trunk whose memory still counts as free
    cache: int  # keys and values of a context
    scratch: int  # scratch memory of computations
    prefill: Prefill  # tokens of a prompt that are computed together

    @property
    def reserve(self) -> int:
        """Bytes for cache, scratch and prefill together."""
        return self.cache + self.scratch + self.prefill.nbytes

    def room(self, available: Available) -> int:
        """Return how many bytes of ``available`` memory trunk, cache and scratch leave for experts and prefill."""
        return usable(available.bytes - self.trunk - self.cache - self.scratch)

    def within(self, asked: Size | None, largest: int, available: Available, *, smallest: int = 0) -> Needs:
        """Return the needs with fewer tokens computed together, if ``available`` has no room for all of them.

        They leave ``largest`` bytes for experts if possible; else those that the user's option ``asked`` gives, or half
        of what trunk and cache leave, but at least ``smallest``.
        """
        room = self.room(available)
        experts = max(room // 2, smallest) if asked is None or asked.bytes is None else asked.bytes
        return replace(self, prefill=self.prefill.within(room - min(experts, largest)))

    def host_budget(self, manifest: Manifest, asked: Size | None, available: Available, device: ComputeDevice) -> int:
        """Return the bytes for the host tier's slots.

        ``asked`` is the user's option, ``available`` the free memory of the host, and ``device`` the device that
        computes. Raises BudgetError as ``budget_for`` does.
        """
        return budget_for(
            asked,
            smallest=smallest_budget(manifest),
            largest=manifest.stored_bytes,
            reserve=0 if device.has_memory else self.reserve,
            available=replace(available, bytes=max(available.bytes - self.trunk, 0)),
        )

    def device_budget(self, manifest: Manifest, asked: Size | None, available: Available) -> int:
        """Return the bytes for the device tier's slots.

        ``asked`` is the user's option, and ``available`` the memory of the device that is free once the trunk is
        loaded. Raises BudgetError as ``budget_for`` does.
        """
        return budget_for(
            asked,
            smallest=smallest_budget(manifest),
            largest=manifest.stored_bytes,
            reserve=self.reserve,
            available=available,
            name="device_memory",
        )


def largest_decoded(matrices: Iterable[RecordLayout], kernels: Kernels) -> int:
    """Return the number of weights of the largest of ``matrices`` that ``kernels`` must decode; 0 if there is none."""
    return max((layout.weights for layout in matrices if not kernels.packs(layout)), default=0)


def scratch_numbers(manifest: Manifest, kernels: Kernels) -> int:
    """Return how many numbers the scratch memory for computing with experts has to hold.

    The scratch memory holds the largest projection that has to be decoded, or what compiled code keeps between products
    for BATCH_OUTPUTS tokens. The latter is less than three times the inputs and outputs of the widest projection.
    """
    layouts = manifest.layouts.values()
    decoded = [p.rows * p.columns for layout in layouts for p in layout.projections if not kernels.packs(layout)]
    wide = [
        3 * BATCH_OUTPUTS * (p.rows + p.columns)
        for layout in layouts
        for p in layout.projections
        if kernels.packs(layout)
    ]
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
