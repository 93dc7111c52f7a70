"""What Prometheus reads of a daemon."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client", reason='pip install ".[metrics]"')

from daemons import DaemonProcess, running_daemon
from prepared import MAIN, for_daemons
from prometheus import scrape
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parsed_open
from prometheus_client.parser import text_string_to_metric_families as parsed
from raw_client import RawClient
from readers import PATIENCE
from stores import layout_of, make_plan, make_records, write_store
from threads import wait_until

from moetier.proto import expert_store_pb2 as pb
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.folder import read_manifest
from moetier.tools.main import main

SLOT = layout_of().slot_bytes
LOOPBACK = ["--metrics", "0"]
Store = tuple[Path, Manifest]


def samples(text: str) -> dict[tuple[str, ...], float]:
    """By name and the values of labels, in the order of their names."""
    found = [sample for family in parsed(text) for sample in family.samples]
    return {(each.name, *(value for _, value in sorted(each.labels.items()))): each.value for each in found}


def metrics(daemon: DaemonProcess) -> dict[tuple[str, ...], float]:
    return samples(scrape(f"http://{daemon.card.metrics}/metrics"))


def test_they_are_the_counters(store: Store, tmp_path: Path) -> None:
    """Count a client that asked for three records and holds two, and two prefetch requests, one of them useful."""
    with running_daemon(store[0], ram=12 * SLOT, folder=tmp_path / "d", extra=LOOPBACK) as daemon:
        with RawClient(daemon.folder, store[1]) as client:
            client.acquire(1, 0, [1, 2, 3])
            for _ in range(3):
                client.granted()
            client.release(1, [3])
            client.send(prefetch=pb.Prefetch(requested=pb.Experts(block=1, experts=[1, 2])))
            daemon.wait_for("host.ready == 5")
            client.acquire(2, 1, [2])
            client.granted()
            client.release(2)
            stats = daemon.wait_for("leases == 2 and host.useful == 1")
            found = metrics(daemon)
        name = store[1].model
        of_tier = {key[0]: value for key, value in found.items() if key[1:] == (name, "host")}
        host = stats.host
        assert {name.removeprefix("moetier_tier_"): value for name, value in of_tier.items()} == {
            "slots": 12,
            "ready_slots": 5,
            "leased_slots": 2,
            "memory_bytes": 12 * SLOT,
            "hits_total": 1,
            "misses_total": 3,
            "joined_total": 0,
            "evictions_total": 0,
            "load_failures_total": 0,
            "discarded_total": 0,
            "loaded_bytes_total": 5 * SLOT,
            "prefetches_total": 2,
            "prefetches_dropped_total": 0,
            "prefetch_saved_seconds_total": pytest.approx(host.saved_seconds),
            "warmed_total": 0,
            "recalled_total": 0,
            "load_seconds_count": sum(host.loads),
            "load_seconds_sum": pytest.approx(host.load_seconds),
            "wait_seconds_count": host.waits,
            "wait_seconds_sum": pytest.approx(host.wait_seconds),
        }
        assert (3 <= sum(host.loads) <= 5, host.load_seconds > 0, host.waits >= 1) == (True, True, True)
        outcomes = {key[2]: value for key, value in found.items() if key[0] == "moetier_tier_prefetch_outcomes_total"}
        assert outcomes == {"useful": 1, "late": 0, "wasted": 0, "cancelled": 0}
        of_daemon = {key[0][15:]: value for key, value in found.items() if key[0].startswith("moetier_daemon_")}
        assert {key[1:] for key in found if key[0].startswith("moetier_daemon_")} == {(name,)}
        assert of_daemon == {
            "clients": 1,
            "sessions": 1,
            "leases": 2,
            "recovered_slots": 0,
            "faulty": 0,
            "requests_total": 2,
            "reported_hits_total": 0,
            "fetches_total": 0,
            "fetched_bytes_total": 0,
            "computed_rows_total": 0,
            "received_bytes_total": stats.session_bytes_in,
            "sent_bytes_total": stats.session_bytes_out,
        }
        assert found["moetier_build_info", daemon.card.version] == 1
        assert found["process_start_time_seconds",] == pytest.approx(daemon.card.started_unix, abs=60)
        assert daemon.stop() == 0


def test_a_histogram_is_cumulative_in_both_text_formats(store: Store, tmp_path: Path) -> None:
    with running_daemon(store[0], ram=12 * SLOT, folder=tmp_path / "d", extra=LOOPBACK) as daemon:
        with RawClient(daemon.folder, store[1]) as client:
            client.acquire(1, 0, [1, 2, 3])
            for _ in range(3):
                client.granted()
        host = daemon.stats().host
        url = f"http://{daemon.card.metrics}/metrics"
        for accept, parse in (("", parsed), ("application/openmetrics-text; version=1.0.0", parsed_open)):
            (loads,) = (family for family in parse(scrape(url, accept=accept)) if family.name.endswith("load_seconds"))
            buckets = [(s.labels["le"], s.value) for s in loads.samples if s.name.endswith("_bucket")]
            assert [float(bound) for bound, _ in buckets] == [*host.load_bounds, float("inf")]
            counts = [value for _, value in buckets]
            assert counts == [sum(host.loads[: number + 1]) for number in range(len(host.loads))]
            assert counts[-1] == 3


def test_two_stores_of_one_model_are_told_apart(store: Store, tmp_path: Path) -> None:
    plan = make_plan(experts=8)
    write_store(tmp_path / "other", plan, make_records(plan, 1))
    other = read_manifest(tmp_path / "other" / "experts.zarr")
    with running_daemon([store[0], tmp_path / "other"], folder=tmp_path / "d", extra=LOOPBACK) as daemon:
        models = {key[1] for key in metrics(daemon) if key[0] == "moetier_tier_slots"}
        assert models == {f"{plan.model} ({digest[:12]})" for digest in (store[1].digest, other.digest)}


def test_by_default_there_are_none(store: Store, tmp_path: Path) -> None:
    with running_daemon(store[0], folder=tmp_path / "d") as daemon:
        assert daemon.card.metrics == ""
        assert "metrics=-" in daemon.log
        listening = subprocess.run(["cat", f"/proc/{daemon.pid}/net/tcp"], capture_output=True, text=True, check=True)
        inodes = {line.split()[9] for line in listening.stdout.splitlines()[1:] if line.split()[3] == "0A"}
        sockets = {str(link.readlink()) for link in Path(f"/proc/{daemon.pid}/fd").iterdir()}
        assert not sockets & {f"socket:[{inode}]" for inode in inodes}


def test_a_port_alone_is_of_this_machine(store: Store, tmp_path: Path) -> None:
    with running_daemon(store[0], folder=tmp_path / "d", extra=LOOPBACK) as daemon:
        assert re.fullmatch(r"127\.0\.0\.1:\d+", daemon.card.metrics)
        assert f"metrics={daemon.card.metrics}" in daemon.log
        assert "insecure" not in daemon.log


@pytest.mark.parametrize(("where", "is_said"), [("[::1]:0", False), ("localhost:0", False), ("0.0.0.0:0", True)])
def test_where_it_is_reported(store: Store, tmp_path: Path, where: str, is_said: bool) -> None:
    if where.startswith("[") and not Path("/proc/net/if_inet6").exists():
        pytest.skip("there is no IPv6")
    with running_daemon(store[0], folder=tmp_path / "d", extra=["--metrics", where]) as daemon:
        assert metrics(daemon)
        said = f'level=warning event=insecure metrics={daemon.card.metrics} without="a token and TLS"\n'
        assert (said in daemon.log) == is_said


def test_a_port_that_is_taken_is_reported_and_nothing_is_left(store: Store, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = ("daemon", store[0], "--folder", tmp_path / "d", "--ram", 3 * SLOT, "--metrics", port)
        done = for_daemons().run(MAIN, *words)
    assert done.returncode == 1
    cause, fix = [line for line in done.stderr.splitlines() if "event=" not in line]
    assert cause.endswith(f"Metrics can't be served on 127.0.0.1:{port}: Address already in use.")
    assert "--metrics" in fix
    assert not [path for path in (tmp_path / "d").iterdir() if path.name != "lock"]


def test_a_scraper_that_says_nothing_holds_up_no_end(store: Store, tmp_path: Path) -> None:
    with running_daemon(store[0], folder=tmp_path / "d", extra=LOOPBACK) as daemon:
        host, port = daemon.card.metrics.split(":")
        with socket.create_connection((host, int(port))):
            assert metrics(daemon)
            assert daemon.stop() == 0
        with pytest.raises(urllib.error.URLError):
            scrape(f"http://{host}:{port}/metrics")


def healthz(daemon: DaemonProcess) -> tuple[int, str, str]:
    """Status, type and text."""
    host, port = daemon.card.metrics.split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request("GET", "/healthz")
        reply = connection.getresponse()
        return reply.status, reply.headers["Content-Type"], reply.read().decode()


def test_probes_without_a_credential_ask_healthz(store: Store, tmp_path: Path) -> None:
    with running_daemon(store[0], folder=tmp_path / "d", extra=[*LOOPBACK, "--drain", str(PATIENCE)]) as daemon:
        assert healthz(daemon) == (200, "text/plain", "SERVING\n")
        with RawClient(daemon.folder, store[1]) as client:
            client.acquire(1, 0, [1])
            client.granted()
            daemon.process.send_signal(signal.SIGTERM)
            client.acquire(2, 0, [2])
            while client.answer().WhichOneof("message") == "granted":  # it does not hear of the signal at once
                client.release(2)
                client.acquire(2, 0, [2])
            wait_until(lambda: healthz(daemon) == (503, "text/plain", "NOT_SERVING\n"))
            assert metrics(daemon)
            client.release(1)
            assert daemon.process.wait(PATIENCE) == 0


def test_connections_that_say_nothing_hold_up_neither_metrics_nor_probes(store: Store, tmp_path: Path) -> None:
    with running_daemon(store[0], folder=tmp_path / "d", extra=LOOPBACK) as daemon, contextlib.ExitStack() as stack:
        host, port = daemon.card.metrics.split(":")
        for sent in [b"", b"GET /healthz HTTP/1.1\r\nHost: "] * 60:
            end = stack.enter_context(socket.create_connection((host, int(port))))
            end.sendall(sent)
        assert metrics(daemon)
        assert healthz(daemon)[0] == 200


@pytest.mark.slow
def test_a_connection_that_says_nothing_is_closed(store: Store, tmp_path: Path) -> None:
    with running_daemon(store[0], folder=tmp_path / "d", extra=LOOPBACK) as daemon:
        host, port = daemon.card.metrics.split(":")
        with socket.create_connection((host, int(port)), PATIENCE) as silent:
            assert silent.recv(1) == b""
        assert "Traceback" not in daemon.log


def test_the_extra_is_named_where_it_is_missing(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert main(["daemon", str(store[0]), "--folder", str(tmp_path / "d"), *LOOPBACK]) == 1
    cause, fix = capsys.readouterr().err.splitlines()
    assert "needs prometheus_client" in cause
    assert 'pip install ".[metrics]"' in fix


def test_ps_says_where(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "moetier").mkdir(mode=0o700)
    with running_daemon(store[0], folder=tmp_path / "moetier" / "d", extra=LOOPBACK) as daemon:
        assert main(["ps", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["metrics"] == daemon.card.metrics
