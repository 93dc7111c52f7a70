"""Measure how fast records are read from a daemon as if it were on another host, over TLS.

    python tests/measurements/remote.py --channels 3 --rounds 20

The connection goes over loopback, and then into a network namespace. The daemon has a store of two large random records
in memory. They are read by turns into one slot, and their checksums are checked, as a tier with one loader would do.
Daemon and reader share the cores of this machine, so the CPU seconds of each of them are printed too.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import grpc
import psutil
import pytest
import trustme

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))

from daemons import running_daemon
from networks import network
from stores import layout_of, make_plan, make_records, write_store

from moetier.runtime.client.remote import CHANNELS, RemoteStore
from moetier.runtime.wire.address import Address, Credentials
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest

WARM = 3  # reads that are not counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=CHANNELS)
    parser.add_argument("--rounds", type=int, default=20, help="records read (default: %(default)s)")
    parser.add_argument("--megabytes", type=int, default=100, help="of a record (default: %(default)s)")
    arguments = parser.parse_args()
    rows = round(arguments.megabytes * 1e6 / (3 * 4096 * 2))
    plan = make_plan(blocks=1, experts=2, layout=layout_of(rows, 4096))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = write_store(folder / "store", plan, make_records(plan))
        cpus, load = os.cpu_count(), os.getloadavg()[0]
        print(f"machine  {platform.machine()}, {cpus} CPUs, load before {load:.2f}, grpc {grpc.__version__}")
        print(f"record   {manifest.layout(0).slot_bytes:,} bytes; {arguments.channels} channels, a thread for each")
        measure("loopback", folder, manifest, "127.0.0.1", arguments, [])
        try:
            with network() as net:
                measure("namespace", folder, manifest, net.there, arguments, net.prefix)
        except pytest.skip.Exception as reason:
            print(f"namespace: {reason}")


def measure(
    what: str, folder: Path, manifest: Manifest, host: str, arguments: argparse.Namespace, prefix: Sequence[str]
) -> None:
    files = folder / what
    files.mkdir()
    authority = trustme.CA()
    issued = authority.issue_cert(host)
    authority.cert_pem.write_to_path(str(files / "ca"))
    issued.private_key_pem.write_to_path(str(files / "key"))
    issued.cert_chain_pems[0].write_to_path(str(files / "cert"))
    (files / "token").write_text("token")
    options = ["--listen", f"{host}:0", "--token-file", files / "token"]
    options += ["--tls-cert", files / "cert", "--tls-key", files / "key"]
    credentials = Credentials(token_file=files / "token", ca=files / "ca")
    with (
        running_daemon(
            folder / "store", ram=manifest.stored_bytes, folder=files / "daemon", extra=options, prefix=prefix
        ) as daemon,
        RemoteStore(Address.parse(daemon.card.listen), credentials, manifest, channels=arguments.channels) as reader,
        contextlib.closing(mmap.mmap(-1, manifest.layout(0).slot_bytes)) as mapping,
        memoryview(mapping) as slot,
    ):
        reader.probe()
        sides = [psutil.Process(daemon.pid), psutil.Process()]
        times, before = [], [0.0, 0.0]
        for number in range(-WARM, arguments.rounds):
            if not number:
                before = [seconds(side) for side in sides]
            began = time.perf_counter()
            reader.read_into(ExpertKey(0, number % 2), slot)
            if number >= 0:
                times.append(time.perf_counter() - began)
        gigabytes = len(slot) / 1e9
        used = [(seconds(side) - start) / gigabytes / len(times) for side, start in zip(sides, before, strict=True)]
        quartiles = statistics.quantiles(times, n=4)
        print(
            f"{what:9} {gigabytes / statistics.median(times):.2f} GB/s at the median of {len(times)}"
            f" (quartiles {gigabytes / quartiles[2]:.2f} to {gigabytes / quartiles[0]:.2f},"
            f" all together {gigabytes * len(times) / sum(times):.2f});"
            f" CPU seconds a GB: daemon {used[0]:.2f}, reader {used[1]:.2f}"
        )


def seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    main()
