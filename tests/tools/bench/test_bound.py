"""The bound of a step, against numbers that were worked out by hand."""

from __future__ import annotations

import pytest
from stores import make_plan
from two_layouts import two_layouts

from moetier.tiers.cache.budget import Partition
from moetier.tools.bench.bound import Bound, BoundRates, Need, misses_of, need_of, rows_of, verdict

GB = 10**9


def test_of_the_disk_and_the_kernels_the_slower_one_counts() -> None:
    rates = BoundRates(disk=2.0 * GB, experts=20.0 * GB, trunk=10.0 * GB, memory=40.0 * GB)
    bound = Bound.of(Need(missing=0.4 * GB, experts=0.8 * GB, trunk=0.2 * GB), rates)
    assert (bound.disk, bound.kernels, bound.memory) == pytest.approx((0.2, 0.04 + 0.02, 0.025))
    assert (bound.seconds, bound.by) == (pytest.approx(0.2), "disk")
    resident = Bound.of(Need(missing=0.0, experts=0.8 * GB, trunk=0.2 * GB), rates)
    assert (resident.seconds, resident.by) == (pytest.approx(0.06), "kernels")
    assert resident.to_json().keys() == {"disk", "kernels", "memory", "seconds", "by"}


@pytest.mark.parametrize(
    ("ratio", "by", "step_bytes", "missing", "said"),
    [
        (
            0.57,
            "kernels",
            GB,
            0,
            "57% of what the processor permits, which is normal: fewer --bits or another processor",
        ),
        (
            0.57,
            "kernels",
            GB,
            GB // 50,
            "57% of what the processor permits, which is normal: more --ram, fewer --bits or",
        ),
        (
            0.8,
            "disk",
            GB,
            GB // 5,
            "80% of what the disk permits, which is normal: more --ram, fewer --bits or a faster",
        ),
        (0.48, "kernels", GB, 0, "48% of what the processor permits, which is normal"),
        (0.446, "kernels", GB, 0, "45% of what the processor permits, which is normal"),
        (0.444, "kernels", GB, 0, "44% of what the processor permits, which is low"),
        (0.1, "kernels", 18 << 20, 0, "10% of what the processor permits. That is normal for so small a model"),
        (0.496, "kernels", 18 << 20, 0, "50% of what the processor permits, which is normal"),
        (0.3, "disk", GB, GB // 5, "30% of what the disk permits, which is low. End other programs"),
    ],
)
def test_a_sentence_says_whether_a_speed_is_good(
    ratio: float, by: str, step_bytes: float, missing: float, said: str
) -> None:
    assert verdict(ratio, by, step_bytes, missing).startswith(f"You reach {said}")


def test_misses_of_an_lru_by_hand() -> None:
    steps = [
        [[0, 1], [0]],  # all cold
        [[1, 2], [0]],  # 1 is there; 0 goes, as it is the older one
        [[0, 2], [1]],  # 2 is there; 1 goes
        [[0, 2], [0]],
    ]
    partitions = [Partition((0,), 2), Partition((1,), 1)]
    assert misses_of(steps, partitions, "lru") == [[2, 1], [1, 0], [1, 1], [0, 1]]
    # both blocks in one partition of two slots: what the second wants comes between
    assert misses_of(steps[:2], [Partition((0, 1), 2)], "lru") == [[2, 1], [2, 1]]


def test_bytes_of_a_step() -> None:
    """Three blocks, 4 experts each, top 2; of the two last steps."""
    plan = make_plan()
    size, payload = plan.layout(0).slot_bytes, plan.layout(0).payload_bytes
    routing = [[[0, 1]] * 3, [[0, 2], [0, 1], [3]], [[0, 1], [0, 1], [0, 1]]]
    need = need_of(plan, routing, 2, {"records": 6}, trunk=1000)
    # block 0: 2, and then 1, which made room for it; block 2: 3, and then 1, the older one, which went for it
    assert need.missing == (1 + 1 + 1 + 1) * size / 2
    assert need.experts == (2 + 2 + 1 + 2 + 2 + 2) * payload / 2
    assert need.trunk == 1000
    assert need_of(plan, routing, 1, {"records": 12}, trunk=0).missing == 0


def test_blocks_of_two_sizes_are_counted_in_their_own_bytes() -> None:
    plan = two_layouts()
    sizes = [plan.layout(block).slot_bytes for block in range(5)]
    assert sizes[0] > sizes[1]
    need = need_of(plan, [[[0]] * 5], 1, {"big": 8, "small": 12}, trunk=0)
    assert need.missing == sum(sizes)


def test_rows_that_an_expert_gets() -> None:
    plan = make_plan()  # top 2 in three blocks
    assert rows_of(plan, [[[0, 1]] * 3], 1, tokens=1) == 1
    assert rows_of(plan, [[[0, 1, 2, 3]] * 3], 1, tokens=64) == 32  # 64 tokens x 2, on 4 experts
