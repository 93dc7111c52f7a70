"""Several daemons that each hold a share: which key is whose, who is asked when one is gone, and the way back."""

from __future__ import annotations

import errno
import logging
import random
import shutil
import socket
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import grpc
import pytest
from integrity import check_integrity
from outlets import Outlet, outlet_of, serving
from readers import PATIENCE
from stores import make_plan, make_records, manifest_of, read_record, without_shards, write_store, written
from threads import Task, run_all, wait_until

from moetier.proto import expert_store_pb2 as pb
from moetier.runtime.client import remote
from moetier.runtime.client.peers import Peer, rendezvous
from moetier.runtime.client.remote import RemoteStore
from moetier.runtime.client.spread import SpreadStore
from moetier.runtime.daemon.fetch import FetchCalls
from moetier.runtime.wire.address import Address, Credentials
from moetier.runtime.wire.piece import encode_piece
from moetier.tiers.errors import (
    ArenaError,
    BudgetError,
    ChecksumError,
    ClosedError,
    ConfigError,
    ExhaustedError,
    MoetierError,
    UnavailableError,
    UnknownModelError,
)
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.stats import Share
from moetier.tiers.store.checksum import checksum_bytes
from moetier.tiers.store.reader import ShardStore

PLAIN = Credentials(insecure=True)
PLAN = make_plan(blocks=4, experts=8)
RECORDS = make_records(PLAN)
KEYS = list(RECORDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("store"), PLAN, RECORDS)


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return manifest_of(folder)


class Daemon:
    """The remote half of one, in this process: goes, and comes back to the same port."""

    def __init__(self, folder: Path, address: str = "127.0.0.1:0") -> None:
        self.stack = ExitStack()
        store = self.stack.enter_context(ShardStore.open(folder))
        slots = {"records": len(KEYS)}
        self.host = self.stack.enter_context(HostTier(store, slots=slots))
        fetches = FetchCalls(self.host, store.manifest, slots)
        self.stack.callback(fetches.close)
        self.outlet = outlet_of(fetches, store.manifest)
        self.running = ExitStack()
        self.address = self.running.enter_context(serving(self.outlet, address=address))

    def go(self) -> None:
        self.running.close()

    def come(self) -> None:
        self.running.enter_context(serving(self.outlet, address=self.address.target))

    def close(self) -> None:
        self.running.close()
        self.stack.close()


@pytest.fixture
def three(folder: Path) -> Iterator[list[Daemon]]:
    with ExitStack() as stack:
        daemons = []
        for _ in range(3):
            daemon = Daemon(folder)
            stack.callback(daemon.close)
            daemons.append(daemon)
        yield daemons


@pytest.fixture
def bare(folder: Path, tmp_path: Path) -> Path:
    """A model directory without shards."""
    return without_shards(folder, tmp_path / "bare")


@contextmanager
def spread_over(
    daemons: list[Daemon], manifest: Manifest, local: ShardStore | None = None, *, timeout: float = 30.0
) -> Iterator[SpreadStore]:
    peers = [Peer(str(d.address), RemoteStore(d.address, PLAIN, manifest, timeout=10.0)) for d in daemons]
    with SpreadStore(manifest, peers, local, timeout=timeout) as reader:
        yield reader


def read(reader: SpreadStore, key: ExpertKey) -> None:
    assert read_record(reader, key) == RECORDS[key], f"wrong bytes for {key}"


def peers(reader: SpreadStore) -> list[Share]:
    """Return what was read from each daemon, without the local store."""
    return [share for share in reader.shares() if share.place != "the local store"]


def shares(reader: SpreadStore) -> list[int]:
    return [peer.records for peer in peers(reader)]


def local_records(reader: SpreadStore) -> int:
    return sum(share.records for share in reader.shares() if share.place == "the local store")


def all_away(reader: SpreadStore) -> bool:
    return all(peer.away for peer in peers(reader))


def none_away(reader: SpreadStore) -> bool:
    return not any(peer.away for peer in peers(reader))


def test_each_daemon_holds_its_share(three: list[Daemon], bare: Path, manifest: Manifest) -> None:
    with SpreadStore.open([daemon.address for daemon in three], PLAIN, manifest, bare) as reader:
        for _ in range(2):
            for key in KEYS:
                read(reader, key)
        ready = [daemon.host.stats().ready for daemon in three]
        assert sum(ready) == len(KEYS), "nothing is held twice"
        assert shares(reader) == [2 * count for count in ready]
        names = [peer.place for peer in peers(reader)]
        first = Counter(rendezvous(names, key)[0] for key in KEYS)
        assert ready == [first[name] for name in names], "some ports may leave one without a key"


def test_one_that_goes_is_replaced_and_returned_to(three: list[Daemon], bare: Path, manifest: Manifest) -> None:
    with SpreadStore.open([daemon.address for daemon in three], PLAIN, manifest, bare) as reader:
        for key in KEYS:
            read(reader, key)
        own = shares(reader)
        three[0].go()
        for key in KEYS:
            read(reader, key)
        first, *others = peers(reader)
        assert first.away
        assert first.records == own[0]
        assert sum(peer.records for peer in others) == sum(own[1:]) + len(KEYS)
        three[0].come()
        wait_until(lambda: none_away(reader))
        for key in KEYS:
            read(reader, key)
        assert shares(reader)[0] == 2 * own[0], "all of its keys are its own again"


def test_nothing_is_lost_while_daemons_come_and_go_under_load(
    three: list[Daemon], bare: Path, manifest: Manifest
) -> None:
    """At least one is there at any time."""
    over = threading.Event()

    def load(reader: SpreadStore, seed: int) -> int:
        chance, count = random.Random(seed), 0
        while not over.is_set():
            read(reader, chance.choice(KEYS))
            count += 1
        return count

    with SpreadStore.open([daemon.address for daemon in three], PLAIN, manifest, bare) as reader:
        tasks = [Task(lambda seed=seed: load(reader, seed)) for seed in range(4)]
        try:
            for number in (0, 1, 2, 0):
                before = sum(shares(reader))
                three[number].go()
                wait_until(lambda before=before: sum(shares(reader)) > before + 50)  # type: ignore[misc]
                three[number].come()
                wait_until(lambda: none_away(reader))
        finally:
            over.set()
            counts = [task.result() for task in tasks]
        assert sum(counts) == sum(shares(reader))


def test_shards_are_the_last_resort(three: list[Daemon], folder: Path, manifest: Manifest) -> None:
    addresses = [daemon.address for daemon in three]
    with SpreadStore.open(addresses, PLAIN, manifest, folder) as reader:
        for daemon in three:
            daemon.go()
        for key in KEYS:
            read(reader, key)
        assert local_records(reader) == len(KEYS)
        three[1].come()
        wait_until(lambda: not peers(reader)[1].away)
        for key in KEYS:
            read(reader, key)
        assert shares(reader) == [0, len(KEYS), 0]
        three[1].go()
    with SpreadStore.open(addresses, PLAIN, manifest, folder) as reader:  # no daemon runs at first
        read(reader, KEYS[0])
        assert local_records(reader) == 1


def test_some_shards_are_better_than_none(
    three: list[Daemon], folder: Path, tmp_path: Path, manifest: Manifest
) -> None:
    """Of a folder that holds two blocks of four."""
    shutil.copytree(folder, tmp_path / "half")
    for block in (1, 3):
        shutil.rmtree(tmp_path / "half" / "experts.zarr" / "records" / "c" / str(block))
    with SpreadStore.open([daemon.address for daemon in three], PLAIN, manifest, tmp_path / "half") as reader:
        for daemon in three:
            daemon.go()
        read(reader, ExpertKey(0, 0))
        read(reader, ExpertKey(2, 7))
        task = Task(lambda: read(reader, ExpertKey(3, 1)))
        wait_until(lambda: all_away(reader))
        three[2].come()
        task.result()
        assert (local_records(reader), shares(reader)) == (2, [0, 0, 1])


def test_all_away_is_waited_for_and_then_an_error(three: list[Daemon], manifest: Manifest) -> None:
    with spread_over(three, manifest, timeout=1.0) as reader:
        for daemon in three:
            daemon.go()
        began = time.monotonic()
        with pytest.raises(UnavailableError):
            read(reader, KEYS[0])
        assert 1.0 <= time.monotonic() - began < 30, "by default it would wait for 30 seconds"
    with spread_over(three, manifest) as reader:
        task = Task(lambda: read(reader, KEYS[0]))
        wait_until(lambda: all_away(reader))
        three[2].come()
        task.result()
        assert shares(reader) == [0, 0, 1]


def test_no_daemon_at_all_is_an_error_at_once(bare: Path, manifest: Manifest) -> None:
    addresses = [Address(target=f"127.0.0.1:{port}") for port in (1, 2)]
    with pytest.raises(UnavailableError):
        SpreadStore.open(addresses, PLAIN, manifest, bare)
    with pytest.raises(ConfigError, match="twice"):
        SpreadStore.open(addresses[:1] * 2, PLAIN, manifest, bare)


# -- behind one name --------------------------------------------------------------------------------------------------


class Names:
    """Stands in for the system's resolver. It knows only the names that it was given."""

    def __init__(self, port: int) -> None:
        self.ips: dict[str, list[str]] = {}
        self.port = port
        self.asked = 0

    def getaddrinfo(self, host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        self.asked += 1
        if not self.ips.get(host):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in self.ips[host]]

    @property
    def name(self) -> Address:
        return Address.parse(f"dns:///daemons.test:{self.port}")

    def lead_to(self, *ips: str) -> None:
        self.ips["daemons.test"] = list(ips)


IPS = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]


@pytest.fixture
def pods(folder: Path) -> Iterator[list[Daemon]]:
    """Three on one port of three addresses."""
    with ExitStack() as stack:
        daemons: list[Daemon] = []
        for ip in IPS:
            port = daemons[0].address.target.rpartition(":")[2] if daemons else "0"
            daemon = Daemon(folder, f"{ip}:{port}")
            stack.callback(daemon.close)
            daemons.append(daemon)
        yield daemons


@pytest.fixture
def resolver(pods: list[Daemon], monkeypatch: pytest.MonkeyPatch) -> Names:
    found = Names(int(pods[0].address.target.rpartition(":")[2]))
    monkeypatch.setattr(socket, "getaddrinfo", found.getaddrinfo)
    return found


def places(reader: SpreadStore) -> list[str]:
    return sorted(share.place.partition(":")[0] for share in peers(reader))


def test_a_name_means_a_daemon_at_each_of_its_addresses(
    pods: list[Daemon], resolver: Names, bare: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come and go with it, and no others."""
    monkeypatch.setattr("moetier.runtime.client.peers.RESOLVE_SECONDS", 0.05)
    resolver.lead_to(*IPS[:2])
    with SpreadStore.open([resolver.name], PLAIN, manifest, bare) as reader:
        for key in KEYS:
            read(reader, key)
        assert places(reader) == IPS[:2]
        assert [pod.host.stats().ready for pod in pods] == [*shares(reader), 0]
        assert sum(shares(reader)) == len(KEYS)

        resolver.lead_to(*IPS)
        wait_until(lambda: places(reader) == IPS)
        for key in KEYS:
            read(reader, key)
        own = Counter(rendezvous([str(pod.address) for pod in pods], key)[0] for key in KEYS)
        assert pods[2].host.stats().ready == own[str(pods[2].address)], "its share, and nothing else has moved"

        resolver.lead_to(*IPS[1:])  # the first still runs
        wait_until(lambda: places(reader) == [*IPS[1:], "former daemons"])
        requests = len(pods[0].outlet.requests)
        for key in KEYS:
            read(reader, key)
        assert len(pods[0].outlet.requests) == requests
        assert sum(shares(reader)) == 3 * len(KEYS)


def test_what_a_daemon_has_computed_counts_after_it_has_gone(
    pods: list[Daemon], resolver: Names, bare: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moetier.runtime.client.peers.RESOLVE_SECONDS", 0.05)
    resolver.lead_to(*IPS[:2])
    with SpreadStore.open([resolver.name], PLAIN, manifest, bare) as reader:
        gone = next(peer for peer in reader.peers if peer.name.startswith(IPS[0]))
        reader.peers.order(KEYS[0])
        reader.peers.count_computed(gone, 5, 100)
        resolver.lead_to(IPS[1])
        wait_until(lambda: places(reader) == [IPS[1], "former daemons"])
        reader.peers.count_computed(gone, 3, 60)  # by a call that was under way
        (former,) = (share for share in peers(reader) if share.place == "former daemons")
        assert (former.computed, former.computed_bytes) == (8, 160)
        with pytest.raises(ClosedError):
            gone.store.compute(pb.ComputeRequest(), 1)
        held = weakref.ref(gone)
        del gone
        wait_until(lambda: held() is None)


def test_a_failure_has_the_name_resolved_again(
    pods: list[Daemon], resolver: Names, bare: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that is started again elsewhere is found long before its name's turn; there is no other here."""
    monkeypatch.setattr("moetier.runtime.client.peers.RESOLVE_SECONDS", 3 * PATIENCE)
    resolver.lead_to(IPS[0])
    with SpreadStore.open([resolver.name], PLAIN, manifest, bare) as reader:
        read(reader, KEYS[0])
        asked = resolver.asked
        assert asked == 1
        pods[0].go()
        task = Task(lambda: read(reader, KEYS[1]))
        wait_until(lambda: resolver.asked > asked)
        resolver.lead_to(IPS[1])
        task.result()
        assert places(reader) == [IPS[1], "former daemons"]
        assert none_away(reader)


def test_a_name_that_is_not_known(
    pods: list[Daemon],
    resolver: Names,
    folder: Path,
    bare: Path,
    manifest: Manifest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("moetier.runtime.client.peers.RESOLVE_AGAIN", 0.05)
    with pytest.raises(UnavailableError, match=r"daemons\.test can't be resolved: Name or service not known"):
        SpreadStore.open([resolver.name], PLAIN, manifest, bare)
    with SpreadStore.open([resolver.name, pods[2].address], PLAIN, manifest, bare) as reader:
        read(reader, KEYS[0])
        assert places(reader) == IPS[2:]
    with SpreadStore.open([resolver.name], PLAIN, manifest, folder) as reader:  # no daemon yet: it reads the store
        assert "can't be resolved" in caplog.text
        read(reader, KEYS[0])
        assert local_records(reader) == 1
        resolver.lead_to(IPS[0])
        wait_until(lambda: places(reader) == IPS[:1])
        read(reader, KEYS[0])
        assert shares(reader) == [1]


def test_daemons_stay_while_their_name_is_not_known(
    pods: list[Daemon], resolver: Names, bare: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pause in ("RESOLVE_SECONDS", "RESOLVE_AGAIN"):
        monkeypatch.setattr(f"moetier.runtime.client.peers.{pause}", 0.02)
    resolver.lead_to(*IPS)
    with SpreadStore.open([resolver.name], PLAIN, manifest, bare) as reader:
        resolver.lead_to()
        asked = resolver.asked
        wait_until(lambda: resolver.asked > asked + 3)
        for key in KEYS:
            read(reader, key)
        assert places(reader) == IPS


def test_one_that_serves_another_store_is_not_used(
    three: list[Daemon], bare: Path, tmp_path: Path, manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    plan = make_plan(blocks=4, experts=8, model="acme/other")
    write_store(tmp_path / "other", plan, make_records(plan, seed=1))
    other = Daemon(tmp_path / "other")
    try:
        with pytest.raises(UnknownModelError, match="acme/other"):
            SpreadStore.open([other.address], PLAIN, manifest, bare)
        write_store(tmp_path / "again", PLAN, make_records(PLAN, seed=1))  # of the same name
        again = manifest_of(tmp_path / "again")
        with pytest.raises(
            UnknownModelError, match=rf"\({again.digest[:12]}\).*{PLAN.model} \({manifest.digest[:12]}\)"
        ):
            SpreadStore.open([three[0].address], PLAIN, again)
        with caplog.at_level(logging.WARNING):
            reader = SpreadStore.open([other.address, three[0].address], PLAIN, manifest, bare)
        with reader:
            assert "acme/other" in caplog.text
            for key in KEYS:
                read(reader, key)
            assert shares(reader) == [0, len(KEYS)]
    finally:
        other.close()


def test_a_bad_record_of_one_is_had_from_another(
    three: list[Daemon], tmp_path: Path, bare: Path, manifest: Manifest
) -> None:
    """And the others of its records from it: it has not gone away."""
    key = KEYS[5]
    write_store(tmp_path / "bad", PLAN, RECORDS)
    with ShardStore.open(tmp_path / "bad") as store:
        path = store.path(key.block)
    data = bytearray(path.read_bytes())
    data[data.index(RECORDS[key]) + 7] ^= 4
    path.write_bytes(data)
    bad = Daemon(tmp_path / "bad")
    try:
        with SpreadStore.open([bad.address], PLAIN, manifest, bare) as reader:
            with pytest.raises(ChecksumError):
                read(reader, key)
            read(reader, KEYS[6])
        with SpreadStore.open([bad.address, three[0].address, three[1].address], PLAIN, manifest, bare) as reader:
            for _ in range(2):
                for each in KEYS:
                    read(reader, each)
            assert none_away(reader)
            assert shares(reader)[0] > 0
    finally:
        bad.close()


@pytest.mark.parametrize("kind", [ExhaustedError, BudgetError])
def test_a_daemon_without_room_is_asked_again(manifest: Manifest, kind: type[MoetierError]) -> None:
    """It has not gone away either."""
    busy = threading.Event()

    def behaviour(request: object, context: object) -> Iterator[bytes]:
        if not busy.is_set():
            busy.set()
            raise kind("There is no room.", "Later.")
        yield from answer(request)

    def answer(request: object) -> Iterator[bytes]:
        assert isinstance(request, pb.FetchRequest)
        record = RECORDS[ExpertKey(request.block, request.expert)]
        yield encode_piece(memoryview(record + checksum_bytes(google_crc32c.value(record))))

    with serving(Outlet(manifest, behaviour)) as address, SpreadStore.open([address], PLAIN, manifest) as reader:
        read(reader, KEYS[0])
        assert busy.is_set()
        assert peers(reader)[0].lost == 0


class Replaced(Outlet):
    """Repeats no checksums of requests, as an older daemon that has taken the place of one that does."""

    is_known = False

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeReply:
        reply = super().Describe(request, context)
        reply.models[0].checks = not self.is_known
        return reply


def test_a_daemon_is_replaced_by_an_older_one(three: list[Daemon], manifest: Manifest) -> None:
    def behaviour(request: pb.FetchRequest, context: object) -> Iterator[bytes]:
        record = RECORDS[ExpertKey(request.block, request.expert)]
        yield encode_piece(memoryview(record + checksum_bytes(google_crc32c.value(record))))

    outlet = Replaced(manifest, behaviour)
    with serving(outlet) as address, SpreadStore.open([address], PLAIN, manifest) as reader:
        outlet.is_known = True  # from the next check on
        read(reader, KEYS[0])
        assert peers(reader)[0].lost == 1


@pytest.mark.parametrize("kind", [ConfigError, ArenaError, MoetierError])
def test_whatever_one_says_another_is_asked(three: list[Daemon], manifest: Manifest, kind: type[MoetierError]) -> None:
    """An error of any name may come over the wire."""

    def behaviour(request: object, context: object) -> Iterator[bytes]:
        raise kind("Something.", "Nothing.")
        yield b""

    with (
        serving(Outlet(manifest, behaviour)) as address,
        SpreadStore.open([address, three[0].address], PLAIN, manifest) as reader,
    ):
        for key in KEYS:
            read(reader, key)
        assert shares(reader) == [0, len(KEYS)]
        assert peers(reader)[0].lost > 0


def test_one_that_cannot_be_looked_at_is_looked_at_again(
    three: list[Daemon], manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where this process has no descriptor left, for now."""
    errors = [OSError(errno.EMFILE, "Too many open files")] * 3  # a read, its second try, and the first look
    opens = remote.open_channel

    def limited(*arguments: Any, **options: Any) -> Any:
        if errors:
            raise errors.pop()
        return opens(*arguments, **options)

    monkeypatch.setattr(remote, "open_channel", limited)
    with spread_over(three[:1], manifest) as reader:
        read(reader, KEYS[0])
        assert not errors
        assert [(peer.lost, peer.records) for peer in peers(reader)] == [(1, 1)]


def test_a_host_tier_on_three_daemons(three: list[Daemon], bare: Path, manifest: Manifest) -> None:
    with (
        SpreadStore.open([daemon.address for daemon in three], PLAIN, manifest, bare) as reader,
        HostTier(reader, slots={"records": 3}) as host,
    ):

        def caller(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(20):
                block = chance.randrange(4)
                wanted = [ExpertKey(block, expert) for expert in chance.sample(range(8), 4)]
                seen = {lease.key: bytes(lease.record) for lease in host.acquire(wanted)}
                assert seen == {key: RECORDS[key] for key in wanted}

        run_all([lambda seed=seed: caller(seed) for seed in range(4)])
        check_integrity(host)
        three[1].go()
        run_all([lambda seed=seed: caller(seed) for seed in range(4)])


def test_closing_ends_a_read_that_waits_for_daemons(three: list[Daemon], manifest: Manifest) -> None:
    with spread_over(three, manifest, timeout=3 * PATIENCE) as reader:
        for daemon in three:
            daemon.go()
        task = Task(lambda: read(reader, KEYS[0]))
        wait_until(lambda: all_away(reader))
        reader.close()
        with pytest.raises((ClosedError, UnavailableError)):
            task.result()
