"""A store with a shard of another conversion: what a daemon, its clients and other hosts get of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from daemons import DaemonProcess, running_daemon
from faults import flip_bit, need_strace, only
from outlets import PLAIN, served
from readers import PATIENCE, RamReader
from stores import keys, make_plan, make_records, make_store, shard, with_foreign_shard, without_table
from threads import wait_until

import moetier
from moetier.proto import expert_store_pb2 as pb
from moetier.runtime.client.remote import RemoteStore
from moetier.runtime.client.tier import DaemonTier
from moetier.tiers.arena.arena import Arena
from moetier.tiers.cache.budget import slots_for
from moetier.tiers.errors import ChecksumError, MoetierError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey
from moetier.tiers.store import reader
from moetier.tiers.store.folder import GROUP, read_manifest
from moetier.tiers.store.reader import ShardStore
from moetier.tiers.store.shard import ShardFile
from moetier.tools.main import main

PLAN = make_plan()
stored_checksums = ShardFile.stored_checksums
SLOT = PLAN.layout(0).slot_bytes


@pytest.fixture
def swapped(tmp_path: Path) -> Path:
    """A store whose block 1 is another's."""
    return with_foreign_shard(tmp_path)


@pytest.mark.parametrize("table", [True, False])
def test_a_daemon_does_not_start(swapped: Path, tmp_path: Path, table: bool) -> None:
    if not table:
        without_table(swapped)
    with (
        pytest.raises(AssertionError, match="it ended with 1") as caught,
        running_daemon(swapped, ram=8 * SLOT, folder=tmp_path / "daemon"),
    ):
        pass
    assert "to another conversion" in str(caught.value) or "not all of one conversion" in str(caught.value)


def test_records_that_an_older_daemon_left_in_memory_are_compared(tmp_path: Path) -> None:
    records = make_store(tmp_path / "model")
    manifest = read_manifest(tmp_path / "model" / GROUP)
    others = records | {key: record for key, record in make_records(PLAN, 1).items() if key.block == 1}
    with HostTier(RamReader(manifest, others), slots={"records": 12}) as old:
        for key in records:
            list(old.acquire([key]))
        descriptor = old.export()
    try:
        arena = Arena.reclaim(descriptor, manifest)
    finally:
        os.close(descriptor)
    with HostTier(RamReader(manifest, records), slots={"records": 12}, arena=arena) as new:
        assert new.recovered == 8
        assert [new.ready_experts(block) for block in range(3)] == [[0, 1, 2, 3], [], [0, 1, 2, 3]]


def test_another_host_sends_a_record_of_another_conversion(tmp_path: Path) -> None:
    """As a daemon of an older moetier does, which says the digest of its manifest."""
    records = make_store(tmp_path / "model")
    manifest = read_manifest(tmp_path / "model" / GROUP)
    key = ExpertKey(1, 2)
    others = records | {key: make_records(PLAN, 1)[key]}
    with (
        HostTier(RamReader(manifest, others), slots={"records": 8}) as host,
        served(host) as address,
        RemoteStore(address, PLAIN, manifest) as reader,
    ):
        slot = memoryview(bytearray(SLOT))
        reader.read_into(ExpertKey(1, 1), slot)
        assert bytes(slot[:-4]) == records[ExpertKey(1, 1)]
        with pytest.raises(ChecksumError, match="sent a record of another conversion"):
            reader.read_into(key, slot)


def test_a_damaged_trunk_is_named_by_its_daemon_and_by_a_load(tinymix_4bit: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tinymix_4bit, tmp_path / "model"))
    trunk = model / "trunk-00001-of-00001.safetensors"
    flip_bit(trunk, -1)
    with running_daemon(model, ram="8MiB", folder=tmp_path / "daemon") as daemon:
        wait_until(lambda: "trunk-damaged" in daemon.log)
        assert f"{trunk}, a file of the trunk: checksum mismatch" in daemon.log
        assert daemon.stop() == 0
    with pytest.raises(ChecksumError, match=f"{trunk}, a file of the trunk: checksum mismatch"):
        moetier.load(model)


@contextlib.contextmanager
def daemon_of_slow_disk(folder: Path, place: Path) -> Iterator[DaemonProcess]:
    """A disk takes 100 ms for a small read, so that the check of the digest outlasts the start."""
    need_strace()
    shards = [word for block in range(3) for word in ("-P", str(shard(folder, block).path))]
    inject = ["-e", "inject=pread64:delay_exit=100000"]
    prefix = ["strace", "-D", "-f", "-qq", "-o", os.devnull, *only("pread64"), *shards, *inject]
    with running_daemon(
        folder, ram=12 * SLOT, folder=place, prefix=prefix, extra=["--metrics", "127.0.0.1:0"]
    ) as daemon:
        yield daemon


def test_an_older_store_is_checked_while_it_is_served(
    swapped: Path, tmp_path: Path, runtime: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without_table(swapped)
    manifest = read_manifest(swapped / GROUP)
    with (
        daemon_of_slow_disk(swapped, runtime / "moetier" / "daemon") as daemon,
        DaemonTier.open(daemon.folder, tmp_path / "no-store", manifest) as tier,
    ):
        assert not daemon.stats().fault
        with contextlib.closing(tier.acquire(keys(0, 1))) as leases:
            held = next(leases)
            daemon.wait_for("fault != ''")
            assert not held.validate(), "it is computed again"
        with pytest.raises(ChecksumError, match="not all of one conversion"):  # what was a hit
            list(tier.acquire(keys(0, 1)))
        with pytest.raises(ChecksumError, match="not all of one conversion"):
            list(tier.acquire(keys(2, 1)))
        tier.prefetch(2, keys(2, 0))  # is ignored
        with pytest.raises(MoetierError, match="not all of one conversion"):
            DaemonTier.open(daemon.folder, tmp_path / "no-store", manifest)
        with daemon.stub() as stub:
            assert not stub.Describe(pb.DescribeRequest(), timeout=PATIENCE).models, "it claims the digest no more"
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Fetch(pb.FetchRequest(digest=manifest.digest, block=0, expert=0), timeout=PATIENCE))
            assert caught.value.code() is grpc.StatusCode.DATA_LOSS
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://{daemon.card.metrics}/healthz", timeout=PATIENCE)
        refused.value.close()
        assert refused.value.code == 503
        with urllib.request.urlopen(f"http://{daemon.card.metrics}/metrics", timeout=PATIENCE) as answer:
            assert b'moetier_daemon_faulty{model="acme/tiny-moe"} 1.0' in answer.read()
        assert "condemned" in daemon.log
        assert "not all of one conversion" in daemon.log
        assert main(["ps", "--json"]) == 0
        ((found,),) = [one["models"] for one in json.loads(capsys.readouterr().out)]
        assert "not all of one conversion" in found["fault"]
        assert daemon.stop() == 0


def slowly(file: ShardFile, descriptor: int | None = None) -> Iterator[int]:
    for crc in stored_checksums(file, descriptor):
        time.sleep(0.05)
        yield crc


def test_an_older_store_is_checked_while_a_process_computes_from_it(
    swapped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a daemon; on a disk on which the check takes long."""
    without_table(swapped)
    monkeypatch.setattr(reader, "DIGEST_SECONDS", 0.0)
    monkeypatch.setattr(ShardFile, "stored_checksums", slowly)
    found = threading.Event()
    with (
        ShardStore.open(swapped) as store,
        HostTier(store, slots=slots_for(store.manifest, 12 * SLOT)) as host,
    ):
        list(host.acquire(keys(0, 0, 1)))
        store.on_fault(lambda error: found.set())
        assert found.wait(PATIENCE)
        for block in (0, 1):  # a hit, and a miss
            with pytest.raises(ChecksumError, match="not all of one conversion"):
                list(host.acquire(keys(block, 0)))
        with pytest.raises(ChecksumError):
            store.read_into(ExpertKey(0, 0), memoryview(bytearray(SLOT)))
