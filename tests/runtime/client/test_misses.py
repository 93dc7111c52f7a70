"""Misses of a daemon's client: a request for experts of a block, until their records are there or have failed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from control_hosts import DIGEST
from mapped_store import MappedStore
from readers import PATIENCE
from stores import keys
from threads import Task
from told_daemons import ToldDaemon

from moetier.runtime.client.daemon_link import Link
from moetier.runtime.client.fallback import Fallback
from moetier.runtime.client.mapped_arena import MappedArena
from moetier.runtime.client.misses import ClientContext, Misses
from moetier.runtime.client.uses import ClientUses
from moetier.runtime.wire.control import ControlConnection
from moetier.tiers.arena.arena import Arena
from moetier.tiers.arena.layout import ArenaLayout
from moetier.tiers.errors import ClosedError, ExhaustedError, UnavailableError
from moetier.tiers.layout import TierSlot


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


@pytest.fixture
def told(tmp_path: Path) -> Iterator[ToldDaemon]:
    (tmp_path / "daemon").mkdir(mode=0o700)
    daemon = ToldDaemon(tmp_path / "daemon")
    with daemon.running():
        yield daemon


@contextlib.contextmanager
def client(store: MappedStore, folder: Path, directory: Path) -> Iterator[tuple[Arena, ClientContext]]:
    """A daemon's arena, and a client of the daemon with the store in ``directory`` as its fallback."""
    arena = Arena.create(ArenaLayout.of(store.manifest, {"records": 4}))
    mapped, fallback = MappedArena(arena), Fallback(directory, store.manifest)
    link = Link(folder, DIGEST, ControlConnection.open(folder, DIGEST), lambda control: mapped)
    try:
        yield arena, ClientContext(link, fallback, ClientUses(link), PATIENCE, lambda: None)
    finally:
        link.close()
        fallback.close()
        mapped.close()


def test_a_record_that_another_daemon_has_replaced_is_asked_for_again(
    store: MappedStore, told: ToldDaemon, tmp_path: Path
) -> None:
    with client(store, tmp_path / "daemon", store.directory) as (arena, context):
        stream, misses = told.stream(), Misses(context, 1)
        with contextlib.closing(misses):
            misses.submit([2, 3])
            first = stream.hear().acquire.request
            stream.grant(first, 2, slot=1, generation=arena.directory.generation(TierSlot(1)))
            leases = misses.leases()
            lease = next(leases)
            arena.directory.begin_fill(TierSlot(1), None)
            assert not lease.validate()
            after = Task(lambda: next(leases))
            cancelled, again = stream.hear(), stream.hear().acquire
            assert (cancelled.release.request, list(cancelled.release.experts)) == (first, [])
            assert sorted(again.experts) == [2, 3]
            stream.grant(again.request, 3, slot=2, generation=arena.directory.generation(TierSlot(2)))
            lease = after.result()
            assert (lease.key.expert, lease.validate()) == (3, True)
        assert context.uses.stats(slots=4, ready=0, memory_bytes=1).discarded == 1


def test_what_a_full_daemon_refuses_is_read_from_the_store(
    store: MappedStore, told: ToldDaemon, tmp_path: Path
) -> None:
    with client(store, tmp_path / "daemon", store.directory) as (_, context):
        stream, misses = told.stream(), Misses(context, 1)
        with contextlib.closing(misses):
            misses.submit([2, 3])
            stream.fail(stream.hear().acquire.request, ExhaustedError("All slots are in use.", "Wait."))
            found = {lease.key: bytes(lease.record) for lease in misses.leases()}
        assert found == {key: store.records[key] for key in keys(1, 2, 3)}


def test_a_daemon_that_ends_is_asked_again_and_a_full_one_is_not(
    store: MappedStore, told: ToldDaemon, tmp_path: Path
) -> None:
    """There is no store to read from."""
    with client(store, tmp_path / "daemon", tmp_path / "none") as (arena, context):
        stream, misses = told.stream(), Misses(context, 1)
        with contextlib.closing(misses):
            misses.submit([2])
            stream.fail(stream.hear().acquire.request, UnavailableError("The daemon is ending.", "Wait."))
            leases = misses.leases()
            first = Task(lambda: next(leases))
            again = stream.hear().acquire
            assert list(again.experts) == [2]
            stream.grant(again.request, 2, slot=1, generation=arena.directory.generation(TierSlot(1)))
            assert first.result().key.expert == 2
            misses.submit([3])
            while not (message := stream.hear()).HasField("acquire"):
                pass
            stream.fail(message.acquire.request, ExhaustedError("All slots are in use.", "Wait."))
            with pytest.raises(ExhaustedError, match="All slots are in use"):
                next(leases)
