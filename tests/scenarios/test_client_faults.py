"""Clients and daemons that are killed, stopped, replaced and forked, for real."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
from daemons import DaemonProcess
from mapped_store import MappedStore
from prepared import for_daemons
from readers import PATIENCE
from relays import relay
from stores import keys
from threads import Task, best_time, current_frames, interrupt_main, threads_named, wait_until
from workers import WorkerError

from moetier.runtime.client.daemon_link import Link
from moetier.runtime.client.misses import AWAY_GRACE
from moetier.runtime.client.tier import DaemonTier
from moetier.runtime.wire.address import CONTROL_SOCKET
from moetier.testing import in_fork
from moetier.tiers.device.views import HostViews
from moetier.tiers.errors import UnavailableError
from moetier.tiers.store.folder import store_folder
from moetier.tiers.store.shard import ShardFile

SECOND = 1.0  # within which a dead client's leases are back


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> MappedStore:
    return MappedStore.make(tmp_path_factory.mktemp("mapped"))


def census(daemon: DaemonProcess) -> tuple[int, int]:
    """Descriptors and threads of the daemon."""
    process = Path(f"/proc/{daemon.pid}")
    return len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))


def arenas() -> int:
    """Maps of them in this process."""
    return sum("/memfd:moetier-arena" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_a_hundred_clients_that_are_killed_while_they_hold_leases(store: MappedStore, tmp_path: Path) -> None:
    with store.daemon(4, tmp_path / "daemon") as daemon, store.crew(daemon) as crew:
        (nursery,) = crew.start()
        before: tuple[int, int] | None = None
        taken = []
        for cycle in range(100):
            child = nursery.do("fork_hold", cycle % 3, cycle % 6, (cycle + 1) % 6)
            daemon.wait_for("leases > 0")
            os.kill(child, signal.SIGKILL)
            began = time.monotonic()
            assert nursery.do("reap", child) == signal.SIGKILL
            daemon.wait_for("leases == 0 and clients == 0")
            taken.append(time.monotonic() - began)
            if cycle == 9:  # its threads are made when they are first needed
                before = census(daemon)
        assert sorted(taken)[50] < SECOND, "but for moments when the machine had other work"
        assert before is not None
        wait_until(lambda: census(daemon)[0] <= before[0] and census(daemon)[1] <= before[1] + 8)
        host = daemon.stats().host
        assert host.ready <= host.slots == 4
        assert host.memory_bytes == 4 * store.slot_bytes
        assert sorted(nursery.do("take", 0, 0, 1, 2, 3, 4, 5)) == [0, 1, 2, 3, 4, 5]


def test_a_daemon_killed_and_restarted_under_load(store: MappedStore, tmp_path: Path) -> None:
    with store.daemon(7, tmp_path / "daemon") as daemon, store.crew(daemon) as crew:
        workers = crew.start(3, fallback=False)
        for worker in workers:
            worker.do("work", 0.2)  # all are connected
            worker.tell("work", 4.0, 0.0002)
        for _ in range(2):
            time.sleep(0.7)
            daemon.restart()
            daemon.wait_for("sessions == 3")
        for worker in workers:
            worker.hear()
        found = [worker.do("stats") for worker in workers]
        assert all(stats["used"] > 10 and not stats["wrong"] for stats in found), found
        assert all(stats["connections"] >= 3 for stats in found), found
        assert all(worker.do("census")["maps"] == 1 for worker in workers), "it is the same arena still"
        assert daemon.stats().recovered > 0
        daemon.wait_for("leases == 0 and clients == 3")


def test_hits_go_on_while_the_daemon_is_away_and_are_kept_by_the_next(store: MappedStore, tmp_path: Path) -> None:
    with store.daemon(18, tmp_path / "daemon") as daemon, store.tier(daemon, fallback=False) as tier:
        for block in range(3):
            store.take(tier, block, 0, 1, 2, 3, 4, 5)
        misses = tier.stats().misses  # of 18: the daemon reads the last ones by itself, too
        daemon.kill()
        wait_until(lambda: bool(tier.away))
        for block in range(3):
            assert store.take(tier, block, 5, 4, 3, 2, 1, 0) == [5, 4, 3, 2, 1, 0]
        daemon.start()
        daemon.wait_for("sessions == 1")
        assert store.take(tier, 0, 2, 4, 0) == [2, 4, 0]
        assert tier.stats().misses == misses, "all hits since"
        stats = daemon.wait_for("clients == 1")
        assert (stats.recovered, stats.host.bytes_in) == (18, 0), "nothing was read from the disk"
        assert arenas() == 1


def test_a_daemon_that_comes_back_with_another_arena(store: MappedStore, tmp_path: Path) -> None:
    with store.daemon(18, tmp_path / "daemon") as first, store.tier(first, fallback=False) as tier:
        store.take(tier, 0, 0, 1)
        leases = tier.acquire(keys(0, 0, 1))
        lease = next(leases)
        first.kill()
        with store.daemon(5, tmp_path / "daemon") as second:
            wait_until(lambda: tier.stats().slots == 5)
            assert sorted(store.take(tier, 2, 3, 4)) == [3, 4]
            assert bytes(lease.record) == store.records[lease.key]
            assert lease.validate(), "no process writes to the old arena any more"
            assert [lease.key.expert for lease in leases] == [1]
            del lease, leases
            wait_until(lambda: arenas() == 1)
            assert second.stats().recovered == 0
            assert sorted(store.take(tier, 0, 0, 1)) == [0, 1]
            assert tier.stats().failures == 0


def test_views_keep_no_old_arena(store: MappedStore, tmp_path: Path) -> None:
    with store.daemon(18, tmp_path / "daemon") as first, store.tier(first, fallback=False) as tier:
        views = HostViews(tier)
        for block in range(3):
            assert all(lease.validate() for lease in views.acquire(keys(block, 0, 1, 2, 3, 4, 5)))
        first.kill()
        with store.daemon(5, tmp_path / "daemon"):
            wait_until(lambda: tier.stats().slots == 5)
            for lease in views.acquire(keys(2, 3)):
                assert lease.record.numpy().tobytes() == store.records[lease.key]
                assert lease.validate()
            del lease
            wait_until(lambda: arenas() == 1)
        views.close()


def test_a_daemon_gone_for_good_and_a_local_store(store: MappedStore, tmp_path: Path) -> None:
    with store.daemon(4, tmp_path / "daemon") as daemon, store.tier(daemon) as tier:
        store.take(tier, 0, 0, 1)
        daemon.kill()
        for block in range(3):
            assert sorted(store.take(tier, block, 0, 1, 2, 3, 4, 5)) == [0, 1, 2, 3, 4, 5]
        waited = best_time(lambda: store.take(tier, 2, 4, 5), AWAY_GRACE)
        assert waited < AWAY_GRACE, "who has waited once does not wait again"
        stats = tier.stats()
        assert stats.bytes_in == sum(stats.loads) * store.slot_bytes > 0
        daemon.start()
        daemon.wait_for("sessions == 1")
        for _ in range(100):  # the daemon knows of the session before its client does
            read = tier.stats().bytes_in
            assert sorted(store.take(tier, 1, 2, 3, 4)) == [2, 3, 4]
            if daemon.wait_for("leases == 0").requests:
                break
        assert tier.stats().bytes_in == read, "it goes back to the daemon"


def test_a_daemon_gone_for_good_and_nothing_else(store: MappedStore, tmp_path: Path) -> None:
    with store.daemon(4, tmp_path / "daemon") as daemon, store.tier(daemon, fallback=False, timeout=1.5) as tier:
        store.take(tier, 0, 0, 1)
        daemon.kill()
        wait_until(lambda: bool(tier.away))
        began = time.monotonic()
        with pytest.raises(UnavailableError, match=r"away for 1\.5 seconds") as error:
            store.take(tier, 1, 0)
        assert 1.0 < time.monotonic() - began < 20, "by default it would wait for 30 seconds"
        assert "\n" not in error.value.cause
        assert store.take(tier, 0, 1, 0) == [1, 0], "hits go on"
        daemon.start()
        daemon.wait_for("sessions == 1")  # the pause between two attempts may be longer than the timeout
        assert store.take(tier, 1, 0) == [0]


def test_a_request_under_way_is_repeated_at_the_next_daemon(store: MappedStore, tmp_path: Path) -> None:
    with (
        store.daemon(2, tmp_path / "daemon") as daemon,
        store.crew(daemon) as crew,
        store.tier(daemon, fallback=False) as tier,
    ):
        (holder,) = crew.start()
        holder.do("hold", 0, 0, 1)
        daemon.wait_for("leases == 2")
        task = Task(lambda: store.take(tier, 1, 0, 1, 2))
        daemon.wait_for("requests == 2")
        holder.kill()
        daemon.restart()
        assert sorted(task.result()) == [0, 1, 2]
        daemon.wait_for("leases == 0")


def test_a_daemon_that_is_told_to_end_finishes_what_it_has_begun(store: MappedStore, tmp_path: Path) -> None:
    with store.daemon(4, tmp_path / "daemon") as daemon, store.tier(daemon) as tier:
        leases = tier.acquire(keys(0, 0, 1))
        first = next(leases)
        daemon.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "event=drain" in daemon.log or "event=stopping" in daemon.log or "SIGTERM" in daemon.log)
        assert first.validate()
        assert len([lease.validate() for lease in leases]) == 1, "what was asked for before is granted"
        assert daemon.process.wait(PATIENCE) == 0
        assert sorted(store.take(tier, 1, 2, 3)) == [2, 3], "the local store"
        assert sorted(store.take(tier, 0, 0, 1)) == [0, 1]
        daemon.start()
        daemon.wait_for("sessions == 1")
        assert store.take(tier, 2, 5) == [5]


def test_a_daemon_that_stands_still(store: MappedStore, tmp_path: Path) -> None:
    with (
        store.daemon(4, tmp_path / "daemon") as daemon,
        store.tier(daemon, fallback=False) as patient,
        store.tier(daemon, fallback=False, timeout=1.0) as poor,
        store.tier(daemon, timeout=1.0) as rich,
    ):
        store.take(patient, 0, 0, 1)
        for tier in (poor, rich):
            assert store.take(tier, 0, 0, 1) == [0, 1], "hits"
        daemon.process.send_signal(signal.SIGSTOP)
        with pytest.raises(UnavailableError, match="has not answered"):
            store.take(poor, 1, 0)
        assert store.take(rich, 1, 0) == [0]
        assert store.take(poor, 0, 1, 0) == [1, 0]
        daemon.process.send_signal(signal.SIGCONT)
        daemon.wait_for("sessions == 3 and clients == 3")

        def taken() -> list[int]:
            with contextlib.suppress(UnavailableError):  # a second is not enough if the machine has other work
                return sorted(store.take(poor, 1, 0, 3))
            return []

        wait_until(lambda: taken() == [0, 3])
        daemon.wait_for("leases == 0")


def test_a_tier_closes_beside_a_daemon_that_stands_still(store: MappedStore, tmp_path: Path) -> None:
    """Its last report is not taken."""
    with store.daemon(4, tmp_path / "daemon") as daemon, store.tier(daemon) as tier:
        store.take(tier, 0, 0, 1)
        daemon.process.send_signal(signal.SIGSTOP)
        try:
            store.take(tier, 0, 0, 1)
            Task(tier.close).result()
        finally:
            daemon.process.send_signal(signal.SIGCONT)
        daemon.wait_for("clients == 0")


@pytest.mark.slow
def test_a_daemon_that_stands_still_counts_as_gone(store: MappedStore, tmp_path: Path) -> None:
    """After a ping that is not answered; then nobody waits for it any more."""
    with store.daemon(4, tmp_path / "daemon") as daemon, store.tier(daemon) as tier:
        store.take(tier, 0, 0, 1)
        began = time.monotonic()
        daemon.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: bool(tier.away))
        assert time.monotonic() - began < 30
        store.take(tier, 1, 0)
        taken = list[float]()
        for _ in range(50):  # some attempts to connect
            asked = time.monotonic()
            assert sorted(store.take(tier, 1, 1, 2, 3)) == [1, 2, 3]
            taken.append(time.monotonic() - asked)
            time.sleep(0.1)
        assert median(taken) < 0.5
        daemon.process.send_signal(signal.SIGCONT)
        daemon.wait_for("sessions == 1 and clients == 1")
        assert store.take(tier, 2, 5) == [5]


def test_a_daemon_that_does_not_answer_stays_away(store: MappedStore, tmp_path: Path) -> None:
    """However long each attempt to connect takes: else every miss would wait for it anew."""
    with store.daemon(4, tmp_path / "daemon") as daemon, store.tier(daemon) as tier:
        store.take(tier, 0, 0, 1)
        daemon.kill()
        (daemon.folder / CONTROL_SOCKET).unlink()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:  # as a stopped daemon's
            silent.bind(str(daemon.folder / CONTROL_SOCKET))
            silent.listen()
            silent.settimeout(PATIENCE)
            with silent.accept()[0]:
                since = tier._link.away_since
                assert since is not None
                with silent.accept()[0], silent.accept()[0]:
                    assert tier._link.away_since == since
                    assert "does not answer" in tier.away


def test_a_stream_that_breaks_is_attached_again(store: MappedStore, tmp_path: Path) -> None:
    with (
        store.daemon(4, tmp_path / "daemon") as daemon,
        relay(daemon.folder, tmp_path / "relay") as between,
        DaemonTier.open(between.folder, store.scratch / "no-store", store.manifest) as tier,
    ):
        for expert in range(6):
            assert sorted(store.take(tier, 1, expert, (expert + 1) % 6)) == sorted([expert, (expert + 1) % 6])
            between.cut()
        daemon.wait_for("leases == 0")
        assert tier.connections <= 2, "the control socket is the same, unless a stream was cut before its first message"


# -- forks ------------------------------------------------------------------------------------------------------------


def test_a_forked_child_has_no_tier_and_closes_its_part(store: MappedStore, tmp_path: Path) -> None:
    with store.daemon(4, tmp_path / "daemon") as daemon, store.tier(daemon) as tier:
        store.take(tier, 0, 0, 1)
        assert "ClosedError" in in_fork(lambda: store.take(tier, 0, 0))
        assert "ClosedError" in in_fork(lambda: store.take(tier, 1, 0))
        assert "ClosedError" in in_fork(lambda: tier.prefetch(1, keys(1, 0)))
        assert in_fork(tier.close) == "returned None"
        assert store.take(tier, 0, 0, 1) == [0, 1], "the parent goes on"
        assert store.take(tier, 1, 0) == [0]


def test_the_daemon_sees_the_death_of_a_client_whose_child_lives(store: MappedStore, tmp_path: Path) -> None:
    with store.daemon(4, tmp_path / "daemon") as daemon, store.crew(daemon) as crew:
        (parent,) = crew.start()
        with orphan(parent.do("fork_sleep")):
            # A fork beside a connection that is being made may break it, as gRPC lets both processes do what is queued
            # for it. The leases of a stream end with it; others are taken on the next.
            for block, expert in itertools.product(range(3), (0, 2, 4)):
                parent.do("hold", block, expert, expert + 1)
                if daemon.stats().leases == 2:
                    break
                parent.do("drop")
            else:
                pytest.fail("it never has two leases")
            with orphan(parent.do("fork_sleep")):
                parent.kill()
                daemon.wait_for("leases == 0 and clients == 0")


@contextlib.contextmanager
def orphan(pid: int) -> Iterator[None]:
    """A process that must be there, and is killed in the end."""
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)  # raises if it is gone


FORKS = """
import multiprocessing, os, subprocess, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks of a process with threads
from pathlib import Path
from moetier.runtime.client.tier import DaemonTier
from moetier.tiers.errors import ClosedError
from moetier.tiers.store.folder import read_manifest, store_folder
from moetier.tiers.layout import ExpertKey

folder, directory = map(Path, sys.argv[1:])
tier = DaemonTier.open(folder, directory, read_manifest(store_folder(directory)))

def use(block):
    return sum(lease.validate() for lease in tier.acquire([ExpertKey(block, 0), ExpertKey(block, 1)]))

def child():
    try:
        use(0)
    except ClosedError:
        pass
    else:
        raise AssertionError("it was used")

assert use(0) == 2
for step in range(10):
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    assert process.exitcode == 0, process.exitcode
    pid = os.fork()
    if not pid:
        sys.exit(0)  # as any program ends
    assert os.waitpid(pid, 0)[1] == 0
    subprocess.run(["true"], check=True)
    assert use(step % 3) == 2
tier.close()
print("done")
"""


def test_forks_are_quiet_and_never_hang(store: MappedStore, tmp_path: Path) -> None:
    with store.daemon(4, tmp_path / "daemon") as daemon:
        result = for_daemons().run(FORKS, daemon.folder, store.directory)
        assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


# -- many at a time ---------------------------------------------------------------------------------------------------


def test_a_writer_that_refills_slots_under_readers_all_the_time(tmp_path: Path) -> None:
    """Every wrong record is found: without the proof there are some, and with it none is used."""
    small = MappedStore.make(tmp_path, blocks=1, experts=6, top_k=2)
    with small.daemon(3, tmp_path / "daemon") as daemon, small.crew(daemon) as crew:
        honest, broken = crew.start(3, fallback=False), crew.start(2, fallback=False)
        for worker in broken:
            worker.do("break_proof")
        found: dict[str, dict[str, int]] = {}
        for name, group in (("honest", honest), ("broken", broken + honest)):
            before = [worker.do("stats") for worker in group]
            counts = found[name] = dict.fromkeys(("used", "thrown", "wrong", "discarded"), 0)
            for _ in range(20):  # a busy machine needs more of them
                for worker in group:
                    worker.tell("work", 1.0, 0.001)
                for worker in group:
                    worker.hear()
                after = [worker.do("stats") for worker in group]
                for key in counts:
                    counts[key] = sum(a[key] - b[key] for a, b in zip(after, before, strict=True))
                if counts["used"] > 500 and counts["thrown" if name == "honest" else "wrong"] > 10:
                    break
        assert not sum(worker.do("stats")["wrong"] for worker in honest), found
        assert found["honest"]["used"] > 500, found
        assert found["honest"]["thrown"] == found["honest"]["discarded"] > 10, found
        assert found["broken"]["wrong"] > 10, "this test finds nothing"
        daemon.wait_for("leases == 0")


def test_errors_of_the_daemon_arrive_as_they_are(tmp_path: Path) -> None:
    own = MappedStore.make(tmp_path)
    with own.daemon(4, tmp_path / "daemon") as daemon, own.crew(daemon) as crew:
        (worker,) = crew.start()
        shard = ShardFile.of(store_folder(own.directory), own.manifest, 1).path
        data = shard.read_bytes()
        at = data.index(own.records[keys(1, 2)[0]]) + 100
        shard.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(WorkerError, match=r"ChecksumError: .*block 1.*expert 2"):
            worker.do("take", 1, 2, 3)
        assert worker.do("take", 1, 3) == [3]
        assert worker.do("stats")["failures"] == 1
        shard.write_bytes(data)
        assert worker.do("take", 1, 2) == [2], "an error is not remembered"


def test_an_interrupt_while_a_tier_waits_for_its_first_stream_ends_its_thread(
    store: MappedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waits() -> bool:
        frame = current_frames()[threading.main_thread().ident or 0]
        while frame.f_back is not None and frame.f_code is not threading.Event.wait.__code__:
            frame = frame.f_back
        return frame.f_back is not None and frame.f_back.f_code is Link.__init__.__code__

    monkeypatch.setattr(Link, "_run_connection", lambda link, control: link._closed.wait(PATIENCE))
    with store.daemon(4, tmp_path / "d") as daemon:
        interrupting = Task(lambda: interrupt_main(waits))
        with pytest.raises(KeyboardInterrupt):
            DaemonTier.open(daemon.folder, store.directory, store.manifest)
        interrupting.result()
    assert not threads_named("moetier-link")
