"""The life of a daemon's process: how it starts, how it ends, and what it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from daemons import DaemonProcess, daemon_command, running_daemon
from grpc_health.v1 import health_pb2, health_pb2_grpc
from places import HELPERS
from prepared import MAIN, for_daemons
from raw_client import RawClient
from readers import PATIENCE
from stores import layout_of, make_plan, make_records, make_store, write_store
from threads import Task, wait_until
from users import as_nobody

from moetier.proto import expert_store_pb2 as pb
from moetier.runtime.wire.address import Address, Credentials, DaemonCard
from moetier.runtime.wire.channel import open_channel
from moetier.runtime.wire.control import ControlConnection
from moetier.runtime.wire.probe import probe
from moetier.runtime.wire.status_codes import error_from_message, error_of
from moetier.tiers.errors import UnavailableError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.folder import read_manifest
from moetier.tools.main import main

SLOT = layout_of().slot_bytes
Store = tuple[Path, Manifest, dict[ExpertKey, bytes]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("store")
    records = make_store(folder, experts=8)
    return folder, read_manifest(folder / "experts.zarr"), records


def starting(directories: Path | list[Path], *options: str | Path) -> subprocess.CompletedProcess[str]:
    """A daemon that is not to start."""
    names = [directories] if isinstance(directories, Path) else directories
    return for_daemons().run(MAIN, "daemon", *names, *options)


def is_served(daemon: DaemonProcess, store: Store, block: int = 0, expert: int = 1) -> None:
    with RawClient(daemon.folder, store[1]) as client:
        client.acquire(1, block, [expert])
        assert client.record(client.granted().slot) == store[2][ExpertKey(block, expert)]


# -- start ------------------------------------------------------------------------------------------------------------


def test_it_starts_serves_and_leaves_nothing(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    with running_daemon(store[0], folder=folder) as daemon:
        assert {path.name for path in folder.iterdir()} == {"lock", "daemon.json", "grpc.sock", "side.sock"}
        assert folder.stat().st_mode & 0o777 == 0o700
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.iterdir())
        assert daemon.card.pid == daemon.pid
        assert [model.digest for model in daemon.card.models] == [store[1].digest]
        is_served(daemon, store)
        wait_until(lambda: "event=client-gone" in daemon.log)
        children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text()
        assert daemon.stop() == 0
        assert children == ""
        assert list(folder.iterdir()) == []
        events = [dict(field.split("=", 1) for field in line.split(" ")[:3]) for line in daemon.log.splitlines()]
        assert next(event["event"] for event in events) == "ready"
        assert [event["event"] for event in events][-3:] == ["signal", "drained", "stopped"]
        assert all(event["level"] == "info" and event["time"].endswith("Z") for event in events)


def test_a_daemon_without_its_model_makes_no_folder_and_keeps_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the program that has called it goes on."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    before = os.umask(0o027)
    try:
        assert main(["daemon", str(tmp_path / "no.gguf")]) == 1
        assert "There is no file" in capsys.readouterr().err
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["with space", "per%20cent", "ü", "#?x"])
def test_its_folder_may_have_any_name(store: Store, tmp_path: Path, name: str) -> None:
    with running_daemon(store[0], folder=tmp_path / name) as daemon:
        is_served(daemon, store)
        assert (tmp_path / name / "grpc.sock").is_socket()
        assert daemon.stop() == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, f"{name}.log"])


@pytest.mark.parametrize(
    ("where", "words"),
    [("XDG_RUNTIME_DIR", []), ("TMPDIR", ["--folder", "other"])],
    ids=["default-runtime", "name-temporary"],
)
def test_where_it_is_by_default(store: Store, tmp_path: Path, where: str, words: list[str]) -> None:
    """Beneath the user's runtime folder, or where there is none, beneath one of the user's own for such things."""
    environment = os.environ | {"XDG_RUNTIME_DIR": "not/absolute", where: str(tmp_path)}
    parent = tmp_path / ("moetier" if where == "XDG_RUNTIME_DIR" else f"moetier-{os.getuid()}")
    folder = parent / (words[-1] if words else "default")
    command = daemon_command(store[0], "--ram", str(3 * SLOT), *words)
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment) as process:
        try:
            wait_until(lambda: (folder / "daemon.json").exists())
            with probe(Address.of(folder)) as daemon:
                assert daemon.describe().pid == process.pid
            assert [path.stat().st_mode & 0o777 for path in (parent, folder)] == [0o700, 0o700]
            process.terminate()
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("with_token", [True, False])
def test_insecure_is_reported(store: Store, tmp_path: Path, with_token: bool) -> None:
    token = tmp_path / "token"
    token.write_text("s3cret\n")
    extra = ["--listen", "0.0.0.0:0", "--insecure", *(["--token-file", str(token)] if with_token else [])]
    with running_daemon(store[0], folder=tmp_path / "d", extra=extra) as daemon:
        lacks = "TLS" if with_token else '"a token and TLS"'
        assert f"level=warning event=insecure listen={daemon.card.listen} without={lacks}\n" in daemon.log
        assert daemon.stop() == 0


def test_more_memory_than_there_is_is_reported(store: Store, tmp_path: Path) -> None:
    """As `generate` has it: all experts fit, which is what it takes."""
    with running_daemon(store[0], ram="900TiB", folder=tmp_path / "d") as daemon:
        assert daemon.stats().host.slots == 24
        (line,) = (line for line in daemon.log.splitlines() if "event=more-than-there-is" in line)
        assert re.search(r'level=warning .* asked="900 TiB" there="\S+ \wiB" limiter=".+" budget="384 KiB"$', line)
    with running_daemon(store[0], ram="100MiB", folder=tmp_path / "e") as daemon:  # than there are experts
        assert "level=warning" not in daemon.log


def test_a_second_one_names_the_first(store: Store, tmp_path: Path) -> None:
    with running_daemon(store[0], folder=tmp_path / "d") as daemon:
        second = starting(store[0], "--folder", tmp_path / "d")
        assert second.returncode == 1
        assert str(daemon.pid) in second.stderr
        assert store[1].model in second.stderr
        assert len(second.stderr.splitlines()) == 2
        is_served(daemon, store)
        with running_daemon(store[0], folder=tmp_path / "e") as other:  # beside it
            is_served(other, store)
        is_served(daemon, store)


def test_of_many_at_once_one_starts(store: Store, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir(mode=0o700)
    command = daemon_command(store[0], "--folder", tmp_path / "d", "--ram", str(3 * SLOT))
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    try:
        wait_until(lambda: sum(process.poll() is None for process in processes) == 1)
        (winner,) = [process for process in processes if process.poll() is None]
        assert [process.returncode for process in processes if process is not winner] == [1, 1, 1]
        wait_until(lambda: DaemonCard.read(tmp_path / "d") is not None)
        winner.send_signal(signal.SIGTERM)
        assert winner.wait(PATIENCE) == 0
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert list((tmp_path / "d").iterdir()) == []


def test_files_of_a_killed_daemon_do_not_hinder_the_next(store: Store, tmp_path: Path) -> None:
    with running_daemon(store[0], folder=tmp_path / "d") as daemon:
        for _ in range(3):
            daemon.kill()
            assert (tmp_path / "d" / "side.sock").exists()
            with pytest.raises(UnavailableError):
                ControlConnection.open(tmp_path / "d", None)
            daemon.start()
            is_served(daemon, store)
        assert daemon.stop() == 0
        assert list((tmp_path / "d").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--ram", "1KiB"], "too small"),
        (["--ram", "lots"], "not an amount"),
        (["--folder", "127.0.0.1:7"], "not a folder"),
        (["--listen", "0.0.0.0:0"], "There is no token for"),
        (["--listen", "127.0.0.1:0", "--token-file", "/nonexistent"], "can't be read"),
        (["--listen", "[::]:0", "--token-file", "TOKEN", "--tls-cert", "TOKEN", "--tls-key", "TOKEN"], "PEM"),
        (["--insecure"], "--listen"),
        (["--ready-fd", "77"], "not open"),
        (["--ready-fd", "-1"], "not open"),
        (["--ready-fd", str(2**40)], "not open"),
        (["--leases", "0"], "Give 1 to 10,000."),
        (["--leases", "many"], "'many' is not a whole number."),
        (["--max-clients", "1.5"], "'1.5' is not a whole number."),
        (["--drain", "-1"], "Give 0 to 86,400 seconds."),
        (["--wait", "nan"], "Give 0 to 86,400 seconds."),
        (["--listen", "no-such-host.invalid:70", "--insecure"], "can't listen"),
        (["--no-such-option"], "has no option --no-such-option"),
    ],
)
def test_options_that_cannot_work_are_reported(store: Store, tmp_path: Path, options: list[str], says: str) -> None:
    token = tmp_path / "token"
    token.write_text("s3cret\n")
    options = [str(token) if option == "TOKEN" else option for option in options]
    if "--folder" not in options:
        options += ["--folder", str(tmp_path / "d")]
    result = starting(store[0], *options)
    assert result.returncode in (1, 2), result.stderr
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "d").exists() or list((tmp_path / "d").iterdir()) == []


def test_stores_that_cannot_be_served_are_reported(store: Store, tmp_path: Path) -> None:
    for directories in ([tmp_path / "nothing"], [store[0], tmp_path / "nothing"], [store[0], store[0]]):
        result = starting(directories, "--folder", tmp_path / "d")
        assert result.returncode == 1
        assert len(result.stderr.splitlines()) == 2, result.stderr
        assert not (tmp_path / "d").exists()


def test_a_folder_that_is_not_safe_is_refused(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir(mode=0o755)
    assert "chmod 700" in starting(store[0], "--folder", folder).stderr
    folder.chmod(0o700)
    (tmp_path / "link").symlink_to(folder)
    assert "is not a folder" in starting(store[0], "--folder", tmp_path / "link").stderr
    (folder / "lock").symlink_to(tmp_path / "elsewhere")  # not followed
    assert starting(store[0], "--folder", folder).returncode == 1
    assert not (tmp_path / "elsewhere").exists()


def test_a_taken_port_is_reported(store: Store, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = starting(store[0], "--folder", tmp_path / "d", "--listen", f"127.0.0.1:{port}", "--insecure")
    assert result.returncode == 1
    assert "can't listen" in result.stderr
    assert list((tmp_path / "d").iterdir()) == []


def test_several_models_share_the_memory(tmp_path: Path) -> None:
    stores = []
    for number, experts in enumerate((4, 12)):
        plan = make_plan(experts=experts, model=f"acme/{experts}")
        records = make_records(plan, number)
        stores.append((tmp_path / str(number), write_store(tmp_path / str(number), plan, records), records))
    with running_daemon([stores[0][0], stores[1][0]], ram=24 * SLOT, folder=tmp_path / "d") as daemon:
        slots = [daemon.stats(manifest.digest).host.slots for _, manifest, _ in stores]
        assert sum(slots) in (23, 24)
        assert slots[0] < slots[1]
        assert [model.name for model in daemon.card.models] == ["acme/4", "acme/12"]
        with RawClient(daemon.folder, stores[0][1]) as one, RawClient(daemon.folder, stores[1][1]) as other:
            for client, (_, _, records) in ((one, stores[0]), (other, stores[1])):
                client.acquire(1, 2, [0, 3])
                for _ in range(2):
                    lease = client.granted()
                    assert client.record(lease.slot) == records[ExpertKey(2, lease.expert)]
            one.acquire(2, 0, [11])  # the other's expert
            assert one.failed().error.type == "MissingExpertError"
        assert [daemon.stats(manifest.digest).requests for _, manifest, _ in stores] == [2, 1]
        assert daemon.stop() == 0


# -- who may ----------------------------------------------------------------------------------------------------------


def test_another_user_is_refused_by_folder_and_by_peer(store: Store) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp", prefix="moetier-test-") as name:
        base = Path(name)
        base.chmod(0o755)
        with running_daemon(store[0], folder=base / "d") as daemon:

            def control() -> object:
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
                    end.connect(str(base / "d/side.sock"))
                    try:
                        end.send(json.dumps({"protocol": 1, "digest": store[1].digest}).encode())
                        return socket.recv_fds(end, 65536, 4)[:2]
                    except (ConnectionResetError, BrokenPipeError):
                        return socket.recv_fds(end, 65536, 4)[:2]

            assert "PermissionError" in as_nobody(control)
            (base / "d").chmod(0o777)
            for path in (base / "d").iterdir():
                path.chmod(0o666)
            said = as_nobody(control)
            assert "RefusedError" in said
            assert said.endswith("[])")
            # the gRPC socket can be reached as well now: without a credential nothing is served (test_service.py)
            (base / "d").chmod(0o700)
            assert daemon.stats().clients == 0
            assert daemon.stop() == 0


# -- the end ----------------------------------------------------------------------------------------------------------


def test_sighup_reloads_nothing_and_says_so(store: Store, tmp_path: Path) -> None:
    with running_daemon(store[0], folder=tmp_path / "d") as daemon:
        daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "nothing is reloaded" in daemon.log)
        is_served(daemon, store)
        assert daemon.stop() == 0


@pytest.fixture
def watch(store: Store, tmp_path: Path) -> Iterator[tuple[DaemonProcess, list[int]]]:
    """A daemon, and what its health watcher has been told."""
    with running_daemon(store[0], folder=tmp_path / "d", extra=["--drain", "20"]) as daemon:
        told: list[int] = []
        channel = open_channel(daemon.address, Credentials())
        calls = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())

        def read() -> None:
            with contextlib.suppress(grpc.RpcError):
                told.extend(reply.status for reply in calls)

        reader = Task(read, "watcher")
        wait_until(lambda: told == [health_pb2.HealthCheckResponse.SERVING])
        yield daemon, told
        daemon.end()
        channel.close()
        reader.result()


def test_sigterm_under_load_finishes_what_is_in_hand(watch: tuple[DaemonProcess, list[int]], store: Store) -> None:
    daemon, told = watch
    with RawClient(daemon.folder, store[1]) as client:
        client.acquire(1, 0, [0, 1, 2])
        held = [client.granted() for _ in range(3)]
        daemon.process.send_signal(signal.SIGTERM)
        wait_until(lambda: health_pb2.HealthCheckResponse.NOT_SERVING in told)
        # what is granted stays, and is still given back one by one
        client.release(1, [0])
        client.acquire(2, 1, [0])
        refused = client.failed()
        assert refused.request == 2
        assert isinstance(error_from_message(refused.error), UnavailableError)
        with open_channel(daemon.address, Credentials()) as channel:
            status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE).status
            assert status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(UnavailableError, match="ending"):
            ControlConnection.open(daemon.folder, store[1].digest)
        fetch = pb.FetchRequest(digest=store[1].digest, block=0, expert=0)
        with pytest.raises(grpc.RpcError) as unavailable:
            list(client.stub.Fetch(fetch, timeout=PATIENCE))
        assert unavailable.value.code() is grpc.StatusCode.UNAVAILABLE
        assert daemon.process.poll() is None
        for lease in held:
            assert client.record(lease.slot) == store[2][ExpertKey(0, lease.expert)]
        client.release(1)
        error = client.ended()
        assert error is not None
        assert isinstance(error_of(error), UnavailableError)
        assert daemon.process.wait(PATIENCE) == 0
        # who has mapped the arena computes on
        assert client.record(held[0].slot) == store[2][ExpertKey(0, held[0].expert)]
        assert not client.control.is_alive()
    assert list(daemon.folder.iterdir()) == []
    assert "finished=True" in daemon.log


def test_a_client_that_never_gives_back_is_waited_for_no_longer_than_said(store: Store, tmp_path: Path) -> None:
    with (
        running_daemon(store[0], folder=tmp_path / "d", extra=["--drain", "0.3"]) as daemon,
        RawClient(daemon.folder, store[1]) as client,
    ):
        client.acquire(1, 0, [0])
        client.granted()
        assert daemon.stop() == 0
        assert "finished=False" in daemon.log
        assert list(daemon.folder.iterdir()) == []


# numpy begins threads as it is imported, unless it is told not to as the tests are
THREADS = {"OMP_NUM_THREADS": "2"}


def test_a_second_signal_ends_the_wait(store: Store, tmp_path: Path) -> None:
    with (
        running_daemon(store[0], folder=tmp_path / "d", extra=["--drain", "3600"], environment=THREADS) as daemon,
        RawClient(daemon.folder, store[1]) as client,
    ):
        client.acquire(1, 0, [0])
        client.granted()
        daemon.process.send_signal(signal.SIGINT)
        wait_until(lambda: "event=signal" in daemon.log)
        assert daemon.process.poll() is None
        assert daemon.stop() == 0


def test_a_hangup_during_the_wait_is_no_way_to_die(store: Store, tmp_path: Path) -> None:
    with (
        running_daemon(store[0], folder=tmp_path / "d", extra=["--drain", "3600"], environment=THREADS) as daemon,
        RawClient(daemon.folder, store[1]) as client,
    ):
        client.acquire(1, 0, [0])
        client.granted()
        daemon.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "event=signal" in daemon.log)
        daemon.process.send_signal(signal.SIGHUP)  # of its terminal, or of systemd with SendSIGHUP=yes
        client.release(1)
        assert daemon.process.wait(PATIENCE) == 0
        assert "finished=True" in daemon.log


def test_a_fetch_under_way_is_finished(store: Store, tmp_path: Path) -> None:
    extra = ["--listen", "127.0.0.1:0", "--insecure"]
    with running_daemon(store[0], folder=tmp_path / "d", extra=extra) as daemon:
        address = Address(target=daemon.card.listen)
        with open_channel(address, Credentials(insecure=True)) as channel:
            from moetier.proto.expert_store_pb2_grpc import ExpertStoreStub

            stub = ExpertStoreStub(channel)
            call = stub.Fetch(pb.FetchRequest(digest=store[1].digest, block=0, expert=3), timeout=PATIENCE)
            first = next(call)
            daemon.process.send_signal(signal.SIGTERM)
            data = first.data + b"".join(piece.data for piece in call)
            assert data[:-4] == store[2][ExpertKey(0, 3)]
        assert daemon.process.wait(PATIENCE) == 0


CLIENT = """
import signal, sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from moetier.tiers.store.folder import read_manifest
from raw_client import RawClient
client = RawClient(Path(sys.argv[1]), read_manifest(Path(sys.argv[2])))
client.acquire(1, 0, [0, 1])
client.acquire(2, 1, [0])
for _ in range(3):
    client.granted()
print("holds", flush=True)
signal.pause()
"""


def test_a_killed_clients_leases_are_back_within_a_second(store: Store, tmp_path: Path) -> None:
    with running_daemon(store[0], ram=12 * SLOT, folder=tmp_path / "d") as daemon:
        before: tuple[int, int] | None = None
        taken = []
        for _ in range(6):
            reading, writing = os.pipe()
            with os.fdopen(reading) as said, os.fdopen(writing) as stdout:
                clients = [
                    for_daemons().start(
                        CLIENT, daemon.folder, store[0] / "experts.zarr", HELPERS, stdin=0, stdout=stdout.fileno()
                    )
                    for _ in range(3)
                ]
                assert [said.readline() for _ in clients] == ["holds\n"] * 3
            assert daemon.stats().leases == 9
            for client in clients:
                client.kill()
            began = time.monotonic()
            daemon.wait_for("leases == 0 and clients == 0")
            taken.append(time.monotonic() - began)
            for client in clients:
                client.wait(PATIENCE)
            resources = resources_of(daemon.pid)
            before = before or resources
        assert before is not None
        wait_until(lambda: resources_of(daemon.pid) <= before)
        assert min(taken) < 1, "but for moments when the machine had other work"
        is_served(daemon, store)
        assert daemon.stop() == 0


def resources_of(pid: int) -> tuple[int, int]:
    """Descriptors and threads."""
    descriptors, threads = (sum(1 for _ in Path(f"/proc/{pid}/{what}").iterdir()) for what in ("fd", "task"))
    return descriptors, threads
