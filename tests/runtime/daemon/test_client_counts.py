"""Counts of clients: each event is counted once, and in the sum also after its client has gone."""

from __future__ import annotations

from moetier.runtime.daemon.client_counts import ClientCounts, StreamCounts


def test_the_sum_is_that_of_all_clients_and_stays_when_one_goes() -> None:
    counts = ClientCounts()
    for client in (1, 2):
        counts.register(client)
        counts.count(client, reported_hits=client, bytes_in=10)
    assert (counts.of(1), counts.of(2)) == (
        StreamCounts(reported_hits=1, bytes_in=10),
        StreamCounts(reported_hits=2, bytes_in=10),
    )
    assert counts.sum() == StreamCounts(reported_hits=3, bytes_in=20)
    counts.unregister(1)
    assert counts.of(1) == StreamCounts()
    assert counts.sum() == StreamCounts(reported_hits=3, bytes_in=20)


def test_what_a_stream_counts_while_its_client_goes_is_not_lost() -> None:
    counts = ClientCounts()
    counts.register(1)
    counts.unregister(1)
    counts.count(1, bytes_out=5)
    assert counts.sum() == StreamCounts(bytes_out=5)
