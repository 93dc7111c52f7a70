"""The tiers of one model in this process, opened and closed together."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from moetier.tiers.budget import largest_budget, slots_for, smallest_budget
from moetier.tiers.device import DeviceTier
from moetier.tiers.errors import ConfigError
from moetier.tiers.folder import read_manifest, store_folder
from moetier.tiers.manifest import Manifest
from moetier.tiers.stats import TierStats
from moetier.tiers.stream import CudaDevice
from moetier.tiers.views import HostViews

from .choice import kernels_for
from .config import TierConfig
from .grouped import ROWS
from .kernels import Kernels
from .memory import Available, available_memory, budget_for
from .origin import Origin, open_origin
from .speculation import Speculation


class Tiers:
    """``model.tiers``. A context manager; closing is idempotent, and waits for the loads that have begun."""

    @classmethod
    def open(
        cls,
        folder: Path,
        config: TierConfig,
        device: torch.device,
        *,
        trunk: int = 0,
        cache: int = 0,
        width: int = 4,
        kernels: Kernels | None = None,
        largest: int = 0,
    ) -> Tiers:
        """Of a model directory, to be computed with on ``device``.

        Of the memory that seems free now, ``trunk`` bytes are taken, and ``cache`` bytes are left for what a context
        takes: keys, values and outputs. ``width`` bytes take the numbers that are computed with. ``kernels`` may be
        the trunk's, whose largest quantised matrix has ``largest`` weights. Raises StoreError, BudgetError when the
        budgets can't work, or DaemonError when a daemon that was asked for can't be used.
        """
        if config.device_memory is not None and device.type == "cpu":
            raise ConfigError(
                "On a CPU there is no device memory: experts are computed on in --ram.", "Give --ram alone."
            )
        manifest = read_manifest(store_folder(folder))
        budget_of = partial(budget_for, smallest=smallest_budget(manifest), largest=largest_budget(manifest))
        kernels = kernels or kernels_for(device, exact=config.exact)
        on_device = cache + max(_scratch_numbers(manifest, kernels), largest) * width

        def host_slots() -> Mapping[str, int]:
            free = available_memory()
            available = Available(max(free.bytes - trunk, 0), free.limiter)
            reserve = on_device if device.type == "cpu" else 0
            return slots_for(manifest, budget_of(config.ram, reserve=reserve, available=available))

        with contextlib.ExitStack() as undo:
            origin = open_origin(folder, manifest, config, host_slots)
            undo.callback(origin.close)
            source: HostViews | DeviceTier = HostViews(origin.host)
            if device.type == "cuda":
                there = Available(torch.cuda.mem_get_info(device)[0], str(device))
                budget = budget_of(config.device_memory, reserve=on_device, available=there, option="--device-memory")
                slots = slots_for(manifest, budget)
                source = DeviceTier(
                    origin.host,
                    manifest,
                    slots=slots,
                    device=CudaDevice(device),
                    promotes=config.speculate != "off",
                    policy=config.policy,
                    arrange=kernels.arrange,
                )
            tiers = cls(manifest, origin, source, kernels)
            undo.pop_all()
            return tiers

    def __init__(self, manifest: Manifest, origin: Origin, device: HostViews | DeviceTier, kernels: Kernels) -> None:
        self.manifest = manifest
        self.host = origin.host
        self.where = origin.where  # the experts come from
        self.learns = origin.learner is not None
        self.shares = origin.shares  # a function: what came from each daemon of another host, and from the store
        self.device = device
        self.kernels = kernels
        self.speculation: Speculation | None = None
        self.close_sources = partial(_close_sources, device, origin)  # refers to nothing of a model

    def stats(self) -> list[TierStats]:
        """Of each tier that holds records, from the lowest up."""
        return [self.host.stats(), *([self.device.stats()] if isinstance(self.device, DeviceTier) else [])]

    def snapshot(self) -> dict[str, Any]:
        """Counters by tier's name, as JSON takes them."""
        return {stats.name: stats.to_json() for stats in self.stats()}

    def close(self) -> None:
        if self.speculation is not None:
            self.speculation.detach()
        self.close_sources()

    def __enter__(self) -> Tiers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _close_sources(device: HostViews | DeviceTier, origin: Origin) -> None:
    device.close()
    origin.close()


def _scratch_numbers(manifest: Manifest, kernels: Kernels) -> int:
    """What computing with experts takes beside them: the largest projection, decoded; or what goes in and comes out of
    the widest, of as many tokens as go together."""
    layouts = manifest.layouts.values()
    decoded = [p.rows * p.columns for layout in layouts for p in layout.projections if not kernels.packs(layout)]
    wide = [2 * ROWS * (p.rows + p.columns) for layout in layouts for p in layout.projections if kernels.packs(layout)]
    return max(decoded + wide)
