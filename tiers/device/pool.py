"""The device's slots of one record geometry: their memory, and the events that order what is done with it."""

from __future__ import annotations

import torch

from moetier.tiers.cache.pool import SlotPool
from moetier.tiers.cache.quotas import plan_groups
from moetier.tiers.manifest import Manifest

from .stream import Event, Stream


class DevicePool(SlotPool):
    """The device's slots of one record geometry."""

    def __init__(self, manifest: Manifest, array: str, first: int, memory: torch.Tensor, order: str) -> None:
        """``memory`` [slots * slot_bytes] uint8, on the device."""
        layout = manifest.layouts[array]
        slots = memory.view(-1, layout.slot_bytes)
        groups = plan_groups(len(slots), manifest.members[array])
        super().__init__(len(slots), groups, first, layout.slot_bytes, order)
        self.layout = layout
        self.records = [slot[: layout.record_bytes] for slot in slots]
        self.copied: list[Event | None] = [None] * len(slots)  # the end of the copy into a slot
        self.used: list[dict[Stream, Event]] = [{} for _ in slots]  # the end of each stream's last use of a slot

    def clear(self) -> None:
        """The memory goes, or stays as long as a record of it is held."""
        self.records.clear()
