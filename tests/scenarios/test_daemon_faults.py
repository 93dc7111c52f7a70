"""A daemon whose disk, memory, descriptors or manager fail, for real: it says what is wrong, and serves the rest."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import grpc
import pytest
from cgroups import memory_limit
from daemons import DaemonProcess, daemon_command, running_daemon
from faults import flip_bit, mounted, need_strace
from prepared import MAIN, for_daemons
from raw_client import RawClient
from readers import PATIENCE
from stores import layout_of, make_store
from threads import wait_until

from moetier.proto import expert_store_pb2 as pb
from moetier.proto.expert_store_pb2_grpc import ExpertStoreStub
from moetier.runtime.daemon.leases import CALLS
from moetier.runtime.wire.address import Address, Credentials
from moetier.runtime.wire.channel import open_channel
from moetier.runtime.wire.control import ControlConnection
from moetier.runtime.wire.status_codes import error_from_message, error_of
from moetier.tiers.errors import ChecksumError, MoetierError, StoreReadError, UnavailableError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.folder import read_manifest

SLOT = layout_of().slot_bytes
Store = tuple[Path, Manifest, dict[ExpertKey, bytes]]


def new_store(folder: Path) -> Store:
    records = make_store(folder, experts=8)
    return folder, read_manifest(folder / "experts.zarr"), records


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return new_store(tmp_path_factory.mktemp("store"))


def shard(folder: Path, block: int) -> Path:
    return folder / f"experts.zarr/records/c/{block}/0/0"


def serves(client: RawClient, store: Store, request: int, block: int, *experts: int) -> None:
    client.acquire(request, block, experts)
    for _ in experts:
        lease = client.granted()
        assert client.record(lease.slot) == store[2][ExpertKey(block, lease.expert)]
    client.release(request)


def refused(client: RawClient, request: int, block: int, expert: int) -> MoetierError:
    client.acquire(request, block, [expert])
    failed = client.failed()
    assert failed.request == request
    return error_from_message(failed.error)


# -- disks ------------------------------------------------------------------------------------------------------------


def test_a_disk_that_fails_and_recovers(store: Store, tmp_path: Path) -> None:
    """Every read of one shard fails, as the kernel tells it, until the tracer goes."""
    need_strace()
    bad = shard(store[0], 1)
    fault = "inject=preadv,preadv2:error=EIO"  # of records; the index was read by pread
    prefix = ["strace", "-D", "-f", "-qq", "-o", str(tmp_path / "trace"), "-P", str(bad), "-e", fault]
    with (
        running_daemon(store[0], ram=12 * SLOT, folder=tmp_path / "d", prefix=prefix) as daemon,
        RawClient(daemon.folder, store[1]) as client,
        RawClient(daemon.folder, store[1]) as other,
    ):
        for request, expert in ((1, 2), (2, 2), (3, 5)):  # nothing of it is remembered, or counted as there
            error = refused(client, request, 1, expert)
            assert isinstance(error, StoreReadError)
            assert str(bad) in error.cause
            assert os.strerror(errno.EIO) in error.cause
            serves(other, store, request, 0, request, 7)
            serves(other, store, request + 10, 2, request)
        stats = daemon.stats()
        assert (stats.host.failures, stats.leases) == (3, 0)
        assert stats.host.ready == 4 + 3
        with pytest.raises(grpc.RpcError) as failed:
            list(client.stub.Fetch(pb.FetchRequest(digest=store[1].digest, block=1, expert=2), timeout=PATIENCE))
        assert failed.value.code() is grpc.StatusCode.INTERNAL
        assert isinstance(error_of(failed.value), StoreReadError)
        os.kill(tracer_of(daemon.pid), 9)
        wait_until(lambda: tracer_of(daemon.pid) == 0)
        serves(client, store, 4, 1, 2, 5)
        assert daemon.stop() == 0
    assert "EIO" in (tmp_path / "trace").read_text()


def tracer_of(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(r"^TracerPid:\s+(\d+)$", status, re.MULTILINE)[0])


def test_a_bit_that_flips_under_a_daemon(tmp_path: Path) -> None:
    """Every expert of the block but the one is served, to this host and to others; flipped back, that one too."""
    store = new_store(tmp_path / "store")
    name = store[1].model
    directory = Path(os.path.relpath(store[0]))
    with (
        running_daemon(directory, ram=12 * SLOT, folder=tmp_path / "d") as daemon,
        RawClient(daemon.folder, store[1]) as client,
    ):
        serves(client, store, 1, 1, 0)
        for number, position in enumerate((SLOT * 2, SLOT * 3 - 1, SLOT * 2 + 5000), start=1):
            flip_bit(shard(store[0], 1), position, bit=number)
            error = refused(client, 1, 1, 2)
            assert isinstance(error, ChecksumError)
            for said in (name, "block 1", "expert 2", str(shard(store[0], 1))):
                assert said in error.cause
            with pytest.raises(grpc.RpcError) as failed:
                list(client.stub.Fetch(pb.FetchRequest(digest=store[1].digest, block=1, expert=2), timeout=PATIENCE))
            assert failed.value.code() is grpc.StatusCode.DATA_LOSS
            assert daemon.stats().host.failures == 2 * number
            serves(client, store, 1, 1, 0, 1, 3)
            flip_bit(shard(store[0], 1), position, bit=number)
        serves(client, store, 1, 1, 2)
        line = next(line for line in daemon.log.splitlines() if "event=read-failed" in line)
        for said in ("level=warning", f"model={name}", "block 1", "expert 2", str(shard(store[0], 1))):
            assert said in line
        assert "../" not in line, "a path that holds only where the daemon was started"
        assert daemon.stop() == 0


def test_a_shard_that_is_cut_under_a_daemon(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    with (
        running_daemon(store[0], ram=12 * SLOT, folder=tmp_path / "d") as daemon,
        RawClient(daemon.folder, store[1]) as client,
    ):
        os.truncate(shard(store[0], 2), SLOT * 3)
        error = refused(client, 1, 2, 5)
        assert str(shard(store[0], 2)) in error.cause
        serves(client, store, 1, 2, 1, 2)
        serves(client, store, 1, 0, 5)
        assert daemon.stop() == 0


# -- memory and descriptors -------------------------------------------------------------------------------------------


def test_little_shared_memory_and_nothing_locked(tmp_path: Path) -> None:
    """/dev/shm of 64 MB, as in a container, 64 KB that may be locked, and an arena of 96 MB."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("another /dev/shm needs root and unshare")
    layout = layout_of(1024, 1024)
    records = make_store(tmp_path / "store", blocks=2, experts=8, layout=layout)
    manifest = read_manifest(tmp_path / "store" / "experts.zarr")
    script = 'mount -t tmpfs -o size=64m none /dev/shm && ulimit -l 64 && exec "$@"'
    prefix = ["unshare", "-m", "sh", "-c", script, "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespace can be made")
    with (
        running_daemon(tmp_path / "store", ram=16 * layout.slot_bytes, folder=tmp_path / "d", prefix=prefix) as daemon,
        RawClient(daemon.folder, manifest) as client,
    ):
        assert client.layout.nbytes > 90 << 20
        assert re.search(r" /dev/shm tmpfs \S*size=65536k", Path(f"/proc/{daemon.pid}/mounts").read_text())
        limits = Path(f"/proc/{daemon.pid}/limits").read_text()
        assert re.search(r"^Max locked memory +65536 +65536", limits, re.MULTILINE)
        for block in range(2):
            serves(client, (tmp_path, manifest, records), 1, block, *range(8))
        assert daemon.stats().host.ready == 16
        assert daemon.stop() == 0


def test_the_limit_of_a_control_group_is_its_budget(tmp_path: Path) -> None:
    """Of 240 MB, where the model has 300: it takes what there is, serves all of it, and is not killed."""
    layout = layout_of(2048, 2048)
    records = make_store(tmp_path / "store", experts=4, layout=layout)
    manifest = read_manifest(tmp_path / "store" / "experts.zarr")
    with memory_limit(240 << 20) as group:
        enter = ["sh", "-c", f'echo $$ > "{group.folder}/cgroup.procs" && exec "$@"', "sh"]
        command = [*enter, *daemon_command(tmp_path / "store", "--folder", tmp_path / "d", "--ram", "290MB")]
        refused = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
        assert refused.returncode == 1
        cause, fix = refused.stderr.splitlines()
        assert "control group" in cause
        assert re.search(r"from 50,?\d+.* to \d", fix), fix
        with (
            running_daemon(tmp_path / "store", folder=tmp_path / "d", prefix=enter) as daemon,
            RawClient(daemon.folder, manifest) as client,
        ):
            assert 2 <= daemon.stats().host.slots < 9
            for block in range(3):
                for expert in range(4):
                    serves(client, (tmp_path, manifest, records), 1, block, expert)
            assert daemon.stop() == 0


def test_without_a_descriptor_for_a_client_it_is_refused_and_the_others_served(store: Store, tmp_path: Path) -> None:
    with (
        running_daemon(store[0], ram=12 * SLOT, folder=tmp_path / "d") as daemon,
        RawClient(daemon.folder, store[1]) as client,
    ):
        serves(client, store, 1, 0, 1)
        limits = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)

        def used() -> set[int]:
            return {int(link.name) for link in Path(f"/proc/{daemon.pid}/fd").iterdir()}

        def is_one_left() -> bool:
            """For the connection. A descriptor that the daemon has only for a moment must not be counted as used."""
            last = min(set(range(10_000)) - used())
            resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (last + 1, limits[1]))
            time.sleep(0.05)
            return used() >= set(range(last)) and last not in used()

        def is_refused() -> bool:
            """Try again if a descriptor has become free, such as that of a check at the daemon's start."""
            wait_until(is_one_left)
            try:
                ControlConnection.open(daemon.folder, store[1].digest).close()
            except UnavailableError as error:
                return "Too many open files" in str(error)
            return False

        wait_until(is_refused)
        serves(client, store, 1, 1, 1)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, limits)
        with RawClient(daemon.folder, store[1]) as other:
            serves(other, store, 1, 2, 1)
        daemon.wait_for("clients == 1")
        assert "event=client-refused" in daemon.log
        assert daemon.stop() == 0


def test_a_client_without_a_descriptor_is_told_so(store: Store, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with running_daemon(store[0], ram=12 * SLOT, folder=tmp_path / "d") as daemon:
        last = os.dup(0)  # the lowest number that is free: for the socket
        os.close(last)
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, limits[1]))
        try:
            with pytest.raises(UnavailableError, match="too many open files"):
                ControlConnection.open(daemon.folder, store[1].digest)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        daemon.wait_for("clients == 0")


def test_as_many_clients_as_are_reported_whatever_the_soft_limit_of_descriptors(store: Store, tmp_path: Path) -> None:
    prefix = ["sh", "-c", 'ulimit -S -n 64 && exec "$@"', "sh"]
    extra = ["--max-clients", "100"]
    with (
        running_daemon(store[0], ram=12 * SLOT, folder=tmp_path / "d", prefix=prefix, extra=extra) as daemon,
        contextlib.ExitStack() as closing,
    ):
        for _ in range(99):
            closing.enter_context(ControlConnection.open(daemon.folder, store[1].digest))
        client = closing.enter_context(RawClient(daemon.folder, store[1]))
        serves(client, store, 1, 0, 1)
        assert daemon.stats().clients == 100
        closing.close()
        assert daemon.stop() == 0


# -- places -----------------------------------------------------------------------------------------------------------


def starting(store: Store, folder: Path) -> list[str]:
    """What a daemon says that does not start: the cause, and what to do."""
    result = for_daemons().run(MAIN, "daemon", store[0], "--folder", folder)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 2, result.stderr
    return lines


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("file", "is not a folder"),
        ("file/below", "can't be created"),
        ("loop", "is not a folder"),
        ("/proc/nothing/d", "can't be created"),
        ("symlinked lock", "lock"),
        ("lock that is a folder", "lock"),
        ("socket that is a folder", "grpc.sock"),
    ],
)
def test_a_folder_that_is_unusable_is_reported(store: Store, tmp_path: Path, place: str, says: str) -> None:
    folder = tmp_path / place
    (tmp_path / "file").write_text("text")
    (tmp_path / "loop").symlink_to("loop")
    if " " in place:
        folder.mkdir(mode=0o700)
    match place:
        case "symlinked lock":
            (folder / "lock").symlink_to("/nonexistent/lock")
        case "lock that is a folder":
            (folder / "lock").mkdir()
        case "socket that is a folder":
            (folder / "grpc.sock").mkdir()
    cause, fix = starting(store, folder)
    assert says in cause
    assert fix.startswith("  ")


def test_a_full_disk_under_its_folder(store: Store, tmp_path: Path) -> None:
    """It does not start there, and one that runs goes on; its memory is not of that disk."""
    with mounted("tmpfs", tmp_path / "disk", "size=16k,mode=755") as disk:
        fill(disk / "filler")
        assert os.strerror(errno.ENOSPC) in starting(store, disk / "d")[0]
        assert not list((disk / "d").iterdir())
        (disk / "filler").unlink()
        with running_daemon(store[0], ram=12 * SLOT, folder=disk / "d") as daemon:
            fill(disk / "filler")
            with RawClient(daemon.folder, store[1]) as client:
                for block in range(3):
                    serves(client, store, 1, block, 0, 1, 2, 3)
            assert daemon.stop() == 0
            assert not list((disk / "d").iterdir())


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(512))


# -- who started it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("descriptor", [1, 2])
def test_readiness_on_a_standard_stream(store: Store, tmp_path: Path, descriptor: int) -> None:
    """It is closed then, as any other; but no other file gets its number, into which somebody would print."""
    command = daemon_command(store[0], "--folder", tmp_path / "d", "--ready-fd", str(descriptor))
    streams = {("stdout", "stderr")[descriptor - 1]: subprocess.PIPE}
    with subprocess.Popen(command, **streams) as process:  # type: ignore[call-overload]  # its overloads know no dict
        try:
            said = (process.stdout or process.stderr).read()  # to its end
            assert said.endswith(b"ready\n")
            assert str(Path(f"/proc/{process.pid}/fd/{descriptor}").readlink()) == os.devnull
            with RawClient(tmp_path / "d", store[1]) as client:
                serves(client, store, 1, 0, 1)
            process.terminate()
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()


def test_whoever_waits_for_readiness_learns_of_a_failed_start(store: Store, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    command = daemon_command(store[0], "--folder", tmp_path / "d", "--ram", "1", "--ready-fd", str(writing))
    with subprocess.Popen(command, pass_fds=[writing], stderr=subprocess.DEVNULL) as process:
        os.close(writing)
        with os.fdopen(reading, "rb") as end:
            assert end.read() == b""
        assert process.wait(PATIENCE) == 1


# -- peers ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def listening(store: Store, tmp_path: Path) -> Iterator[DaemonProcess]:
    extra = ["--listen", "127.0.0.1:0", "--insecure"]
    with running_daemon(store[0], ram=12 * SLOT, folder=tmp_path / "d", extra=extra) as daemon:
        yield daemon


def test_hundreds_of_idle_connections_do_not_hinder_clients(listening: DaemonProcess, store: Store) -> None:
    """On TCP, and silent."""
    host, _, port = listening.card.listen.rpartition(":")
    with contextlib.ExitStack() as closing:
        for _ in range(300):
            closing.enter_context(socket.create_connection((host, int(port)), PATIENCE))
        with RawClient(listening.folder, store[1]) as client:
            serves(client, store, 1, 0, 1)
        address = Address(target=listening.card.listen)
        with open_channel(address, Credentials(insecure=True)) as channel:
            fetch = pb.FetchRequest(digest=store[1].digest, block=0, expert=1)
            data = b"".join(piece.data for piece in ExpertStoreStub(channel).Fetch(fetch, timeout=PATIENCE))
        assert data[:-4] == store[2][ExpertKey(0, 1)]
    assert listening.stop() == 0


def test_a_client_that_is_idle_may_ask_whether_the_connection_lives(store: Store, tmp_path: Path) -> None:
    """As often as it likes: a server that is not told to bear it ends the connection after a few pings (GOAWAY)."""
    ping, goaway, count = 6, 7, 50
    with (
        running_daemon(store[0], folder=tmp_path / "d") as daemon,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as end,
    ):
        end.settimeout(PATIENCE)
        end.connect(str(daemon.folder / "grpc.sock"))
        end.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4))
        with end.makefile("rb") as answers:
            for number in range(count):
                end.sendall(frame(ping, number.to_bytes(8, "big")))
                while (kind := kind_of_next(answers)) != ping:
                    assert kind != goaway, f"cut off after {number} pings"


def frame(kind: int, payload: bytes = b"") -> bytes:
    """Of HTTP/2 (RFC 9113, 4.1), of no stream."""
    return len(payload).to_bytes(3, "big") + bytes([kind, 0]) + bytes(4) + payload


def kind_of_next(answers: IO[bytes]) -> int:
    head = answers.read(9)
    assert len(head) == 9, "the connection has ended"
    answers.read(int.from_bytes(head[:3], "big"))
    return head[3]


def test_fetches_that_stand_still_take_no_client_its_thread(tmp_path: Path) -> None:
    """As many as there may be, over the Unix socket: who reads nothing is cut off after 10 seconds, and a session is
    served long before."""
    make_store(tmp_path / "store", blocks=1, experts=2, layout=layout_of(2048, 2048))
    manifest = read_manifest(tmp_path / "store" / "experts.zarr")
    with (
        running_daemon(tmp_path / "store", folder=tmp_path / "d", extra=["--max-clients", "1"]) as daemon,
        ControlConnection.open(daemon.folder, None) as control,
        open_channel(daemon.address, Credentials(), bearer=control.session_id) as channel,
    ):
        fetch = pb.FetchRequest(digest=manifest.digest, block=0, expert=0)
        for _ in range(5):  # a busy machine may need more than 5 seconds by itself
            calls = [ExpertStoreStub(channel).Fetch(fetch, timeout=PATIENCE) for _ in range(CALLS)]
            next(calls[0])
            began = time.monotonic()
            with RawClient(daemon.folder, manifest) as client:
                client.acquire(1, 0, [0])
                client.granted()
            seconds = time.monotonic() - began
            for call in calls:
                call.cancel()
            if seconds < 5:
                break
            daemon.wait_for("clients == 0")
        assert seconds < 5
