"""A store in memory for tests of host tiers, and a caller that checks what it gets."""

from __future__ import annotations

from integrity import check_integrity
from stores import keys, make_plan, make_records

from moetier.tiers.cache.budget import slots_for, smallest_budget
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey

PLAN = make_plan(blocks=3, experts=4, top_k=2)
RECORDS = make_records(PLAN)  # no two alike
SMALLEST = slots_for(PLAN, smallest_budget(PLAN))


def take(tier: HostTier, block: int, *experts: int) -> list[ExpertKey]:
    """Acquires and checks; the keys in order of arrival."""
    arrived = []
    for lease in tier.acquire(keys(block, *experts)):
        assert bytes(lease.record) == RECORDS[lease.key]
        check_integrity(tier)
        arrived.append(lease.key)
    return arrived
