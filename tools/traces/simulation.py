"""Simulation of tiers on a trace: slots and eviction policies are those of ``moetier.tiers``; loads take no time."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import numpy as np

from moetier.runtime.trace.trace import NO_EXPERT, Trace
from moetier.tiers.cache.budget import Partition, partitions_of
from moetier.tiers.cache.policies import DEFAULT_POLICY, POLICIES, Policy
from moetier.tiers.cache.pool import SlotPool
from moetier.tiers.host.warmup import HotSet
from moetier.tiers.layout import ExpertKey, PoolSlot
from moetier.tiers.manifest import Manifest

SIMULATED = (*POLICIES, "learned", "belady")  # the policies of real tiers, and two for comparison
AHEAD = 8  # loads that a host tier of four loaders has in flight for one caller


@dataclass(frozen=True, slots=True)
class SimulatedDemand:
    """Experts that one forward pass needs in one block, for a whole prompt or for one token."""

    keys: tuple[ExpertKey, ...]  # ascending, the order in which the model demands them
    is_prompt: bool


@dataclass(slots=True)
class Count:
    """Number of hits and of lookups. All experts of a demand are looked up before any of them is loaded."""

    hits: int = 0
    lookups: int = 0

    @property
    def misses(self) -> int:
        """Lookups that did not hit."""
        return self.lookups - self.hits

    @property
    def hit_ratio(self) -> float:
        """Share of lookups that hit; 0 without lookups."""
        return self.hits / self.lookups if self.lookups else 0.0

    def add(self, keys: Sequence[ExpertKey], missing: Sequence[ExpertKey]) -> None:
        """Count the lookups of one demand, of which ``missing`` missed."""
        self.hits += len(keys) - len(missing)
        self.lookups += len(keys)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one policy, with ``slots`` slots a block, all of them empty when a sequence begins."""

    policy: str
    slots: int
    tokens: int  # number of decoded tokens
    decoding: Count
    prompts: Count
    device: Count  # of the device tier above, in decoding; no lookups if there is no device tier
    preloads: int  # loads before the sequences begin, of the experts used most until then (policy "learned")


class Clairvoyant:
    """Policy that evicts the key whose next use is furthest in the future. No policy hits more often (Belady 1966)."""

    summary: ClassVar[str] = "the one whose next use is furthest in the future"

    def __init__(self, uses: Mapping[ExpertKey, Sequence[int]]) -> None:
        """Make the policy. ``uses``: the times at which each key is used, in ascending order."""
        self.now = 0  # the current time, which the simulation sets before each demand
        self._uses = uses
        self._next: dict[ExpertKey, float] = {}

    def __len__(self) -> int:
        return len(self._next)

    def __iter__(self) -> Iterator[ExpertKey]:
        return iter(self._next)

    def victims(self, *, is_scan: bool) -> Iterator[ExpertKey]:
        """Return all keys, those with the furthest next use first."""
        return iter(sorted(self._next, key=self._next.__getitem__, reverse=True))

    def scanned(self) -> Iterator[ExpertKey]:
        """Yield nothing, as scans are treated like other demands."""
        return iter(())

    def add(self, key: ExpertKey, *, is_scan: bool) -> None:
        """Add a key, and note its next use."""
        self._next[key] = self.next_use(key)

    def touch(self, key: ExpertKey, *, is_scan: bool) -> None:
        """Update the key's next use."""
        self._next[key] = self.next_use(key)

    def demote(self, key: ExpertKey) -> None:
        """Do nothing: only future uses decide."""

    def remove(self, key: ExpertKey) -> None:
        """Remove a key that is evicted."""
        del self._next[key]

    def next_use(self, key: ExpertKey) -> float:
        """Return the time of the key's next use after ``now``; infinite if there is none."""
        times = self._uses.get(key, ())
        later = bisect_right(times, self.now)
        return times[later] if later < len(times) else inf


class SimulatedTier:
    """Tier whose loads take no time, with slots for one block, or for several blocks in partitions."""

    def __init__(self, partitions: Sequence[Partition], make_policy: Callable[[int], Policy]) -> None:
        self._pool = SlotPool(partitions, make_policy)

    @classmethod
    def of_block(cls, block: int, quota: int, make_policy: Callable[[int], Policy]) -> SimulatedTier:
        """Make a tier of ``quota`` slots for one block."""
        return cls([Partition((block,), quota)], make_policy)

    def demand(
        self, keys: Sequence[ExpertKey], *, is_prompt: bool = False, kept: Collection[ExpertKey] = ()
    ) -> list[ExpertKey]:
        """Load those of ``keys`` that are missing, and return them. All ``keys`` are of one block.

        The first key is evicted last. A prompt that demands more keys than the block has slots is treated as a scan, as
        in a host tier. Keys in ``kept`` are then touched as by an ordinary demand.
        """
        missing = [key for key in keys if self._pool.slot_of(key) is None]
        if is_prompt and self._pool.partitions.is_scan(keys[0].block, len(keys)):
            self._stream(keys, missing, kept)
        else:
            for key in reversed(keys):
                if self._pool.slot_of(key) is None:
                    self._load(key, keys)
                self._pool.partitions.touch((key,))
        return missing

    def preload(self, keys: Sequence[ExpertKey]) -> int:
        """Load ``keys`` into EMPTY slots, before any demand, and return the number of keys."""
        for key in reversed(keys):
            self._load(key, keys)
        return len(keys)

    @property
    def resident(self) -> list[ExpertKey]:
        """Keys in slots that are READY."""
        return self._pool.keys

    def _load(self, key: ExpertKey, keep: Sequence[ExpertKey]) -> None:
        slot = self._pool.choose(key.block, keep=keep.__contains__)
        if slot is None:  # fewer slots than one token needs
            slot = self._pool.choose(key.block)
        assert slot is not None
        self._fill(slot, key, is_scan=False)

    def _stream(self, keys: Sequence[ExpertKey], missing: Sequence[ExpertKey], kept: Collection[ExpertKey]) -> None:
        """Use resident experts first, as a host tier does. Load each other one up to AHEAD loads before it is used."""
        resident = [key for key in keys if key not in set(missing)]
        self._pool.partitions.touch(reversed(resident), is_scan=True)
        self._pool.partitions.touch([key for key in resident if key in kept])
        waiting = deque(map(self._slot, resident))
        for slot in waiting:
            self._pool.pin(slot)
        loaded: deque[PoolSlot] = deque()
        for key in missing:
            if len(loaded) == AHEAD:
                while waiting:
                    self._pool.unpin(waiting.popleft())
                self._pool.unpin(loaded.popleft())
            while (chosen := self._pool.choose(key.block, is_scan=True)) is None:
                self._pool.unpin((waiting or loaded).popleft())
            self._fill(chosen, key, is_scan=True)
            if key in kept:
                self._pool.partitions.touch((key,))
            self._pool.pin(chosen)
            loaded.append(chosen)
        for slot in (*waiting, *loaded):
            self._pool.unpin(slot)

    def _fill(self, slot: PoolSlot, key: ExpertKey, *, is_scan: bool) -> None:
        self._pool.begin_fill(slot, key, is_scan=is_scan)
        self._pool.complete_fill(slot)

    def _slot(self, key: ExpertKey) -> PoolSlot:
        slot = self._pool.slot_of(key)
        assert slot is not None
        return slot


def all_partitions(manifest: Manifest, slots: Mapping[str, int]) -> list[Partition]:
    """Divide slots among blocks as the host tier does.

    ``slots``: number of slots for each zarr array of the store; an array has the blocks whose records have one layout.
    """
    return [partition for array, count in slots.items() for partition in partitions_of(count, manifest.members[array])]


def demands_of(trace: Trace, sequence: int, block: int) -> list[SimulatedDemand]:
    """Return the demands of a sequence on a block, in order; a prompt is one demand."""
    span = trace.sequences[sequence]
    prompt = trace.n_prefill[sequence] if trace.n_prefill else 0
    demands = [SimulatedDemand(_keys(block, trace.experts[span.start : span.start + prompt, block]), is_prompt=True)]
    demands += [SimulatedDemand(_keys(block, trace.experts[token, block]), is_prompt=False) for token in span[prompt:]]
    return [demand for demand in demands if demand.keys]


def simulate(trace: Trace, policy: str, slots: int, *, device_slots: int = 0) -> Outcome:
    """Simulate one policy on a trace, with ``slots`` slots for each block.

    ``device_slots``: slots for each block in a device tier above the simulated tier; 0 for no device tier. The misses
    of the device tier are then the demands on the simulated tier. The device tier evicts by ``policy`` if that is one
    of ``POLICIES``, or else by the default policy.
    """
    decoding, prompts, device, preloads = Count(), Count(), Count(), 0
    for block, experts in enumerate(trace.num_experts):
        quota = min(slots, experts)
        hot_set = HotSet()
        for sequence in range(len(trace.sequences)):
            demands = demands_of(trace, sequence, block)
            if device_slots:
                above = SimulatedTier.of_block(
                    block, min(device_slots, experts), POLICIES[policy if policy in POLICIES else DEFAULT_POLICY]
                )
                demands = _missed(above, demands, device)
            if policy == "belady":
                missed = _foresee(block, quota, demands)
            else:
                tier = SimulatedTier.of_block(block, quota, POLICIES["lru" if policy == "learned" else policy])
                if policy == "learned":
                    preloads += tier.preload(hot_set.hottest(block, quota))
                    used = HotSet()
                    for demand in demands:
                        used.add(demand.keys)
                    hot_set = used.plus_decayed(hot_set, {block: experts})
                missed = [tier.demand(demand.keys, is_prompt=demand.is_prompt) for demand in demands]
            for demand, missing in zip(demands, missed, strict=True):
                (prompts if demand.is_prompt else decoding).add(demand.keys, missing)
    return Outcome(policy, slots, trace.tokens - sum(trace.n_prefill), decoding, prompts, device, preloads)


def _missed(tier: SimulatedTier, demands: Sequence[SimulatedDemand], count: Count) -> list[SimulatedDemand]:
    """Apply ``demands`` to ``tier``, and return its misses, which are the demands on the tier below.

    The keys demanded in decoding, and those of them that missed, are added to ``count``.
    """
    below = []
    for demand in demands:
        missing = tier.demand(demand.keys, is_prompt=demand.is_prompt)
        if not demand.is_prompt:
            count.add(demand.keys, missing)
        if missing:
            below.append(SimulatedDemand(tuple(missing), demand.is_prompt))
    return below


def _foresee(block: int, quota: int, demands: Sequence[SimulatedDemand]) -> list[list[ExpertKey]]:
    """Return the misses of each demand with the policy ``Clairvoyant``."""
    uses: dict[ExpertKey, list[int]] = {}
    for now, demand in enumerate(demands):
        for key in demand.keys:
            uses.setdefault(key, []).append(now)
    policy = Clairvoyant(uses)
    tier = SimulatedTier.of_block(block, quota, lambda quota: policy)
    missed = []
    for policy.now, demand in enumerate(demands):
        # if there are not slots for all keys of a prompt, those that are used again soonest must be loaded last
        keys = sorted(demand.keys, key=policy.next_use, reverse=demand.is_prompt)
        missed.append(tier.demand(keys, is_prompt=demand.is_prompt))
    return missed


def _keys(block: int, experts: object) -> tuple[ExpertKey, ...]:
    return tuple(ExpertKey(block, int(expert)) for expert in np.unique(np.asarray(experts)) if expert != NO_EXPERT)
