"""Bound of a step, which no engine of this kind can beat, from rates measured beside it. Pure.

seconds = max(bytes that are missing / the disk's rate, bytes that are multiplied with / the kernels' own rate)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moetier.tiers.cache.budget import Group, plan_groups
from moetier.tiers.cache.orders import DEFAULT_ORDER, ORDERS
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tools.lab.simulation import SimulatedTier

Routing = Sequence[Sequence[Collection[int]]]  # by step and block: the experts that are wanted


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of a step, on average over the measured ones."""

    missing: float  # to be read from the disk
    experts: float  # records that are multiplied with, each once
    trunk: float


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates of this machine, in bytes a second."""

    disk: float
    experts: float  # the kernels', on records, with as many rows as an expert gets
    trunk: float  # the same with as many rows as the trunk gets
    memory: float


@dataclass(frozen=True, slots=True)
class Bound:
    """Least seconds of a step."""

    disk: float
    kernels: float
    memory: float  # what the kernels' part would be at the memory's rate

    @classmethod
    def of(cls, need: Need, rates: Rates) -> Bound:
        """Divide the bytes of a step by the rates that they are read or multiplied at."""
        return cls(
            disk=need.missing / rates.disk,
            kernels=need.experts / rates.experts + need.trunk / rates.trunk,
            memory=(need.experts + need.trunk) / rates.memory,
        )

    @property
    def seconds(self) -> float:
        """Least seconds of a step: reads and products overlap."""
        return max(self.disk, self.kernels)

    @property
    def by(self) -> str:
        """Part that bounds the step: "disk" or "kernels"."""
        return "disk" if self.disk > self.kernels else "kernels"

    def to_json(self) -> dict[str, Any]:
        """Return the parts, ``seconds`` and ``by`` as JSON."""
        return asdict(self) | {"seconds": self.seconds, "by": self.by}


def misses_of(routing: Routing, groups: Sequence[Group], policy: str = DEFAULT_ORDER) -> list[list[int]]:
    """Count the experts that a cache lacks, by step and block.

    It evicts by ``policy``, one of ``ORDERS``, and is cold at the start. Each expert is looked up against the state
    before its step, in its block's group. A scan is a demand like any other here.
    """
    tier = SimulatedTier(groups, ORDERS[policy])
    return [
        [
            len(tier.demand([ExpertKey(block, expert) for expert in sorted(set(experts))]))
            for block, experts in enumerate(step)
        ]
        for step in routing
    ]


def groups_of(manifest: Manifest, slots: Mapping[str, int]) -> list[Group]:
    """Divide the slots of each array among its blocks, as the host tier does it."""
    return [group for array, count in slots.items() for group in plan_groups(count, manifest.members[array])]


def need_of(manifest: Manifest, routing: Routing, measured: int, slots: Mapping[str, int], trunk: float) -> Need:
    """Return the bytes of the last ``measured`` steps of ``routing``, with ``slots`` by array."""
    sizes = [manifest.layout(block).slot_bytes for block in range(len(manifest.blocks))]
    payloads = [manifest.layout(block).payload_bytes for block in range(len(manifest.blocks))]
    misses = misses_of(routing, groups_of(manifest, slots))[-measured:]
    wanted = [[len(set(experts)) for experts in step] for step in routing[-measured:]]

    def mean(counts: list[list[int]], each: list[int]) -> float:
        return sum(count * size for step in counts for count, size in zip(step, each, strict=True)) / len(counts)

    return Need(missing=mean(misses, sizes), experts=mean(wanted, payloads), trunk=trunk)


def rows_of(manifest: Manifest, routing: Routing, measured: int, tokens: int) -> int:
    """Return how many of a step's ``tokens`` rows a wanted expert gets, on average over the measured steps."""
    rows = measured * tokens * sum(block.top_k for block in manifest.blocks)
    wanted = sum(len(set(experts)) for step in routing[-measured:] for experts in step)
    return max(1, round(rows / wanted))
