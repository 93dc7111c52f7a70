"""Memory that a model needs besides its experts, and the memory budgets that are left for experts.

Both loading and planning use this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch

from moetier.runtime.config import Size, TierConfig
from moetier.runtime.devices.device import ComputeDevice
from moetier.runtime.kernels.experts.expert_products import BATCH_OUTPUTS
from moetier.runtime.kernels.layer.eight_bits import SCALE_BYTES
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS
from moetier.runtime.kernels.products.api import Kernels
from moetier.runtime.machine.memory import Available, budget_for, usable
from moetier.tiers.cache.budget import slots_for, smallest_budget
from moetier.tiers.layout import RecordLayout
from moetier.tiers.manifest import Manifest

from .context import can_resume, has_states
from .kv_budget import NO_KV, KVBudget, state_bytes
from .prefill_memory import INDEXED, NO_PREFILL, NOTHING_PER_TOKEN, WINDOWED, Prefill, prefill_of

# Most of the memory that trunk and cache leave, for the tokens of prompts that are computed together, if not all
# experts fit: by default, and if an option says how many tokens, or if a fifth would be less than the least.
PREFILL_SHARE, GIVEN_PREFILL_SHARE = Fraction(1, 5), Fraction(1, 2)


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of memory that a model needs besides its experts.

    If the device that computes has memory, all but ``trunk`` are bytes of that memory, not of the host's.
    """

    trunk: int = 0  # the part of the trunk whose memory still counts as free
    kv: KVBudget = NO_KV  # keys and values
    scratch: int = 0  # scratch memory of computations, and states of sequences besides keys and values
    prefill: Prefill = NO_PREFILL  # tokens of a prompt that are computed together

    @classmethod
    def of(
        cls,
        model: Any,
        manifest: Manifest,
        config: TierConfig,
        kernels: Kernels,
        *,
        available: Available,
        trunk: int,
        matrices: Iterable[RecordLayout],
    ) -> Needs:
        """Return the needs of a model, which may be on the meta device.

        Args:
            model: the model.
            manifest: that of its store.
            config: the options, which give the tokens that are computed together.
            kernels: the kernels that it will be computed with.
            available: the free memory of the device that computes, with ``trunk``.
            trunk: bytes of the trunk whose memory still counts as free.
            matrices: layouts of the trunk's quantised matrices.
        """
        scratch = scratch_elements(manifest, matrices, kernels) * model.dtype.itemsize
        scratch += (config.sequences + 1) * state_bytes(model)  # one more, as a copy of one becomes a snapshot
        kv = KVBudget.of(
            model.config,
            config,
            page_bytes=kv_cache_bytes(model.config, PAGE_TOKENS, dtype=model.dtype, bits=config.kv_bits),
            room=max(usable(available.bytes - trunk - scratch), 0),
            experts=manifest.stored_bytes,
            has_snapshots=can_resume(model) and has_states(model),
        )
        return cls(trunk, kv, scratch, prefill_of(model, manifest, config, kernels, kv))

    @property
    def reserve(self) -> int:
        """Bytes for keys and values, scratch and prefill together."""
        return self.kv.nbytes + self.scratch + self.prefill.nbytes

    def room(self, available: Available) -> int:
        """Return how many bytes of ``available`` memory trunk, cache and scratch leave for experts and prefill."""
        return usable(available.bytes - self.trunk - self.kv.nbytes - self.scratch)

    def within(
        self,
        asked: Size | None,
        largest: int,
        available: Available,
        *,
        smallest: int = 0,
        share: Fraction = PREFILL_SHARE,
    ) -> Needs:
        """Return the needs with as many tokens computed together as ``available`` memory allows.

        Args:
            asked: bytes for experts, if the user gives bytes. If it is None or a share of memory, prompts get the
                larger of ``share`` and the least that they need (at most GIVEN_PREFILL_SHARE), and experts the rest.
            largest: bytes of all experts: never more are left for them.
            available: the free memory.
            smallest: least bytes for experts, unless ``asked`` says how many.
            share: part of the memory for the tokens that are computed together.
        """
        room = self.room(available)
        of_prompts = max(int(share * room), min(self.prefill.least_bytes, int(GIVEN_PREFILL_SHARE * room)))
        experts = max(room - of_prompts, smallest) if asked is None or asked.bytes is None else asked.bytes
        return replace(self, prefill=self.prefill.within(room - min(experts, largest)))


class ModelMemory:
    """Memory of a model: slots for experts, beside what it ``needs`` otherwise.

    ``needs`` is replaced by fewer tokens computed together if memory is short.
    """

    def __init__(self, manifest: Manifest, config: TierConfig, device: ComputeDevice, needs: Needs) -> None:
        self.needs = needs
        self._manifest = manifest
        self._config = config
        self._device = device
        self._smallest = smallest_budget(manifest)  # bytes of slots
        self._left = 0  # bytes that experts leave for a prompt

    def host_slots(self, available: Available) -> Mapping[str, int]:
        """Return the slots of a host tier of this process, by zarr array of the store.

        ``available`` is the free memory of the host. Raises BudgetError as ``budget_for`` does.
        """
        asked, reserve = self._config.ram, 0
        if not self._device.has_memory:
            self._compute_within(asked, available)
            reserve = self.needs.reserve
        budget = budget_for(
            asked,
            smallest=self._smallest,
            largest=self._manifest.stored_bytes,
            reserve=reserve,
            available=replace(available, bytes=max(available.bytes - self.needs.trunk, 0)),
        )
        return self._slots(budget, available)

    def device_slots(self, available: Available) -> Mapping[str, int]:
        """Return the slots of a device tier, by zarr array of the store.

        ``available`` is the memory of the device that is free once the trunk is loaded. Raises BudgetError as
        ``budget_for`` does.
        """
        asked = self._config.device_memory
        self._compute_within(asked, available)
        budget = budget_for(
            asked,
            smallest=self._smallest,
            largest=self._manifest.stored_bytes,
            reserve=self.needs.reserve,
            available=available,
            name="device_memory",
        )
        return self._slots(budget, available)

    def beside_daemon(self, available: Available) -> None:
        """Use all ``available`` memory for what is not experts, as those are in a daemon's memory."""
        self.needs = self.needs.within(None, 0, available)
        self._left = self.needs.room(available)

    @property
    def prefill(self) -> Prefill:
        """Tokens of a prompt that there is room for: with the slots, if the model can't divide a prompt."""
        prefill = self.needs.prefill
        return prefill if prefill.resumes else replace(prefill, tokens=prefill.longest(self._left))

    def _compute_within(self, asked: Size | None, available: Available) -> None:
        """Leave memory for the experts to which the user's option gives ``asked``."""
        share = PREFILL_SHARE if self._config.prefill_chunk is None else GIVEN_PREFILL_SHARE
        self.needs = self.needs.within(
            asked, self._manifest.stored_bytes, available, smallest=self._smallest, share=share
        )

    def _slots(self, budget: int, available: Available) -> Mapping[str, int]:
        self._left = self.needs.room(available) - budget
        return slots_for(self._manifest, budget)


def scratch_elements(manifest: Manifest, matrices: Iterable[RecordLayout], kernels: Kernels) -> int:
    """Return how many numbers the scratch memory for computing with experts and ``matrices`` has to hold.

    The scratch memory holds the largest matrix that has to be decoded, or what compiled code keeps between products for
    BATCH_OUTPUTS tokens. The latter is less than three times the inputs and outputs of the widest projection.
    """
    layouts = [*manifest.layouts.values()]
    decoded = [
        p.rows * p.columns for layout in (*layouts, *matrices) for p in layout.projections if not kernels.packs(layout)
    ]
    wide = [
        3 * BATCH_OUTPUTS * (p.rows + p.columns)
        for layout in layouts
        for p in layout.projections
        if kernels.packs(layout)
    ]
    return max(decoded + wide)


def kv_cache_bytes(
    config: Any, tokens: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16, *, bits: int = 16
) -> int:
    """Estimate the bytes of the KV caches of ``batch`` contexts of ``tokens`` each, from a transformers config.

    ``bits``: 8, or 16 for keys and values of ``dtype``. States of a constant size (``state_bytes``) are not counted.
    """
    text = config.get_text_config(decoder=True)
    layers = text.per_layer_config  # some models differ from layer to layer
    nbytes = 0
    for layer, layer_type in zip(layers, getattr(text, "layer_types", None) or [""] * len(layers), strict=True):
        if any(name in layer_type for name in NOTHING_PER_TOKEN):
            continue
        windowed = any(name in layer_type for name in WINDOWED)
        window = _first(layer, "sliding_window", "attention_chunk_size", default=tokens) if windowed else tokens
        numbers, rows = _per_token(layer)
        if layer_type == INDEXED:
            numbers, rows = numbers + _index_width(layer, dtype), rows + 1
        nbytes += min(tokens, window) * (numbers + SCALE_BYTES * rows if bits == 8 else numbers * dtype.itemsize)
    return batch * nbytes


def _per_token(layer: Any) -> tuple[int, int]:
    """Return how many numbers and how many rows of numbers a token has: keys and values of each head."""
    if latent := _first(layer, "kv_lora_rank"):
        return latent + _first(layer, "qk_rope_head_dim"), 2
    heads = _first(layer, "num_key_value_heads", "num_attention_heads", default=1)
    keys = _first(layer, "head_dim", default=layer.hidden_size // layer.num_attention_heads)
    return heads * (keys + _first(layer, "v_head_dim", default=keys)), 2 * heads


def _index_width(layer: Any, dtype: torch.dtype) -> int:
    """Return how many numbers of ``dtype`` a token's row in an index takes."""
    width = _first(layer, "index_head_dim", "indexer_head_dim")
    if hasattr(layer, "index_kpool"):  # glm5_next keeps a key, a gate, and whether the token is no padding
        return 2 * width + 1
    if layer.model_type.startswith("dots3_note"):  # it computes its index in float32
        return width * torch.float32.itemsize // dtype.itemsize
    return width


def _first(config: Any, *names: str, default: int = 0) -> int:
    """Return the first of a config's attributes ``names`` that is a positive integer; else ``default``."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return default
