"""Daemons of other hosts as they are: real processes, killed and frozen, behind a network that loses packets."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import outlets  # noqa: F401 - keeps gRPC's event loop from one test to the next
import pytest
import trustme
from daemons import DaemonProcess, running_daemon
from integrity import check_integrity
from networks import network
from places import HELPERS
from stores import layout_of, make_plan, make_records, manifest_of, read_record, without_shards, written
from threads import Task, best_time, wait_until

from moetier.runtime.client.peers import Peer, rendezvous
from moetier.runtime.client.remote import RemoteStore
from moetier.runtime.client.spread import SpreadStore
from moetier.runtime.wire.address import Address, Credentials
from moetier.tiers.errors import UnavailableError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey

PLAN = make_plan(blocks=4, experts=12)
RECORDS = make_records(PLAN)
KEYS = list(RECORDS)
# 14 MB: long enough on its way to be cut off in the middle
LARGE_PLAN = make_plan(blocks=1, experts=4, layout=layout_of(rows=1024, columns=2304))
LARGE_RECORDS = make_records(LARGE_PLAN, seed=1)
TOKEN = "s3cret"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("small"), PLAN, RECORDS)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("large"), LARGE_PLAN, LARGE_RECORDS)


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN)
    return path


def address_of(daemon: DaemonProcess) -> Address:
    return Address.parse(daemon.card.listen)


def read(reader: RemoteStore | SpreadStore, key: ExpertKey, records: dict[ExpertKey, bytes]) -> None:
    assert read_record(reader, key) == records[key], f"wrong bytes for {key}"


@pytest.fixture
def three(small: Path, tmp_path: Path, token: Path) -> Iterator[list[DaemonProcess]]:
    """Each with room for all records but one, on a port that it keeps when it is started again.

    With room for all, one that has half of the records would read the others, too.
    """
    ram = PLAN.stored_bytes - PLAN.layout(0).slot_bytes
    with ExitStack() as stack:
        daemons = []
        for name in "abc":
            options = ["--listen", f"127.0.0.1:{free_port()}", "--token-file", token]
            daemons.append(stack.enter_context(running_daemon(small, ram=ram, folder=tmp_path / name, extra=options)))
        yield daemons


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.slow
def test_three_hold_a_third_each_and_one_is_killed_under_load(
    three: list[DaemonProcess], small: Path, tmp_path: Path, token: Path
) -> None:
    bare = without_shards(small, tmp_path / "bare")
    credentials = Credentials(token_file=token, insecure=True)
    addresses = [address_of(daemon) for daemon in three]
    over = threading.Event()

    def caller(host: HostTier, seed: int) -> int:
        chance, count = random.Random(seed), 0
        while not over.is_set():
            block = chance.randrange(4)
            wanted = [ExpertKey(block, expert) for expert in chance.sample(range(12), 4)]
            seen = {lease.key: bytes(lease.record) for lease in host.acquire(wanted)}
            assert seen == {key: RECORDS[key] for key in wanted}
            count += 1
        return count

    with SpreadStore.open(addresses, credentials, manifest_of(bare), bare) as reader:
        for _ in range(2):
            for key in KEYS:
                read(reader, key, RECORDS)
        ready = [daemon.stats().host.ready for daemon in three]
        share = Counter(rendezvous(map(str, addresses), key)[0] for key in KEYS)
        assert ready == [share[str(address)] for address in addresses], "each record is held once, and all are"
        assert [daemon.stats().host.bytes_in for daemon in three] == [
            count * PLAN.layout(0).slot_bytes for count in ready
        ], "and read from the disk once"

        def given() -> int:
            return reader.shares()[0].records

        with HostTier(reader, slots={"records": 6}) as host:
            tasks = [Task(lambda seed=seed: caller(host, seed)) for seed in range(3)]
            try:
                before = given()
                wait_until(lambda: given() > before + 20)
                three[0].kill()
                wait_until(lambda: bool(reader.shares()[0].away))
                others = sum(share.records for share in reader.shares()[1:])
                wait_until(lambda: sum(share.records for share in reader.shares()[1:]) > others + 100)
                assert reader.shares()[0].away
                three[0].restart()
                wait_until(lambda: not reader.shares()[0].away)
                before = given()
                wait_until(lambda: given() > before + 20)
            finally:
                over.set()
                counts = [task.result() for task in tasks]
            assert min(counts) > 0
            check_integrity(host)


def test_one_that_is_frozen_is_not_waited_for_twice(
    three: list[DaemonProcess], small: Path, tmp_path: Path, token: Path
) -> None:
    manifest = manifest_of(small)
    credentials = Credentials(token_file=token, insecure=True)
    peers = [
        Peer(str(address_of(daemon)), RemoteStore(address_of(daemon), credentials, manifest, timeout=1.0))
        for daemon in three
    ]
    with SpreadStore(manifest, peers) as reader:
        for key in KEYS:
            read(reader, key, RECORDS)
        os.kill(three[1].pid, signal.SIGSTOP)
        try:
            for key in KEYS:
                read(reader, key, RECORDS)
            assert peers[1].away is not None
            taken = best_time(lambda: [read(reader, key, RECORDS) for key in KEYS], 1.0)
            assert taken < 1.0, "one deadline, not one a record"
        finally:
            os.kill(three[1].pid, signal.SIGCONT)
        wait_until(lambda: peers[1].away is None)
        for key in KEYS:
            read(reader, key, RECORDS)
        assert [peer.failures for peer in peers] == [0, 1, 0]


# for each line of addresses: waits until the daemons are those, reads all records, and says how many came from each
CLIENT = """
import json, sys, time
from pathlib import Path
from stores import manifest_of, read_record
from moetier.runtime.client import peers, spread
from moetier.runtime.wire.address import Address, Credentials
from moetier.tiers.layout import ExpertKey
peers.RESOLVE_SECONDS = 0.1
group, store, token, ca = sys.argv[1:]
manifest = manifest_of(Path(store))
with spread.SpreadStore.open([Address.parse(group)], Credentials(Path(token), Path(ca)), manifest) as reader:
    for line in sys.stdin:
        while {share.place for share in reader.shares()} - {"former daemons"} != set(line.split()):
            time.sleep(0.01)
        for block, entry in enumerate(manifest.blocks):
            for expert in range(entry.experts):
                read_record(reader, ExpertKey(block, expert))
        print(json.dumps({share.place: share.records for share in reader.shares()}), flush=True)
"""


def test_a_name_of_the_system_s_own_resolver(small: Path, tmp_path: Path, token: Path) -> None:
    """In /etc/hosts, which is another file for the client, and changes under it. TLS is for the name."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 daemons.test\n")
    script = f'mount --bind {hosts} /etc/hosts && exec "$@"'
    within = ["unshare", "--mount", "sh", "-c", script, "sh"]
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("another /etc/hosts needs root and unshare")
    if subprocess.run([*within, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespace can be made")
    ca, port = trustme.CA(), free_port()
    issued = ca.issue_cert("daemons.test")
    ca.cert_pem.write_to_path(str(tmp_path / "ca"))
    issued.private_key_pem.write_to_path(str(tmp_path / "key"))
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "cert"))
    tls = ["--tls-cert", tmp_path / "cert", "--tls-key", tmp_path / "key", "--token-file", token]
    first, second = (f"127.0.0.{number}:{port}" for number in (1, 2))
    with ExitStack() as stack:
        for address in (first, second):
            folder = tmp_path / address.partition(":")[0]
            stack.enter_context(running_daemon(small, folder=folder, extra=["--listen", address, *tls]))
        words = [sys.executable, "-c", CLIENT, f"dns:///daemons.test:{port}", small, token, tmp_path / "ca"]
        client = subprocess.Popen(
            [*within, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(HELPERS)},
        )
        stack.callback(client.communicate)
        stack.callback(client.kill)
        assert client.stdin is not None
        assert client.stdout is not None

        def ask(*addresses: str) -> dict[str, int]:
            print(*addresses, file=client.stdin, flush=True)
            counts: dict[str, int] = json.loads(Task(client.stdout.readline).result())  # type: ignore[union-attr]
            return counts

        total = len(KEYS)
        own = Counter(rendezvous([first, second], key)[0] for key in KEYS)
        assert ask(first) == {first: total}
        hosts.write_text("127.0.0.1 daemons.test\n127.0.0.2 daemons.test\n")
        assert ask(first, second) == {first: total + own[first], second: own[second]}
        hosts.write_text("127.0.0.2 daemons.test\n")
        assert ask(second) == {second: own[second] + total, "former daemons": total + own[first]}


def is_read(store: RemoteStore, key: ExpertKey) -> bool:
    """Read a large record; False if that took longer than the deadline, as it may on a busy machine."""
    with suppress(UnavailableError):
        store.probe()
        read(store, key, LARGE_RECORDS)
        return True
    return False


@pytest.mark.slow
def test_packets_that_are_lost_in_the_middle_of_a_record(large: Path, tmp_path: Path, token: Path) -> None:
    """TLS across a network of its own. With another daemon nothing is missed; alone it is an error by the deadline, and
    right again when packets flow."""
    manifest = manifest_of(large)
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca"))
    with network() as net, ExitStack() as stack:
        issued = ca.issue_cert(net.there, "127.0.0.1")
        issued.private_key_pem.write_to_path(str(tmp_path / "key"))
        issued.cert_chain_pems[0].write_to_path(str(tmp_path / "cert"))
        tls = ["--tls-cert", tmp_path / "cert", "--tls-key", tmp_path / "key", "--token-file", token]
        far = stack.enter_context(
            running_daemon(
                large, folder=tmp_path / "far", extra=["--listen", f"{net.there}:0", *tls], prefix=net.prefix
            )
        )
        near = stack.enter_context(
            running_daemon(large, folder=tmp_path / "near", extra=["--listen", "127.0.0.1:0", *tls])
        )
        credentials = Credentials(token_file=token, ca=tmp_path / "ca")
        peers = [
            Peer(name, RemoteStore(address_of(daemon), credentials, manifest, timeout=1.0))
            for name, daemon in (("far", far), ("near", near))  # named by their ports, one may have no key of four
        ]
        over = threading.Event()

        def load(reader: SpreadStore) -> float:
            """The longest that a record took."""
            longest = 0.0
            while not over.is_set():
                for key in LARGE_RECORDS:
                    began = time.monotonic()
                    read(reader, key, LARGE_RECORDS)
                    longest = max(longest, time.monotonic() - began)
            return longest

        assert {rendezvous(("far", "near"), key)[0] for key in LARGE_RECORDS} == {"far", "near"}
        with SpreadStore(manifest, peers) as reader:
            tasks = [Task(lambda: load(reader)) for _ in range(2)]
            try:
                for _ in range(2):
                    given = peers[0].counts.records
                    wait_until(lambda given=given: peers[0].counts.records > given + 5)  # type: ignore[misc]
                    net.drop()
                    wait_until(lambda: peers[0].away is not None)
                    others = peers[1].counts.records
                    wait_until(lambda others=others: peers[1].counts.records > others + 5)  # type: ignore[misc]
                    net.flow()
                    wait_until(lambda: peers[0].away is None)
            finally:
                over.set()
                longest = [task.result() for task in tasks]
            assert max(longest) < 20, "the deadline of one attempt, and then the other daemon"

        with RemoteStore(address_of(far), credentials, manifest, timeout=1.0) as alone:
            key = ExpertKey(0, 0)
            wait_until(lambda: is_read(alone, key))
            net.drop()
            began = time.monotonic()
            with pytest.raises(UnavailableError):
                read(alone, key, LARGE_RECORDS)
            assert time.monotonic() - began < 20
            with pytest.raises(UnavailableError):
                alone.probe(1.0)
            net.flow()
            wait_until(lambda: is_read(alone, key))
        far.wait_for("leases == 0")
