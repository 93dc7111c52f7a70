"""Scans don't disturb a host tier with real slots and real loaders."""

from __future__ import annotations

import random
from functools import partial

import pytest
from integrity import check_integrity
from readers import RamReader
from stores import make_plan, make_records
from threads import run_all

from moetier.tiers.cache.policies import POLICIES
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey

PLAN = make_plan(blocks=2, experts=64, top_k=2)
RECORDS = make_records(PLAN)
SLOTS = {"records": 64}  # 32 for each block


def use(tier: HostTier, block: int, *experts: int) -> None:
    for lease in tier.acquire([ExpertKey(block, expert) for expert in experts]):
        assert bytes(lease.record) == RECORDS[lease.key]
    check_integrity(tier)


def hits(tier: HostTier, block: int, *experts: int) -> int:
    """Ask one by one, the latest first, so that asking evicts only keys that were asked for."""
    before = tier.stats().hits
    for expert in reversed(experts):
        use(tier, block, expert)
    return tier.stats().hits - before


@pytest.mark.parametrize(("policy", "least", "most"), [("lrfu", 28, 31), ("scan", 28, 31), ("lru", 0, 16)])
def test_what_a_prefill_leaves_of_what_decoding_had(policy: str, least: int, most: int) -> None:
    """32 records are cached, and a scan uses all 64. It may use an eighth of the slots."""
    cached = range(16, 48)
    with HostTier(RamReader(PLAN, RECORDS), slots=SLOTS, policy=policy) as tier:
        for block in range(2):
            for expert in cached:
                use(tier, block, expert)
        use(tier, 0, *range(64))
        assert least <= hits(tier, 0, *cached) <= most
        assert hits(tier, 1, *cached) == 32, "the other block is as it was"


@pytest.mark.parametrize("policy", ["scan", "lrfu"])
def test_what_passed_and_is_used_again_stays(policy: str) -> None:
    with HostTier(RamReader(PLAN, RECORDS), slots=SLOTS, policy=policy) as tier:
        use(tier, 0, *range(64))  # into an empty cache: the slots are taken
        use(tier, 0, 62, 63)
        use(tier, 0, *range(64))
        assert hits(tier, 0, 62, 63) == 2


@pytest.mark.parametrize("policy", POLICIES)
def test_all_that_a_demand_brings_is_used(policy: str) -> None:
    """Records that begin to load only after others have arrived stay before records that were used earlier."""
    with HostTier(RamReader(PLAN, RECORDS), slots=SLOTS, policy=policy) as tier:
        for expert in range(20, 32):
            use(tier, 0, expert)
        use(tier, 0, *range(20))
        for expert in range(40, 52):
            use(tier, 0, expert)
        assert hits(tier, 0, *range(20)) == 20


@pytest.mark.parametrize("policy", ["scan", "lrfu"])
def test_scans_and_decoding_at_once_all_end(policy: str) -> None:
    with HostTier(RamReader(PLAN, RECORDS), slots={"records": 6}, policy=policy) as tier:

        def caller(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(20):
                wanted = chance.sample(range(64), chance.choice([1, 2, 12]))
                use(tier, chance.randrange(2), *wanted)

        run_all([partial(caller, seed) for seed in range(5)])


def test_no_other_policy_is_taken() -> None:
    with pytest.raises(KeyError):
        HostTier(RamReader(PLAN, RECORDS), slots=SLOTS, policy="fifo")
