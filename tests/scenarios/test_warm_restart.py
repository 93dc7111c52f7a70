"""A daemon that was killed is started again, and takes its records back from memory that somebody kept."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import DaemonProcess, running_daemon
from faults import need_strace
from places import HELPERS
from raw_client import RawClient
from readers import PATIENCE
from stores import layout_of, make_store
from threads import wait_until

from moetier.runtime.daemon.reclaim import reclaim_arenas
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.folder import read_manifest

SLOT = layout_of().slot_bytes
Store = tuple[Path, Manifest, dict[ExpertKey, bytes]]
ALL = [ExpertKey(block, expert) for block in range(3) for expert in range(4)]  # what fills 12 slots


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("store")
    records = make_store(folder, experts=8)
    return folder, read_manifest(folder / "experts.zarr"), records


def fill(client: RawClient, store: Store) -> dict[ExpertKey, int]:
    """Of 12 slots, every one; the slots by key."""
    slots = {}
    for block in range(3):
        client.acquire(block, block, range(4))
        for _ in range(4):
            lease = client.granted()
            key = ExpertKey(block, lease.expert)
            assert client.record(lease.slot) == store[2][key]
            slots[key] = lease.slot
        client.release(block)
    return slots


def check_all(daemon: DaemonProcess, store: Store) -> None:
    with RawClient(daemon.folder, store[1]) as client:
        fill(client, store)


@pytest.mark.parametrize("ram", [12 * SLOT, None, "1%"], ids=["bytes", "none", "share"])
def test_a_clients_memory_is_taken_back(store: Store, tmp_path: Path, ram: str | int | None) -> None:
    with running_daemon(store[0], ram=12 * SLOT, folder=tmp_path / "d") as daemon:
        with RawClient(daemon.folder, store[1]) as client:
            slots = fill(client, store)
            arena = os.fstat(client.control.descriptor or -1).st_ino
            daemon.kill()
            options = ["--ram", str(ram)] if ram is not None else []
            daemon.command = [*daemon.command[: daemon.command.index("--ram")], *options]
            daemon.start()
            stats = daemon.stats()
            assert (stats.recovered, stats.host.ready, stats.host.slots, stats.host.bytes_in) == (12, 12, 12, 0)
            for key, slot in slots.items():  # who had mapped it goes on
                assert client.record(slot) == store[2][key]
            with RawClient(daemon.folder, store[1]) as other:
                assert os.fstat(other.control.descriptor or -1).st_ino == arena
                assert fill(other, store) == slots
            stats = daemon.stats()
            assert (stats.host.hits, stats.host.misses, stats.host.bytes_in) == (12, 0, 0)
            # and it is a tier like any other: others move in
            with RawClient(daemon.folder, store[1]) as other:
                other.acquire(1, 0, [7])
                assert other.record(other.granted().slot) == store[2][ExpertKey(0, 7)]
        assert daemon.stop() == 0


def test_no_record_is_read_from_the_disk(store: Store, tmp_path: Path) -> None:
    """By what the kernel says of every read of a shard."""
    need_strace()

    def record_reads(trace: Path, process: int) -> int:
        wait_until(lambda: "+++" in trace.with_name(f"{trace.name}.{process}").read_text())
        lines = "".join(path.read_text() for path in trace.parent.glob(f"{trace.name}.*"))
        reads = re.findall(r"^pread\w*\(\d+<[^>]*/records/c/[^>]*>.*= (\d+)$", lines, re.MULTILINE)
        return sum(int(count) >= SLOT for count in reads)

    def traced(name: str) -> list[str]:
        calls = "trace=pread64,preadv,preadv2,read"
        return ["strace", "-D", "-ff", "-y", "-q", "-e", calls, "-o", str(tmp_path / name)]

    with (
        running_daemon(store[0], ram=12 * SLOT, folder=tmp_path / "d", prefix=traced("cold")) as cold,
        RawClient(cold.folder, store[1]) as client,
    ):
        fill(client, store)
        cold.kill()
        with running_daemon(store[0], ram=12 * SLOT, folder=tmp_path / "d", prefix=traced("warm")) as warm:
            check_all(warm, store)
            assert warm.stop() == 0
    assert record_reads(tmp_path / "cold", cold.pid) == 12
    assert record_reads(tmp_path / "warm", warm.pid) == 0


def test_a_record_that_is_not_whole_any_more_is_read_again(store: Store, tmp_path: Path) -> None:
    with (
        running_daemon(store[0], ram=12 * SLOT, folder=tmp_path / "d") as daemon,
        RawClient(daemon.folder, store[1]) as client,
    ):
        slots = fill(client, store)
        daemon.kill()
        with open(f"/proc/self/fd/{client.control.descriptor}", "r+b", buffering=0) as arena:  # noqa: PTH123
            arena.seek(client.layout.offset(slots[ExpertKey(1, 2)]) + 100)
            arena.write(b"not the record")
        daemon.start()
        stats = daemon.stats()
        assert (stats.recovered, stats.host.ready) == (11, 11)
        check_all(daemon, store)
        assert daemon.stats().host.bytes_in == SLOT
        assert daemon.stop() == 0


def test_an_arena_with_other_slots_is_not_reclaimed_and_does_not_hinder(store: Store, tmp_path: Path) -> None:
    with (
        running_daemon(store[0], ram=12 * SLOT, folder=tmp_path / "d") as daemon,
        RawClient(daemon.folder, store[1]) as client,
    ):
        slots = fill(client, store)
        daemon.kill()
        daemon.command[daemon.command.index("--ram") + 1] = str(15 * SLOT)
        daemon.start()
        stats = daemon.stats()
        assert (stats.recovered, stats.host.slots) == (0, 15)
        check_all(daemon, store)
        for key, slot in slots.items():
            assert client.record(slot) == store[2][key]
        assert daemon.stop() == 0


def test_what_a_living_daemon_owns_is_left_to_it(store: Store, tmp_path: Path) -> None:
    with running_daemon(store[0], ram=12 * SLOT, folder=tmp_path / "d") as daemon:
        check_all(daemon, store)
        with running_daemon(store[0], ram=12 * SLOT, folder=tmp_path / "e") as other:
            assert other.stats().recovered == 0
            check_all(other, store)
        with contextlib.ExitStack() as closing:
            assert reclaim_arenas({store[1].digest: store[1]}, closing) == {}
        check_all(daemon, store)


def test_what_other_tests_leave_is_none_of_these(store: Store, tmp_path: Path) -> None:
    """A worker beside this one has no store of the same digest: its daemons are killed too."""
    code = (
        "import sys; from pathlib import Path; from stores import make_store; make_store(Path(sys.argv[1]), experts=8)"
    )
    helpers = str(HELPERS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([helpers, os.environ.get("PYTHONPATH", "")])}
    digests = []
    for worker in ("mine", "mine", "another"):
        folder = tmp_path / str(len(digests))
        command = [sys.executable, "-c", code, str(folder)]
        subprocess.run(command, env=environment | {"PYTEST_XDIST_WORKER": worker}, check=True)
        digests.append(read_manifest(folder / "experts.zarr").digest)
    assert digests[0] == digests[1] != digests[2]
    assert store[1].digest not in digests


def test_a_stopped_daemons_memory_is_taken_back_too(store: Store, tmp_path: Path) -> None:
    """An upgrade: SIGTERM, and the new version is started."""
    with (
        running_daemon(store[0], ram=12 * SLOT, folder=tmp_path / "d") as daemon,
        RawClient(daemon.folder, store[1]) as client,
    ):
        fill(client, store)
        client.release(0)
        assert daemon.stop() == 0
        daemon.start()
        assert daemon.stats().recovered == 12


# -- systemd ----------------------------------------------------------------------------------------------------------


PASSING = """
import fcntl, json, os, sys
kept = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 200) for descriptor in json.loads(sys.argv[1])]
for descriptor in json.loads(sys.argv[1]):
    os.close(descriptor)
for number, descriptor in enumerate(kept, start=3):
    os.dup2(descriptor, number)
    os.close(descriptor)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(kept)), "LISTEN_FDNAMES": sys.argv[2]}
os.execv(sys.argv[3], sys.argv[3:])
"""


class Manager:
    """What systemd does for a service: hears it, and keeps descriptors under names."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(PATIENCE)
        self.environment = {"NOTIFY_SOCKET": str(path)}
        self.stored: list[tuple[str, int]] = []

    def hear(self) -> list[str]:
        """Until it is ready; what it has said."""
        said = []
        while True:
            data, descriptors, _, _ = socket.recv_fds(self.socket, 4096, 4)
            message = data.decode()
            said.append(message.split("\n")[0])
            name = message.partition("FDNAME=")[2]
            if message.startswith("FDSTORE=1"):
                self.stored += [(name, descriptor) for descriptor in descriptors]
            elif message.startswith("FDSTOREREMOVE=1"):
                for entry in [entry for entry in self.stored if entry[0] == name]:
                    os.close(entry[1])
                    self.stored.remove(entry)
            elif message.startswith("READY=1"):
                return said

    @contextlib.contextmanager
    def run(self, store: Store, folder: Path, ram: int) -> Iterator[DaemonProcess]:
        names = ":".join(name for name, _ in self.stored)
        kept = [descriptor for _, descriptor in self.stored]
        with running_daemon(
            store[0],
            ram=ram,
            folder=folder,
            environment=self.environment,
            prefix=[sys.executable, "-c", PASSING, json.dumps(kept), names],
            descriptors=kept,
        ) as daemon:
            yield daemon

    def close(self) -> None:
        self.socket.close()
        for _, descriptor in self.stored:
            os.close(descriptor)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path / "notify")
    yield manager
    manager.close()


def test_systemd_keeps_the_memory(store: Store, tmp_path: Path, manager: Manager) -> None:
    name = f"arena-{store[1].digest[:32]}"
    with manager.run(store, tmp_path / "d", 12 * SLOT) as daemon:
        assert manager.hear() == ["FDSTOREREMOVE=1", "FDSTORE=1", "READY=1"]
        assert [stored for stored, _ in manager.stored] == [name]
        check_all(daemon, store)
        daemon.kill()
    for _ in range(2):  # again and again, and it is kept once
        with manager.run(store, tmp_path / "d", 12 * SLOT) as daemon:
            assert manager.hear() == ["READY=1"]
            stats = daemon.stats()
            assert (stats.recovered, stats.host.bytes_in) == (12, 0)
            assert f'holder="systemd ({name})"' in daemon.log
            check_all(daemon, store)
            assert daemon.stats().host.bytes_in == 0
            daemon.kill()
    with manager.run(store, tmp_path / "d", 15 * SLOT) as daemon:  # of no use: given back
        assert manager.hear() == ["FDSTOREREMOVE=1", "FDSTORE=1", "READY=1"]
        assert daemon.stats().recovered == 0
        assert len(arenas_of(daemon)) == 1, "the memory of the former one goes"
        check_all(daemon, store)
        assert daemon.stop() == 0
        assert manager.socket.recv(4096) == b"STOPPING=1"
    with manager.run(store, tmp_path / "d", 15 * SLOT) as daemon:
        manager.hear()
        assert daemon.stats().recovered == 12


def arenas_of(daemon: DaemonProcess) -> set[int]:
    """The memory files that its process has open."""
    found = set()
    for link in Path(f"/proc/{daemon.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since
            if os.readlink(link).startswith("/memfd:"):  # noqa: PTH115
                found.add(link.stat().st_ino)
    return found


def test_systemd_does_not_keep_the_memory_of_a_model_that_is_served_no_more(
    store: Store, tmp_path: Path, manager: Manager
) -> None:
    make_store(tmp_path / "next", seed=1)
    following = (tmp_path / "next", read_manifest(tmp_path / "next" / "experts.zarr"), store[2])
    with manager.run(store, tmp_path / "d", 12 * SLOT) as daemon:
        manager.hear()
        check_all(daemon, store)
        daemon.kill()
    with manager.run(following, tmp_path / "d", 12 * SLOT) as daemon:
        manager.hear()
        assert [name for name, _ in manager.stored] == [f"arena-{following[1].digest[:32]}"]
        assert len(arenas_of(daemon)) == 1
        assert daemon.stop() == 0


def test_what_systemd_keeps_that_is_no_arena_is_closed(store: Store, tmp_path: Path, manager: Manager) -> None:
    manager.stored = [("junk", os.open(__file__, os.O_RDONLY)), ("memory", os.memfd_create("moetier-arena"))]
    with manager.run(store, tmp_path / "d", 12 * SLOT) as daemon:
        manager.hear()
        assert daemon.stats().recovered == 0
        assert [name for name, _ in manager.stored] == [f"arena-{store[1].digest[:32]}"]
        assert len(arenas_of(daemon)) == 1
        check_all(daemon, store)
        assert daemon.stop() == 0


# -- which, and how much ----------------------------------------------------------------------------------------------
