"""Cost model: what a token and a prompt cost on this machine, from its rates and from traces of real models. Pure.

A step of decoding reads what is missing at the disk's rate, then multiplies at the kernels' rate; Python and torch add
their operations around that. A block's demand waits for its records. A prompt's reads and products overlap.

Hit ratios come from bundled traces: ``tests/measurements/hit_curves.py`` makes ``hit_curves.json``. For another model
they are an estimate.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from moetier.tiers.layout import Bits
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.checksum import PIECE_BYTES
from moetier.tools.bench.bound import groups_of

FILE = "hit_curves.json"


@dataclass(frozen=True, slots=True)
class HitCurve:
    """Hit ratios of one trace's decoding, with ``shares`` of each block's experts cached, ascending to 1."""

    trace: str
    experts: int  # of a block
    top_k: int
    shares: tuple[float, ...]
    hit_ratios: tuple[float, ...]

    def at(self, share: float) -> float:
        """Return the hit ratio at a ``share``, interpolated; the curve begins at nothing."""
        if share >= 1:
            return 1.0
        low, below = 0.0, 0.0
        for high, above in zip(self.shares, self.hit_ratios, strict=True):
            if share <= high:
                return below + (above - below) * (share - low) / (high - low)
            low, below = high, above
        return below

    def distance(self, experts: int, top_k: int) -> float:
        """Return how many doublings of either number lie between the curve's blocks and one of so many."""
        return abs(math.log2(experts / self.experts)) + abs(math.log2(top_k / self.top_k))


@cache
def hit_curves() -> tuple[HitCurve, ...]:
    """Read the bundled curves."""
    found = json.loads((files(__package__) / FILE).read_text())
    return tuple(
        HitCurve(c["trace"], c["experts"], c["top_k"], tuple(c["shares"]), tuple(c["hit_ratios"]))
        for c in found["curves"]
    )


def nearest_curve(experts: int, top_k: int) -> HitCurve:
    """Return the curve of the blocks most like those of ``experts`` experts, ``top_k`` of them per token."""
    return min(hit_curves(), key=lambda curve: curve.distance(experts, top_k))


# What is done beside products and reads, in operations of torch on a few numbers (``probes.py`` times one), with Python
# around them. Fitted to what ``tests/measurements/plan.py`` measures.
STEP_OPERATIONS = 500.0  # of a token: embedding, masks, the head
LAYER_OPERATIONS = 800.0  # with attention and router
EXPERT_OPERATIONS = 100.0  # that a layer calls
MISS_OPERATIONS = 200.0  # of a record that is read: threads wait for each other
PASSING_OPERATIONS = 1000.0  # likewise, where a block has fewer slots than a prompt wants: little is read ahead
PROMPT_LAYER_OPERATIONS, PROMPT_EXPERT_OPERATIONS = 4000.0, 430.0  # of a prompt: rows are sorted and gathered
PROMPT_TOKENS = 512  # of a prompt whose rate is estimated
MEMORY_BOUND = 0.6  # of the time without the disk: reading memory


@dataclass(frozen=True, slots=True)
class DiskRate:
    """Bytes a second of random reads: with one in flight, and with as many as there are loaders."""

    one: float
    all: float
    loaders: int

    def at(self, reads: float) -> float:
        """Return the rate with so many ``reads`` in flight, interpolated."""
        share = (min(max(reads, 1.0), self.loaders) - 1) / max(self.loaders - 1, 1)
        return self.one + (self.all - self.one) * share


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates of this machine."""

    disk: DiskRate
    memory: float  # bytes a second
    one_row: Mapping[Bits, float]  # bytes a second of records, by bits: products of one row, as in decoding
    many_rows: Mapping[Bits, float]  # bytes times rows a second: products of many, as of a prompt
    plain: float  # bytes a second of matrices of 16 bits outside records, with one row
    operation: float  # seconds of an operation of torch on a few numbers

    def seconds(self, nbytes: float, bits: Bits, rows: float) -> float:
        """Return the seconds of products of ``rows`` rows with ``nbytes`` of records or matrices."""
        return max(nbytes / self.one_row[bits], nbytes * rows / self.many_rows[bits])


@dataclass(frozen=True, slots=True)
class Trunk:
    """Bytes that a token is multiplied with beside experts: of ``records`` of quantised matrices, and ``plain``."""

    bits: Bits
    records: int
    plain: int
    layers: int

    def seconds(self, rates: Rates, rows: float) -> float:
        """Return the seconds of products of ``rows`` rows with the trunk."""
        quantised = rates.seconds(self.records, self.bits, rows) if self.records else 0.0
        return quantised + max(self.plain / rates.plain, self.plain * rows / rates.many_rows[16])


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a step, or of a prompt."""

    disk: float
    kernels: float
    overhead: float
    memory: float  # of the kernels' part: what its bytes would take at the memory's rate
    overlaps: bool  # the disk with the rest

    @property
    def seconds(self) -> float:
        """Seconds in all; of the longer part where the two overlap."""
        computing = self.kernels + self.overhead
        return max(self.disk, computing) if self.overlaps else self.disk + computing

    @property
    def by(self) -> str:
        """What takes most of the time: "disk", "memory" or "compute"."""
        computing = self.kernels + self.overhead
        if self.disk > computing:
            return "disk"
        return "memory" if self.memory > MEMORY_BOUND * computing else "compute"

    def to_json(self) -> dict[str, Any]:
        """Return the parts, ``seconds`` and ``by`` as JSON."""
        return asdict(self) | {"seconds": self.seconds, "by": self.by}


@dataclass(frozen=True, slots=True)
class Caching:
    """Hit ratios that a number of slots gives, block by block."""

    slots: tuple[float, ...]  # of its own; 0 where it streams through slots that it shares
    hit_ratios: tuple[float, ...]
    curve: str  # the trace that they are from

    @classmethod
    def of(cls, manifest: Manifest, slots: Mapping[str, int]) -> Caching:
        """Estimate hit ratios from ``slots`` by array, divided as the host tier does it."""
        own = [0.0] * len(manifest.blocks)
        for group in groups_of(manifest, slots):
            if len(group.blocks) == 1:
                own[group.blocks[0]] = group.quota
        curves = [nearest_curve(block.experts, block.top_k) for block in manifest.blocks]
        ratios = [
            curve.at(count / block.experts) if count else 0.0
            for curve, count, block in zip(curves, own, manifest.blocks, strict=True)
        ]
        return cls(tuple(own), tuple(ratios), curves[0].trace)

    def mean(self, manifest: Manifest) -> float:
        """Return the mean hit ratio over the lookups of a token."""
        wanted = [block.top_k for block in manifest.blocks]
        return sum(k * hit for k, hit in zip(wanted, self.hit_ratios, strict=True)) / sum(wanted)


def token_cost(
    manifest: Manifest, bits: Bits, caching: Caching, trunk: Trunk, rates: Rates, cache_bytes: int
) -> tuple[Cost, float]:
    """Return the cost of a token, and the bytes that it reads.

    The keys and values of its context take ``cache_bytes``.
    """
    disk = missing = misses = experts = 0.0
    for number, block in enumerate(manifest.blocks):
        layout = manifest.layout(number)
        absent = block.top_k * (1 - caching.hit_ratios[number])
        pieces = -(-layout.slot_bytes // PIECE_BYTES)
        misses += absent
        missing += absent * layout.slot_bytes
        disk += absent * layout.slot_bytes / rates.disk.at(absent * pieces)
        experts += block.top_k * layout.payload_bytes
    calls = sum(block.top_k for block in manifest.blocks)
    operations = STEP_OPERATIONS + LAYER_OPERATIONS * trunk.layers + EXPERT_OPERATIONS * calls
    operations += MISS_OPERATIONS * misses
    attention = cache_bytes / rates.memory
    return Cost(
        disk=disk,
        kernels=rates.seconds(experts, bits, 1) + trunk.seconds(rates, 1) + attention,
        overhead=operations * rates.operation,
        memory=(experts + trunk.records + trunk.plain + cache_bytes) / rates.memory,
        overlaps=False,
    ), missing


def prompt_cost(manifest: Manifest, bits: Bits, caching: Caching, trunk: Trunk, rates: Rates) -> Cost:
    """Return the cost of the first prompt of a process, of PROMPT_TOKENS.

    Nothing is in memory, and all tokens are computed together. They are taken to choose experts evenly.
    """
    disk, kernels = 0.0, trunk.seconds(rates, PROMPT_TOKENS)
    memory = (trunk.records + trunk.plain) / rates.memory
    overhead = (STEP_OPERATIONS + PROMPT_LAYER_OPERATIONS * trunk.layers) * rates.operation
    for number, block in enumerate(manifest.blocks):
        layout = manifest.layout(number)
        wanted = block.experts * (1 - (1 - block.top_k / block.experts) ** PROMPT_TOKENS)
        disk += wanted * layout.slot_bytes / rates.disk.all
        kernels += rates.seconds(wanted * layout.payload_bytes, bits, PROMPT_TOKENS * block.top_k / wanted)
        miss = PASSING_OPERATIONS if wanted > caching.slots[number] else MISS_OPERATIONS
        overhead += (PROMPT_EXPERT_OPERATIONS + miss) * wanted * rates.operation
        memory += wanted * layout.payload_bytes / rates.memory
    return Cost(disk, kernels, overhead, memory, overlaps=True)
