"""What a daemon's reads take, as its clients hear of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import outlets  # noqa: F401 - keeps gRPC's event loop from one test to the next
import pytest
from local_daemons import local_daemon
from mapped_store import MappedStore, keys
from readers import PATIENCE, RamReader
from threads import wait_until

from moetier.runtime.client.tier import DaemonTier
from moetier.runtime.daemon.exchange import PACE_SECONDS
from moetier.tiers.host.prefetch import LEAST_RIGHT
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> MappedStore:
    return MappedStore.make(tmp_path_factory.mktemp("mapped"))


turns = itertools.cycle(range(6))  # of experts of a block that has two slots: none is there when its turn comes


def wish_rightly(store: MappedStore, tier: DaemonTier, times: int) -> None:
    for expert in itertools.islice(turns, times):
        tier.prefetch(1, keys(1, expert))
        wait_until(lambda expert=expert: not tier.absent(keys(1, expert)))
        store.take(tier, 1, expert)


def test_who_wishes_is_told_what_reads_take_there(store: MappedStore, tmp_path: Path) -> None:
    with store.daemon(6, tmp_path / "daemon") as daemon, store.tier(daemon) as tier, store.tier(daemon) as other:
        wish_rightly(store, tier, LEAST_RIGHT - 1)
        time.sleep(2 * PACE_SECONDS)  # until it is looked at again, and hits are reported
        wish_rightly(store, tier, 1)
        assert tier.pace(1) is None, "too few were right"
        deadline = time.monotonic() + PATIENCE
        while (pace := tier.pace(1)) is None and time.monotonic() < deadline:
            wish_rightly(store, tier, 2)
        assert pace is not None
        assert 0 < pace.read == pace.grain < 1, "so small a record is read at once"
        assert 0 < pace.saved < 1
        assert tier.pace(0) == tier.pace(1), "of the same geometry"
        assert other.pace(1) is None
        other.prefetch(0, keys(0, 5))
        wait_until(lambda: other.pace(1) is not None)


def test_it_is_told_now_and_then(store: MappedStore, tmp_path: Path) -> None:
    with store.daemon(6, tmp_path / "daemon") as daemon, store.tier(daemon) as tier:
        began = time.monotonic()
        wish_rightly(store, tier, 200)
        daemon.wait_for("leases == 0")
        stats, seconds = tier.stats(), time.monotonic() - began
        assert tier.traffic.messages_in <= stats.misses + 1 + seconds / PACE_SECONDS


@pytest.fixture
def slow(store: MappedStore) -> Iterator[HostTier]:
    """Takes 20 ms to read a record."""

    class Slow(RamReader):
        def read_into(self, key: ExpertKey, buffer: memoryview, pause: object = None) -> None:
            time.sleep(0.02)
            super().read_into(key, buffer)

    with HostTier(Slow(store.manifest, store.records), slots={"records": 6}) as host:
        yield host


def test_it_is_what_the_daemon_measured(store: MappedStore, slow: HostTier, tmp_path: Path) -> None:
    with (
        local_daemon(slow, store.manifest, store.directory, tmp_path / "d") as folder,
        DaemonTier.open(folder, store.directory, store.manifest) as tier,
    ):
        wish_rightly(store, tier, LEAST_RIGHT + 1)
        wait_until(lambda: slow.pace(1) is not None)
        time.sleep(PACE_SECONDS)
        tier.prefetch(1, [])
        tier.prefetch(1, keys(1, 0, 1, 2, 3, 4, 5))
        wait_until(lambda: tier.pace(1) is not None)
        pace = tier.pace(1)
        assert pace is not None
        assert 0.02 <= pace.read < 2
        assert 0.02 <= pace.saved < 2
