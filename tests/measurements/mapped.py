"""Measure the costs of a client on the daemon's machine: time of hits and misses, and bytes on the socket.

    python tests/measurements/mapped.py --rounds 300

Makes a store of random records (32 blocks of 8 experts) and starts a daemon with it. The client demands records as in
decoding, two experts of one block after the other. For hits, the daemon has room for all records. For misses, it has
room for one block's two experts, so each record is read from the disk. All bytes on the socket between daemon and
client are counted, those of gRPC's protocol too.
"""

from __future__ import annotations

import argparse
import mmap
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import grpc

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))

from daemons import running_daemon
from relays import relay
from stores import layout_of, make_plan, make_records, write_store

from moetier.runtime.client.tier import DaemonTier
from moetier.tiers.cache.budget import slots_for
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import ExpertSource
from moetier.tiers.store.reader import ShardStore

BLOCKS, EXPERTS, TOP_K = 32, 8, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300, help="tokens of hits; a tenth of it of misses")
    parser.add_argument("--kilobytes", type=int, default=220, help="of a record (default: %(default)s)")
    arguments = parser.parse_args()
    rows = max(round(arguments.kilobytes * 1e3 / (3 * 512 * 2)), 1)
    plan = make_plan(blocks=BLOCKS, experts=EXPERTS, top_k=TOP_K, layout=layout_of(rows, 512))
    with tempfile.TemporaryDirectory(dir=".") as name:  # on a disk, where /tmp may be memory
        folder = Path(name).absolute()
        manifest = write_store(folder / "store", plan, make_records(plan))
        print(f"machine  {platform.machine()}, {os.cpu_count()} CPUs, load before {os.getloadavg()[0]:.2f}, "
              f"grpc {grpc.__version__}, Python {platform.python_version()}")  # fmt: skip
        print(f"records  {manifest.record_count} of {manifest.layout(0).slot_bytes:,} bytes; one thread asks")
        hits(folder, manifest, arguments.rounds)
        misses(folder, manifest, max(arguments.rounds // 10, 3))


def hits(folder: Path, manifest: Manifest, rounds: int) -> None:
    with (
        running_daemon(folder / "store", ram="100%", folder=folder / "warm") as daemon,
        relay(daemon.folder, folder / "between") as between,
        DaemonTier.open(between.folder, folder / "store", manifest) as tier,
    ):
        for step in range(EXPERTS):
            token(tier, step)
        daemon.wait_for("leases == 0")
        before, passed = daemon.stats(), between.bytes
        times = [token(tier, step) / (BLOCKS * TOP_K) for step in range(rounds)]
        time.sleep(1.0)  # until the last were told
        after, passed = daemon.stats(), between.bytes - passed
        count = rounds * BLOCKS * TOP_K
        assert tier.stats().discarded == 0
        say("a hit", times, 1e6, "us")
        print(
            f"         {after.requests - before.requests} requests for {count} hits, of which the daemon was told in "
            f"{after.session_bytes_in - before.session_bytes_in} bytes, and answered with "
            f"{after.session_bytes_out - before.session_bytes_out}"
        )
        print(f"a token  of {BLOCKS * TOP_K} hits: {passed / rounds:.0f} bytes on the socket "
              f"({threading.active_count()} threads in the client)")  # fmt: skip


def misses(folder: Path, manifest: Manifest, rounds: int) -> None:
    ram = TOP_K * manifest.layout(0).slot_bytes
    with (
        ShardStore.open(folder / "store") as store,
        HostTier(store, slots=slots_for(manifest, ram)) as embedded,
        running_daemon(folder / "store", ram=ram, folder=folder / "cold") as daemon,
        relay(daemon.folder, folder / "beside") as between,
        DaemonTier.open(daemon.folder, folder / "store", manifest) as tier,
        DaemonTier.open(between.folder, folder / "store", manifest) as counted,
    ):
        ways: dict[str, list[float]] = {"read": [], "embedded": [], "daemon": []}
        slot = memoryview(mmap.mmap(-1, manifest.layout(0).slot_bytes))
        for step in range(rounds + 1):
            for block in range(BLOCKS):
                key = ExpertKey(block, step % EXPERTS)
                ways["read"].append(timed(lambda key=key: store.read_into(key, slot)))  # type: ignore[misc]
                for name, source in (("embedded", embedded), ("daemon", tier)):
                    ways[name].append(timed(lambda key=key, source=source: use(source, [key])))  # type: ignore[misc]
        slot.release()
        for times in ways.values():
            del times[:BLOCKS]
        before = daemon.stats()
        for name, times in ways.items():
            say(f"a miss, {name}" if name != "read" else "the read", times, 1e3, "ms")
        beyond = statistics.median(ways["daemon"]) - statistics.median(ways["read"])
        print(f"         a miss of the daemon's client takes {1e3 * beyond:.3f} ms beyond the read")
        blocks = [token(tier, step) / BLOCKS for step in range(rounds)]
        after = daemon.stats()
        say("a block", blocks, 1e3, "ms", f" of {TOP_K} misses")
        print(f"         {(after.requests - before.requests) / (rounds * BLOCKS):.2f} requests for each block")
        token(counted, 0)
        passed = between.bytes
        for step in range(rounds):
            token(counted, step + 1)
        passed = between.bytes - passed
        print(f"a token  of {BLOCKS * TOP_K} misses: {passed / rounds:.0f} bytes on the socket, "
              f"of {BLOCKS * TOP_K * manifest.layout(0).slot_bytes:,} bytes of records")  # fmt: skip


def token(source: ExpertSource[memoryview], step: int) -> float:
    """Two experts of each block; seconds."""
    wanted = [[ExpertKey(block, (step + more) % EXPERTS) for more in (0, 3)] for block in range(BLOCKS)]
    return timed(lambda: [use(source, keys) for keys in wanted])


def use(source: ExpertSource[memoryview], keys: Sequence[ExpertKey]) -> int:
    return sum(lease.validate() for lease in source.acquire(keys))


def timed(work: object) -> float:
    began = time.perf_counter()
    assert callable(work)
    work()
    return time.perf_counter() - began


def say(name: str, times: list[float], unit: float, symbol: str, more: str = "") -> None:
    low, middle, high = statistics.quantiles(times, n=4)
    print(
        f"{name:<16} {unit * middle:.3f} {symbol}{more} (quartiles {unit * low:.3f} to {unit * high:.3f}, "
        f"p99 {unit * statistics.quantiles(times, n=100)[98]:.3f}, {len(times)} times)"
    )


if __name__ == "__main__":
    main()
