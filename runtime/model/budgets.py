"""What a model takes beside its experts, and what is left for them: by these functions it is loaded, and planned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from moetier.runtime.config import DEFAULT_CONTEXT, Size
from moetier.runtime.kernels.api import Kernels
from moetier.runtime.memory import Available, budget_for
from moetier.runtime.moe.experts import early_bytes, experts_modules
from moetier.runtime.moe.grouped import ROWS
from moetier.tiers.cache.budget import smallest_budget
from moetier.tiers.host.staging import staging_bytes
from moetier.tiers.layout import RecordLayout
from moetier.tiers.manifest import Manifest

from .kv_cache import kv_cache_bytes


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes beside the experts'. What is computed with on a GPU is there, and not on the host."""

    trunk: int  # of the memory that seems free now
    cache: int  # keys, values and outputs of a context
    scratch: int  # in which is computed

    @property
    def reserve(self) -> int:
        return self.cache + self.scratch

    def host_budget(self, manifest: Manifest, asked: Size | None, available: Available, device: torch.device) -> int:
        """Bytes for the host tier's slots of what is ``available`` on the host. Raises BudgetError when none works."""
        taken = self.trunk + staging_bytes(manifest)
        return budget_for(
            asked,
            smallest=smallest_budget(manifest),
            largest=manifest.stored_bytes,
            reserve=self.reserve if device.type == "cpu" else 0,
            available=Available(max(available.bytes - taken, 0), available.limiter),
        )

    def device_budget(self, manifest: Manifest, asked: Size | None, available: Available) -> int:
        """Bytes for the device tier of what is ``available`` on the device beside the trunk. Raises BudgetError."""
        return budget_for(
            asked,
            smallest=smallest_budget(manifest),
            largest=manifest.stored_bytes,
            reserve=self.reserve,
            available=available,
            name="device_memory",
        )


def context_bytes(model: Any, manifest: Manifest, tokens: int) -> int:
    """What a context of so many ``tokens`` takes: keys and values, and outputs that come early in a prefill of as many,
    but DEFAULT_CONTEXT at most; one block computes at a time."""
    modules = experts_modules(model)
    early = max(
        early_bytes(
            modules[block.path], manifest.layout(number), min(tokens, DEFAULT_CONTEXT), block.top_k, model.dtype
        )
        for number, block in enumerate(manifest.blocks)
    )
    return kv_cache_bytes(model.config, tokens, dtype=model.dtype) + early


def largest_decoded(matrices: Iterable[RecordLayout], kernels: Kernels) -> int:
    """Weights of the largest of the trunk's matrices that is decoded for each product."""
    return max((layout.weights for layout in matrices if not kernels.packs(layout)), default=0)


def scratch_numbers(manifest: Manifest, kernels: Kernels) -> int:
    """What computing with experts takes beside them: the largest projection, decoded; or what goes in and comes out of
    the widest, of as many tokens as go together."""
    layouts = manifest.layouts.values()
    decoded = [p.rows * p.columns for layout in layouts for p in layout.projections if not kernels.packs(layout)]
    wide = [2 * ROWS * (p.rows + p.columns) for layout in layouts for p in layout.projections if kernels.packs(layout)]
    return max(decoded + wide)
