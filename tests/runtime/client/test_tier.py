"""Clients of a daemon on the same host, with daemons and clients as real processes."""

from __future__ import annotations

import itertools
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from daemons import running_daemon
from faults import strace
from local_daemons import local_daemon
from mapped_store import MappedStore
from prepared import for_daemons
from readers import GatedReader
from relays import relay
from stores import keys, layout_of, make_plan, make_records, write_store
from threads import Task, run_all, wait_until, without_thread
from workers import WorkerError

from moetier.runtime.client.mapped_arena import MappedArena
from moetier.runtime.client.tier import DaemonTier
from moetier.runtime.wire.control import ControlConnection
from moetier.tiers.errors import ClosedError, ExhaustedError, ProtocolError, UnavailableError, UnknownModelError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey
from moetier.tiers.source import Lease


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> MappedStore:
    return MappedStore.make(tmp_path_factory.mktemp("mapped"))


@pytest.mark.parametrize("slots", [2, 3, 7, 18])
def test_bytes_are_right_at_every_budget(store: MappedStore, tmp_path: Path, slots: int) -> None:
    with store.daemon(slots, tmp_path / "daemon") as daemon, store.crew(daemon) as crew:
        workers = crew.start(4, fallback=False)
        for worker in workers:
            worker.tell("work", 0.4)
        for worker in workers:
            worker.hear()
        found = [worker.do("stats") for worker in workers]
        assert all(stats["used"] > 0 and not stats["wrong"] for stats in found)
        assert all(stats["slots"] == slots and stats["memory_bytes"] == slots * store.slot_bytes for stats in found)
        host = daemon.wait_for("leases == 0").host
        assert host.ready <= host.slots == slots
        if slots == 18:
            assert host.bytes_in == host.ready * store.slot_bytes > 0, "no record was read twice"
        assert [worker.finish() for worker in workers] == [0] * 4
        daemon.wait_for("clients == 0")


def test_a_hit_is_no_message(store: MappedStore, tmp_path: Path) -> None:
    with store.daemon(18, tmp_path / "daemon") as daemon, store.tier(daemon) as tier:
        store.take(tier, 1, 0, 3, 4)
        daemon.wait_for("leases == 0")
        before = daemon.stats()
        for _ in range(1_000):
            assert store.take(tier, 1, 4, 0, 3) == [4, 0, 3]
        after = daemon.wait_for("reported_hits == 3000")
        assert after.requests == before.requests == 1
        assert after.session_bytes_out == before.session_bytes_out, "nothing is answered"
        assert after.session_bytes_in - before.session_bytes_in < 2 * 3_000, "what was used is told in batches"
        stats = tier.stats()
        assert (stats.hits, stats.misses, stats.discarded) == (3_000, 3, 0)
        assert (stats.name, stats.slots, stats.ready, stats.leased) == ("daemon", 18, 3, None)
        assert (stats.waits > 0, sum(stats.loads)) == (True, 0), "it has waited, and read nothing itself"


def test_hits_are_reported_before_a_tier_closes(store: MappedStore, tmp_path: Path) -> None:
    """A short run's too, which ends before the next report is due."""
    with store.daemon(18, tmp_path / "daemon") as daemon:
        with store.tier(daemon) as tier:
            store.take(tier, 1, 0, 3, 4)
            for _ in range(5):
                store.take(tier, 1, 4, 0, 3)
        assert daemon.wait_for("clients == 0").reported_hits == 15


def test_a_copy_that_was_interrupted_is_no_use(store: MappedStore, tmp_path: Path) -> None:
    with store.daemon(18, tmp_path / "daemon") as daemon:
        with store.tier(daemon) as tier:
            store.take(tier, 1, 0, 3)
            with pytest.raises(KeyboardInterrupt), tier.pin(ExpertKey(1, 0)):
                raise KeyboardInterrupt
            with tier.pin(ExpertKey(1, 3)) as lease:
                assert lease is not None
                assert lease.validate()
            tier.uses.note_copies(keys(1, 0, 3))
        assert daemon.wait_for("clients == 0").reported_hits == 1


HITS = """
import os, sys
from pathlib import Path
from moetier.runtime.client.tier import DaemonTier
from moetier.tiers.store.folder import read_manifest, store_folder
from moetier.tiers.layout import ExpertKey

folder, directory = map(Path, sys.argv[1:])
with DaemonTier.open(folder, directory, read_manifest(store_folder(directory))) as tier:
    wanted = [ExpertKey(1, expert) for expert in range(6)]

    def use():
        for lease in tier.acquire(wanted):
            assert lease.validate()

    for _ in range(100):
        use()
    assert tier.stats().hits
    for _ in range(20):
        os.access("/window-opens", os.F_OK)
        for _ in range(20):
            use()
        os.access("/window-closes", os.F_OK)
"""


def test_a_hit_is_no_system_call(store: MappedStore, tmp_path: Path) -> None:
    with store.daemon(18, tmp_path / "daemon") as daemon:
        result = strace(["-o", str(tmp_path / "trace")], HITS, daemon.folder, store.directory)
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "trace").read_text().splitlines()
    thread = next(line for line in lines if "/window-opens" in line).split()[0]
    windows: list[int] = []
    for line in (line for line in lines if line.split()[0] == thread):
        if "/window-opens" in line:
            windows.append(0)
        elif windows and "/window-closes" not in line:
            windows[-1] += 1
    # a window in which another thread wants the interpreter has calls of that; most have none
    assert len(windows) == 20
    assert windows.count(0) > 0, f"120 hits each, with so many system calls: {windows}"


def test_a_record_that_is_replaced_under_its_reader_comes_again(store: MappedStore, tmp_path: Path) -> None:
    with store.daemon(2, tmp_path / "daemon") as daemon, store.tier(daemon) as tier, store.tier(daemon) as other:

        def replace(lease: Lease) -> None:
            for pair in itertools.cycle(((2, 3), (4, 5))):  # that a record was used may be told between two loads
                if not lease.validate():
                    return
                store.take(other, 0, *pair)

        store.take(tier, 0, 0, 1)
        leases = tier.acquire(keys(0, 0, 1))
        first = next(leases)
        assert bytes(first.record) == store.records[first.key]
        replace(first)
        comes_next = next(leases)
        assert comes_next.key.expert == 1
        replace(comes_next)
        again = []
        for lease in leases:
            data = bytes(lease.record)
            assert lease.validate(), "what was asked for stays in place"
            assert data == store.records[lease.key]
            again.append(lease.key.expert)
        assert sorted(again) == [0, 1]
        stats = tier.stats()
        assert (stats.hits, stats.misses, stats.discarded) == (2, 4, 2), "both hits were discarded, and requested then"


def test_eight_clients_want_one_cold_expert(store: MappedStore, tmp_path: Path) -> None:
    with store.daemon(2, tmp_path / "daemon") as daemon, store.crew(daemon) as crew:
        workers = crew.start(8)
        for worker in workers:
            worker.do("open")
        for worker in workers:
            worker.tell("take", 1, 3)
        assert [worker.hear() for worker in workers] == [[3]] * 8
        assert daemon.stats().host.bytes_in == store.slot_bytes, "it was read once"


def test_many_threads_of_one_client(store: MappedStore, tmp_path: Path) -> None:
    def caller(tier: DaemonTier, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(40):
            block = chance.randrange(3)
            wanted = chance.sample(range(6), chance.randint(1, 6))
            assert sorted(store.take(tier, block, *wanted)) == sorted(wanted)

    for slots in (2, 7):
        folder = tmp_path / str(slots)
        with store.daemon(slots, folder) as daemon, store.tier(daemon, fallback=False) as tier:
            run_all([lambda seed=seed, tier=tier: caller(tier, seed) for seed in range(6)])  # type: ignore[misc]
            daemon.wait_for("leases == 0")


def test_an_interrupt_in_the_middle_gives_everything_back(store: MappedStore, tmp_path: Path) -> None:
    with (
        store.daemon(2, tmp_path / "daemon") as daemon,
        store.crew(daemon) as crew,
        store.tier(daemon, fallback=False) as tier,
    ):
        (holder,) = crew.start()
        assert holder.do("hold", 0, 0, 1) in (0, 1)
        daemon.wait_for("leases == 2")

        def interrupt() -> None:
            daemon.wait_for("requests == 2")
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        task = Task(interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.take(tier, 1, 0, 1, 2, 3)
        task.result()
        holder.do("drop")
        daemon.wait_for("leases == 0")
        assert sorted(store.take(tier, 1, 0, 1, 2, 3)) == [0, 1, 2, 3]


def test_a_stopped_client_that_holds_everything(store: MappedStore, tmp_path: Path) -> None:
    with (
        store.daemon(2, tmp_path / "daemon", ["--wait", "0.5"]) as daemon,
        store.crew(daemon) as crew,
    ):
        holder, poor = crew.start(2, fallback=False)
        (rich,) = crew.start(fallback=True)
        holder.do("hold", 0, 0, 1)
        daemon.wait_for("leases == 2")
        holder.stop()
        with pytest.raises(WorkerError, match="ExhaustedError"):
            poor.do("take", 1, 2)
        assert sorted(poor.do("take", 0, 1, 0)) == [0, 1], "hits are served"
        assert sorted(rich.do("take", 1, 2, 3)) == [2, 3], "it reads the local store"
        assert daemon.stats().host.ready == 2, "the budget holds"
        holder.go_on()
        holder.do("drop")
        assert poor.do("take", 1, 2) == [2]
        assert not any(worker.do("stats")["wrong"] for worker in (poor, rich))


def test_a_prefetch_saves_the_miss(store: MappedStore, tmp_path: Path) -> None:
    with store.daemon(18, tmp_path / "daemon") as daemon, store.tier(daemon) as tier:
        tier.prefetch(1, keys(1, 0, 3))
        wait_until(lambda: tier.stats().ready == 2)
        assert sorted(store.take(tier, 1, 3, 0)) == [0, 3]
        assert (tier.stats().hits, tier.stats().misses) == (2, 0)
        assert daemon.stats().host.prefetched == 2
        before = daemon.stats().session_bytes_in
        for _ in range(5):
            tier.prefetch(1, keys(1, 0, 3))
        tier.prefetch(1, [])
        told = daemon.wait_for("reported_hits == 2").session_bytes_in - before
        assert told < 30, "what is there is not requested: five such messages would be 50 bytes"


def test_a_demand_that_hits_clears_the_blocks_prefetch_requests(store: MappedStore, tmp_path: Path) -> None:
    reader = GatedReader(store.manifest, store.records)
    with (
        HostTier(reader, slots={"records": 18}, loaders=4) as host,
        local_daemon(host, store.manifest, store.directory, tmp_path / "daemon") as folder,
        DaemonTier.open(folder, store.directory, store.manifest) as tier,
    ):
        tier.prefetch(1, keys(1, 0, 1, 2, 3, 4, 5))
        reader.wait_begun(*keys(1, 0))  # of such small ones one at a time
        for key in keys(2, 0):
            reader.release(key)
        assert store.take(tier, 2, 0) == [0]
        tier.prefetch(2, keys(2, 0, 1, 2))
        assert store.take(tier, 2, 0) == [0]
        for key in keys(0, 0):
            reader.release(key)
        assert store.take(tier, 0, 0) == [0], "what was said before is heard by now"
        reader.open()
        wait_until(lambda: host.stats().prefetched == 6)
        assert set(reader.reads) == set(keys(1, 0, 1, 2, 3, 4, 5)) | set(keys(2, 0)) | set(keys(0, 0))


def test_pages_wait_for_a_miss_and_prefetches_for_pages(store: MappedStore, tmp_path: Path) -> None:
    reader = GatedReader(store.manifest, store.records)
    with (
        HostTier(reader, slots={"records": 18}, loaders=4) as host,
        local_daemon(host, store.manifest, store.directory, tmp_path / "daemon") as folder,
        DaemonTier.open(folder, store.directory, store.manifest) as tier,
    ):
        demand = Task(lambda: store.take(tier, 2, 0))
        reader.wait_begun(*keys(2, 0))
        may_write = Task(lambda: tier.disk_order.wait_to_write(lambda: False))
        with tier.disk_order.reading_page():
            tier.prefetch(1, keys(1, 0, 1))
            reader.open()
            assert demand.result() == [0]
            assert may_write.thread.is_alive()
        may_write.result()
        assert store.take(tier, 0, 0) == [0], "what was said before is heard by now"
        assert host.stats().prefetched == 0


def test_no_weights_cross_the_socket(store: MappedStore, tmp_path: Path) -> None:
    with store.daemon(2, tmp_path / "daemon") as daemon, relay(daemon.folder, tmp_path / "relay") as between:
        with DaemonTier.open(between.folder, store.directory, store.manifest) as tier:
            for _ in range(20):
                for block in range(3):
                    assert len(store.take(tier, block, 0, 1, 2, 3, 4, 5)) == 6
            misses = tier.stats().misses
        assert misses > 200
        assert 0 < between.bytes < misses * 400, "of records of 16 KiB"


def test_the_kernel_refuses_a_client_that_writes(store: MappedStore, tmp_path: Path) -> None:
    with store.daemon(18, tmp_path / "daemon") as daemon, store.tier(daemon) as tier:
        store.take(tier, 0, 0)
        with ControlConnection.open(daemon.folder, store.manifest.digest) as control:
            arena = control.descriptor
            assert arena is not None
            size = os.fstat(arena).st_size
            with pytest.raises(PermissionError):
                mmap.mmap(arena, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(arena, b"x", size // 2)
            for length in (0, size + 1):
                with pytest.raises(OSError, match=r"Invalid argument|Operation not permitted"):
                    os.ftruncate(arena, length)
        with pytest.raises(TypeError, match="read-only"):
            next(tier.acquire(keys(0, 0))).record[0] = 1
        assert store.take(tier, 0, 0, 1) == [0, 1]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_cannot_open_the_arena(store: MappedStore, tmp_path: Path) -> None:
    program = (
        "import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "for flags in (os.O_RDWR, os.O_RDONLY):\n"
        "    try: os.open(sys.argv[1], flags); print('opened')\n"
        "    except PermissionError: print('refused')\n"
    )
    with store.daemon(18, tmp_path / "daemon") as daemon, store.tier(daemon) as tier:
        store.take(tier, 0, 0)
        with ControlConnection.open(daemon.folder, store.manifest.digest) as control:
            assert control.descriptor is not None
            passed = control.descriptor
            for path in (f"/proc/self/fd/{passed}", f"/proc/{os.getpid()}/fd/{passed}"):
                command = [sys.executable, "-c", program, path]
                result = subprocess.run(command, pass_fds=[passed], capture_output=True, text=True, check=True)
                assert result.stdout.split() == ["refused", "refused"], result.stderr
        assert store.take(tier, 0, 0, 1) == [0, 1]


def test_no_daemon_and_a_daemon_of_another_model(store: MappedStore, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="No daemon runs"):
        DaemonTier.open(tmp_path / "nothing", store.directory, store.manifest)
    other = MappedStore.make(tmp_path, blocks=1)
    with other.daemon(2, tmp_path / "daemon") as daemon, pytest.raises(UnknownModelError):
        DaemonTier.open(daemon.folder, store.directory, store.manifest)


def test_without_a_thread_for_the_link_the_arena_is_unmapped(store: MappedStore, tmp_path: Path) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("moetier-arena")

    with store.daemon(2, tmp_path / "daemon") as daemon, without_thread("moetier-link"):
        before = mapped()
        with pytest.raises(ExhaustedError) as raised:  # its frames refer to what was opened
            DaemonTier.open(daemon.folder, store.directory, store.manifest)
        assert (mapped(), raised.type) == (before, ExhaustedError)


def test_what_is_granted_while_it_closes(store: MappedStore, tmp_path: Path) -> None:
    """Is no fault of the daemon's; a slot that there is not is."""
    with (
        store.daemon(2, tmp_path / "daemon") as daemon,
        ControlConnection.open(daemon.folder, store.manifest.digest) as control,
    ):
        arena = MappedArena.of(control, store.manifest)
        with pytest.raises(ProtocolError, match="granted slot 2"):
            arena.lease(ExpertKey(0, 0), 2, 2)
        arena.close()
        with pytest.raises(ClosedError):
            arena.lease(ExpertKey(0, 0), 1, 2)


LIMITED = """
import resource, sys
from pathlib import Path
from moetier.runtime.client.tier import DaemonTier
from moetier.tiers.errors import ArenaError
from moetier.tiers.store.folder import read_manifest, store_folder

folder, directory = map(Path, sys.argv[1:])
manifest = read_manifest(store_folder(directory))
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + manifest.stored_bytes // 2, resource.RLIM_INFINITY))
try:
    DaemonTier.open(folder, directory, manifest)
except ArenaError as error:
    print(error.cause)
"""


def test_no_room_to_map_the_arena(tmp_path: Path) -> None:
    plan = make_plan(blocks=1, experts=4, top_k=1, layout=layout_of(rows=1024, columns=2304))
    write_store(tmp_path / "model", plan, make_records(plan))
    with running_daemon(tmp_path / "model", folder=tmp_path / "daemon"):
        result = for_daemons().run(LIMITED, tmp_path / "daemon", tmp_path / "model")
        assert "can't be mapped (Cannot allocate memory)" in result.stdout, result.stderr


UNCLOSED = """
import sys
from pathlib import Path
from moetier.runtime.client.tier import DaemonTier
from moetier.tiers.store.folder import read_manifest, store_folder
from moetier.tiers.layout import ExpertKey

folder, directory = map(Path, sys.argv[1:])
tier = DaemonTier.open(folder, directory, read_manifest(store_folder(directory)))
leases = tier.acquire([ExpertKey(0, expert) for expert in range(4)])
lease = next(leases)
print(lease.key.block, flush=True)
"""


def test_a_process_that_closes_nothing_ends_all_the_same(store: MappedStore, tmp_path: Path) -> None:
    with store.daemon(2, tmp_path / "daemon") as daemon:
        for _ in range(5):
            result = for_daemons().run(UNCLOSED, daemon.folder, store.directory)
            assert (result.returncode, result.stdout, result.stderr) == (0, "0\n", "")
        daemon.wait_for("leases == 0 and clients == 0")
