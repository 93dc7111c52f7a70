"""The tiers of one model in this process: store, host and device, opened and closed together."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from moetier.tiers.budget import largest_budget, slots_for, smallest_budget
from moetier.tiers.host import HostTier
from moetier.tiers.source import ExpertSource
from moetier.tiers.stats import TierStats
from moetier.tiers.store import ExpertStore
from moetier.tiers.views import HostViews

from .config import TierConfig
from .kernels import Kernels
from .memory import available_memory, host_budget


class Tiers:
    """``model.tiers``. A context manager; closing is idempotent, and waits for the loads that have begun."""

    @classmethod
    def open(cls, folder: Path, config: TierConfig, device: torch.device, *, reserve: int = 0) -> Tiers:
        """Of a model directory. ``reserve`` bytes of the memory that is free now are left for the KV cache.

        Raises StoreError, or BudgetError when the budgets can't work.
        """
        with contextlib.ExitStack() as undo:
            store = undo.enter_context(ExpertStore.open(folder))
            budget = host_budget(
                config.ram,
                smallest=smallest_budget(store.manifest),
                largest=largest_budget(store.manifest),
                reserve=reserve,
                available=available_memory(),
            )
            host = HostTier(store, slots=slots_for(store.manifest, budget))
            undo.callback(host.close)
            tiers = cls(store, host, HostViews(host), Kernels(device), device)
            undo.pop_all()
            return tiers

    def __init__(
        self,
        store: ExpertStore,
        host: HostTier,
        source: ExpertSource[Tensor],
        kernels: Kernels,
        device: torch.device,
    ) -> None:
        self.store = store
        self.host = host
        self.device = source
        self.kernels = kernels
        self.torch_device = device

    def stats(self) -> list[TierStats]:
        """Of each tier that counts, from the lowest up."""
        return [self.host.stats()]

    def snapshot(self) -> dict[str, Any]:
        """Counters by tier's name, as JSON takes them."""
        return {stats.name: stats.to_json() for stats in self.stats()}

    def close(self) -> None:
        self.device.close()
        self.host.close()
        self.store.close()

    def __enter__(self) -> Tiers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
