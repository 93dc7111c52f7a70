"""Least time of a step, computed from rates that were measured on the same machine. Pure functions.

No engine that reads missing experts from the disk and multiplies with these kernels can be faster than this:

seconds = max(bytes missing from the cache / disk rate, bytes of the weights that are used / kernel rate)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moetier.tiers.cache.budget import Partition
from moetier.tiers.cache.policies import DEFAULT_POLICY, POLICIES
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tools.traces.simulation import SimulatedTier, all_partitions

Routing = Sequence[Sequence[Collection[int]]]  # [steps][blocks]: the experts that the routers choose


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that a step reads and multiplies with, on average over the measured steps."""

    missing: float  # of records that are not in the cache and must be read from the disk
    experts: float  # of the records of all chosen experts
    trunk: float


@dataclass(frozen=True, slots=True)
class BoundRates:
    """Rates of this machine, in bytes a second."""

    disk: float
    experts: float  # of kernels on expert records, with as many rows as an expert gets in a step
    trunk: float  # of the same kernels, with as many rows as the trunk gets in a step
    memory: float  # of plain reads of memory


@dataclass(frozen=True, slots=True)
class Bound:
    """Least seconds of a step, by part."""

    disk: float
    kernels: float
    memory: float  # what ``kernels`` would be if only the rate of memory limited it

    @classmethod
    def of(cls, need: Need, rates: BoundRates) -> Bound:
        """Return the least seconds of each part: bytes, divided by bytes per second."""
        return cls(
            disk=need.missing / rates.disk,
            kernels=need.experts / rates.experts + need.trunk / rates.trunk,
            memory=(need.experts + need.trunk) / rates.memory,
        )

    @property
    def seconds(self) -> float:
        """Least seconds of a step. Reads and products can overlap, so only the longer part counts."""
        return max(self.disk, self.kernels)

    @property
    def by(self) -> str:
        """Part that bounds the step: "disk" or "kernels"."""
        return "disk" if self.disk > self.kernels else "kernels"

    def to_json(self) -> dict[str, Any]:
        """Return the parts, ``seconds`` and ``by`` as JSON."""
        return asdict(self) | {"seconds": self.seconds, "by": self.by}


NEAR = 45  # percent of the bound that large models reach or exceed; they are said to reach about half
SMALL_BYTES = 64 << 20  # of weights in a step; with fewer, small operations take most of the time
FEW = 0.01  # of a step's bytes; if fewer are read from the disk, more memory would hardly be faster


def verdict(ratio: float, by: str, step_bytes: float, missing: float) -> str:
    """Return a sentence that says whether a speed is near its bound, and what would raise it.

    Args:
        ratio: the speed, divided by the bound.
        by: part that bounds the step, as in ``Bound.by``.
        step_bytes: bytes of the weights that a step is multiplied with.
        missing: bytes that a step reads from the disk, as in ``Need``. Reads and products overlap only in part.
    """
    what = "the disk" if by == "disk" else "the processor"
    percent = round(100 * ratio)
    said = f"You reach {percent}% of what {what} permits"
    if percent >= NEAR:
        ways = ["more --ram"] if by == "disk" or missing >= FEW * step_bytes else []
        ways += ["fewer --bits or " + ("a faster disk" if by == "disk" else "another processor")]
        return f"{said}, which is normal: {', '.join(ways)} would be faster."
    if step_bytes < SMALL_BYTES:
        return (
            f"{said}. That is normal for so small a model: small operations take the time. Large ones reach about half."
        )
    return f"{said}, which is low. End other programs, or set --threads to the free cores; run moetier doctor DIR."


def misses_of(routing: Routing, partitions: Sequence[Partition], policy: str = DEFAULT_POLICY) -> list[list[int]]:
    """Return how many experts a simulated cache must load: [steps][blocks].

    ``partitions``: the slots of the cache, divided among blocks. The cache is empty at the start and evicts by
    ``policy``, one of ``POLICIES``. All experts of a step and block are looked up before any of them is loaded. A step
    of many tokens is not treated as a scan.
    """
    tier = SimulatedTier(partitions, POLICIES[policy])
    return [
        [
            len(tier.demand([ExpertKey(block, expert) for expert in sorted(set(experts))]))
            for block, experts in enumerate(step)
        ]
        for step in routing
    ]


def need_of(manifest: Manifest, routing: Routing, measured: int, slots: Mapping[str, int], trunk: float) -> Need:
    """Return the mean bytes that a step of ``routing`` reads and multiplies with.

    Args:
        manifest: the manifest of the store.
        routing: the experts that the routers choose.
        measured: number of steps at the end of ``routing`` over which the mean is taken. Earlier steps fill the cache.
        slots: slots of the cache by zarr array.
        trunk: bytes of the trunk that a step multiplies with.
    """
    sizes = [manifest.layout(block).slot_bytes for block in range(len(manifest.blocks))]
    payloads = [manifest.layout(block).payload_bytes for block in range(len(manifest.blocks))]
    misses = misses_of(routing, all_partitions(manifest, slots))[-measured:]
    used = [[len(set(experts)) for experts in step] for step in routing[-measured:]]

    def mean(counts: list[list[int]], sizes: list[int]) -> float:
        return sum(count * size for step in counts for count, size in zip(step, sizes, strict=True)) / len(counts)

    return Need(missing=mean(misses, sizes), experts=mean(used, payloads), trunk=trunk)


def rows_of(manifest: Manifest, routing: Routing, measured: int, tokens: int) -> int:
    """Return the mean number of rows that are multiplied with a chosen expert, rounded.

    The mean is over the last ``measured`` steps of ``routing``, which have ``tokens`` tokens each.
    """
    rows = measured * tokens * sum(block.top_k for block in manifest.blocks)
    used = sum(len(set(experts)) for step in routing[-measured:] for experts in step)
    return max(1, round(rows / used))
