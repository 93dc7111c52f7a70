"""Misses of a daemon's client: a request for experts of a block, until their records are there or have failed."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from mapped_store import MappedStore
from stores import keys
from threads import Task

from moetier.runtime.client.misses import Misses
from moetier.tiers.errors import ClosedError


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> MappedStore:
    return MappedStore.make(tmp_path_factory.mktemp("mapped"))


def test_all_misses_of_a_block_are_one_message_ahead_of_its_hits(store: MappedStore, tmp_path: Path) -> None:
    with store.daemon(18, tmp_path / "daemon") as daemon, store.tier(daemon) as tier:
        store.take(tier, 0, 2)
        leases = tier.acquire(keys(0, 5, 1, 2, 0))
        assert next(leases).key.expert == 2, "what is there comes first"
        assert daemon.wait_for("requests == 2").host.name == "host"
        daemon.wait_for("leases == 3")
        assert {lease.key.expert for lease in leases} == {0, 1, 5}
        daemon.wait_for("leases == 0")
        assert daemon.stats().requests == 2


def test_what_is_granted_twice_is_given_back_at_once(store: MappedStore, tmp_path: Path) -> None:
    """As what was asked for again when a daemon was exchanged may be: else its slot could be what others wait for."""
    with store.daemon(2, tmp_path / "daemon") as daemon, store.tier(daemon, fallback=False) as tier:
        misses = Misses(tier._context, 0)
        with contextlib.closing(misses):
            misses.submit([0, 1])
            misses.submit([0, 1])
            misses.submit([2])
            assert sorted(lease.key.expert for lease in misses.leases()) == [0, 1, 2]
        daemon.wait_for("leases == 0")


def test_closing_wakes_waiting_threads(store: MappedStore, tmp_path: Path) -> None:
    with (
        store.daemon(2, tmp_path / "daemon") as daemon,
        store.crew(daemon) as crew,
        store.tier(daemon, fallback=False) as tier,
    ):
        (holder,) = crew.start()
        holder.do("hold", 0, 0, 1)
        task = Task(lambda: store.take(tier, 1, 0))
        daemon.wait_for("requests == 2")
        tier.close()
        with pytest.raises(ClosedError):
            task.result()
        with pytest.raises(ClosedError):
            tier.prefetch(0, keys(0, 1))
        assert tier.stats().misses == 1
