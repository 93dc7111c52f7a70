"""``moetier ps`` and ``moetier stats``, as commands, of real daemons."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from daemons import DaemonProcess, running_daemon
from prepared import MAIN, for_daemons
from raw_client import RawClient
from readers import PATIENCE
from stores import layout_of, make_plan, make_records, write_store

from moetier.proto import expert_store_pb2 as pb
from moetier.runtime.model.name_files import register_name
from moetier.runtime.wire.probe import client_processes
from moetier.tiers.manifest import Manifest
from moetier.tools.cli.report import format_seconds, with_processes
from moetier.tools.commands.stats import changes

SLOT = layout_of().slot_bytes
COMMAND = [sys.executable, "-m", "moetier.tools.main"]


@pytest.fixture
def daemon(store: tuple[Path, Manifest], runtime: Path) -> Iterator[DaemonProcess]:
    folder = runtime / "moetier/default"
    with running_daemon_in(folder, store[0]) as daemon:
        yield daemon


@contextmanager
def running_daemon_in(folder: Path, directory: Path | list[Path], *extra: str) -> Iterator[DaemonProcess]:
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    with running_daemon(directory, ram=12 * SLOT, folder=folder, extra=extra) as daemon:
        yield daemon


def moetier(runtime: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return for_daemons().run(
        MAIN, *words, environment={"XDG_RUNTIME_DIR": str(runtime), "XDG_DATA_HOME": os.environ["XDG_DATA_HOME"]}
    )


def said(runtime: Path, *words: str) -> str:
    result = moetier(runtime, *words)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def refused(runtime: Path, *words: str) -> str:
    """The cause; what to do is in a second line."""
    result = moetier(runtime, *words)
    assert (result.returncode, result.stdout) == (1, "")
    cause, fix = result.stderr.splitlines()
    assert fix.startswith("  ")
    return cause


def use(daemon: DaemonProcess, manifest: Manifest) -> RawClient:
    """A client that has asked for three, and holds two of them; the third was a hit afterwards."""
    client = RawClient(daemon.folder, manifest)
    client.acquire(1, 0, [1, 2, 3])
    for _ in range(3):
        client.granted()
    client.release(1, [3])
    client.acquire(2, 0, [3])
    client.granted()
    client.release(2)
    daemon.wait_for("leases == 2")
    return client


# -- ps ---------------------------------------------------------------------------------------------------------------


def test_nobody(runtime: Path) -> None:
    assert said(runtime, "ps") == f"No daemon runs in {runtime}/moetier.\n"
    assert json.loads(said(runtime, "ps", "--json")) == []


def test_it_lists_daemons_with_their_models(daemon: DaemonProcess, store: tuple[Path, Manifest], runtime: Path) -> None:
    with use(daemon, store[1]):
        head, row = said(runtime, "ps").splitlines()
        heads = ["folder", "process", "model", "digest", "memory", "experts in memory", "clients", "up", "listens on"]
        assert re.split(r"  +", head) == heads
        words = row.split()
        assert words[:4] == [str(daemon.folder), str(daemon.pid), store[1].model, store[1].digest[:12]]
        assert words[4:12] == ["192", "KiB", "3", "of", "12", "1", "(process", f"{os.getpid()})"]
        assert words[-1] == "-"
        (found,) = json.loads(said(runtime, "ps", "--json"))
        assert 0 < found.pop("uptime_s") < 3600
        assert found == {
            "folder": str(daemon.folder),
            "pid": daemon.pid,
            "version": daemon.card.version,
            "listen": "",
            "metrics": "",
            "answers": True,
            "models": [
                {
                    "name": store[1].model,
                    "digest": store[1].digest,
                    "directory": str(store[0]),
                    "budget_bytes": 12 * SLOT,
                    "ready": 3,
                    "slots": 12,
                    "clients": 1,
                    "leases": 2,
                    "client_pids": [os.getpid()],
                }
            ],
        }


def test_a_model_has_the_name_that_list_shows(
    models: Path, daemon: DaemonProcess, store: tuple[Path, Manifest], runtime: Path
) -> None:
    name = register_name(store[0])
    assert name is not None
    assert name != store[1].model
    assert said(runtime, "ps").splitlines()[1].split()[2] == name
    assert said(runtime, "stats").splitlines()[1] == f"{name} ({store[1].digest[:12]})"
    assert json.loads(said(runtime, "stats", "--json"))["models"][0]["name"] == name
    with running_daemon_in(runtime / "moetier" / "named", store[0]) as other:
        assert [model.name for model in other.card.models] == [name], "it names itself so, too"


def test_stats_of_a_daemon_in_a_folder_of_its_own_has_that_name_too(
    models: Path, store: tuple[Path, Manifest], runtime: Path, tmp_path: Path
) -> None:
    name = register_name(store[0])
    own = tmp_path / "own"
    with running_daemon(store[0], ram=12 * SLOT, folder=own):
        assert said(runtime, "stats", str(own)).splitlines()[1] == f"{name} ({store[1].digest[:12]})"


def test_several_with_several_models(store: tuple[Path, Manifest], runtime: Path, tmp_path: Path) -> None:
    plan = make_plan(model="acme/other")
    write_store(tmp_path / "other", plan, make_records(plan, 1))
    names = runtime / "moetier"
    with (
        running_daemon_in(names / "a", [store[0], tmp_path / "other"]),
        running_daemon_in(names / "b", store[0], "--listen", "127.0.0.1:0", "--insecure") as second,
    ):
        rows = said(runtime, "ps").splitlines()[1:]
        assert [row.split()[0] for row in rows] == [str(names / "a"), "acme/other", str(names / "b")]
        assert rows[2].split()[-1] == second.card.listen
        found = json.loads(said(runtime, "ps", "--json"))
        assert [[model["name"] for model in one["models"]] for one in found] == [
            [store[1].model, "acme/other"],
            [store[1].model],
        ]
        assert refused(runtime, "stats").endswith(f"No daemon runs in {names}/default.")  # which of the two is not said
        assert json.loads(said(runtime, "stats", "b", "--json"))["pid"] == second.pid


def test_one_that_is_stopped_and_one_that_was_killed(
    daemon: DaemonProcess, store: tuple[Path, Manifest], runtime: Path
) -> None:
    with running_daemon_in(runtime / "moetier/killed", store[0]) as other:
        other.kill()
        daemon.process.send_signal(signal.SIGSTOP)
        (row,) = said(runtime, "ps").splitlines()[1:]
        assert "no answer" in row
        (found,) = json.loads(said(runtime, "ps", "--json"))
        assert (found["pid"], found["answers"]) == (daemon.pid, False)
        daemon.process.send_signal(signal.SIGCONT)
        assert "no answer" not in said(runtime, "ps")
        daemon.kill()
        assert "No daemon runs" in said(runtime, "ps")


def test_folders_of_something_else_are_passed_over(daemon: DaemonProcess, runtime: Path) -> None:
    for name, card in (("broken", "{"), ("list", "[]"), ("later", '{"models": [], "news": 1}'), ("empty", "")):
        folder = runtime / "moetier" / name
        folder.mkdir(mode=0o700)
        (folder / "daemon.json").write_text(card)
    (runtime / "moetier/open").mkdir(mode=0o755)
    (runtime / "moetier/open").chmod(0o755)
    (runtime / "moetier/file").write_text("text")
    (runtime / "moetier/link").symlink_to(daemon.folder)
    assert [one["pid"] for one in json.loads(said(runtime, "ps", "--json"))] == [daemon.pid]


def test_what_others_are_called_is_no_escape_sequence(runtime: Path, tmp_path: Path) -> None:
    plan = make_plan(model="acme/\x1b[2Jodd\n")
    write_store(tmp_path / "odd", plan, make_records(plan, 1))
    with running_daemon_in(runtime / "moetier/default", tmp_path / "odd"):
        assert said(runtime, "ps").splitlines()[1].split()[2] == "acme/?[2Jodd?"
        assert said(runtime, "stats").splitlines()[1].startswith("acme/?[2Jodd? (")
        found = json.loads(said(runtime, "stats", "--json"))
        assert found["models"][0]["name"] == plan.model, "a program gets it as it is"
    stats = pb.StatsReply(models=[pb.ModelStats(name=plan.model, digest="1")])
    look = pb.DescribeReply(), stats
    assert changes(look, look).startswith("acme/?[2Jodd? ")
    assert refused(runtime, "stats", f"{tmp_path}/a\x1b]0;b\x07").endswith(f"{tmp_path}/a?]0;b?.")


# -- stats ------------------------------------------------------------------------------------------------------------


def test_what_was_counted(daemon: DaemonProcess, store: tuple[Path, Manifest], runtime: Path) -> None:
    with use(daemon, store[1]):
        found: dict[str, Any] = json.loads(said(runtime, "stats", "--json"))
        text = said(runtime, "stats")
        for address in ("default", str(daemon.folder)):
            assert said(runtime, "stats", address).splitlines()[1:] == text.splitlines()[1:]
    assert (found["pid"], found["address"], found["version"]) == (daemon.pid, str(daemon.folder), daemon.card.version)
    (model,) = found["models"]
    counted = {
        name: model[name] for name in ("name", "digest", "clients", "sessions", "leases", "requests", "reported_hits")
    }
    assert model["client_pids"] == [os.getpid()]
    assert counted == {
        "name": store[1].model,
        "digest": store[1].digest,
        "clients": 1,
        "sessions": 1,
        "leases": 2,
        "requests": 2,
        "reported_hits": 0,
    }
    host = model["host"]
    assert (host["slots"], host["ready"], host["hits"], host["misses"]) == (12, 3, 1, 3)
    assert (host["bytes_in"], host["memory_bytes"]) == (3 * SLOT, 12 * SLOT)
    lines = text.splitlines()
    assert lines[0].startswith(f"{daemon.folder}: process {daemon.pid}, moetier {daemon.card.version}, up ")
    assert lines[1] == f"{store[1].model} ({store[1].digest[:12]})"
    words = " ".join(text.split())
    for part in (
        "experts 3 in memory, with room for 12 (192 KiB); 0 kept from the previous daemon",
        "uses 4 of an expert: 1 hits, in memory (25.0%); 3 misses, not in memory, of which 0 waited for a read already",
        "reads 48 KiB; 0 experts made room for others; 0 failures",
        "prefetch 0 read, 0 useful, 0 late, 0 wasted, 0 cancelled; 0 dropped; saved up to 0.00 s",
        f"clients 1 (process {os.getpid()}), 1 of them connected; they use 2 experts now",
        "requests 2 for missing experts, ",
        "fetches 0 by other machines, 0 B sent",
    ):
        assert part in words


def test_the_outcomes_of_prefetches(daemon: DaemonProcess, store: tuple[Path, Manifest], runtime: Path) -> None:
    with RawClient(daemon.folder, store[1]) as client:
        client.send(prefetch=pb.Prefetch(requested=pb.Experts(block=0, experts=[1, 2])))
        daemon.wait_for("host.ready == 2")
        client.acquire(1, 0, [2])
        client.granted()
        client.release(1)
        daemon.wait_for("host.useful == 1")
        assert "prefetch 2 read, 1 useful, 0 late, 0 wasted, 0 cancelled;" in " ".join(said(runtime, "stats").split())


def test_experts_that_were_read_as_all_fit(store: tuple[Path, Manifest], runtime: Path) -> None:
    with (
        running_daemon(store[0], ram=24 * SLOT, folder=runtime / "moetier/default") as daemon,
        RawClient(daemon.folder, store[1]) as client,
    ):
        for block in range(3):
            client.acquire(block + 1, block, [0, 1, 2, 3])
            for _ in range(4):
                client.granted()
            client.release(block + 1)
        daemon.wait_for("host.ready == 24")
        assert "  preloaded 12 experts, 0 of them used\n" in said(runtime, "stats")


def test_every_counter_of_the_contract_is_in_the_json(daemon: DaemonProcess, runtime: Path) -> None:
    model = daemon.stats()
    (found,) = json.loads(said(runtime, "stats", "--json"))["models"]
    assert set(found) == {field.name for field in model.DESCRIPTOR.fields} | {"client_pids"}
    assert set(found["host"]) == {field.name for field in model.host.DESCRIPTOR.fields}


@pytest.fixture
def watching(runtime: Path) -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def watch(runtime: Path, watching: list[subprocess.Popen[str]], *words: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*COMMAND, "stats", "--watch", "0.05", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XDG_RUNTIME_DIR": str(runtime)},
    )
    watching.append(process)
    return process


def lines_of(process: subprocess.Popen[str], count: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline() for _ in range(count)]


def interrupted(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""


def test_watching(
    daemon: DaemonProcess, store: tuple[Path, Manifest], runtime: Path, watching: list[subprocess.Popen[str]]
) -> None:
    people, machine = watch(runtime, watching), watch(runtime, watching, "--json")
    head, first = lines_of(people, 2)
    assert head.split()[:6] == ["model", "in", "memory", "clients", "in", "use"]
    assert first.split()[:4] == [store[1].model, "0/12", "0", "0"]
    assert len(first) == len(head), "columns"
    assert json.loads(*lines_of(machine, 1))["models"][0]["host"]["ready"] == 0
    with use(daemon, store[1]):
        while lines_of(people, 1)[0].split()[1:4] != ["3/12", "1", "2"]:
            pass
        while json.loads(*lines_of(machine, 1))["models"][0]["leases"] != 2:
            pass
    interrupted(people)
    interrupted(machine)


def test_watching_one_that_ends_is_reported(
    daemon: DaemonProcess, runtime: Path, watching: list[subprocess.Popen[str]]
) -> None:
    process = watch(runtime, watching)
    lines_of(process, 2)
    daemon.kill()
    assert process.wait(PATIENCE) == 1
    assert process.stderr is not None
    assert len(process.stderr.read().splitlines()) == 2


def test_between_two_looks_another_daemon_may_have_begun() -> None:
    """At a TCP address, with other models: its counters begin at nothing, and no rate is negative."""
    host = pb.Tier(slots=12, hits=100, misses=50, bytes_in=1 << 20)
    before = pb.StatsReply(uptime_s=1, models=[pb.ModelStats(name="acme/one", digest="1", host=host)])
    fresh = [pb.ModelStats(name=f"acme/{digest}", digest=digest, host=pb.Tier(hits=4)) for digest in ("1", "2")]
    known = pb.DescribeReply(pid=7, started_unix_ms=1000)
    for daemon, uptime, rate in (
        (pb.DescribeReply(pid=8, started_unix_ms=9000), 2, "2"),  # longer up than the other was when it was seen
        (pb.DescribeReply(pid=7, started_unix_ms=9000), 2, "2"),  # the first process of another container
        (known, 0.5, "8"),  # it began behind the first answer
    ):
        now = daemon, pb.StatsReply(uptime_s=uptime, models=fresh)
        rows = [line.split() for line in changes((known, before), now).splitlines()]
        assert [(row[0], row[4]) for row in rows] == [("acme/1", rate), ("acme/2", rate)]
    assert changes((known, before), (known, pb.StatsReply(uptime_s=502, models=[]))) == ""


def test_mistakes_are_reported(daemon: DaemonProcess, runtime: Path) -> None:
    assert "No daemon runs" in refused(runtime, "stats", "nobody")
    assert "The call to the daemon failed" in refused(runtime, "stats", "127.0.0.1:1", "--insecure")
    assert "can't be read" in refused(runtime, "stats", "127.0.0.1:1", "--token-file", "/nonexistent")
    assert "can't be reached" in refused(runtime, "stats", f"{__file__}/d")
    for words in (["--watch", "0"], ["--watch", "often"], ["--watch", "nan"], ["a", "b"], ["a b"]):
        result = moetier(runtime, "stats", *words)
        assert (result.returncode, result.stdout) == (2, "")
        assert "Traceback" not in result.stderr
        assert "_interval" not in result.stderr


def test_what_tls_has_to_be_told_is_reported(store: tuple[Path, Manifest], runtime: Path, tmp_path: Path) -> None:
    """In two lines, without gRPC's own."""
    authority, other = trustme.CA(), trustme.CA()
    identity = authority.issue_cert("127.0.0.1")
    identity.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "both"))
    authority.cert_pem.write_to_path(str(tmp_path / "ca"))
    other.cert_pem.write_to_path(str(tmp_path / "other"))
    (tmp_path / "token").write_text("s3cret\n")
    (tmp_path / "token").chmod(0o600)
    files = {name: str(tmp_path / name) for name in ("both", "ca", "other", "token")}
    tls = ["--tls-cert", files["both"], "--tls-key", files["both"], "--token-file", files["token"]]
    with running_daemon_in(tmp_path / "d" / "d", store[0], "--listen", "127.0.0.1:0", *tls) as daemon:
        listen = daemon.card.listen
        trusted = ["--tls-ca", files["ca"]]
        assert json.loads(said(runtime, "stats", listen, "--json", *trusted, "--token-file", files["token"]))
        for options, fix in (([], "--tls-ca"), (["--insecure"], "--tls-ca"), (trusted, "--token-file")):
            result = moetier(runtime, "stats", listen, *options)
            assert (result.returncode, len(result.stderr.splitlines())) == (1, 2), result.stderr
            assert fix in result.stderr.splitlines()[1]
        assert "CERTIFICATE_VERIFY_FAILED" in refused(runtime, "stats", listen, "--tls-ca", files["other"])
        name = listen.replace("127.0.0.1", "localhost")
        assert re.search("Hostname|Peer name", refused(runtime, "stats", name, *trusted)), "as gRPC's release says it"
    with running_daemon_in(tmp_path / "d" / "e", store[0], "--listen", "127.0.0.1:0", "--insecure") as daemon:
        assert "TLS" in refused(runtime, "stats", daemon.card.listen).upper()


def test_a_reader_that_has_enough(daemon: DaemonProcess, runtime: Path) -> None:
    command = f"'{sys.executable}' -m moetier.tools.main stats --watch 0.01 | head -n 3"
    environment = os.environ | {"XDG_RUNTIME_DIR": str(runtime)}
    result = subprocess.run(
        ["/bin/sh", "-c", command], capture_output=True, text=True, check=True, env=environment, timeout=PATIENCE
    )
    assert (len(result.stdout.splitlines()), result.stderr) == (3, "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (0.9, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (3725, "1 h 2 min"), (90_000, "1 d 1 h")],
)
def test_times_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_clients_are_named_by_their_processes() -> None:
    """Three at most; one in another PID namespace has none, and a daemon of an older version may name none."""
    clients = [pb.Client(number=n, pid=pid) for n, pid in enumerate((42, 9, 42, 0))]
    stats = pb.StatsReply(models=[pb.ModelStats(digest="d", clients=4)], details=[pb.Details(clients=clients)])
    assert client_processes(stats) == {"d": [0, 9, 42]}
    assert client_processes(pb.StatsReply(models=stats.models)) == {}
    assert with_processes(4, [0, 9, 42]) == "4 (processes 9, 42)"
    assert with_processes(1, [9]) == "1 (process 9)"
    assert with_processes(9, [1, 2, 3, 4]) == "9 (processes 1, 2, 3, ...)"
    assert with_processes("?", []) == "?"
