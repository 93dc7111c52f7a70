"""Measure how soon a daemon that was killed serves again with its records in memory, and how much it reads for that.

    python tests/measurements/restart.py DIR --ram 100%

Starts a daemon. A client demands every expert, and keeps the arena mapped. Then the daemon is killed with SIGKILL and
started again. Prints how long the start took, how many slots are READY, and how many bytes were read; and what is read
when the client demands every expert once more.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))

from daemons import running_daemon

from moetier.runtime.client.tier import DaemonTier
from moetier.runtime.config import Size
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.folder import read_manifest, store_folder
from moetier.tiers.text import format_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--ram", default="100%", help="of the daemon; a share is of all experts (default: %(default)s)")
    arguments = parser.parse_args()
    manifest = read_manifest(store_folder(arguments.directory))
    ram = Size.parse(arguments.ram).of(manifest.stored_bytes)
    print(f"machine  {platform.machine()}, {os.cpu_count()} CPUs; {manifest.model}, {format_bytes(ram)} of experts")
    with (
        tempfile.TemporaryDirectory() as base,
        running_daemon(arguments.directory, ram=ram, folder=Path(base) / "daemon") as daemon,
        contextlib.closing(DaemonTier.open(daemon.folder, arguments.directory, manifest)) as client,
    ):
        visit(client, manifest)
        full = daemon.stats().host
        print(f"before   {full.ready} of {full.slots} slots READY, {format_bytes(full.bytes_in)} read")
        daemon.kill()
        began = time.monotonic()
        daemon.start()
        ready = time.monotonic() - began
        warm = daemon.stats().host
        print(
            f"after    kill -9 and a start: serves after {ready:.2f} s, {warm.ready} of {warm.slots} slots READY "
            f"({warm.ready / warm.slots:.0%}), {format_bytes(warm.bytes_in)} read"
        )
        visit(client, manifest)
        last = daemon.wait_for("clients == 1").host
        print(
            f"then     all {manifest.record_count} experts demanded once more: {format_bytes(last.bytes_in)} read, "
            f"{last.misses} misses"
        )


def visit(client: DaemonTier, manifest: Manifest) -> None:
    """Demands every expert."""
    for block, entry in enumerate(manifest.blocks):
        held = [lease.validate() for lease in client.acquire([ExpertKey(block, e) for e in range(entry.experts)])]
        assert sum(held) == entry.experts


if __name__ == "__main__":
    main()
