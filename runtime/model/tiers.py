"""The tiers of one model in this process, opened and closed together."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from moetier.runtime.config import TierConfig
from moetier.runtime.kernels.api import Kernels
from moetier.runtime.kernels.choose import kernels_for
from moetier.runtime.memory import Available, available_memory
from moetier.runtime.moe.gates import Observation
from moetier.runtime.speculation.speculation import Speculation
from moetier.tiers.cache.budget import slots_for
from moetier.tiers.device.stream import CudaDevice
from moetier.tiers.device.tier import DeviceTier
from moetier.tiers.device.views import HostViews
from moetier.tiers.errors import ConfigError
from moetier.tiers.manifest import Manifest
from moetier.tiers.stats import TierStats
from moetier.tiers.store.folder import read_manifest, store_folder

from .budgets import Needs, scratch_numbers
from .sources import Origin, open_origin


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
                "On a CPU there is no device memory: experts are computed on in `ram`.", "Give `ram` alone."
            )
        manifest = read_manifest(store_folder(folder))
        kernels = kernels or kernels_for(device, exact=config.exact)
        needs = Needs(trunk, cache, scratch=max(scratch_numbers(manifest, kernels), largest) * width)

        def host_slots() -> Mapping[str, int]:
            return slots_for(manifest, needs.host_budget(manifest, config.ram, available_memory(), device))

        with contextlib.ExitStack() as undo:
            origin = open_origin(folder, manifest, config, host_slots)
            undo.callback(origin.close)
            source: HostViews | DeviceTier = HostViews(origin.host)
            if device.type == "cuda":
                there = Available(torch.cuda.mem_get_info(device)[0], str(device))
                slots = slots_for(manifest, needs.device_budget(manifest, config.device_memory, there))
                source = DeviceTier(
                    origin.host,
                    manifest,
                    slots=slots,
                    device=CudaDevice(device),
                    promotes=config.speculate != "off",
                    policy=config.policy,
                    arrange=kernels.arrange,
                )
                kernels.make_room = source.shrink
            tiers = cls(manifest, origin, source, kernels)
            undo.pop_all()
            return tiers

    def __init__(self, manifest: Manifest, origin: Origin, device: HostViews | DeviceTier, kernels: Kernels) -> None:
        self.manifest = manifest
        self.host = origin.host
        self.where = origin.where  # the experts come from
        self.daemon = origin.daemon  # the host tier, where it is a daemon's of this host; else None
        self.learns = origin.learner is not None
        self.shares = origin.shares  # a function: what came from each daemon of another host, and from the store
        self.device = device
        self.kernels = kernels
        self.speculation: Speculation | None = None
        self.hooks = Observation()  # on the model, besides those of the speculation
        self.close_sources = partial(_close_sources, device, origin)  # refers to nothing of a model

    def stats(self) -> list[TierStats]:
        """Of each tier that holds records, from the lowest up."""
        return [self.host.stats(), *([self.device.stats()] if isinstance(self.device, DeviceTier) else [])]

    def snapshot(self) -> dict[str, Any]:
        """Counters by tier's name, as JSON takes them: "host", or "daemon" where the experts are a daemon's; "device"
        with a GPU."""
        return {stats.name: stats.to_json() for stats in self.stats()}

    def close(self) -> None:
        if self.speculation is not None:
            self.speculation.detach()
        self.hooks.remove()
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
