"""Computations with the device tier's records, which note the bytes that they saw when they were done."""

from __future__ import annotations

import random
from functools import partial

import torch
from fake_device import FakeDevice
from integrity import check_integrity
from stores import keys, make_plan, make_records

from moetier.tiers.cache.budget import slots_for, smallest_budget
from moetier.tiers.device.tier import DeviceTier
from moetier.tiers.layout import ExpertKey
from moetier.tiers.source import Lease

PLAN = make_plan(blocks=3, experts=4, top_k=2)
RECORDS = make_records(PLAN)
SMALLEST = slots_for(PLAN, smallest_budget(PLAN))


class Consumer:
    """Queues a computation on each lease, which notes the bytes that it saw when it was done."""

    def __init__(self, tier: DeviceTier, device: FakeDevice) -> None:
        self.tier = tier
        self.device = device
        self.seen: list[tuple[ExpertKey, bytes]] = []

    def run(self, block: int, experts: list[int]) -> None:
        for lease in self.tier.acquire(keys(block, *experts)):
            self.device.compute(partial(self.look, lease))
            check_integrity(self.tier)

    def look(self, lease: Lease[torch.Tensor]) -> None:
        self.seen.append((lease.key, record_bytes(lease.record)))

    def wrong(self) -> int:
        self.device.finish()
        return sum(data != RECORDS[key] for key, data in self.seen)


def record_bytes(record: torch.Tensor) -> bytes:
    return record.cpu().numpy().tobytes()


def device_of(seed: int = 0, **options: object) -> FakeDevice:
    return FakeDevice(random.Random(seed), **options)  # type: ignore[arg-type]
