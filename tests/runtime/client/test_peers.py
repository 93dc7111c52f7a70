"""The daemons of a model: their order for each key, and which of them are away."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator

import outlets  # noqa: F401 - keeps gRPC's event loop from one test to the next
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from readers import PATIENCE
from stores import make_plan
from threads import Task

from moetier.runtime.client.peers import Peer, Peers, rendezvous
from moetier.runtime.client.remote import RemoteStore
from moetier.runtime.wire.address import Address, Credentials
from moetier.tiers.errors import ClosedError, UnavailableError
from moetier.tiers.layout import ExpertKey

PLAIN = Credentials(insecure=True)
PLAN = make_plan()

names = st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=6, unique=True)
keys = st.builds(ExpertKey, st.integers(0, 300), st.integers(0, 600))


@given(names, keys)
def test_every_client_comes_to_the_same_order(daemons: list[str], key: ExpertKey) -> None:
    order = rendezvous(daemons, key)
    assert sorted(order) == sorted(daemons)
    assert rendezvous(reversed(daemons), key) == order


@given(names, keys, st.data())
def test_a_daemon_that_is_removed_moves_only_its_own_keys(
    daemons: list[str], key: ExpertKey, data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from(daemons))
    order = rendezvous(daemons, key)
    assert rendezvous([name for name in daemons if name != gone], key) == [name for name in order if name != gone]


@settings(max_examples=30)
@given(st.lists(st.text(min_size=1, max_size=20), min_size=2, max_size=5, unique=True))
def test_shares_are_equal(daemons: list[str]) -> None:
    """The share of a daemon that is gone is divided among the others."""
    every = [ExpertKey(block, expert) for block in range(24) for expert in range(64)]
    first = Counter(rendezvous(daemons, key)[0] for key in every)
    second = Counter(order[1] for key in every if (order := rendezvous(daemons, key))[0] == daemons[0])
    for counts, shares in ((first, len(daemons)), (second, len(daemons) - 1)):
        mean = counts.total() / shares
        assert len(counts) == shares
        # six standard deviations of a fair die
        assert all(abs(count - mean) < 6 * (mean * (1 - 1 / shares)) ** 0.5 + 1 for count in counts.values())


# -- which are away ---------------------------------------------------------------------------------------------------


NOBODY = "127.0.0.1:1"


@pytest.fixture
def peers() -> Iterator[Peers]:
    """Two daemons, neither of which answers."""
    places = [Address(target=NOBODY), Address(target="127.0.0.2:1")]
    peers = Peers(PLAN, [Peer(str(place), RemoteStore(place, PLAIN, PLAN)) for place in places], (), PLAIN)
    yield peers
    peers.close()


def test_a_failure_is_counted_once_and_the_order_stays(peers: Peers) -> None:
    first, second = peers.order(ExpertKey(0, 0))
    error = UnavailableError("It is gone.", "Start it.")
    peers.lose(first, error, failures=0)
    peers.lose(first, error, failures=0)
    assert (first.failures, first.away) == (1, error)
    assert peers.order(ExpertKey(0, 0)) == [first, second]
    assert {share.place: (share.away, share.lost) for share in peers.shares()} == {
        first.name: ("It is gone.", 1),
        second.name: ("", 0),
    }


def test_a_call_that_began_before_the_daemon_came_back_does_not_count_it_again(peers: Peers) -> None:
    first, _ = peers
    first.failures = 1  # it has been away, and is back
    peers.lose(first, UnavailableError("It was gone.", "Start it."), failures=0)
    assert first.away is None


def test_what_daemons_gave_is_counted_by_daemon(peers: Peers) -> None:
    first, second = peers
    peers.count_record(first, 100)
    peers.count_record(first, 100)
    peers.count_computed(second, 3, 50)
    shares = {share.place: share for share in peers.shares()}
    assert (shares[first.name].records, shares[first.name].bytes) == (2, 200)
    assert (shares[second.name].computed, shares[second.name].computed_bytes) == (3, 50)


def test_waiting_ends_with_the_error_at_the_deadline_and_when_all_is_closed(peers: Peers) -> None:
    error = UnavailableError("All are gone.", "Start one.")
    for peer in peers:
        peers.lose(peer, error, peer.failures)
    peers.wait(time.monotonic() + 0.01, error)
    with pytest.raises(UnavailableError, match="All are gone"):
        peers.wait(time.monotonic(), error)
    waiting = Task(lambda: peers.wait(time.monotonic() + PATIENCE, error))
    peers.close()
    with contextlib.suppress(ClosedError):  # raised if it has only begun now
        waiting.result()
    with pytest.raises(ClosedError):
        peers.wait(time.monotonic() + PATIENCE, error)


def test_a_first_check_names_the_error_of_the_first_if_all_are_needed(peers: Peers) -> None:
    with pytest.raises(UnavailableError, match=NOBODY):
        peers.check_all(needed=True)
    assert [peer.away for peer in peers] == [None, None]
    peers.check_all(needed=False)
    assert all(peer.away for peer in peers)
