"""A daemon's client counts how its demands were met, and reports the counts to the daemon."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from moetier.runtime.client.daemon_link import Link
from moetier.runtime.client.uses import ClientUses
from moetier.tiers.layout import ExpertKey


class Sent:
    """In place of the link to a daemon: keeps what is sent."""

    def __init__(self) -> None:
        self.used: list[ExpertKey] = []
        self.requested: list[tuple[int, list[int]]] = []

    def report_uses(self, keys: Iterable[ExpertKey]) -> None:
        self.used += keys

    def prefetch(self, block: int, experts: Sequence[int]) -> None:
        self.requested.append((block, [*experts]))


def uses_with(sent: Sent) -> ClientUses:
    return ClientUses(cast("Link", sent))


def counted(uses: ClientUses) -> tuple[int, int]:
    stats = uses.stats(slots=4, ready=2, memory_bytes=1)
    return stats.hits, stats.misses


def test_a_demand_is_counted_and_its_hits_are_reported_the_first_last() -> None:
    uses = uses_with(sent := Sent())
    uses.note_demand(0, [ExpertKey(0, 1), ExpertKey(0, 2)], [ExpertKey(0, 3)])
    assert sent.used == [ExpertKey(0, 2), ExpertKey(0, 1)]
    assert counted(uses) == (2, 1)
    uses.note_lost(1)
    assert counted(uses) == (2, 2), "a counter never falls: the hit was discarded, and the request is a miss"
    uses.note_found(0, [5, 5])
    uses.note_discarded(0, [5])
    assert counted(uses) == (3, 2)
    uses.touch(0, [1])
    assert counted(uses) == (3, 2)
    assert uses.stats(slots=4, ready=2, memory_bytes=1).discarded == 2
    assert sent.used[2:] == [ExpertKey(0, 5), ExpertKey(0, 1)]


def test_a_copy_is_reported_once_after_it_was_made() -> None:
    uses, key, failed = uses_with(sent := Sent()), ExpertKey(0, 1), ExpertKey(0, 2)
    uses.note_copy(key)
    uses.note_copy(failed)
    uses.forget_copy(failed)
    for _ in range(2):
        uses.note_copies([key, failed])
    assert sent.used == [key]
    uses.note_copy(key)
    uses.note_demand(0, [], [key])
    uses.note_copies([key])
    assert sent.used == [key], "its request has told the daemon"


def test_requests_of_a_block_end_with_its_demand() -> None:
    uses = uses_with(sent := Sent())
    uses.prefetch(0, [], is_needed=False)
    assert sent.requested == []
    uses.prefetch(0, [1, 2], is_needed=True)
    uses.note_demand(0, [ExpertKey(0, 1)], [], is_part=True)
    assert sent.requested == [(0, [1, 2])]
    uses.note_demand(0, [ExpertKey(0, 2)], [])
    uses.note_demand(0, [ExpertKey(0, 2)], [])
    assert sent.requested == [(0, [1, 2]), (0, [])]
    uses.prefetch(0, [3], is_needed=True)
    uses.note_demand(0, [], [ExpertKey(0, 4)])
    assert sent.requested[2:] == [(0, [3])], "the request of the miss ends it"
    uses.prefetch(0, [3], is_needed=True)
    uses.prefetch(0, [], is_needed=False)
    assert sent.requested[3:] == [(0, [3]), (0, [])]
