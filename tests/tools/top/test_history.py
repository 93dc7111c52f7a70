"""The history of a daemon's statistics: changes by the second, and a daemon that was replaced."""

from __future__ import annotations

import pytest
from replies import EIGHT, SEVEN, block, reply

from moetier.proto import expert_store_pb2 as pb
from moetier.tools.top.history import History


def test_changes_are_by_the_second_and_another_daemon_begins_anew() -> None:
    history = History()
    history.add(
        SEVEN,
        reply(10, pb.Tier(hits=10, misses=2), block(2, uses={0: 8}), clients=[pb.Client(number=1, reported_hits=10)]),
    )
    assert history.models["1"].last is None
    now = pb.Tier(hits=40, misses=12, joined=4, prefetched=5, warmed=1, bytes_in=64, evictions=3, wait_seconds=0.5)
    clients = [pb.Client(number=1, reported_hits=30, requested=8), pb.Client(number=2, requested=4)]
    history.add(SEVEN, reply(12, now, block(2, uses={0: 12}), clients=clients))
    model = history.models["1"]
    change = model.last
    assert change is not None
    assert (change.hits, change.misses, change.hit_ratio) == (15, 5, 0.75)
    assert (change.reads, change.bytes_read, change.evictions, change.waiting) == (6, 32, 1.5, 0.25)
    assert model.rates == {1: (10, 4), 2: (0, 2)}
    assert model.lately == [[4, 0]]
    history.add(SEVEN, reply(42, now, block(2, uses={0: 12})))
    assert history.models["1"].lately == [[2, 0]]
    assert history.models["1"].changes[-1].hit_ratio is None
    history.add(EIGHT, reply(43, pb.Tier(hits=1), block(2)))  # at the same address
    assert not history.models["1"].changes
    history.add(EIGHT, reply(1, pb.Tier(), block(2)))  # of the same number, in another namespace
    assert not history.models["1"].changes


@pytest.mark.parametrize(
    ("described", "host", "uses"),
    [
        (pb.DescribeReply(pid=7, version="1", started_unix_ms=5), pb.Tier(hits=12), {0: 8}),
        (SEVEN, pb.Tier(hits=9), {0: 8}),
        (SEVEN, pb.Tier(hits=12), {0: 7}),
    ],
    ids=["started later", "fewer hits", "fewer uses"],
)
def test_another_daemon_of_the_same_number_begins_anew(
    described: pb.DescribeReply, host: pb.Tier, uses: dict[int, int]
) -> None:
    history = History()
    history.add(SEVEN, reply(10, pb.Tier(hits=10), block(2, uses={0: 8})))
    history.add(SEVEN, reply(11, pb.Tier(hits=10), block(2, uses={0: 8})))
    assert len(history.models["1"].changes) == 1
    history.add(described, reply(12, host, block(2, uses=uses)))
    model = history.models["1"]
    assert (list(model.changes), model.lately, model.stats.host) == ([], [], host)
